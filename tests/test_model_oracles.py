"""Whole runs that a judge and reward models label, through failures of their servers."""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from activedpo_jax import main
from activedpo_jax.oracles import client
from tests import test_judge, test_reward_model
from tests.http_server import Answer, HttpServer, Respond
from tests.test_main import command  # noqa: F401
from tests.test_reward_model import Text

KEY = "sk-0123456789"
FAILURES = [
    Answer(status=503),
    Answer({"data": []}, sent=3),
    Answer(b"<html>"),
    Answer(status=429, headers={"Retry-After": "0.05"}),
    Answer(b"<html>", 502),
]
Run = Callable[[dict[str, Any]], list[dict[str, Any]]]


def unsteady(respond: Respond) -> Respond:
    """Fails at every other request, in another way each time."""
    return lambda request, n: FAILURES[n // 2 % len(FAILURES)] if n % 2 else respond(request, n // 2)


@pytest.fixture
def run(
    command: list[str],  # noqa: F811
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Run]:
    """One round with these options of the oracle: its selected pairs.  The key is in no file of the run."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("ORACLE_KEY", KEY)
    folder = tmp_path / "run"

    def run(options: dict[str, Any]) -> list[dict[str, Any]]:
        arguments = [flag for flag in command if "sft.data" not in flag]
        arguments += ["--workdir", str(folder), "--config.rounds=1", "--config.export.merged=false"]
        main.main([*arguments, *(f"--config.oracle.{name}={value}" for name, value in options.items())])
        rows = (folder / "rounds" / "001" / "selected.jsonl").read_text().splitlines()
        assert len(rows) == 3
        return [json.loads(row) for row in rows]

    yield run
    for path in folder.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    shutil.rmtree(folder)


def by_rewards(first: float, second: float) -> str:
    return ("tie", "first", "second")[int(np.sign(first - second))]


def test_a_judge(run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with HttpServer(unsteady(test_judge.judging(test_judge.longer))) as there:
        options = {"kind": "judge", "url": f"{there.url}/v1/", "model": "m", "api_key_variable": "ORACLE_KEY"}
        rows = run(options | {"concurrency": 2, "prompt_price": 2})
    assert set(there.paths) == {"/v1/chat/completions"} and there.headers[-1]["Authorization"] == f"Bearer {KEY}"
    assert [row["preference"] for row in rows] == [by_rewards(len(row["first"]), len(row["second"])) for row in rows]
    assert {row["source"] for row in rows} == {"judge m"}

    used = json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"][1]["oracle"]
    count = len(there.requests)  # of which eight were answered, two of them about the known pair
    assert count >= 15 and used == {"requests": count, "prompt_tokens": 800, "completion_tokens": 56, "cost": 0.0016}
    said, output = f"{count} requests, 800 + 56 tokens, cost 0.0016", capsys.readouterr().out
    assert f" s  {said}\n" in output and f"\noracle: {said}\n" in output
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["oracle/requests"] == count


def test_a_reward_model_in_the_process(run: Run, tmp_path: pathlib.Path) -> None:
    model = tmp_path / "reward"
    test_reward_model.save_model(model)
    rows = run({"kind": "reward_model", "path": model})
    for row in rows:
        texts = [Text(row["prompt"], row["first"]), Text(row["prompt"], row["second"])]
        assert row["preference"] == by_rewards(*test_reward_model.reference(model, texts))
    assert "reward model" in json.loads((tmp_path / "run" / "inputs" / "seed0.json").read_text())


def test_a_reward_model_behind_a_server(run: Run) -> None:
    with HttpServer(unsteady(test_reward_model.vllm())) as there:
        options = {"kind": "reward_model", "url": f"{there.url}/classify", "model": "m"}
        rows = run(options | {"api_key_variable": "ORACLE_KEY"})
    for row in rows:
        assert row["preference"] == by_rewards(*(test_reward_model.logit(row[side]) for side in ("first", "second")))
