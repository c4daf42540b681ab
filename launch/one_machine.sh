#!/usr/bin/env bash
# One machine, all of its devices: a laptop, a GPU box, or one TPU host.
#
#     launch/one_machine.sh gpu configs/alpaca_eval_smollm2.py:gpu runs/alpaca_gpu [--config.mesh.fsdp=2 ...]
#
# The first argument is the extra to install: gpu, tpu, or none.  Run it again after an interruption: it goes on.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,6p' "$0" >&2
    exit 2
fi
accelerator=$1 config=$2 workdir=$3
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -d .venv ]; then
    python3 -m venv .venv
    extra=""
    [ "$accelerator" = none ] || extra="[$accelerator]"
    .venv/bin/pip install -e ".$extra"
fi
exec .venv/bin/python -m activedpo_jax.main --config "$config" --workdir "$workdir" "$@"
