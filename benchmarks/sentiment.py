"""Whether on-policy rounds raise the reward that labels them: fresh responses before and after.

    python -m benchmarks.sentiment [--workdir DIR] [--out FILE.json]

Runs `configs/sentiment_smollm2.py`, then lets the model as it was and the model with the run's adapter respond to the
same held-out prompts, with the same random numbers, and rewards the responses by the oracle's own function.  That is
what the method maximises, not a judgement of quality.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
from collections.abc import Sequence

from activedpo_jax import generate, main
from activedpo_jax.data.prompts import read_prompts
from activedpo_jax.files import write_json
from activedpo_jax.oracles.sentiment import positivity

CONFIG = "configs/sentiment_smollm2.py"


def fresh_rewards(folder: pathlib.Path, prompts: pathlib.Path, adapter: pathlib.Path | None, seed: int) -> list[float]:
    """The mean reward of eight fresh responses to every prompt, in their order."""
    adapter_flag = [] if adapter is None else [f"--config.lora.path={adapter}"]
    options = {"generation.prompts": prompts, "generation.responses": 8, "generation.resamples": 0, "seeds": seed}
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    generate.main(["generate", "--config", CONFIG, "--workdir", str(folder), *flags, *adapter_flag])
    rows: dict[str, list[float]] = {}
    for name in ("responses.jsonl", "too_few.jsonl"):
        path = folder / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            row = json.loads(line)
            rows[row["id"]] = positivity([], row["responses"]) or [0.0]
    return [statistics.mean(rows[record.id]) for record in read_prompts(str(prompts))]


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "standard_error": statistics.stdev(values) / len(values) ** 0.5}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="", help="of the run; empty: a temporary one")
    parser.add_argument("--out", default="", help="JSON file of the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(options.workdir or scratch)
        main.main(["main", "--config", CONFIG, "--workdir", str(place / "run")])
        prompts = pathlib.Path("configs/sentiment/heldout.jsonl")
        before = fresh_rewards(place / "before", prompts, None, 1)
        after = fresh_rewards(place / "after", prompts, place / "run" / "adapter", 1)
        differences = [b - a for a, b in zip(before, after, strict=True)]
        rounds = json.loads((place / "run" / "summary.json").read_text(encoding="utf-8"))["rounds"]
        figures = {
            "prompts": len(before),
            "labels": rounds[-1]["labels"],
            "before": mean_and_error(before),
            "after": mean_and_error(after),
            "after_less_before": mean_and_error(differences),
            "rounds": rounds,
        }
        for name in ("before", "after", "after_less_before"):
            print(f"{name:>18}: {figures[name]['mean']:+.3f} ± {figures[name]['standard_error']:.3f}")
        if options.out:
            write_json(pathlib.Path(options.out), figures)


if __name__ == "__main__":
    run()
