"""LoRA linear maps, and the probe that makes their backward pass return per-example gradient sketches.

A linear map here takes *blocks* of tokens (the prompt's and the responses') rather than one array.  Keeping them apart
lets `evidence.gradients` map the responses alone, so that what depends only on the prompt is computed once.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax import layout
from activedpo_jax.models import quantise
from activedpo_jax.models.config import LINEAR_MAPS, LoraConfig, ModelConfig
from activedpo_jax.models.few_tokens import OutputsFirst
from activedpo_jax.models.packed import Packed
from activedpo_jax.models.sketch import sketch_on_mesh

Lora = dict[str, Any]  # {"layers": {module: {"a": [L, r, d_in], "b": [L, d_out, r]}}}, float32


class Probe(NamedTuple):
    """What a decoder is given to make `jax.grad(total log-prob)(probe.zeros)` the matrix of gradient sketches."""

    zeros: jax.Array  # [G, D] float32
    seed: jax.Array  # scalar uint32, of the sketch
    packed: Packed | None = None  # of packed blocks; None: the examples are the blocks' first axis


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every linear map of a layer: the modules that LoRA can target."""
    d, f, head = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * head, config.num_kv_heads * head
    return dict(zip(LINEAR_MAPS, ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)), strict=True))


def init_lora(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Lora:
    """A fresh adapter as in Hu et al. (2021) and PEFT: A uniform in ±1/√d_in, B = 0, so that BA = 0.

    With B = 0 the gradient with respect to A is exactly zero: half of the features are zero until the first training.

    Raises:
      ValueError: a target module that the decoder does not have.
    """
    shapes = linear_shapes(config)
    unknown = sorted(set(lora.target_modules) - set(shapes))
    if unknown or not lora.target_modules:
        raise ValueError(f"lora.target_modules: got {unknown or 'none'}; this decoder has {', '.join(shapes)}")

    def matrices(name: str, key: jax.Array) -> dict[str, jax.Array]:
        d_in, d_out = shapes[name]
        bound = d_in**-0.5
        shape = (config.num_layers, lora.rank, d_in)
        return {
            "a": jax.random.uniform(key, shape, jnp.float32, -bound, bound),
            "b": jnp.zeros((config.num_layers, d_out, lora.rank), jnp.float32),
        }

    names = sorted(lora.target_modules)
    return {"layers": {n: matrices(n, k) for n, k in zip(names, jax.random.split(key, len(names)), strict=True)}}


def _outer_sum(left: jax.Array, right: jax.Array, num_batch: int = 0) -> jax.Array:
    """Σ left ⊗ right over all axes between the first `num_batch` and the last: [*batch, i, j] float32."""
    if left.dtype == jnp.float32 and left.shape[-1] > right.shape[-1]:
        # XLA on CPU, where float32 is computed, turns the first operand round before it multiplies; so that is the
        # narrow one, and the small result is turned instead.
        return jnp.swapaxes(_outer_sum(right, left, num_batch), -1, -2)
    batch, summed = tuple(range(num_batch)), tuple(range(num_batch, left.ndim - 1))
    return jax.lax.dot_general(left, right, ((summed, summed), (batch, batch)), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _low_rank(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x Mᵀ in x's dtype, for a float32 matrix M of an adapter.

    The gradient of M is added up in float32.  Autodiff would round the part of each device to x's dtype before the
    parts are added, and Adam, whose first steps only look at signs, would follow the rounding.
    """
    return x @ matrix.T.astype(x.dtype)


def _low_rank_fwd(x, matrix):  # type: ignore[no-untyped-def]
    return _low_rank(x, matrix), (x, matrix)


def _low_rank_bwd(residuals, d_out):  # type: ignore[no-untyped-def]
    x, matrix = residuals
    d_matrix = _outer_sum(d_out, x)
    return d_out @ matrix.astype(x.dtype), d_matrix


_low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


def _apply_lora(
    blocks: Sequence[jax.Array], kernel: quantise.Kernel, a: jax.Array, b: jax.Array, scale: float
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Outputs x W + s (x Aᵀ) Bᵀ of every block, and the low-rank x Aᵀ."""
    low = [_low_rank(x, a) for x in blocks]
    out = [quantise.matmul(x, kernel) + scale * _low_rank(u, b) for x, u in zip(blocks, low, strict=True)]
    return out, low


class _Place(NamedTuple):
    """The static facts of a LoRA map."""

    scale: float
    name: str
    mesh: Mesh | None  # of the program


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probed_linear(
    place: _Place,
    blocks: Sequence[jax.Array],
    kernel: quantise.Kernel,
    a: jax.Array,
    b: jax.Array,
    layer: jax.Array,
    probe: Probe,
) -> list[jax.Array]:
    """The LoRA map; backwards, the cotangent of the probe is the sketch of each example's own gradients of A and B."""
    return _apply_lora(blocks, kernel, a, b, place.scale)[0]


def _probed_linear_fwd(place, blocks, kernel, a, b, layer, probe):  # type: ignore[no-untyped-def]
    out, low = _apply_lora(blocks, kernel, a, b, place.scale)
    return out, (blocks, low, kernel, a, b, layer, probe)


def _probed_linear_bwd(place, residuals, d_out):  # type: ignore[no-untyped-def]
    scale, name, mesh = place
    blocks, low, kernel, a, b, layer, probe = residuals
    batch, dim = probe.zeros.shape
    d_low = [dy @ b for dy in d_out]
    d_in = [quantise.matmul_transposed(dy, kernel) + scale * (v @ a) for dy, v in zip(d_out, d_low, strict=True)]

    # Outer products summed over the tokens of each example, never over examples: the price of a weight gradient.
    def per_example(lefts: Sequence[jax.Array], rights: Sequence[jax.Array]) -> jax.Array:
        if probe.packed is not None:
            return scale * probe.packed.per_group(_outer_sum, lefts, rights)
        total: Any = 0.0
        for x, y in zip(lefts, rights, strict=True):
            x, y = x.reshape(batch, -1, x.shape[-1]), y.reshape(batch, -1, y.shape[-1])
            total += _outer_sum(x, y, num_batch=1)
        return scale * total

    sketch = functools.partial(sketch_on_mesh, mesh, dim=dim, seed=probe.seed, layer=layer)
    features = sketch(per_example(d_low, blocks), name=f"{name}/a") + sketch(per_example(d_out, low), name=f"{name}/b")
    # None: the base weights get no cotangent, nor do A and B, whose gradients are not needed.
    return d_in, None, None, None, None, Probe(features, None, None)


_probed_linear.defvjp(_probed_linear_fwd, _probed_linear_bwd)


class LoraLinear(nn.Module):
    """x W (+ bias), plus s (x Aᵀ) Bᵀ where the `lora` collection has matrices for this module; W may be quantised."""

    features: int
    scale: float
    dtype: Any
    use_bias: bool = False
    mesh: Mesh | None = None  # over which the program cuts its weights; None: as the compiler likes
    one_token: bool = False  # of each response: they go to the weights, which are gathered otherwise

    @nn.compact
    def __call__(self, blocks: Sequence[jax.Array], layer: jax.Array, probe: Probe | None) -> list[jax.Array]:
        d_in = blocks[0].shape[-1]
        kernel = self._kernel(d_in)
        assert self.name is not None
        if self.one_token:
            blocks = [layout.at_weights(self.mesh, self.name, (d_in, self.features), x) for x in blocks]
        if not self.has_variable("lora", "a"):
            out = [quantise.matmul(x, kernel) for x in blocks]
        else:
            # In training they are gathered as float32, so that their gradients are added up as such.
            dtype = jnp.float32 if probe is None else self.dtype
            a, b = (self._at_use(leaf, self.get_variable("lora", leaf).astype(dtype)) for leaf in ("a", "b"))
            if probe is None:
                out = _apply_lora(blocks, kernel, a, b, self.scale)[0]
            else:
                place = _Place(self.scale, self.name, self.mesh)
                out = _probed_linear(place, list(blocks), kernel, a, b, layer, probe)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            out = [y + bias for y in out]
        if self.one_token:
            out = [layout.from_weights(self.mesh, self.name, (d_in, self.features), y) for y in out]
        return out

    def _kernel(self, d_in: int) -> quantise.Kernel:
        if self.has_variable("params", "kernel"):
            kernel: quantise.Kernel = self.get_variable("params", "kernel")
            if quantise.is_quantised(kernel) or isinstance(kernel, OutputsFirst):
                return kernel  # not an array, which `param` would expect
        kernel = self.param("kernel", nn.initializers.normal(0.02), (d_in, self.features)).astype(self.dtype)
        return self._at_use("kernel", kernel)

    def _at_use(self, leaf: str, matrix: jax.Array) -> jax.Array:
        assert self.name is not None
        return matrix if self.one_token else layout.at_use(self.mesh, self.name, leaf, matrix)
