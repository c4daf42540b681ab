"""Work directories in an object store: what a local one holds, a lock for one process, and a store that fails."""

import asyncio
import errno
import json
import os
import pathlib
import pickle
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activedpo_jax import config, errors, files, remote
from activedpo_jax.errors import StoreError
from activedpo_jax.huggingface import adapters, hub, merged
from activedpo_jax.models.config import LoraConfig
from activedpo_jax.oracles.people import PeopleOracle
from activedpo_jax.record import copied_checkpoints, folders, metrics
from activedpo_jax.record.checkpoints import Checkpoints
from activedpo_jax.record.labels import RoundRecord
from activedpo_jax.record.saved_work import SavedWork
from activedpo_jax.remote import RemotePath
from activedpo_jax.rounds.picked import Picked
from tests import test_people, test_resume, test_sft
from tests.object_server import ObjectServer
from tests.s3_server import S3Server
from tests.test_export import random_adapter
from tests.test_metrics import events, timeless, write_rounds
from tests.tiny_hf import load_decoder, tiny_llama
from tests.tiny_tokenizer import make_tokenizer

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when gcsfs is imported; see `ObjectServer`
gcsfs, s3fs = pytest.importorskip("gcsfs"), pytest.importorskip("s3fs")


@pytest.fixture(params=[ObjectServer, S3Server], ids=["gs", "s3"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with request.param() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

        def forget() -> None:
            remote._file_system.cache_clear()
            gcsfs.GCSFileSystem.clear_instance_cache()
            s3fs.S3FileSystem.clear_instance_cache()

        forget()
        fsspec.config.set_conf_env(fsspec.config.conf)
        yield server
        server.failing = None
        remote.release_locks()
        forget()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients try as often as ever, without waiting."""

    async def sleep(*_: Any) -> None:
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr("aiobotocore.endpoint.AioEndpoint._sleep", sleep)
    monkeypatch.setattr("s3fs.core.asyncio", SimpleNamespace(**(vars(asyncio) | {"sleep": sleep})))


def test_paths() -> None:
    root = RemotePath("gs://bucket/runs/a")
    path = root / "rounds" / "001"
    assert str(path) == os.fspath(path) == f"{path}" == "gs://bucket/runs/a/rounds/001"
    assert str(path.parent.parent) == str(RemotePath("gs://bucket/runs/a/")) == "gs://bucket/runs/a"
    assert path.name == "001" and path.relative_to(root).as_posix() == "rounds/001"
    assert path.with_name("002") == root / "rounds/002" and hash(RemotePath(str(path))) == hash(path)
    assert isinstance(files.folder_at("s3://bucket/x"), RemotePath) and isinstance(files.folder_at("x"), pathlib.Path)
    assert not remote.is_remote("gs:/bucket") and not remote.is_remote("runs/gs://x")


def test_files_are_as_on_disk(store: ObjectServer, tmp_path: pathlib.Path) -> None:
    found = []
    for folder in (tmp_path, files.folder_at(str(store.root))):
        path = folder / "labels.jsonl"
        assert not path.exists() and list(files.read_lines(path)) == []
        files.append_lines(path, ["1\n", "sep\u2028arator\n"])
        files.write_json(folder / "inner" / "x.json", {"é": [1.5, float("nan")]})
        files.write_atomic(folder / "curves.png", b"\x89PNG\r\n")
        path.write_bytes(path.read_bytes() + b"cut sh")
        files.append_lines(path, ["3\n"])
        with pytest.raises(FileNotFoundError):
            files.read_json(folder / "absent.json")
        assert (folder / "inner").is_dir() and not (folder / "inner").is_file() and path.is_file()
        names = sorted(p.name for p in folder.iterdir())
        contents = [path.read_bytes(), (folder / "curves.png").read_bytes(), files.read_json(folder / "inner/x.json")]
        files.remove_folder(folder / "inner")
        files.remove_folder(folder / "inner")
        found.append((names, contents, list(files.read_lines(path)), (folder / "inner").exists()))
    assert found[0] == found[1] and found[0][3] is False


def test_no_object_is_ever_half_there(store: ObjectServer) -> None:
    """A writer dies in the middle of a large object: what was there stays."""
    path = store.root / "big"
    path.write_bytes(b"old")
    file_system = fsspec.filesystem(store.scheme)
    with file_system.open(str(path), "wb", block_size=2**23) as file:
        file.write(b"x" * 2**24)
        assert store.uploads and path.read_bytes() == b"old"
    assert len(path.read_bytes()) == 2**24


@pytest.mark.parametrize(("status", "number"), [(503, errno.EAGAIN), (429, errno.EAGAIN), (403, errno.EIO)])
def test_what_cannot_be_asked_for_is_not_absent(
    store: ObjectServer, impatient: None, status: int, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = files.folder_at(str(store.root)) / "labels.jsonl"
    files.append_lines(path, ["1\n"])
    store.failing = status
    for ask in (
        path.exists,
        path.is_dir,
        path.read_bytes,
        path.stat,
        lambda: list(path.parent.iterdir()),
        lambda: list(files.read_lines(path)),
        lambda: files.append_lines(path, ["2\n"]),
        lambda: files.write_json(path, 1),
        lambda: files.remove_folder(path),
    ):
        with pytest.raises(StoreError) as raised:
            ask()
        assert raised.value.errno == number and raised.value.filename.startswith(str(store.root)), raised.value
    store.failing = None
    assert list(files.read_lines(path)) == ["1"]
    assert capfd.readouterr() == ("", "")


def test_a_bucket_that_is_not_there(store: ObjectServer) -> None:
    with pytest.raises(StoreError, match="there is no such bucket") as raised:
        folders.open_workdir(files.folder_at(f"{store.scheme}://other/runs/a"), config.default(), "main")
    assert raised.value.filename == f"{store.scheme}://other" and raised.value.errno == errno.EIO
    again = pickle.loads(pickle.dumps(raised.value))  # it has to reach the other processes of a run
    assert (again.errno, again.strerror, again.filename) == raised.value.args or str(again) == str(raised.value)


def test_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    remote._file_system.cache_clear()
    with pytest.raises(ValueError, match=r"install gcsfs.*activedpo_jax\[remote\]"):
        RemotePath("gs://bucket/x").exists()


def ending(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as raised, errors.clean_errors():
        raise error
    return raised.value.code, capsys.readouterr().err


def test_how_a_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = ending(StoreError.passing("gs://b/x", "says 503"), capsys)
    assert code == 75 and line == (
        "error: gs://b/x: says 503; what is there is whole, and once it answers the same command resumes\n"
    )
    code, line = ending(StoreError.lasting("gs://b/x", "forbidden"), capsys)
    assert code == 1 and "gs://b/x: forbidden; what is there is whole, and once that is mended" in line
    code, line = ending(gcsfs.retry.HttpError({"code": 502, "message": "bad gateway"}), capsys)
    assert code == 75 and line.count("\n") == 1
    texts = {
        'UNAVAILABLE: Error writing "gs://b/checkpoints/1/d/0": HTTP response code: 503 with body': 75,
        "PERMISSION_DENIED: Error reading gs://b/x: HTTP response code: 403": 1,
        "DEADLINE_EXCEEDED: gs://b/x: timed out": 75,
    }
    for text, expected in texts.items():
        code, line = ending(ValueError(text), capsys)
        assert code == expected and line.startswith("error: gs://b/") and line.count("\n") == 1
    code, line = ending(ValueError("gs://b/x: process 7 on h works here"), capsys)  # ours, about the store
    assert code == 2 and line == "error: gs://b/x: process 7 on h works here\n"


# One process at a time


def elsewhere(store: ObjectServer, number: int) -> None:
    """A lock as a process of another machine leaves it when it is killed."""
    holder = {"process": 7, "host": "other", "machine": "another boot", "time": time.time()}
    (store.root / ".lock" / f"{number:06d}").write_bytes(json.dumps(holder).encode())


def test_of_many_that_start_at_once_one_gets_the_lock(store: ObjectServer) -> None:
    path, won = store.root / ".lock" / "000001", []

    def want(number: int) -> None:
        try:
            path.create(str(number).encode())
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=want, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and path.read_bytes() == str(won[0]).encode()


def test_a_lock_that_is_renewed_holds(store: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RENEWAL_SECONDS", 0.2)
    monkeypatch.setattr(remote, "_machine", lambda: "mine")
    remote.lock(store.root)
    remote.lock(store.root)  # by this process already
    held = remote._locks.pop(store.root)  # another process knows nothing of it
    monkeypatch.setattr(remote, "_machine", lambda: "another")
    begun = time.monotonic()
    with pytest.raises(ValueError, match=rf"{store.root}: process {os.getpid()} on \S+ works here; wait"):
        remote.lock(store.root)
    assert time.monotonic() - begun < 10 < remote.STALE_SECONDS
    held.release()
    time.sleep(0.5)  # it is renewed no more
    remote.lock(store.root)
    assert store.names("runs/a/.lock") == ["runs/a/.lock/000002"]


def test_a_lock_that_nobody_renews_is_taken_over(store: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STALE_SECONDS", 1.0)
    elsewhere(store, 3)
    begun = time.monotonic()
    remote.lock(store.root)
    assert time.monotonic() - begun >= 1.0 and store.names("runs/a/.lock") == ["runs/a/.lock/000004"]
    # This process hangs, another one takes over, and this one goes on: it writes nothing more.
    lock = remote._locks[store.root]
    elsewhere(store, 5)
    files.write_json(files.folder_at(str(store.root)) / "early.json", 1)  # it cannot know yet
    lock._renewed -= 1.0
    with pytest.raises(StoreError, match="process 7 on other has taken over") as raised:
        files.write_json(files.folder_at(str(store.root)) / "late.json", 1)
    assert raised.value.errno == errno.EIO and store.names("runs/a/late") == []
    assert json.loads((store.root / ".lock/000005").read_bytes())["process"] == 7


def test_a_lock_of_a_dead_process_of_this_machine_is_free_at_once(store: ObjectServer) -> None:
    dead = {"process": 2**22 + 1, "host": "here", "machine": remote._machine(), "time": time.time()}
    (store.root / ".lock" / "000001").write_bytes(json.dumps(dead).encode())
    begun = time.monotonic()
    remote.lock(store.root)
    assert time.monotonic() - begun < remote.RENEWAL_SECONDS / 5 < remote.STALE_SECONDS


# What a run writes


def test_answers_of_people_are_taken_up(store: ObjectServer) -> None:
    picked = Picked([test_people.question(name) for name in ("a", "b/1", "c")], [1.5, 1.25, 0.1], 0.5, False)
    folder: Any = store.root
    record, oracle = RoundRecord(folder, 1), PeopleOracle(folder, 1)
    record.ask(picked)
    assert RoundRecord(folder, 1).picked() == picked
    first = record.collect(oracle, picked)
    assert (
        not isinstance(first, dict)
        and f"fill in `preference` in {store.root}/rounds/001/label/pairs.csv" in first.message
    )
    label = "runs/a/rounds/001/label"
    assert {f"{label}/{name}" for name in ("pairs.csv", "argilla.json", "README.txt")} <= set(store.names(label))

    def answer(name: str, *rows: tuple[str, str]) -> None:
        lines = [json.dumps(test_people.row(*row)) + "\n" for row in rows]
        store.put(f"{label}/{name}", "".join(lines).encode())

    answer("z.jsonl", ("a", "first"))
    time.sleep(store.tick)
    answer("a.jsonl", ("a", "second"), ("b/1", "skip"))
    second = record.collect(oracle, picked)
    assert not isinstance(second, dict) and "2 of 3" in second.message
    answer("more.jsonl", ("c", "both_bad"))
    found = test_people.complete(record.collect(oracle, picked))
    assert found == {"a": "second", "b/1": "skip", "c": "both_bad"}  # of two files the newer counts
    answer("odd.jsonl", ("c", "tie"), ("d", "first"))
    with pytest.raises(ValueError, match=rf"^{store.scheme}://bucket/{label}/odd\.jsonl:2: there is no pair 'd'"):
        record.collect(oracle, picked)


def test_metrics_are_those_on_disk(store: ObjectServer, tmp_path: pathlib.Path) -> None:
    local, there = tmp_path / "local", tmp_path / "there"
    with metrics.MetricsWriter(local) as writer:
        write_rounds(writer, range(4))
    folder: Any = store.root
    with metrics.MetricsWriter(folder) as writer:
        write_rounds(writer, range(2))
        writer.sync()
        assert len(metrics.read_metrics(folder / "metrics.jsonl")) == 6  # while it is open
        write_rounds(writer, [2, 3])
    with metrics.MetricsWriter(folder, 2) as writer:
        write_rounds(writer, [2, 3])
    store.fetch("runs/a", there)
    assert timeless(there / "metrics.jsonl") == timeless(local / "metrics.jsonl")
    assert events(there) == events(local) and len(store.names("runs/a/tensorboard")) == 1


def test_models_are_those_on_disk(store: ObjectServer, tmp_path: pathlib.Path) -> None:
    base = tmp_path / "base"
    tiny_llama(base)
    decoder, params = load_decoder(base)
    lora_config = LoraConfig(rank=4, alpha=8.0)
    lora = random_adapter(decoder.config, lora_config)
    for folder in (tmp_path / "local", files.folder_at(str(store.root))):
        adapters.save_adapter(lora, lora_config, str(base), folder / "adapter")
        arguments = (merged.Weights(params, lora, lora_config), str(base), "")
        merged.save_merged(*arguments, folder / "merged", jnp.float32, 20_000)
        with pytest.raises(ValueError, match="already there; remove it"):
            merged.save_merged(*arguments, folder / "merged", jnp.float32)
    there = store.fetch("runs/a", tmp_path / "there")
    names = sorted(path.relative_to(there) for path in there.rglob("*") if path.is_file())
    assert len(names) > 6 and names == sorted(
        path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*") if path.is_file()
    )
    for name in names:
        assert (there / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name
    newest = max(store.names("runs/a/merged"), key=lambda name: store.objects[name].generation)
    assert newest == "runs/a/merged/config.json"  # it says that the others are there

    again = adapters.load_adapter(f"{store.root}/adapter", "", decoder.config, lora_config)
    jax.tree.map(np.testing.assert_array_equal, again, lora)
    assert hub.fingerprint(f"{store.root}/adapter", "") == hub.fingerprint(str(tmp_path / "local" / "adapter"), "")


def test_a_merged_checkpoint_cut_short_is_written_again(store: ObjectServer, tmp_path: pathlib.Path) -> None:
    tiny_llama(tmp_path / "base")
    decoder, params = load_decoder(tmp_path / "base")
    store.put("runs/a/merged/model-00007-of-00009.safetensors", b"half")
    folder: Any = store.root
    merged.save_merged(merged.Weights(params), str(tmp_path / "base"), "", folder / "merged", jnp.float32)
    names = {name.rpartition("/")[2] for name in store.names("runs/a/merged")}
    assert {"model.safetensors", "config.json"} <= names and not any("00007" in name for name in names)


def test_checkpoints_and_work_under_way(store: ObjectServer) -> None:
    folder: Any = store.root
    tree = {"a": jnp.arange(5.0), "b": jnp.ones((3, 4))}
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore_latest(tree) == (None, None)
    for number in range(3):
        checkpoints.save(number, jax.tree.map(lambda x, n=number: x + n, tree))
    checkpoints.close()
    del store.objects["runs/a/checkpoints/2/commit_success.txt"]  # a kill before it was whole
    checkpoints = Checkpoints(folder)
    latest, found = checkpoints.restore_latest(tree)
    assert latest == 1
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda x: x + 1, tree))
    longer = {"a": jnp.full(7, 9.0), "b": tree["b"]}  # of a run that is to have more rounds
    np.testing.assert_array_equal(checkpoints.restore(1, longer)["a"], [1, 2, 3, 4, 5, 9, 9])
    checkpoints.save(2, tree)
    checkpoints.close()
    kept = {name.split("/")[3] for name in store.names("runs/a/checkpoints/")}
    assert kept == {"1", "2"}
    for name in store.names("runs/a/checkpoints/2/"):
        if "/d/" in name:
            store.put(name, b"damaged")
    checkpoints = Checkpoints(folder)
    latest, found = checkpoints.restore_latest(tree)
    assert latest == 1 and store.names("runs/a/checkpoints/2/") == []
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda x: x + 1, tree))
    checkpoints.save(2, tree)
    checkpoints.close()

    saved = SavedWork(folder, 0)
    saved.enter(1, "choice")
    saved.save("stage", (0, 2), tree)
    saved.save("stage", (2, 3), tree)
    saved.close()
    del store.objects["runs/a/partial/001/choice/stage/000002-000003/commit_success.txt"]
    saved = SavedWork(folder, 0)
    saved.enter(1, "choice")
    assert saved.spans("stage") == [(0, 2)]
    jax.tree.map(np.testing.assert_array_equal, saved.restore("stage", (0, 2), tree), tree)
    saved.save("stage", (2, 3), tree)
    saved.enter(1, "choice")  # returns once it is written
    assert saved.spans("stage") == [(0, 2), (2, 3)]
    saved.forget()
    saved.close()
    assert store.names("runs/a/partial") == []


def test_a_checkpoint_that_orbax_misses_is_not_taken_for_absent(
    store: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Any = store.root
    tree = {"a": jnp.arange(5.0)}
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, tree)
    checkpoints.wait()
    monkeypatch.setattr(checkpoints._manager, "all_steps", lambda: [])
    with pytest.raises(StoreError, match="has not listed the checkpoint 0"):
        checkpoints.restore_latest(tree)
    checkpoints.close()


only_s3 = pytest.mark.parametrize("store", [S3Server], indirect=True)


@only_s3
def test_a_checkpoint_that_is_copied_in_part_is_not_there(store: S3Server) -> None:
    folder: Any = store.root
    tree = {"a": jnp.arange(5.0)}
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, tree)
    checkpoints.wait()
    store.failing_after = 2  # objects of the next one
    checkpoints.save(1, tree)
    with pytest.raises(StoreError, match="says 403"):
        checkpoints.wait()
    assert store.names("runs/a/checkpoints/1/") != []
    store.failing = store.failing_after = None
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore_latest(tree)[0] == 0
    checkpoints.save(7, tree)
    checkpoints.close()
    assert {name.split("/")[3] for name in store.names("runs/a/checkpoints/")} == {"0", "7"}


@only_s3
def test_what_may_not_be_deleted(store: S3Server) -> None:
    path = store.root / "x"
    path.write_bytes(b"1")
    store.undeletable = True
    with pytest.raises(StoreError, match=r"does not delete it.* permission") as raised:
        path.remove()
    assert raised.value.filename == str(path) and raised.value.errno == errno.EIO


def test_several_processes_save_nothing_in_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copied_checkpoints.hosts, "several", lambda: True)
    folder = files.folder_at("s3://bucket/runs/a")
    with pytest.raises(ValueError, match=r"^s3://bucket/runs/a: several processes .* or a directory in gs:"):
        copied_checkpoints.check_processes(folder)
    copied_checkpoints.check_processes(files.folder_at("gs://bucket/runs/a"))


# Real processes


def finish(process: Any, code: int) -> str:
    output = str(process.communicate(timeout=400)[0])
    assert process.returncode == code, output
    assert "Traceback" not in output, output
    return output


@pytest.mark.slow
def test_a_run_leaves_the_record_of_a_local_one(store: ObjectServer, tmp_path: pathlib.Path) -> None:
    """Though it is killed twice, kept waiting by a store that fails for a while, and ended by one that goes on to."""
    whole: pathlib.Path = tmp_path / "whole"
    there: Any = RemotePath(f"{store.scheme}://bucket/there")
    test_resume.finish(test_resume.start(whole, "staged"))

    def start(**more: Any) -> Any:
        return test_resume.start(there, "staged", **more)

    def is_there(*names: str) -> Any:
        return lambda: all(store.names(f"there/{name}") for name in names)

    # Killed while the features of the first round are computed.
    test_resume.kill_when(start(checkpoint_minutes=0), is_there("partial/001/choice/evidence"))
    # Refused while another process works there; then it goes on, though the store fails for some seconds.
    remote.lock(there)
    refused = finish(start(), 2)
    assert f"error: {there}: process {os.getpid()} on " in refused and refused.count("error: ") == 1
    remote._locks.pop(there).release()
    # Killed after the labels of round 1.
    process = start()
    while not is_there("rounds/001/asked.jsonl")():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    store.failing = 503
    time.sleep(4)
    store.failing = None
    test_resume.kill_when(process, is_there("rounds/001/labels.jsonl"))
    assert store.refused > 0
    # The store fails for good while round 2 is under way: one line, and the code that says to try again.
    process = start()
    while not is_there("rounds/002/labels.jsonl")():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    store.failing = 503
    ended = finish(process, 75)
    (line,) = [line for line in ended.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {there}/") and line.endswith("once it answers the same command resumes")
    # It does not begin either, and says so in one line.
    assert finish(start(), 75).count(f"error: {there}") == 1
    store.failing = 403
    assert finish(start(), 1).count(f"error: {there}") == 1
    store.failing = None
    finish(start(), 0)
    assert test_resume.record(store.fetch("there", tmp_path / "fetched")) == test_resume.record(whole)


@only_s3
@pytest.mark.slow
def test_an_sft_stage_that_is_killed_goes_on(store: S3Server, tmp_path: pathlib.Path) -> None:
    base, data, flag = tmp_path / "base", tmp_path / "data.jsonl", "--config.sft.weights=full"
    tokenizer = make_tokenizer()
    tiny_llama(base, vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(base)
    rows = [
        {"prompt": f"{row['prompt']} {i}", "completion": row["completion"]} for i in range(8) for row in test_sft.ROWS
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole: Any = tmp_path / "whole"
    there: Any = RemotePath("s3://bucket/there")
    finish(test_sft.start(base, data, whole, flag), 0)

    ready = "there/checkpoints/4/commit_success.txt"
    test_resume.kill_when(test_sft.start(base, data, there, flag), lambda: ready in store.objects)
    finish(test_sft.start(base, data, there, flag), 0)
    fetched = store.fetch("there", tmp_path / "fetched")
    name = "model/model.safetensors"
    assert test_sft.left_behind(fetched, name) == test_sft.left_behind(whole, name)
    assert not (fetched / "checkpoints").exists()


@pytest.mark.slow
def test_people_label_in_an_object_store(store: ObjectServer, tmp_path: pathlib.Path) -> None:
    there: Any = RemotePath(f"{store.scheme}://bucket/there")
    for number in (1, 2):
        output = finish(test_people.start(there), 0)
        assert f"round {number}: 0 of 6 pairs are labelled" in output
        place, pairs = test_people.open_pairs(store.fetch("there", tmp_path / f"fetched{number}"))
        rows = [json.dumps(test_people.row(pair, test_people.opinion(pair))) + "\n" for pair in pairs]
        assert len(rows) == 6
        store.put(f"there/rounds/{place.parent.name}/label/answers.jsonl", "".join(rows).encode())
    finish(test_people.start(there), 0)
    fetched = store.fetch("there", tmp_path / "fetched")
    for name in ("001", "002"):
        lines = (fetched / "rounds" / name / "selected.jsonl").read_text().splitlines()
        selected = [json.loads(line) for line in lines]
        assert [r["preference"] for r in selected] == [test_people.opinion(r["pair_id"]) for r in selected]
    assert (fetched / "adapter" / "adapter_config.json").exists()
