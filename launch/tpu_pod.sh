#!/usr/bin/env bash
# A TPU VM pod (or one TPU host): ask for it, set it up, run on all of its workers, watch, and after a pre-emption do
# all of that again.  Keep it running in tmux, say.  If it ends the run does not: the same command attaches to it.
#
#     launch/tpu_pod.sh --project=my-project --zone=us-west4-a --name=my-run --accelerator_type=v5litepod-16 \
#         --runtime_version=v2-alpha-tpuv5-lite --spot \
#         configs/quickstart.py gs://my-bucket/my-run [--config.OPTION=VALUE ...]
#
# Options; the first five may come from the environment ($PROJECT, $ZONE, ...):
#   --project --zone --name --accelerator_type --runtime_version
#   --spot               may be pre-empted at any time, and costs less
#   --env_file=FILE      lines NAME=VALUE for the program's environment (HF_TOKEN=...); they are never printed
#   --upload=PATH        take along a file or folder that git ignores, relative to the repository; may be repeated
#   --create_flag=FLAG   a further flag of `gcloud compute tpus queued-resources create`; may be repeated
#   --ssh_flag=FLAG      a further flag of `gcloud compute tpus tpu-vm ssh` and `scp` (--internal-ip); may be repeated
#   --max_restarts=N     after exit code 75, pre-emptions and lost connections, together (100)
#   --poll_seconds=N     between two looks at the TPU's state (30)
#   --keep               do not delete the TPU when the run is done
#   --dry_run            print the commands, run none
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="project zone name accelerator_type runtime_version env_file max_restarts poll_seconds"
lists="upload create_flag ssh_flag" switches="spot keep dry_run"
project="" zone="" name="" accelerator_type="" runtime_version="" env_file=""
max_restarts=100 poll_seconds=30 upload=() create_flag=() ssh_flag=() spot=no keep=no
parse "$@"
need project zone name accelerator_type runtime_version
cloud_name name
whole_number max_restarts poll_seconds
program_from ${rest[@]+"${rest[@]}"}
need_bucket "${rest[1]}" "the disks of a TPU VM go with it, and each of its hosts has its own"
if [ -n "$env_file" ]; then check_env_file "$env_file"; fi
upload=(${upload[@]+"${upload[@]#./}"})
for path in ${upload[@]+"${upload[@]}"}; do
    if [ ! -e "$root/$path" ]; then fail "--upload=$path: not in $root"; fi
done

where=("--project=$project" "--zone=$zone")
tpus=(gcloud compute tpus)
delete=("${tpus[@]}" queued-resources delete "$name" --force --quiet "${where[@]}")
local_folder=$root/runs/launch/$name # the archive, and what the hosts said

create() {
    local flags=(--async)
    if [ "$spot" = yes ]; then flags+=(--spot); fi
    run "${tpus[@]}" queued-resources create "$name" "--node-id=$name" "${where[@]}" \
        "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version" "${flags[@]}" \
        ${create_flag[@]+"${create_flag[@]}"}
}

# A list and not `describe`, which does not tell a TPU that is not there from a connection that is not.
queue_state() {
    run "${tpus[@]}" queued-resources list "${where[@]}" "--filter=name~(^|/)$name\$" "--format=value(state.state)"
}

node_state() {
    run "${tpus[@]}" tpu-vm list "${where[@]}" "--filter=name~(^|/)$name\$" "--format=value(state)"
}

# ABSENT, WAITING, READY, GONE (pre-empted or suspended), FAILED, or UNKNOWN, when gcloud cannot say.
state() {
    local queue node
    queue=$(queue_state) || { echo UNKNOWN && return; }
    case $queue in
        "") echo ABSENT ;;
        ACTIVE)
            node=$(node_state) || { echo UNKNOWN && return; }
            case $node in
                READY) echo READY ;;
                PREEMPTED | TERMINATED | "") echo GONE ;; # the queue learns of it later
                *) echo WAITING ;;
            esac
            ;;
        SUSPENDING | SUSPENDED) echo GONE ;;
        FAILED) echo FAILED ;;
        *) echo WAITING ;;
    esac
}

restarts=0
count_restart() {
    if [ "$restarts" -ge "$max_restarts" ]; then
        still_there
        say "$1 after $restarts restarts, the most that --max_restarts allows; the same command goes on"
        exit 75
    fi
    restarts=$((restarts + 1))
    say "$1: restart $restarts of at most $max_restarts"
}

still_there() {
    say "the TPU may still be there, and is billed for as long as it is; to delete it:"
    say "    $(quote "${delete[@]}")"
}

# Until the TPU is ready.
obtain() {
    local now last="" unknown=0
    while :; do
        now=$(state)
        if [ "$now" != "$last" ]; then say "TPU $name: $now"; fi
        last=$now
        case $now in
            READY) return ;;
            ABSENT)
                ready=no
                create
                ;;
            GONE)
                ready=no
                "${delete[@]}" # a pre-empted TPU cannot be started again, and its name is taken until it is deleted
                count_restart "the TPU was pre-empted"
                continue
                ;;
            FAILED)
                "${tpus[@]}" queued-resources describe "$name" "${where[@]}" >&2 || :
                say "the request for the TPU failed, as said above; before another try: $(quote "${delete[@]}")"
                exit 1
                ;;
            UNKNOWN)
                unknown=$((unknown + 1))
                if [ "$unknown" -ge 20 ]; then
                    still_there
                    say "gcloud could not be asked $unknown times, as said above; the same command goes on"
                    exit 75
                fi
                ;;
        esac
        sleep "$poll_seconds"
    done
}

# A host that was taken away answers nothing: without these flags ssh would wait for it for hours.
alive=("--ssh-flag=-o ServerAliveInterval=30" "--ssh-flag=-o ServerAliveCountMax=4" "--ssh-flag=-o ConnectTimeout=20")
on_workers() {
    run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all "${alive[@]}" ${ssh_flag[@]+"${ssh_flag[@]}"} \
        "--command=$1"
}

to_workers() {
    run "${tpus[@]}" tpu-vm scp "$1" "$name:$2" "${where[@]}" --worker=all ${ssh_flag[@]+"${ssh_flag[@]}"}
}

# What git ignores stays here, but for --upload.
archive() {
    local skipped=() folder
    for folder in .git .venv venv runs models data build dist; do skipped+=("--exclude=./$folder"); done
    run mkdir -p "$local_folder" &&
        run tar -czf "$local_folder/activedpo_jax.tgz" --exclude=__pycache__ "${skipped[@]}" -C "$root" . \
            ${upload[@]+"${upload[@]}"}
}

# It leaves a run alone that is going on.
set_up() {
    local unpack="mkdir -p activedpo_jax && tar -xzf activedpo_jax.tgz -C activedpo_jax"
    local installed="$unpack && bash activedpo_jax/launch/on_host.sh set_up"
    if [ -n "$env_file" ]; then installed="chmod 600 activedpo_jax.env && $installed"; fi
    archive && to_workers "$local_folder/activedpo_jax.tgz" activedpo_jax.tgz || return
    if [ -n "$env_file" ]; then to_workers "$env_file" activedpo_jax.env || return; fi
    local unless_running="if flock -n activedpo_jax.launch/lock true; then $installed; else echo a run is going on; fi"
    on_workers "mkdir -p activedpo_jax.launch && $unless_running"
}

attempt=$(date +%Y%m%d-%H%M%S)-$$.1
if [ "$dry_run" = yes ]; then attempt=ATTEMPT.1; fi
program_on_workers() {
    on_workers "$(quote bash activedpo_jax/launch/on_host.sh run "$attempt" .venv/bin/python "${program[@]}")"
}

# Each host says how it ended.  gcloud hands on the exit code of one of them, and has the same codes for its own
# troubles.
host_codes() {
    sed -n "s/^activedpo_jax launch $attempt: .* ended with exit code \([0-9]*\)\$/\1/p" "$local_folder/output.log"
}

# 2 if any host found a mistake; else another code that forbids a restart; else 75 if a host said so; else LOST.
verdict() {
    local code found=LOST
    for code in $(host_codes); do
        case $code in
            2) found=2 ;;
            0) ;;
            75) if [ "$found" = LOST ]; then found=75; fi ;;
            *) if [ "$found" != 2 ]; then found=$code; fi ;;
        esac
    done
    echo "$found"
}

if [ "$dry_run" = yes ]; then
    say "Is it there already?"
    queue_state
    say "If not:"
    create
    say "Every $poll_seconds s, until they say ACTIVE and READY:"
    queue_state
    node_state
    say "The code, to all workers, and its installation:"
    set_up
    say "The run; called again it attaches to what is running:"
    program_on_workers
    say "After a pre-emption all of the above once more, when this is done: $(quote "${delete[@]}")"
    say "After exit code 75 the run once more (with pre-emptions at most $max_restarts times); after 1 or 2 the end."
    if [ "$keep" = yes ]; then
        still_there
    else
        say "When the run is done (exit code 0):"
        run "${delete[@]}"
    fi
    exit 0
fi

trap 'echo >&2; say "the run goes on; the same command attaches to it"; still_there; exit 130' INT TERM
ready=no
attempts=1
while :; do
    obtain
    if [ "$ready" = no ]; then
        if ! set_up; then
            sleep "$poll_seconds"
            if [ "$(state)" = READY ]; then count_restart "the set-up failed, as said above"; fi
            continue
        fi
        ready=yes
    fi
    if program_on_workers | tee "$local_folder/output.log"; then break; fi
    found=$(verdict) reason="the connection was lost"
    case $found in
        75)
            reason="exit code 75"
            attempts=$((attempts + 1))
            attempt=${attempt%.*}.$attempts
            ;;
        LOST) ;; # the same attempt: what has ended in it does not start again
        *)
            still_there
            say "a host ended with exit code $found, as said above: no restart"
            exit "$found"
            ;;
    esac
    sleep "$poll_seconds" # a pre-emption shows a little later
    if [ "$(state)" = READY ]; then count_restart "$reason"; fi
done
say "done"
if [ "$keep" = yes ]; then still_there; else "${delete[@]}"; fi
