"""The command `select`: picks of given features and of a model, earlier labels, files to fill in, and mistakes."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file
from safetensors.numpy import save_file as save_numpy

from activedpo_jax import main, select
from activedpo_jax.data.encoding import make_encoding
from activedpo_jax.data.records import read_records
from activedpo_jax.data.tokenize import encoded_pool
from activedpo_jax.oracles import formats
from activedpo_jax.selection.posterior import FLOOR, TIE
from tests.test_api import CONFIG, ROWS, greedy, save_model
from tests.tiny_tokenizer import CHATML, make_tokenizer

TOKENIZER = functools.partial(make_tokenizer, CHATML, eos="<|im_end|>")
ROOT = pathlib.Path(select.__file__).parents[1]
FEATURES_CONFIG = """
from activedpo_jax.config import default

def get_config():
    config = default()
    config.data.train, config.select.budget, config.seeds = {data!r}, 5, (3,)
    return config
"""
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which\u2028day?"}]


def write_rows(path: pathlib.Path) -> pathlib.Path:
    """Records of 2, 3 and 4 responses: 3 · (1 + 3 + 6) + 1 pairs."""
    rows: list[dict[str, Any]] = []
    for i in range(3):
        for m in (2, 3, 4):
            rows.append({"id": f"r{i}{m}", "prompt": f"Question {i}?", "responses": [f"={m} {j}" for j in range(m)]})
    rows.append({"prompt": MESSAGES, "chosen": "Monday", "rejected": "Tuesday, I think"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PAIRS, DIM = 31, 10


def features(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(PAIRS, DIM)) * rng.exponential(size=(PAIRS, 1))).astype(np.float32)


@pytest.fixture
def command(tmp_path: pathlib.Path) -> list[str]:
    """A command with given features, which picks 5 of 31 pairs; it writes to `out`."""
    data = write_rows(tmp_path / "pool.jsonl")
    np.save(tmp_path / "features.npy", features())
    (tmp_path / "config.py").write_text(FEATURES_CONFIG.format(data=str(data)))
    given = f"--config.select.features={tmp_path / 'features.npy'}"
    return ["select", "--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "out"), given]


def ranked(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ranked.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def pool_of(path: pathlib.Path) -> Any:
    return encoded_pool(read_records(str(path)), make_encoding(TOKENIZER(), "chat", 64, 64), 3)


# The second λ is raised to the least at which scores are known: to TIE / FLOOR.
@pytest.mark.parametrize(("lam", "rounding"), [("1", 1e-5), ("1e-7", TIE / FLOOR)])
def test_picks_in_blocks_are_the_same(command: list[str], tmp_path: pathlib.Path, lam: str, rounding: float) -> None:
    arguments = [*command, f"--config.selection.lam={lam}", "--config.selection.block=2"]
    select.main(arguments)
    whole = ranked(tmp_path / "out")
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"pair_id": row["pair_id"], "preference": "first"}) + "\n" for row in whole)
    )
    for more in ([], [f"--config.select.labelled={tmp_path / 'answers.jsonl'}"]):
        found = []
        for in_blocks in ("false", "true"):
            folder = tmp_path / f"{in_blocks}{len(more)}"
            arguments[arguments.index("--workdir") + 1] = str(folder)
            select.main([*arguments, *more, f"--config.select.in_blocks={in_blocks}"])
            found.append(ranked(folder))
        assert len(found[0]) == 5
        for row, other in zip(*found, strict=True):
            for number in ("score", "information_gain"):
                assert row.pop(number) == pytest.approx(other.pop(number), rel=1e-5, abs=rounding)
            assert row == other


def test_blocks_are_for_strategies_that_pick_one_by_one(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        select.main([*command, "--config.select.in_blocks=true", "--config.strategies=activedpo_topk"])
    assert "with strategy activedpo_topk, which ranks all rows at once; expected one of" in capsys.readouterr().err


def test_picks_of_given_features(
    command: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select.main(command)
    rows, gain = greedy(features().astype(np.float64), 5, 1.0, np.zeros((0, DIM)), [])
    found, pool = ranked(tmp_path / "out"), pool_of(tmp_path / "pool.jsonl")
    assert [row["rank"] for row in found] == [1, 2, 3, 4, 5]
    for row, expected in zip(found, rows, strict=True):
        group, first, second = pool.pairs[expected]
        texts = pool.response_texts[group]
        assert row["pair_id"] == pool.pair_ids[expected]  # the ids, the order and the sides that a model's pool has
        assert (row["prompt"], row["first"], row["second"]) == (pool.prompt_texts[group], texts[first], texts[second])
        assert row["information_gain"] == pytest.approx(np.log1p(row["score"])) and row["strategy"] == "activedpo"
    assert sum(row["information_gain"] for row in found) == pytest.approx(gain, rel=1e-5)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith(
        f"5 of 31 pairs picked by activedpo, information gain {gain:.2f} nats"
    )
    assert str(tmp_path / "out" / "ranked.jsonl") in out


def test_pairs_without_a_tokenizer_are_those_with_one(tmp_path: pathlib.Path) -> None:
    records = read_records(str(write_rows(tmp_path / "pool.jsonl")))
    encoding = make_encoding(TOKENIZER(), "chat", 64, 64)
    for seed in range(4):
        expected = encoded_pool(records, encoding, seed)
        found = select.without_tokens(records, seed)
        assert found.pair_ids == expected.pair_ids and found.num_pairs == PAIRS
        np.testing.assert_array_equal(found.pairs, expected.pairs)
        assert (found.prompt_texts, found.response_texts) == (expected.prompt_texts, expected.response_texts)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64 npy", "alone", "one of two"])
def test_kinds_of_feature_files(kind: str, command: list[str], tmp_path: pathlib.Path) -> None:
    phi, path = features(), tmp_path / "given.safetensors"
    if kind in ("float16", "bfloat16"):
        half = jnp.asarray(phi, kind)
        save_file({"features": half}, path)
        phi = np.asarray(half, np.float32)
    elif kind == "float64 npy":
        path = tmp_path / "given.npy"
        np.save(path, np.asfortranarray(phi, np.float64))
    else:
        save_numpy({"phi": phi} if kind == "alone" else {"features": phi, "ids": np.arange(PAIRS)}, path)
    select.main([*command, f"--config.select.features={path}"])
    rows, _ = greedy(phi.astype(np.float64), 5, 1.0, np.zeros((0, DIM)), [])
    names = pool_of(tmp_path / "pool.jsonl").pair_ids
    assert [row["pair_id"] for row in ranked(tmp_path / "out")] == [names[row] for row in rows]


def label_rows(names: list[str], said: list[str]) -> str:
    return "".join(json.dumps({"pair_id": n, "preference": s}) + "\n" for n, s in zip(names, said, strict=True))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_earlier_labels_count_and_are_not_picked(kind: str, command: list[str], tmp_path: pathlib.Path) -> None:
    """A skipped pair is not picked, and adds nothing to V; a pair without an answer yet can be picked."""
    names, phi = pool_of(tmp_path / "pool.jsonl").pair_ids, features().astype(np.float64)
    first, _ = greedy(phi, 6, 0.1, phi[:0], [])
    labelled = [names[row] for row in first]
    path, known, banned = tmp_path / f"labels.{kind}", first[:4], first[:5]
    said = ["first", "second", "tie", "2", "skip", ""]
    if kind == "jsonl":
        path.write_text(label_rows(labelled, said))
    elif kind == "csv":
        cells = [f"'{n},{s},x\r\n" for n, s in zip(labelled, said, strict=True)]
        path.write_text("pair_id,preference,annotator\r\n" + "".join(cells))
    else:
        path.write_bytes(("\r\n".join(labelled) + "\n\n").encode())
        known = banned = first
    select.main([*command, f"--config.select.labelled={path}", "--config.selection.lam=0.1"])
    rows, gain = greedy(phi, 5, 0.1, phi[known], banned)
    found = ranked(tmp_path / "out")
    assert [row["pair_id"] for row in found] == [names[row] for row in rows]
    assert sum(row["information_gain"] for row in found) == pytest.approx(gain, rel=1e-4)
    # Neither without them in V, nor with the skipped one, would the picks be these.
    assert rows != greedy(phi, 5, 0.1, phi[:0], banned)[0]
    assert kind == "txt" or rows != greedy(phi, 5, 0.1, phi[banned], banned)[0]


def test_several_annotators_have_one_vote_each(command: list[str], tmp_path: pathlib.Path) -> None:
    path, names = tmp_path / "labels.jsonl", pool_of(tmp_path / "pool.jsonl").pair_ids
    votes = [("ann", "skip"), ("ann", "first"), ("bob", "skip"), ("cem", "skip")]
    answers = [{"pair_id": names[0], "preference": said, "annotator": who} for who, said in votes]
    answers += [{"pair_id": names[1], "preference": "both_bad", "annotator": who} for who, _ in votes]
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    config, *_ = select.flags.read_plain_run([*command, f"--config.select.labelled={path}"], select.STRATEGIES)
    pool = select.without_tokens(read_records(config.data.train), 3)
    assert select.read_labelled(config, pool) == {names[0]: True, names[1]: False}


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl"])
def test_files_to_fill_in(
    name: str, command: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are read back, are never written over, and are the labels of the next batch."""
    out = tmp_path / "out"
    select.main(command)
    once = capsys.readouterr().out
    found = ranked(out)
    written = {path.name for path in out.iterdir()}
    assert written >= {"pairs.csv", "pairs.jsonl", *formats.TASKS} and not any("partial" in n for n in written)
    text = (out / name).read_text(encoding="utf-8-sig")
    if name == "pairs.csv":
        text = text.replace('"","",""', '"second","",""')
    else:
        text = text.replace('"preference": ""', '"preference": "second"')
    (out / name).write_text(text, encoding="utf-8")
    labels = formats.read(out / name)
    assert [(x.pair_id, x.preference) for x in labels] == [(row["pair_id"], "second") for row in found]

    (out / "argilla.json").unlink()
    content, picked = (out / name).read_bytes(), (out / "ranked.jsonl").stat().st_mtime_ns
    select.main(command)
    assert capsys.readouterr().out == once
    assert (out / name).read_bytes() == content and (out / "ranked.jsonl").stat().st_mtime_ns == picked
    assert len(json.loads((out / "argilla.json").read_text())) == 5

    more = [*command, f"--config.select.labelled={out / name}"]
    more[more.index(str(out))] = str(tmp_path / "next")
    select.main(more)
    assert "5 of 31 pairs (5 labelled before) picked" in capsys.readouterr().out
    phi, names = features().astype(np.float64), pool_of(tmp_path / "pool.jsonl").pair_ids
    rows, _ = greedy(phi, 10, 1.0, phi[:0], [])
    assert [row["pair_id"] for row in (*found, *ranked(tmp_path / "next"))] == [names[row] for row in rows]


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        select.main(command)
    line = capsys.readouterr().err
    assert raised.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line.removeprefix("error: ").strip()


def test_a_directory_is_not_used_twice(
    command: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select.main(command)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}
    assert "select.budget (was 5, now 6)" in refused([*command, "--config.select.budget=6"], capsys)
    np.save(tmp_path / "features.npy", features(1))
    assert "began with other inputs: features: its files have changed" in refused(command, capsys)
    np.save(tmp_path / "features.npy", features())
    lines = (tmp_path / "pool.jsonl").read_text()
    (tmp_path / "pool.jsonl").write_text(lines.replace("Tuesday", "Wednesday"))
    assert "began with other inputs: pool" in refused(command, capsys)
    (tmp_path / "pool.jsonl").write_text(lines)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}

    (tmp_path / "out" / "ranked.jsonl").unlink()
    assert "argilla.json: exists without the ranked.jsonl" in refused(command, capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pairs.csv").write_text("pair_id,preference\nmine,first\n")
    command[command.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    assert "other/pairs.csv: exists without" in refused(command, capsys)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["pairs.csv"]


def array_with(value: float) -> np.ndarray:
    phi = features()
    phi[17, 2] = value
    return phi


def write_features(path: pathlib.Path, content: Any) -> None:
    if isinstance(content, dict):
        save_numpy(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.npy", features()[:30], "f.npy: 30 rows, but the pool has 31 pairs; expected a row for each pair"),
        ("f.npy", features()[0], "f.npy: got shape [10] of float32; expected [N, D]"),
        ("f.npy", np.ones((PAIRS, 2), int), "f.npy: got shape [31, 2] of int64; expected [N, D]"),
        ("f.npy", np.ones((PAIRS, 0)), "f.npy: got shape [31, 0] of float64"),
        ("f.npy", array_with(np.nan), "f.npy: row 17 (from 0) is not finite"),
        ("f.npy", array_with(np.inf), "f.npy: row 17 (from 0) is not finite"),
        ("f.npy", b"\x93NUMPY\x01", "f.npy: not an array of numbers that NumPy has saved"),
        ("f.npy", np.array([None]), "f.npy: not an array of numbers that NumPy has saved"),
        ("f.npy", b"", "f.npy: not a whole .npy file"),
        ("f.safetensors", {"a": features(), "b": features()}, "the tensors are a, b; expected one named features"),
        (
            "f.safetensors",
            {"phi": np.ones((PAIRS, 2), int)},
            "f.safetensors: tensor phi is I64; expected one of F16, BF16",
        ),
        ("f.safetensors", b"x" * 20, "f.safetensors: not a whole .safetensors file"),
        ("f.npz", b"x", "f.npz: the suffix is '.npz'; expected .npy or .safetensors"),
        ("f.npy", None, "f.npy: no such file; expected [31, D] floats"),
    ],
)
def test_features_that_are_wrong(
    name: str,
    content: Any,
    message: str,
    command: list[str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        write_features(tmp_path / name, content)
    line = refused([*command, f"--config.select.features={tmp_path / name}"], capsys)
    assert message in line and str(tmp_path / name) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.jsonl", label_rows(["r02", "r99"], ["first", "tie"]), "l.jsonl:2: there is no pair 'r99'"),
        ("l.txt", "r02\n r02\n", "l.txt:2: there is no pair ' r02' in the pool"),
        ("l.txt", "r02\n\xe9".encode("latin-1"), "l.txt: this is not UTF-8"),
        ("l.csv", "pair_id,preference\nr02,better\n", "l.csv:2: preference is 'better'"),
        ("l.md", "r02", "the suffix is '.md'; expected a file of labels (.jsonl, .csv, .tsv, .json), or of pair ids"),
        ("l.txt", None, "l.txt: no such file; expected a file of labels"),
        ("l.txt", "".join(f"r{i}4/{j}\n" for i in range(3) for j in ("0-1", "0-2", "0-3")), "at most 22: lower it"),
    ],
)
def test_labels_that_are_wrong(
    name: str,
    content: str | bytes | None,
    message: str,
    command: list[str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    given = [f"--config.select.labelled={tmp_path / name}", "--config.select.budget=23"]
    assert message in refused([*command, *given], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "--config.strategies=margin",
            "config.strategies: margin needs margins from a model, and config.select.features",
        ),
        ("--config.strategies=activedpo,random", "config.strategies: got activedpo, random; expected one"),
        ("--config.seeds=1,2", "config.seeds: got 1, 2; expected one"),
        ("--config.select.features=", "config.model.path: got ''"),
        ("--config.select.budget=0", "config.select.budget: got 0, expected a number from 1"),
        ("--config.select.budget=32", "config.select.budget: got 32, but of the 31 pairs of the pool 0 are labelled"),
        ("--config.data.train=synthetic", "config.data.train: got 'synthetic', which is not for people to label"),
        ("--config.data.train_limit=12", "features.npy: 31 rows, but the pool has"),
    ],
)
def test_options_that_are_wrong(
    given: str, message: str, command: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([*command, given], capsys)
    assert not (tmp_path / "out").exists()


def test_pair_ids_that_collide(command: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(tmp_path / "pool.jsonl", "a") as file:
        file.write(json.dumps({"id": "r03/0-1", "prompt": "Now?", "responses": ["Yes", "No"]}) + "\n")
    assert "pool.jsonl:11: the pair id 'r03/0-1' is that of a pair of " in refused(command, capsys)


def test_random_and_a_lam_that_is_too_small(
    command: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select.main([*command, "--config.strategies=random"])
    assert "5 of 31 pairs picked by random: " in capsys.readouterr().out
    assert {(row["score"], row["information_gain"], row["strategy"]) for row in ranked(tmp_path / "out")} == {
        (None, None, "random")
    }
    command[command.index(str(tmp_path / "out"))] = str(tmp_path / "small")
    select.main([*command, "--config.selection.lam=1e-9"])
    assert "config.selection.lam=1e-09 is below what float32 resolves" in capsys.readouterr().out


# --- With a model


@pytest.fixture(scope="module")
def with_model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of any command with the model and the pairs of `tests.test_api`."""
    folder = tmp_path_factory.mktemp("select")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model, data = save_model(folder / "base"), str(folder / "pairs.jsonl")
    (folder / "config.py").write_text(CONFIG.format(model=model, data=data))
    return ["--config", str(folder / "config.py"), "--config.select.budget=4", "--config.generation.max_new_tokens=8"]


@pytest.mark.parametrize("strategy", ["activedpo", "aplp"])
def test_picks_are_those_of_the_first_round_of_main(
    strategy: str, with_model: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*with_model, f"--config.strategies={strategy}"]
    select.main(["select", *flags, "--workdir", str(tmp_path / "select")])
    out = capsys.readouterr().out
    main.main(["main", *flags, "--workdir", str(tmp_path / "main")])
    lines = (tmp_path / "main" / "rounds" / "001" / "selected.jsonl").read_text().splitlines()
    expected, found = [json.loads(line) for line in lines], ranked(tmp_path / "select")
    for name in ("pair_id", "prompt", "first", "second"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    fell_back = strategy == "aplp"
    assert ("aplp: every reward margin is zero: picked at random" in out) == fell_back
    assert {row["strategy"] for row in found} == {"random" if fell_back else strategy}
    if strategy == "activedpo":
        np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in expected], rtol=1e-5)
        rounds = json.loads((tmp_path / "main" / "summary.json").read_text())["rounds"]
        gain = sum(row["information_gain"] for row in found)
        assert rounds[1]["information_gain"] == pytest.approx(gain, rel=1e-5)
    else:
        assert [row["score"] for row in found] == [row["score"] for row in expected] == [None] * 4


def test_a_model_is_not_trained_first(
    with_model: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["select", *with_model, "--workdir", str(tmp_path / "out"), "--config.sft.data=sft.jsonl"]
    assert "config.sft.data: got 'sft.jsonl', but `select` trains nothing" in refused(command, capsys)


def test_the_real_command(command: list[str], tmp_path: pathlib.Path) -> None:
    process = [sys.executable, "-m", "activedpo_jax.select", *command[1:]]
    done = subprocess.run(process, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 of 31 pairs picked by activedpo, information gain ")
    assert len(ranked(tmp_path / "out")) == 5 and (tmp_path / "out" / "pairs.csv").exists()
    done = subprocess.run(
        [*process, "--config.select.budget=40"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
