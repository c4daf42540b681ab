"""Learning completions: the mean of −log π(token) over a batch's completion tokens, EOS included, in nats.

Prompts are read, not learnt.  Trained are an adapter, or all weights; both are float32, whatever the model computes in,
since a step of 2e-5 is lost in the rounding of bfloat16.  With AdamW's two moments, the gradient's sum over
microbatches and one microbatch's part of it that is 20 bytes a trained parameter (140 GB for 7 billion), cut over the
mesh as `layout.weight_shardings` says.  The base weights under an adapter stay in the dtype that they come in.
"""

import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from activedpo_jax import layout
from activedpo_jax.data.groups import Bucket, Groups, Texts, assign_buckets, microbatches, pad_groups
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.record import checkpoints, metrics
from activedpo_jax.training import optimiser


class Examples(NamedTuple):
    """What is learnt, and what the learning is judged by: groups of one response each."""

    train: Texts
    heldout: Texts | None
    buckets: tuple[Bucket, ...]


class Recipe(NamedTuple):
    """How it is learnt."""

    optimiser: optimiser.OptimiserSpec
    epochs: int
    batch_size: int  # examples an optimiser step
    microbatch: int  # examples whose activations exist at a time, divided evenly by the mesh
    checkpoint_every: int  # steps


def fit(
    how: Recipe,
    decoder: Decoder,
    params: Params | None,
    weights: Any,
    examples: Examples,
    mesh: Mesh,
    seed: int,
    folder: pathlib.Path,
) -> Any:
    """Trains, going on from the last checkpoint in `folder` if there is one, and returns the weights.

    Args:
      params: the base weights under an adapter; None: `weights` are all that there are.
      weights: what is trained, float32, laid out as `layout.weight_shardings` says.  They are used up.

    Raises:
      FloatingPointError: a loss is not finite; nothing of that step is saved.
    """
    texts, buckets = examples.train, examples.buckets
    bucket_of = assign_buckets(texts, buckets)
    useful = np.array([len(p) + len(r) for p, (r,) in zip(texts.prompt_tokens, texts.response_tokens, strict=True)])
    learnt = np.array([len(r) for (r,) in texts.response_tokens])
    per_epoch = -(-texts.num_groups // how.batch_size)
    steps = how.epochs * per_epoch
    schedule = optimiser.batch_schedule(0, texts.num_groups, how.epochs, how.batch_size, how.batch_size, steps, seed)

    store = checkpoints.Checkpoints(folder)
    done = store.latest or 0
    state_shardings = optimiser.optimiser_shardings(how.optimiser, mesh, weights)
    init = jax.jit(functools.partial(optimiser.init_optimiser, how.optimiser), out_shardings=state_shardings)
    if done:
        like = _shapes(weights), _shapes(jax.eval_shape(init, weights), state_shardings)
        jax.tree.map(lambda x: x.delete(), weights)  # room for those that come
        weights, opt_state = store.restore(done, like)
    else:
        opt_state = init(weights)

    def heldout_loss() -> dict[str, float]:
        if examples.heldout is None:
            return {}
        base, lora = (weights, None) if params is None else (params, weights)
        return {"sft/heldout_loss": mean_loss(decoder, base, lora, examples.heldout, buckets, how.microbatch, mesh)}

    with (
        metrics.MetricsWriter(folder, done + 1 if done else 0) as writer,
        tqdm(total=steps, initial=done, desc="SFT", unit="step", leave=False) as bar,
    ):
        if not done and examples.heldout is not None:
            writer.write(0, 0, heldout_loss())
        for step in range(done, steps):
            start = time.perf_counter()
            rows = schedule.slots[step][schedule.weight[step] > 0]
            share = np.float32(1 / learnt[rows].sum())
            total = no_gradient(mesh, weights)
            for b, part in microbatches(bucket_of[rows], how.microbatch):
                groups = pad_groups(texts, rows[part], buckets[b], how.microbatch)
                groups = jax.device_put(groups, layout.batch(mesh))
                total = gradient_program(decoder, mesh, params, weights, total, groups, share)
            gradient, loss = total
            weights, opt_state, rate = update_program(
                how.optimiser, mesh, weights, opt_state, gradient, jnp.int32(step), jnp.int32(steps)
            )
            del total, gradient  # or they would stand beside the next step's
            value, number = float(loss), step + 1
            if not np.isfinite(value):
                raise FloatingPointError(f"SFT, step {number}: the loss is {value}; lower config.sft.learning_rate")
            speed = useful[rows].sum() / (time.perf_counter() - start)
            figures = {"sft/loss": value, "sft/learning_rate": float(rate), "sft/tokens_per_second": speed}
            if number % per_epoch == 0:
                figures |= heldout_loss()
            writer.write(number, number, figures)
            if number % how.checkpoint_every == 0 and number < steps:
                store.save(number, (weights, opt_state))  # after its figures: whatever is saved is on record
            bar.set_postfix(loss=f"{value:.3f}", tokens_per_second=f"{speed:.0f}", refresh=False)
            bar.update()
    store.close()
    return weights


@functools.partial(jax.jit, static_argnums=0)
def no_gradient(mesh: Mesh, weights: Any) -> tuple[Any, jax.Array]:
    """What the parts of a batch's gradient and loss are added to."""
    return _laid_out(mesh, jax.tree.map(jnp.zeros_like, weights)), jnp.float32(0)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def gradient_program(
    decoder: Decoder,
    mesh: Mesh,
    params: Params | None,
    weights: Any,
    total: tuple[Any, jax.Array],
    groups: Groups,
    share: jax.Array,
) -> tuple[Any, jax.Array]:
    """Adds the part of a batch's gradient and loss that comes from one microbatch; compiled once a bucket."""
    base, lora = (weights, None) if params is None else (params, weights)
    new = optimiser.completion_gradient(decoder, base, lora, groups, share)
    gradient, loss = jax.tree.map(jnp.add, total, new)
    return _laid_out(mesh, gradient), loss


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def update_program(
    spec: optimiser.OptimiserSpec,
    mesh: Mesh,
    weights: Any,
    opt_state: optax.OptState,
    gradient: Any,
    step: jax.Array,
    total: jax.Array,
) -> tuple[Any, optax.OptState, jax.Array]:
    """One step; also returns its learning rate."""
    rate = optimiser.learning_rate(spec, step, total)
    shardings = optimiser.optimiser_shardings(spec, mesh, weights)
    weights, opt_state = optimiser.update(spec, weights, opt_state, gradient, rate)
    return _laid_out(mesh, weights), jax.lax.with_sharding_constraint(opt_state, shardings), rate


@functools.partial(jax.jit, static_argnums=0)
def loss_program(decoder: Decoder, params: Params, lora: Lora | None, groups: Groups) -> jax.Array:
    """−Σ log π(token) over the response tokens of a batch."""
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    return -jnp.sum(decoder.apply(variables, groups))  # type: ignore[arg-type]


def mean_loss(
    decoder: Decoder,
    params: Params,
    lora: Lora | None,
    texts: Texts,
    buckets: Sequence[Bucket],
    size: int,
    mesh: Mesh,
) -> float:
    """The mean negative log-likelihood of all completion tokens, in nats, `size` examples at a time."""
    total = 0.0
    parts = list(microbatches(assign_buckets(texts, buckets), size))
    for b, rows in tqdm(parts, desc="held-out loss", unit="batch", leave=False):
        groups = jax.device_put(pad_groups(texts, rows, buckets[b], size), layout.batch(mesh))
        total += float(loss_program(decoder, params, lora, groups))
    return total / sum(len(r) for (r,) in texts.response_tokens)


def _laid_out(mesh: Mesh, tree: Any) -> Any:
    return jax.lax.with_sharding_constraint(tree, layout.weight_shardings(mesh, tree))


def _shapes(tree: Any, shardings: Any = None) -> Any:
    """What a checkpoint is read into."""
    shardings = jax.tree.map(lambda x: x.sharding, tree) if shardings is None else shardings
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
