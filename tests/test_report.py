"""What people read: every figure is in its line, and the picture shows the curves that were given."""

import pathlib
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from activedpo_jax.record import report
from activedpo_jax.record.folders import RoundSummary, RunSummary


def round_summary(number: int, accuracy: float) -> RoundSummary:
    record = RoundSummary(
        round=number,
        labels=16 * number,
        accuracy=accuracy,
        margin=-0.25,
        seconds={"select": 1.5, "train": 2.0},
    )
    if number:
        record |= {"loss": 0.6543, "information_gain": 12.345, "score_min": 0.11, "score_max": 1.92}
    return record


def summaries(names: list[str], seeds: int, start: float = 0.5) -> list[RunSummary]:
    """Curves that end close together, since they flatten out, as real ones do."""
    rng = np.random.default_rng(0)
    return [
        RunSummary(
            strategy=name,
            seed=seed,
            rounds=[round_summary(t, start + 0.3 * (1 - 0.5 ** (t / (i + 1))) + rng.normal(0, 0.01)) for t in range(9)],
        )
        for i, name in enumerate(names)
        for seed in range(seeds)
    ]


def test_round_line_has_every_figure() -> None:
    line = report.round_line("activedpo", 3, 10, round_summary(2, 0.625))
    for part in ("activedpo, seed 3", " 2/10", "labels   32", "0.11 to 1.92", "12.35 nats", "loss 0.6543"):
        assert part in line, part
    assert line.endswith("held-out accuracy 0.625  margin -0.250  3.5 s") and "\n" not in line


def test_round_without_labels_or_finite_loss() -> None:
    first = report.round_line("random", 0, 10, round_summary(0, 0.5))
    assert "accuracy 0.500" in first and "loss" not in first and "scores" not in first
    diverged: Any = round_summary(1, 0.5) | {
        "loss": None,
        "score_min": None,
        "information_gain": float("nan"),
    }
    assert "scores - to 1.92  gain - nats  loss -" in report.round_line("random", 0, 10, diverged)


def test_table_of_one_run_is_its_rounds_and_of_several_their_comparison() -> None:
    runs = summaries(["activedpo", "random"], 2)
    alone = report.final_table(runs[:1]).splitlines()
    header = "round labels score min score max gain, nats loss accuracy margin seconds"
    assert " ".join(alone[2].split()) == header
    assert alone[-1].split()[:6] == ["8", "128", "0.11", "1.92", "12.35", "0.6543"] and len(alone) == 12
    assert len({len(line) for line in alone[2:]}) == 1
    assert "activedpo less random" in report.final_table(runs)


def names_of(figure: Figure) -> dict[str, Annotation]:
    return {t.get_text(): t for t in figure.axes[0].texts if isinstance(t, Annotation)}


def test_figure_shows_means_bands_and_names() -> None:
    runs = summaries(["activedpo", "random"], 3)
    figure = report.curves_figure(runs, "Quickstart")
    axes: Any = figure.axes[0]
    colours = {"activedpo": "#0072B2", "random": "#707070"}
    assert names_of(figure).keys() == colours.keys()
    for strategy, colour in colours.items():
        curves = np.array([[r["accuracy"] for r in run["rounds"]] for run in runs if run["strategy"] == strategy])
        (line,) = [line for line in axes.lines if line.get_color() == colour]
        np.testing.assert_allclose(np.asarray(line.get_ydata()), curves.mean(0))
        np.testing.assert_allclose(np.asarray(line.get_xdata()), 16 * np.arange(9))
        (band,) = [c for c in axes.collections if matplotlib.colors.same_color(c.get_facecolor()[0][:3], colour)]
        heights = band.get_paths()[0].vertices[:, 1]
        # Student's t with 2 degrees of freedom: 4.3027 (from a printed table).
        widths = 4.3027 * curves.std(0, ddof=1) / np.sqrt(3)
        assert (heights.min(), heights.max()) == pytest.approx(
            ((curves.mean(0) - widths).min(), (curves.mean(0) + widths).max()), abs=1e-4
        )
        assert names_of(figure)[strategy].get_color() == colour
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("labels", "held-out preference accuracy")
    assert axes.get_title(loc="left") == "Quickstart"
    assert "mean and 95% confidence band over 3 seeds" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(("start", "shown"), [(0.5, True), (0.9, False)])
def test_chance_is_shown_where_it_is_in_range(start: float, shown: bool) -> None:
    axes = report.curves_figure(summaries(["random"], 2, start), "x").axes[0]
    assert ("chance" in [text.get_text() for text in axes.texts]) == shown
    low, high = axes.get_ylim()
    assert (low < 0.5 < high) == shown


def test_names_do_not_overlap_and_looks_differ() -> None:
    strategies = ["activedpo", "random", *(f"rule{i}" for i in range(9))]
    figure = report.curves_figure(summaries(strategies, 1), "x")
    figure.savefig(pathlib.Path("/dev/null"), format="png")  # lays out
    boxes = sorted(tuple(Text.get_window_extent(name).intervaly) for name in names_of(figure).values())
    assert len(boxes) == 11
    for (_, top), (bottom, _) in zip(boxes, boxes[1:], strict=False):
        assert top <= bottom
    lines = [line for line in figure.axes[0].lines if len(np.asarray(line.get_xdata())) == 9]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 11


def test_png_on_disk(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "runs" / "curves.png"
    report.plot_curves(summaries(["activedpo", "random"], 2), path, "Quickstart")
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (750, 1200)
    for colour in ("#0072B2", "#707070"):
        distance = np.abs(image[..., :3] - matplotlib.colors.to_rgb(colour)).max(-1)
        columns = np.flatnonzero((distance < 0.02).any(0))
        assert columns.max() - columns.min() > 800  # the line goes all the way
    edges = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (edges[:, :3] == 1).all()  # nothing is cut off
