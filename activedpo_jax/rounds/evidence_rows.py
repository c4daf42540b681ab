"""Where the evidence about a round's candidates lies while the round selects: on the devices, or on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax import layout
from activedpo_jax.data.store import scratch
from activedpo_jax.rounds import choose
from activedpo_jax.rounds.choose import EvidenceRows, Rows
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import RunState
from activedpo_jax.selection import host
from activedpo_jax.selection.greedy import Picks

select_program = jax.jit(choose.select, static_argnums=0)
taken_program = jax.jit(choose.labelled_rows)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def write_program(mesh: Mesh, pool: EvidenceRows, chunk: EvidenceRows, rows: jax.Array) -> EvidenceRows:
    """Writes a chunk's evidence [n, ...] to its rows of the pool's [N, ...], which are cut over all devices.

    Args:
      rows: [n] int32; −1: nowhere.
    """

    def write(part: jax.Array, chunk: jax.Array, rows: jax.Array) -> jax.Array:
        own = rows - jax.lax.axis_index(layout.AXES) * len(part)
        return part.at[jnp.where(own >= 0, own, len(part))].set(chunk, mode="drop")

    cut, whole = P(layout.AXES), P()
    share = jax.shard_map(write, mesh=mesh, in_specs=(cut, whole, whole), out_specs=cut)
    return jax.tree.map(lambda part, new: share(part, new, rows), pool, chunk)


class OnDevices:
    """Evidence [N, ...] cut over all devices; N is what these divide, and rows beyond the candidates are zero.

    Args:
      like: shapes and dtypes of a chunk's evidence.
      count: the number of candidates.
    """

    def __init__(self, mesh: Mesh, like: EvidenceRows, count: int) -> None:
        self._mesh, total = mesh, padded(count, mesh)
        self.arrays: EvidenceRows = {
            name: jnp.zeros((total, *x.shape[1:]), x.dtype, device=layout.rows(mesh)) for name, x in like.items()
        }

    def write(self, chunk: EvidenceRows, rows: np.ndarray) -> None:
        """Takes over the evidence about a chunk; rows [n], −1: nowhere."""
        places = layout.put(rows, layout.replicated(self._mesh))
        self.arrays = write_program(self._mesh, self.arrays, chunk, places)

    def select(self, spec: RoundSpec, state: RunState, rows: Rows, known: jax.Array | None) -> tuple[Picks, jax.Array]:
        """`choose.select`, of as many rows."""
        missing = padded(len(rows.valid), self._mesh) - len(rows.valid)  # these are not valid
        rows = jax.tree.map(lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), rows)
        rows = layout.put(rows, layout.replicated(self._mesh))
        return jax.block_until_ready(select_program(spec, state, rows, self.arrays, known))


class OnHost:
    """Evidence [N, D] of a strategy that picks greedily by it, in every process's memory or mapped from its disk.

    Arguments as of `OnDevices`.
    """

    def __init__(self, like: EvidenceRows, count: int) -> None:
        self.arrays = {name: scratch((count, *x.shape[1:]), x.dtype) for name, x in like.items()}

    def write(self, chunk: EvidenceRows, rows: np.ndarray) -> None:
        """Takes over the evidence about a chunk; rows [n], −1: nowhere."""
        for name, found in layout.get(chunk).items():
            self.arrays[name][rows[rows >= 0]] = found[rows >= 0]

    def select(self, spec: RoundSpec, state: RunState, rows: Rows, known: jax.Array | None) -> tuple[Picks, jax.Array]:
        """`choose.select` with the vectors in blocks: the same picks."""
        labelled, rule, selection = state.labelled, spec.selection.rule, spec.selection
        assert rule.design is not None
        vectors, filled = self.arrays[rule.design], np.arange(spec.capacity) < int(labelled.size)
        digests = layout.put(rows.digests, layout.replicated(spec.mesh))
        taken, places = layout.get(taken_program(digests, labelled.digests, filled))
        if labelled.vectors is not None:
            known = labelled.vectors
        elif known is None:
            known = layout.put(np.asarray(vectors[places], np.float32), layout.replicated(spec.mesh))
        query = host.Query(rule, selection.labels_per_round, selection.lam, selection.block, int(state.seed))
        counts = jnp.asarray(filled & (layout.get(labelled.weights) > 0))
        return host.in_blocks(query, vectors, np.asarray(rows.valid & ~taken), host.Known(known, counts), spec.mesh)


def padded(rows: int, mesh: Mesh) -> int:
    """The least number of rows, at least this, that the devices divide."""
    return -(-rows // mesh.size) * mesh.size
