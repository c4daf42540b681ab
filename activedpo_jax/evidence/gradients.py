"""Features of response pairs: sketched LoRA gradients of their log-probabilities (arXiv 2505.19241, eq. 4 and 5).

    g(x,y) = ∇_LoRA log π_θ(y|x)        φ(x,y1,y2) = ĝ(x,y1) − ĝ(x,y2)

where ĝ is g sketched to D dimensions and then, with `response` normalisation, scaled to unit length.  (β and π_ref
drop out: the first scales every feature alike, the second has no gradient.)

`response_features` and `pair_features` are fast, thanks to the probe of `models.lora`; `reference_gradients` computes
the same with `vmap(grad)`, to be read and for the tests to compare with.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax.data.groups import Groups, group_pairs
from activedpo_jax.data.packing import in_turn
from activedpo_jax.evidence.spec import EvidenceSpec, FeatureSpec
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora, Probe
from activedpo_jax.models.policy import Policy, response_logps
from activedpo_jax.models.sketch import tiled_count_sketch


def _probe(groups: Groups, dim: int, seed: jax.Array) -> Probe:
    """What makes the gradient of each group a sketch to D dimensions."""
    return Probe(jnp.zeros((groups.prompt_ids.shape[0], dim), jnp.float32), seed)


def _weighted_gradient(
    decoder: Decoder, params: Params, lora: Lora, groups: Groups, weights: jax.Array, probe: Probe
) -> jax.Array:
    """Sketch of Σ_j w_j g(x, y_j) for each group, weights [m] or [G, m]: [G, D], one forward and one backward pass."""

    def total(zeros: jax.Array) -> jax.Array:
        logps = decoder.apply({"params": params, "lora": lora}, groups, probe._replace(zeros=zeros))
        return jnp.sum(jnp.sum(logps, axis=-1) * weights)  # type: ignore[arg-type]

    return jax.grad(total)(probe.zeros)


def response_features(
    decoder: Decoder, params: Params, lora: Lora, groups: Groups, dim: int, seed: jax.Array
) -> jax.Array:
    """The sketched gradient of every response: [G, m, D] float32, not normalised.

    Each response needs a backward pass of its own, through its prompt too: the prompt's tokens carry the gradients of
    all responses, which no linear map can separate again.  But the prompt's *forward* pass is shared by all.  Mapping
    over the responses alone achieves this: whatever depends on the prompt only is not mapped, so it is computed, and
    kept for the backward passes, once.  In tokens through the network, for m responses of R tokens to a prompt of P:

        separate rows    forward m(P + R)    backward m(P + R)
        here             forward P + mR      backward m(P + R)
        summed gradient  forward P + mR      backward P + mR     (`none` on pairs; cannot be normalised)
    """

    def single_response(response_ids: jax.Array, response_len: jax.Array) -> jax.Array:
        single = Groups(groups.prompt_ids, groups.prompt_len, response_ids[:, None], response_len[:, None])
        return _weighted_gradient(decoder, params, lora, single, jnp.ones(1), _probe(single, dim, seed))

    mapped = jax.vmap(single_response, in_axes=1, out_axes=1)
    ids, lengths = jnp.asarray(groups.response_ids), jnp.asarray(groups.response_len)
    if decoder.packing is None:
        return mapped(ids, lengths)
    # Those that are mapped together share an axis, which long and short ones fill in turn.
    order = in_turn(lengths, jnp)
    found = mapped(jnp.take_along_axis(ids, order[..., None], 1), jnp.take_along_axis(lengths, order, 1))
    return jnp.take_along_axis(found, jnp.argsort(order, axis=1)[..., None], 1)


def normalise(features: jax.Array) -> jax.Array:
    """Scales the last axis to unit length; zero rows, which padding gives, stay zero."""
    norms = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.where(norms > 0, norms, 1.0)


def pair_features(
    decoder: Decoder, params: Params, lora: Lora, groups: Groups, spec: FeatureSpec, seed: jax.Array
) -> jax.Array:
    """φ of every pair of responses i < j of each group.

    Args:
      groups: G groups of m responses; seed: scalar uint32, of the sketch.

    Returns:
      [G, m(m−1)/2, D] float32, in the order of `data.groups.group_pairs`.
    """
    m = groups.response_ids.shape[1]
    if spec.normalisation == "none" and m == 2:  # the difference itself is one gradient
        probe = _probe(groups, spec.dim, seed)
        return _weighted_gradient(decoder, params, lora, groups, jnp.array([1.0, -1.0]), probe)[:, None]
    features = scaled_features(decoder, params, lora, groups, spec, seed)
    first, second = np.asarray(group_pairs(m)).T
    return features[:, first] - features[:, second]


def scaled_features(
    decoder: Decoder, params: Params, lora: Lora, groups: Groups, spec: FeatureSpec, seed: jax.Array
) -> jax.Array:
    """ĝ of every response: [G, m, D] float32.  Arguments as of `pair_features`."""
    found = response_features(decoder, params, lora, groups, spec.dim, seed)
    return normalise(found) if spec.normalisation == "response" else found


def features(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """`pair_features` as a kind of evidence: [G, m(m−1)/2, D] of the dtype in which they are stored."""
    found = pair_features(policy.decoder, policy.params, lora, groups, spec.features, seed)
    return found.astype(spec.features.dtype)


def features_of_both(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """ĝ of both responses of every pair i < j: [G, m(m−1)/2, 2, D] of the dtype in which features are stored.

    φ is their difference, so that rules which look at single responses need no second pass; see
    `selection.widths.pair_vectors`.
    """
    found = scaled_features(policy.decoder, policy.params, lora, groups, spec.features, seed)
    return found[:, group_pairs(groups.response_ids.shape[1])].astype(spec.features.dtype)


def reference_gradients(decoder: Decoder, params: Params, lora: Lora, groups: Groups) -> dict[str, Any]:
    """g(x,y) of every response by `vmap(grad)` over the LoRA tree: leaves [G, m, L, ...].  Slow and readable."""

    def log_prob(lora: Lora, prompt_ids: Any, prompt_len: Any, response_ids: Any, response_len: Any) -> jax.Array:
        single = Groups(prompt_ids[None], prompt_len[None], response_ids[None, None], response_len[None, None])
        return response_logps(decoder, params, lora, single)[0, 0]

    per_response = jax.vmap(jax.grad(log_prob), in_axes=(None, None, None, 0, 0))
    return jax.vmap(per_response, in_axes=(None, 0, 0, 0, 0))(lora, *groups)


def sketch_gradients(gradients: dict[str, Any], dim: int, seed: jax.Array) -> jax.Array:
    """Sketches `reference_gradients` layer by layer and matrix by matrix: [G, m, D]."""
    total: Any = 0.0
    for module, matrices in gradients["layers"].items():
        for name, grad in matrices.items():
            groups, m, layers = grad.shape[:3]
            rows = jnp.moveaxis(grad.reshape(groups * m, *grad.shape[2:]), 1, 0)
            sketch = lambda args, name=f"{module}/{name}": tiled_count_sketch(args[0], dim, seed, args[1], name)  # noqa: E731
            total += jnp.sum(jax.lax.map(sketch, (rows, jnp.arange(layers))), axis=0).reshape(groups, m, dim)
    return total
