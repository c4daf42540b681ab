"""What a person reads: a line a round, a table at the end, and the learning curves as a picture."""

import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from activedpo_jax.evidence.registry import SKETCHES
from activedpo_jax.files import write_atomic
from activedpo_jax.record.comparison import CONFIDENCE, Curves, compare, learning_curves, mean_interval, table
from activedpo_jax.record.folders import RoundSummary, RunSummary
from activedpo_jax.record.labels import RoundRecord, Verdict
from activedpo_jax.rounds.picked import Picked
from activedpo_jax.rounds.spec import RoundSpec, SelectionSpec
from activedpo_jax.selection.posterior import information_gain
from activedpo_jax.training.loop import Diverged
from activedpo_jax.training.losses import DpoMetrics

# Okabe and Ito's palette, which people of every kind of colour vision can tell apart, without its yellow,
# which is too light for a line.
_FIXED = {"activedpo": "#0072B2", "random": "#707070"}
_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":")  # another for each time that the colours run out


def round_zero(scores: Mapping[str, float]) -> RoundSummary:
    """What is known before any label."""
    entry: Any = {"round": 0, "labels": 0, **_heldout(scores), "seconds": {}}
    return entry


def round_summary(
    selection: SelectionSpec,
    picked: Picked,
    verdicts: Mapping[str, Verdict],
    training: DpoMetrics | None,
    scores: Mapping[str, float],
    seconds: dict[str, float],
) -> RoundSummary:
    """What `summary.json` and `metrics.jsonl` say of one round.

    Args:
      scores: of the held-out set.
    """
    number = picked.questions[0].round
    entry: Any = {
        "round": number,
        "labels": number * selection.labels_per_round,
        **_heldout(scores),
        "loss": None if training is None else float(training.loss),
        "seconds": seconds,
    }
    if selection.rule.ranks and not picked.fallback:
        if selection.rule.gains:
            entry["information_gain"] = float(information_gain(jnp.array(picked.scores, jnp.float32)))
        entry["score_min"], entry["score_max"] = min(picked.scores), max(picked.scores)
    if picked.fallback:
        entry["fallback"] = f"{selection.rule.falls_back}: picked at random"
    if picked.computed is not None:
        entry["computed"] = picked.computed
    if picked.lam > np.float32(selection.lam):
        entry["lam"] = picked.lam
    said = [verdicts[q.pair_id] for q in picked.questions]
    if unlearnt := sum(v.label.preference in ("skip", "both_bad") for v in said):
        entry["unlearnt"] = unlearnt
    if ties := sum(v.label.preference == "tie" for v in said):
        entry["ties"] = ties
    if agreeing := [v.agreeing for v in said if not math.isnan(v.agreeing)]:
        entry["agreement"] = math.fsum(agreeing) / len(agreeing)
    return entry


def _heldout(scores: Mapping[str, float]) -> Any:
    """The figures of the held-out set under the names of `RoundSummary`, any others as `heldout_<name>`."""
    plain_names = ("accuracy", "margin")
    return {name if name in plain_names else f"heldout_{name}": value for name, value in scores.items()}


def round_notes(spec: RoundSpec, entry: RoundSummary) -> dict[str, str]:
    """What a person should know of a round, by kind; a run says each kind once."""
    selection, dim, notes = spec.selection, spec.evidence.features.dim, {}
    if selection.rule.design in SKETCHES and entry["labels"] > dim / 10:
        # The sketch keeps inner products to about 1/√D, which n of them add up to √(n/D).
        notes["dim"] = (
            f"from round {entry['round']} on there are more labels than a tenth of config.features.dim={dim}: the "
            "noise of the sketch begins to count in the scores; a larger one costs memory in proportion"
        )
    if "lam" in entry:
        notes["lam"] = (
            f"config.selection.lam={selection.lam} is below what float32 resolves for these features; "
            f"{entry['lam']:.3g} is used, and scores and gains are those under it: set a larger one, or a larger "
            "config.features.dim"
        )
    if "computed" in entry:
        kinds, earlier = " and ".join(spec.needs), f"an earlier round (config.selection.pass_every={spec.passes.every})"
        notes["computed"] = f"round {entry['round']}: {kinds} are those of {earlier}"
        if entry["computed"]:
            notes["computed"] = (
                f"round {entry['round']}: {kinds} of {entry['computed']} prompts are those of the current adapter, of "
                f"the others those of {earlier}"
            )
    if "fallback" in entry:
        notes["fallback"] = f"round {entry['round']}: {entry['fallback']}"
    if "unlearnt" in entry:
        notes["unlearnt"] = (
            f"{entry['unlearnt']} pairs of round {entry['round']} have no preference, and are not learnt"
        )
    return notes


def where_diverged(folder: pathlib.Path, spec: RoundSpec, number: int, error: Diverged) -> str:
    """The pairs of the step whose loss was not finite, and the last good checkpoint of the run in `folder`."""
    per_round, names = spec.selection.labels_per_round, []
    for slot in error.examples[:8]:
        picked = RoundRecord(folder, slot // per_round + 1).picked()
        assert picked is not None
        names.append(picked.questions[slot % per_round].pair_id)
    more = ", ..." if len(error.examples) > len(names) else ""
    return f"Its pairs: {', '.join(names)}{more}; the last good checkpoint: {folder / 'checkpoints' / str(number - 1)}"


def round_line(strategy: str, seed: int, rounds: int, record: RoundSummary) -> str:
    """One round on one line; `rounds` is how many there will be."""
    seconds = sum(record["seconds"].values())
    used = f"  {used_line(record['oracle'])}" if "oracle" in record else ""
    place = f"{record['round']:>{len(str(rounds))}}/{rounds}"
    head = f"{strategy}, seed {seed}  round {place}  labels {record['labels']:>4}"
    tail = f"held-out accuracy {record['accuracy']:.3f}  margin {record['margin']:+.3f}  {seconds:.1f} s{used}"
    if record["round"] == 0:
        return f"{head}  {tail}"
    middle = f"loss {_number(record.get('loss'), '.4f')}  {tail}"
    if "score_min" not in record:  # the strategy ranks by nothing
        return f"{head}  {middle}"
    scores = f"{_number(record.get('score_min'), '.3g')} to {_number(record.get('score_max'), '.3g')}"
    gain = f"gain {_number(record.get('information_gain'), '.2f')} nats  " if "information_gain" in record else ""
    agreement = f"agreement {record['agreement']:.0%}  " if "agreement" in record else ""
    return f"{head}  scores {scores}  {gain}{agreement}{middle}"


def used_line(used: Mapping[str, float]) -> str:
    """What an oracle took, in words."""
    words = [f"{used['requests']:,} requests"]
    words += [f"{used[name]:,} {name}" for name in ("malformed", "disagreements", "uncounted") if name in used]
    words.append(f"{used['prompt_tokens']:,} + {used['completion_tokens']:,} tokens")
    if "cost" in used:
        words.append(f"cost {used['cost']:.4g}")
    return ", ".join(words)


def used_by(summaries: Sequence[RunSummary]) -> dict[str, float]:
    """What the oracle took in all runs; empty: nothing is counted."""
    total: dict[str, float] = {}
    for record in (record for summary in summaries for record in summary["rounds"]):
        for name, value in record.get("oracle", {}).items():
            total[name] = total.get(name, 0) + value
    return total


def final_table(summaries: Sequence[RunSummary], baseline: str = "random") -> str:
    """Of one run its rounds, of several their comparison; and what the oracle took."""
    rows = _rounds_table(summaries[0]) if len(summaries) == 1 else table(compare(summaries, baseline))
    used = used_by(summaries)
    return f"{rows}\n\noracle: {used_line(used)}" if used else rows


def _rounds_table(summary: RunSummary) -> str:
    header = (
        "round",
        "labels",
        "score min",
        "score max",
        "gain, nats",
        "loss",
        "accuracy",
        "margin",
        "seconds",
    )
    rows = [
        (
            str(record["round"]),
            str(record["labels"]),
            _number(record.get("score_min"), ".3g"),
            _number(record.get("score_max"), ".3g"),
            _number(record.get("information_gain"), ".2f"),
            _number(record.get("loss"), ".4f"),
            f"{record['accuracy']:.3f}",
            f"{record['margin']:+.3f}",
            f"{sum(record['seconds'].values()):.1f}",
        )
        for record in summary["rounds"]
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join([f"{summary['strategy']}, seed {summary['seed']}", "", *lines])


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{spec}}"


def plot_curves(summaries: Sequence[RunSummary], path: pathlib.Path, title: str) -> None:
    """Writes `curves_figure` to a PNG."""
    image = io.BytesIO()
    curves_figure(summaries, title).savefig(image, format="png")
    write_atomic(path, image.getvalue())


def curves_figure(summaries: Sequence[RunSummary], title: str) -> Figure:
    """Held-out accuracy against labels: each strategy's mean and, over several seeds, its confidence band.

    Raises:
      ValueError: see `compare.learning_curves`.
    """
    curves = learning_curves(summaries)
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and without pyplot, whose state everyone shares
    axes = figure.add_subplot()
    colours = _colours(list(curves))
    last_label = max(float(curve.labels[-1]) for curve in curves.values())
    for strategy, curve in curves.items():
        colour, style = colours[strategy]
        mean = mean_interval(curve.accuracy)
        axes.fill_between(curve.labels, mean.low, mean.high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(curve.labels, mean.mean, style, color=colour, lw=2.2, marker="o", markersize=3.5, clip_on=False)

    low, high = axes.get_ylim()
    if low - 0.25 * (high - low) <= 0.5 <= high:
        axes.axhline(0.5, color="#303030", linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
        axes.text(last_label, 0.5, "chance", ha="right", va="bottom", color="#303030", fontsize=9.5)
        low = min(low, 0.5 - 0.04 * (high - low))
    axes.set_ylim(low, high)
    ends = {strategy: float(curve.accuracy.mean(0)[-1]) for strategy, curve in curves.items()}
    for strategy, height in spread(ends, 0.055 * (high - low)).items():
        colour, style = colours[strategy]
        axes.annotate(
            strategy,
            (last_label, ends[strategy]),
            (1.055, (height - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=11,
            fontweight="bold" if strategy == "activedpo" else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linestyle": style,
                "shrinkA": 1,
                "relpos": (0, 0.5),
            },
        )
    axes.set_xlim(0, last_label or 1)
    axes.set_xlabel("labels")
    axes.set_ylabel("held-out preference accuracy")
    axes.set_title(title, loc="left", fontsize=13, pad=24)
    axes.text(0, 1.025, _subtitle(list(curves.values())), transform=axes.transAxes, fontsize=9.5, color="#505050")
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _colours(strategies: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and line style of each; the two that are in every plot look the same in all of them."""
    others = [strategy for strategy in strategies if strategy not in _FIXED]
    looks = {strategy: (colour, "-") for strategy, colour in _FIXED.items()}
    for i, strategy in enumerate(others):
        looks[strategy] = (_COLOURS[i % len(_COLOURS)], _STYLES[i // len(_COLOURS) % len(_STYLES)])
    return looks


def spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights of the names beside the curves: as near to the curves' ends as a distance of `gap` allows."""
    names = sorted(heights, key=lambda name: heights[name])
    # Least squares in a given order: isotonic regression, of the heights less the room for the names below.
    blocks: list[tuple[float, int]] = []  # mean, size
    for i, name in enumerate(names):
        mean, size = heights[name] - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            below, many = blocks.pop()
            mean, size = (below * many + mean * size) / (many + size), many + size
        blocks.append((mean, size))
    places = np.concatenate([np.full(size, mean) for mean, size in blocks])
    return {name: float(places[i] + i * gap) for i, name in enumerate(names)}


def _subtitle(curves: Sequence[Curves]) -> str:
    counts = sorted({len(curve.seeds) for curve in curves})
    if counts == [1]:
        return "one seed"
    return f"mean and {CONFIDENCE:.0%} confidence band over {' or '.join(map(str, counts))} seeds"
