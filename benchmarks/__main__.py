"""All measurements of `benchmarks/README.md` that need nothing but this machine: `python -m benchmarks --out FOLDER`.

One after the other, each in a process of its own; hours on two cores.  Those of real texts and models are left out: see
their commands in the README.
"""

import argparse
import pathlib
import subprocess
import sys

_SWEEP = "--repeats 3 --only summed none response hooks"
# By file: the commands, `python -m benchmarks.…`, on a CPU and on a GPU.
CPU = {
    "features_cpu.json": (
        "features --repeats 4 --only summed none response hooks torch_vmap peft --name full",
        "features --lengths mixed --groups 24 --chunk 8 --repeats 2 --only response hooks peft --name mixed",
        f"features {_SWEEP} --name rank-8 --rank 8",
        f"features {_SWEEP} --name rank-64 --rank 64",
        f"features {_SWEEP} --name rank-128 --rank 128",
        f"features {_SWEEP} --name rank-128,-attention-only --rank 128 --attention_only",
        f"features {_SWEEP} --name 256-+-256-tokens --prompt 256 --response 256",
        f"features {_SWEEP} --name 512-+-512-tokens --prompt 512 --response 512 --groups 2",
        "ablation --repeats 3",
    ),
    "training_cpu.json": (
        "training --repeats 2 --name mixed",
        "training --loss sft --batch 8 --repeats 2 --name sft",
    ),
    "scoring_cpu.json": ("scoring",),
    "round_cpu.json": ("round", "round --on_policy"),
    "generation_cpu.json": ("generation --random",),
    "selection_cpu.json": ("selection --repeats 5",),
    "replay_cpu.json": ("replay",),
}
_SEVEN = "--model llama2_7b --dtype bfloat16 --rank 128 --remat dots --prompt 256 --response 256"
GPU = {
    # JAX gives no memory back, so that the largest models leave PyTorch a process of its own.
    "h100.json": (
        "device_check",
        f"features {_SEVEN} --groups 8 --only summed none response --name features-7b",
        f"features {_SEVEN} --groups 8 --only hooks --name features-7b",
        f"training {_SEVEN} --lengths full --batches 1 --only ours --name training-7b",
        f"training {_SEVEN} --lengths full --batches 1 --only lean --name training-7b",
        f"training {_SEVEN} --lengths full --batches 1 --only trl --name training-7b",
        "features --dtype bfloat16 --remat dots --lengths mixed --groups 128 --chunk 16 --torch_chunk 16 --repeats 3 "
        "--only summed none response hooks --name features-mixed",
        "training --dtype bfloat16 --batch 16 --batches 1 --name training-mixed",
        "generation --random --dtype bfloat16 --batch 32 --repeats 3",
        "selection --parts many --count 500000 --few_repeats 1",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="those for a GPU")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    args = parser.parse_args()
    failed = []
    for file, commands in (GPU if args.gpu else CPU).items():
        for command in commands:
            print(f"\n# {command}", flush=True)
            module, *options = command.split()
            run = [sys.executable, "-m", f"benchmarks.{module}", *options, f"--out={args.out / file}"]
            if subprocess.run(run, check=False).returncode:
                failed.append(command)
    if failed:
        sys.exit("these failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
