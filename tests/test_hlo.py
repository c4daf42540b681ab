"""What is read from compiled programs, and what the package's own programs move between devices."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from activedpo_jax import hlo


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def test_collectives_and_products_count_with_the_loops_around_them(mesh: Mesh) -> None:
    """Five layers of [8, 64] x [64, 64], thrice, with weights cut over their inputs."""

    def layers(weights: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array):  # type: ignore[no-untyped-def]
            gathered = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ gathered), None

        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.scan(layer, x, weights)[0], x)

    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "y")))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    text = jax.jit(layers).lower(weights, x).compile().as_text()
    gathered = [c for c in hlo.collectives(text) if c.kind == "all-gather"]
    assert gathered == [hlo.Collective("all-gather", 64 * 64 * 4, 15)]
    assert hlo.flops(text) == 15 * 2 * (8 // 2) * 64 * 64


@pytest.mark.parametrize(("first", "last", "step"), [(0, 9, 1), (1, 9, 2), (2, 10, 4)])
def test_iterations_are_known_without_the_compilers_word(first: int, last: int, step: int) -> None:
    def count(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda s: s[0] < last, lambda s: (s[0] + step, s[1] @ x), (first, x))[1]

    text = jax.jit(count).lower(jnp.ones((4, 4))).compile().as_text()
    assert hlo.flops(text) == len(range(first, last, step)) * 2 * 4**3
    bare = text.replace("known_trip_count", "unknown")
    assert bare != text and hlo.flops(bare) == hlo.flops(text)


def test_a_loop_of_unknown_length_counts_once() -> None:
    def halve(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] > 1, lambda x: x @ x, x)

    assert hlo.flops(jax.jit(halve).lower(jnp.ones((4, 4))).compile().as_text()) == 2 * 4**3


@pytest.mark.parametrize(
    ("left", "right", "settings"),
    [
        ((2, 9, 9, 6), (3, 3, 6, 4), {"padding": "SAME"}),
        ((2, 9, 8, 6), (3, 2, 6, 4), {"padding": ((1, 0), (2, 2)), "window_strides": (2, 1), "rhs_dilation": (2, 1)}),
        ((2, 5, 4, 6), (3, 3, 6, 4), {"padding": ((2, 1), (2, 2)), "lhs_dilation": (2, 3)}),
        ((2, 9, 9, 6), (3, 3, 3, 4), {"padding": "VALID", "feature_group_count": 2}),
    ],
)
def test_convolutions_count_what_meets_an_entry(left, right, settings) -> None:  # type: ignore[no-untyped-def]
    settings = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | settings

    def convolve(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, y, **settings)

    # Of ones, the result counts the products.
    products = float(jnp.sum(convolve(jnp.ones(left), jnp.ones(right))))
    text = jax.jit(convolve).lower(jnp.ones(left), jnp.ones(right)).compile().as_text()
    assert hlo.flops(text) == 2 * products


def test_text_for_tpu() -> None:
    """Tuples, layouts with parentheses; a loop without a known count; a collective that runs beside two fusions."""
    text = textwrap.dedent("""\
        HloModule jit_f, is_scheduled=true

        %add.clone (a.1: bf16[], b.1: bf16[]) -> bf16[] {
          %a.1 = bf16[]{:T(256)} parameter(0)
          %b.1 = bf16[]{:T(256)} parameter(1)
          ROOT %add.9 = bf16[]{:T(256)} add(%a.1, %b.1)
        }

        %fused.1 (p.1: bf16[8,16,32], p.2: bf16[8,16,128]) -> bf16[8,16,128] {
          %p.1 = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} parameter(0)
          %p.2 = bf16[8,16,128]{2,1,0:T(8,128)(2,1)} parameter(1)
          ROOT %all-gather.1 = bf16[8,16,128]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=35, \
        replica_groups=[4,4]<=[4,4]T(1,0), dimensions={2}, frontend_attributes={chain_id="1"}
        }

        %fused.2 (p.3: bf16[8,16,32], p.4: bf16[8,16,128]) -> bf16[8,16,128] {
          %p.3 = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} parameter(0)
          %p.4 = bf16[8,16,128]{2,1,0:T(8,128)(2,1)} parameter(1)
          ROOT %all-gather.2 = bf16[8,16,128]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p.3), channel_id=35, \
        replica_groups=[4,4]<=[4,4]T(1,0), dimensions={2}, frontend_attributes={chain_id="1"}
        }

        %body.1 (s.1: (s32[], bf16[8,16,32], /*index=2*/bf16[8,16,128])) -> (s32[], bf16[8,16,32], bf16[8]) {
          %s.1 = (s32[]{:T(128)}, bf16[8,16,32]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[8,16,128]{2,1,0}) parameter(0)
          %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
          %x.1 = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s.1), index=1
          %y.1 = bf16[8,16,128]{2,1,0} get-tuple-element(%s.1), index=2
          %one.1 = s32[]{:T(128)} constant(1)
          %next.1 = s32[]{:T(128)} add(%i.1, %one.1)
          %begun.1 = bf16[8,16,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%x.1, %y.1), kind=kCustom, calls=%fused.1
          %done.1 = bf16[8,16,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%x.1, %begun.1), kind=kCustom, calls=%fused.2
          %sum.1 = (bf16[4]{0}, bf16[6,2]{1,0:T(8,128)(2,1)}) all-reduce(%part.1, %part.2), to_apply=%add.clone
          %part.1 = bf16[4]{0} custom-call(), custom_call_target="X"
          %part.2 = bf16[6,2]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="X"
          ROOT %t.1 = (s32[], bf16[8,16,32]{2,1,0}, /*index=2*/bf16[8,16,128]{2,1,0}) tuple(%next.1, %x.1, %done.1)
        }

        %condition.1 (s.2: (s32[], bf16[8,16,32], /*index=2*/bf16[8,16,128])) -> pred[] {
          %s.2 = (s32[]{:T(128)}, bf16[8,16,32]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[8,16,128]{2,1,0}) parameter(0)
          %bound.1 = s32[]{:T(128)} constant(32)
          %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
          ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %bound.1), direction=LT
        }

        ENTRY %main (x.0: bf16[8,16,32]) -> bf16[8,16,128] {
          %x.0 = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} parameter(0)
          %zero.1 = s32[]{:T(128)} constant(0)
          %copy.1 = s32[]{:T(128)} copy(%zero.1)
          %empty.1 = bf16[8,16,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
          %t.0 = (s32[]{:T(128)}, bf16[8,16,32]{2,1,0}, /*index=2*/bf16[8,16,128]{2,1,0}) tuple(%copy.1, %x.0, %empty.1)
          %while.1 = (s32[]{:T(128)}, bf16[8,16,32]{2,1,0}, /*index=2*/bf16[8,16,128]{2,1,0}) while(%t.0), \
        condition=%condition.1, body=%body.1
          %moved.1 = (bf16[8,16,32]{2,1,0}, bf16[8,16,32]{2,1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
        collective-permute-start(%x.0), channel_id=37, source_target_pairs={{0,1},{1,0}}
          %moved.2 = bf16[8,16,32]{2,1,0} collective-permute-done(%moved.1)
          ROOT %out.1 = bf16[8,16,128]{2,1,0} get-tuple-element(%while.1), index=2
        }
        """)
    found = {c.kind: c for c in hlo.collectives(text)}
    assert len(hlo.collectives(text)) == 3
    assert found["all-gather"] == hlo.Collective("all-gather", 8 * 16 * 128 * 2, 32)
    assert found["all-reduce"] == hlo.Collective("all-reduce", 2 * (4 + 12), 32)
    assert found["collective-permute"].count == 1
    assert abs(found["collective-permute"].bytes - 8 * 16 * 32 * 2) <= 8  # and two words of its own


def test_batched_products_that_tpu_writes_as_convolutions() -> None:
    text = textwrap.dedent("""\
        ENTRY %main (x: bf16[2,512,128], y: bf16[2,128,64]) -> bf16[2,512,64] {
          %x = bf16[2,512,128]{2,1,0} parameter(0)
          %y = bf16[2,128,64]{2,1,0} parameter(1)
          ROOT %c = bf16[2,512,64]{2,1,0} convolution(%x, %y), window={size=2 lhs_dilate=2}, \
        dim_labels=0bf_0io->0bf
        }
        """)
    assert hlo.flops(text) == 2 * 2 * 512 * 128 * 64
    # The same, with XLA's own count for a plain product.
    a, b = jnp.ones((3, 7, 5)), jnp.ones((3, 5, 4))
    compiled = jax.jit(jnp.matmul).lower(a, b).compile()
    assert hlo.flops(compiled.as_text()) == 2 * np.prod((3, 7, 5, 4))


def test_text_without_an_entry_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"as_text\(\)"):
        hlo.collectives("HloModule empty\n")
