"""Win rates against SciPy's tests and optimiser, closed forms, and what swapping the models must do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from activedpo_jax.evaluation import win_rates


@st.composite
def contests(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wins and lengths of 2 to 40 prompts."""
    n = draw(st.integers(2, 40))
    won = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n, max_size=n))
    lengths = draw(st.lists(st.integers(1, 200), min_size=2 * n, max_size=2 * n))
    return np.array(won), *np.array(lengths, float).reshape(2, n)


def noisy(theta: float, phi: float, n: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wins drawn from the model itself, with lengths that favour the first."""
    rng = np.random.default_rng(0)
    lengths, others = 60 + 25 * rng.standard_normal(n), 40 + 25 * rng.standard_normal(n)
    difference = lengths - others
    odds = theta + phi * np.tanh(difference / difference.std())
    return (rng.random(n) < 1 / (1 + np.exp(-odds))).astype(float), lengths, others


@settings(deadline=None, max_examples=30)
@given(contests())
def test_the_fit_is_that_of_scipys_optimiser(contest: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    won, lengths, others = contest
    difference = lengths - others
    spread = difference.std(ddof=1)
    x = np.tanh(difference / spread) if spread else np.zeros(len(won))

    def loss(weights: np.ndarray) -> float:
        odds = weights[0] + weights[1] * x
        return float(np.sum(np.logaddexp(0, odds) - won * odds) + 0.005 * np.sum(weights**2))

    found = win_rates.length_controlled(*contest)
    best = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
    theta = np.log(found.win_rate.mean / (1 - found.win_rate.mean))
    assert loss(np.array([theta, found.length_effect])) <= best.fun + 1e-8
    np.testing.assert_allclose([theta, found.length_effect], best.x, rtol=1e-2, atol=1e-3)


@settings(deadline=None, max_examples=30)
@given(contests())
def test_swapping_the_models_turns_the_win_rates_round(contest: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    won, lengths, others = contest
    found, turned = (win_rates.length_controlled(*x) for x in (contest, (1 - won, others, lengths)))
    mean, error, low, high = found.win_rate
    np.testing.assert_allclose(turned.win_rate, (1 - mean, error, 1 - high, 1 - low), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(turned.length_effect, found.length_effect, rtol=1e-6, atol=1e-9)
    raw = win_rates.mean_of(won)
    assert win_rates.mean_of(1 - won).mean == pytest.approx(1 - raw.mean)


def test_equal_lengths_leave_the_raw_win_rate() -> None:
    """In closed form: without lengths the fit is the mean, but for the ridge, and the variance the binomial one."""
    won = np.repeat([1.0, 0.5, 0.0], [120, 10, 70])
    found, raw = win_rates.length_controlled(won, np.full(200, 30.0), np.full(200, 30.0)), win_rates.mean_of(won)
    assert found.length_effect == 0
    np.testing.assert_allclose(found.win_rate[:2], raw[:2], atol=2e-4)
    np.testing.assert_allclose(found.win_rate[2:], raw[2:], atol=5e-3)  # of log-odds, and of the mean itself


@pytest.mark.parametrize("phi", [0.0, 1.5])
def test_the_effect_of_length_is_taken_out(phi: float) -> None:
    contest = noisy(0.4, phi)
    found, raw = win_rates.length_controlled(*contest), win_rates.mean_of(contest[0])
    true = 1 / (1 + np.exp(-0.4))
    assert abs(found.win_rate.mean - true) < 4 * found.win_rate.standard_error < 0.03
    assert found.win_rate.low < found.win_rate.mean < found.win_rate.high
    assert found.length_effect == pytest.approx(phi, abs=0.1)
    assert (raw.mean - true > 0.05) == (phi > 0)


def test_limits_hold_the_truth_as_often_as_they_say() -> None:
    """The standard error of θ comes of a sandwich: over drawn data it is the spread of the estimates."""
    found = []
    for i in range(300):
        rng = np.random.default_rng(i)
        lengths, others = 50 + 20 * rng.standard_normal((2, 150))
        difference = lengths - others
        odds = 0.3 + np.tanh(difference / difference.std())
        won = (rng.random(150) < 1 / (1 + np.exp(-odds))).astype(float)
        found.append(win_rates.length_controlled(won, lengths, others).win_rate)
    inside = np.mean([x.low < 1 / (1 + np.exp(-0.3)) < x.high for x in found])
    assert 0.91 < inside < 0.985
    assert np.std([x.mean for x in found]) == pytest.approx(np.mean([x.standard_error for x in found]), rel=0.15)


def test_one_model_that_always_wins_is_finite() -> None:
    found = win_rates.length_controlled(np.ones(50), np.arange(50.0), np.zeros(50))
    assert 0.95 < found.win_rate.mean < 1 and np.isfinite(found.win_rate).all()


def test_wins_and_their_mean() -> None:
    won = win_rates.wins(np.array([1.0, 2.0, 3.0, 3.0]), np.array([2.0, 2.0, 1.0, 0.0]))
    np.testing.assert_array_equal(won, [0, 0.5, 1, 1])
    found, truth = win_rates.mean_of(won), stats.ttest_1samp(won, 0).confidence_interval(0.95)
    np.testing.assert_allclose(found, [0.625, stats.sem(won), truth.low, truth.high])
    assert np.isnan(win_rates.mean_of(won[:1])[1:]).all()
