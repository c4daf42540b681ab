"""A pass over the candidates of a staged round: what the strategy looks at, chunk by chunk."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import layout
from activedpo_jax.data.batches import parts
from activedpo_jax.data.groups import Bucket, Candidates, Groups, assign_buckets, pad_groups
from activedpo_jax.data.packing import Packing, fill, lengths_in, multiple_on, plan
from activedpo_jax.models.policy import Policy
from activedpo_jax.progress import progress
from activedpo_jax.resumable import SavedWork, pieces
from activedpo_jax.rounds import choose
from activedpo_jax.rounds.choose import EvidenceRows
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import RunState

evidence_program = jax.jit(choose.chunk_evidence, static_argnums=0)


class Chunks:
    """Groups of the candidates in chunks, and the rows of their pairs among the candidates.

    Args:
      size: groups of a chunk.
      members: [n] the groups; None: all of them.
      packed: chunks are packed, all alike; else they are padded, bucket by bucket.
    """

    packing: Packing | None = None  # of every chunk

    def __init__(
        self,
        candidates: Candidates,
        buckets: Sequence[Bucket],
        size: int,
        members: np.ndarray | None = None,
        packed: bool = False,
    ) -> None:
        self._candidates, self._buckets, self.size = candidates, buckets, size
        self.responses = candidates.responses_per_group
        self._parts: list[tuple[int, np.ndarray]]
        if packed:
            self._parts = [(len(buckets) - 1, rows) for rows in self._packed(members)]
        else:
            members = np.arange(candidates.num_groups) if members is None else members
            bucket_of = assign_buckets(candidates, buckets)[members]
            found = parts(bucket_of, buckets, self.responses, (size,))
            self._parts = [(part.bucket, members[part.places]) for part in found]
        # Of a pair in its group: the number of canonical pairs before (i, j).
        group, low = candidates.pairs[:, 0], candidates.pairs[:, 1:].min(axis=1)
        high = candidates.pairs[:, 1:].max(axis=1)
        m = self.responses
        self._row_of = np.full((candidates.num_groups, m * (m - 1) // 2), -1, np.int32)
        self._row_of[group, low * m - low * (low + 1) // 2 + high - low - 1] = np.arange(len(group), dtype=np.int32)

    def _packed(self, members: np.ndarray | None) -> list[np.ndarray]:
        # Of all candidates, so that what brings some of them up to date is no other program.
        lengths, multiple = lengths_in(self._candidates), multiple_on(jax.default_backend())
        found, self.packing = plan(lengths, self.size, multiple, together=False)
        if members is None:
            return found
        return [members[rows] for rows in fill(lengths.of(members), self.packing, together=False)]

    def __len__(self) -> int:
        return len(self._parts)

    def members(self, number: int) -> np.ndarray:
        """The groups of a chunk, [≤ size]."""
        return self._parts[number][1]

    def groups(self, number: int, mesh: Mesh) -> Groups:
        """A chunk on the mesh."""
        b, members = self._parts[number]

        def part(own: slice) -> Groups:
            return pad_groups(self._candidates, members[own], self._buckets[b], len(range(*own.indices(self.size))))

        return layout.put_rows(part, self.size, layout.batch(mesh))

    def rows(self, members: np.ndarray) -> np.ndarray:
        """Where the evidence about the pairs of these groups [size] belongs, [size · m(m−1)/2] int32; −1: there is no
        such pair, or no such group."""
        return np.where(members[:, None] >= 0, self._row_of[members], -1).astype(np.int32).reshape(-1)


def like_groups(m: int, bucket: Bucket, size: int) -> Groups:
    """The shapes of a chunk."""
    shapes = ((size, bucket.prompt), (size,), (size, m, bucket.response), (size, m))
    return Groups(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))  # type: ignore[arg-type]


class Part(NamedTuple):
    """The evidence about one chunk, as it is kept."""

    members: jax.Array  # [size] int32, its groups; −1 makes up a chunk
    evidence: EvidenceRows  # [size · m(m−1)/2, ...] each, cut over the devices like a batch


class Pass(NamedTuple):
    """What every pass of a run goes by."""

    spec: RoundSpec
    policy: Policy
    buckets: Sequence[Bucket]  # which hold every candidate, the last of them all

    def chunks(self, candidates: Candidates, members: np.ndarray | None = None) -> Chunks:
        return Chunks(candidates, self.buckets, self.spec.chunk, members, self.spec.packed)

    def like(self, state: RunState, responses: int) -> Part:
        """Shapes, dtypes and shardings of a part, the same for every bucket; m responses a group."""
        spec, size = self.spec, self.spec.chunk
        found = jax.eval_shape(
            lambda groups: evidence_program(spec, self.policy, state.lora, groups, state.seed),
            like_groups(responses, self.buckets[0], size),
        )
        cut, whole = layout.batch(spec.mesh), layout.replicated(spec.mesh)
        evidence = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), found)
        return Part(jax.ShapeDtypeStruct((size,), jnp.int32, sharding=whole), evidence)  # type: ignore[arg-type]

    def run(self, state: RunState, chunks: Chunks, saved: SavedWork, stage: str) -> Iterator[Part]:
        """The evidence about the groups of all chunks at the current θ, with a progress bar.

        Args:
          saved: what is kept of the pass, under the name of the stage.
        """
        spec, like, policy = self.spec, self.like(state, chunks.responses), self.policy.packed(chunks.packing)

        def compute(number: int) -> Part:
            groups, members = chunks.groups(number, spec.mesh), np.full(spec.chunk, -1, np.int32)
            members[: len(chunks.members(number))] = chunks.members(number)
            found = evidence_program(spec, policy, state.lora, groups, state.seed)
            # Waits, else the bar would count what is only queued.
            return jax.block_until_ready(Part(layout.put(members, layout.replicated(spec.mesh)), found))

        total = sum(len(chunks.members(number)) for number in range(len(chunks)))
        with progress(total=total, desc=" and ".join(spec.needs), unit="prompt") as bar:
            parts = pieces(saved, stage, len(chunks), compute, lambda _: like, complete=spec.passes.reused)
            for number, part in enumerate(parts):
                yield part
                bar.update(len(chunks.members(number)))
