"""Progress: a bar on a terminal, else few lines, and none of short work."""

import io
import sys
from typing import Any

import pytest
from tqdm import tqdm

from activedpo_jax import progress as module
from activedpo_jax.progress import progress


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until its one number is changed."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_30_seconds(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=1024, desc="features", unit="prompt") as bar:
        for _ in range(90):
            seconds[0] += 1
            bar.update(2)
    assert capsys.readouterr() == (
        "",
        "features: 60/1024 prompt, 2.0/s\nfeatures: 120/1024 prompt, 2.0/s\nfeatures: 180/1024 prompt, 2.0/s\n",
    )


def test_short_work_says_nothing(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress(range(29), desc="x", unit="batch"):
        seconds[0] += 1
    assert capsys.readouterr() == ("", "")


def test_a_loop_over_an_iterable(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for item in progress("abc", desc="x", unit="batch"):
        found.append(item)
        seconds[0] += 20
    for _ in progress((letter for letter in "ab"), desc="y", unit="batch"):
        seconds[0] += 60
    assert found == ["a", "b", "c"]
    lines = ["x: 2/3 batch, 3/min", "y: 1 batch, 1/min", "y: 2 batch, 1/min"]
    assert capsys.readouterr().err.splitlines() == lines


def test_what_was_done_before_does_not_count_as_speed(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress(total=100, initial=40, desc="SFT", unit="step")
    seconds[0] += 30
    bar.set_postfix(loss="0.5", refresh=False)
    bar.update(30)
    bar.close()
    assert capsys.readouterr().err == "SFT: 70/100 step, 1.0/s, loss=0.5\n"


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar: Any = progress(total=4, initial=1, desc="features", unit="prompt")
    assert isinstance(bar, tqdm)
    bar.update(2)
    bar.refresh()
    bar.close()
    assert "features:  75%" in terminal.getvalue() and "3/4" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")  # it is gone at the end
