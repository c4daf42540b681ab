"""Learning completions: the mean of −log π(token) over a batch's completion tokens, EOS included, in nats.

Prompts are read, not learnt.  An adapter is trained, or all weights; both are float32, whatever the compute dtype,
since a step of 2e-5 would be lost in the rounding of bfloat16.  With AdamW's two moments, the gradient's sum over
microbatches and one microbatch's part of it, this takes 20 bytes per trained parameter (140 GB for 7 billion), cut over
the mesh as in `layout.weight_shardings`.  The base weights under an adapter keep their dtype.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from activedpo_jax import layout
from activedpo_jax.data import batches
from activedpo_jax.data.groups import Bucket, Groups, Texts, assign_buckets, pad_groups
from activedpo_jax.data.packing import Packing, lengths_in, minibatch, multiple_on, packings, plan
from activedpo_jax.data.ragged import lengths_of, longest_of
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.progress import progress
from activedpo_jax.training import optimiser
from activedpo_jax.training.loop import Advance


class Examples(NamedTuple):
    """What is learnt, and what the result is evaluated on: groups of one response each."""

    train: Texts
    heldout: Texts | None
    buckets: tuple[Bucket, ...]


class Recipe(NamedTuple):
    """How it is learnt."""

    optimiser: optimiser.OptimiserSpec
    epochs: int
    batch_size: int  # examples per optimiser step
    microbatch: int  # examples whose activations exist at a time at most, divided evenly by the mesh
    checkpoint_minutes: float  # that a kill may cost
    packed: bool = False  # whether the texts of a batch lie end to end; else they are padded

    def steps_per_epoch(self, examples: Examples) -> int:
        return -(-examples.train.num_groups // self.batch_size)


class Trainee(NamedTuple):
    """A model, and the part of it that is trained."""

    decoder: Decoder  # with the mesh of the programs
    params: Params | None  # the base weights under an adapter; None: `weights` are the whole model
    weights: Any  # the trained part, float32, laid out as in `layout.weight_shardings`

    @property
    def mesh(self) -> Mesh:
        return _mesh(self.decoder)


class Report(NamedTuple):
    """What one step reports."""

    loss: jax.Array  # nats a token, of the batch
    rate: jax.Array  # the learning rate
    tokens: int  # in the batch, of prompts and completions


def steps(recipe: Recipe, trainee: Trainee, examples: Examples, seed: int) -> Advance:
    """The optimiser steps of the whole stage, as `loop.descend` takes them."""
    decoder, params, mesh = trainee.decoder, trainee.params, trainee.mesh
    texts, buckets = examples.train, examples.buckets
    cut = _packed_parts(recipe, texts) if recipe.packed else _padded_parts(recipe, texts, buckets, mesh)
    learnt = longest_of(texts.response_tokens)  # of the only response
    useful = lengths_of(texts.prompt_tokens) + learnt
    total_steps = recipe.epochs * recipe.steps_per_epoch(examples)
    every = np.arange(texts.num_groups)
    size = recipe.batch_size
    schedule = optimiser.batch_schedule(every, recipe.epochs, size, size, total_steps, seed)

    def advance(step: int, weights: Any, opt_state: optax.OptState) -> tuple[Any, optax.OptState, Report]:
        rows = schedule.slots[step][schedule.weight[step] > 0]
        share = np.float32(1 / learnt[rows].sum())
        total = no_gradient(mesh, weights)
        for part in cut(rows):
            groups = layout.put(pad_groups(texts, part.rows, part.bucket, part.size), layout.batch(mesh))
            total = gradient_program(decoder.clone(packing=part.packing), params, weights, total, groups, share)
        gradient, loss = total
        position = optimiser.Position(jnp.int32(step), jnp.int32(total_steps))
        weights, opt_state, rate = update_program(recipe.optimiser, mesh, weights, opt_state, gradient, position)
        return weights, opt_state, Report(loss, rate, int(useful[rows].sum()))

    return advance


class _Part(NamedTuple):
    """Examples of a step that go through the model together."""

    rows: np.ndarray  # [n] int64, of the texts
    size: int  # the number to which they are made up, at least n
    bucket: Bucket
    packing: Packing | None


def _padded_parts(
    recipe: Recipe, texts: Texts, buckets: Sequence[Bucket], mesh: Mesh
) -> Callable[[np.ndarray], list[_Part]]:
    """What cuts a minibatch [n] of rows into parts."""
    bucket_of, sizes = assign_buckets(texts, buckets), batches.sizes(recipe.microbatch, layout.round_up(1, mesh))

    def cut(rows: np.ndarray) -> list[_Part]:
        found = batches.parts(bucket_of[rows], buckets, 1, sizes)
        return [_Part(rows[places], size, buckets[b], None) for b, places, size in found]

    return cut


def _packed_parts(recipe: Recipe, texts: Texts) -> Callable[[np.ndarray], list[_Part]]:
    lengths, sizes = lengths_in(texts), batches.sizes(recipe.microbatch, 1)
    shapes = packings(lengths, sizes, multiple_on(jax.default_backend()))
    bucket = Bucket(int(lengths.prompts.max()), int(lengths.responses.max()))

    def cut(rows: np.ndarray) -> list[_Part]:
        return [_Part(rows[b.rows], b.packing.groups, bucket, b.packing) for b in minibatch(lengths.of(rows), shapes)]

    return cut


def initial_moments(recipe: Recipe, mesh: Mesh, weights: Any) -> Any:
    """The optimiser's state before the first step, laid out like the weights."""
    shardings = optimiser.optimiser_shardings(recipe.optimiser, mesh, weights)
    init = functools.partial(optimiser.init_optimiser, recipe.optimiser)
    return jax.jit(init, out_shardings=shardings)(weights)


def state_shapes(recipe: Recipe, mesh: Mesh, weights: Any) -> tuple[Any, Any]:
    """What a checkpoint of weights and moments is read into."""
    moments = jax.eval_shape(functools.partial(optimiser.init_optimiser, recipe.optimiser), weights)
    shardings = optimiser.optimiser_shardings(recipe.optimiser, mesh, weights)
    return _shapes(weights, jax.tree.map(lambda x: x.sharding, weights)), _shapes(moments, shardings)


@functools.partial(jax.jit, static_argnums=0)
def no_gradient(mesh: Mesh, weights: Any) -> tuple[Any, jax.Array]:
    """Zeros, to which the parts of a batch's gradient and loss are added."""
    return layout.like_weights(mesh, jax.tree.map(jnp.zeros_like, weights)), jnp.float32(0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def gradient_program(
    decoder: Decoder,
    params: Params | None,
    weights: Any,
    total: tuple[Any, jax.Array],
    groups: Groups,
    share: jax.Array,
) -> tuple[Any, jax.Array]:
    """Adds the part of a batch's gradient and loss that comes from one microbatch; compiled once per shape."""
    base, lora = _base_and_adapter(params, weights)
    new = optimiser.completion_gradient(decoder, base, lora, groups, share)
    gradient, loss = jax.tree.map(jnp.add, total, new)
    return layout.like_weights(_mesh(decoder), gradient), loss


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def update_program(
    spec: optimiser.OptimiserSpec,
    mesh: Mesh,
    weights: Any,
    opt_state: optax.OptState,
    gradient: Any,
    position: optimiser.Position,
) -> tuple[Any, optax.OptState, jax.Array]:
    """One step; also returns its learning rate."""
    rate = optimiser.learning_rate(spec, position)
    shardings = optimiser.optimiser_shardings(spec, mesh, weights)
    weights, opt_state = optimiser.update(spec, weights, opt_state, gradient, rate)
    return layout.like_weights(mesh, weights), jax.lax.with_sharding_constraint(opt_state, shardings), rate


@functools.partial(jax.jit, static_argnums=0)
def loss_program(decoder: Decoder, params: Params, lora: Lora | None, groups: Groups) -> jax.Array:
    """−Σ log π(token) over the response tokens of a batch."""
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    return -jnp.sum(decoder.apply(variables, groups))  # type: ignore[arg-type]


def mean_loss(recipe: Recipe, trainee: Trainee, texts: Texts, buckets: Sequence[Bucket]) -> float:
    """The mean negative log-likelihood of all completion tokens, in nats."""
    base, lora = _base_and_adapter(trainee.params, trainee.weights)
    total, size = 0.0, recipe.microbatch
    if recipe.packed:
        found, shape = plan(lengths_in(texts), size, multiple_on(jax.default_backend()), together=True)
        parts = [_Part(rows, size, buckets[-1], shape) for rows in found]
    else:
        cut = batches.parts(assign_buckets(texts, buckets), buckets, 1, (size,))
        parts = [_Part(rows, size, buckets[b], None) for b, rows, _ in cut]
    for part in progress(parts, desc="held-out loss", unit="batch"):
        groups = layout.put(pad_groups(texts, part.rows, part.bucket, size), layout.batch(trainee.mesh))
        total += float(loss_program(trainee.decoder.clone(packing=part.packing), base, lora, groups))
    return total / int(longest_of(texts.response_tokens).sum())


def _mesh(decoder: Decoder) -> Mesh:
    assert decoder.mesh is not None
    return decoder.mesh


def _base_and_adapter(params: Params | None, weights: Any) -> tuple[Params, Lora | None]:
    """The base weights, and the adapter if there is one, of a `Trainee`."""
    return (weights, None) if params is None else (params, weights)


def _shapes(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
