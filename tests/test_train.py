"""The optimiser step, its schedule and its batches against torch, transformers and closed forms."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_jax.data.groups import Groups
from activedpo_jax.huggingface.families import FAMILIES
from activedpo_jax.models.policy import response_logps
from activedpo_jax.training import losses, optimiser
from activedpo_jax.training.optimiser import DpoSpec, OptimiserSpec
from tests import tiny
from tests.tiny_hf import load_decoder, tiny_llama

TOTAL = 40


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate(schedule: str, warmup: float) -> None:
    spec = OptimiserSpec(0.5, schedule, warmup)
    rate = jax.jit(lambda step, total: optimiser.learning_rate(spec, optimiser.Position(step, total)))
    got = [float(rate(jnp.int32(step), jnp.int32(TOTAL))) for step in range(TOTAL)]
    up = round(warmup * TOTAL)
    after = np.arange(TOTAL - up) / max(TOTAL - up, 1)  # share of the way down that is behind
    down = {"linear": 1 - after, "cosine": (1 + np.cos(np.pi * after)) / 2, "constant": np.ones_like(after)}[schedule]
    wanted = 0.5 * np.concatenate([np.arange(1, up + 1) / max(up, 1), down])
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert max(got) == pytest.approx(0.5) and min(got) > 0


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 20), st.integers(1, 30), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 9)
)
def test_every_label_once_an_epoch(first: int, n: int, epochs: int, size: int, spare: int, seed: int) -> None:
    per_epoch = -(-n // size)
    steps = epochs * per_epoch + spare
    schedule = optimiser.batch_schedule(np.arange(first, first + n), epochs, size, size + spare, steps, seed)
    assert schedule.slots.shape == schedule.weight.shape == (steps, size + spare)
    assert (schedule.num_steps, schedule.steps_per_epoch) == (epochs * per_epoch, per_epoch)
    for epoch in range(epochs):
        of_epoch = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        slots, weight = schedule.slots[of_epoch], schedule.weight[of_epoch]
        assert sorted(slots[weight > 0]) == list(range(first, first + n))
        np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-6)
        for row in weight:  # equal shares
            assert len(set(row[row > 0])) == 1
    assert not schedule.weight[epochs * per_epoch :].any()
    again = optimiser.batch_schedule(np.arange(first, first + n), epochs, size, size + spare, steps, seed)
    np.testing.assert_array_equal(schedule.slots, again.slots)


def test_epochs_and_seeds_are_shuffled_anew() -> None:
    slots = optimiser.batch_schedule(np.arange(30), 2, 30, 30, 2, 0).slots
    assert np.any(slots[0] != slots[1])
    assert np.any(slots != optimiser.batch_schedule(np.arange(30), 2, 30, 30, 2, 1).slots)


def test_update_is_torchs_adamw_after_clipping() -> None:
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((3, 4), np.float32), "b": rng.standard_normal(5, np.float32)}
    rates, clip, decay = (0.01, 0.02, 0.005), 1.0, 0.1
    spec = OptimiserSpec(learning_rate=1.0, weight_decay=decay, max_grad_norm=clip)
    ours: Any = jax.tree.map(jnp.asarray, weights)
    state: optax.OptState = optimiser.init_optimiser(spec, ours)
    theirs = {name: torch.nn.Parameter(torch.tensor(w)) for name, w in weights.items()}
    reference = torch.optim.AdamW(theirs.values(), lr=1.0, weight_decay=decay)
    clipped = []
    for step, rate in enumerate(rates):
        gradient = {name: (10.0**-step) * rng.standard_normal(w.shape, np.float32) for name, w in weights.items()}
        ours, state = optimiser.update(spec, ours, state, jax.tree.map(jnp.asarray, gradient), jnp.float32(rate))
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        clipped.append(float(torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)) > clip)
        reference.param_groups[0]["lr"] = rate
        reference.step()
    assert clipped == [True, False, False]
    for name in weights:
        np.testing.assert_allclose(ours[name], theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6)


def test_gradients_of_parts_add_up() -> None:
    decoder, params, lora = tiny.model()
    batch = tiny.groups(seed=3, count=4, m=2)
    ref = np.asarray(response_logps(decoder, params, None, batch))
    pairs = losses.Preferences(jnp.array([0, 1, 1, 0]), jnp.asarray(ref), jnp.full(4, 0.25), jnp.full(4, 1 / 13))
    spec = DpoSpec(losses.LossSpec("sigmoid", 0.1, 0.0, 0.5), OptimiserSpec(1e-3))
    gradient = jax.jit(lambda groups, pairs: optimiser.dpo_gradient(decoder, spec, params, lora, groups, pairs))
    whole = gradient(batch, pairs)
    halves = [
        gradient(Groups(*(x[s] for x in batch)), jax.tree.map(lambda x, s=s: x[s], pairs))
        for s in (slice(0, 2), slice(2, 4))
    ]
    for got, wanted in zip(jax.tree.leaves(jax.tree.map(jnp.add, *halves)), jax.tree.leaves(whole), strict=True):
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_language_model_loss_and_gradient_are_those_of_transformers(tied: bool, tmp_path: pathlib.Path) -> None:
    model = tiny_llama(tmp_path, tie_word_embeddings=tied)
    decoder, params = load_decoder(tmp_path)
    batch = tiny.groups(seed=4, count=3, m=2)
    tokens = int(np.sum(batch.response_len))
    gradient = jax.jit(
        lambda params: optimiser.completion_gradient(decoder, params, None, batch, jnp.float32(1 / tokens))
    )
    ours, loss = gradient(params)

    total: Any = 0.0
    for g in range(3):
        prompt = batch.prompt_ids[g, batch.prompt_ids.shape[1] - batch.prompt_len[g] :]
        for j in range(2):
            n = int(batch.response_len[g, j])
            ids = torch.tensor(np.concatenate([prompt, batch.response_ids[g, j, :n]])[None], dtype=torch.long)
            labels = ids.clone()
            labels[0, : len(prompt)] = -100
            total = total + model(input_ids=ids, labels=labels).loss * n / tokens
    total.backward()
    assert float(loss) == pytest.approx(float(total.detach()), abs=1e-5)
    named = dict(model.named_parameters())
    compared = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        weight = FAMILIES["llama"].weights[tuple(k.key for k in path)]
        slots = leaf if "{layer}" in weight.name else leaf[None]
        for layer, got in enumerate(slots):
            wanted = named[weight.name.format(layer=layer)].grad.numpy()
            assert tiny.relative_error(got.T if weight.transposed else got, wanted) < 1e-4, weight.name
            compared += 1
    assert compared == len(named)


def test_one_step_lowers_the_loss_of_its_batch() -> None:
    decoder, params, _ = tiny.model()
    batch = tiny.groups(seed=5, count=4, m=2)
    spec = OptimiserSpec(1e-3)
    state = optimiser.init_optimiser(spec, params)
    step = jax.jit(
        lambda params, state: optimiser.language_model_step(decoder, spec, params, state, batch, jnp.float32(1e-3))
    )
    params, state, before = step(params, state)
    _, _, after = step(params, state)
    assert after < before
