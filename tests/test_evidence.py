"""Every kind of evidence against a computation pair by pair, and independent of everything that is not the text."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from activedpo_jax.data.groups import Bucket, Groups, Texts, group_pairs, pad_groups
from activedpo_jax.evidence import registry
from activedpo_jax.evidence.entropies import sampled
from activedpo_jax.evidence.gradients import pair_features
from activedpo_jax.evidence.registry import EVIDENCE, compute
from activedpo_jax.evidence.spec import EvidenceSpec, FeatureSpec
from activedpo_jax.layout import BATCH_AXES
from activedpo_jax.models.decoder import unstack
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy, response_logps
from activedpo_jax.models.token_hash import mix, pair_digests, prompt_hash
from activedpo_jax.selection.strategies import STRATEGIES
from tests import tiny
from tests.test_selection import mesh_of

DIM, BETA, SEED = 193, 0.3, jnp.uint32(5)
BOUND = 1e-5
# Those of the other kinds are checked each time; these are made of them.
_MADE_OF_OTHERS = ("fisher_embeddings", "fisher_features", "response_features")
KINDS = [pytest.param(name, marks=[pytest.mark.slow] * (name in _MADE_OF_OTHERS)) for name in sorted(EVIDENCE)]
UNTIED = dataclasses.replace(tiny.MODEL, tie_embeddings=False)


def spec(shape: tuple[int, int, int] = (1, 1, 1), **changes: Any) -> EvidenceSpec:
    usual = EvidenceSpec(FeatureSpec(DIM), BETA, mesh_of(shape), entropy_samples=4, entropy_length=5, stop=(3, 40))
    return dataclasses.replace(usual, **changes)


def policy_and_lora(**changes: Any) -> tuple[Policy, Lora]:
    """π_ref and π_θ with adapters that are both trained, and differ."""
    decoder, params, lora = tiny.model(**changes)
    return Policy(decoder, params, tiny.model(1, **changes)[2]), lora


evidence_of = jax.jit(compute, static_argnums=(0, 1))
logps_of = jax.jit(response_logps, static_argnums=0)


def rows(name: str, batch: Groups, evidence_spec: EvidenceSpec | None = None, **changes: Any) -> np.ndarray:
    found = evidence_of((name,), evidence_spec or spec(), *policy_and_lora(**changes), batch, SEED)
    assert list(found) == [name] and found[name].dtype == jnp.float32
    return np.asarray(found[name])


def alone(batch: Groups, g: int, j: int) -> Groups:
    """One response, without padding."""
    n, m = batch.prompt_len[g], batch.response_len[g, j]
    prompt, response = batch.prompt_ids[g, batch.prompt_ids.shape[1] - n :], batch.response_ids[g, j, :m]
    return Groups(prompt[None], np.array([n]), response[None, None], np.array([[m]]))


def log_prob_of(policy: Policy, lora: Lora, batch: Groups, g: int, j: int) -> float:
    return float(logps_of(policy.decoder, policy.params, lora, alone(batch, g, j))[0, 0])


def pairs_of(batch: Groups) -> list[tuple[int, int, int]]:
    m = batch.response_len.shape[1]
    return [(g, i, j) for g in range(len(batch.prompt_len)) for i, j in group_pairs(m).tolist()]


# ------------------------------------------------------------------------------------------------- the registry


def test_only_what_is_named_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = tiny.groups(0, 2, 3)
    policy, lora = policy_and_lora()
    program = lambda names: jax.make_jaxpr(lambda b: compute(names, spec(), policy, lora, b, SEED))(batch)  # noqa: E731
    assert f",{DIM}]" in str(program(("features",)))
    assert f",{DIM}]" not in str(program(("margins", "log_probs", "embeddings")))
    used = []

    def noted(name: str, function: Any, *args: Any) -> Any:
        used.append(name)
        return function(*args)

    noting = {name: functools.partial(noted, name, function) for name, function in EVIDENCE.items()}
    monkeypatch.setattr(registry, "EVIDENCE", noting)
    program(("margins", "embeddings"))
    assert used == ["margins", "embeddings"]


def test_several_kinds_in_one_program() -> None:
    batch = tiny.groups(0, 4, 3)
    names = ("margins", "features", "entropies")
    together = evidence_of(names, spec(), *policy_and_lora(), batch, SEED)
    assert set(together) == set(names)
    for name in names:
        assert tiny.relative_error(together[name], rows(name, batch)) < BOUND


def test_unknown_evidence_is_named() -> None:
    with pytest.raises(ValueError, match="no evidence margin; known: .*margins"):
        compute(("margin",), spec(), *policy_and_lora(), tiny.groups(0, 1, 2), SEED)


def test_every_strategy_finds_its_evidence() -> None:
    for strategy in STRATEGIES.values():
        assert strategy.needs <= set(EVIDENCE)
        assert strategy.design is None or strategy.design in strategy.needs


@pytest.mark.parametrize("name", KINDS)
def test_independent_of_batch_padding_and_bucket(name: str) -> None:
    batch = tiny.groups(3, 6, 3)
    expected = rows(name, batch)
    one_by_one = [rows(name, Groups(*(x[g : g + 1] for x in batch))) for g in range(3)]
    assert tiny.relative_error(np.concatenate(one_by_one), expected[:9]) < BOUND
    for prompt, response in [(7, 9), (16, 16)]:
        assert tiny.relative_error(rows(name, tiny.widen(batch, prompt, response)), expected) < BOUND


@pytest.mark.parametrize("name", KINDS)
def test_padding_gives_finite_numbers(name: str) -> None:
    """A group that is not there, as `pad_groups` makes it, and one that has two of its three responses."""
    tokens = [np.arange(3, 9), np.arange(5)]
    texts = Texts(prompt_tokens=tokens, response_tokens=[[tokens[0], tokens[1], tokens[0][:2]], tokens])
    batch = pad_groups(texts, np.arange(2), Bucket(8, 8), size=3)
    assert np.isfinite(rows(name, batch)).all()


@pytest.mark.parametrize("name", KINDS)
def test_the_same_on_any_mesh(name: str) -> None:
    batch = tiny.groups(4, 8, 2)
    expected = rows(name, batch)
    mesh = mesh_of((2, 2, 2))
    sharded = jax.device_put(batch, NamedSharding(mesh, P(BATCH_AXES)))
    policy, lora = jax.device_put(policy_and_lora(mesh=mesh), NamedSharding(mesh, P()))
    found = evidence_of((name,), spec((2, 2, 2)), policy, lora, sharded, SEED)[name]
    assert tiny.relative_error(found, expected) < BOUND


# ---------------------------------------------------------------------------- features, log-probabilities, margins


def test_features_are_pair_features() -> None:
    batch = tiny.groups(0, 4, 3)
    policy, lora = policy_and_lora()
    direct = jax.jit(pair_features, static_argnums=(0, 4))
    expected = direct(policy.decoder, policy.params, lora, batch, FeatureSpec(DIM), SEED)
    assert tiny.relative_error(rows("features", batch), expected.reshape(12, DIM)) < BOUND


def test_features_are_the_differences_of_those_of_responses() -> None:
    batch = tiny.groups(0, 4, 3)
    both = rows("response_features", batch)
    assert both.shape == (12, 2, DIM)
    np.testing.assert_allclose(np.linalg.norm(both, axis=-1), 1.0, rtol=1e-6)
    assert tiny.relative_error(both[:, 0] - both[:, 1], rows("features", batch)) < BOUND
    of_group = both.reshape(4, 3, 2, DIM)  # the pairs (0, 1), (0, 2), (1, 2)
    np.testing.assert_array_equal(of_group[:, 0, 0], of_group[:, 1, 0])
    np.testing.assert_array_equal(of_group[:, 0, 1], of_group[:, 2, 0])


def test_log_probs_rewards_and_margins_pair_by_pair() -> None:
    batch = tiny.groups(1, 2, 3)
    policy, lora = policy_and_lora()
    logps = {
        (g, j): (log_prob_of(policy, lora, batch, g, j), log_prob_of(policy, policy.reference, batch, g, j))
        for g in range(2)
        for j in range(3)
    }
    log_probs = [(logps[g, i][0], logps[g, j][0]) for g, i, j in pairs_of(batch)]
    assert tiny.relative_error(rows("log_probs", batch), log_probs) < BOUND
    margins = [
        BETA * ((logps[g, i][0] - logps[g, i][1]) - (logps[g, j][0] - logps[g, j][1])) for g, i, j in pairs_of(batch)
    ]
    assert tiny.relative_error(rows("margins", batch), margins) < BOUND
    rewards = [[BETA * (logps[g, k][0] - logps[g, k][1]) for k in pair] for g, *pair in pairs_of(batch)]
    assert tiny.relative_error(rows("rewards", batch), rewards) < BOUND


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_margins_at_the_reference_are_exactly_zero(shape: tuple[int, int, int], dtype: Any) -> None:
    mesh = mesh_of(shape)
    policy, _ = jax.device_put(policy_and_lora(dtype=dtype, mesh=mesh), NamedSharding(mesh, P()))
    batch = jax.device_put(tiny.groups(0, 8, 3), NamedSharding(mesh, P(BATCH_AXES)))
    found = evidence_of(("margins", "rewards", "log_probs"), spec(shape), policy, policy.reference, batch, SEED)
    assert not np.asarray(found["margins"]).any() and not np.asarray(found["rewards"]).any()
    assert np.asarray(found["log_probs"]).all()


# ----------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("config", [tiny.MODEL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("unrolled", [False, True])
def test_embeddings_pair_by_pair(config: Any, unrolled: bool) -> None:
    """Against the decoder's other way, token by token: the prompt and the response are one prompt there, and its logits
    h Eᵀ say what h is, since the table E has more rows than columns."""
    batch = tiny.groups(2, 2, 3)
    policy, lora = policy_and_lora(config=config)
    plain = policy.decoder.clone(unrolled=True)
    prefill = jax.jit(functools.partial(plain.apply, method="prefill"))
    weights = {"params": unstack(policy.params), "lora": unstack(policy.reference)}
    table = np.asarray(policy.params["embed" if config.tie_embeddings else "lm_head"]["embedding"], np.float64)

    @functools.cache
    def embedding(g: int, j: int) -> np.ndarray:
        one = alone(batch, g, j)
        tokens = np.concatenate([one.prompt_ids, one.response_ids[:, 0]], axis=1)
        length = jnp.array([tokens.shape[1]])
        logits: Any = prefill(weights, tokens, length)[0]
        return np.linalg.lstsq(table, np.asarray(logits[0], np.float64), rcond=None)[0]

    expected = np.stack([embedding(g, i) - embedding(g, j) for g, i, j in pairs_of(batch)])
    if unrolled:
        policy, lora = Policy(plain, weights["params"], weights["lora"]), weights["lora"]
    found = evidence_of(("embeddings",), spec(), policy, lora, batch, SEED)["embeddings"]
    assert tiny.relative_error(found, expected) < BOUND


def test_embeddings_are_those_of_the_reference() -> None:
    batch = tiny.groups(2, 3, 2)
    policy, lora = policy_and_lora()

    def embeddings(policy: Policy, lora: Lora) -> np.ndarray:
        return np.asarray(evidence_of(("embeddings",), spec(), policy, lora, batch, SEED)["embeddings"])

    assert np.array_equal(embeddings(policy, lora), embeddings(policy, policy.reference))
    other = dataclasses.replace(policy, reference=lora)
    assert tiny.relative_error(embeddings(other, lora), embeddings(policy, lora)) > 0.01


def test_a_response_of_no_tokens_ends_where_its_prompt_does() -> None:
    """The same state as that of the prompt's last token where it counts as the response."""
    policy, _ = policy_and_lora()
    states = functools.partial(
        policy.decoder.apply, {"params": policy.params, "lora": policy.reference}, method="states"
    )
    batch = tiny.groups(5, 2, 1)
    batch.response_len[:] = 0
    batch.prompt_len[:] = 5
    one_less = batch.prompt_len - 1, batch.prompt_ids[:, None, -1:], np.ones((2, 1), int)
    split = Groups(batch.prompt_ids[:, :-1], *one_less)
    assert tiny.relative_error(states(batch), states(split)) < BOUND


# ------------------------------------------------------------------------------------------------------ entropies

samples_of = jax.jit(sampled, static_argnums=0)


def test_entropies_are_of_the_sampled_tokens() -> None:
    """−mean of the log-probabilities that the scoring path gives the sampled responses; the same for all pairs."""
    batch = tiny.groups(6, 5, 3)
    policy, lora = policy_and_lora()
    responses = samples_of(spec(), policy, lora, batch, SEED)
    assert responses.tokens.shape == (5, 4, 5)
    ended = np.asarray(responses.ended)
    assert ended.any() and not ended.all()  # by a stop token, and by length
    groups = Groups(batch.prompt_ids, batch.prompt_len, responses.tokens, responses.length)
    scored = np.asarray(logps_of(policy.decoder, policy.params, lora, groups), np.float64)
    expected = np.repeat(-scored.mean(axis=1), 3)
    found = rows("entropies", batch)
    assert tiny.relative_error(found, expected) < BOUND
    assert np.array_equal(found.reshape(5, 3), np.repeat(found[::3, None], 3, axis=1))


def test_entropy_of_one_token_is_that_of_its_distribution() -> None:
    batch = tiny.groups(7, 2, 2)
    policy, lora = policy_and_lora()
    every = np.tile(np.arange(tiny.MODEL.vocab_size)[None, :, None], (2, 1, 1))
    groups = Groups(batch.prompt_ids, batch.prompt_len, every, np.ones(every.shape[:2], int))
    logps = np.asarray(logps_of(policy.decoder, policy.params, lora, groups), np.float64)
    p = np.exp(logps)
    entropy = -(p * logps).sum(axis=1)
    count = 20_000
    error = np.sqrt(((p * logps**2).sum(axis=1) - entropy**2) / count)
    found = rows("entropies", batch, spec(entropy_samples=count, entropy_length=1, stop=()))
    assert (np.abs(found - entropy) < 4 * error).all()
    assert (np.log(tiny.MODEL.vocab_size) - entropy > 8 * error).all()  # which the test could tell apart


def test_samples_depend_on_prompt_and_seed_alone() -> None:
    batch = tiny.groups(8, 6, 2)
    policy, lora = policy_and_lora()
    draw = lambda batch, seed=SEED: np.asarray(samples_of(spec(), policy, lora, batch, seed).tokens)  # noqa: E731
    expected = draw(batch)
    assert np.array_equal(draw(Groups(*(x[::-1] for x in batch)))[::-1], expected)
    assert np.array_equal(draw(tiny.widen(batch, 12, 9)), expected)
    others = batch._replace(response_ids=batch.response_ids[:, ::-1, :4], response_len=batch.response_len * 0)
    assert np.array_equal(draw(others), expected)
    again = draw(batch, jnp.uint32(6))
    assert all(not np.array_equal(again[g], expected[g]) for g in range(6))
    same = jax.tree.map(lambda x: np.repeat(x[:1], 6, axis=0), batch)
    assert np.array_equal(draw(same), np.repeat(expected[:1], 6, axis=0))
    assert len({tuple(x.tolist()) for x in expected[0]}) > 1  # the samples of a prompt are not one and the same


# ------------------------------------------------------------------------------------------------------ the hashes

SMALL = Bucket(8, 8)
TOKENS = st.lists(st.integers(0, 300_000), min_size=1, max_size=6)
digests = jax.jit(pair_digests)
hashes = jax.jit(prompt_hash)


def padded(prompt: list[int], responses: list[list[int]], bucket: Bucket, garbage: int) -> Groups:
    texts = Texts(
        prompt_tokens=[np.array(prompt, np.int32)],
        response_tokens=[[np.array(r, np.int32) for r in responses]],
    )
    batch = pad_groups(texts, np.arange(1), bucket)
    batch.prompt_ids[0, : bucket.prompt - len(prompt)] = garbage
    for j, response in enumerate(responses):
        batch.response_ids[0, j, len(response) :] = garbage
    return batch


def digest(prompt: list[int], responses: list[list[int]], bucket: Bucket = SMALL, garbage: int = 0) -> Any:
    return np.asarray(digests(padded(prompt, responses, bucket, garbage)))[0].tolist()


def test_mix_is_that_of_murmurhash() -> None:
    """Published values: MurmurHash3 of no bytes at all is the finaliser of the seed."""
    assert np.asarray(mix(jnp.array([0, 1, 0xFFFFFFFF], jnp.uint32))).tolist() == [0, 0x514E28B7, 0x81F16F39]


@settings(max_examples=60, deadline=None)
@given(TOKENS, TOKENS, TOKENS, st.integers(0, 300_000))
def test_digests_know_the_text_alone(prompt: list[int], first: list[int], second: list[int], garbage: int) -> None:
    (expected,) = digest(prompt, [first, second])
    assert digest(prompt, [second, first]) == [expected]
    assert digest(prompt, [first, second], Bucket(6, 11), garbage) == [expected]
    three = digest(prompt, [[7], second, first])
    assert three[2] == expected and (three[0] == expected) == (first == [7])
    salted = [hashes(padded(prompt, [first], b, garbage), jnp.uint32(9)).tolist() for b in (SMALL, Bucket(6, 6))]
    assert salted[0] == salted[1]


@settings(max_examples=150, deadline=None)
@given(TOKENS, TOKENS, TOKENS, st.data())
def test_digests_of_other_texts_differ_in_every_word(
    prompt: list[int], first: list[int], second: list[int], data: st.DataObject
) -> None:
    texts = [prompt, first, second]
    changed = [list(text) for text in texts]
    which = data.draw(st.integers(0, 2))
    text = changed[which]
    place = data.draw(st.integers(0, len(text) - 1))
    match data.draw(st.sampled_from(["other", "longer", "shorter", "swapped", "moved"])):
        case "other":
            text[place] = data.draw(st.integers(0, 300_000))
        case "longer":
            text.insert(place, data.draw(st.sampled_from([0, text[place]])))
        case "shorter" if len(text) > 1:
            del text[place]
        case "swapped":
            text.reverse()
        case "moved":
            changed = [first, prompt, second]
    one, other = (np.array(digest(t[0], t[1:])[0]) for t in (texts, changed))
    same = prompt == changed[0] and sorted(texts[1:]) == sorted(changed[1:])
    assert (one == other).all() if same else (one != other).all()


def test_hashes_of_near_prompts_are_distinct_and_balanced() -> None:
    """All prompts of one or two of 97 tokens, by two salts; 0.02 collisions of 32 bits are expected."""
    one, two = np.meshgrid(np.arange(97), np.arange(97), indexing="ij")
    prompts = np.stack([one, two], axis=-1).reshape(-1, 2).astype(np.int32)
    prompts = np.concatenate([prompts, np.stack([np.full(97, 5), np.arange(97)], axis=1)]).astype(np.int32)
    lengths = np.repeat([2, 1], [97 * 97, 97])
    empty = np.zeros((len(prompts), 1, 1), np.int32)
    batch = Groups(prompts, lengths, empty, empty[..., 0])
    found = [np.asarray(hashes(batch, jnp.uint32(salt))) for salt in (0, 1)]
    assert len(set(np.concatenate(found).tolist())) == 2 * len(prompts)
    bits = (found[0][:, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(len(prompts))


@pytest.mark.parametrize("m", [2, 3])
def test_fisher_weights_are_the_deviations_of_answers(m: int) -> None:
    """Against float64, from margins and vectors computed apart; ψ is that of the current adapter."""
    batch = tiny.groups(11, 4, m)
    policy, lora = policy_and_lora()
    delta = rows("margins", batch).astype(np.float64)
    p = 1 / (1 + np.exp(-delta))
    assert delta.std() > 0
    expected = np.sqrt(p * (1 - p))[:, None] * rows("features", batch)
    assert tiny.relative_error(rows("fisher_features", batch), expected) < BOUND
    current = evidence_of(("embeddings",), spec(), Policy(policy.decoder, policy.params, lora), lora, batch, SEED)[
        "embeddings"
    ]
    expected = BETA * np.sqrt(p * (1 - p))[:, None] * np.asarray(current)
    assert tiny.relative_error(rows("fisher_embeddings", batch), expected) < BOUND
    assert tiny.relative_error(np.asarray(current), rows("embeddings", batch)) > 1e-3
