"""What every held-out pair came to, round after round: `heldout.npz` in a run's folder.

margins [T + 1, N] float32    after 0, 1, ... T rounds: the implicit reward of the preferred response less that of the
                              other, nats; above 0 the pair is judged right, at 0 it counts half
prompts [N] uint64            a digest of the pair's prompt, the same in every run that is judged on it
"""

import io
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from activedpo_jax.data.digests import digests_of_bytes
from activedpo_jax.files import write_atomic
from activedpo_jax.hosts import on_first


class Outcomes(NamedTuple):
    margins: np.ndarray  # [T + 1, N] float32
    prompts: np.ndarray  # [N] uint64

    @property
    def correct(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[T + 1, N]: 1 where the pair is judged right, ½ for a tie; the mean of a row is that round's accuracy."""
        return (self.margins > 0) + 0.5 * (self.margins == 0)


def prompt_digests(prompt_tokens: Sequence[np.ndarray]) -> np.ndarray:
    """[N] uint64, of each prompt's tokens."""
    found = digests_of_bytes(np.ascontiguousarray(tokens, np.int32).tobytes() for tokens in prompt_tokens)
    return np.ascontiguousarray(found[:, :2]).view(np.uint64)[:, 0]


class OutcomesWriter:
    """Writes the file anew with every round, all or nothing.

    Args:
      folder: of the run.
      prompts: [N] uint64.
      rounds: whose outcomes a checkpoint builds on, round 0 included; those of later ones are forgotten.

    Raises:
      ValueError: the file lacks one of these rounds, or is of other pairs.
    """

    @on_first
    def __init__(self, folder: pathlib.Path, prompts: np.ndarray, rounds: int) -> None:
        self._path, self._prompts = folder / _NAME, prompts
        self._rows: list[np.ndarray] = []
        if rounds:
            kept = read(folder) if self._path.exists() else None
            if kept is None or len(kept.margins) < rounds or not np.array_equal(kept.prompts, prompts):
                raise ValueError(
                    f"{self._path}: missing, or without round {rounds - 1}, which was saved; restore the file"
                )
            self._rows = list(kept.margins[:rounds])

    @on_first
    def add(self, margins: np.ndarray) -> None:
        """Appends a round's outcomes, [N], and returns once they are on disk."""
        self._rows.append(np.asarray(margins, np.float32))
        content = io.BytesIO()
        np.savez(content, margins=np.stack(self._rows), prompts=self._prompts)
        write_atomic(self._path, content.getvalue())


def read(folder: pathlib.Path) -> Outcomes:
    """The outcomes of a run.

    Raises:
      FileNotFoundError: nothing was evaluated yet.
      ValueError: the file is damaged.
    """
    path = folder / _NAME
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content)) as arrays:
            return Outcomes(arrays["margins"], arrays["prompts"])
    except Exception as error:  # of many kinds, of which zipfile's and NumPy's readers have more
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error}); restore the file") from error


_NAME = "heldout.npz"
