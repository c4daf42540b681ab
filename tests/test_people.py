"""People label through files: parts, second thoughts and several annotators; and no answer is lost or asked for twice,
whatever kills the process."""

import csv
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import pytest

from activedpo_jax.oracles.labels import Label, Pending, Preference, Question
from activedpo_jax.oracles.noise import Noise
from activedpo_jax.oracles.people import PeopleOracle
from activedpo_jax.record.labels import RoundRecord, Verdict, verdict
from activedpo_jax.rounds.picked import Picked
from tests import test_resume


def question(name: str) -> Question:
    return Question(name, "why?", "because", "dunno", 1.5, 1, [1, 2], [3, 4], [5, 4], [1, 2, 3, 4])


@pytest.fixture
def picked() -> Picked:
    return Picked([question(name) for name in ("a", "b/1", "c")], [1.5, 1.25, 0.1], 0.5, False)


def answer(folder: pathlib.Path, name: str, *rows: dict[str, Any]) -> None:
    place = folder / "rounds" / "001" / "label"
    (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(pair: str, preference: str, annotator: str = "") -> dict[str, Any]:
    return {"pair_id": pair, "preference": preference, "annotator": annotator}


def complete(found: dict[str, Verdict] | Pending) -> dict[str, Preference]:
    assert not isinstance(found, Pending), found
    return {pair: v.label.preference for pair, v in found.items()}


def test_what_was_asked_comes_back(tmp_path: pathlib.Path, picked: Picked) -> None:
    record = RoundRecord(tmp_path, 1)
    assert record.picked() is None
    record.ask(picked)
    assert RoundRecord(tmp_path, 1).picked() == picked


def test_answers_in_parts(tmp_path: pathlib.Path, picked: Picked) -> None:
    record, oracle = RoundRecord(tmp_path, 1), PeopleOracle(tmp_path, 1)
    first = record.collect(oracle, picked)
    assert isinstance(first, Pending) and "0 of 3 pairs are labelled" in first.message and "pairs.csv" in first.message
    label = tmp_path / "rounds" / "001" / "label"
    assert {"pairs.csv", "pairs.jsonl", "label_studio.json", "argilla.json"} <= {p.name for p in label.iterdir()}
    answer(tmp_path, "mine.jsonl", row("c", "both_bad"), row("a", "first"), row("a", "first"))
    before = (label / "pairs.csv").read_bytes()
    second = record.collect(oracle, picked)
    assert isinstance(second, Pending) and "2 of 3" in second.message
    assert (label / "pairs.csv").read_bytes() == before
    (label / "mine.jsonl").unlink()  # what was received is on record
    answer(tmp_path, "more.jsonl", row("b/1", "skip"))
    assert complete(record.collect(oracle, picked)) == {"a": "first", "b/1": "skip", "c": "both_bad"}
    assert len(record.answers()) == 3 and all(label.time for label in record.answers())
    (label / "more.jsonl").unlink()
    assert complete(record.collect(oracle, picked))["b/1"] == "skip"


def test_the_csv_is_filled_in_where_it_lies(tmp_path: pathlib.Path, picked: Picked) -> None:
    record, oracle = RoundRecord(tmp_path, 1), PeopleOracle(tmp_path, 1)
    record.collect(oracle, picked)
    path = tmp_path / "rounds" / "001" / "label" / "pairs.csv"
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for some, preference in zip(rows, ("tie", "2", "A"), strict=True):
        some["preference"] = preference
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert complete(record.collect(oracle, picked)) == {"a": "tie", "b/1": "second", "c": "first"}


def test_second_thoughts_count_and_are_said(
    tmp_path: pathlib.Path, picked: Picked, capsys: pytest.CaptureFixture[str]
) -> None:
    record, oracle = RoundRecord(tmp_path, 1), PeopleOracle(tmp_path, 1)
    record.collect(oracle, picked)
    answer(tmp_path, "one.jsonl", row("a", "first"))
    record.collect(oracle, picked)
    answer(tmp_path, "one.jsonl", row("a", "second"), row("b/1", "tie"), row("c", "first"))
    assert complete(record.collect(oracle, picked))["a"] == "second"
    assert "1 answers were changed by the same annotator" in capsys.readouterr().out
    assert [(x.pair_id, x.preference) for x in record.answers()][:2] == [("a", "first"), ("a", "second")]  # both kept


def test_noise_on_what_people_say(tmp_path: pathlib.Path, picked: Picked) -> None:
    record, oracle = RoundRecord(tmp_path, 1), PeopleOracle(tmp_path, 1, Noise("flip", 1.0))
    record.ask(picked)
    record.collect(oracle, picked)
    answer(tmp_path, "one.jsonl", row("a", "first"), row("b/1", "tie"), row("c", "second"))
    for _ in range(2):
        assert complete(record.collect(oracle, picked)) == {"a": "second", "b/1": "tie", "c": "first"}
    assert record.late_answers(oracle) == 0 and len(record.answers()) == 3


def test_of_two_files_that_disagree_the_newer_counts(
    tmp_path: pathlib.Path, picked: Picked, capsys: pytest.CaptureFixture[str]
) -> None:
    record, oracle = RoundRecord(tmp_path, 1), PeopleOracle(tmp_path, 1)
    record.collect(oracle, picked)
    answer(tmp_path, "z.jsonl", row("a", "first"))
    answer(tmp_path, "a.jsonl", row("a", "second"))
    os.utime(tmp_path / "rounds" / "001" / "label" / "z.jsonl", (1, 1))
    for times in (1, 0, 0):
        record.collect(oracle, picked)
        assert capsys.readouterr().out.count("1 answers were changed") == times
    assert [x.preference for x in record.answers()] == ["second"]


def test_second_thoughts_count_until_the_round_is_learnt(tmp_path: pathlib.Path, picked: Picked) -> None:
    record, oracle = RoundRecord(tmp_path, 1), PeopleOracle(tmp_path, 1)
    record.ask(picked)
    record.collect(oracle, picked)
    answer(tmp_path, "one.jsonl", row("a", "first"), row("b/1", "tie"), row("c", "first"))
    assert complete(record.collect(oracle, picked))["a"] == "first"
    answer(tmp_path, "one.jsonl", row("a", "second"), row("b/1", "tie"), row("c", "first"))
    assert complete(record.collect(oracle, picked))["a"] == "second"
    assert record.late_answers(oracle) == 0
    answer(tmp_path, "one.jsonl", row("a", "skip"), row("b/1", "tie"), row("c", "first"), row("c", "tie", "bob"))
    assert record.late_answers(oracle) == 2
    assert [x.preference for x in record.answers() if x.pair_id == "a"] == ["first", "second"]  # nothing was added


def test_several_annotators(tmp_path: pathlib.Path, picked: Picked) -> None:
    record, oracle = RoundRecord(tmp_path, 1), PeopleOracle(tmp_path, 2)
    record.collect(oracle, picked)
    answer(tmp_path, "ann.jsonl", *(row(pair, "first", "ann") for pair in ("a", "b/1", "c")))
    half = record.collect(oracle, picked)
    assert isinstance(half, Pending) and "0 of 3" in half.message
    answer(tmp_path, "bob.jsonl", row("a", "first", "bob"), row("b/1", "second", "bob"), row("c", "skip", "bob"))
    found = record.collect(oracle, picked)
    assert complete(found) == {"a": "first", "b/1": "tie", "c": "first"}
    assert not isinstance(found, Pending)
    assert [found[pair].agreeing for pair in ("a", "b/1")] == [1.0, 0.0] and found["a"].label.annotator == "ann, bob"


@pytest.mark.parametrize(
    ("said", "outcome", "weight"),
    [
        (["first", "second", "first"], "first", 1.0),
        (["first", "second"], "tie", 1.0),
        (["first", "tie"], "tie", 1.0),
        (["first", "both_bad"], "both_bad", 1.0),
        (["skip", "second"], "second", 1.0),
        (["skip", "skip"], "skip", 1.0),
        (["both_bad", "both_bad", "first"], "both_bad", 1.0),
    ],
)
def test_majority(said: Sequence[Preference], outcome: str, weight: float) -> None:
    labels = [Label("a", preference, "x", f"person{i}") for i, preference in enumerate(said)]
    assert verdict(labels).label.preference == outcome
    assert verdict(labels[::-1]).label == verdict(labels).label


def test_weights_are_those_of_the_majority() -> None:
    labels = [
        Label("a", "first", "x", "1", 0.5),
        Label("a", "first", "x", "2", 1.0),
        Label("a", "second", "x", "3", 9.0),
    ]
    assert verdict(labels).label.weight == 0.75


def test_answers_on_unknown_pairs_are_refused(tmp_path: pathlib.Path, picked: Picked) -> None:
    record, oracle = RoundRecord(tmp_path, 1), PeopleOracle(tmp_path, 1)
    record.collect(oracle, picked)
    answer(tmp_path, "one.jsonl", row("a", "first"), row("d", "first"))
    with pytest.raises(ValueError, match=r"one\.jsonl:2: there is no pair 'd'"):
        record.collect(oracle, picked)
    assert record.answers() == []  # all of a file or nothing


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_cut_short_by_a_crash_comes_again(tmp_path: pathlib.Path, picked: Picked, cut: int) -> None:
    record = RoundRecord(tmp_path, 1)
    record.add([Label("a", "first", "x"), Label("c", "tie", "x")])
    path = tmp_path / "rounds" / "001" / "labels.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [label.pair_id for label in record.answers()] == ["a"]
    record.add([Label("c", "tie", "x")])
    assert [(label.pair_id, label.preference) for label in record.answers()] == [("a", "first"), ("c", "tie")]


def test_a_damaged_record_is_refused_by_line(tmp_path: pathlib.Path, picked: Picked) -> None:
    record = RoundRecord(tmp_path, 1)
    record.ask(picked)
    path = tmp_path / "rounds" / "001" / "asked.jsonl"
    for damaged, message in (("nonsense\n", r"asked\.jsonl:1: not JSON"), ("[]\n", r"asked\.jsonl:1: got a list")):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            record.picked()
    (path.parent / "labels.jsonl").write_text('{"pair_id": "a", "preference": "nice", "source": "x"}\n')
    with pytest.raises(ValueError, match=r"labels\.jsonl:1: got 'nice'"):
        record.answers()


# Real processes, really killed

PEOPLE = {"oracle.kind": "people", "rounds": "2", "dpo.epochs": "2", "synthetic.heldout_pairs": "8"}


def opinion(pair_id: str) -> str:
    """What everybody thinks of a pair."""
    return ("first", "second", "tie", "skip")[hashlib.sha256(pair_id.encode()).digest()[0] % 4]


def open_pairs(folder: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """The folder of the latest round that was asked about, and its pairs."""
    asked = sorted(folder.glob("rounds/*/label/pairs.jsonl"))
    if not asked:
        return folder, []
    rows = [json.loads(line) for line in asked[-1].read_text(encoding="utf-8").splitlines()]
    return asked[-1].parent, [r["pair_id"] for r in rows]


def start(folder: pathlib.Path) -> "subprocess.Popen[str]":
    before = dict(test_resume.OPTIONS)
    test_resume.OPTIONS.update(PEOPLE)
    try:
        return test_resume.start(folder, "staged")
    finally:
        test_resume.OPTIONS.clear()
        test_resume.OPTIONS.update(before)


def label_all(folder: pathlib.Path, name: str) -> None:
    place, pairs = open_pairs(folder)
    if pairs:
        (place / name).write_text("".join(json.dumps(row(pair, opinion(pair))) + "\n" for pair in pairs))


@pytest.mark.slow
def test_twenty_kills_lose_and_double_nothing(tmp_path: pathlib.Path) -> None:
    """SIGKILL at random moments, answers arriving in between in random order and twice."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    spent = []
    for _ in range(3):  # until both rounds are labelled
        clock = time.monotonic()
        output = test_resume.finish(start(whole))
        spent.append(time.monotonic() - clock)
        label_all(whole, "all.jsonl")
    assert "pairs are labelled" not in output.splitlines()[-1] and (whole / "adapter").exists()

    rng, answered = random.Random(0), set[str]()
    kills, lasted = 0, min(spent)
    for attempt in range(100):
        process, clock = start(killed), time.monotonic()
        try:
            process.wait(timeout=rng.uniform(0.0, lasted) if kills < 20 else 300)
            lasted = time.monotonic() - clock
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        output, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), output
        if (killed / "adapter").exists() and process.returncode == 0:
            break
        # As many answers as kills, so that the last round still waits for some when the last kill comes.
        place, pairs = open_pairs(killed)
        unanswered = [pair for pair in pairs if pair not in answered]
        count = 12 if kills >= 20 else 12 * kills // 20 - len(answered)
        some = rng.sample(unanswered, max(0, min(len(unanswered), count)))
        answered.update(some)
        if some:
            lines = [json.dumps(row(pair, opinion(pair))) + "\n" for pair in [*some, *rng.sample(some, len(some))]]
            partial = place / f"part{attempt}.partial"  # as programs save: whole or not at all
            partial.write_text("".join(lines))
            os.replace(partial, place / f"part{attempt}.jsonl")
    assert kills >= 20

    for number in ("001", "002"):
        lines = (killed / "rounds" / number / "labels.jsonl").read_text().splitlines()
        names = [json.loads(line)["pair_id"] for line in lines]
        selected = [
            json.loads(line) for line in (killed / "rounds" / number / "selected.jsonl").read_text().splitlines()
        ]
        assert sorted(names) == sorted(r["pair_id"] for r in selected) and len(set(names)) == 6  # every label once
        assert [r["preference"] for r in selected] == [opinion(r["pair_id"]) for r in selected]
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
