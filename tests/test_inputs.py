"""A run resumes on the inputs that it began with, and on no others; a work directory belongs to one process."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activedpo_jax import main
from activedpo_jax.record import folders, inputs
from activedpo_jax.rounds.checks import check_learnt, check_picks
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.training import losses
from tests.test_main import CONFIG
from tests.test_oracle_dataset import make_pool
from tests.tiny_hf import tiny_llama
from tests.tiny_tokenizer import CHATML, make_tokenizer

QUESTIONS = ["What colour is the sky?", "Is the grass green?", "Hello", "So it is blue", "And today?", "What is green?"]
ROWS = [{"prompt": q, "chosen": f"It is blue. {q}", "rejected": f"{q} Not today"} for q in QUESTIONS]


def write(path: pathlib.Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a model, data, and a run of two rounds whose second has not been saved."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    tiny_llama(folder / "base", vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(folder / "base")
    for name in ("pairs.jsonl", "heldout.jsonl"):
        write(folder / name, ROWS)
    (folder / "config.py").write_text(CONFIG.replace("config.export.merged = True", "config.round.mode = 'staged'"))
    main.main(command(folder))
    shutil.rmtree(folder / "run" / "checkpoints" / "2")
    return folder


def command(folder: pathlib.Path) -> list[str]:
    options = {"model.path": "base", "data.train": "pairs.jsonl", "data.heldout": "heldout.jsonl"}
    flags = [f"--config.{name}={folder / value}" for name, value in options.items()]
    return ["main", "--config", str(folder / "config.py"), "--workdir", str(folder / "run"), *flags]


def error_of(folder: pathlib.Path, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        main.main(command(folder))
    assert stop.value.code == code
    return capsys.readouterr().err


def relabelled(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}, *rows[1:]]


NEW = [{"prompt": f"new {i}", "chosen": "yes please", "rejected": "no thanks"} for i in range(3)]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("pairs.jsonl", lambda rows: [*NEW, *rows], "had 6 records, now 9: 3 added"),
        ("pairs.jsonl", lambda rows: [*rows, *NEW], "had 6 records, now 9: 3 added"),
        ("pairs.jsonl", lambda rows: rows[:4], "had 6 records, now 4: 2 removed"),
        ("pairs.jsonl", lambda rows: rows[::-1], "had 6 records, now 6: in another order"),
        ("pairs.jsonl", relabelled, "1 with other text, tokens or label"),
        ("heldout.jsonl", lambda rows: rows[1:], "held-out set: "),
    ],
)
def test_changed_data_is_refused_and_restored_data_goes_on(
    name: str,
    change: Callable[[list[dict[str, str]]], list[dict[str, str]]],
    said: str,
    half_done: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = {path: path.read_bytes() for path in (half_done / "run").rglob("*") if path.is_file()}
    write(half_done / name, change(ROWS))
    try:
        message = error_of(half_done, capsys)
    finally:
        write(half_done / name, ROWS)
    assert said in message and str(half_done / name) in message and "restore" in message and "Traceback" not in message
    after = {path: path.read_bytes() for path in (half_done / "run").rglob("*") if path.is_file()}
    assert after == record


def test_a_replaced_model_is_refused(half_done: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = half_done / "base" / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-4] + np.float32(0.5).tobytes())
    try:
        assert "model: its files have changed" in error_of(half_done, capsys)
    finally:
        file.write_bytes(before)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    half_done: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "all"
    shutil.copytree(half_done, place)
    shutil.copytree(half_done / "run" / "inputs", place / "run" / "inputs", dirs_exist_ok=True)
    for stored in ((place / "run" / "config.json"), *(place / "run" / "inputs").glob("*.json")):
        stored.write_text(stored.read_text().replace(str(half_done), str(place)))
    main.main(command(place))  # ends the second round
    whole = (place / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    for path in (place / "run" / "checkpoints" / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:3])
    capsys.readouterr()
    main.main(command(place))
    assert "cannot be read" in capsys.readouterr().out
    assert (place / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    (place / "run" / "summary.json").unlink()
    assert "summary.json: missing" in error_of(place, capsys)


def test_a_mistyped_path_claims_nothing(half_done: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main([*command(half_done)[:3], "--workdir", str(half_done / "other"), "--config.data.train=nowhere.jsonl"])
    assert not (half_done / "other").exists()
    file = half_done / "config.py"
    with pytest.raises(SystemExit):
        main.main([*command(half_done), "--workdir", str(file / "below")])
    assert f"{file} is a file" in capsys.readouterr().err


def test_a_second_process_is_refused(tmp_path: pathlib.Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from activedpo_jax.config import default\n"
        "from activedpo_jax.record import folders\n"
        "folders.open_workdir(pathlib.Path(sys.argv[1]), default(), 'main')\n"
        "print('mine', flush=True)\n"
        "time.sleep(60)\n"
    )
    from activedpo_jax.config import default

    root = pathlib.Path(folders.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} works here"):
            folders.open_workdir(tmp_path, default(), "main")
        holder.kill()
        holder.wait()
    folders.open_workdir(tmp_path, default(), "main")  # the lock dies with its process


def test_picks_are_checked() -> None:
    pool = make_pool([0] * 10, None)

    def check(rows: list[int], scores: list[float]) -> None:
        picks = Picks(np.array(rows), np.array(scores))  # type: ignore[arg-type]
        check_picks(picks, pool, pool.digests[[4]], 3)

    check([1, 2], [0.5, 0.0])
    for rows in ([-1, 1], [1, 10], [2, 2], [1, 4]):
        with pytest.raises(FloatingPointError, match="round 3"):
            check(rows, [1.0, 1.0])
    with pytest.raises(FloatingPointError, match="labelled already: pair4"):
        check([1, 4], [1.0, 1.0])
    with pytest.raises(ValueError, match="round 3: 1 pairs can be asked about, and the round is to label 2"):
        check([1, -1], [1.0, 0.0])
    with pytest.raises(FloatingPointError, match="round 3"):
        check([1, 2], [1.0, np.nan])


def test_what_was_learnt_is_checked() -> None:
    def training(loss: float) -> losses.DpoMetrics:
        return losses.DpoMetrics(jnp.float32(loss), jnp.float32(0), jnp.float32(0))

    check_learnt(training(0.5), {"a": np.ones(3)}, 1)
    check_learnt(None, {"a": np.ones(3)}, 1)
    for loss, weight in ((np.nan, 1.0), (0.5, np.inf)):
        with pytest.raises(FloatingPointError, match="round 1: training has diverged"):
            check_learnt(training(loss), {"a": np.array([0.0, weight])}, 1)


def test_a_run_that_diverges_records_nothing(half_done: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = half_done / "diverged"
    for mode in ("staged", "fused"):
        with pytest.raises(SystemExit) as stop:
            main.main(
                [*command(half_done), "--workdir", str(place / mode), "--config.dpo.learning_rate=1e38"]
                + [f"--config.round.mode={mode}"]
            )
        assert stop.value.code == 1
        message = capsys.readouterr().err
        assert "lower config.dpo.learning_rate" in message and "Traceback" not in message
        asked = [json.loads(line) for line in (place / mode / "rounds/001/asked.jsonl").read_text().splitlines()[1:]]
        step = re.search(r"training, round 1, step (\d+) of \d+: the loss is (nan|inf)", message)
        named = re.search(r"Its pairs: ([^;]*); the last good checkpoint: .*/checkpoints/0\n", message)
        assert step and named, message
        assert set(named[1].split(", ")) - {"..."} <= {row["pair_id"] for row in asked}
        assert not (place / mode / "checkpoints" / "1").exists()


def described(records: Mapping[str, int]) -> inputs.Inputs:
    contents = b"".join(content.to_bytes(8, "little") for content in records.values())
    return inputs.describe_records(list(records), contents, "pairs.jsonl")


@given(*[st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 2), max_size=6)] * 2)
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_has_changed_is_counted(tmp_path: pathlib.Path, before: dict[str, int], now: dict[str, int]) -> None:
    file = tmp_path / "run" / "inputs" / "pool.json"
    file.unlink(missing_ok=True)
    inputs.hold(file, {"pool": described(before)})
    if list(before.items()) == list(now.items()):
        inputs.check(file, {"pool": described(now)})
        return
    shared = [name for name in before if name in now]
    words = {
        "added": len(now.keys() - before.keys()),
        "removed": len(before.keys() - now.keys()),
        "with other text, tokens or label": sum(before[name] != now[name] for name in shared),
    }
    expected = [f"{count} {word}" for word, count in words.items() if count]
    expected += ["in another order"] * (shared != [name for name in now if name in before])
    with pytest.raises(ValueError) as caught:
        inputs.check(file, {"pool": described(now)})
    said = f"pool: pairs.jsonl had {len(before)} records, now {len(now)}: {', '.join(expected)}; to resume it"
    assert said in str(caught.value)


def test_a_pool_is_described_in_few_bytes_and_by_all_that_matters() -> None:
    pool = make_pool([0] * 500, [[1.0, 2.0]] * 500)
    whole = inputs.describe_pool(pool, "pairs.jsonl")
    assert len(json.dumps(whole)) < 500 * 22 + 200
    tokens = [[np.array([2], np.int32), np.array([9], np.int32)], *pool.response_tokens[1:]]
    changes: list[dict[str, Any]] = [
        {"preferences": np.array([1, *[0] * 499], np.int8)},
        {"rewards": np.array([[1.0, 3.0], *[[1.0, 2.0]] * 499], np.float32)},
        {"pairs": np.concatenate([pool.pairs[:1, [0, 2, 1]], pool.pairs[1:]])},
        {"response_tokens": tokens},
        {"prompt_tokens": [np.array([1, 1], np.int32), *pool.prompt_tokens[1:]]},
        {"pair_ids": ["other", *pool.pair_ids[1:]]},
    ]
    for change in changes:
        assert inputs.describe_pool(dataclasses.replace(pool, **change), "pairs.jsonl") != whole, change.keys()
    assert inputs.describe_pool(dataclasses.replace(pool), "pairs.jsonl") == whole


def test_a_record_of_another_version_is_refused_in_words(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "run" / "inputs" / "pool.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"pool": {"source": "pairs.jsonl", "ids": ["a"], "digests": ["0"]}}))
    with pytest.raises(ValueError, match="pool: what it began with was recorded by another version.*another --workdir"):
        inputs.check(file, {"pool": described({"a": 1})})
