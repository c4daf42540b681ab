"""How often one model's response is better than another's to the same prompt, and how often if both were as long.

Of n prompts each has one response of either model, so that prompts are the clusters of every standard error.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import special

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

CONFIDENCE = 0.95

_RIDGE = 1e-2  # of both coefficients: hardly felt, but finite where every response of one model wins
_STEPS = 50


class Estimate(NamedTuple):
    """A mean over prompts with its two-sided t limits at `CONFIDENCE`; they are NaN for fewer than two prompts."""

    mean: float
    standard_error: float
    low: float
    high: float


def mean_of(values: FloatArray) -> Estimate:
    """Of [n] values, one for each prompt."""
    n, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    half_width = _quantile(n) * error
    return Estimate(mean, error, mean - half_width, mean + half_width)


def wins(rewards: FloatArray, others: FloatArray) -> FloatArray:
    """1 where the first reward is larger, ½ where they are equal, else 0: [n]."""
    return (1 + np.sign(rewards - others)) / 2


class LengthControlled(NamedTuple):
    """A logistic regression of wins on a constant and the difference in length."""

    win_rate: Estimate  # at no difference in length
    length_effect: float  # φ, in log-odds: above 0, the longer response tends to win


def length_controlled(won: FloatArray, lengths: FloatArray, others: FloatArray) -> LengthControlled:
    """The win rate if the responses to each prompt were as long as each other (Dubois et al. 2024, arXiv 2404.04475).

    P(win) = σ(θ + φ tanh(Δ/std Δ)), Δ the difference in length, and the result is σ(θ).  The paper's third term, how
    difficult a prompt is for one model and not for the other, is left out: it is estimated from many models at once,
    and one pair of them has a single answer to each prompt to tell it from.  A weak ridge takes the place of the
    paper's cross-validated one.  Limits are those of θ, from the sandwich estimate of its variance.

    Args:
      won: [n], 1, ½ or 0.
      lengths, others: [n], of the two models' responses.
    """
    difference = lengths - others
    spread = float(difference.std(ddof=1)) if len(won) > 1 else 0.0
    inputs = np.stack([np.ones(len(won)), np.tanh(difference / spread) if spread else np.zeros(len(won))], axis=1)
    weights = _logistic(inputs, won)
    expected = special.expit(inputs @ weights)
    inverse = np.linalg.inv(_curvature(inputs, expected))
    slopes = (expected - won)[:, None] * inputs
    error = math.sqrt((inverse @ (slopes.T @ slopes) @ inverse)[0, 0]) if len(won) > 1 else math.nan
    theta, half_width = float(weights[0]), _quantile(len(won)) * error
    rate = float(special.expit(theta))
    low, high = (float(special.expit(theta + side * half_width)) for side in (-1, 1))
    return LengthControlled(Estimate(rate, rate * (1 - rate) * error, low, high), float(weights[1]))


def _logistic(inputs: FloatArray, won: FloatArray) -> FloatArray:
    """The weights [k] of the least Σ −log likelihood + ½ `_RIDGE` ‖weights‖², by Newton's method with halved steps."""

    def loss(weights: FloatArray) -> float:
        odds = inputs @ weights
        return float(np.sum(np.logaddexp(0, odds) - won * odds) + _RIDGE / 2 * weights @ weights)

    weights = np.zeros(inputs.shape[1])
    for _ in range(_STEPS):
        expected = special.expit(inputs @ weights)
        gradient = inputs.T @ (expected - won) + _RIDGE * weights
        step = np.linalg.solve(_curvature(inputs, expected), gradient)
        while np.abs(step).max() > 1e-12 and loss(weights - step) > loss(weights):
            step = step / 2
        weights = weights - step
        if np.abs(step).max() <= 1e-10:
            break
    return weights


def _curvature(inputs: FloatArray, expected: FloatArray) -> FloatArray:
    return (inputs * (expected * (1 - expected))[:, None]).T @ inputs + _RIDGE * np.eye(inputs.shape[1])


def _quantile(n: int) -> float:
    return float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) if n > 1 else math.nan
