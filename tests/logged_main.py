"""`python -m activedpo_jax.main`, which appends a line to the file $WORK_LOG for every piece of work that it has done.

A line is the piece's name, and when it was done, in seconds of the monotonic clock that all processes share.  With
several processes each has a file of its own, and one that is killed is missed sooner than by default.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from activedpo_jax import cluster, errors

cluster.guard()
errors.end_at_signals()
cluster.guard = lambda: None  # it has run

from activedpo_jax import hosts, resumable  # noqa: E402
from activedpo_jax.training import loop  # noqa: E402

_process = next((a.partition("=")[2] for a in sys.argv if a.startswith("--process_id=")), "0")
_log = os.open(f"{os.environ['WORK_LOG']}.{_process}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_pieces, _descend = resumable.pieces, loop.descend


def _logged(compute: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(number: int, *args: Any) -> Any:
        result = compute(number, *args)
        os.write(_log, f"{name}/{number} {time.monotonic()}\n".encode())
        return result

    return run


def pieces(saved: Any, stage: str, count: int, compute: Any, *args: Any, **options: Any) -> Iterator[Any]:
    name = f"{getattr(saved, '_folder', '')}/{stage}".rpartition("/partial/")[2]
    return _pieces(saved, stage, count, _logged(compute, name), *args, **options)


def descend(work: loop.Work, weights: Any, opt_state: Any, advance: loop.Advance) -> Iterator[loop.Step]:
    return _descend(work, weights, opt_state, _logged(advance, work.label))


resumable.pieces, loop.descend, hosts.HEARTBEAT_SECONDS = pieces, descend, 10
runpy.run_module("activedpo_jax.main", run_name="__main__", alter_sys=True)
