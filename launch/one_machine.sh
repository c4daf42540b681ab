#!/usr/bin/env bash
# One machine, all of its devices: a laptop, a GPU box, or one TPU host.
#
#     launch/one_machine.sh gpu configs/alpaca_eval_smollm2.py:gpu runs/alpaca_gpu [--config.mesh.fsdp=2 ...]
#
# The first word is the extra to install: gpu, tpu, or none.  Run it again after an interruption: it goes on.
# Options, before that word:
#   --max_restarts=N     start again after exit code 75 (interrupted), at most N times; not after Ctrl-C or SIGTERM (0)
#   --image=IMAGE        run in this Docker image instead of .venv; runs/, data/ and models/ are mounted
#   --build              build the image first, with launch/Dockerfile
#   --docker_flag=FLAG   a further flag of `docker run`; may be repeated
#   --dry_run            print the commands, run none
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="max_restarts image" lists="docker_flag" switches="build dry_run"
max_restarts=0 image="" docker_flag=() build=no
parse "$@"
whole_number max_restarts
if [ "${#rest[@]}" -lt 3 ]; then
    usage >&2
    exit 2
fi
accelerator=${rest[0]}
case $accelerator in
    gpu | tpu | none) ;;
    *) fail "the first word is $accelerator: expected gpu, tpu or none" ;;
esac
program_from "${rest[@]:1}"

in_docker() {
    case ${rest[2]} in
        runs/?* | ./runs/?* | gs://?* | s3://?*) ;;
        *) fail "WORKDIR is ${rest[2]}: expected runs/NAME or a bucket, since a container keeps nothing else" ;;
    esac
    if [ "$build" = yes ]; then build_image "${accelerator/none/}" "$image"; fi
    run mkdir -p "$root/runs" "$root/data" "$root/models"
    command=(docker run --rm "--user=$(id -u):$(id -g)" --env=HOME=/tmp --ipc=host)
    case $accelerator in
        gpu) command+=(--gpus=all) ;;
        tpu) command+=(--privileged --net=host) ;;
    esac
    local folder
    for folder in runs data models; do command+=("--volume=$root/$folder:/app/$folder"); done
    # The image's entry point is `python -m activedpo_jax.main`; it is written out so that it can be seen.
    command+=(--entrypoint=python ${docker_flag[@]+"${docker_flag[@]}"} "$image" "${program[@]}")
}

if [ -n "$image" ]; then
    in_docker
else
    environment "$accelerator"
    command=("$root/.venv/bin/python" "${program[@]}")
fi
run cd "$root"
if [ "$dry_run" = yes ]; then
    quote "${command[@]}"
    if [ "$max_restarts" -gt 0 ]; then say "After exit code 75 again, at most $max_restarts times; never after 1 or 2."; fi
    exit 0
fi
if [ "$max_restarts" = 0 ]; then exec "${command[@]}"; fi

# A command in the background never sees Ctrl-C, so both signals are handed on as SIGTERM, and once.
stopped=no child=""
trap 'if [ "$stopped" = no ]; then stopped=yes && kill -TERM "$child" 2>/dev/null || :; fi' INT TERM
restarts=0
while [ "$stopped" = no ]; do
    "${command[@]}" &
    child=$!
    code=0
    wait "$child" || code=$?
    if [ "$stopped" = yes ]; then # the signal ended `wait`, perhaps before the program ended
        while kill -0 "$child" 2>/dev/null; do sleep 0.2; done
        again=0
        wait "$child" || again=$?
        if [ "$again" != 127 ]; then code=$again; fi
    fi
    if [ "$code" != 75 ] || [ "$stopped" = yes ]; then exit "$code"; fi
    if [ "$restarts" -ge "$max_restarts" ]; then
        say "exit code 75 after $restarts restarts, the most that --max_restarts allows; the same command goes on"
        exit 75
    fi
    restarts=$((restarts + 1))
    say "exit code 75: restart $restarts of at most $max_restarts"
done
exit 75
