#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on each host of a pod, in a copy of the repository.
#
#     on_host.sh set_up                      .venv with the package for TPUs
#     on_host.sh run ATTEMPT COMMAND ...     the command, to its end
#
# `run` cuts the command loose from the connection, which may break, shows its output, and ends with its exit code.
# Called again it attaches to what is running, and a command that has ended in this attempt does not start again: gcloud
# repeats a command whose connection broke.  The variables in activedpo_jax.env, beside the repository, are set for it.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
state=$root.launch # attempt, command, log, exit, pid; and lock, held for as long as the command runs
mkdir -p "$state"

set_up() {
    cd "$root"
    if [ ! -d .venv ]; then
        # TPU VMs have had Python 3.10, which is too old; uv brings its own.
        if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            python3 -m venv .venv
        else
            python3 -m pip install --user uv
            python3 -m uv venv --seed --python 3.12 .venv
        fi
    fi
    .venv/bin/python -m pip install -e '.[tpu]'
}

attach() {
    local code=75 # without an exit code on record something killed all of it
    tail -n "$1" -f -s 0.2 --pid="$(cat "$state/pid")" "$state/log"
    flock "$state/lock" true # its end is on record when the lock is free
    if [ -f "$state/exit" ]; then code=$(cat "$state/exit"); fi
    echo "activedpo_jax launch $attempt: $(hostname) ended with exit code $code"
    exit "$code"
}

run_once() {
    exec 9>"$state/lock"
    if ! flock -n 9; then
        exec 9>&-
        if [ "$(cat "$state/command")" != "$(quote "$@")" ]; then
            echo "$(hostname): another command is running here, and has to end first: $(cat "$state/command")" >&2
            echo "activedpo_jax launch $attempt: $(hostname) ended with exit code 2"
            exit 2
        fi
        attach 100
    fi
    if [ -f "$state/attempt" ] && [ "$(cat "$state/attempt")" = "$attempt" ]; then
        exec 9>&-
        attach 100
    fi
    rm -f "$state/exit"
    : >"$state/log"
    quote "$@" >"$state/command"
    setsid bash "${BASH_SOURCE[0]}" supervise "$@" </dev/null >>"$state/log" 2>&1 &
    echo "$!" >"$state/pid"
    printf %s "$attempt" >"$state/attempt" # last: from here on it has begun
    exec 9>&-
    attach +1
}

record() {
    echo "$1" >"$state/exit.partial"
    mv "$state/exit.partial" "$state/exit"
}

# Holds the lock (it inherits descriptor 9) until the exit code is on record.
supervise() {
    local line
    trap 'record $?' EXIT
    cd "$root"
    if [ -f "$root.env" ]; then
        while IFS= read -r line || [ -n "$line" ]; do
            case $line in
                "" | "#"*) ;;
                *) export "${line?}" ;;
            esac
        done <"$root.env"
    fi
    "$@" 9>&-
}

case ${1:-} in
    set_up) set_up ;;
    run)
        attempt=$2
        run_once "${@:3}"
        ;;
    supervise) supervise "${@:2}" ;;
    *) fail "expected set_up or run ATTEMPT COMMAND ..." ;;
esac
