"""Comparison of strategies over runs that share seeds: pure functions from summaries to figures and words.

Runs with the same seed share the pool, the held-out set and the starting weights, so that what two strategies
make of one seed is a pair.  Such differences vary less than the curves do; the p-values are theirs.  All
intervals are Student's t, two-sided, at `CONFIDENCE`, over seeds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from activedpo_jax.files import plain
from activedpo_jax.record.folders import RunSummary

CONFIDENCE = 0.95

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


class Interval(NamedTuple):
    """Mean and confidence limits, of scalars or of arrays of one shape.  Limits of a single value are NaN."""

    mean: Any
    low: Any
    high: Any


class Curves(NamedTuple):
    """The learning curves of one strategy."""

    seeds: tuple[int, ...]  # S of them, in rising order
    labels: FloatArray  # [T + 1]: after 0, 1, ... T rounds
    accuracy: FloatArray  # [S, T + 1]


def learning_curves(summaries: Sequence[RunSummary]) -> dict[str, Curves]:
    """The curves by strategy, in the order in which the strategies first appear.

    Raises:
      ValueError: if a run is there twice, or not all of them were evaluated after the same numbers of labels.
    """
    runs: dict[str, dict[int, RunSummary]] = {}
    for summary in summaries:
        runs_of_strategy = runs.setdefault(summary["strategy"], {})
        if summary["seed"] in runs_of_strategy:
            raise ValueError(f"compare: two runs of {summary['strategy']}, seed {summary['seed']}; expected one")
        runs_of_strategy[summary["seed"]] = summary
    grid = [record["labels"] for record in summaries[0]["rounds"]] if summaries else []
    for summary in summaries:
        labels = [record["labels"] for record in summary["rounds"]]
        if labels != grid:
            raise ValueError(
                f"compare: {summary['strategy']}, seed {summary['seed']}, evaluated after {labels} labels, "
                f"{summaries[0]['strategy']}, seed {summaries[0]['seed']}, after {grid}; expected one budget "
                "for all: let every run end, under one config"
            )
    return {
        strategy: Curves(
            seeds=tuple(sorted(summary_of_seed)),
            labels=np.array(grid, float),
            accuracy=np.array(
                [[r["accuracy"] for r in summary_of_seed[s]["rounds"]] for s in sorted(summary_of_seed)], float
            ),
        )
        for strategy, summary_of_seed in runs.items()
    }


def mean_interval(values: FloatArray) -> Interval:
    """Mean over the first axis, with its t interval: [S, ...] to three of [...]."""
    count = len(values)
    mean = values.mean(0)
    if count < 2:
        return Interval(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan))
    half_width = special.stdtrit(count - 1, (1 + CONFIDENCE) / 2) * values.std(0, ddof=1) / math.sqrt(count)
    return Interval(mean, mean - half_width, mean + half_width)


def p_value(differences: FloatArray) -> float:
    """Two-sided p of the paired t test that the mean of `differences` [S] is 0; NaN for fewer than two."""
    if len(differences) < 2:
        return math.nan
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * special.stdtr(len(differences) - 1, -abs(mean) / error))


def area(labels: FloatArray, accuracy: FloatArray) -> FloatArray:
    """Area under the curve over its width, so an accuracy itself: [T + 1] and [..., T + 1] to [...]."""
    if len(labels) < 2:
        return accuracy[..., 0]
    return np.asarray(np.trapezoid(accuracy, labels) / (labels[-1] - labels[0]))


def labels_to_reach(labels: FloatArray, accuracy: FloatArray, target: float) -> float | None:
    """After how many labels the curve, straight between points, first reaches `target`; None: it does not."""
    reached = np.flatnonzero(accuracy >= target)
    if not len(reached):
        return None
    right = int(reached[0])
    if right == 0:
        return float(labels[0])
    rise = (target - accuracy[right - 1]) / (accuracy[right] - accuracy[right - 1])
    return float(labels[right - 1] + rise * (labels[right] - labels[right - 1]))


def compare(summaries: Sequence[RunSummary], baseline: str = "random") -> dict[str, Any]:
    """All figures of the comparison, for `summary.json` and `table`.

    Args:
      summaries: of the runs; strategies without the baseline, or single runs, give what can be given.
      baseline: the strategy that the others are held against.

    Returns:
      What JSON can hold, None for the limits of an interval over one seed.
      `strategies`: per strategy its `seeds`, `labels` [T + 1], `accuracy` (mean, low, high: [T + 1] each) and
        `area` (mean, low, high).
      `differences`: per strategy but the baseline, of the areas of the seeds that both have, strategy less
        baseline: `seeds`, `per_seed`, `mean`, `low`, `high`, `p_value`, `verdict`.
      `labels_needed`: likewise per strategy but the baseline, after how many labels its mean curve first reaches
        the baseline's final mean accuracy: see `_needed`; in `per_seed` the same for the two curves of each seed.

    Raises:
      ValueError: see `learning_curves`.
    """
    curves = learning_curves(summaries)
    result: dict[str, Any] = {
        "confidence": CONFIDENCE,
        "baseline": baseline if baseline in curves else None,
        "strategies": {
            strategy: {
                "seeds": list(curve.seeds),
                "labels": curve.labels.tolist(),
                "accuracy": mean_interval(curve.accuracy)._asdict(),
                "area": mean_interval(area(curve.labels, curve.accuracy))._asdict(),
            }
            for strategy, curve in curves.items()
        },
        "differences": {},
        "labels_needed": {},
    }
    if baseline not in curves:
        return dict(plain(result))
    base = curves[baseline]
    for strategy, curve in curves.items():
        if strategy == baseline:
            continue
        shared = sorted(set(curve.seeds) & set(base.seeds))
        ours = curve.accuracy[[curve.seeds.index(seed) for seed in shared]]
        theirs = base.accuracy[[base.seeds.index(seed) for seed in shared]]
        if not shared:
            continue  # other seeds, other pools: nothing to compare
        differences = area(curve.labels, ours) - area(curve.labels, theirs)
        interval = mean_interval(differences)
        result["differences"][strategy] = {
            "seeds": shared,
            "per_seed": differences.tolist(),
            **interval._asdict(),
            "p_value": p_value(differences),
            "verdict": _verdict(strategy, baseline, interval, len(shared)),
        }
        result["labels_needed"][strategy] = {
            **_needed(curve.labels, ours.mean(0), theirs.mean(0)),
            "per_seed": {str(seed): _needed(curve.labels, ours[i], theirs[i]) for i, seed in enumerate(shared)},
        }
    return dict(plain(result))


def _verdict(strategy: str, baseline: str, interval: Interval, count: int) -> str:
    if count < 2:
        return "One seed: no interval, no conclusion."
    if interval.low <= 0 <= interval.high:
        return f"No significant difference between {strategy} and {baseline}."
    return f"{strategy} is {'better' if interval.low > 0 else 'worse'} than {baseline}."


def _needed(labels: FloatArray, ours: FloatArray, theirs: FloatArray) -> dict[str, Any]:
    """Labels that a curve needs for the final accuracy of the baseline's.

    Returns:
      `target`, that accuracy; `labels`, and `share` of the baseline's labels, None unless `status` is
      "reached"; `status`: "reached", "not reached", or "no gain": the baseline ends no better than it began
      without labels, so that its final accuracy is no target.
    """
    target = float(theirs[-1])
    if target <= theirs[0]:
        return {"target": target, "labels": None, "share": None, "status": "no gain"}
    needed = labels_to_reach(labels, ours, target)
    return {
        "target": target,
        "labels": needed,
        "share": None if needed is None else needed / float(labels[-1]),
        "status": "not reached" if needed is None else "reached",
    }


def table(comparison: Mapping[str, Any]) -> str:
    """What `compare` found, for people: accuracies, areas, differences in words, labels needed."""
    strategies = comparison["strategies"]
    counts = sorted({len(figures["seeds"]) for figures in strategies.values()})
    seeds = "one seed" if counts == [1] else f"mean of {' or '.join(map(str, counts))} seeds"
    spread = "" if counts == [1] else f" ± {comparison['confidence']:.0%} confidence"
    width = max(17, *(len(name) + 2 for name in strategies))
    lines = [
        f"Held-out accuracy, {seeds}{spread}",
        "",
        f"{'labels':>8}" + "".join(f"{name:>{width}}" for name in strategies),
    ]
    for i, labels in enumerate(next(iter(strategies.values()))["labels"]):
        cells = [
            Interval(*(figures["accuracy"][part][i] for part in Interval._fields)) for figures in strategies.values()
        ]
        lines.append(f"{labels:>8.0f}" + "".join(f"{_plus_minus(cell):>{width}}" for cell in cells))
    areas = [Interval(**figures["area"]) for figures in strategies.values()]
    lines.append(f"{'area':>8}" + "".join(f"{_plus_minus(cell):>{width}}" for cell in areas))
    baseline = comparison["baseline"]
    for strategy, found in comparison["differences"].items():
        lines += ["", _difference_in_words(strategy, baseline, found, comparison["confidence"])]
    if comparison["labels_needed"]:
        labels = strategies[baseline]["labels"][-1]
        lines.append("")
        for strategy, needed in comparison["labels_needed"].items():
            lines.append(_needed_in_words(strategy, baseline, labels, needed))
    return "\n".join(lines)


def _plus_minus(interval: Interval) -> str:
    if interval.low is None:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ± {(interval.high - interval.low) / 2:.3f}"


def _difference_in_words(strategy: str, baseline: str, found: Mapping[str, Any], confidence: float) -> str:
    figures = f"Area under the accuracy curve, {strategy} less {baseline}: {found['mean']:+.3f}"
    if len(found["seeds"]) > 1:
        figures += (
            f" ({confidence:.0%} interval {found['low']:+.3f} to {found['high']:+.3f}, "
            f"p = {found['p_value']:.2g}, {len(found['seeds'])} paired seeds)"
        )
    return f"{figures}. {found['verdict']}"


def _needed_in_words(strategy: str, baseline: str, budget: float, needed: Mapping[str, Any]) -> str:
    target = f"{baseline}'s final accuracy of {needed['target']:.3f} (after {budget:.0f} labels)"
    if needed["status"] == "no gain":
        return f"{strategy}: {target} is no better than without labels, and no target."
    if needed["status"] == "not reached":
        text = f"{strategy}: does not reach {target}"
    else:
        text = f"{strategy}: reaches {target} with {needed['labels']:.0f} labels, {needed['share']:.0%} of them"
    per_seed = needed["per_seed"].values()
    if len(per_seed) > 1:
        shares = [
            f"{figures['share']:.0%}" if figures["share"] is not None else figures["status"] for figures in per_seed
        ]
        text += f"; seed by seed: {', '.join(shares)}"
    return text + "."
