"""The device mesh, and the one table that says how everything is laid out on it.

Axes: `data` (examples), `fsdp` (examples, and weights cut along one dimension), `tensor` (weights cut along heads and
hidden units).  An adapter, its gradient and its moments are cut over `fsdp` and `tensor` alike.  Programs are plain
`jax.jit`; the compiler derives every other layout from those given here.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Linear maps are cut as in Megatron: the first of each pair by its outputs, the second by its inputs, so that one
# all-reduce serves both.  Adapters are cut by their rank where they would be whole otherwise, so that no product is
# computed twice.
_COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROW = ("o_proj", "down_proj")
_AT_USE: Mapping[tuple[str, str], P] = (
    {(m, "kernel"): P(None, "tensor") for m in _COLUMN}
    | {(m, leaf): P("tensor") for m in _COLUMN for leaf in ("a", "b")}
    | {(m, "kernel"): P("tensor") for m in _ROW}
    | {(m, leaf): P(None, "tensor") for m in _ROW for leaf in ("a", "b")}
)
# In memory, where the leading axis is the layer, `fsdp` cuts a matrix too.  It is gathered before use, so any dimension
# will do; the choices are in order of preference, see `_choose`.
_TENSOR_FSDP, _FSDP_TENSOR = ("tensor", "fsdp"), ("fsdp", "tensor")
_IN_MEMORY: Mapping[tuple[str, str], tuple[P, ...]] = (
    {(m, "kernel"): (P(None, "fsdp", "tensor"),) for m in _COLUMN}
    | {(m, "bias"): (P(None, "tensor"),) for m in _COLUMN}
    | {(m, "a"): (P(None, "tensor", "fsdp"), P(None, None, _FSDP_TENSOR), P(None, "fsdp", "tensor")) for m in _COLUMN}
    | {(m, "b"): (P(None, _TENSOR_FSDP, None),) for m in _COLUMN}
    | {(m, "kernel"): (P(None, "tensor", "fsdp"), P(None, _TENSOR_FSDP, None)) for m in _ROW}
    | {(m, "a"): (P(None, "fsdp", "tensor"), P(None, None, _TENSOR_FSDP)) for m in _ROW}
    | {(m, "b"): (P(None, _FSDP_TENSOR, None),) for m in _ROW}
    | {(m, "embedding"): (P("tensor", "fsdp"), P(_TENSOR_FSDP, None)) for m in ("embed", "lm_head")}
)
# The last two dimensions of an array in a TPU's memory are in tiles of this shape.  Where a device holds a part of one
# along the last, the compiler gathers by an all-reduce of the whole array.
_TILE = (8, 128)


def make_mesh(sizes: ml_collections.ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices; an axis of size −1 takes the devices that the others leave.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or JAX finds none.
    """
    devices = _found_devices() if devices is None else devices
    shape = [int(sizes[axis]) for axis in AXES]
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if any(n < 1 for n in shape) or math.prod(shape) != len(devices):
        got = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise ValueError(
            f"config.mesh ({got}) does not cover the {len(devices)} devices: the sizes must multiply to "
            f"{len(devices)}, and one of them may be -1 for all that are left"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices > 1:
        return _mesh_of_slices(shape, slices, devices)
    # Each axis need not be one of the machine's own: on a v5p of 8x8x8, none has 128 devices.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _mesh_of_slices(shape: Sequence[int], slices: int, devices: Sequence[Any]) -> Mesh:
    """A mesh over several TPU slices: only `data` goes from one to another, over the slow network between them.

    Raises:
      ValueError: `data` cannot be cut so.
    """
    data, *within = shape
    if data % slices:
        raise ValueError(
            f"config.mesh.data={data} on {slices} slices: expected a multiple of {slices}, since only examples are cut "
            "over slices; fsdp and tensor stay within one"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (data // slices, *within), (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _found_devices() -> list[Any]:
    """`jax.devices()` with one type of error: what JAX raises where it finds none depends on how far it got.

    Raises:
      ValueError: there is no device of the platforms asked for.
    """
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}"
        reason = " ".join(str(error).split()) or "no plugin for it is installed, or it sees no device"
        raise ValueError(
            f"{asked}: JAX found no device ({reason}); unset JAX_PLATFORMS to take what there is, set it to cpu, or "
            "install the extra that the device needs: pip install 'activedpo_jax[gpu]' or 'activedpo_jax[tpu]'"
        ) from error


def fit(mesh: Mesh, spec: P, shape: Sequence[int]) -> NamedSharding:
    """`spec` on this mesh, without the axes that do not divide their dimension (a tiny model on many devices)."""

    def fitting(entry: Any, size: int) -> Any:
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        while axes and size % axis_size(mesh, axes):
            axes = axes[:-1]
        return axes if len(axes) > 1 else axes[0] if axes else None

    entries = tuple(spec) + (None,) * (len(shape) - len(spec))
    return NamedSharding(mesh, P(*(fitting(entry, size) for entry, size in zip(entries, shape, strict=True))))


def _choose(mesh: Mesh, specs: Sequence[P], shape: Sequence[int]) -> P:
    """Of `specs` those that leave every device whole tiles, if there are any, and of these the one that cuts most; the
    first of equals."""

    def worth(spec: P) -> tuple[bool, int]:
        sizes = [1 if entry is None else axis_size(mesh, entry) for entry in fit(mesh, spec, shape).spec]
        last = zip(sizes[-len(_TILE) :], shape[-len(_TILE) :], _TILE, strict=True)
        return all(parts == 1 or size % (parts * tile) == 0 for parts, size, tile in last), math.prod(sizes)

    return specs[0] if len(specs) == 1 else max(specs, key=worth)


def axis_size(mesh: Mesh, axes: str | Sequence[str]) -> int:
    """Number of devices along one axis, or along several together."""
    return math.prod(mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes))


def weight_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings for base weights or an adapter (arrays or shapes); what the table does not name is replicated.

    A quantised kernel is cut like the kernel it stands for; if it has several tiles, its inputs are cut between tiles.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        specs = _IN_MEMORY.get(names[-2:], (P(),))
        if len(names) < len(path):  # codes [L, tiles, in/tiles, out] or scales [L, tiles, 1, out] of `models.quantise`
            layers, inputs, outputs = specs[0]
            spec = P(layers, inputs, None, outputs) if leaf.shape[1] > 1 else P(layers, None, inputs, outputs)
        else:
            spec = _choose(mesh, specs, leaf.shape)
        return fit(mesh, spec, leaf.shape)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def like_weights(mesh: Mesh, tree: Any) -> Any:
    """Traced weights, or a gradient of them, constrained to `weight_shardings`."""
    return jax.lax.with_sharding_constraint(tree, weight_shardings(mesh, tree))


def at_use(mesh: Mesh | None, module: str, leaf: str, matrix: jax.Array) -> jax.Array:
    """A matrix of one layer, gathered along `fsdp` and cut along `tensor`, as the products take it.

    The compiler alone may gather the batch instead.
    """
    if mesh is None:
        return matrix
    return jax.lax.with_sharding_constraint(matrix, fit(mesh, _AT_USE.get((module, leaf), P()), matrix.shape))


def at_weights(mesh: Mesh | None, module: str, matrix: Sequence[int], x: jax.Array) -> jax.Array:
    """Traced activations [G, ..., d] of few tokens, cut along d as the map's matrix is in memory.

    They go to the weights, since the weights would be more to move: the compiler alone may gather those for each token.

    Args:
      matrix: [d, out] of a linear map, [V, d] of an output table.
    """
    return x if mesh is None else _rows_whole(mesh, x, _cuts(mesh, module, matrix)[0])


def from_weights(mesh: Mesh | None, module: str, matrix: Sequence[int], x: jax.Array) -> jax.Array:
    """What the map makes of them, [G, ..., out]: first where the matrix has its outputs, then where examples are."""
    return x if mesh is None else like_batch(mesh, _rows_whole(mesh, x, _cuts(mesh, module, matrix)[1]))


def _cuts(mesh: Mesh, module: str, matrix: Sequence[int]) -> tuple[Any, Any]:
    """The axes that cut inputs and outputs of a map in memory."""
    if (module, "kernel") in _IN_MEMORY:
        inputs, outputs = _choose(mesh, _IN_MEMORY[module, "kernel"], (1, *matrix))[1:]
    else:
        outputs, inputs = _choose(mesh, _IN_MEMORY[module, "embedding"], matrix)
    return inputs, outputs


def _rows_whole(mesh: Mesh, x: jax.Array, last: Any) -> jax.Array:
    spec = P("data", *(None,) * (x.ndim - 2), last)
    return jax.lax.with_sharding_constraint(x, fit(mesh, spec, x.shape))


def like_batch(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Traced activations [G, ...], constrained to the layout of their examples; whole along `tensor`."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, fit(mesh, P(BATCH_AXES), x.shape))


def like_table(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Traced rows [G, ..., d] of an embedding table, cut along d as the table is.

    Each device looks up the part that it holds of many examples' rows, which is less to move than the table.
    """
    spec = P("data", *(None,) * (x.ndim - 2), "fsdp")
    return x if mesh is None else jax.lax.with_sharding_constraint(x, fit(mesh, spec, x.shape))


def batch(mesh: Mesh) -> NamedSharding:
    """Examples over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def chunks(mesh: Mesh) -> NamedSharding:
    """[chunks, examples, ...]: each chunk is cut like a batch."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def rows(mesh: Mesh) -> NamedSharding:
    """Pool rows, with their features and scores, over all devices."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put(tree: Any, sharding: Any = None) -> Any:
    """Puts host arrays on devices; nothing else in the package does.

    Args:
      sharding: one for all leaves, or a tree of them; None: the default device.

    Returns:
      The same tree of `jax.Array`s, or of `jax.ShapeDtypeStruct`s if the devices are not attached, as when programs
      are compiled for another machine.
    """
    if sharding is None:
        return jax.device_put(tree)
    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, Sharding) else sharding
    first = jax.tree.leaves(shardings)[0]
    if not _attached(first):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=s), tree, shardings
        )
    if first.is_fully_addressable:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_put_shards, tree, shardings)


def _attached(sharding: Sharding) -> bool:
    """Whether the devices are there, in this process or another, and not only to be compiled for."""
    return next(iter(sharding.device_set)) in jax.devices()


def _put_shards(x: Any, sharding: Sharding) -> jax.Array:
    """Of an array that every process has, each puts the parts of its own devices there."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x, jnp.result_type(x))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def put_rows(rows: Callable[[slice], Any], count: int, sharding: NamedSharding) -> Any:
    """Puts a batch on the mesh of which each process makes only the rows that its own devices hold.

    Args:
      rows: makes the batch's rows of a slice: a tree of host arrays [rows, ...].
      count: rows of the whole batch.
      sharding: of every leaf; cuts the first axis alone.
    """
    if sharding.is_fully_addressable or not _attached(sharding):
        return put(rows(slice(0, count)), sharding)
    parts = sharding.addressable_devices_indices_map((count,)).values()
    ends = [index[0].indices(count)[:2] for index in parts if index is not None]
    own = slice(min(low for low, _ in ends), max(high for _, high in ends))

    def place(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), (count, *np.shape(x)[1:]))

    return jax.tree.map(place, rows(own))


def get(tree: Any) -> Any:
    """The arrays of a tree in host memory, whole on every process, wherever their parts lie; put's counterpart."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(whole, tree) if jax.process_count() > 1 else jax.device_get(tree)


def round_up(n: int, mesh: Mesh) -> int:
    """The smallest batch of at least n examples that the mesh divides evenly."""
    devices = axis_size(mesh, BATCH_AXES)
    return -(-n // devices) * devices
