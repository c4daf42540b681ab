"""A staged run of one process or two that is interrupted again and again: what comes out, and what is done twice."""

import collections
import pathlib
import random
import signal
import time
from typing import Any

import numpy as np
import pytest

from tests.test_hosts import ROOT, processes
from tests.test_resume import OPTIONS, record

KILLS = 20
LONG = OPTIONS | {
    "round.mode": "staged",
    "features.groups_per_chunk": 4,
    "evaluation.pairs_per_chunk": 4,
    "dpo.epochs": 40,
    "checkpoint_minutes": 0,
}


class Life:
    """The processes of the run from one start to the next end, and what they do.

    Args:
      count: of processes.
      log: where they write it.
      changes: of the options.
    """

    def __init__(self, folder: pathlib.Path, count: int, log: pathlib.Path, **changes: Any) -> None:
        self.logs = [log.with_name(f"{log.name}.{i}") for i in range(count)]
        flags = [f"--config.{name}={value}" for name, value in (LONG | changes).items()]
        command = ["tests/logged_main.py", "--config=configs/quickstart.py", f"--workdir={folder}", *flags]
        self.processes = processes(command, count, 1, PYTHONPATH=str(ROOT), WORK_LOG=str(log))

    def done(self) -> dict[str, float]:
        """The pieces of work done, and when, as the process that has done more of them tells."""
        lines = max((log.read_text().splitlines() if log.exists() else [] for log in self.logs), key=len)
        return {name: float(when) for name, _, when in (line.rpartition(" ") for line in lines)}

    def interrupt(self, number: signal.Signals, victim: int, pieces: int) -> None:
        """Sends the signal to one process once so many pieces are done."""
        deadline = time.monotonic() + 400
        while len(self.done()) < pieces:
            assert all(process.poll() is None for process in self.processes), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        self.processes[victim].send_signal(number)

    def end(self) -> list[tuple[int, str]]:
        """The exit codes, and what was written on stderr."""
        written = [process.communicate(timeout=400)[1] for process in self.processes]
        return [(process.returncode, text) for process, text in zip(self.processes, written, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("count", [1, 2])
def test_twenty_interruptions_change_nothing_and_cost_what_is_said(
    tmp_path: pathlib.Path, count: int, number: signal.Signals
) -> None:
    whole, cut, draw = tmp_path / "whole", tmp_path / "cut", random.Random(0)
    undisturbed = Life(whole, count, tmp_path / "undisturbed")
    assert [code for code, _ in undisturbed.end()] == [0] * count
    work, done = list(undisturbed.done()), collections.Counter[str]()
    assert len(work) == len(set(work)) > 10 * KILLS
    for life in range(KILLS):
        part = Life(cut, count, tmp_path / f"life{life}")
        victim = draw.randrange(count)
        part.interrupt(number, victim, draw.randint(1, len(work) // KILLS))
        for process, (code, text) in enumerate(part.end()):
            killed = number == signal.SIGKILL and process == victim
            assert code == (-signal.SIGKILL if killed else 75), (life, process, code, text)
            assert "Traceback" not in text, (life, process, text)
        done.update(list(part.done()))
    last = Life(cut, count, tmp_path / "last")
    assert [code for code, _ in last.end()] == [0] * count
    done.update(list(last.done()))
    assert record(cut) == record(whole)
    twice = collections.Counter({piece: times - 1 for piece, times in done.items() if times > 1})
    print(f"{len(work)} pieces of work, {KILLS} interruptions: {twice.total()} pieces done twice: {dict(twice)}")
    assert done.keys() == set(work)
    # Of what a kill interrupts, the last piece may be on its way to the disk, and the one before it, too.
    assert twice.total() <= (2 * KILLS if number == signal.SIGKILL else 0)


@pytest.mark.slow
def test_a_kill_costs_no_more_of_a_stage_than_checkpoint_minutes_and_a_checkpoint(tmp_path: pathlib.Path) -> None:
    """In seconds, from the oldest piece of a stage that is done again to the newest that was done before the kill."""
    seconds, saving, cut, draw = 0.5, 2.0, tmp_path / "cut", random.Random(1)
    lives = []
    for life in range(5):
        lives.append(Life(cut, 1, tmp_path / f"life{life}", checkpoint_minutes=seconds / 60))
        lives[-1].interrupt(signal.SIGKILL, 0, draw.randint(50, 90))  # of 465 pieces
        lives[-1].end()
    lives.append(Life(cut, 1, tmp_path / "last", checkpoint_minutes=seconds / 60))
    assert [code for code, _ in lives[-1].end()] == [0]
    # The base model of the quickstart is trained anew, as loading and tokenising are done anew.
    done = [{k: v for k, v in life.done().items() if not k.startswith("training the base")} for life in lives]
    lost = []
    for i, pieces in enumerate(done[:-1]):
        again = set[str]().union(*done[i + 1 :]) & set(pieces)
        for stage in {piece.rpartition("/")[0] for piece in again}:
            times = sorted(when for piece, when in pieces.items() if piece.rpartition("/")[0] == stage)
            first = min(pieces[piece] for piece in again if piece.rpartition("/")[0] == stage)
            lost.append(times[-1] - first)
            # The time itself, the piece of work after which it was due, and a checkpoint under way, which the kill
            # makes worthless.
            assert lost[-1] < seconds + max(np.diff(times), default=0.0) + saving, (i, stage, times)
    print(f"seconds of a stage that were lost at {seconds}: {np.round(sorted(lost), 2).tolist()}")
    assert max(lost) > 0, "no kill cost anything: they came too late to tell"
