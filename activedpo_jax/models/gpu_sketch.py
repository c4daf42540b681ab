"""The tiled count sketch of `models.sketch` as one kernel for NVIDIA GPUs.

XLA makes either a loop of it, which launches kernels for each few tiles, or a gather that writes every signed entry to
memory before it adds them up.  This kernel reads each gradient once and makes signs as it goes.
"""

import functools

import jax
import jax.numpy as jnp

_ENTRIES = 2048  # of the sketch that one program adds up, at most
_PARTS = 16  # among which the tiles are divided, at most: more work at a time than an example has blocks of entries
_INTERPRET = False  # for tests on CPU


def runs_on(device: jax.Device) -> bool:
    """Whether Triton, which compiles the kernel, compiles for a device."""
    return device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 8.0


def add_up(flat: jax.Array, words: jax.Array, offsets: jax.Array, dim: int) -> jax.Array:
    """The sketch [B, D] of gradients.

    Args:
      flat: [B, n] float32.
      words: [≥ n/32] uint32, a bit for the sign of each entry.
      offsets: [⌈n/D⌉ or one more] int32, by which each tile is rolled.
      dim: D.
    """
    from jax.experimental import pallas as pl  # for GPUs, experimental, so imported only where used
    from jax.experimental.pallas import triton

    batch, tiles = flat.shape[0], len(offsets)
    tiles_of_part = -(-tiles // min(_PARTS, tiles))
    parts = -(-tiles // tiles_of_part)
    block = min(_ENTRIES, pl.next_power_of_2(dim))
    sums = pl.pallas_call(
        functools.partial(_add_tiles, dim=dim, block=block, tiles_of_part=tiles_of_part),
        out_shape=jax.ShapeDtypeStruct((batch, parts, dim), jnp.float32),
        grid=(batch, pl.cdiv(dim, block), parts),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=_INTERPRET,
        name="tiled_count_sketch",
    )(flat, words, offsets)
    return jnp.sum(sums, axis=1)


def _add_tiles(flat, words, offsets, out, *, dim: int, block: int, tiles_of_part: int) -> None:  # type: ignore[no-untyped-def]
    """A block of one example's entries, summed over the tiles of a part."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    example, part = pl.program_id(0), pl.program_id(2)
    place = pl.program_id(1) * block + jnp.arange(block, dtype=jnp.int32)  # in the sketch

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        tile = part * tiles_of_part + i
        unrolled = place - offsets[tile]
        entry = tile * dim + jnp.where(unrolled < 0, unrolled + dim, unrolled)
        there = (entry < flat.shape[1]) & (place < dim)
        gradient = triton.load(flat.at[example, entry], mask=there, other=0.0)
        word = triton.load(words.at[entry >> 5], mask=there, other=0)
        negative = (word >> (entry & 31).astype(jnp.uint32)) & jnp.uint32(1) == 1
        return total + jnp.where(negative, -gradient, gradient)

    count = jnp.minimum(tiles_of_part, offsets.shape[0] - part * tiles_of_part)
    total = jax.lax.fori_loop(0, count, add, jnp.zeros(block, jnp.float32))
    triton.store(out.at[example, part, place], total, mask=place < dim)
