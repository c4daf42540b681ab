"""Figures of a comparison against truths planted in the folders of runs; its reports, read by other programs."""

import csv
import html.parser
import io
import json
import pathlib
from typing import Any

import ml_collections
import numpy as np
import pytest

from activedpo_jax.config import default
from activedpo_jax.evidence.registry import EVIDENCE
from activedpo_jax.oracles.labels import Label, Question
from activedpo_jax.record import comparison, costs, failures, folders, outcomes, page, picks, study, study_files, svg
from activedpo_jax.record.labels import RoundRecord, Verdict
from activedpo_jax.rounds.picked import Picked

STRATEGIES = ("activedpo", "margin", "random")
EVIL = '<script>alert("1")</script> & more'


def options() -> ml_collections.ConfigDict:
    config = default()
    config.strategies, config.seeds = STRATEGIES, (0, 1, 2)
    config.rounds, config.labels_per_round = 2, 4
    config.compare.replicates = 500
    return config


def write_run(config: ml_collections.ConfigDict, folder: pathlib.Path, strategy: str, seed: int, gain: float) -> None:
    """A finished run: its share of right pairs rises by `gain` more than the baseline's, the same in every seed."""
    place = folders.run_folder(folder, config, strategy, seed)
    digests = np.arange(200, dtype=np.uint64)
    writer, rounds = outcomes.OutcomesWriter(place, digests, 0), []
    for number in range(config.rounds + 1):
        share = 0.5 + 0.1 * number + gain * (number > 0)
        # A few of the pairs differ from seed to seed; which are right does not depend on the strategy but for the gain.
        margins = np.where((np.arange(200) * 37 + 3 * seed) % 200 < round(200 * share), 1.0, -1.0)
        writer.add(margins)
        accuracy = float(np.mean(margins > 0))
        seconds = {"round": 2.0 if strategy == "random" else 6.0, "evaluation": 50.0}
        rounds.append({"round": number, "labels": 4 * number, "accuracy": accuracy, "margin": 0.1, "seconds": seconds})
    folders.write_summary(place, {"strategy": strategy, "seed": seed, "rounds": rounds})
    for number in range(1, config.rounds + 1):
        write_picks(place, number, strategy)
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")


def write_picks(place: pathlib.Path, number: int, strategy: str) -> None:
    """`margin` picks what `random` picks, in the other order; `activedpo` other pairs, with longer responses."""
    base = 100 if strategy == "activedpo" else 0
    ids = [base + 4 * number + i for i in range(4)]
    ids = ids[::-1] if strategy == "margin" else ids
    length = 9 if strategy == "activedpo" else 3
    questions = [
        Question(
            pair_id=f"pair-{i}",
            prompt=f"{EVIL} topic{i % 2} item{i % 4}",
            first=f"first {i}",
            second=EVIL,
            score=None if strategy == "random" else 0.5,
            round=number,
            prompt_tokens=[1, 2],
            first_tokens=[1] * length,
            second_tokens=[1] * (length + 2),
            digest=[i, 0, 0, 0],
        )
        for i in ids
    ]
    picked = Picked(questions, [0.5] * 4, 1.0, False)
    RoundRecord(place, number).ask(picked)
    said = {q.pair_id: Verdict(Label(q.pair_id, "first", "test"), 1.0) for q in questions}
    folders.write_selected(place, number, folders.joined(picked, said))


@pytest.fixture
def place(tmp_path: pathlib.Path) -> pathlib.Path:
    """`activedpo` gains 0.1, `margin` nothing."""
    config = options()
    for seed in config.seeds:
        for strategy, gain in zip(STRATEGIES, (0.1, 0.0, 0.0), strict=True):
            write_run(config, tmp_path, strategy, seed, gain)
        costs.write_sizes(tmp_path, seed, costs.Sizes(layers=1000, head=100, prompts=50, responses=500, pairs=40))
    return tmp_path


def everything(config: ml_collections.ConfigDict, folder: pathlib.Path) -> list[study.Run]:
    return [study.read_run(config, folder, strategy, seed) for strategy in config.strategies for seed in config.seeds]


def made(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    return study.make(config, folder, everything(config, folder))


@pytest.mark.parametrize(("metric", "gain"), [("area", 0.075), ("final", 0.1)])
def test_planted_differences_are_found(place: pathlib.Path, metric: str, gain: float) -> None:
    config = options()
    config.compare.metric = metric
    found = made(config, place)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    ours, same = found["differences"]["activedpo"], found["differences"]["margin"]
    # Of two rounds, the area has half of the first step's gain: (0 + 0.1)/2 and 0.1, each over half of the labels.
    assert ours["mean"] == pytest.approx(gain) and ours["per_seed"] == pytest.approx([gain] * 3)
    assert (ours["verdict"], same["verdict"]) == ("better", "equal") and same["mean"] == 0
    assert ours["low"] <= ours["low_equivalence"] <= gain <= ours["high_equivalence"] <= ours["high"]
    assert f"activedpo is better than random: {study_files.METRICS[metric]} +{gain:.3f}" in study_files.markdown_of(
        found
    )
    assert "no difference (within ±0.02)" in study_files.markdown_of(found)


def test_the_metrics_weights_are_the_area_under_the_curve() -> None:
    labels, accuracy = np.array([0.0, 10, 30]), np.array([0.5, 0.7, 0.9])
    assert study.weights("area", list(labels)) @ accuracy == pytest.approx(comparison.area(labels, accuracy))
    assert study.weights("final", list(labels)) @ accuracy == 0.9


def test_one_seed_decides_nothing(place: pathlib.Path) -> None:
    config = options()
    config.seeds = (1,)
    found = made(config, place)
    assert {d["verdict"] for d in found["differences"].values()} == {"open"}
    assert "of one seed, without an interval" in study_files.markdown_of(found)
    page.html_of(found, "one")


class Reader(html.parser.HTMLParser):
    """Checks that elements are closed in order, and keeps tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_whole_by_itself_and_runs_nothing(place: pathlib.Path) -> None:
    config = options()
    config.data.train = EVIL
    failures.write_failure(folders.run_folder(place, config, "margin", 2), EVIL, ValueError(EVIL))
    text = page.html_of(made(config, place), EVIL)
    reader = read(text)
    assert reader.text.count(EVIL) >= 4  # title, recipe, failure and picks show it as it is
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(reader.tags)
    assert "url(" not in text and "@import" not in text
    for name, value in reader.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "data", "action")
        assert name != "href" or (value or "").startswith("#")
    assert reader.tags.count("svg") == 6 and "prefers-color-scheme: dark" in text
    # What was named before the runs, and what was found.
    for part in ("up to ±0.02", "area under the held-out accuracy curve", "Better than random: activedpo"):
        assert part in reader.text
    assert f"failed in round 3: {EVIL}" in reader.text and "1 of 9 runs failed" in reader.text


def test_failed_runs_are_shown_and_in_no_figure(place: pathlib.Path) -> None:
    config = options()
    failures.write_failure(folders.run_folder(place, config, "activedpo", 1), "the loss is nan\nhere", ValueError("x"))
    found = made(config, place)
    assert found["differences"]["activedpo"]["seeds"] == [0, 2] and found["differences"]["margin"]["seeds"] == [0, 1, 2]
    assert found["curves"]["activedpo"]["seeds"] == [0, 2]
    (failed,) = [run for run in found["runs"] if run["state"] == "failed"]
    assert (failed["strategy"], failed["seed"], failed["error"]) == ("activedpo", 1, "the loss is nan here")
    assert failed["metric"] is None and failed["accuracy"] is not None
    markdown = study_files.markdown_of(found)
    assert "1 of 9 runs failed" in markdown and "activedpo, seed 1, in round 3: `the loss is nan here`" in markdown
    for seed in config.seeds:
        failures.write_failure(folders.run_folder(place, config, "random", seed), "gone", ValueError("x"))
    without = made(config, place)
    assert without["differences"] == {} and "share no seed" in study_files.markdown_of(without)
    assert "Nothing can be said" in read(page.html_of(without, "x")).text
    for name in ("activedpo", "margin"):
        for seed in config.seeds:
            failures.write_failure(folders.run_folder(place, config, name, seed), "gone", ValueError("x"))
    assert "No run has ended" in read(page.html_of(made(config, place), "x")).text


def test_csv_gives_back_every_figure(place: pathlib.Path) -> None:
    config = options()
    runs = everything(config, place)
    lost = study.Run(
        "margin", 7, place, {"strategy": "margin", "seed": 7, "rounds": []}, failures.Failure('a, "b"', 0), False
    )
    rows = list(csv.DictReader(io.StringIO(study_files.csv_of([*runs, lost]))))
    assert len(rows) == 9 * 3 + 1
    expected = [(run, entry) for run in runs for entry in run.summary["rounds"]]
    for row, (run, entry) in zip(rows, expected, strict=False):
        assert (row["strategy"], int(row["seed"]), row["state"]) == (run.strategy, run.seed, "done")
        assert float(row["accuracy"]) == entry["accuracy"] and int(row["labels"]) == entry["labels"]
        assert float(row["seconds"]) == sum(entry["seconds"].values()) and row["loss"] == ""
    assert rows[-1]["error"] == 'a, "b"' and rows[-1]["state"] == "failed" and rows[-1]["round"] == ""


def test_costs_by_hand(place: pathlib.Path) -> None:
    config = options()
    config.dpo.epochs, config.compare.hour_price = 3, 36.0
    found = made(config, place)
    ours, base = found["costs"]["activedpo"], found["costs"]["random"]
    # Evaluation is not counted: 6 and 2 seconds a round of 4 labels.
    assert (ours["seconds_a_label"], base["seconds_a_label"]) == (1.5, 0.5)
    # A pass: 1000 parameters for each of 550 tokens, 100 more for each of 500; forward and backward, in both rounds.
    assert ours["selection_flops_a_label"] == 2 * 4 * (1000 * 550 + 100 * 500) / 8
    assert found["costs"]["margin"]["selection_flops_a_label"] == ours["selection_flops_a_label"]  # forward twice
    assert base["selection_flops_a_label"] == 0
    # Four pairs a round, of 2 tokens of prompt and 8 of responses; those of round 1 are learnt twice.
    of_round = 1000 * 40 + 100 * 32
    assert base["training_flops_a_label"] == (4 * 3 * 3 * of_round + 2 * 2 * of_round) / 8
    # 0.5, 0.7, 0.8 reaches random's 0.7 after 4 of 8 labels: 6 seconds, where random takes 4.
    assert found["labels_needed"]["activedpo"]["labels"] == pytest.approx(4)
    even = ours["break_even"]
    assert (even["saved"], even["extra_seconds"], even["pays"]) == (pytest.approx(4), pytest.approx(2), "above")
    assert even["price"] == pytest.approx(2 / 3600 * 36 / 4)
    assert found["costs"]["margin"]["break_even"]["pays"] == "never"
    assert "above 0.005 (0.5 s of this machine)" in study_files.markdown_of(found)


def test_selection_that_takes_no_longer_always_pays() -> None:
    labels, quick, slow = np.array([0.0, 4, 8]), np.array([1.0, 1]), np.array([3.0, 3])
    assert costs.break_even(quick, slow, labels, 4.0, 1.0)["pays"] == "always"
    assert costs.break_even(slow, quick, labels, None, 1.0)["pays"] == "never"
    found = costs.break_even(slow, quick, labels, 4.0, 0.0)
    assert (found["saved"], found["extra_seconds"], found["seconds_a_label"]) == (4, 1, 0.25)
    assert found["pays"] == "above" and found["price"] is None  # an hour has none


def test_agreement_lengths_and_clusters_of_planted_picks(place: pathlib.Path) -> None:
    found = made(options(), place)["picks"]
    assert found["lengths"] == {"activedpo": [10, 10], "margin": [4, 4], "random": [4, 4]}
    agreed = {tuple(pair["strategies"]): pair for pair in found["agreement"]}
    assert agreed["margin", "random"]["overall"] == 1 and agreed["margin", "random"]["by_round"] == [1, 1]
    # Four in the opposite order: 0, 0, 2/3, 1 of the beginnings are shared.
    assert agreed["margin", "random"]["order"] == pytest.approx((0 + 0 + 2 / 3 + 1) / 4)
    assert agreed["activedpo", "random"]["overall"] == 0
    assert len(found["clusters"]["names"]) == 2  # as many as there are topics; an item is in one prompt alone
    assert all(shares == [0.5, 0.5] for shares in found["clusters"]["shares"].values())
    assert all(0 < similarity < 1 for similarity in found["repetition"]["random"])
    assert [len(several) for several in found["examples"].values()] == [3, 3, 3]


def test_nearest_neighbours_are_those_of_a_loop() -> None:
    texts = ["a b", "c d", "a b", "a c", "é x", ""]
    found, words = picks.vectors(texts)
    assert set(words) == {"a", "b", "c", "d", "é", "x"}
    similarity, rows = picks.nearest_before(found)
    assert (similarity[0], rows[0]) == (0, -1) and (similarity[2], rows[2]) == (pytest.approx(1), 0)
    for i in range(1, len(texts)):
        cosines = [float(found[i] @ found[j]) for j in range(i)]
        assert similarity[i] == pytest.approx(max(cosines)) and rows[i] == int(np.argmax(cosines))
    assert similarity[4] == similarity[5] == 0


def test_prompts_of_different_words_are_in_different_clusters() -> None:
    prompts = [f"{word} {word} filler{i}" for i, word in enumerate(["apple"] * 9 + ["boat"] * 6 + ["cloud"] * 3)]
    labels, names = picks.clusters(prompts, most=3)
    assert labels.tolist() == [0] * 9 + [1] * 6 + [2] * 3  # the largest first
    assert [name.split(", ")[0] for name in names] == ["apple", "boat", "cloud"]


def test_jaccard_and_rank_overlap_of_hand_made_lists() -> None:
    assert picks.jaccard("abc", "bcd") == 0.5 and picks.jaccard("a", "b") == 0
    assert picks.rank_overlap("abc", "abc") == 1 and picks.rank_overlap("ab", "cd") == 0
    assert picks.rank_overlap("ab", "ba") == 0.5


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.437, 0.912), (-0.03, 0.05), (1, 8), (0, 128), (0.5, 0.5001)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = svg.ticks(low, high)
    assert 3 <= len(found) <= 12 and min(found) >= low and max(found) <= high
    assert len({f"{value:.6g}" for value in found}) == len(found)


def test_a_band_is_drawn_around_its_line() -> None:
    drawing = svg.curves("x", [0, 10], [svg.Line("a<b", 0, [0.5, 0.7], [0.4, None], [0.6, None])], "labels", "y")
    reader = read(drawing)
    assert reader.tags.count("circle") == 2 and reader.tags.count("polygon") == 1 and "a<b" in reader.text
    assert "a<b, labels 0: 0.500 (0.400 to 0.600)" in reader.text


def test_every_kind_of_evidence_has_a_cost_or_none_that_is_known() -> None:
    assert set(costs._A_TOKEN) == set(EVIDENCE) - {"entropies"}
