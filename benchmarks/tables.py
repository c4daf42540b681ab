"""The tables of `benchmarks/README.md`, made from `benchmarks/results/`: `python -m benchmarks.tables`.

A table stands between two comments; the first names the kind of table, the file, and the measurement in it:

    <!-- times features_cpu.json full -->
    ...
    <!-- end -->

A test makes the tables again and finds the same.
"""

import json
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from activedpo_jax.record.comparison import mean_interval, p_value
from activedpo_jax.record.statistics import holm

FOLDER = pathlib.Path(__file__).parent
_TABLE = re.compile(r"(<!-- (\w+) (\S+\.json)(?: ([^\n]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)

# What contenders are called in tables; others go by their own name.
NAMES = {
    "summed": "gradient of the summed log-probs: what a training step pays",
    "none": "features, `none`",
    "response": "features, `response`",
    "rows": "`response`, each response on a row with its prompt",
    "vmap": "`vmap(grad)` in JAX, the readable reference",
    "hooks": "PyTorch: batched hooks on PEFT's layers, our sketch",
    "torch_vmap": "PyTorch: `torch.func.vmap(grad)`, our sketch",
    "peft": "PyTorch: PEFT, a response at a time, gradients not projected",
    "traker": "PyTorch: the same, and traker's `BasicProjector`",
    "ours": "activedpo_jax",
    "lean": "PyTorch: a lean step with PEFT",
    "lean_forward": "PyTorch: a lean forward pass with PEFT",
    "trl": "PyTorch: TRL's trainer",
    "assembled": "PyTorch: PEFT as in LESS, and TRL",
    "strongest": "PyTorch: batched hooks, a lean step",
}


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(record: dict[str, Any]) -> str:
    """Medians and spread of contenders, their ratios to the last of ours, and useful tokens a second."""
    seconds = {name: several["seconds"] for name, several in record["results"].items()}
    median = {name: statistics.median(several) for name, several in seconds.items()}
    ours = next(name for name in ("response", "ours", "activedpo_jax") if name in seconds)
    tokens, flops, peak = (record.get(key) for key in ("useful tokens", "useful FLOPs", "peak FLOP/s"))
    header = ["", "seconds", "from – to", "× ours", *["tokens/s"] * bool(tokens), *["MFU"] * bool(peak)]
    rows = []
    for name, several in seconds.items():
        spread = f"{_number(min(several))} – {_number(max(several))}" if len(several) > 1 else "once"
        row = [NAMES.get(name, name), _number(median[name]), spread, f"{median[name] / median[ours]:.2f}"]
        row += [f"{tokens / median[name]:,.0f}"] if tokens else []
        row += [f"{flops / median[name] / peak:.1%}" if flops and peak else ""] * bool(peak)
        rows.append(row)
    return _rows(header, rows)


def naive(record: dict[str, Any]) -> str:
    """Selection against the naive loop."""
    kinds = {
        "normal": "normal",
        "clusters": "clusters",
        "tight": "tight clusters larger than the block, unequal norms",
        "identical": "identical rows",
    }
    rows = []
    for kind, name in kinds.items():
        found = record["results"][kind]
        greedy, loop = (statistics.median(found["seconds"][n]) for n in ("greedy", "naive"))
        ratio = found["ratios"]["greedy / naive"]
        rows.append(
            [name, str(found["same picks"]), f"{greedy:.3f}", f"{loop:.3f}"]
            + [f"{ratio['seconds']:.2f}", f"{ratio['processor seconds']:.2f}"]
        )
    return _rows(["features", "same picks", "seconds, ours", "naive", "ratio", "of processor time"], rows)


def product(record: dict[str, Any]) -> str:
    """Many picks against one product of the features."""
    rows = []
    for kind, found in record["results"].items():
        greedy, work = (statistics.median(found["seconds"][n]) for n in ("greedy", "product"))
        rows.append([kind, f"{greedy:.1f}", f"{work:.1f}", f"{greedy / work:.2f}"])
    return _rows(["features", "seconds, ours", "the product", "ratio"], rows)


def padding(record: dict[str, Any]) -> str:
    names = {
        "defaults": "defaults",
        "cpu": "`alpaca_eval_smollm2.py:cpu`",
        "gpu": "`alpaca_eval_smollm2.py:gpu`",
    }
    keys = ("features", "scoring", "DPO", "pass, padded", "DPO, padded", "pass, given buckets", "DPO, given buckets")
    found = record["results"]
    rows = [[name, *(f"{found[config][key]:.2f}" for key in keys)] for config, name in names.items()]
    return _rows(["", *keys], rows)


def moments(record: dict[str, Any]) -> str:
    found = record["moments"]
    rows = [
        [moment, *(f"{statistics.median(found[start][moment]):.1f}" for start in found)]
        for moment in next(iter(found.values()))
    ]
    return _rows(["seconds", *found], rows)


def errors(record: dict[str, Any]) -> str:
    rows = [[name, f"{error:.1e}", f"{bound:.1e}"] for name, (error, bound) in record["errors and bounds"].items()]
    return _rows(["", "relative error", "bound"], rows)


def replay(record: dict[str, Any]) -> str:
    """Strategies on frozen pools: areas under the curve, and their paired differences from random's."""
    pools = record["pools"]
    kinds = list(pools)
    header = ["strategy", *(words for kind in kinds for words in (kind.replace("_", " "), "less random's", "p, Holm"))]
    everywhere = [strategy for strategy in pools[kinds[0]] if all(strategy in pools[kind] for kind in kinds)]
    cells: dict[str, list[str]] = {strategy: [] for strategy in everywhere}
    for kind in kinds:
        areas = {strategy: np.array(pools[kind][strategy]["area"]) for strategy in everywhere}
        differences = {s: a - areas["random"] for s, a in areas.items() if s != "random"}
        adjusted = dict(zip(differences, holm([p_value(d) for d in differences.values()]), strict=True))
        for strategy, values in areas.items():
            cells[strategy].append(f"{values.mean():.3f}")
            if strategy == "random":
                cells[strategy] += ["", ""]
                continue
            _, low, high = mean_interval(differences[strategy])
            cells[strategy] += [f"{low:+.3f} to {high:+.3f}", f"{adjusted[strategy]:.2g}"]
    order = sorted(cells, key=lambda strategy: -np.mean(pools[kinds[0]][strategy]["area"]))
    return _rows(header, [[f"`{strategy}`", *cells[strategy]] for strategy in order])


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "times": times,
    "naive": naive,
    "product": product,
    "padding": padding,
    "moments": moments,
    "errors": errors,
    "replay": replay,
}


def made(text: str) -> str:
    """A text with its tables made from the results."""

    def table(match: re.Match[str]) -> str:
        opening, kind, file, name, closing = match.groups()
        found = json.loads((FOLDER / "results" / file).read_text())
        return opening + "\n" + KINDS[kind](found[name] if name else found) + "\n" + closing

    return _TABLE.sub(table, text)


def main() -> None:
    readme = FOLDER / "README.md"
    readme.write_text(made(readme.read_text()))


if __name__ == "__main__":
    main()
