"""Selection outside of rounds, from evidence in host memory: shared by `api.choose` and the command `select`."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  gives NumPy bfloat16
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import layout
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.posterior import condition, information_gain, raised_lam
from activedpo_jax.selection.strategies import Evidence, Strategy, conditioned
from activedpo_jax.selection.streamed import streamed

condition_program = jax.jit(condition)


class Choice(NamedTuple):
    """K of N pairs, in pick order."""

    rows: np.ndarray  # [K] int64
    scores: np.ndarray  # [K] float32, what the strategy ranked them by; all 0 if it does not rank
    information_gain: float | None  # growth of log det V, nats; None if the scores are not variances
    lam: float  # the λ used; see `posterior.resolved_lam`
    fallback: bool  # the strategy had nothing to rank by and picked at random


class Known(NamedTuple):
    """What the posterior is made of."""

    vectors: jax.Array  # [n, D] float32, of the labelled pairs
    counts: jax.Array  # [n] bool, which of these are there and count


@dataclasses.dataclass(frozen=True)
class Query:
    """How many pairs to pick, and how."""

    strategy: Strategy
    count: int  # K
    lam: float  # λ of V = λI + Σ φφᵀ
    block: int  # candidates that each device holds while selecting
    seed: int  # of all random numbers
    width_scale: float = 1.0  # c of the bounds μ ± c s
    in_blocks: bool = False  # the design's vectors stay on the host; for strategies with `gains`


def choose(
    query: Query,
    evidence: Mapping[str, np.ndarray],
    available: np.ndarray,
    known: np.ndarray | None,
    mesh: Mesh,
) -> Choice:
    """Picks as the rounds of a run do: the first round, or a later one with these labels.

    Args:
      evidence: kinds of evidence by name, [N, ...] each and finite; at least those that the strategy needs, with
        `groups` and `responses` where it looks at prompts.
      available: [N] bool, the pairs that can be picked; at least K.
      known: [n, D] float32, the vectors of labelled pairs for the strategy's posterior; None: no pair is labelled.

    Raises:
      FloatingPointError: the scores are not finite.
    """
    design = query.strategy.design
    if known is None and design is not None:
        known = np.zeros((0, evidence[design].shape[-1]), np.float32)
    if query.in_blocks:
        assert query.strategy.gains and design is not None and known is not None
        labelled = Known(jnp.asarray(known), jnp.ones(len(known), bool))
        picks, lam = jax.device_get(in_blocks(query, evidence[design], available, labelled, mesh))
    else:
        picks, lam = _on_devices(query, evidence, available, known, mesh)
    rows, scores, fallback = np.asarray(picks.rows, np.int64), np.asarray(picks.scores), bool(picks.fallback)
    if np.any(rows < 0) or not np.all(np.isfinite(scores)):
        raise FloatingPointError(f"{query.strategy.name}: the scores are not finite; raise λ, or scale the features")
    gain = float(information_gain(jnp.asarray(scores))) if query.strategy.gains and not fallback else None
    return Choice(rows, scores, gain, float(lam), fallback)


def in_blocks(
    query: Query, vectors: np.ndarray, available: np.ndarray, known: Known, mesh: Mesh
) -> tuple[Picks, jax.Array]:
    """The picks, and λ as used, where the vectors [N, D] float32 or bfloat16 stay on the host."""
    largest = 0.0
    for start in range(0, len(vectors), query.block):
        some = np.asarray(vectors[start : start + query.block], np.float32)
        squares = np.einsum("nd,nd->n", some, some)
        largest = float(np.max(squares, where=available[start : start + query.block], initial=largest))
    lam = raised_lam(largest, query.lam)
    posterior = condition_program(known.vectors, known.counts, lam)
    picks = streamed(vectors, available, posterior, lam, num_picks=query.count, block=query.block, mesh=mesh)
    return picks, lam


def _on_devices(
    query: Query,
    evidence: Mapping[str, np.ndarray],
    available: np.ndarray,
    known: np.ndarray | None,
    mesh: Mesh,
) -> tuple[Picks, jax.Array]:
    """The picks, and λ as used."""
    padding = -available.size % mesh.size  # rows that cannot be picked make N a multiple of the devices

    def place(x: np.ndarray) -> jax.Array:
        padded = np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) if padding else x
        return layout.put(padded, layout.rows(mesh))

    seen = Evidence(**{name: place(x) for name, x in evidence.items()})
    return jax.device_get(_program(query, mesh, seen, place(available), known))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _program(
    query: Query, mesh: Mesh, seen: Evidence, available: jax.Array, known: jax.Array | None
) -> tuple[Picks, jax.Array]:
    counts = None if known is None else jnp.ones(known.shape[0], bool)
    seen = {**seen, "width_scale": query.width_scale}
    seen = conditioned(query.strategy, seen, available, query.lam, known, counts)
    key = jax.random.fold_in(jax.random.key(jnp.uint32(query.seed)), 1)  # as in the first round of a run
    picks = query.strategy.select(seen, available, key, query.count, query.block, mesh)
    return picks._replace(fallback=jnp.asarray(picks.fallback)), seen["lam"]


def as_features(value: Any, source: str) -> np.ndarray:
    """Converts the vectors of pairs to [N, D] float32.

    Args:
      value: an array of floats of any width, or anything that NumPy converts to one.
      source: its name, for error messages.

    Raises:
      ValueError: the value is not a matrix of floats, has no row or no column, or is not finite.
    """
    found = np.asarray(value)
    if found.ndim != 2 or 0 in found.shape or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"{source}: got shape {list(found.shape)} of {found.dtype}; expected [N, D], a row of float16, bfloat16, "
            "float32 or float64 for each pair"
        )
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(found, np.float32)
    check_finite(found, source)
    return found


def check_finite(values: np.ndarray, source: str) -> None:
    """Checks that every row is finite, and its squared length too.

    Raises:
      ValueError: one is not; names the row, from 0.
    """
    rows = values.reshape(len(values), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        wrong = np.flatnonzero(~np.isfinite(np.einsum("nd,nd->n", rows, rows)))
    if len(wrong):
        raise ValueError(
            f"{source}: row {wrong[0]} (from 0) is not finite, or too large for float32 ({len(wrong)} of {len(rows)} "
            "rows are); expected finite numbers: compute them again"
        )
