"""Arrays of a run as shapes with shardings, laid out as the run lays them out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import layout, start, tasks
from activedpo_jax.data.groups import Bucket, Groups


def device_bytes(tree: Any) -> float:
    """Bytes on one device of arrays or their shapes, from the shardings alone; without one they are whole there."""
    total = 0
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
            shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
            total += math.prod(shape) * x.dtype.itemsize
    return float(total)


def replicated(mesh: Mesh, tree: Any) -> Any:
    """Shapes of replicated arrays; shapes that have a sharding keep it."""

    def shape(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None:
            return x
        if isinstance(x, jax.Array) and x.committed:  # put on the mesh, whose devices are attached
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=layout.replicated(mesh))

    return jax.tree.map(shape, tree)


def from_host(tree: Any) -> Any:
    """Shapes of arrays that the run hands over from the host: JAX puts them where the others are."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


def lora(task: tasks.Task, mesh: Mesh) -> Any:
    """An adapter; every call makes another one."""
    return weights(mesh, jax.eval_shape(lambda: start.fresh_lora(task.decoder, 0)))


def weights(mesh: Mesh, tree: Any) -> Any:
    return laid_out(tree, layout.weight_shardings(mesh, tree))


def laid_out(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def groups(mesh: Mesh | None, bucket: Bucket, size: int, m: int) -> Groups:
    """A batch on the mesh, or zeros on the host."""
    shapes: tuple[tuple[int, ...], ...] = ((size, bucket.prompt), (size,), (size, m, bucket.response), (size, m))
    if mesh is None:
        return Groups(*(np.zeros(s, np.int32) for s in shapes))
    return Groups(*(jax.ShapeDtypeStruct(s, jnp.int32, sharding=layout.batch(mesh)) for s in shapes))  # type: ignore[arg-type]
