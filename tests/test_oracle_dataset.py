"""The data's labels, their noise in the long run, and that a label depends on the seed and the pair alone."""

import numpy as np
import pytest

from activedpo_jax.data.groups import PairPool
from activedpo_jax.oracles.dataset import DatasetOracle, answers
from activedpo_jax.oracles.labels import Oracle, Pending, Question
from activedpo_jax.oracles.noise import Noise


def make_pool(preferences: list[int], rewards: list[list[float]] | None, ids: list[str] | None = None) -> PairPool:
    n = len(preferences)
    return PairPool(
        prompt_tokens=[np.array([1], np.int32)] * n,
        response_tokens=[[np.array([2], np.int32), np.array([3], np.int32)]] * n,
        pairs=np.stack([np.arange(n), np.zeros(n), np.ones(n)], axis=1).astype(np.int32),
        pair_ids=ids or [f"pair{i}" for i in range(n)],
        preferences=np.array(preferences, np.int8),
        rewards=None if rewards is None else np.array(rewards, np.float32),
        prompt_texts=["p"] * n,
        response_texts=[["x", "y"]] * n,
    )


def question(pair_id: str) -> Question:
    return Question(pair_id, "p", "x", "y", None, 1)


NAN = [float("nan")] * 2


def test_labels_of_the_data_come_first_and_then_its_rewards() -> None:
    pool = make_pool([0, 1, 0, -1, -1], [NAN, NAN, [1, 2], [1, 2], [2, 1]])
    labels = answers(pool, Noise("none", 0.0, 1.0, 0))
    assert labels.dtype == np.int8 and labels.tolist() == [0, 1, 0, 1, 0]
    assert answers(make_pool([1, 0], None), Noise("none", 0.0, 1.0, 3)).tolist() == [1, 0]


def test_equal_rewards_are_a_coin() -> None:
    labels = answers(make_pool([-1] * 4000, [[2, 2]] * 4000), Noise("none", 0.0, 1.0, 0))
    assert abs(labels.mean() - 0.5) < 0.03  # 3.8 standard deviations


@pytest.mark.parametrize(("probability", "tolerance"), [(0.0, 0.0), (0.2, 0.05), (1.0, 0.0)])
def test_flips(probability: float, tolerance: float) -> None:
    truth = np.arange(4000) % 3 == 0
    labels = answers(make_pool(truth.astype(int).tolist(), None), Noise("flip", probability, 1.0, 0))
    for side in (False, True):
        assert abs(np.mean(labels[truth == side] != side) - probability) <= tolerance  # 4.5 standard deviations


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("margin", [-1.0, 0.0, 2.0])
def test_bradley_terry(temperature: float, margin: float) -> None:
    # The labels in the data are not what is drawn from.
    labels = answers(make_pool([0] * 4000, [[margin + 3, 3]] * 4000), Noise("bradley_terry", 0.0, temperature, 0))
    first = 1 / (1 + np.exp(-margin / temperature))
    assert abs(np.mean(labels == 0) - first) < 4 * (first * (1 - first) / 4000) ** 0.5


@pytest.mark.filterwarnings("error")  # of an overflow
def test_bradley_terry_far_apart() -> None:
    labels = answers(make_pool([-1, -1], [[3e38, -3e38], [-3e38, 3e38]]), Noise("bradley_terry", 0.0, 1e-3, 0))
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize(("noise", "probability"), [("none", 0.0), ("flip", 0.5), ("bradley_terry", 0.0)])
def test_a_label_depends_on_seed_and_pair_alone(noise: str, probability: float) -> None:
    n = 200
    preferences, rewards = [-1] * n, [[0.0, 0.0]] * n  # pure chance
    pool = make_pool(preferences, rewards)
    labels = answers(pool, Noise(noise, probability, 1.0, 5))
    rows = np.random.default_rng(0).permutation(n)[:50]
    oracle: Oracle = DatasetOracle(pool, Noise(noise, probability, 1.0, 5))
    said = oracle.ask([question(pool.pair_ids[row]) for row in rows])
    assert not isinstance(said, Pending)
    assert [label.pair_id for label in said] == [pool.pair_ids[row] for row in rows]
    assert [label.preference == "second" for label in said] == labels[rows].tolist()
    smaller = make_pool(preferences[:50], rewards[:50], [pool.pair_ids[row] for row in rows])
    np.testing.assert_array_equal(answers(smaller, Noise(noise, probability, 1.0, 5)), labels[rows])
    assert 0.3 < np.mean(answers(pool, Noise(noise, probability, 1.0, 6)) == labels) < 0.7


def test_pairs_that_nobody_can_label() -> None:
    pool = make_pool([0, -1, -1], [NAN, NAN, NAN])
    with pytest.raises(
        ValueError, match=r"pair 'pair1' \(and 1 others\) has no label; expected a preference or rewards"
    ):
        answers(pool, Noise("none", 0.0, 1.0, 0))
    with pytest.raises(ValueError, match="'pair1'"):
        answers(make_pool([0, -1], None), Noise("flip", 0.1, 1.0, 0))
    with pytest.raises(ValueError, match=r"'pair0' \(and 2 others\).*expected rewards .*bradley_terry"):
        answers(pool, Noise("bradley_terry", 0.0, 1.0, 0))
    # Pairs that are not asked about need no label.
    assert [label.preference for label in DatasetOracle(pool, Noise()).ask([question("pair0")])] == ["first"]
