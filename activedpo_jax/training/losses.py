"""The implicit reward and the DPO loss: pure functions (Rafailov et al. 2023)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from activedpo_jax.data.groups import Array, Groups
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import response_logps


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

    Of a tie: of the first less the second.
    """
    rewards = beta * (logps - pairs.ref_logps)
    return (rewards[:, 0] - rewards[:, 1]) * jnp.where(jnp.asarray(pairs.preference) > 0.5, -1, 1)


def sigmoid_loss(margins: jax.Array, label_smoothing: float | jax.Array) -> jax.Array:
    """−(1−ε) log σ(Δ) − ε log σ(−Δ): eq. 7 of Rafailov et al.; ε > 0 is conservative DPO (Mitchell 2023): [B]."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margins) - label_smoothing * jax.nn.log_sigmoid(-margins)


def metrics(logps: jax.Array, pairs: Preferences, beta: float, label_smoothing: float) -> DpoMetrics:
    """Loss, accuracy and margin of a batch from log π_θ [B, 2].

    A preference that is not certain is the mean over its two outcomes, which label smoothing is, too.
    """
    margins = reward_margins(logps, pairs, beta)
    doubt = jnp.minimum(pairs.preference, 1.0 - pairs.preference)
    margin_of_preferred = jnp.where(doubt == 0.5, 0.0, margins)
    correct = (margin_of_preferred > 0) + 0.5 * (margin_of_preferred == 0)
    smoothing = label_smoothing * (1 - doubt) + (1 - label_smoothing) * doubt
    return DpoMetrics(
        loss=jnp.sum(sigmoid_loss(margins, smoothing) * pairs.weight),
        accuracy=jnp.sum(correct * pairs.weight),
        margin=jnp.sum(margin_of_preferred * pairs.weight),
    )


def loss(
    decoder: Decoder,
    params: Params,
    lora: Lora,
    groups: Groups,
    pairs: Preferences,
    beta: float,
    label_smoothing: float,
) -> tuple[jax.Array, DpoMetrics]:
    """The DPO loss of a batch of pairs (groups with m = 2), and its metrics."""
    out = metrics(response_logps(decoder, params, lora, groups), pairs, beta, label_smoothing)
    return out.loss, out
