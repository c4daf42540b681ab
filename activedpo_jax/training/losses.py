"""The implicit reward and the losses of preferences: pure functions (Rafailov et al. 2023, and variants)."""

import dataclasses
import math
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
    """Which loss, of which reward.

    Raises:
      ValueError: the loss has no value without label smoothing.
    """

    kind: str  # of `LOSSES`
    beta: float  # of the implicit reward
    label_smoothing: float  # ε, the probability that a label is taken to be wrong
    sft_weight: float = 0.0  # of the preferred responses' negative log-likelihood, which is added

    @property
    def needs_kl(self) -> bool:
        """Whether the loss of a pair depends on an estimate of KL(π_θ ‖ π_ref) from the rest of its batch."""
        return self.kind == "kto"

    def __post_init__(self) -> None:
        if self.kind == "exo_pair" and self.label_smoothing == 0:
            raise ValueError(
                "config.dpo.label_smoothing=0 with config.dpo.loss='exo_pair', whose target gives the other response "
                "that probability, and takes its logarithm; expected more than 0: the paper has 1e-3"
            )


class Preferences(NamedTuple):
    """B labelled pairs in the order in which they were shown."""

    preference: Array  # [B] the probability that the second is preferred: 0 or 1, ½ for a tie
    ref_logps: Array  # [B, 2] float32, log π_ref of the two
    weight: Array  # [B] float32, each pair's share of the mean: 1/n, so that parts of a batch add up; 0 at padding
    # [B] float32, likewise the share of each preferred token: 1/`preferred_tokens`; None: the loss has no SFT term
    token_share: Array | None = None
    kl: Array | None = None  # scalar float32, of `rounds.learn.mismatch` for the whole batch; None: see `needs_kl`


class DpoMetrics(NamedTuple):
    """Means over a batch, float32 scalars: sums by `Preferences.weight`."""

    loss: jax.Array
    accuracy: jax.Array  # share of pairs whose preferred response has the larger implicit reward; ties count half
    margin: jax.Array  # implicit reward of the preferred response less that of the other


class Ordered(NamedTuple):
    """B pairs, the preferred response first; [B, 2] float32."""

    logps: jax.Array  # log π_θ(y|x)
    ratios: jax.Array  # log π_θ(y|x) − log π_ref(y|x)
    lengths: jax.Array  # tokens, at least 1
    kl: Array | None = None  # scalar, of `Preferences`

    @property
    def turned(self) -> "Ordered":
        """The other response first."""
        return Ordered(self.logps[:, ::-1], self.ratios[:, ::-1], self.lengths[:, ::-1], self.kl)

    @property
    def difference(self) -> jax.Array:
        """Of the ratios, [B]."""
        return self.ratios[:, 0] - self.ratios[:, 1]

    @property
    def difference_a_token(self) -> jax.Array:
        """Of the ratios by the response's token, [B]."""
        ratios = self.ratios / self.lengths
        return ratios[:, 0] - ratios[:, 1]


def sigmoid(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """−log σ(Δ), Δ = β times the difference of the ratios: eq. 7 of Rafailov et al. (2023)."""
    return -jax.nn.log_sigmoid(spec.beta * pairs.difference)


def sigmoid_norm(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """−log σ(β times the difference of the ratios a token): length-normalised DPO (Tülu 3, Lambert et al. 2024)."""
    return -jax.nn.log_sigmoid(spec.beta * pairs.difference_a_token)


def hinge(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """max(0, 1 − Δ): Zhao et al. (2023), in the normalised form of Liu et al. (2023)."""
    return jax.nn.relu(1 - spec.beta * pairs.difference)


def ipo(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """(difference of the ratios a token − 1/(2β))²: eq. 17 of Azar et al. (2023), where β is τ.

    The ratios are those of a token on average, as in TRL, whose authors had this from the paper's.
    """
    return (pairs.difference_a_token - 1 / (2 * spec.beta)) ** 2


def robust(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """((1−ε) loss(Δ) − ε loss(−Δ))/(1−2ε), `sigmoid`'s without bias if a label is wrong with probability ε.

    Chowdhury et al. (2024).
    """
    epsilon = spec.label_smoothing
    return ((1 - epsilon) * sigmoid(spec, pairs) - epsilon * sigmoid(spec, pairs.turned)) / (1 - 2 * epsilon)


def exo_pair(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """KL from σ(Δ), σ(−Δ) to 1−ε, ε: eq. 16 of Ji et al. (2024, arXiv 2402.00856)."""
    margins = spec.beta * pairs.difference
    log_first, log_second = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    wanted = math.log1p(-spec.label_smoothing), math.log(spec.label_smoothing)
    return jnp.exp(log_first) * (log_first - wanted[0]) + jnp.exp(log_second) * (log_second - wanted[1])


def nca_pair(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """−log σ(r₁) − ½ Σ log σ(−r), r = β ratio: Chen et al. (2024, arXiv 2402.05369) for pairs."""
    rewards = spec.beta * pairs.ratios
    return -jax.nn.log_sigmoid(rewards[:, 0]) - 0.5 * jnp.sum(jax.nn.log_sigmoid(-rewards), axis=1)


def bco_pair(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """−log σ(r₁) − log σ(−r₂): Jung et al. (2024, arXiv 2404.04656), without the reward's shift, as TRL's."""
    rewards = spec.beta * pairs.ratios
    return -jax.nn.log_sigmoid(rewards[:, 0]) - jax.nn.log_sigmoid(-rewards[:, 1])


def sppo_hard(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """(ratio₁ − 1/(2β))² + (ratio₂ + 1/(2β))²: eq. 4.7 of Wu et al. (2024), the winner's probability 1."""
    return (pairs.ratios[:, 0] - 0.5 / spec.beta) ** 2 + (pairs.ratios[:, 1] + 0.5 / spec.beta) ** 2


def apo_zero(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """1 − σ(r₁) + σ(r₂): eq. 7 of D'Oosterlinck et al. (2024), for preferred responses better than the model's."""
    first, second = jax.nn.sigmoid(spec.beta * pairs.ratios).T
    return 1 - first + second


def apo_down(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """σ(r₁) + 1 − σ(r₁ − r₂): eq. 8 of D'Oosterlinck et al. (2024), for preferred responses worse than the model's."""
    return jax.nn.sigmoid(spec.beta * pairs.ratios[:, 0]) + 1 - jax.nn.sigmoid(spec.beta * pairs.difference)


def orpo(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """−log p₁ − β log σ(log odds p₁ − log odds p₂), p = π_θ(y|x)^(1/|y|): eq. 6 and 7 of Hong et al. (2024).

    There is no π_ref in it, and β is the paper's λ.
    """
    averages = pairs.logps / pairs.lengths
    # log(1 − p), p < 1 but for rounding.
    others = jnp.log(-jnp.expm1(jnp.minimum(averages, -1e-7)))
    odds = averages - others
    return -averages[:, 0] - spec.beta * jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1])


def kto(spec: LossSpec, pairs: Ordered) -> jax.Array:
    """The mean of 1 − σ(β(ratio₁ − z₀)) and 1 − σ(β(z₀ − ratio₂)): eq. 7 of Ethayarajh et al. (2024), λ_D = λ_U = 1.

    z₀ estimates KL(π_θ ‖ π_ref), is at least 0, and has no gradient.
    """
    assert pairs.kl is not None
    first, second = (spec.beta * (pairs.ratios - jnp.maximum(pairs.kl, 0))).T
    return (jax.nn.sigmoid(-first) + jax.nn.sigmoid(second)) / 2


# The loss of each pair, [B], by `config.dpo.loss`; names and values are TRL's.
LOSSES: dict[str, Callable[[LossSpec, Ordered], jax.Array]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "orpo": orpo,
    "kto": kto,
}

_OWN_SMOOTHING = ("robust", "exo_pair")  # ε has a place of its own in these


def smoothed(spec: LossSpec, pairs: Ordered, doubt: float | jax.Array) -> jax.Array:
    """The mean loss if the label is wrong with probability ε and, as it stands, uncertain by `doubt`: [B].

    With `sigmoid` and no doubt that is (1−ε) loss(Δ) + ε loss(−Δ), conservative DPO (Mitchell 2023), where TRL's
    `sigmoid` ignores ε.
    """
    loss, epsilon = LOSSES[spec.kind], 0.0 if spec.kind in _OWN_SMOOTHING else spec.label_smoothing
    wrong = epsilon * (1 - doubt) + (1 - epsilon) * doubt
    return (1 - wrong) * loss(spec, pairs) + wrong * loss(spec, pairs.turned)


def ordered(logps: jax.Array, lengths: Array, pairs: Preferences) -> Ordered:
    """Pairs as labelled; of a tie, the response that was shown first is first."""
    found = Ordered(logps, logps - pairs.ref_logps, jnp.maximum(lengths, 1).astype(jnp.float32), pairs.kl)
    second = jnp.asarray(pairs.preference)[:, None] > 0.5
    return jax.tree.map(lambda x, turned: jnp.where(second, turned, x), found, found.turned)._replace(kl=pairs.kl)


def preferred_tokens(lengths: Array, preference: Array) -> Array:
    """The tokens of all preferred responses of a batch, scalar; of a tie, the mean of the two.

    Args:
      lengths: [B, 2], 0 at padding.
    """
    return ((1 - preference) * lengths[:, 0] + preference * lengths[:, 1]).sum()


def metrics(spec: LossSpec, logps: jax.Array, lengths: Array, pairs: Preferences) -> DpoMetrics:
    """Loss, accuracy and margin of a batch from log π_θ [B, 2] and the responses' tokens [B, 2].

    The margin is β times the difference of log π_θ − log π_ref (Rafailov et al., eq. 5), whatever the loss.  The loss
    of an uncertain preference is the mean over its two outcomes.  The SFT term is the mean of −log π_θ over all tokens
    of the batch's preferred responses, TRL's `sft`: a longer response counts more.  It takes no account of ε.
    """
    found = ordered(logps, lengths, pairs)
    doubt = jnp.minimum(pairs.preference, 1.0 - pairs.preference)
    margins = jnp.where(doubt == 0.5, 0.0, spec.beta * found.difference)
    correct = (margins > 0) + 0.5 * (margins == 0)
    loss = jnp.sum(smoothed(spec, found, doubt) * pairs.weight)
    if spec.sft_weight:
        assert pairs.token_share is not None
        preferred = (1 - doubt) * found.logps[:, 0] + doubt * found.logps[:, 1]
        loss -= spec.sft_weight * jnp.sum(preferred * pairs.token_share)
    return DpoMetrics(
        loss=loss,
        accuracy=jnp.sum(correct * pairs.weight),
        margin=jnp.sum(margins * pairs.weight),
    )


def loss(
    spec: LossSpec, decoder: Decoder, params: Params, lora: Lora, groups: Groups, pairs: Preferences
) -> tuple[jax.Array, DpoMetrics]:
    """The loss of a batch of pairs (groups with m = 2), and its metrics."""
    logps = response_logps(decoder, params, lora, groups)
    out = metrics(spec, logps, jnp.asarray(groups.response_len), pairs)
    return out.loss, out
