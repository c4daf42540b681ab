"""The implicit reward and the DPO loss: pure functions (Rafailov et al. 2023)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from activedpo_jax.data.groups import Array, Groups
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import response_logps


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """Which loss, of which reward."""

    kind: str  # of `LOSSES`
    beta: float  # of the implicit reward
    label_smoothing: float  # ε, the probability that a label is taken to be wrong


class Preferences(NamedTuple):
    """B labelled pairs in the order in which they were shown."""

    preference: Array  # [B] the probability that the second is preferred: 0 or 1, ½ for a tie
    ref_logps: Array  # [B, 2] float32, log π_ref of the two
    weight: Array  # [B] float32, each pair's share of the mean: 1/n, so that parts of a batch add up; 0 at padding


class DpoMetrics(NamedTuple):
    """Means over a batch, float32 scalars: sums by `Preferences.weight`."""

    loss: jax.Array
    accuracy: jax.Array  # share of pairs whose preferred response has the larger implicit reward; ties count half
    margin: jax.Array  # implicit reward of the preferred response less that of the other


def reward_margins(logps: jax.Array, pairs: Preferences, beta: float) -> jax.Array:
    """r(preferred) − r(other) with r(x,y) = β [log π_θ(y|x) − log π_ref(y|x)] (Rafailov et al., eq. 5): [B] float32.

    For a tie: r(first) − r(second).
    """
    rewards = beta * (logps - pairs.ref_logps)
    return (rewards[:, 0] - rewards[:, 1]) * jnp.where(jnp.asarray(pairs.preference) > 0.5, -1, 1)


def sigmoid(margins: jax.Array) -> jax.Array:
    """−log σ(Δ): eq. 7 of Rafailov et al. (2023)."""
    return -jax.nn.log_sigmoid(margins)


def hinge(margins: jax.Array) -> jax.Array:
    """max(0, 1 − Δ): Zhao et al. (2023), in the normalised form of Liu et al. (2023)."""
    return jax.nn.relu(1 - margins)


# A loss of the margin Δ = r(preferred) − r(other), by `config.dpo.loss`; names and values are TRL's.
LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {"sigmoid": sigmoid, "hinge": hinge}


def smoothed(spec: LossSpec, margins: jax.Array, smoothing: float | jax.Array) -> jax.Array:
    """(1−ε) loss(Δ) + ε loss(−Δ), the mean if the label is wrong with probability ε: [B].

    With `sigmoid` that is conservative DPO (Mitchell 2023).
    """
    loss = LOSSES[spec.kind]
    return (1 - smoothing) * loss(margins) + smoothing * loss(-margins)


def metrics(spec: LossSpec, logps: jax.Array, pairs: Preferences) -> DpoMetrics:
    """Loss, accuracy and margin of a batch from log π_θ [B, 2].

    The loss of an uncertain preference is the mean over its two outcomes, as with label smoothing.
    """
    margins = reward_margins(logps, pairs, spec.beta)
    doubt = jnp.minimum(pairs.preference, 1.0 - pairs.preference)
    margin_of_preferred = jnp.where(doubt == 0.5, 0.0, margins)
    correct = (margin_of_preferred > 0) + 0.5 * (margin_of_preferred == 0)
    smoothing = spec.label_smoothing * (1 - doubt) + (1 - spec.label_smoothing) * doubt
    return DpoMetrics(
        loss=jnp.sum(smoothed(spec, margins, smoothing) * pairs.weight),
        accuracy=jnp.sum(correct * pairs.weight),
        margin=jnp.sum(margin_of_preferred * pairs.weight),
    )


def loss(
    spec: LossSpec, decoder: Decoder, params: Params, lora: Lora, groups: Groups, pairs: Preferences
) -> tuple[jax.Array, DpoMetrics]:
    """The DPO loss of a batch of pairs (groups with m = 2), and its metrics."""
    out = metrics(spec, response_logps(decoder, params, lora, groups), pairs)
    return out.loss, out
