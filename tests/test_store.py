"""What outgrows memory: columns on disk, arrays end to end, records that are read on demand, work shared by hosts.

Each is held to what plain lists of everything would give.
"""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activedpo_jax import layout, tasks
from activedpo_jax.config import default
from activedpo_jax.data import digests, draws, ragged, records, sources, store, tokenize
from activedpo_jax.data.encoding import make_encoding
from activedpo_jax.data.groups import Bucket, PairPool, assign_buckets, check_tokens, pad_groups, pad_pairs
from activedpo_jax.data.groups import shared_prompts as count_shared_prompts
from activedpo_jax.data.preferences import Record, parse_record, prompt_key, uniform
from activedpo_jax.data.prompts import prompts_of, read_prompts
from activedpo_jax.data.store import ALONE, Column, Hosts
from tests.tiny_hf import tiny_llama
from tests.tiny_tokenizer import CHATML, make_tokenizer

_Result = TypeVar("_Result")

QUESTIONS = ("What colour is the sky?", "Is the grass green?", "And today?", "the sky")
USER = {"role": "user", "content": "What colour is the sky?"}


def rows_of_all_kinds(count: int) -> list[dict[str, Any]]:
    """Pairs and larger groups, labelled and not, with ids and without, with copies, ties, and texts that are cut."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        question, answers = QUESTIONS[i % 4], [f"It is {'blue ' * int(n)}{i % 7}" for n in rng.integers(1, 30, 4)]
        if i % 3 == 0:
            rows.append({"prompt": question, "chosen": answers[0] + "a", "rejected": answers[1] + "b"})
        elif i % 3 == 1:
            m = 2 + i % 2
            rows.append({"id": f"id{i}", "prompt": [USER], "responses": [f"{a}{j}" for j, a in enumerate(answers[:m])]})
            rows[-1]["rewards"] = [float(i % 2)] * m
        else:
            rows.append(
                {"prompt": question, "chosen": "yes<|im_end|>", "rejected": f"no é\u2028 {i % 5}", "tools": [{}]}
            )
    return [*rows, *({**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:30:3])]


def write(path: pathlib.Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def encoding() -> Any:
    return make_encoding(make_tokenizer(CHATML, eos="<|im_end|>"), "chat", 14, 20)


def nested(pool: PairPool) -> ragged.Nested:
    assert isinstance(pool.response_tokens, ragged.Nested)
    return pool.response_tokens


def same_pool(a: PairPool, b: PairPool) -> None:
    for name in ("pairs", "preferences", "rewards", "digests"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for x, y in ((a.prompt_tokens, b.prompt_tokens), (nested(a).arrays, nested(b).arrays)):
        assert isinstance(x, ragged.Ragged) and isinstance(y, ragged.Ragged)
        assert x.flat.tobytes() == y.flat.tobytes() and x.starts.tobytes() == y.starts.tobytes()
    assert nested(a).starts.tolist() == nested(b).starts.tolist()
    assert (a.pair_ids, a.prompt_texts, a.response_texts) == (b.pair_ids, b.prompt_texts, b.response_texts)
    assert a.notes == b.notes


# Columns


@given(st.lists(st.lists(st.integers(-100, 100), max_size=20), max_size=8), st.sampled_from([np.int8, np.int64]))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_column_is_what_was_added_to_it(monkeypatch: pytest.MonkeyPatch, parts: list[list[int]], dtype: Any) -> None:
    for in_memory in (1 << 20, 32):
        monkeypatch.setattr(store, "_IN_MEMORY", in_memory)
        column = Column(dtype)
        for part in parts:
            column.append(part)
        found = column.array()
        assert found.dtype == dtype and found.tolist() == [x for part in parts for x in part]
        assert not found.flags.writeable


def test_files_vanish_with_the_process_whatever_ends_it(tmp_path: pathlib.Path) -> None:
    script = (
        "import numpy as np, sys, time\n"
        "from activedpo_jax.data.store import Column\n"
        "column = Column(np.int64)\n"
        "column.append(np.arange(1 << 18))\n"
        "found = column.array()\n"
        "assert isinstance(found.base, np.memmap) and found[-1] == (1 << 18) - 1\n"
        "print('mapped', flush=True)\n"
        "time.sleep(60)\n"
    )
    root = pathlib.Path(store.__file__).parents[2]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "mapped\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(tempfile.SpooledTemporaryFile):  # type: ignore[type-arg]
        def write(self, *_: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        Column(np.int8).append([1])
    assert caught.value.errno == errno.ENOSPC and "TMPDIR" in caught.value.filename


# Arrays end to end

tokens = st.lists(st.integers(0, 9), max_size=5)
groups = st.lists(st.tuples(tokens.filter(len), st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=6)


def both(made: list[tuple[list[int], list[list[int]]]]) -> tuple[PairPool, PairPool]:
    """The same groups as plain lists and end to end."""
    prompts = [np.array(p, np.int32) for p, _ in made]
    responses = [[np.array(r, np.int32) for r in several] for _, several in made]
    pairs = [(g, 0, len(several) - 1) for g, several in enumerate(responses)]
    plain = PairPool(
        prompt_tokens=prompts,
        response_tokens=responses,
        pairs=np.array(pairs, np.int32),
        pair_ids=[str(i) for i in range(len(pairs))],
        preferences=np.zeros(len(pairs), np.int8),
        rewards=None,
        prompt_texts=[""] * len(pairs),
        response_texts=[[""] * len(several) for several in responses],
    )
    flat = [r for several in responses for r in several]

    def end_to_end(arrays: list[np.ndarray]) -> ragged.Ragged:
        starts = ragged.starts_of(np.array([len(a) for a in arrays], np.int32))
        return ragged.Ragged(np.concatenate([np.zeros(0, np.int32), *arrays]), starts)

    groups = ragged.Nested(end_to_end(flat), ragged.starts_of(np.array([len(several) for several in responses])))
    return plain, dataclasses.replace(plain, prompt_tokens=end_to_end(prompts), response_tokens=groups)


@given(groups)
@settings(deadline=None, max_examples=60)
def test_arrays_end_to_end_are_those_of_plain_lists(made: Any) -> None:
    plain, flat = both(made)
    assert [p.tolist() for p in flat.prompt_tokens] == [p for p, _ in made]
    assert [[r.tolist() for r in several] for several in flat.response_tokens] == [several for _, several in made]
    assert flat.prompt_tokens[-1].tolist() == made[-1][0]
    with pytest.raises(IndexError):
        flat.prompt_tokens[len(made)]
    with pytest.raises(IndexError):
        flat.response_tokens[-len(made) - 1]
    twice = [
        (ragged.Chained(p.prompt_tokens, p.prompt_tokens), ragged.Chained(p.response_tokens, p.response_tokens))
        for p in (plain, flat)
    ]
    every = np.arange(len(made))
    taken = ragged.Taken(flat.prompt_tokens, every), ragged.Taken(plain.response_tokens, every)
    for prompts, responses in ((flat.prompt_tokens, flat.response_tokens), taken, *twice):
        repeat = len(prompts) // len(made)
        assert ragged.lengths_of(prompts).tolist() == [len(p) for p, _ in made] * repeat
        assert ragged.sizes_of(responses).tolist() == [len(several) for _, several in made] * repeat
        assert ragged.longest_of(responses).tolist() == [max(map(len, several)) for _, several in made] * repeat
        assert [p.tolist() for p in prompts] == [p for p, _ in made] * repeat
    largest = max(max(itertools.chain(p, *several)) for p, several in made)
    for pool in (plain, flat):
        assert pool.responses_per_group == max(len(several) for _, several in made)
        check_tokens(pool, largest + 1, "data")
        with pytest.raises(ValueError, match=f"makes token {largest} of it"):
            check_tokens(pool, largest, "data")


@given(groups, groups)
@settings(deadline=None, max_examples=60)
def test_batches_and_buckets_are_those_of_plain_lists(made: Any, others: Any) -> None:
    plain, flat = both(made)
    buckets, rows = [Bucket(2, 3), Bucket(5, 5)], np.arange(len(made))
    assert assign_buckets(plain, buckets).tolist() == assign_buckets(flat, buckets).tolist()
    for pad in (pad_groups, pad_pairs):
        for x, y in zip(pad(plain, rows, buckets[1], 7), pad(flat, rows, buckets[1], 7), strict=True):
            np.testing.assert_array_equal(x, y)
    expected = sum(any(p == q for q, _ in others) for p, _ in made)
    for texts, other in itertools.product((plain, flat), both(others)):
        assert count_shared_prompts(texts, other) == expected


# Digests


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12))
def test_digests_stand_for_names(names: list[str]) -> None:
    found = digests.digests_of(names)
    repeats = [i for i, name in enumerate(names) if name in names[:i]]
    expected = (repeats[0], names.index(names[repeats[0]])) if repeats else None
    assert digests.first_repeat(found) == expected
    values = np.array([ord(name) for name in names], np.uint64)
    assert digests.occurrence(values).tolist() == [names[: i + 1].count(name) for i, name in enumerate(names)]
    different = sorted(set(names))[::-1]
    asked = names[::-1]
    rows = digests.rows_of(asked, digests.digests_of(different))
    assert [different[row] for row in rows] == asked
    with pytest.raises(KeyError, match="zebra"):
        digests.rows_of(["zebra"], found)


# Rows and records


@given(st.lists(st.sampled_from([b"{}", b" ", b"\n", b"\r", b"\n\n", b'{"a": 1}', b"\x0b"]), max_size=12))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_are_found(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, parts: list[bytes]) -> None:
    file, content = tmp_path / "lines.jsonl", b"".join(parts)
    file.write_bytes(content)
    monkeypatch.setattr(sources, "_SCANNED_BYTES", 3)
    starts, lines = sources._scan(file)
    expected = [(i, line) for i, line in enumerate(content.split(b"\n")) if line.strip()]
    assert lines.tolist() == [i for i, _ in expected]
    assert [content[start:].split(b"\n")[0] for start in starts] == [line for _, line in expected]


def test_records_are_read_when_they_are_asked_for(tmp_path: pathlib.Path) -> None:
    rows = rows_of_all_kinds(40)
    found = records.read_records(write(tmp_path / "data.jsonl", rows))
    located = [(f"{tmp_path / 'data.jsonl'}:{i}", row) for i, row in enumerate(rows, start=1)]
    expected = records.named_records(located)
    assert list(found) == expected and len(found) == len(rows)
    assert (found[3], found[-1], list(found[5:9])) == (expected[3], expected[-1], expected[5:9])
    assert found.ids == [r.id for r in expected] and [r.id for r in expected][-1].endswith("#2")
    assert found.location(7) == expected[7].location
    with pytest.raises(IndexError):
        found[len(rows)]
    first = {prompt_key(r.prompt): r for r in reversed(expected)}
    prompts = sorted(first.values(), key=expected.index)
    names = [hashlib.blake2b(prompt_key(r.prompt).encode(), digest_size=8).hexdigest() for r in prompts]
    for several in (prompts_of(found), read_prompts(str(tmp_path / "data.jsonl"))):
        assert [(p.prompt, p.location, p.responses) for p in several] == [(r.prompt, r.location, ()) for r in prompts]
        assert several.ids == [p.id for p in several] == names and len(names) == 4
    with open(tmp_path / "data.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: has changed while it was read"):
        list(found)


def test_a_parquet_file_is_read_in_parts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"prompt": f"p{i}", "chosen": f"x{i}", "rejected": "y", "score_chosen": None} for i in range(50)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=15)
    monkeypatch.setattr(sources, "_PARQUET_ROWS", 4)
    found = records.read_records(str(tmp_path / "data.parquet"))
    assert [r.prompt for r in found] == [f"p{i}" for i in range(50)]
    some = np.array([0, 3, 4, 14, 15, 16, 31, 49])
    assert [r.prompt for r in found.taken(some)] == [f"p{i}" for i in some]
    assert found[31].location.endswith("data.parquet row 31")


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_from_a_file_are_those_of_the_records(tmp_path: pathlib.Path, seed: int) -> None:
    found = records.read_records(write(tmp_path / "data.jsonl", rows_of_all_kinds(60)))
    every = list(found)
    train, heldout = draws.split_by_prompt(found, 0.3, seed)
    keys = sorted({prompt_key(r.prompt) for r in every}, key=lambda key: uniform(seed, "split", key))
    held = set(keys[: round(0.3 * len(keys))])
    assert list(heldout) == [r for r in every if prompt_key(r.prompt) in held]
    assert list(train) == [r for r in every if prompt_key(r.prompt) not in held]
    drawn, total, expected = draws.limit(train, 20, seed), 0, set[str]()
    for record in sorted(train, key=lambda r: uniform(seed, "limit", r.id)):
        total += record.num_pairs
        if total > 20:
            break
        expected.add(record.id)
    assert list(drawn) == [r for r in train if r.id in expected]


def test_few_records_are_in_memory_at_a_time(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = weakref.WeakSet[Record]()
    most = 0

    def watched(row: Any, location: str) -> Record:
        nonlocal most
        record = parse_record(row, location)
        alive.add(record)
        most = max(most, len(alive))
        return record

    monkeypatch.setattr(Record, "__hash__", object.__hash__)
    monkeypatch.setattr(Record, "__eq__", object.__eq__)
    monkeypatch.setattr(records, "parse_record", watched)
    monkeypatch.setattr(records, "_BATCH", 10)
    monkeypatch.setattr(tokenize, "_BATCH", 10 * tokenize._OVERHEAD)
    rows = [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(300)]
    found = records.read_records(write(tmp_path / "data.jsonl", rows))
    part, _ = draws.split_by_prompt(draws.limit(found, 200, 0), 0.2, 0)
    pool = tokenize.encoded_pool(part, encoding(), 0)
    assert pool.num_pairs == 160 and most <= 22


# Batches and hosts


def on_hosts(count: int, work: Callable[[Hosts], _Result]) -> list[_Result | Exception]:
    """What `work` returns, or raises, on each of several simulated hosts."""
    barrier, given_by = threading.Barrier(count, timeout=60), [np.zeros(0, np.uint8)] * count
    results: list[Any] = [None] * count

    def run(index: int) -> None:
        def exchange(mine: np.ndarray) -> list[np.ndarray]:
            assert mine.dtype == np.uint8 and mine.ndim == 1
            given_by[index] = mine.copy()
            barrier.wait()
            found = list(given_by)
            barrier.wait()
            return found

        try:
            results[index] = work(Hosts(index, count, exchange))
        except Exception as error:
            results[index] = error
            if not isinstance(error, ValueError):
                barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def whole_way(source: str) -> Callable[[Hosts], PairPool]:
    def work(hosts: Hosts) -> PairPool:
        found = records.read_records(source, hosts=hosts)
        drawn = draws.limit(found, 80, 1)
        return tokenize.encoded_pool(drawn, encoding(), 3, hosts)

    return work


def test_hosts_have_together_what_one_has(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "data.jsonl", rows_of_all_kinds(90))
    one = whole_way(source)(ALONE)
    kinds = ("tools", "end in", "longer than 14", "longer than 20", "a second time", "same tokens", "equal rewards")
    assert all(any(kind in note for note in one.notes) for kind in kinds), one.notes
    for count, exchanged in ((2, 1 << 26), (3, 100)):
        monkeypatch.setattr(store, "_EXCHANGED", exchanged)
        for pool in on_hosts(count, whole_way(source)):
            assert isinstance(pool, PairPool), pool
            same_pool(pool, one)
    several = on_hosts(2, lambda hosts: tokenize.encoded_texts(records.read_records(source)[:1], encoding(), hosts))
    for texts in several:  # more hosts than records
        assert not isinstance(texts, Exception)
        assert [p.tolist() for p in texts.prompt_tokens] == [one.prompt_tokens[0].tolist()]


@pytest.mark.parametrize("held_out", [True, False])
def test_hosts_load_the_same_task(tmp_path: pathlib.Path, held_out: bool) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    tiny_llama(tmp_path / "base", vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(tmp_path / "base")
    config = default()
    config.model.path, config.model.dtype = str(tmp_path / "base"), "float32"
    config.data.train = write(tmp_path / "pairs.jsonl", rows_of_all_kinds(60))
    config.data.heldout = write(tmp_path / "heldout.jsonl", rows_of_all_kinds(20)) if held_out else ""
    config.data.train_limit, config.data.heldout_limit = 30, 10
    config.candidates.source, config.data.buckets = "mixture", ((14, 20), (40, 40))
    mesh = layout.make_mesh(config.mesh)
    one, *several = on_hosts(1, lambda hosts: tasks.load(config, 3, mesh, None, hosts))
    several += on_hosts(2, lambda hosts: tasks.load(config, 3, mesh, None, hosts))
    for task in (one, *several):
        assert isinstance(task, tasks.Task), task
        assert isinstance(one, tasks.Task) and one.pool is not None and task.pool is not None
        same_pool(task.pool, one.pool)
        same_pool(task.heldout, one.heldout)
        assert one.prompts is not None and task.prompts is not None
        assert task.prompts.ids == one.prompts.ids and task.prompts.prompt_texts == one.prompts.prompt_texts
        tokens = zip(task.prompts.texts.prompt_tokens, one.prompts.texts.prompt_tokens, strict=True)
        assert all(np.array_equal(a, b) for a, b in tokens)
    assert isinstance(one, tasks.Task) and one.pool is not None and one.prompts is not None
    assert 25 < one.pool.num_pairs <= 30 and 5 < one.heldout.num_pairs <= 10 and len(one.prompts.ids) > 1


def test_batches_leave_no_trace(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "data.jsonl", rows_of_all_kinds(90))
    whole = whole_way(source)(ALONE)
    monkeypatch.setattr(records, "_BATCH", 7)
    monkeypatch.setattr(tokenize, "_BATCH", 3 * tokenize._OVERHEAD)
    monkeypatch.setattr(store, "_IN_MEMORY", 64)
    monkeypatch.setattr(ragged, "_BLOCK", 5)
    same_pool(whole_way(source)(ALONE), whole)


def test_an_error_on_one_host_is_raised_on_all(tmp_path: pathlib.Path) -> None:
    rows = rows_of_all_kinds(30)
    rows[20] = {"prompt": "p"}
    rows[28] = {"prompt": ""}
    source = write(tmp_path / "data.jsonl", rows)
    for error in on_hosts(3, whole_way(source)):
        assert isinstance(error, ValueError) and str(error).startswith(f"{source}:21: the fields are prompt;")
    repeated = write(tmp_path / "twice.jsonl", [{**row, "id": i % 25} for i, row in enumerate(rows_of_all_kinds(30))])
    for error in on_hosts(2, whole_way(repeated)):
        assert isinstance(error, ValueError) and "twice.jsonl:26: id '0' was given to" in str(error)


def test_hosts_with_other_data_are_named(tmp_path: pathlib.Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", rows_of_all_kinds(n)) for n in (3, 4)]
    for error in on_hosts(2, lambda hosts: whole_way(files[hosts.index])(hosts)):
        assert isinstance(error, ValueError)
        assert "number of records" in str(error) and "process 1 found 6, process 0 4" in str(error)


@given(st.integers(0, 50), st.integers(1, 7))
def test_shares_are_the_whole(total: int, count: int) -> None:
    shares = [Hosts(i, count, ALONE.exchange).share(total) for i in range(count)]
    assert [row for share in shares for row in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
