"""What is read from compiled programs, and what the package's own programs move between devices."""

import dataclasses
import functools
import math
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from activedpo_jax import hlo, layout, specs, tasks
from activedpo_jax.compile_only.cost import with_loop_length
from activedpo_jax.compile_only.topology import tpu_devices
from activedpo_jax.data.groups import Groups
from activedpo_jax.evidence.gradients import FeatureSpec, pair_features
from activedpo_jax.generation.decoding import DecodingSpec, Requests, respond
from activedpo_jax.generation.sampling import Sampling
from activedpo_jax.models.config import LoraConfig, ModelConfig
from activedpo_jax.models.decoder import Decoder, Params, init_params, unstack
from activedpo_jax.models.lora import Lora, init_lora
from activedpo_jax.models.policy import Policy
from activedpo_jax.rounds import staged
from activedpo_jax.rounds.learn import Microbatch, Whole
from activedpo_jax.rounds.state import RunState, empty_labelled
from activedpo_jax.training.optimiser import Position
from tests import tiny
from tests.test_round import options


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
    text = jax.jit(layers).lower(weights, x).compile().as_text() or ""
    gathered = [c for c in hlo.collectives(text) if c.kind == "all-gather"]
    assert gathered == [hlo.Collective("all-gather", 64 * 64 * 4, 15)]
    assert hlo.flops(text) == 15 * 2 * (8 // 2) * 64 * 64


@pytest.mark.parametrize(("first", "last", "step"), [(0, 9, 1), (1, 9, 2), (2, 10, 4)])
def test_iterations_are_known_without_the_compilers_word(first: int, last: int, step: int) -> None:
    def count(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda s: s[0] < last, lambda s: (s[0] + step, s[1] @ x), (first, x))[1]

    text = jax.jit(count).lower(jnp.ones((4, 4))).compile().as_text() or ""
    assert hlo.flops(text) == len(range(first, last, step)) * 2 * 4**3
    bare = text.replace("known_trip_count", "unknown")
    assert bare != text and hlo.flops(bare) == hlo.flops(text)


def test_a_loop_of_unknown_length_counts_once() -> None:
    def halve(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] > 1, lambda x: x @ x, x)

    assert hlo.flops(jax.jit(halve).lower(jnp.ones((4, 4))).compile().as_text() or "") == 2 * 4**3


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
    text = jax.jit(convolve).lower(jnp.ones(left), jnp.ones(right)).compile().as_text() or ""
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
    assert hlo.flops(compiled.as_text() or "") == 2 * np.prod((3, 7, 5, 4))


def test_text_without_an_entry_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"as_text\(\)"):
        hlo.collectives("HloModule empty\n")


# The programs of a run, compiled for eight devices.  Nothing runs, so arrays may be large: each device has whole tiles.

MODEL = dataclasses.replace(
    tiny.MODEL,
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
)
RANK, DIM = 16, 1024
GROUPS, PROMPT, RESPONSE = 12, 14, 40
CHUNK = 5  # positions whose logits exist at a time


@pytest.fixture(scope="module")
def pod() -> Mesh:
    return layout.make_mesh(ml_collections.ConfigDict({"data": 1, "fsdp": 4, "tensor": 2}))


def placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def model_on(mesh: Mesh, logits_chunk: int, dtype: Any = jnp.float32, **changes: Any) -> tuple[Decoder, Params, Lora]:
    """A decoder, and the shapes of its weights and of an adapter."""
    model = dataclasses.replace(MODEL, **changes)
    decoder = Decoder(model, LoraConfig(RANK, 32.0), dtype, remat="full", logits_chunk=logits_chunk, mesh=mesh)
    params = jax.eval_shape(lambda: init_params(decoder, jax.random.key(0)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    lora = jax.eval_shape(lambda: init_lora(model, decoder.lora, jax.random.key(0)))
    return decoder, *(placed(tree, layout.weight_shardings(mesh, tree)) for tree in (params, lora))


def held(text: str) -> list[hlo.Array]:
    """The arrays in a device's memory: all results but those within fusions."""
    program = hlo.parse(text)
    fused = {name for i in program.instructions.values() if i.opcode == "fusion" for name in i.called}
    return [
        array
        for name, instructions in program.computations.items()
        if name not in fused and program.runs[name]
        for instruction in instructions
        for array in instruction.results
    ]


@pytest.fixture(scope="module")
def features_text(pod: Mesh) -> str:
    """Features of pairs, three groups to each of four rows of two devices."""
    decoder, params, lora = model_on(pod, GROUPS // 4 * CHUNK)
    groups = jax.eval_shape(lambda: Groups(*map(jnp.asarray, tiny.groups(0, GROUPS, 2, PROMPT, RESPONSE))))
    groups = jax.tree.map(lambda x: placed(x, layout.batch(pod)), groups)
    compute = jax.jit(lambda p, a, g, seed: pair_features(decoder, p, a, g, FeatureSpec(DIM), seed))
    return compute.lower(params, lora, groups, jnp.uint32(0)).compile().as_text() or ""


def test_no_loop_over_tiles_moves_anything(features_text: str) -> None:
    # Forwards, forwards again and backwards in each layer, and what the loop over chunks of logits reduces.
    assert {c.count for c in hlo.collectives(features_text)} <= {1, MODEL.num_layers, RESPONSE // CHUNK}
    program = hlo.parse(features_text)
    loops = [program.trip_count(i) for i in program.instructions.values() if i.opcode == "while"]
    # The largest part of a matrix has 12 tiles of D, in blocks of 8.  Threefry has 5 rounds.
    assert set(loops) <= {1, 2, 5, RESPONSE // CHUNK, MODEL.num_layers}


def test_no_device_holds_the_batch_of_another(features_text: str) -> None:
    whole = [a for a in held(features_text) if GROUPS in a.shape and a.dtype == "f32" and a.shape[-1] >= DIM]
    assert not whole
    # Nor its hidden states, but for the embeddings of tokens, of which a device looks up a quarter of every row.
    states = [a for a in held(features_text) if GROUPS in a.shape[:-1] and a.shape[-1:] == (MODEL.hidden_size,)]
    assert not states


def test_logits_stay_cut_and_their_table_is_gathered_once(features_text: str) -> None:
    table = MODEL.vocab_size // 2 * MODEL.hidden_size * 4  # cut over `tensor`
    gathered = [c for c in hlo.collectives(features_text) if c.kind == "all-gather" and c.bytes >= table]
    assert gathered == [hlo.Collective("all-gather", table, 1)]
    tokens = 2 * GROUPS // 4 * CHUNK  # of a chunk in a device, with two responses to a prompt
    in_loop = [c for c in hlo.collectives(features_text) if c.count == RESPONSE // CHUNK]
    assert in_loop and max(c.bytes for c in in_loop) <= 2 * tokens * MODEL.hidden_size * 4
    rows = [math.prod(a.shape[:-1]) for a in held(features_text) if a.shape[-1:] == (MODEL.vocab_size // 2,)]
    assert rows and max(rows) <= tokens
    assert not [a for a in held(features_text) if MODEL.vocab_size in a.shape]


def test_weights_stay_cut(features_text: str, pod: Mesh) -> None:
    """Of all layers' weights at once, a device has its eighth; of one layer's, what `tensor` leaves it."""
    layers = [a for a in held(features_text) if a.shape[:1] == (MODEL.num_layers,) and len(a.shape) == 3]
    kernel = MODEL.num_layers * MODEL.hidden_size * MODEL.intermediate_size
    assert max(math.prod(a.shape) for a in layers) <= kernel // 8
    gathered = [c.bytes for c in hlo.collectives(features_text) if c.kind == "all-gather" and c.count > 1]
    assert max(gathered) <= MODEL.hidden_size * MODEL.intermediate_size * 4 // 2


LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128}
QWEN = LLAMA | {"hidden_size": 2560, "intermediate_size": 9728, "num_kv_heads": 8, "tie_embeddings": True}


@pytest.mark.parametrize("changes", [LLAMA, QWEN], ids=["tiles", "no tiles"])
@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2)])
def test_a_sampled_token_moves_no_weights(fsdp: int, tensor: int, changes: dict[str, Any]) -> None:
    """A token of every response goes to the weights.  The compiler alone gathers a Qwen's for each token."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install '.[tpu]'")
    sizes = ml_collections.ConfigDict({"data": 1, "fsdp": fsdp, "tensor": tensor})
    mesh = layout.make_mesh(sizes, tpu_devices("v5e:2x4"))
    decoder, *trees = model_on(mesh, CHUNK, jnp.bfloat16, num_layers=1, **changes)
    params, lora = (
        placed(jax.eval_shape(unstack, tree), jax.jit(unstack).lower(tree).compile().output_shardings) for tree in trees
    )
    length, rows, m = 9, 8, 3
    spec = DecodingSpec(decoder.clone(unrolled=True), Sampling(), (), length, mesh)
    shapes = [((rows, PROMPT), jnp.int32), ((rows,), jnp.int32), ((rows,), jnp.uint32), ((rows, m), jnp.int32)]
    requests = Requests(*(jax.ShapeDtypeStruct(s, d, sharding=layout.batch(mesh)) for s, d in shapes))
    compiled = respond.lower(spec, params, lora, requests).compile()
    text = with_loop_length(compiled.as_text() or "", length - 1)
    moved = [c.bytes for c in hlo.collectives(text) if c.count == length - 1]
    config = decoder.config
    hidden_units, smallest = rows * m * config.intermediate_size, config.hidden_size * config.num_kv_heads * 128
    # The largest: the sums of gate and up, in one all-reduce.
    assert moved and max(moved) <= 2 * 2 * 2 * hidden_units < 2 * smallest // tensor


def test_adapters_gradients_and_moments_are_cut_over_fsdp_and_tensor(pod: Mesh) -> None:
    config = options()
    task = tasks.load(config, 0, pod, None)
    spec = specs.round_spec(config, "activedpo", task, pod)
    shapes = jax.eval_shape(lambda: init_lora(task.decoder.config, task.decoder.lora, jax.random.key(0)))
    lora = placed(shapes, layout.weight_shardings(pod, shapes))

    def outputs(program: Any, *arguments: Any) -> Any:
        compiled = program.lower(spec, *arguments).compile()
        return placed(jax.eval_shape(functools.partial(program, spec), *arguments), compiled.output_shardings)

    def parts(tree: Any) -> list[float]:
        return [
            math.prod(x.shape) / math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree) if x.ndim
        ]

    opt_state = outputs(staged.init_program, lora)
    gradient = outputs(staged.no_gradient_program, lora)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    after = outputs(staged.update_program, lora, opt_state, gradient[0], Position(step, step))
    for tree in (lora, opt_state, gradient, after):
        assert set(parts(tree)) == {8}
    assert len(parts(after)) == 3 * len(parts(lora))
    state = RunState(lora, jax.eval_shape(lambda: empty_labelled(spec)), jnp.uint32(0), jnp.int32(0))
    policy = Policy(task.decoder, task.params_shape, lora)
    slots, shares = (jax.ShapeDtypeStruct((spec.training.microbatch,), x) for x in (jnp.int32, jnp.float32))
    microbatch = Microbatch(slots, shares, task.buckets[0])
    arguments = policy, lora, gradient, state.labelled, microbatch, Whole(np.float32(0))
    compiled = staged.gradient_program.lower(spec, *arguments).compile()
    assert set(parts(placed(shapes, compiled.output_shardings[0]))) == {8}


@pytest.mark.parametrize(("fsdp", "tensor"), [(16, 1), (4, 4), (128, 4)])
def test_no_shard_of_a_large_model_is_less_than_a_tile(fsdp: int, tensor: int) -> None:
    """Else the compiler gathers by an all-reduce of the whole array: 549 GiB a step for 70B at fsdp=128."""
    mesh = AbstractMesh((1, fsdp, tensor), layout.AXES)
    model = ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, tie_embeddings=False)
    params = jax.eval_shape(lambda: init_params(Decoder(model, LoraConfig(128)), jax.random.key(0)))
    shardings = layout.weight_shardings(mesh, params)  # type: ignore[arg-type]

    def narrow(x: Any, sharding: NamedSharding) -> bool:
        return x.ndim > 1 and sharding.shard_shape(x.shape)[-1] % 128 != 0

    assert not jax.tree.leaves(jax.tree.map(narrow, params, shardings)).count(True)
    # And the layers are cut over all devices nonetheless.
    layers = (params["layers"], shardings["layers"])
    parts = jax.tree.map(lambda x, s: math.prod(x.shape) // math.prod(s.shard_shape(x.shape)), *layers)
    assert {
        n for n, x in zip(jax.tree.leaves(parts), jax.tree.leaves(params["layers"]), strict=True) if x.ndim > 2
    } == {fsdp * tensor}


def test_an_axis_need_not_be_one_of_the_machines_own() -> None:
    pytest.importorskip("libtpu", reason="needs libtpu: pip install '.[tpu]'")
    devices = tpu_devices("v5p:8x8x8")
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 1, "fsdp": 128, "tensor": 4}), devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 128, "tensor": 4}
