"""Whether the posterior over rewards means what it says: how often true differences lie within c widths of its mean.

The mean is the implicit reward's difference, the width ‖φ‖ in V⁻¹ (arXiv 2505.19241, section 3; `selection.widths`).
Pairs with known rewards show how far the one is from the truth in units of the other.  A width is not a standard
deviation until it is scaled: features of unit length and λ are no statement of a prior.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import special

from activedpo_jax import layout
from activedpo_jax.data.groups import Groups
from activedpo_jax.evaluation.heldout import Batches
from activedpo_jax.evidence import registry
from activedpo_jax.evidence.spec import EvidenceSpec
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy
from activedpo_jax.progress import progress
from activedpo_jax.selection.posterior import condition, prior_variances, raised_lam
from activedpo_jax.selection.widths import widths

MULTIPLES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # c
NOMINAL = (0.5, 0.68, 0.9, 0.95)  # shares of a normal distribution


class Posterior(NamedTuple):
    """V⁻¹ = I/λ − WᵀW of the labelled pairs."""

    w: jax.Array  # W [n, D] float32
    lam: jax.Array  # λ as used; see `posterior.raised_lam`


@jax.jit
def posterior_of(known: jax.Array, counts: jax.Array, lam: jax.Array | float) -> Posterior:
    """Arguments as of `selection.posterior.condition`."""
    largest = jnp.max(jnp.where(counts, prior_variances(known, 1.0), 0.0), initial=0.0)
    lam = raised_lam(largest, lam)
    return Posterior(condition(known, counts, lam), lam)


def heldout_widths(
    spec: EvidenceSpec, policy: Policy, lora: Lora, posterior: Posterior, batches: Batches, seed: jax.Array
) -> np.ndarray:
    """‖φ‖ in V⁻¹ of every held-out pair at θ: [N] float32.

    Args:
      lora: the adapter of π_θ; seed: scalar uint32, of the sketch.
    """
    now, parts = policy.packed(batches.packing), []
    for i in progress(range(len(batches)), total=len(batches), desc="calibration", unit="batch"):
        found = _widths(spec, now.decoder, now.params, now.reference, lora, posterior, batches[i], seed)
        parts.append((batches.rows(i), layout.get(found)))
    out = np.zeros(sum(len(rows) for rows, _ in parts), np.float32)
    for rows, values in parts:
        out[rows] = values[: len(rows)]
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _widths(
    spec: EvidenceSpec,
    decoder: Any,
    params: Any,
    reference: Lora,
    lora: Lora,
    posterior: Posterior,
    groups: Groups,
    seed: jax.Array,
) -> jax.Array:
    mesh: Mesh = spec.mesh
    features = registry.compute(("features",), spec, Policy(decoder, params, reference), lora, groups, seed)["features"]
    return widths(features, posterior.w, posterior.lam, mesh).values


def calibration(means: np.ndarray, truths: np.ndarray, widths: np.ndarray, scale: float | None) -> dict[str, Any]:
    """The report on N pairs.

    Args:
      means: [N], implicit reward differences, nats; truths: [N], true ones; widths: [N], above 0.
      scale: true differences times this are nats: one by the temperature of the labels' noise.  None: labels without
        noise say nothing of it, and it is that of the least squares between means and truths.

    Returns:
      What JSON can hold: `scale`, and whether it was `fitted`; `within`, the share of pairs whose truth lies within c
      widths of the mean, by c; `needed`, by a normal distribution's share, by what the widths would have to be
      multiplied to contain as many; `correlation` of |mean − truth| and width, by ranks: 0 where widths say nothing.

    Raises:
      ValueError: there is no pair with a width.
    """
    there = widths > 0
    if not there.any():
        raise ValueError("calibration: every held-out pair has width 0; expected pairs whose responses differ")
    means, truths, widths = (np.asarray(x, np.float64)[there] for x in (means, truths, widths))
    fitted = scale is None
    if scale is None:
        squares = float(truths @ truths)
        scale = float(means @ truths) / squares if squares else 0.0
    errors = np.abs(means - scale * truths)
    ratios = errors / widths
    quantile = {share: float(special.ndtri((1 + share) / 2)) for share in NOMINAL}
    return {
        "pairs": len(means),
        "scale": scale,
        "fitted": fitted,
        "within": {str(c): float(np.mean(ratios <= c)) for c in MULTIPLES},
        "needed": {str(share): float(np.quantile(ratios, share)) / quantile[share] for share in NOMINAL},
        "correlation": _rank_correlation(errors, widths),
    }


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's; None where one does not vary."""
    from scipy import stats  # half a second, which most runs need not wait

    return None if np.ptp(x) == 0 or np.ptp(y) == 0 else float(stats.spearmanr(x, y).statistic)


def in_words(report: dict[str, Any]) -> str:
    """One line."""
    within, needed = report["within"], report["needed"]
    return (
        f"calibration: {within['1.0']:.0%} of true differences within 1 width, {within['2.0']:.0%} within 2; widths "
        f"times {needed['0.68']:.2g} would contain 68%, times {needed['0.95']:.2g} 95%"
    )
