"""`dopt`: the K largest p(1−p) ψᵀM⁻¹ψ, M = Σ p(1−p) ψψᵀ + 10⁻⁶ I over the pool and the labelled pairs.

How much each pair adds to the Fisher information of a reward that is linear in the last layer, all being answered:
ARM-FI (ICML 2025), in its form that knows of earlier labels.  These are statistical leverage scores, of one design for
the whole pool, so that no pick lowers the score of another.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax.selection.greedy import Picks, divisible
from activedpo_jax.selection.posterior import HIGHEST, TIE, widened
from activedpo_jax.selection.ranking import largest
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required
from activedpo_jax.selection.sums import sum_over_rows

_RIDGE = 1e-6  # of ARM-FI, in units of v's squared length, v = β √(p(1−p)) ψ
_EPSILON = 2.0**-23


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are leverages, from 0 to 1.  Key and block are not used."""
    vectors, known, counts = required("dopt", evidence, "fisher_embeddings", "known", "counts")
    scores = leverages(vectors, available, jnp.where(counts[:, None], known, 0.0).astype(jnp.float32), mesh)
    return largest(scores, jnp.full_like(scores, 8 * TIE), available, num_picks)


def leverages(vectors: jax.Array, counted: jax.Array, known: jax.Array, mesh: Mesh) -> jax.Array:
    """vᵀM⁻¹v of every row, M = Σ vvᵀ + ridge over the counted rows and the known ones.

    M's condition number is more than float32 holds.  So its factor comes from four Cholesky factorisations, each of
    what the one before has made better conditioned, the first two shifted to be possible (after Fukaya et al. 2020,
    shifted CholeskyQR3): v is replaced by L⁻¹v until M is the identity.

    Args:
      vectors: [N, d] float32; counted: [N] bool; known: [n, d] float32.

    Returns:
      [N] float32; of rows that are not counted, anything.
    """
    axes = mesh.axis_names
    rows = P(axes)
    local = functools.partial(_leverages, axes=axes)
    whole, inside = divisible(mesh, vectors, counted)
    # Unchecked: sums begin at zeros, the same on every device.
    found = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, P()), out_specs=rows, check_vma=False)(
        whole, inside, known
    )
    return found[: len(vectors)]


def _leverages(vectors: jax.Array, counted: jax.Array, known: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    dim = vectors.shape[1]
    once = jnp.concatenate([known, jnp.sqrt(_RIDGE) * jnp.eye(dim)])  # the same on every device
    turn = jnp.eye(dim)  # T, which makes M the identity: Σ Tᵀv(Tᵀv)ᵀ = I

    def moment(rows: jax.Array) -> jax.Array:
        turned = _product(rows, turn)
        return _product(turned.T, turned)

    for shifted in (True, True, False, False):
        gram = jax.lax.psum(sum_over_rows(moment, vectors, counted), axes) + moment(once)
        if shifted:  # by what its rounding may take from its least eigenvalue
            gram += 8 * _EPSILON * jnp.trace(gram) * jnp.eye(dim)
        turn = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(gram), turn.T, lower=True).T
    return widened(lambda rows: jnp.sum(jnp.square(_product(rows, turn)), axis=1), vectors)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=HIGHEST)


STRATEGY = Strategy("dopt", select, frozenset({"fisher_embeddings"}), design="fisher_embeddings")
