"""Held-out evaluation: how well the implicit reward tells preferred responses from the others."""

import functools
from collections.abc import Sequence

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
        self._policy, self._batches = policy, batches
        self._num_rows, self._loss = len(preferences), loss
        self._lengths = jnp.asarray(batches.lengths, jnp.int32)
        self._ref = log_probs(policy, policy.reference, batches, "held-out reference", saved)
        # Each weight is one and sums are divided at the end, so that an accuracy is an exact fraction.
        weight = jnp.ones(self._num_rows, jnp.float32)
        token_share = weight * self._num_rows / losses.preferred_tokens(batches.lengths, preferences)
        self._pairs = losses.Preferences(
            jnp.asarray(preferences, jnp.int32), jnp.asarray(self._ref), weight, token_share
        )

    def __call__(self, lora: Lora, saved: SavedWork = NOTHING_SAVED) -> dict[str, float]:
        """Accuracy (ties count half), mean reward margin (nats) and DPO loss (nats) over the held-out pairs."""
        return self._metrics(log_probs(self._policy, lora, self._batches, "evaluation", saved))

    def untrained(self) -> dict[str, float]:
        """The same for the reference model, with which every run starts."""
        return self._metrics(self._ref)

    def _metrics(self, logps: np.ndarray) -> dict[str, float]:
        out = losses.metrics(self._loss, jnp.asarray(logps), self._lengths, self._pairs)
        return {name: float(total) / self._num_rows for name, total in out._asdict().items()}
