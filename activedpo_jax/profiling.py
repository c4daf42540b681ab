"""Where the time of a run goes (`--profile=DIR`): a JAX trace of the second piece of each kind of work.

The first one compiles; the others are like the second, and a trace of all of them would fill a disk.
"""

import collections
import re
from collections.abc import Callable
from typing import TypeVar

import jax

Result = TypeVar("Result")

_folder = ""  # empty: nothing is traced
_pieces: collections.Counter[str] = collections.Counter()


def trace_into(folder: str) -> None:
    """Traces of pieces that begin from now on go there, a folder for each kind of work; empty: none are made."""
    global _folder
    _folder = folder
    _pieces.clear()


def piece(label: str, compute: Callable[[], Result]) -> Result:
    """`compute()`, in a trace if one is wanted and this is the second piece of its kind.

    Args:
      label: of the work; numbers in it, and single letters, do not make another kind.
    """
    kind = "_".join(re.findall("[a-z]{2,}", label.lower()))
    _pieces[kind] += 1
    if not _folder or _pieces[kind] != 2:
        return compute()
    with jax.profiler.trace(f"{_folder}/{kind}"):
        return jax.block_until_ready(compute())
