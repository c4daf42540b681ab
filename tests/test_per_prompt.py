"""Strategies that choose on every prompt which two responses to show, against loops over prompts in float64, written
from the definitions; rules that draw, against the distribution that they should draw from."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.posterior import condition
from activedpo_jax.selection.strategies import STRATEGIES, Evidence
from activedpo_jax.selection.strategies.per_prompt import NO_CHOICE
from tests.test_selection import mesh_of

PER_PROMPT = sorted(name for name, strategy in STRATEGIES.items() if "rewards" in strategy.needs)
N, D, K, LAM, SCALE = 64, 8, 14, 0.5, 0.7
ONE, EIGHT = (1, 1, 1), (2, 2, 2)


class Setting(NamedTuple):
    evidence: Evidence
    inverse: np.ndarray  # V⁻¹, [D, D] float64


@functools.cache
def program(name: str, shape: tuple[int, int, int], num_picks: int) -> Any:
    select = STRATEGIES[name].select
    return jax.jit(lambda evidence, available, key: select(evidence, available, key, num_picks, 4, mesh_of(shape)))


def pick(
    name: str,
    evidence: Evidence,
    available: Any,
    shape: tuple[int, int, int] = ONE,
    num_picks: int = K,
    key: int = 0,
) -> Picks:
    """The picks of a compiled strategy, of evidence about pairs cut over the devices."""
    by_rows, whole = (NamedSharding(mesh_of(shape), s) for s in (P(mesh_of(shape).axis_names), P()))
    rows = {field for field in evidence if field not in ("posterior", "lam", "width_scale")}
    used = STRATEGIES[name].needs | {"groups", "responses", "posterior", "lam", "width_scale"}
    placed = {
        field: jax.device_put(np.asarray(x), by_rows if field in rows else whole)
        for field, x in evidence.items()
        if field in used  # what a strategy does not name it does not look at
    }
    available = jax.device_put(np.asarray(available), by_rows)
    return jax.tree.map(np.asarray, program(name, shape, num_picks)(placed, available, jax.random.key(key)))


def of_responses(seed: int, groups: Any, responses: Any, rewards: Any, vectors: Any) -> Setting:
    """Evidence about pairs [N, 2] of responses with these rewards and ĝ, given for each row's two responses."""
    known = np.random.default_rng(seed).normal(size=(5, D))
    rewards, vectors = np.asarray(rewards, np.float32), np.asarray(vectors, np.float32)
    evidence = Evidence(
        groups=groups.astype(np.int32),
        responses=responses.astype(np.int32),
        rewards=rewards,
        response_features=vectors,
        features=vectors[:, 0] - vectors[:, 1],
        posterior=np.asarray(condition(jnp.asarray(known, jnp.float32), jnp.ones(5, bool), LAM)),
        lam=LAM,
        width_scale=SCALE,
    )
    return Setting(evidence, np.linalg.inv(LAM * np.eye(D) + known.T @ known))


def setting(seed: int, flat: bool = False) -> Setting:
    """Prompts of 2 to 7 responses in no order, some of their pairs left out; groups have any numbers."""
    rng, rows = np.random.default_rng(seed), []
    numbers = rng.permutation(200)
    for group in numbers:
        m = int(rng.integers(2, 8))
        kept = [pair for pair in itertools.combinations(range(m), 2) if rng.random() < 0.85]
        mu, vectors = np.zeros(m) if flat else rng.normal(size=m), rng.normal(size=(m, D))
        rows += [(group, pair, mu[list(pair)], vectors[list(pair)]) for pair in kept]
    chosen = [rows[row] for row in rng.permutation(N)]
    columns = [np.array([row[column] for row in chosen]) for column in range(4)]
    return of_responses(seed, *columns)


def some_available(seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 1]).random(N) < 0.7


# -------------------------------------------------------------------------------------------- the definitions


class Prompt:
    """What the definitions speak of, of one prompt: μ_j, and Δ_ij and c ‖φ‖ of the pairs that may be shown."""

    def __init__(self, found: Setting, rows: list[int]) -> None:
        evidence = found.evidence
        self.row_of: dict[tuple[int, int], int] = {}
        self.delta: dict[tuple[int, int], float] = {}
        self.width: dict[tuple[int, int], float] = {}
        for row in rows:
            i, j = (int(x) for x in evidence["responses"][row])
            mu = evidence["rewards"][row].astype(np.float64)
            g_i, g_j = evidence["response_features"][row].astype(np.float64)
            width = SCALE * math.sqrt((g_i - g_j) @ found.inverse @ (g_i - g_j))
            for a, b, sign in ((i, j, 1), (j, i, -1)):
                self.row_of[a, b], self.width[a, b] = row, width
                self.delta[a, b] = sign * float(mu[0] - mu[1])
        self.pairs = list(self.delta)

    def opponents(self, i: int) -> list[int]:
        return [b for a, b in self.pairs if a == i]

    def low(self, i: int, j: int) -> float:
        return self.delta[i, j] - self.width[i, j]

    def high(self, i: int, j: int) -> float:
        return self.delta[i, j] + self.width[i, j]

    @property
    def candidates(self) -> list[int]:
        names = sorted({a for a, _ in self.pairs})
        return [i for i in names if all(self.high(i, j) >= 0 for j in self.opponents(i))]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def deltaucb(prompt: Prompt) -> tuple[tuple[int, int], float]:
    best = max(prompt.pairs, key=lambda pair: prompt.high(*pair))
    return best, prompt.high(*best)


def spread(prompt: Prompt, pair: tuple[int, int]) -> float:
    return sigmoid(prompt.high(*pair)) - sigmoid(prompt.low(*pair))


def infomax(prompt: Prompt) -> tuple[tuple[int, int], float]:
    best = max(prompt.pairs, key=lambda pair: spread(prompt, pair))
    return best, spread(prompt, best)


def maxminlcb(prompt: Prompt) -> tuple[tuple[int, int], float]:
    allowed = [(i, j) for i, j in prompt.pairs if i in prompt.candidates and j in prompt.candidates] or prompt.pairs
    worst = {i: min((pair for pair in allowed if pair[0] == i), key=lambda p: prompt.low(*p)) for i, _ in allowed}
    best = max(worst, key=lambda i: prompt.low(*worst[i]))
    return worst[best], prompt.low(*worst[best])


def deltaquantile(prompt: Prompt) -> tuple[tuple[int, int], float]:
    falling = sorted(prompt.pairs, key=lambda pair: -prompt.high(*pair))
    return falling[len(falling) * 5 // 100], 0.0


DEFINITIONS: dict[str, Callable[[Prompt], tuple[tuple[int, int], float]]] = {
    "deltaucb": deltaucb,
    "infomax": infomax,
    "maxminlcb": maxminlcb,
    "deltaquantile": deltaquantile,
}


def turns(name: str, found: Setting, available: np.ndarray) -> list[dict[int, float]]:
    """Each time that the rule is asked, the rows that it proposes, with their scores."""
    left, out = set(np.flatnonzero(available).tolist()), []
    while left:
        proposed = {}
        for group in sorted({int(found.evidence["groups"][row]) for row in left}):
            prompt = Prompt(found, sorted(row for row in left if found.evidence["groups"][row] == group))
            pair, score = DEFINITIONS[name](prompt)
            proposed[prompt.row_of[pair]] = score
        out.append(proposed)
        left -= set(proposed)
    return out


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_picks_are_those_of_the_definition(name: str) -> None:
    """Prompt by prompt; with more picks than prompts, of what is left of each."""
    again = 0
    for seed in range(12):
        found = setting(seed)
        available = some_available(seed) if seed % 4 else np.ones(N, bool)
        if seed % 3 == 0:  # a few prompts only
            available &= np.isin(found.evidence["groups"], np.unique(found.evidence["groups"])[:4])
        picks = pick(name, found.evidence, available, key=seed)
        made = 0
        for number, proposed in enumerate(turns(name, found, available)):
            rows = picks.rows[made : made + len(proposed)].tolist()
            if STRATEGIES[name].ranks:
                expected = sorted(proposed, key=lambda row: -proposed[row])[: len(rows)]
                assert rows == expected
                scores = [proposed[row] for row in expected]
                np.testing.assert_allclose(picks.scores[made : made + len(rows)], scores, rtol=1e-4, atol=1e-5)
            else:
                assert len(set(rows)) == len(rows) and set(rows) <= set(proposed)
            made += len(rows)
            again += number > 0 and len(rows) > 0
            if made == K:
                break
        assert picks.rows[made:].tolist() == [-1] * (K - made) and not picks.fallback
    assert again > 0


def test_the_quantile_is_not_always_the_first() -> None:
    """From five responses on; the rule would be `deltaucb`'s else."""
    found = setting(1)
    by_delta, by_quantile = (set(turns(name, found, np.ones(N, bool))[0]) for name in ("deltaucb", "deltaquantile"))
    assert by_delta != by_quantile


# ------------------------------------------------------------------------------------------ rules that draw

PROMPTS = 2_000
DRAWS = 200_000


def thompson(prompt: Prompt, mu: np.ndarray, widths: np.ndarray, sign: float) -> dict[tuple[int, int], float]:
    """By simulation, drawing until the second response is another that may be shown with the first."""
    rng, m = np.random.default_rng(0), len(mu)
    pending = np.argmax(mu + widths * rng.uniform(-1, 1, (DRAWS, m)), axis=1)
    counts: dict[tuple[int, int], float] = dict.fromkeys(prompt.row_of, 0.0)
    allowed = np.array([[(i, j) in prompt.row_of for j in range(m)] for i in range(m)])
    for _ in range(30):
        second = np.argmax(sign * mu + widths * rng.uniform(-1, 1, (len(pending), m)), axis=1)
        done = allowed[pending, second]
        for i, j in zip(pending[done], second[done], strict=True):
            counts[i, j] += 1
        pending = pending[~done]
    for i in pending:
        for j in prompt.opponents(i):
            counts[i, j] += 1 / len(prompt.opponents(i))
    return {pair: count / DRAWS for pair, count in counts.items()}


def rucb(prompt: Prompt) -> dict[tuple[int, int], float]:
    found = dict.fromkeys(prompt.pairs, 0.0)
    for c in prompt.candidates:
        d = max(prompt.opponents(c), key=lambda j: sigmoid(prompt.high(j, c)))
        found[c, d] += 1 / len(prompt.candidates)
    return found


def ids(prompt: Prompt) -> dict[tuple[int, int], float]:
    """The best mixture of two pairs, among all in steps of 1/2000."""
    names = sorted({a for a, _ in prompt.pairs})
    rho = {i: max(0.0, *(sigmoid(prompt.high(j, i)) - 0.5 for j in prompt.opponents(i))) for i in names}
    pairs = [pair for pair in prompt.pairs if pair[0] < pair[1]]
    regret = {(i, j): (rho[i] + rho[j]) / 2 for i, j in pairs}
    information = {pair: spread(prompt, pair) ** 2 / 4 for pair in pairs}
    share, best, found = np.linspace(0, 1, 2001), np.inf, {}
    for a, b in itertools.product(pairs, pairs):
        ratio = (share * regret[a] + (1 - share) * regret[b]) ** 2
        ratio /= share * information[a] + (1 - share) * information[b]
        if ratio.min() < best - 1e-12:
            best, q = ratio.min(), float(share[ratio.argmin()])
            found = {a: q, b: 1 - q} if a != b else {a: 1.0}
    return found


def ultrafeedback(prompt: Prompt, mu: np.ndarray) -> dict[tuple[int, int], float]:
    """Every four of five responses is as likely as any other."""
    found, fours = dict.fromkeys(prompt.pairs, 0.0), list(itertools.combinations(range(len(mu)), 4))
    for four in fours:
        best = max((i for i in four if set(prompt.opponents(i)) & set(four)), key=lambda i: mu[i])
        others = set(prompt.opponents(best)) & set(four)
        for other in others:
            found[best, other] += 1 / len(fours) / len(others)
    return found


@pytest.mark.parametrize("name", ["dts", "drts", "rucb", "ids", "ultrafeedback"])
def test_draws_have_the_distribution_of_the_definition(name: str) -> None:
    """The same prompt of five responses 2,000 times; the second time, two of its pairs may not be picked."""
    m = 5
    pairs = np.array(list(itertools.combinations(range(m), 2)))
    groups, responses = np.repeat(np.arange(PROMPTS), len(pairs)), np.tile(pairs, (PROMPTS, 1))
    mixed, told_apart = 0, False
    for seed, left_out, scale in [(1, [], 0.4), (2, [], 2.0), (3, [2, 5], 2.0)]:
        rng = np.random.default_rng(seed)
        mu, vectors = (scale * rng.normal(size=m)).astype(np.float32), rng.normal(size=(m, D)).astype(np.float32)
        found = of_responses(seed, groups, responses, mu[responses], vectors[responses])
        open_rows = [row for row in range(len(pairs)) if row not in left_out]
        prompt = Prompt(found, open_rows)
        told_apart |= 1 < len(prompt.candidates) < m
        if name in ("dts", "drts"):
            exact = vectors.astype(np.float64)
            widths = SCALE * np.sqrt(np.einsum("md,de,me->m", exact, found.inverse, exact))
            expected = thompson(prompt, mu.astype(np.float64), widths, 1 if name == "dts" else -1)
        else:
            expected = (
                {"rucb": rucb, "ids": ids}[name](prompt) if name != "ultrafeedback" else ultrafeedback(prompt, mu)
            )
        available = np.tile(~np.isin(np.arange(len(pairs)), left_out), PROMPTS)
        picks = pick(name, found.evidence, available, num_picks=PROMPTS, key=seed)
        assert sorted(groups[picks.rows].tolist()) == list(range(PROMPTS))  # one of each prompt
        for row in range(len(pairs)):
            i, j = pairs[row].tolist()
            p = expected.get((i, j), 0.0) + expected.get((j, i), 0.0)
            mixed += 0.05 < p < 0.95
            share = np.mean(picks.rows % len(pairs) == row)
            assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / PROMPTS) + 2e-3, (seed, row)
    assert mixed > 0 and told_apart


# ---------------------------------------------------------------------------------------- what holds for all


def test_the_rules_are_all_here() -> None:
    names = "deltaquantile deltaucb drts dts ids infomax maxminlcb rucb ultrafeedback"
    assert names.split() == PER_PROMPT


@pytest.mark.parametrize("name", PER_PROMPT)
def test_missing_evidence_is_named(name: str) -> None:
    for need in STRATEGIES[name].needs:
        evidence = {**setting(0).evidence, need: None}
        with pytest.raises(ValueError, match=f"strategy {name} needs the evidence .*`{need}`"):
            STRATEGIES[name].select(evidence, jnp.ones(N, bool), jax.random.key(0), K, 4, mesh_of(ONE))


@pytest.mark.parametrize("name", PER_PROMPT)
def test_the_same_on_eight_devices_and_in_any_order(name: str) -> None:
    """A new pair each time, of one that may be picked, and first one of each prompt; the order of rows breaks only
    ties."""
    for seed in range(4):
        found, available = setting(seed), some_available(seed)
        picks = pick(name, found.evidence, available, key=seed)
        assert available[picks.rows].all() and len(set(picks.rows.tolist())) == K and not picks.fallback
        assert picks.scores.any() == STRATEGIES[name].ranks
        groups = found.evidence["groups"]
        first = groups[picks.rows[: len(set(groups[available].tolist()))]]
        assert len(set(first.tolist())) == len(first)
        eight = pick(name, found.evidence, available, EIGHT, key=seed)
        assert eight.rows.tolist() == picks.rows.tolist()
        np.testing.assert_allclose(eight.scores, picks.scores, rtol=1e-5, atol=1e-6)
        order = np.random.default_rng(seed).permutation(N)
        moved = {f: x if f in ("posterior", "lam", "width_scale") else x[order] for f, x in found.evidence.items()}
        again = pick(name, moved, available[order], key=seed)
        assert order[again.rows].tolist() == picks.rows.tolist()


@pytest.mark.parametrize("name", PER_PROMPT)
def test_rows_run_out(name: str) -> None:
    """Fewer rows than picks; evidence about those that may not be picked holds anything."""
    found = setting(5)
    groups = found.evidence["groups"]
    several = next(g for g in np.unique(groups) if np.sum(groups == g) > 2)
    available = groups == several
    evidence = {
        field: np.where(available.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan)
        if field in ("features", "response_features", "rewards")
        else x
        for field, x in found.evidence.items()
    }
    picks = pick(name, evidence, available)
    count = int(available.sum())
    assert sorted(picks.rows[:count].tolist()) == np.flatnonzero(available).tolist()
    assert picks.rows[count:].tolist() == [-1] * (K - count) and not picks.scores[count:].any()
    assert not picks.fallback and np.isfinite(picks.scores).all()
    none = pick(name, evidence, np.zeros(N, bool))
    assert none.rows.tolist() == [-1] * K and not none.scores.any() and not none.fallback


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", PER_PROMPT)
def test_numbers_that_are_not_finite_are_not_ranked(name: str, value: float) -> None:
    found = setting(6)
    for field in STRATEGIES[name].needs:
        broken = np.array(found.evidence[field])
        broken[13].flat[-1] = value
        picks = pick(name, {**found.evidence, field: broken}, np.ones(N, bool))
        assert picks.rows.tolist() == [-1] * K and np.isnan(picks.scores).all() and not picks.fallback


@pytest.mark.parametrize("name", PER_PROMPT)
def test_without_a_choice_it_is_random_and_says_so(name: str) -> None:
    """One pair a prompt, as with two responses, or what is left of more."""
    found = setting(7)
    groups = found.evidence["groups"]
    available = np.isin(np.arange(N), np.unique(groups, return_index=True)[1])
    picks = pick(name, found.evidence, available, key=3)
    drawn = STRATEGIES["random"].select({}, jnp.asarray(available), jax.random.key(3), K, 4, mesh_of(ONE))
    assert picks.fallback and picks.rows.tolist() == drawn.rows.tolist() and not picks.scores.any()
    assert NO_CHOICE in STRATEGIES[name].falls_back


@pytest.mark.parametrize("name", PER_PROMPT)
def test_before_any_training_widths_rank_and_means_do_not(name: str) -> None:
    """All rewards are zero in the first round."""
    found = setting(8, flat=True)
    picks = pick(name, found.evidence, np.ones(N, bool))
    assert picks.fallback == (name == "ultrafeedback")
    if name in ("deltaucb", "infomax"):
        widest = turns("deltaucb", found, np.ones(N, bool))[0]
        assert set(picks.rows.tolist()) <= set(widest) or len(widest) < K
        assert picks.rows[0] == max(widest, key=lambda row: widest[row])
