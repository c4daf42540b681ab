#!/usr/bin/env bash
# GPUs of a Slurm cluster: submits launch/slurm_job.sh, which runs one process a GPU, from a folder that all nodes see.
#
#     launch/slurm.sh --nodes=2 --gpus_per_node=8 --sbatch_flag=--time=24:00:00 \
#         configs/quickstart.py runs/my-run [--config.OPTION=VALUE ...]
#
# Options; the first two may come from the environment ($NODES, $GPUS_PER_NODE):
#   --nodes --gpus_per_node
#   --sbatch_flag=FLAG   a further flag of `sbatch` (--partition=..., --account=...); may be repeated
#   --python=PATH        a Python that has the package; without it .venv is made, if it is not there
#   --max_restarts=N     requeues after exit code 75, Slurm's own after pre-emptions included (100)
#   --dry_run            print the commands, run none
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options="nodes gpus_per_node python max_restarts" lists="sbatch_flag" switches="dry_run"
nodes="" gpus_per_node="" python="" max_restarts=100 sbatch_flag=()
parse "$@"
need nodes gpus_per_node
whole_number nodes gpus_per_node max_restarts
program_from ${rest[@]+"${rest[@]}"}

if [ -z "$python" ]; then
    environment gpu
    python=$root/.venv/bin/python
fi
# --signal without B: SIGTERM goes to the program, two minutes before the time limit, and not to the script.
# JAX takes the GPU of a process's number on its node, so each process has to see all of them: --gpus-per-node.
job=("$root/launch/slurm_job.sh" "--python=$python" "--max_restarts=$max_restarts" "${rest[@]}")
run mkdir -p "$root/runs"
run sbatch --requeue --signal=TERM@120 --open-mode=append --job-name=activedpo_jax "--chdir=$root" \
    "--output=$root/runs/slurm-%j.out" "--nodes=$nodes" \
    "--ntasks-per-node=$gpus_per_node" "--gpus-per-node=$gpus_per_node" \
    ${sbatch_flag[@]+"${sbatch_flag[@]}"} "${job[@]}"
if [ "$dry_run" = yes ]; then
    say "The job, on its first node:"
    cd "$root" && bash "${job[0]}" --dry_run "${job[@]:1}"
fi
