"""The staged round's bookkeeping (rows, buckets and chunks of pools with several responses), and held-out figures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activedpo_jax import layout, specs
from activedpo_jax.data import packing
from activedpo_jax.data.groups import Bucket, Groups, PairPool
from activedpo_jax.evaluation import heldout
from activedpo_jax.evidence.gradients import FeatureSpec, pair_features
from activedpo_jax.models.policy import Policy
from activedpo_jax.resumable import NOTHING_SAVED
from activedpo_jax.rounds import pool_pass, staged
from activedpo_jax.rounds.pool_evidence import PoolEvidence, pool_evidence
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import Answers, RunState, initial_state
from activedpo_jax.tasks import Task
from activedpo_jax.training.losses import LossSpec
from tests import tiny
from tests.test_round import options

BUCKETS = (Bucket(4, 5), Bucket(7, 9))


def pool(seed: int = 0) -> PairPool:
    """Groups of two or three responses, of lengths on both sides of the smaller bucket; sides in random order."""
    rng = np.random.default_rng(seed)
    prompts, responses, pairs = [], [], []
    for group in range(9):
        m = int(rng.integers(2, 4))
        prompts.append(rng.integers(0, 97, rng.integers(1, 8)).astype(np.int32))
        responses.append([rng.integers(0, 97, rng.integers(1, 10)).astype(np.int32) for _ in range(m)])
        for i in range(m):
            for j in range(i + 1, m):
                pairs.append([group, i, j] if rng.random() < 0.5 else [group, j, i])
    n = len(pairs)
    return PairPool(
        prompt_tokens=prompts,
        response_tokens=responses,
        pairs=np.array(pairs, np.int32),
        pair_ids=[str(i) for i in range(n)],
        preferences=rng.integers(0, 2, n).astype(np.int8),
        rewards=None,
        prompt_texts=[""] * len(prompts),
        response_texts=[[""] * len(r) for r in responses],
    )


def pool_of_pairs() -> PairPool:
    """The first two responses of every group."""
    data = pool()
    return dataclasses.replace(
        data,
        response_tokens=[several[:2] for several in data.response_tokens],
        pairs=np.array([[g, 0, 1] for g in range(data.num_groups)], np.int32),
        pair_ids=[str(g) for g in range(data.num_groups)],
        preferences=data.preferences[: data.num_groups],
    )


def test_pool_features_are_in_pool_order() -> None:
    decoder, params, lora = tiny.model()
    data = pool()
    config = options()
    config.features.dim, config.features.groups_per_chunk = 64, 2
    mesh = layout.make_mesh(config.mesh, jax.devices()[:1])
    task = Task(decoder, "tiny", params, lambda: params, data, data, BUCKETS)
    spec = specs.round_spec(config, "activedpo", task, mesh)
    policy = Policy(decoder, params, lora)
    state = initial_state(spec, lora, 0)
    got = pool_evidence(spec, policy, state, data, BUCKETS)["features"]

    # Row by row: the pair's own two responses, unpadded prompt, padded to one length to compile once.
    compute = jax.jit(lambda g: pair_features(decoder, params, lora, g, FeatureSpec(64), jnp.uint32(0))[:, 0])
    rows = []
    for group, first, second in data.pairs:
        prompt, shown = data.prompt_tokens[group], [data.response_tokens[group][i] for i in sorted((first, second))]
        batch = Groups(
            np.concatenate([np.zeros(7 - len(prompt), np.int32), prompt])[None],
            np.array([len(prompt)]),
            np.stack([np.concatenate([y, np.zeros(9 - len(y), np.int32)]) for y in shown])[None],
            np.array([[len(y) for y in shown]]),
        )
        rows.append(np.asarray(compute(batch))[0])
    assert got.shape == (data.num_pairs, 64)
    assert tiny.relative_error(got, np.stack(rows)) < 1e-5

    config.features.dtype = "bfloat16"
    narrow = specs.round_spec(config, "activedpo", task, mesh)
    rounded = pool_evidence(narrow, policy, state, data, BUCKETS)["features"]
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))
    picks, _ = staged.pick(PoolEvidence(pool_pass.Pass(narrow, policy, BUCKETS)), state, data)
    assert len(set(np.asarray(picks.rows).tolist())) == config.labels_per_round


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_evaluation_is_accuracy_margin_and_loss_of_the_pairs_as_shown(packed: bool) -> None:
    decoder, params, lora = tiny.model()
    policy = Policy(decoder, params, tiny.model(1)[2])
    data = pool(1)
    mesh = layout.make_mesh(options().mesh, jax.devices()[:1])
    beta, smoothing = 0.3, 0.1
    loss = LossSpec("sigmoid", beta, smoothing)
    every = np.arange(data.num_pairs)
    batches = heldout.Batches(data, every, BUCKETS, 4, mesh, packed)
    judge = heldout.Evaluator(policy, data.preferences, batches, loss)
    got = judge.judged(lora).scores

    gains = heldout.log_probs(policy, lora, batches, "", NOTHING_SAVED).astype(np.float64)
    gains -= heldout.log_probs(policy, policy.reference, batches, "", NOTHING_SAVED)
    preferred = data.preferences.astype(int)
    margins = beta * (gains[every, preferred] - gains[every, 1 - preferred])
    assert np.isclose(got["accuracy"], np.mean(margins > 0))
    assert np.isclose(got["margin"], margins.mean(), atol=1e-5)
    np.testing.assert_allclose(judge.judged(lora).margins, margins, rtol=0, atol=1e-5)
    expected = (1 - smoothing) * np.logaddexp(0, -margins) + smoothing * np.logaddexp(0, margins)
    assert np.isclose(got["loss"], expected.mean(), atol=1e-5)
    start = judge.judged(None).scores
    wanted = {"accuracy": 0.5, "margin": 0, "loss": np.log(2), "label_nll": np.log(2), "longer": 0.5}
    wanted |= {"ratio_preferred": 0, "ratio_rejected": 0}
    assert {name: start[name] for name in wanted} == pytest.approx(wanted)
    assert np.isclose(got["label_nll"], np.logaddexp(0, -margins).mean(), atol=1e-5)
    chosen, others, ours, nlls, ratios, more = [0], [0], [0.0], [0.0], np.zeros(2), np.zeros(2)
    logps = heldout.log_probs(policy, lora, batches, "", NOTHING_SAVED).astype(np.float64)
    for (group, *shown), label, gain, logp in zip(data.pairs, preferred, gains, logps, strict=True):
        lengths = [len(data.response_tokens[group][j]) for j in shown]
        chosen, others = [*chosen, lengths[label]], [*others, lengths[1 - label]]
        ratios += gain[label], gain[1 - label]
        ours, nlls = [*ours, lengths[gain.argmax()]], [*nlls, -logp[label]]
        of_longer = [0.5, 0.5] if lengths[0] == lengths[1] else [float(n == max(lengths)) for n in lengths]
        more += of_longer[gain.argmax()], of_longer[label]
    n = data.num_pairs
    wanted = {"nll": sum(nlls) / sum(chosen), "tokens": sum(ours) / n, "tokens_labels": sum(chosen) / n}
    wanted |= {"ratio_preferred": ratios[0] / sum(chosen), "ratio_rejected": ratios[1] / sum(others)}
    wanted |= {"longer": more[0] / n, "longer_labels": more[1] / n}
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert got["tokens"] != got["tokens_labels"] and got["longer"] != got["longer_labels"]

    other_way = dataclasses.replace(
        data, pairs=data.pairs[:, [0, 2, 1]], preferences=(1 - data.preferences).astype(np.int8)
    )
    batches = heldout.Batches(other_way, every, BUCKETS, 4, mesh, packed)
    judge = heldout.Evaluator(policy, other_way.preferences, batches, loss)
    again = judge.judged(lora).scores
    assert again == pytest.approx(got, rel=1e-4, abs=1e-6) and again["accuracy"] == got["accuracy"]


@pytest.fixture
def task() -> Task:
    decoder, params, _ = tiny.model()
    mesh = layout.make_mesh(options().mesh, jax.devices()[:1])
    return Task(decoder.clone(mesh=mesh), "tiny", params, lambda: params, pool(), pool(), BUCKETS)


def test_buckets_are_added_where_they_save_more_than_they_cost(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    config = options()
    config.round.mode, config.data.more_buckets, config.data.packing = "staged", 3, False
    monkeypatch.setitem(specs._MULTIPLE, "cpu", 1)
    assert specs.with_more_buckets(config, task) is not task
    assert specs.with_more_buckets(config, task).buckets == BUCKETS  # a model as small as this computes no padding long
    monkeypatch.setattr(specs, "_COMPILE_SECONDS", 0.0)
    found = specs.with_more_buckets(config, task).buckets
    assert len(found) == 5 and set(BUCKETS) < set(found)
    config.data.more_buckets = 0
    assert specs.with_more_buckets(config, task).buckets == BUCKETS


def test_rounds_that_are_one_program_or_on_policy_keep_their_buckets(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options()
    config.data.packing = False
    monkeypatch.setitem(specs._MULTIPLE, "cpu", 2)
    monkeypatch.setattr(specs, "_COMPILE_SECONDS", 0.0)
    whole = dataclasses.replace(task, buckets=BUCKETS[-1:], pool=pool_of_pairs())
    assert specs.is_fused(config, whole)
    assert specs.with_more_buckets(config, whole) is whole
    config.round.mode = "staged"
    assert len(specs.with_more_buckets(config, whole).buckets) > 1
    on_policy = dataclasses.replace(task, pool=None)
    assert specs.with_more_buckets(config, on_policy) is on_policy
    config.data.packing = True
    assert specs.with_more_buckets(config, whole) is whole  # packed batches need no more


def test_a_round_does_not_depend_on_its_buckets_and_packing(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    config = options()
    config.round.mode, config.dpo.batch_size, config.dpo.pairs_per_chunk = "staged", 4, 4
    config.data.packing, config.dpo.sft_weight = False, 0.5
    monkeypatch.setitem(specs._MULTIPLE, "cpu", 2)
    monkeypatch.setattr(specs, "_COMPILE_SECONDS", 0.0)
    fitted = specs.with_more_buckets(config, task)
    assert len(fitted.buckets) > len(BUCKETS)
    mesh, (_, params, lora) = task.decoder.mesh, tiny.model()
    assert mesh is not None
    monkeypatch.setattr(packing, "_MULTIPLE", {"cpu": 1})
    padded = specs.round_spec(config, "activedpo", task, mesh)
    config.data.packing = True
    packed = specs.round_spec(config, "activedpo", task, mesh)
    assert packed.packed and not padded.packed
    policy, data = Policy(task.decoder, params, lora), pool()

    def one_round(spec: RoundSpec, buckets: tuple[Bucket, ...]) -> tuple[list[str], RunState, float | None]:
        rounds = staged.StagedRound(spec, policy, lambda state: data, buckets)
        state = initial_state(spec, lora, 0)
        picked = rounds.choose(state)
        count = len(picked.questions)
        preferences = np.arange(count, dtype=np.float32) % 2
        after, _ = rounds.learn(state, picked, Answers(preferences, np.ones(count, np.float32)))  # type: ignore[arg-type]
        return [question.pair_id for question in picked.questions], after, rounds.useful

    picks, state, useful = one_round(padded, BUCKETS)
    for spec, buckets in ((padded, fitted.buckets), (packed, BUCKETS)):
        other_picks, other_state, more_useful = one_round(spec, buckets)
        assert picks == other_picks
        assert useful is not None and more_useful is not None and useful < more_useful <= 1
        for got, wanted in zip(jax.tree.leaves(other_state.lora), jax.tree.leaves(state.lora), strict=True):
            assert tiny.relative_error(np.asarray(got), np.asarray(wanted)) < 1e-5


def test_sft_loss_is_the_mean_over_the_preferred_tokens_of_a_batch(task: Task) -> None:
    """In microbatches, with a tie and a label that counts half; before the first step π_θ is π_ref."""
    config, weight = options(), 0.5
    config.round.mode, config.dpo.sft_weight, config.dpo.epochs = "staged", weight, 1
    config.dpo.batch_size, config.dpo.pairs_per_chunk = config.labels_per_round, 4
    mesh, (_, params, lora), data = task.decoder.mesh, tiny.model(), pool()
    assert mesh is not None
    spec = specs.round_spec(config, "random", task, mesh)
    rounds = staged.StagedRound(spec, Policy(task.decoder, params, lora), lambda state: data, BUCKETS)
    state = initial_state(spec, lora, 0)
    answers = Answers(np.array([0, 1, 0.5, 1, 0, 0], np.float32), np.array([1, 1, 1, 0.5, 1, 0], np.float32))  # type: ignore[arg-type]
    after, training = rounds.learn(state, rounds.choose(state), answers)
    labelled, learnt = jax.device_get(after.labelled), 5  # the last pair has no preference
    logps, lengths = (x[:learnt].astype(np.float64) for x in (labelled.ref_logps, labelled.groups.response_len))
    preferences, confidence = (np.asarray(x)[:learnt] for x in answers)
    picked = lambda x: (1 - preferences) * x[:, 0] + preferences * x[:, 1]  # noqa: E731
    expected = np.mean(confidence) * np.log(2) - weight * np.sum(confidence * picked(logps)) / picked(lengths).sum()
    assert training is not None and float(training.loss) == pytest.approx(expected, rel=1e-5)
