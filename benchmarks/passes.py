"""What fewer passes over the pool save, and what they cost, on the quickstart's pool.

    python -m benchmarks.passes --out benchmarks/results/passes.json

ActiveDPO in rounds of 16 labels, with the features of all candidates computed in every round; in the first round alone,
and anew for the pairs that would be picked (`--config.selection.in_reach`); and in the first round alone.  By seed: the
area under the curve of held-out accuracy, the share of the candidates whose features a round after the first computes,
and the share of the labelled pairs that are also labelled where all features are computed.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import measure

SETTINGS = {
    "every round": (),
    "in reach": ("--config.selection.pass_every=0", "--config.selection.in_reach"),
    "first round": ("--config.selection.pass_every=0",),
}


def run(folder: pathlib.Path, seed: int, pool: int, options: tuple[str, ...]) -> dict[str, Any]:
    """One run: the area under its curve, the share that it computed, and the pairs that it labelled."""
    command = [sys.executable, "-m", "activedpo_jax.main", "--config=configs/quickstart.py", f"--workdir={folder}"]
    command += ["--config.strategies=activedpo", f"--config.seeds={seed}", "--config.round.mode=staged"]
    command += [f"--config.synthetic.pool_pairs={pool}", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rounds = json.loads((folder / "summary.json").read_text())["rounds"][1:]
    lines = [line for path in sorted(folder.glob("rounds/*/labels.jsonl")) for line in path.read_text().splitlines()]
    later = [entry.get("computed", pool) / pool for entry in rounds[1:]]
    return {
        "area": statistics.mean(entry["accuracy"] for entry in rounds),
        "computed": statistics.mean(later),
        "labelled": [json.loads(line)["pair_id"] for line in lines],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 104)), help="none of the quickstart's")
    parser.add_argument("--pool", type=int, default=1024, help="pairs")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for name, options in SETTINGS.items():
                place = pathlib.Path(folder) / f"{name} {seed}".replace(" ", "_")
                found[name].append(run(place, seed, args.pool, options))
                print(seed, name, found[name][-1]["area"], f"{found[name][-1]['computed']:.2f}", flush=True)
    results = {}
    for name, several in found.items():
        pairs = zip(several, found["every round"], strict=True)
        overlap = [len(set(a["labelled"]) & set(b["labelled"])) / len(b["labelled"]) for a, b in pairs]
        results[name] = {key: [one[key] for one in several] for key in ("area", "computed")} | {"overlap": overlap}
    measure.save(args.out, "passes", args, {"results": results})


if __name__ == "__main__":
    main()
