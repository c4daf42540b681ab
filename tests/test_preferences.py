"""Every format of preference data gives the same records, and what is wrong with a record is said with its place."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from activedpo_jax.data.draws import limit, split_by_prompt
from activedpo_jax.data.preferences import Record, uniform
from activedpo_jax.data.records import read_records

USER = {"role": "user", "content": "What colour is the sky?"}
SYSTEM = {"role": "system", "content": "Be brief."}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}


def write(path: pathlib.Path, *rows: Any) -> str:
    file = path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def make(name: str, prompt: str = "q", m: int = 2) -> Record:
    return Record(name, prompt, tuple(f"r{i}" for i in range(m)), None, None, "somewhere")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Sky?", "chosen": "It is blue.", "rejected": "It is green."}, "Sky?"),
        ({"prompt": "Sky?", "chosen": [BLUE], "rejected": [GREEN]}, "Sky?"),
        ({"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [GREEN]}, [SYSTEM, USER]),
        ({"prompt": [USER], "chosen": "It is blue.", "rejected": "It is green."}, [USER]),
        ({"chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]}, [SYSTEM, USER]),
        # A string beside whole conversations repeats a part of them.
        ({"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER]),
        ({"prompt": "Sky?", "responses": ["It is blue.", "It is green."]}, "Sky?"),
        ({"prompt": [USER], "responses": [[BLUE], [GREEN]]}, [USER]),
    ],
)
def test_formats(tmp_path: pathlib.Path, row: dict[str, Any], prompt: Any) -> None:
    (record,) = read_records(write(tmp_path, row))
    assert record.prompt == prompt
    assert set(record.responses) == {"It is blue.", "It is green."}
    if "chosen" in row:
        assert record.preferred is not None and record.responses[record.preferred] == "It is blue."
    else:
        assert record.preferred is None and record.responses == ("It is blue.", "It is green.")


def test_position_does_not_tell_which_was_chosen(tmp_path: pathlib.Path) -> None:
    a, b = read_records(
        write(
            tmp_path,
            {"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": 2, "score_rejected": 1},
            {"prompt": "q", "chosen": "y", "rejected": "x", "score_chosen": 2, "score_rejected": 1},
        )
    )
    assert a.responses == b.responses
    assert (a.preferred, b.preferred) == (0, 1)
    assert (a.rewards, b.rewards) == ((2.0, 1.0), (1.0, 2.0))


def test_rewards_and_ids(tmp_path: pathlib.Path) -> None:
    row = {"id": 7, "prompt": "p", "responses": ["c", "a", "b"], "rewards": [1, -0.5, 0]}
    (record,) = read_records(write(tmp_path, row))
    assert record.id == "7" and record.responses == ("c", "a", "b") and record.rewards == (1.0, -0.5, 0.0)
    assert record.num_pairs == 3


def test_implicit_prompts_are_those_of_trl(tmp_path: pathlib.Path) -> None:
    trl = pytest.importorskip("trl.data_utils")
    texts = st.text("ab .:\n", max_size=6)

    @given(texts, texts, texts)
    @settings(deadline=None, max_examples=100)
    def check(prompt: str, chosen: str, rejected: str) -> None:
        chosen, rejected = prompt + chosen, prompt + rejected
        # TRL cuts off somewhere where one text begins the other, and takes the last character for the one before
        # the first; here both are errors.
        assume(not chosen.startswith(rejected) and not rejected.startswith(chosen) and chosen[0] == rejected[0])
        expected = trl.maybe_extract_prompt({"chosen": chosen, "rejected": rejected})
        assume(all(expected[name].strip() for name in ("prompt", "chosen", "rejected")))
        assume(expected["chosen"].strip() != expected["rejected"].strip())
        (record,) = read_records(write(tmp_path, {"chosen": chosen, "rejected": rejected}))
        assert record.prompt == expected["prompt"]
        assert record.preferred is not None and record.responses[record.preferred] == expected["chosen"]
        assert record.responses[1 - record.preferred] == expected["rejected"]

    check()


GOOD = {"prompt": "p", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "the line is a list; expected a JSON object"),
        ({"prompt": "p"}, "the fields are prompt; expected `chosen` and `rejected`, or `responses`"),
        ({}, "the fields are none; expected"),
        ({**GOOD, "responses": ["a", "b"]}, "and not both"),
        (
            {"prompt": "p", "chosen": "x"},
            "the fields are chosen, prompt; expected `rejected` among them: add `rejected`",
        ),
        ({"prompt": "p", "chosen": "x", "rejected": None}, "add `rejected`"),
        ({"responses": ["a", "b"]}, "add `prompt`"),
        ({**GOOD, "prompt": " \n"}, "the prompt is empty"),
        ({**GOOD, "prompt": []}, "prompt is an empty list; expected a string, or a list of chat messages"),
        ({**GOOD, "prompt": 3}, "prompt is a number; expected a string"),
        ({**GOOD, "prompt": [{"role": "user"}]}, r"prompt has the message \{'role': 'user'\}"),
        ({**GOOD, "prompt": [{"role": "user", "content": ""}]}, "the prompt is empty"),
        ({**GOOD, "prompt": [USER, BLUE]}, "the prompt ends in a message of the assistant"),
        ({**GOOD, "chosen": ""}, "chosen is an empty response"),
        ({**GOOD, "chosen": 5}, "chosen is a number and rejected a string"),
        ({**GOOD, "chosen": [BLUE]}, "chosen is a list and rejected a string"),
        ({**GOOD, "rejected": "x "}, "chosen and rejected are identical"),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [BLUE]}, "chosen and rejected are identical"),
        ({"chosen": [USER, BLUE], "rejected": [USER, BLUE]}, "chosen and rejected are identical"),
        (
            {"chosen": [USER, BLUE], "rejected": [USER, BLUE, USER, GREEN]},
            "is the beginning of the other.*add `prompt`",
        ),
        ({"chosen": "ab", "rejected": "cd"}, "chosen and rejected begin differently.*add `prompt`"),
        ({"chosen": [USER, BLUE], "rejected": [USER, GREEN, USER, GREEN]}, "rejected after the prompt has messages of"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BLUE]}, "chosen after the prompt has messages of"),
        ({"prompt": "p", "responses": ["a"]}, "responses is a list of 1; expected a list of two responses or more"),
        ({"prompt": "p", "responses": "ab"}, "responses is a string; expected a list"),
        ({"prompt": "p", "responses": ["a", "b", "a"]}, r"responses\[0\] and responses\[2\] are identical"),
        ({"prompt": "p", "responses": ["a", "b"], "rewards": [1]}, "rewards is a list of 1; expected a list of 2"),
        ({"prompt": "p", "responses": ["a", "b"], "rewards": [1, True]}, r"rewards\[1\] is True; expected a finite"),
        (
            {"prompt": "p", "responses": ["a", "b"], "rewards": [1, float("nan")]},
            r"rewards\[1\] is nan; expected a fin",
        ),
        ({**GOOD, "score_chosen": 1e39, "score_rejected": 0}, "score_chosen is 1e[+]39; expected a finite number"),
        ({**GOOD, "score_chosen": 1}, "add `score_rejected`"),
        ({**GOOD, "id": ""}, "id is an empty string; expected a non-empty string or an integer"),
        ({**GOOD, "id": "a"}, r"id 'a' was given to .*data\.jsonl:1 already; expected every id once"),
    ],
)
def test_errors_say_where_and_what(tmp_path: pathlib.Path, row: Any, message: str) -> None:
    source = write(tmp_path, {**GOOD, "id": "a"}, GOOD, row)
    with pytest.raises(ValueError, match=rf"data\.jsonl:3: .*{message}"):
        read_records(source)


def test_lines_that_are_no_json(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "data.jsonl"
    # A line separator of Unicode inside a string does not end the line, blank lines count, and a BOM is no content.
    good = json.dumps({**GOOD, "prompt": "a\u2028b"}, ensure_ascii=False).encode()
    file.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + good[:-1])
    with pytest.raises(ValueError, match=r"data\.jsonl:3: this is not JSON .*column .* expected one JSON object"):
        read_records(str(file))
    file.write_bytes(good + b'\n{"prompt": "\xff"}')
    with pytest.raises(ValueError, match=r"data\.jsonl:2: this is not UTF-8"):
        read_records(str(file))
    file.write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: there is no record in it"):
        read_records(str(file))


def test_sources_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no data set is named.*config.data.train"):
        read_records("")
    with pytest.raises(ValueError, match="absent.jsonl: no such file"):
        read_records(str(tmp_path / "absent.jsonl"))
    (tmp_path / "data.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(ValueError, match=r"data\.csv: expected a \.jsonl or \.parquet file"):
        read_records(str(tmp_path / "data.csv"))
    (tmp_path / "data.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"data\.parquet: expected a Parquet file"):
        read_records(str(tmp_path / "data.parquet"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="`datasets` cannot load split 'train'.*train_split"):
        read_records(str(tmp_path / "folder"))


def test_all_sources_give_the_same_records(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN], "score_chosen": 1.5, "score_rejected": -1.0},
        {"prompt": [SYSTEM, {**USER, "name": "Ann"}], "chosen": [GREEN], "rejected": [BLUE]},
    ]
    (tmp_path / "folder").mkdir()
    expected = read_records(write(tmp_path / "folder", *rows))
    data = datasets.Dataset.from_list(rows)  # has null scores in the second row, null names in other messages
    data.to_parquet(str(tmp_path / "data.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "other": data.select([1])}).save_to_disk(str(tmp_path / "splits"))

    def content(records: Sequence[Record]) -> list[Any]:
        return [(r.id, r.prompt, r.responses, r.preferred, r.rewards) for r in records]

    for name in ("data.parquet", "saved", "splits", "folder"):
        assert content(read_records(str(tmp_path / name))) == content(expected), name
    assert content(read_records(str(tmp_path / "splits"), "other")) == content(expected[1:])
    assert read_records(str(tmp_path / "data.parquet"))[1].location.endswith("data.parquet row 1")
    with pytest.raises(ValueError, match="cannot load split 'third'"):
        read_records(str(tmp_path / "splits"), "third")


def test_ids_are_of_the_content_without_the_label(tmp_path: pathlib.Path) -> None:
    swapped, other = {**GOOD, "chosen": "y", "rejected": "x"}, {**GOOD, "rejected": "z"}
    unlabelled = {"prompt": "p", "responses": ["y", "x"]}
    records = read_records(write(tmp_path, GOOD, other, GOOD, swapped, unlabelled))
    a, b = records[0].id, records[1].id
    assert a != b and "#" not in a
    assert [r.id for r in records] == [a, b, f"{a}#2", f"{a}#3", f"{a}#4"]
    # Work directories know their pairs by these names: printf '["p", ["x", "y"]]' | b2sum -l 64
    assert a == "3db124d321fa7ca3"


names = st.lists(st.text("abcdef ", min_size=1, max_size=2), min_size=2, max_size=20)


@given(names, st.floats(0, 1), st.integers(0, 3), st.randoms())
@settings(deadline=None, max_examples=100)
def test_no_prompt_is_on_both_sides(prompts: list[str], fraction: float, seed: int, random: Any) -> None:
    records = [make(str(i), prompt) for i, prompt in enumerate(prompts)]
    different = {p.strip() for p in prompts}
    assume(len(different) > 1)
    train, heldout = split_by_prompt(records, fraction, seed)
    held = {str(r.prompt).strip() for r in heldout}
    assert not held & {str(r.prompt).strip() for r in train}
    assert abs(len(held) - fraction * len(different)) <= 1 and 0 < len(held) < len(different)
    for side in (train, heldout):
        assert side == [r for r in records if r in side]
    assert len(train) + len(heldout) == len(records)
    # Which prompts are held out does not depend on the order of the records, nor on how many there are of each.
    shuffled = records + records[:1]
    random.shuffle(shuffled)
    assert {str(r.prompt).strip() for r in split_by_prompt(shuffled, fraction, seed)[1]} == held


def test_a_prompt_is_the_same_as_a_string_and_as_a_message() -> None:
    records = [make("a", "q"), Record("b", [{"role": "user", "content": "q "}], ("x", "y"), 0, None, "somewhere")]
    with pytest.raises(ValueError, match="cannot hold out prompts: all 2 records have the same one"):
        split_by_prompt(records, 0.5, 0)


@given(st.lists(st.integers(2, 4), min_size=1, max_size=12), st.integers(6, 40), st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_limit(sizes: list[int], num_pairs: int, seed: int) -> None:
    records = [make(str(i), m=m) for i, m in enumerate(sizes)]
    drawn = limit(records, num_pairs, seed)
    total = sum(r.num_pairs for r in drawn)
    assert total <= num_pairs and (len(drawn) == len(records) or total > num_pairs - 6)
    assert drawn == [r for r in records if r in drawn]
    assert all(r in limit(records, num_pairs + 5, seed) for r in drawn)
    assert {r.id for r in limit(records[::-1], num_pairs, seed)} == {r.id for r in drawn}


def test_limit_draws_by_seed_and_leaves_something() -> None:
    records = [make(str(i)) for i in range(20)]
    assert limit(records, 5, 0) != limit(records, 5, 1)
    with pytest.raises(ValueError, match="a limit of 2 pairs leaves nothing: somewhere alone has 3"):
        limit([make("a", m=3)], 2, 0)


def test_draws_are_uniform_and_independent() -> None:
    draws = [[uniform(seed, purpose, str(i)) for i in range(2000)] for seed in (0, 1) for purpose in ("a", "b")]
    for draw in draws:
        # Kolmogorov–Smirnov distance; 1.95/√n is exceeded once in a thousand draws that are uniform.
        assert max(abs(x - (i + 0.5) / 2000) for i, x in enumerate(sorted(draw))) < 1.95 / 2000**0.5
    for other in draws[1:]:
        agree = sum((x < 0.5) == (y < 0.5) for x, y in zip(draws[0], other, strict=True)) / 2000
        assert abs(agree - 0.5) < 0.04
    assert uniform(0, "ab", "c") != uniform(0, "a", "bc")
