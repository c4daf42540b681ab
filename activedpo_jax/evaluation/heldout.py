"""Held-out evaluation: how well the implicit reward tells preferred responses from the others, and what training does
to their likelihoods.

KL(π_θ ‖ π_ref) is a mean over responses of π_θ, which the held-out ones are not.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax import layout
from activedpo_jax.data.batches import parts
from activedpo_jax.data.groups import Bucket, Groups, PairPool, assign_buckets, pad_pairs
from activedpo_jax.data.packing import Lengths, Packing, lengths_in, multiple_on, plan
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy, response_logps
from activedpo_jax.progress import progress
from activedpo_jax.resumable import NOTHING_SAVED, SavedWork, pieces
from activedpo_jax.training import losses


@functools.partial(jax.jit, static_argnums=0)
def score(decoder: Decoder, params: Params, lora: Lora, groups: Groups) -> jax.Array:
    """log π(y|x) of a batch, [G, m] float32."""
    return response_logps(decoder, params, lora, groups)


class Batches:
    """Rows of a pool as batches of pairs on the mesh; shapes repeat, so programs are compiled once each.

    Args:
      packed: batches are packed, all alike; else they are padded, bucket by bucket.
    """

    packing: Packing | None = None  # of every batch

    def __init__(
        self,
        pool: PairPool,
        rows: np.ndarray,
        buckets: Sequence[Bucket],
        size: int,
        mesh: jax.sharding.Mesh,
        packed: bool = False,
    ):
        self._pool, self._buckets, self._sharding = pool, buckets, layout.batch(mesh)
        self._size = layout.round_up(size, mesh)
        group, *shown = pool.pairs[rows].T
        of_groups = lengths_in(pool)
        lengths = Lengths(of_groups.prompts[group], of_groups.responses[group[:, None], np.stack(shown, axis=1)])
        self.lengths = np.zeros((pool.num_pairs, 2), np.int64)  # of both responses of every row
        self.lengths[rows] = lengths.responses
        if packed:
            found, self.packing = plan(lengths, self._size, multiple_on(jax.default_backend()), together=True)
            self._chunks = [(len(buckets) - 1, rows[members]) for members in found]
        else:
            bucket_of = assign_buckets(pool, buckets)[pool.pairs[rows, 0]]
            self._chunks = [(part.bucket, rows[part.places]) for part in parts(bucket_of, buckets, 2, (self._size,))]

    def __len__(self) -> int:
        return len(self._chunks)

    def rows(self, number: int) -> np.ndarray:
        """The rows of a batch, [≤ size]."""
        return self._chunks[number][1]

    def __getitem__(self, number: int) -> Groups:
        b, rows = self._chunks[number]

        def part(own: slice) -> Groups:
            return pad_pairs(self._pool, rows[own], self._buckets[b], len(range(*own.indices(self._size))))

        return layout.put_rows(part, self._size, self._sharding)

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """Of a batch's log-probs."""
        return jax.ShapeDtypeStruct((self._size, 2), jnp.float32, sharding=self._sharding)


def log_probs(policy: Policy, lora: Lora, batches: Batches, label: str, saved: SavedWork) -> np.ndarray:
    """log π(y|x) of both responses of every row in `batches`: [rows, 2] float32, indexed by row."""
    decoder = policy.packed(batches.packing).decoder
    found = pieces(
        saved,
        label.replace(" ", "_"),
        len(batches),
        lambda i: score(decoder, policy.params, lora, batches[i]),
        lambda _: batches.like,
    )
    count = sum(len(batches.rows(i)) for i in range(len(batches)))
    out = np.zeros((count, 2), np.float32)
    for i, logps in enumerate(progress(found, total=len(batches), desc=label, unit="batch")):
        rows = batches.rows(i)
        out[rows] = layout.get(logps)[: len(rows)]
    return out


def figures(
    beta: float, logps: np.ndarray, ref_logps: np.ndarray, lengths: np.ndarray, preferences: np.ndarray
) -> dict[str, float]:
    """What N pairs show beside accuracy, margin and the loss that is trained.

    Args:
      logps, ref_logps: [N, 2], log π_θ(y|x) and log π_ref(y|x); lengths: [N, 2], tokens.
      preferences: [N], the probability that the second is preferred.

    Returns:
      label_nll: −log σ(margin), the labels' under Bradley and Terry's model, nats a pair; what `sigmoid` trains.
      nll: −log π_θ of preferred responses, nats a token.
      ratio_preferred, ratio_rejected: log π_θ − log π_ref of preferred, and of the other responses, nats a token.
      tokens, tokens_labels: the mean length of the responses that the implicit reward prefers, and the labels do.
      longer, longer_labels: the share of pairs of which they prefer the longer; equal lengths count half, and so do
        equal rewards.
    """
    ratios = logps.astype(np.float64) - ref_logps
    by_reward = (1 + np.sign(ratios[:, 1] - ratios[:, 0])) / 2

    def tokens(preferences: np.ndarray) -> float:
        return float(losses.preferred_tokens(lengths, preferences)) / len(lengths)

    def a_token(values: np.ndarray, preferences: np.ndarray) -> float:
        return float(np.mean((1 - preferences) * values[:, 0] + preferences * values[:, 1])) / tokens(preferences)

    def longer(preferences: np.ndarray) -> float:
        return float(np.mean(1 + (2 * preferences - 1) * np.sign(lengths[:, 1] - lengths[:, 0]))) / 2

    log_odds = beta * (ratios[:, 1] - ratios[:, 0])
    return {
        "label_nll": float(np.mean(np.logaddexp(0, log_odds) - preferences * log_odds)),
        "nll": -a_token(logps.astype(np.float64), preferences),
        "ratio_preferred": a_token(ratios, preferences),
        "ratio_rejected": a_token(ratios, 1 - preferences),
        "tokens": tokens(by_reward),
        "tokens_labels": tokens(preferences),
        "longer": longer(by_reward),
        "longer_labels": longer(preferences),
    }


class Judged(NamedTuple):
    """What an adapter makes of the held-out set."""

    # Accuracy (ties count half), mean reward margin (nats), `figures`, and the mean of the loss that is trained, unless
    # that needs a KL of other responses, which nobody computes here
    scores: dict[str, float]
    margins: np.ndarray  # [N] float32: the preferred response's implicit reward less that of the other, nats


class Evaluator:
    """Scores adapters on a held-out set, whose reference log-probabilities are computed once.

    Args:
      preferences: [N], one for every pair of the set: 0 the first shown is preferred, 1 the second.
      batches: of all pairs of the set.
      saved: what is kept of the reference's log-probabilities.
    """

    def __init__(
        self,
        policy: Policy,
        preferences: np.ndarray,
        batches: Batches,
        loss: losses.LossSpec,
        saved: SavedWork = NOTHING_SAVED,
    ) -> None:
        self._policy, self.batches = policy, batches
        self._num_rows, self._loss = len(preferences), loss
        self._preferences = np.asarray(preferences, np.float64)
        self._ref = log_probs(policy, policy.reference, batches, "held-out reference", saved)
        # Each weight is one and sums are divided at the end, so that an accuracy is an exact fraction.
        weight = jnp.ones(self._num_rows, jnp.float32)
        token_share = weight * self._num_rows / losses.preferred_tokens(batches.lengths, preferences)
        self._pairs = losses.Preferences(
            jnp.asarray(preferences, jnp.int32), jnp.asarray(self._ref), weight, token_share
        )

    def judged(self, lora: Lora | None, saved: SavedWork = NOTHING_SAVED) -> Judged:
        """What an adapter makes of the held-out pairs; None: the reference model, with which every run starts."""
        logps = self._ref if lora is None else log_probs(self._policy, lora, self.batches, "evaluation", saved)
        found = losses.ordered(jnp.asarray(logps), self.batches.lengths, self._pairs)
        return Judged(self._metrics(logps), np.asarray(self._loss.beta * found.difference))

    def _metrics(self, logps: np.ndarray) -> dict[str, float]:
        lengths = self.batches.lengths
        loss = dataclasses.replace(self._loss, kind="sigmoid") if self._loss.needs_kl else self._loss
        out = losses.metrics(loss, jnp.asarray(logps), jnp.asarray(lengths, jnp.int32), self._pairs)
        found = {name: float(total) / self._num_rows for name, total in out._asdict().items()}
        if self._loss.needs_kl:
            del found["loss"]
        return found | figures(self._loss.beta, logps, self._ref, lengths, self._preferences)
