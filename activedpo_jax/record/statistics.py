"""Whether two strategies differ: a hierarchical paired bootstrap, Holm's adjustment, and a verdict in a word.

What is compared is linear in the outcomes of held-out pairs, so that a run is one number for each pair, its share of
the metric, and two runs of one seed are the differences of these.  Seeds differ, and so do prompts: a replicate draws
seeds with replacement, and of every prompt a Poisson number of copies (Owen and Eckles 2012), one draw for both
strategies and for all seeds that were judged on them.

The bootstrap gives a standard error, and the interval is Student's around it (Hesterberg 2015, section 5), since
percentiles of so few seeds are too narrow.  Three things make it right for few seeds, and for prompts that all, some or
none of them share:

* A bootstrap of S values has (S − 1)/S of their variance, so that the weights of seeds are scaled (Rao and Wu 1988).
* What single outcomes add is in the draws of seeds and in those of prompts: it is taken off once (Cameron, Gelbach and
  Miller 2011).  Of prompts there remains what the seeds have in common, so that without shared prompts the result is
  the paired t test.
* The degrees of freedom are those of the two parts (Satterthwaite 1946).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_BLOCK = 1 << 20  # weights of prompts that are held at a time


class Estimate(NamedTuple):
    """A mean difference over seeds, with what is known of its error."""

    mean: float
    error: float  # standard error; NaN: of a single seed
    freedom: float  # degrees of freedom of the error

    def interval(self, confidence: float) -> tuple[float, float]:
        """Two-sided limits; NaN for a single seed."""
        if math.isnan(self.error):
            return math.nan, math.nan
        half_width = float(special.stdtrit(self.freedom, (1 + confidence) / 2)) * self.error
        return self.mean - half_width, self.mean + half_width

    def p_value(self) -> float:
        """Two-sided, that the true mean is 0; NaN for a single seed."""
        return 2 * self._beyond(-abs(self.mean))

    def equivalence_p(self, margin: float) -> float:
        """That the true mean is not within ±margin: the larger of two one-sided tests' (Schuirmann 1987)."""
        return self._beyond(abs(self.mean) - margin)

    def _beyond(self, distance: float) -> float:
        """P(t ≤ distance/error)."""
        if self.error == 0:
            return 0.5 if distance == 0 else float(distance > 0)
        return float(special.stdtr(self.freedom, distance / self.error))


def hierarchical_bootstrap(
    differences: Sequence[FloatArray], prompts: Sequence[np.ndarray], replicates: int, seed: int = 0
) -> Estimate:
    """The mean over seeds of the mean over held-out pairs.

    Args:
      differences: of each of S seeds, strategy less baseline: [n_s], a pair each.
      prompts: of each seed: [n_s], the same number for the same prompt, in all seeds.
      replicates: that the standard error comes from.
      seed: of the draws.
    """
    sums, counts = _by_prompt(differences, prompts)
    means = sums.sum(1) / counts.sum(1)
    num_seeds, mean = len(means), float(means.mean())
    if num_seeds < 2:
        return Estimate(mean, math.nan, math.nan)
    single = (sums - counts * means[:, None]) / counts.sum(1)[:, None] / num_seeds  # what each outcome adds to the mean
    rng, of_seeds, of_prompts = np.random.default_rng(seed), [], []
    shared = single[:, (counts > 0).sum(0) > 1]
    size = max(1, _BLOCK // max(1, shared.shape[1]))
    for first in range(0, replicates, size):
        count = min(size, replicates - first)
        weights = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=count) - 1
        of_seeds.append(math.sqrt(num_seeds / (num_seeds - 1)) * (weights @ means) / num_seeds)
        of_prompts.append((rng.poisson(1.0, (count, shared.shape[1])) - 1) @ shared.sum(0))
    between = float(np.concatenate(of_seeds).var())
    common = max(0.0, float(np.concatenate(of_prompts).var() - np.sum(shared**2)) * num_seeds / (num_seeds - 1))
    variance = between + common
    if variance < 1e-30:  # but for rounding, nothing varies
        return Estimate(mean, 0.0, float(num_seeds - 1))
    freedom = variance**2 / (between**2 / (num_seeds - 1) + common**2 / max(1, shared.shape[1] - 1))
    return Estimate(mean, math.sqrt(variance), freedom)


def _by_prompt(values: Sequence[FloatArray], prompts: Sequence[np.ndarray]) -> tuple[FloatArray, FloatArray]:
    """Sums of the values, and how many there are: [S, prompts] both."""
    names = np.unique(np.concatenate(list(prompts)))
    sums, counts = np.zeros((len(values), len(names))), np.zeros((len(values), len(names)))
    for s, (of_seed, ids) in enumerate(zip(values, prompts, strict=True)):
        places = np.searchsorted(names, ids)
        sums[s] = np.bincount(places, of_seed, len(names))
        counts[s] = np.bincount(places, minlength=len(names))
    return sums, counts


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for so many tests (Holm 1979): the k-th smallest of n times n − k + 1, rising, at most 1.

    NaN, of what could not be tested, stays NaN and does not count.
    """
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def verdict(mean: float, p_value: float, equivalence_p: float, alpha: float) -> str:
    """In a word: `equal`, within the margin; else `better` or `worse`; else `open`.

    A difference that is certainly within the margin is `equal` even where it is certainly not 0: the margin says what
    counts as a difference.

    Args:
      p_value, equivalence_p: as adjusted; NaN: not tested.
    """
    if equivalence_p <= alpha:  # so that the interval of confidence 1 − 2α lies within the margin
        return "equal"
    if p_value <= alpha:
        return "better" if mean > 0 else "worse"
    return "open"
