"""Safetensors: reads the headers of a checkpoint's files, and puts one tensor at a time onto the devices.

A tensor travels in pieces: the host holds one piece at a time, and a device gets no more than its part.
"""

import functools
import itertools
import math
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  gives NumPy the bfloat16 that safetensors reads into
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from activedpo_jax import layout

PIECE_BYTES = 1 << 25  # of host memory, twice over: as pages of the file, and copied out of them

Box = tuple[slice, ...]  # a part of a tensor: for every axis, a slice with both ends


class Tensor(NamedTuple):
    """What the header of a safetensors file says about one tensor."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it: F32, BF16, ...


def read_headers(files: Sequence[pathlib.Path]) -> dict[str, Tensor]:
    """The tensors of all files by name; only the headers are read.

    Raises:
      ValueError: a file is missing or incomplete.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.exists():
            others = [p.name for p in file.parent.glob("*.bin")]
            raise ValueError(
                f"{file}: no such file; expected the model's weights as safetensors"
                + (f" (there is {others[0]}: convert it)" if others else ": download it again")
            )
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118  not a mapping
                    part = opened.get_slice(name)
                    tensors[name] = Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}): download it again") from error
    return tensors


def read_pieces(tensor: Tensor, box: Box | None = None) -> Iterator[np.ndarray]:
    """A tensor, or its part `box`, cut along its first axis into pieces of at most `PIECE_BYTES`, or of one row."""
    box = tuple(slice(0, n) for n in tensor.shape) if box is None else box
    first, *others = box
    row_bytes = math.prod([s.stop - s.start for s in others]) * _itemsize(tensor)
    rows = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(first.start, first.stop, rows):
        # Reopened for each piece, which releases the pages that the previous piece has read.
        with safe_open(tensor.file, framework="numpy") as opened:
            part = opened.get_slice(tensor.name)
            piece: np.ndarray = part[(slice(start, min(start + rows, first.stop)), *others)]
            del part  # it keeps the file open, too
        yield piece


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    if first.shape != second.shape:
        return False
    return all(np.array_equal(a, b) for a, b in itertools.zip_longest(read_pieces(first), read_pieces(second)))


def put_tensor(tensor: Tensor, sharding: Sharding) -> jax.Array:
    """One tensor of a checkpoint on the devices, in its own shape and dtype."""
    devices = defaultdict(list)  # by the part that they hold
    for device, index in sharding.addressable_devices_indices_map(tensor.shape).items():
        assert index is not None
        devices[tuple(s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True))].append(device)
    shards = []
    for ends, holders in devices.items():
        box = tuple(slice(*bounds) for bounds in ends)
        shards += _put_box(tensor, box, holders)
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, shards)


def _put_box(tensor: Tensor, box: Box, holders: Sequence[jax.Device]) -> list[jax.Array]:
    buffers: list[jax.Array] = []
    start = 0
    for piece in read_pieces(tensor, box):
        shape = tuple(s.stop - s.start for s in box)
        # Wait, since a transfer under way would keep this piece in host memory next to the following one.
        pieces = jax.block_until_ready([layout.put(piece, SingleDeviceSharding(device)) for device in holders])
        if piece.shape == shape:
            return pieces
        buffers = buffers or [
            jnp.zeros(shape, x.dtype, device=device) for x, device in zip(pieces, holders, strict=True)
        ]
        buffers = [_write_rows(buffer, x, start) for buffer, x in zip(buffers, pieces, strict=True)]
        jax.block_until_ready(buffers)
        start += len(piece)
    return buffers


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(buffer: jax.Array, rows: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, axis=0)


def _itemsize(tensor: Tensor) -> int:
    return int(tensor.dtype.lstrip("BFIU")) // 8
