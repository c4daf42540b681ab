"""Random projections of gradients to D dimensions that keep inner products.

`tiled_count_sketch` is the one in use: the flattened gradient of one LoRA matrix is cut into tiles of D entries, each
entry gets a random sign, each tile is rolled by a random offset, and the tiles are added up.  It is the CountSketch of
Charikar, Chen & Farach-Colton (2002) with the hash of an entry replaced by "its place in the tile, plus the tile's
offset": entries of one tile never collide, those of two tiles collide with probability 1/D, and independent signs make
inner products unbiased.  Nothing is scattered: the work is one pass over the gradient in memory order.

`rademacher_projection` is the dense textbook projection (Achlioptas 2003), kept as the reference.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax import layout
from activedpo_jax.models import gpu_sketch

# From entries [B, n], the words of their signs, the offsets of their tiles and D to the sketch [B, D].
AddUp = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]

_BLOCK = 8  # tiles that one iteration of the loop over tiles adds


class Part(NamedTuple):
    """Some rows of a matrix, of several equal parts."""

    place: jax.Array | int  # among the parts, from 0
    parts: int


def _random_words(seed: jax.Array, layer: jax.Array, name: str, count: int) -> jax.Array:
    """[count] uint32 for one LoRA matrix.  They depend on nothing else, such as the batch, the chunk or the mesh."""
    key = jnp.stack([jnp.asarray(seed, jnp.uint32), jnp.uint32(zlib.crc32(name.encode()))])
    # The generator is named, since the sketch must be the same on every platform.
    key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), layer)
    return jax.random.bits(key, (count,), jnp.uint32)


def _signs(words: jax.Array) -> jax.Array:
    """[32 · words] float32 of ±1, one from each bit."""
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 1.0 - 2.0 * bits.reshape(-1).astype(jnp.float32)


def tiled_count_sketch(
    grads: jax.Array,
    dim: int,
    seed: jax.Array,
    layer: jax.Array,
    name: str,
    part: Part | None = None,
    add_up: AddUp | None = None,
) -> jax.Array:
    """Sketches the per-example gradients of one matrix.

    Args:
      grads: [B, rows, columns] float32.
      dim: D.
      seed: scalar uint32; layer: scalar int32, the layer's index; name: of the matrix in its layer, such as
        `q_proj/a`.
      part: which of the matrix's rows these are; the sketches of all parts add up to that of the matrix.  None: all.
      add_up: what adds up the tiles, the same sums in whatever order; None: a loop over them.

    Returns:
      [B, D] float32 with E⟨sketch(g), sketch(h)⟩ = ⟨g, h⟩ over seeds, relative error about 1/√D.
    """
    batch, size = grads.shape[0], grads.shape[1] * grads.shape[2]
    n = size if part is None else size * part.parts
    words = _random_words(seed, layer, name, -(-n // 32) + n // dim + 1)
    offsets, words = (words[: n // dim + 1] % dim).astype(jnp.int32), words[n // dim + 1 :]
    flat = grads.reshape(batch, size)
    unit = math.lcm(dim, 32)  # entries after which a tile and a word begin
    if part is not None:
        flat, first = _from_whole_units(flat, jnp.asarray(part.place) * size, unit)
        size = flat.shape[1]
        offsets = jax.lax.dynamic_slice_in_dim(jnp.pad(offsets, (0, size // dim)), first // dim, -(-size // dim))
        words = jax.lax.dynamic_slice_in_dim(jnp.pad(words, (0, size // 32)), first // 32, -(-size // 32))

    return (add_up or _tile_by_tile)(flat, words, offsets, dim)


def _tile_by_tile(flat: jax.Array, words: jax.Array, offsets: jax.Array, dim: int) -> jax.Array:
    """A tile rolled by o is the tile written at o into a row of 2D entries whose halves are added at the end."""

    def add(row: jax.Array, start: jax.Array | int, count: int) -> jax.Array:
        """Adds `count` entries, from one that begins a unit."""
        # Signs are made here: those of all entries, or their product with the gradients, would take as much memory.
        signs = _signs(jax.lax.dynamic_slice_in_dim(words, start // 32, -(-count // 32)))[:count]
        signed = jax.lax.dynamic_slice_in_dim(flat, start, count, axis=1) * signs
        for k in range(0, count, dim):
            tile, offset = signed[:, k : k + dim], offsets[(start + k) // dim]
            there = jax.lax.dynamic_slice_in_dim(row, offset, tile.shape[1], axis=1)
            row = jax.lax.dynamic_update_slice_in_dim(row, there + tile, offset, axis=1)
        return row

    batch, size = flat.shape
    row = jnp.zeros((batch, 2 * dim), jnp.float32)
    unit = math.lcm(dim, 32)
    block = unit * -(-_BLOCK * dim // unit)
    blocks, rest = divmod(size, block)
    if blocks:
        row = jax.lax.fori_loop(0, blocks, lambda i, row: add(row, i * block, block), row)
    if rest:
        row = add(row, blocks * block, rest)
    return row[:, :dim] + row[:, dim:]


def _from_whole_units(flat: jax.Array, first: jax.Array, unit: int) -> tuple[jax.Array, jax.Array]:
    """[B, size] entries of which the first is the matrix's entry `first`, behind zeros that make it begin a unit."""
    size = flat.shape[1]
    if size % unit == 0:
        return flat, first
    lead = first % unit
    wide = jnp.zeros((flat.shape[0], -(-(size + unit - 1) // unit) * unit), flat.dtype)
    return jax.lax.dynamic_update_slice_in_dim(wide, flat, lead, axis=1), first - lead


def sketch_on_mesh(
    mesh: Mesh | None, grads: jax.Array, dim: int, seed: jax.Array, layer: jax.Array, name: str
) -> jax.Array:
    """`tiled_count_sketch`, in which each device sketches its own examples and, along `tensor`, its own rows.

    The compiler alone would gather the gradient in every iteration of the loop over tiles.

    Args:
      mesh: of the program; None: the default device.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    add_up = gpu_sketch.add_up if gpu_sketch.runs_on(device) else _tile_by_tile
    if mesh is None or mesh.size == 1:
        return tiled_count_sketch(grads, dim, seed, layer, name, None, add_up)
    tensor = mesh.shape["tensor"]
    cut = tensor > 1 and grads.shape[1] % tensor == 0
    batch = layout.BATCH_AXES if grads.shape[0] % layout.axis_size(mesh, layout.BATCH_AXES) == 0 else None

    def local(grads: jax.Array, seed: jax.Array, layer: jax.Array) -> jax.Array:
        if not cut:
            return tiled_count_sketch(grads, dim, seed, layer, name, None, add_up)
        part = Part(jax.lax.axis_index("tensor"), tensor)
        return jax.lax.psum(tiled_count_sketch(grads, dim, seed, layer, name, part, add_up), "tensor")

    specs = (P(batch, "tensor" if cut else None), P(), P())
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(batch), check_vma=False)
    return mapped(grads, seed, layer)


def rademacher_projection(
    grads: Iterable[tuple[str, jax.Array]], dim: int, seed: jax.Array, layer: jax.Array
) -> jax.Array:
    """The dense reference: R g/√D with R of independent random signs, for the named [B, rows, columns] matrices."""
    total: jax.Array | None = None
    for name, grad in grads:
        flat = grad.reshape(grad.shape[0], -1)
        n = flat.shape[1]
        signs = _signs(_random_words(seed, layer, name, -(-n * dim // 32)))[: n * dim].reshape(n, dim)
        part = jnp.dot(flat, signs, precision="highest") / jnp.sqrt(float(dim))
        total = part if total is None else total + part
    if total is None:
        raise ValueError("rademacher_projection needs at least one matrix; got none")
    return total
