"""Linear maps of few tokens on CPU, where reading the weights takes most of the time.

XLA (jax 0.10) reads them more slowly in the product of [tokens, in] and [in, out] than in that of [out, in] and
[in, tokens]; `benchmarks.generation` shows by how much.  The barriers keep XLA from turning one into the other.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputsFirst:
    """A kernel stored as [out, in].  `x @ kernel` is the product with the kernel [in, out] that it stands for."""

    rows: jax.Array

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return product(x, self.rows).astype(x.dtype)


def product(x: jax.Array, rows: jax.Array) -> jax.Array:
    """[..., in] and [out, in] → [..., out] float32."""
    columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    out = jnp.matmul(rows.astype(x.dtype), columns, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(out).T.reshape(*x.shape[:-1], -1)
