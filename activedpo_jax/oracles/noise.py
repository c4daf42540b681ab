"""Noise on top of an oracle that has rewards or labels; each draw depends on the seed and the pair's id alone."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from activedpo_jax.data.preferences import uniform
from activedpo_jax.oracles.labels import Label, Preference, Question


@dataclasses.dataclass(frozen=True)
class Noise:
    """What is done to a label before it is given."""

    kind: str = "none"  # none, flip, bradley_terry
    flip_probability: float = 0.0  # of `flip`
    temperature: float = 1.0  # of the rewards, of `bradley_terry`
    seed: int = 0

    def from_margins(self, names: Sequence[str], margins: np.ndarray) -> np.ndarray:
        """Labels of pairs whose rewards differ by r₂ − r₁ = `margins` [K]: [K] int8, 1: the second is preferred."""
        if self.kind == "bradley_terry":
            return (self._draws(names, "bradley_terry") < expit(margins / self.temperature)).astype(np.int8)
        return self.flipped(names, self.larger(names, margins))

    def larger(self, names: Sequence[str], margins: np.ndarray) -> np.ndarray:
        """Labels by the larger reward; of equal ones by a coin: [K] int8."""
        return np.where(margins == 0, self._draws(names, "tie") < 0.5, margins > 0).astype(np.int8)

    def flipped(self, names: Sequence[str], preferences: np.ndarray) -> np.ndarray:
        """The same labels, some of them turned round by `flip`: [K] int8."""
        preferences = preferences.astype(np.int8)
        if self.kind == "flip":
            preferences ^= self._draws(names, "flip") < self.flip_probability
        return preferences

    def on_margins(self, questions: Sequence[Question], margins: np.ndarray, source: str) -> list[Label]:
        """Labels of questions whose rewards differ by r₂ − r₁ = `margins` [K]; of equal rewards a tie, unless it is
        drawn by Bradley–Terry."""
        drawn = self.from_margins([q.pair_id for q in questions], margins)
        tied = (margins == 0) & (self.kind != "bradley_terry")
        return [
            Label(q.pair_id, "tie" if tie else "second" if second else "first", source)
            for q, second, tie in zip(questions, drawn, tied, strict=True)
        ]

    def on_labels(self, labels: Sequence[Label]) -> list[Label]:
        """The same labels, those of some pairs turned round by `flip`; what names no preference stays as it is."""
        other: dict[str, Preference] = {"first": "second", "second": "first"}
        flips = self.flipped([label.pair_id for label in labels], np.zeros(len(labels), np.int8))
        return [
            dataclasses.replace(x, preference=other.get(x.preference, x.preference)) if flip else x
            for x, flip in zip(labels, flips, strict=True)
        ]

    def _draws(self, names: Sequence[str], purpose: str) -> np.ndarray:
        return np.array([uniform(self.seed, purpose, name) for name in names])


NO_NOISE = Noise()
