"""How long a command takes until its first features: at its first start, and at the second one.

    python -m benchmarks.startup --model models/smollm2-135m --pairs TRAIN.jsonl --heldout TEST.jsonl \\
        --out benchmarks/results/startup_cpu.json

Starts `activedpo_jax.main` on `configs/alpaca_eval_smollm2.py:cpu` with an empty cache of compiled programs, ends it
after the first batch of features, and starts it again with what the cache then holds.  Seconds count from the start of
the process.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

# In the child: the moments since it was started at argv[1], printed after the first batch.
CHILD = """
import json, os, sys, time
began = float(sys.argv.pop(1))
moments = {}
import jax
moments["JAX is imported"] = time.time() - began
from activedpo_jax import main
from activedpo_jax.rounds import pool_pass
moments["all is imported"] = time.time() - began
program = pool_pass.evidence_program
def first(*args):
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
        return program(*args)  # of its shape
    moments["the first batch begins"] = time.time() - began
    jax.block_until_ready(program(*args))
    moments["it is compiled and done"] = time.time() - began
    began_again = time.time()
    jax.block_until_ready(program(*args))
    moments["of it, computation"] = time.time() - began_again
    print("moments", json.dumps(moments), flush=True)
    os._exit(0)
pool_pass.evidence_program = first
main.main(["main", *sys.argv[1:]])
"""


def start(flags: list[str]) -> dict[str, float]:
    """The moments of one start, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, str(time.time()), *flags, f"--workdir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("moments ")]
    if not lines:
        sys.exit(f"the command ended with code {done.returncode} before its first features:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(lines[0].removeprefix("moments "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--pairs", default="data/alpaca_eval_pairs/train.jsonl")
    parser.add_argument("--heldout", default="data/alpaca_eval_pairs/test.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="write the raw times here, as JSON")
    args = parser.parse_args()
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    flags = [
        "--config=configs/alpaca_eval_smollm2.py:cpu",
        f"--config.model.path={args.model}",
        f"--config.data.train={args.pairs}",
        f"--config.data.heldout={args.heldout}",
        "--config.data.heldout_limit=4",
    ]
    results: dict[str, dict[str, list[float]]] = {}
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for name in ("first start", "second start"):
                moments = start([*flags, f"--program_cache={cache}"])
                print(name, {moment: round(seconds, 1) for moment, seconds in moments.items()}, flush=True)
                for moment, seconds in moments.items():
                    results.setdefault(name, {}).setdefault(moment, []).append(seconds)
        print(f"repeat {repeat + 1} of {args.repeats}", flush=True)

    from benchmarks import measure  # imports JAX, for which the children should not have to share the machine

    found: dict[str, Any] = {"moments": results}
    measure.save(args.out, "startup", args, found)


if __name__ == "__main__":
    main()
