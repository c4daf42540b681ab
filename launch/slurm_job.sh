#!/usr/bin/env bash
# The job that launch/slurm.sh submits: srun, and back into the queue after exit code 75.
#
#     launch/slurm_job.sh --python=PATH --max_restarts=N CONFIG WORKDIR [--config.OPTION=VALUE ...]
#
# Slurm runs a copy of this file, in the repository's root.
set -euo pipefail
# shellcheck source=common.sh
. launch/common.sh

options="python max_restarts" lists="" switches="dry_run"
python="" max_restarts=""
parse "$@"
need python max_restarts
program_from ${rest[@]+"${rest[@]}"}

# The program itself ends the others when one host dies, and lets them save: srun must not kill them first.
step=(srun --kill-on-bad-exit=0 "$python" "${program[@]}")
requeue=(scontrol requeue "${SLURM_JOB_ID:-JOB}")
if [ "$dry_run" = yes ]; then
    quote "${step[@]}"
    say "After exit code 75, at most $max_restarts times (never after 1 or 2, nor after scancel):"
    quote "${requeue[@]}"
    exit 0
fi

# srun does not take this over from sbatch by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# Slurm signals this script, too, where the job is to end: at scancel, and at a pre-emption, after which it requeues the
# job by itself.
ended=no
trap 'ended=yes' TERM
said=$(mktemp)
code=0
{ "${step[@]}" 2>&1 1>&3 3>&- | (trap "" TERM && exec tee "$said" >&2); } 3>&1 || code=$?

# srun hands on the highest code, which would hide a 1 or a 2 behind the 75 of the others.
while read -r task_code; do
    case $task_code in
        0 | 75) ;;
        2) code=2 ;;
        *) if [ "$code" != 2 ]; then code=$task_code; fi ;;
    esac
done < <(sed -n 's/^srun: error: .*: tasks\{0,1\} .*: Exited with exit code \([0-9]*\)$/\1/p' "$said")
rm -f "$said"
if [ "$code" != 75 ] || [ "$ended" = yes ]; then exit "$code"; fi
restarts=${SLURM_RESTART_COUNT:-0}
if [ "$restarts" -ge "$max_restarts" ]; then
    say "exit code 75 after $restarts restarts, the most that --max_restarts allows; the same launch/slurm.sh goes on"
    exit 75
fi
say "exit code 75: back into the queue, restart $((restarts + 1)) of at most $max_restarts"
"${requeue[@]}"
