"""Random projections of gradients to D dimensions that keep inner products.

`tiled_count_sketch` is the one in use: the flattened gradient of one LoRA matrix is cut into tiles of D entries, each
entry gets a random sign, each tile is rolled by a random offset, and the tiles are added up.  It is the CountSketch of
Charikar, Chen & Farach-Colton (2002) with the hash of an entry replaced by "its place in the tile, plus the tile's
offset": entries of one tile never collide, those of two tiles collide with probability 1/D, and independent signs make
inner products unbiased.  Nothing is scattered: the work is one pass over the gradient in memory order.

`rademacher_projection` is the dense textbook projection (Achlioptas 2003), kept as the reference.
"""

import zlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp

# Up to this many tiles, the loop over tiles is unrolled and XLA fuses it; unrolled further, programs would grow with
# the model.
_MAX_UNROLLED_TILES = 4


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


def tiled_count_sketch(grads: jax.Array, dim: int, seed: jax.Array, layer: jax.Array, name: str) -> jax.Array:
    """Sketches the per-example gradients of one matrix.

    Args:
      grads: [B, rows, columns] float32.
      dim: D.
      seed: scalar uint32; layer: scalar int32, the layer's index; name: of the matrix in its layer, such as
        `q_proj/a`.

    Returns:
      [B, D] float32 with E⟨sketch(g), sketch(h)⟩ = ⟨g, h⟩ over seeds, relative error about 1/√D.
    """
    batch, n = grads.shape[0], grads.shape[1] * grads.shape[2]
    full, rest = divmod(n, dim)
    words = _random_words(seed, layer, name, -(-n // 32) + full + 1)
    offsets = (words[: full + 1] % dim).astype(jnp.int32)
    signed = grads.reshape(batch, n) * _signs(words[full + 1 :])[:n]

    # A tile rolled by o is the tile written at o into a row of 2D entries whose halves are added at the end.
    def add(tile: jax.Array, offset: jax.Array, row: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(row, offset, tile.shape[1], axis=1)
        return jax.lax.dynamic_update_slice_in_dim(row, part + tile, offset, axis=1)

    row = jnp.zeros((batch, 2 * dim), jnp.float32)
    if full <= _MAX_UNROLLED_TILES:
        for k in range(full):
            row = add(signed[:, k * dim : (k + 1) * dim], offsets[k], row)
    else:
        row = jax.lax.fori_loop(
            0, full, lambda k, row: add(jax.lax.dynamic_slice_in_dim(signed, k * dim, dim, 1), offsets[k], row), row
        )
    if rest:
        row = add(signed[:, full * dim :], offsets[full], row)
    return row[:, :dim] + row[:, dim:]


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
