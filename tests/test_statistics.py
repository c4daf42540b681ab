"""The bootstrap against known truths, simulated and in closed form; Holm's adjustment by hand."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from activedpo_jax.record.statistics import Estimate, hierarchical_bootstrap, holm, verdict


def simulated(
    rng: np.random.Generator, seeds: int, prompts: int, spread: tuple[float, float, float], shared: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Differences whose true mean is 0: spreads of seeds, of prompts, and of single outcomes."""
    of_seeds = rng.normal(0, spread[0], seeds)
    of_prompts = np.broadcast_to(rng.normal(0, spread[1], (1 if shared else seeds, prompts)), (seeds, prompts))
    values = of_seeds[:, None] + of_prompts + rng.normal(0, spread[2], (seeds, prompts))
    names = [np.arange(prompts) + (0 if shared else s * prompts) for s in range(seeds)]
    return list(values), names


@pytest.mark.parametrize(
    ("seeds", "spread", "shared", "expected"),
    [
        (3, (1.0, 0.5, 0.5), False, 0.95),
        (3, (1.0, 2.0, 0.5), True, 0.93),  # Satterthwaite's degrees of freedom, of so few seeds
        (5, (0.05, 2.0, 0.1), True, 0.95),  # prompts vary far more than seeds do
        (5, (0.0, 0.0, 1.0), True, 0.95),  # nothing but noise of single outcomes, in the draws of seeds and of prompts
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(
    seeds: int, spread: tuple[float, float, float], shared: bool, expected: float
) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(600):
        values, names = simulated(rng, seeds, 40, spread, shared)
        low, high = hierarchical_bootstrap(values, names, 400, trial).interval(0.95)
        covered += low <= 0 <= high
    # 600 trials: three standard errors of 0.95 are 0.027.
    assert abs(covered / 600 - expected) < 0.027


def test_prompts_that_seeds_share_are_not_independent() -> None:
    """Seeds that agree on prompts drawn once know less than their agreement says: the bootstrap sees it, a t test over
    seeds does not."""
    rng = np.random.default_rng(1)
    naive = covered = 0
    for trial in range(200):
        values, names = simulated(rng, 5, 40, (0.05, 2.0, 0.1), True)
        low, high = hierarchical_bootstrap(values, names, 300, trial).interval(0.95)
        covered += low <= 0 <= high
        low, high = stats.ttest_1samp([v.mean() for v in values], 0).confidence_interval(0.95)
        naive += low <= 0 <= high
    assert naive / 200 < 0.6 and covered / 200 > 0.9


def test_without_shared_prompts_it_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(2)
    sizes = (7, 30, 11, 25)  # a seed's held-out set may be smaller than another's
    values = [rng.normal(0.1, 1, n) for n in sizes]
    names = [np.arange(n) + 1000 * s for s, n in enumerate(sizes)]
    found = hierarchical_bootstrap(values, names, 40_000)
    truth = stats.ttest_1samp([v.mean() for v in values], 0)
    assert found.freedom == 3 and found.mean == pytest.approx(np.mean([v.mean() for v in values]))
    assert found.interval(0.95) == pytest.approx(tuple(truth.confidence_interval(0.95)), rel=0.02, abs=0.01)
    assert found.p_value() == pytest.approx(truth.pvalue, rel=0.05)


def test_standard_error_of_crossed_seeds_and_prompts_in_closed_form() -> None:
    """Without noise of single outcomes: σ²(seeds)/S + σ²(prompts)/P."""
    of_seeds, of_prompts = np.array([0.0, 0.3, -0.2]), np.random.default_rng(3).normal(0, 1, 50)
    values = [a + of_prompts for a in of_seeds]
    found = hierarchical_bootstrap(values, [np.arange(50)] * 3, 40_000)
    between, common = of_seeds.var(ddof=1) / 3, of_prompts.var() / 50
    assert found.error == pytest.approx(math.sqrt(between + common), rel=0.02)
    assert found.freedom == pytest.approx((between + common) ** 2 / (between**2 / 2 + common**2 / 49), rel=0.1)


def test_prompts_that_some_seeds_share_count_for_these() -> None:
    """The covariance of the means of two seeds is that of the prompts that both have."""
    values = np.random.default_rng(5).normal(0, 1, 60)
    names = [np.arange(40), np.arange(20, 60)]
    found = hierarchical_bootstrap([values[ids] for ids in names], names, 60_000)
    means = np.array([values[ids].mean() for ids in names])
    shared = np.arange(20, 40)
    covariance = np.sum((values[shared] - means[0]) * (values[shared] - means[1])) / 40**2
    assert found.error == pytest.approx(math.sqrt(means.var(ddof=1) / 2 + covariance), rel=0.03)


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    """Every pair four times over, under its prompt: nothing is known that was not known before."""
    rng = np.random.default_rng(4)
    values, names = simulated(rng, 3, 20, (0.1, 1, 0.1), True)
    once = hierarchical_bootstrap(values, names, 2000)
    often = hierarchical_bootstrap([np.repeat(v, 4) for v in values], [np.repeat(n, 4) for n in names], 2000)
    as_prompts = hierarchical_bootstrap([np.repeat(v, 4) for v in values], [np.arange(80)] * 3, 2000)
    assert often == pytest.approx(once)
    assert as_prompts.error < 0.7 * once.error


def test_what_cannot_be_tested_and_what_does_not_vary() -> None:
    one = hierarchical_bootstrap([np.array([1.0, 0.0])], [np.arange(2)], 100)
    assert one.mean == 0.5 and all(math.isnan(x) for x in (*one.interval(0.95), one.p_value(), one.equivalence_p(1)))
    same = hierarchical_bootstrap([np.zeros(4)] * 3, [np.arange(4)] * 3, 100)
    assert same.interval(0.95) == (0, 0) and same.p_value() == 1 and same.equivalence_p(0.01) == 0
    always = hierarchical_bootstrap([np.full(4, 0.25)] * 3, [np.arange(4)] * 3, 100)
    assert always.interval(0.95) == (0.25, 0.25) and always.p_value() == 0 and always.equivalence_p(0.1) == 1


def test_holms_adjustment_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, and what falls stays up.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.4]) == pytest.approx([0.8, 0.8]) and holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == [] and holm([0.2]) == [0.2]
    adjusted = holm([math.nan, 0.02, 0.01])
    assert math.isnan(adjusted[0]) and adjusted[1:] == pytest.approx([0.02, 0.02])


@hypothesis.given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@hypothesis.settings(deadline=None, max_examples=50)
def test_holm_lies_between_no_adjustment_and_bonferronis(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1, len(p_values) * p) + 1e-12
    assert np.argsort(adjusted, kind="stable").tolist() == np.argsort(p_values, kind="stable").tolist() or len(
        set(adjusted)
    ) < len(adjusted)


def test_two_one_sided_tests_are_the_interval_of_90_percent() -> None:
    for mean in np.linspace(-0.05, 0.05, 41):
        estimate = Estimate(float(mean), 0.01, 4.0)
        low, high = estimate.interval(0.9)
        assert (estimate.equivalence_p(0.03) <= 0.05) == (low > -0.03 and high < 0.03)


@pytest.mark.parametrize(
    ("mean", "p", "equivalence", "expected"),
    [
        (0.1, 0.01, 0.9, "better"),
        (-0.1, 0.01, 0.9, "worse"),
        (0.01, 0.4, 0.02, "equal"),
        (0.01, 0.01, 0.02, "equal"),  # surely not 0, and surely too little to count
        (0.1, 0.2, 0.9, "open"),
        (0.1, math.nan, math.nan, "open"),
    ],
)
def test_verdicts(mean: float, p: float, equivalence: float, expected: str) -> None:
    assert verdict(mean, p, equivalence, 0.05) == expected


def test_nothing_is_no_difference_without_seeds_to_show_it() -> None:
    """A wide interval around 0 is open, however near to 0 its middle."""
    estimate = Estimate(0.0, 0.02, 2.0)
    assert verdict(0.0, estimate.p_value(), estimate.equivalence_p(0.02), 0.05) == "open"
