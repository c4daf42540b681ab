"""Figures of the comparison against SciPy's tests and hand-made curves; words that say what they show; the command."""

import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from activedpo_jax import compare, layout, runs
from activedpo_jax.record import comparison, outcomes
from activedpo_jax.record.folders import RoundSummary, RunSummary

LABELS = (0, 10, 20, 40)


def run(strategy: str, seed: int, accuracy: Sequence[float], labels: Sequence[int] = LABELS) -> RunSummary:
    rounds = [
        RoundSummary(round=i, labels=n, accuracy=a, margin=0.0, seconds={})
        for i, (n, a) in enumerate(zip(labels, accuracy, strict=True))
    ]
    return RunSummary(strategy=strategy, seed=seed, rounds=rounds)


def noisy_runs(gain: float, seeds: int = 5) -> list[RunSummary]:
    """Seeds differ by far more than strategies do: only paired differences can see `gain`."""
    rng = np.random.default_rng(0)
    runs = []
    for seed in range(seeds):
        base = np.array([0.5, 0.55, 0.6, 0.7]) + rng.normal(0, 0.1)
        runs.append(run("random", seed, list(base + rng.normal(0, 0.005, 4))))
        runs.append(run("activedpo", seed, list(base + gain * np.array([0, 1, 1, 1]) + rng.normal(0, 0.005, 4))))
    return runs


@hypothesis.given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
@hypothesis.settings(deadline=None, max_examples=50)
def test_intervals_and_p_values_are_scipys(values: list[float]) -> None:
    array = np.array(values)
    hypothesis.assume(array.std() > 1e-3)
    found = comparison.mean_interval(array)
    truth = stats.ttest_1samp(array, 0)
    low, high = truth.confidence_interval(0.95)
    np.testing.assert_allclose([found.mean, found.low, found.high], [array.mean(), low, high], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(comparison.p_value(array), truth.pvalue, rtol=1e-9)


def test_differences_that_do_not_vary() -> None:
    assert comparison.p_value(np.zeros(4)) == 1
    assert comparison.p_value(np.full(4, 0.25)) == 0
    assert math.isnan(comparison.p_value(np.array([0.3])))


def test_area_of_hand_made_curves() -> None:
    labels = np.array([0.0, 10, 30])
    # (0.5 + 0.7)/2 over 10 labels, then (0.7 + 0.9)/2 over 20: (6 + 16)/30.
    np.testing.assert_allclose(comparison.area(labels, np.array([[0.5, 0.7, 0.9], [0.6, 0.6, 0.6]])), [22 / 30, 0.6])


@pytest.mark.parametrize(
    ("accuracy", "target", "expected"),
    [
        ([0.5, 0.6, 0.7, 0.8], 0.65, 15),  # halfway between 10 and 20
        ([0.5, 0.6, 0.7, 0.8], 0.75, 30),
        ([0.5, 0.6, 0.7, 0.8], 0.8, 40),  # at the very end
        ([0.5, 0.6, 0.7, 0.8], 0.81, None),
        ([0.5, 0.7, 0.6, 0.8], 0.7, 10),  # the first time, though it falls again
        ([0.5, 0.5, 0.5, 0.5], 0.5, 0),
    ],
)
def test_labels_to_reach(accuracy: list[float], target: float, expected: float | None) -> None:
    found = comparison.labels_to_reach(np.array(LABELS, float), np.array(accuracy), target)
    assert found == (None if expected is None else pytest.approx(expected))


def test_labels_needed_of_means_and_of_seeds() -> None:
    found = comparison.compare(
        [
            run("activedpo", 0, [0.5, 0.7, 0.7, 0.9]),
            run("activedpo", 1, [0.5, 0.5, 0.5, 0.5]),
            run("random", 0, [0.5, 0.5, 0.6, 0.8]),
            run("random", 1, [0.5, 0.5, 0.5, 0.6]),
        ]
    )["labels_needed"]["activedpo"]
    # The means are 0.5, 0.6, 0.6, 0.7, and random's last is 0.7.
    assert (found["target"], found["labels"], found["share"]) == pytest.approx((0.7, 40, 1))
    assert found["per_seed"]["0"]["labels"] == pytest.approx(30) and found["per_seed"]["0"]["status"] == "reached"
    assert found["per_seed"]["1"] == {"target": 0.6, "labels": None, "share": None, "status": "not reached"}


def test_the_baseline_is_not_compared_with_itself() -> None:
    """Though it passes its own final accuracy early."""
    runs = [run("activedpo", 0, [0.5, 0.6, 0.7, 0.8]), run("random", 0, [0.5, 0.8, 0.7, 0.65])]
    for summaries in (runs, runs[::-1]):
        found = comparison.compare(summaries)
        assert found["strategies"].keys() == {"activedpo", "random"}
        assert found["differences"].keys() == found["labels_needed"].keys() == {"activedpo"}
        text = comparison.table(found)
        assert "activedpo: reaches random's final accuracy of 0.650 (after 40 labels) with 15 labels, 38%" in text
        assert "random: reaches" not in text
    alone = comparison.compare([run("random", 0, [0.5, 0.8, 0.7, 0.65]), run("random", 1, [0.5, 0.8, 0.7, 0.65])])
    assert alone["differences"] == alone["labels_needed"] == {} and "final accuracy" not in comparison.table(alone)


def test_random_that_learns_nothing_is_no_target() -> None:
    found = comparison.compare([run("activedpo", 0, [0.5, 0.6, 0.7, 0.8]), run("random", 0, [0.5, 0.6, 0.6, 0.5])])
    assert found["labels_needed"]["activedpo"]["status"] == "no gain"
    assert found["labels_needed"]["activedpo"]["share"] is None
    assert "is no better than without labels" in comparison.table(found)


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (0.05, "activedpo is better than random."),
        (-0.05, "activedpo is worse than random."),
        (0.0, "No significant difference between activedpo and random."),
    ],
)
def test_verdict_comes_from_paired_seeds(gain: float, verdict: str) -> None:
    runs = noisy_runs(gain)
    found = comparison.compare(runs)["differences"]["activedpo"]
    widths = np.array([10, 10, 20]) / 40
    areas = {"random": [], "activedpo": []}  # type: dict[str, list[float]]
    for summary in runs:
        accuracy = np.array([record["accuracy"] for record in summary["rounds"]])
        areas[summary["strategy"]].append(float(widths @ (accuracy[1:] + accuracy[:-1]) / 2))
    truth = stats.ttest_rel(areas["activedpo"], areas["random"])
    low, high = truth.confidence_interval(0.95)
    assert (found["low"], found["high"], found["p_value"]) == pytest.approx((low, high, truth.pvalue))
    assert found["verdict"] == verdict and verdict in comparison.table(comparison.compare(runs))
    if gain:  # what the pairing is for: the seeds' own spread hides the gain
        assert stats.ttest_ind(areas["activedpo"], areas["random"]).pvalue > 0.05


def test_only_shared_seeds_are_paired() -> None:
    alone = run("activedpo", 9, [0.9, 0.9, 0.9, 0.9])
    found, without = comparison.compare([*noisy_runs(0.02), alone]), comparison.compare(noisy_runs(0.02))
    assert found["differences"] == without["differences"] and found["labels_needed"] == without["labels_needed"]
    assert found["strategies"]["activedpo"]["seeds"] == [0, 1, 2, 3, 4, 9]
    assert "mean of 5 or 6 seeds" in comparison.table(found)


def test_single_seed_makes_no_claim() -> None:
    found = comparison.compare(noisy_runs(0.05, seeds=1))
    assert found["differences"]["activedpo"]["low"] is None and found["differences"]["activedpo"]["p_value"] is None
    text = comparison.table(found)
    assert "no conclusion" in text and "±" not in text and "better" not in text


def test_without_random_there_is_a_table_and_no_difference() -> None:
    found = comparison.compare([run("activedpo", 0, [0.5, 0.6, 0.7, 0.8]), run("margin", 0, [0.5, 0.5, 0.5, 0.5])])
    assert found["baseline"] is None and found["differences"] == {} and found["labels_needed"] == {}
    assert "activedpo" in comparison.table(found) and "less" not in comparison.table(found)


def test_result_is_json() -> None:
    for summaries in (noisy_runs(0.05), noisy_runs(0.05, seeds=1)):
        found = comparison.compare(summaries)
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_table_shows_means_and_half_widths() -> None:
    runs = [run("activedpo", seed, [0.5, 0.6, 0.7, 0.8 + seed / 10]) for seed in (0, 1)]
    half_width = stats.t.ppf(0.975, 1) * stats.sem([0.8, 0.9])
    last = comparison.table(comparison.compare(runs)).splitlines()[6]
    assert last.split() == ["40", "0.850", "±", f"{half_width:.3f}"]


def test_runs_that_cannot_be_compared_are_refused() -> None:
    good = run("activedpo", 0, [0.5, 0.6, 0.7, 0.8])
    with pytest.raises(ValueError, match="two runs of activedpo, seed 0"):
        comparison.compare([good, good])
    with pytest.raises(ValueError, match=r"random, seed 3, evaluated after \[0, 10\] labels, activedpo, seed 0"):
        comparison.compare([good, run("random", 3, [0.5, 0.6], labels=(0, 10))])


class Killed(BaseException):
    """As a kill: nothing catches it."""


def test_the_command_goes_on_after_failures_and_kills(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed comparison resumes run by run; a failed run is kept, shown, and tried again when asked for."""
    tiny = {
        **{"strategies": "margin,random", "seeds": "0,1", "rounds": 2, "labels_per_round": 4},
        **{"synthetic.pool_pairs": 32, "synthetic.heldout_pairs": 24, "scratch.steps": 2, "scratch.examples": 64},
        **{"dpo.epochs": 2, "dpo.batch_size": 4, "evaluation.pairs_per_chunk": 24, "compare.replicates": 200},
    }
    flags = [f"--config.{name}={value}" for name, value in tiny.items()]
    argv = ["compare", "--config=configs/compare_synthetic.py", f"--workdir={tmp_path}", *flags]
    calls: list[tuple[str, int]] = []
    ends: dict[tuple[str, int], BaseException] = {("random", 0): Killed()}
    real = runs.run

    def run_or_end(setting: runs.Setting, strategy: str, folder: pathlib.Path) -> Any:
        calls.append((strategy, setting.seed))
        if error := ends.pop(calls[-1], None):
            raise error
        return real(setting, strategy, folder)

    monkeypatch.setattr(runs, "run", run_or_end)
    one_device = functools.partial(layout.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(layout, "make_mesh", one_device)
    with pytest.raises(Killed):
        compare.main(argv)
    assert calls == [("margin", 0), ("random", 0)] and not (tmp_path / "report.html").exists()

    calls.clear()
    ends["margin", 1] = RuntimeError("<script>no</script>")
    compare.main(argv)
    assert calls == [("random", 0), ("margin", 1), ("random", 1)]
    failed = json.loads((tmp_path / "margin" / "seed1" / "failed.json").read_text())
    assert failed["error"] == "RuntimeError: <script>no</script>" and "run_or_end" in failed["traceback"]
    page = (tmp_path / "report.html").read_text()
    assert "1 of 4 runs failed" in page and "&lt;script&gt;no" in page and "<script" not in page
    assert "margin, seed 1, failed in round 0: RuntimeError: <script>no</script>" in capsys.readouterr().out
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["differences"]["margin"]["seeds"] == [0] and found["differences"]["margin"]["verdict"] == "open"

    calls.clear()
    compare.main(argv)
    assert calls == []  # it reports, and does not try again
    compare.main([*argv, "--config.compare.retry=true", "--config.compare.hour_price=2"])
    assert calls == [("margin", 1)]
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["state"] for run in found["runs"]] == ["done"] * 4
    assert "runs failed" not in (tmp_path / "report.html").read_text()

    # Means of the pairs' outcomes are the accuracies, and differences of these the metric's.
    areas = {}
    for strategy in ("margin", "random"):
        for seed in (0, 1):
            folder = tmp_path / strategy / f"seed{seed}"
            accuracy = [entry["accuracy"] for entry in json.loads((folder / "summary.json").read_text())["rounds"]]
            assert outcomes.read(folder).correct.mean(1).tolist() == accuracy
            areas[strategy, seed] = (accuracy[0] / 2 + accuracy[1] + accuracy[2] / 2) / 2
    assert found["differences"]["margin"]["per_seed"] == pytest.approx(
        [areas["margin", seed] - areas["random", seed] for seed in (0, 1)]
    )
    assert sorted(path.name for path in tmp_path.glob("*.*") if path.name != ".lock") == [
        *("comparison.csv", "comparison.json", "comparison.md", "config.json", "curves.png", "report.html"),
    ]

    with pytest.raises(SystemExit):  # what was named before the runs stays
        compare.main([*argv, "--config.compare.margin=0.5"])
    assert "compare.margin (was 0.02, now 0.5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("strategies=random", "config.strategies: got 'random', expected two or more to compare"),
        (
            "strategies=activedpo,margin",
            "config.compare.baseline: got 'random', expected one of the strategies activedpo",
        ),
        ("compare.metric=auc", "config.compare.metric: got 'auc', expected one of area, final"),
        ("compare.margin=0", "config.compare.margin: got 0.0, expected a number above 0"),
    ],
)
def test_comparisons_that_say_nothing_are_refused(flag: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        compare.main(["compare", "--config=configs/compare_synthetic.py", "--workdir=x", f"--config.{flag}"])
    assert raised.value.code == 2 and message in capsys.readouterr().err
