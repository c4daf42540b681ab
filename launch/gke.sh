#!/usr/bin/env bash
# A workload on a GKE cluster, through XPK (https://github.com/AI-Hypercomputer/xpk), which made the cluster.
#
#     launch/gke.sh --project=my-project --zone=us-west4-a --cluster=my-cluster --workload=my-run \
#         --tpu_type=v5litepod-16 --image=us-docker.pkg.dev/my-project/my-repository/activedpo_jax --build \
#         configs/quickstart.py gs://my-bucket/my-run [--config.OPTION=VALUE ...]
#
# Options; the first six may come from the environment ($PROJECT, $ZONE, ...):
#   --project --zone --cluster --workload --tpu_type --image
#   --build              build the image with launch/Dockerfile, and push it, first
#   --num_slices=N       slices of this type (1)
#   --env_file=FILE      lines NAME=VALUE for the program's environment; XPK writes them into the workload's manifest
#   --xpk_flag=FLAG      a further flag of `xpk workload create` (--spot, --priority=high); may be repeated
#   --max_restarts=N     of the workload; XPK's own default is none (100)
#   --grace_seconds=N    from SIGTERM to SIGKILL when a node is taken away (120)
#   --dry_run            print the commands, run none
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="project zone cluster workload tpu_type image num_slices env_file max_restarts grace_seconds"
lists="xpk_flag" switches="build dry_run"
project="" zone="" cluster="" workload="" tpu_type="" image=""
num_slices=1 env_file="" max_restarts=100 grace_seconds=120 xpk_flag=() build=no
parse "$@"
need project zone cluster workload tpu_type image
cloud_name cluster workload
whole_number num_slices max_restarts grace_seconds
program_from ${rest[@]+"${rest[@]}"}
need_bucket "${rest[1]}" "the disk of a pod goes with it, and each pod has its own"

# XPK puts the command into ( ... ) & in a script, and sends SIGTERM to that subshell: with `exec` it is the program,
# whatever the shell would make of a lone command there.
# Kubernetes reads $(NAME) and $$ in it before the shell does, so each $ is doubled.
words=$(quote python "${program[@]}")
case $words in
    *[[:cntrl:]]*) fail "an argument has a line break or another control character, which a manifest cannot carry" ;;
esac
two_dollars='$$'
command="exec ${words//\$/$two_dollars}"

# Without 75 among these codes JobSet counts an interruption as a failure for good.
create=(xpk workload create "--project=$project" "--zone=$zone" "--cluster=$cluster" "--workload=$workload"
    "--tpu-type=$tpu_type" "--num-slices=$num_slices" "--docker-image=$image"
    "--max-restarts=$max_restarts" --restart-on-exit-codes=75 "--termination-grace-period-seconds=$grace_seconds")
if [ -n "$env_file" ]; then
    check_env_file "$env_file"
    create+=("--env-file=$env_file")
fi

if [ "$build" = yes ]; then
    build_image tpu "$image"
    run docker push "$image"
fi
run "${create[@]}" ${xpk_flag[@]+"${xpk_flag[@]}"} "--command=$command"
there=("--project=$project" "--zone=$zone" "--cluster=$cluster")
say "to wait for its end:"
say "    $(quote xpk workload list "${there[@]}" "--wait-for-job-completion=$workload")"
say "to end it, or before the same name is used again to go on:"
say "    $(quote xpk workload delete "${there[@]}" "--workload=$workload")"
