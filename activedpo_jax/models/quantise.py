"""Base weights of 8 or 4 bits, as in QLoRA (Dettmers et al. 2023): quantised once, dequantised wherever they are used.

The kernel [in, out] of each of the layers' linear maps becomes a `qwix.QArray` over tiles of its inputs,

    W = codebook[qvalue] · scale        qvalue [tiles, in/tiles, out]        scale [tiles, 1, out]

    int8    one tile; the code is the value; float32 scales, so a step is 1/127.5 of a column's largest weight
    nf4     tiles of 64 inputs; 16 values that suit normal weights; uint4, two codes a byte; bfloat16 scales

Embeddings, norms and biases stay as they are.  `qwix` (the extra `quant`) makes the codes and the scales; the product
with them is defined here.  The tiles have an axis of their own, and the codebook is a tree of selections, because XLA
then fuses both into a product on TPU.  There, `qwix.dequantize` of an nf4 kernel [4096, 11008] gathers each weight from
a table: 541 MB besides the product, and 24 s to compile instead of 3 (v5e, 256 tokens).
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    import qwix

Kernel: TypeAlias = "jax.Array | qwix.QArray"
FORMATS = ("none", "int8", "nf4")
NF4_TILE = 64

# Appendix E of Dettmers et al. (2023).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def is_quantised(kernel: Any) -> bool:
    """Whether a kernel is a `qwix.QArray`; decided without importing qwix, which may not be installed."""
    return hasattr(kernel, "qvalue")


def quantise_kernel(kernel: jax.Array, quantisation: str) -> "qwix.QArray":
    """Quantises one kernel [in, out], tile by tile.

    The tiles of nf4 have as many inputs as the largest divisor of `in` up to 64.

    Raises:
      ValueError: the format is not int8 or nf4, or qwix is not installed.
    """
    if quantisation not in FORMATS[1:]:
        raise ValueError(f"quantisation={quantisation!r}: expected one of {', '.join(FORMATS[1:])}")
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise ValueError(
            f"config.model.quantisation={quantisation} needs qwix: pip install 'activedpo_jax[quant]'"
        ) from error
    d_in, d_out = kernel.shape
    if quantisation == "int8":
        tile, code, scale_dtype = d_in, jnp.int8, jnp.float32
    else:
        tile = max(t for t in range(1, min(d_in, NF4_TILE) + 1) if d_in % t == 0)
        code, scale_dtype = "nf4", jnp.bfloat16

    def quantise_tile(tile: jax.Array) -> qwix.QArray:
        return qwix.quantize(tile.astype(jnp.float32), code, channelwise_axes=[1], scale_dtype=scale_dtype)

    # One after the other, since qwix compares every weight with all 16 values of nf4 at once.
    return jax.lax.map(quantise_tile, kernel.reshape(-1, tile, d_out))


def quantise_params(params: dict[str, Any], quantisation: str) -> dict[str, Any]:
    """The parameters of a decoder with the kernels of its linear maps [L, in, out] quantised, layer by layer.

    Raises:
      ValueError: see `quantise_kernel`.
    """
    if quantisation == "none":
        return params

    def quantise_leaf(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        if path[-1].key != "kernel":
            return leaf
        return jax.lax.map(lambda kernel: quantise_kernel(kernel, quantisation), leaf)

    return jax.tree.map_with_path(quantise_leaf, params)


def refuse_quantised(params: dict[str, Any], use: str) -> None:
    """Refuses quantised weights, for uses that need the weights themselves.

    Raises:
      ValueError: a kernel is quantised.
    """
    if any(map(is_quantised, jax.tree.leaves(params, is_leaf=is_quantised))):
        raise ValueError(f"{use} needs base weights that are not quantised: set config.model.quantisation=none")


def dequantise(kernel: "qwix.QArray", dtype: Any) -> jax.Array:
    """The weights that a quantised kernel stands for: [..., tiles, in/tiles, out]."""
    if kernel.qvalue.dtype == jnp.uint4:
        # Not in float32 if `dtype` is bfloat16: TPUs would write it to memory, and nf4 itself is far coarser.
        return _nf4_values(kernel.qvalue, dtype) * kernel.scale.astype(dtype)
    return (kernel.qvalue.astype(jnp.float32) * kernel.scale).astype(dtype)


def _nf4_values(codes: jax.Array, dtype: Any) -> jax.Array:
    codes = codes.astype(jnp.int8)
    values: list[Any] = [jnp.asarray(value, dtype) for value in NF4]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def matmul(x: jax.Array, kernel: "Kernel") -> jax.Array:
    """x W: [..., in] → [..., out] in the dtype of x.  A quantised W has no gradient."""
    return _quantised_matmul(x, kernel) if is_quantised(kernel) else x @ kernel


def matmul_transposed(y: jax.Array, kernel: "Kernel") -> jax.Array:
    """y Wᵀ: [..., out] → [..., in]."""
    if not is_quantised(kernel):
        return y @ kernel.T
    tiled = jnp.einsum("...n,abn->...ab", y, dequantise(kernel, y.dtype))
    return tiled.reshape(*y.shape[:-1], -1)


@jax.custom_vjp
def _quantised_matmul(x: jax.Array, kernel: "qwix.QArray") -> jax.Array:
    weights = dequantise(kernel, x.dtype)
    return jnp.einsum("...ab,abn->...n", x.reshape(*x.shape[:-1], *weights.shape[:2]), weights)


# Autodiff would keep the dequantised weights of every layer for the backward pass.
_quantised_matmul.defvjp(
    lambda x, kernel: (_quantised_matmul(x, kernel), kernel),
    lambda kernel, dy: (matmul_transposed(dy, kernel), None),
)
