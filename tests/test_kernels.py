"""Fused attention against the XLA path, on CPU: splash in Pallas' interpreter, cuDNN's call computed by XLA."""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import Mesh

from activedpo_jax import layout
from activedpo_jax.compile_only import tpu_devices
from activedpo_jax.data.groups import Groups
from activedpo_jax.data.packing import Axis, Packing, Tier
from activedpo_jax.evidence.gradients import response_features
from activedpo_jax.models import attention, kernels
from activedpo_jax.models.attention import Rule
from activedpo_jax.models.decoder import Decoder, init_params
from activedpo_jax.models.kernels import Backend, Call
from activedpo_jax.models.lora import init_lora
from activedpo_jax.models.policy import response_logps
from tests import tiny

LENGTH = 128
BOUND = 1e-5


def mesh_of(*shape: int) -> Mesh:
    sizes = ml_collections.ConfigDict(dict(zip(layout.AXES, shape, strict=True)))
    return layout.make_mesh(sizes, jax.devices()[: int(np.prod(shape))])


@pytest.fixture(params=["splash", "cudnn"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its name; it runs on CPU."""
    monkeypatch.setattr(kernels, "_FOR_PLATFORM", {"cpu": request.param})
    monkeypatch.setattr(kernels, "_INTERPRET", True)
    monkeypatch.setattr(kernels, "_CUDNN", "xla")
    monkeypatch.setattr(kernels, "_BLOCK", 128)  # several blocks, some of which a window leaves out
    kernels._refusal.cache_clear()
    yield request.param
    kernels._refusal.cache_clear()


# The two calls


def make_rule(scale: float, softcap: float | None, window: int | None, mixed: bool = False) -> Rule:
    """A layer's rule; `mixed`: other layers of the model have no window."""
    traced = jnp.int32(attention._NO_WINDOW if window is None else window)
    return Rule(scale, softcap, traced, (window, None) if mixed else (window,))


def random(seed: int, *shape: int) -> Any:
    return jax.random.normal(jax.random.key(seed), shape)


def compare(
    function: Callable[..., jax.Array], reference: Callable[..., jax.Array], arrays: list[Any], seen: Any
) -> None:
    """Outputs where `seen` [..., T] is true, and gradients with respect to the arrays of what is read there."""

    def both(f: Callable[..., jax.Array]) -> Any:
        out, pull = jax.vjp(f, *arrays)
        return out, pull(jnp.where(seen[..., None], random(9, *out.shape), 0))

    (out, gradients), (expected, expected_gradients) = jax.jit(lambda: (both(function), both(reference)))()
    assert np.all(np.isfinite(out))
    assert tiny.relative_error(np.asarray(out)[seen], np.asarray(expected)[seen]) < BOUND
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert tiny.relative_error(got, wanted) < BOUND


RULES = {
    "plain": make_rule(0.3, None, None),
    "window within the prompt": make_rule(0.3, None, 40),
    "window beyond the prompt": make_rule(0.3, None, 2 * LENGTH + 50),
    "window beyond everything": make_rule(0.3, None, 4096),
    "a local layer among global ones": make_rule(0.3, None, 40, mixed=True),
    "a global layer among local ones": Rule(0.3, None, jnp.int32(attention._NO_WINDOW), (40, None)),
    "soft-cap": make_rule(0.3, 2.0, 100),
}


@pytest.mark.parametrize("name", ["window within the prompt", "a local layer among global ones", "soft-cap"])
def test_prompt_equals_xla(kernel: str, name: str) -> None:
    rule = RULES[name]
    if kernel == "cudnn" and rule.softcap is not None:
        pytest.skip("cuDNN has none")
    prompt_len: Any = np.array([1, 2, 39, 40, 41, 77, 127, 128], np.int32)
    arrays = [random(i, len(prompt_len), LENGTH, heads, 16) for i, heads in enumerate((4, 2, 2))]
    backend = Backend(kernel, mesh_of(1, 1, 1))
    compare(
        lambda q, k, v: kernels.prompt_attention(q, k, v, prompt_len, rule, backend),
        lambda q, k, v: attention.prompt_attention(q, k, v, prompt_len, rule),
        arrays,
        np.arange(LENGTH) >= LENGTH - prompt_len[:, None],
    )


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_responses_equal_xla(kernel: str, rule: Rule) -> None:
    if kernel == "cudnn" and rule.softcap is not None:
        pytest.skip("cuDNN has none")
    prompt_len: Any = np.array([1, 40, 177, 256], np.int32)
    shapes = [(4, 2, LENGTH, 4), (4, 2, LENGTH, 2), (4, 2, LENGTH, 2), (4, 2 * LENGTH, 2), (4, 2 * LENGTH, 2)]
    arrays = [random(i, *shape, 16) for i, shape in enumerate(shapes)]
    backend = Backend(kernel, mesh_of(1, 1, 1))
    compare(
        lambda q, k, v, *prompt: kernels.response_attention(q, k, v, prompt[0], prompt[1], prompt_len, rule, backend),
        lambda q, k, v, *prompt: attention.response_attention(q, k, v, prompt[0], prompt[1], prompt_len, rule),
        arrays,
        np.ones((4, 2, LENGTH), bool),
    )


def test_prompts_of_every_length(kernel: str) -> None:
    prompt_len: Any = np.arange(1, LENGTH + 1, dtype=np.int32)
    backend, rule = Backend(kernel, mesh_of(1, 1, 1)), make_rule(0.5, None, None)
    q, k, v, own_q, own_k, own_v = (random(i, LENGTH, LENGTH, 1, 8) for i in range(6))
    own = [x[:, None] for x in (own_q, own_k, own_v)]
    seen = np.arange(LENGTH) >= LENGTH - prompt_len[:, None]

    @jax.jit
    def outputs() -> Any:
        return (
            kernels.prompt_attention(q, k, v, prompt_len, rule, backend),
            attention.prompt_attention(q, k, v, prompt_len, rule),
            kernels.response_attention(own[0], own[1], own[2], k, v, prompt_len, rule, backend),
            attention.response_attention(own[0], own[1], own[2], k, v, prompt_len, rule),
        )

    prompt, prompt_expected, response, response_expected = map(np.asarray, outputs())
    assert np.all(np.isfinite(prompt))
    assert tiny.relative_error(prompt[seen], prompt_expected[seen]) < BOUND
    assert tiny.relative_error(response, response_expected) < BOUND


def test_padding_is_never_seen(kernel: str) -> None:
    """Other keys and values of padding leave every output as it was."""
    prompt_len: Any = np.array([5, 100], np.int32)
    pad = (np.arange(LENGTH) < LENGTH - prompt_len[:, None])[..., None, None]
    q, k, v = (random(i, 2, LENGTH, 2, 8) for i in range(3))
    own = [random(i, 2, 1, LENGTH, 2, 8) for i in range(3, 6)]
    backend, rule = Backend(kernel, mesh_of(1, 1, 1)), make_rule(0.5, None, 60)

    @jax.jit
    def outputs(filler: jax.Array) -> Any:
        keys, values = jnp.where(pad, filler, k), jnp.where(pad, -filler, v)
        prompt = kernels.prompt_attention(q, keys, values, prompt_len, rule, backend)
        return prompt, kernels.response_attention(own[0], own[1], own[2], keys, values, prompt_len, rule, backend)

    (prompt, response), (other_prompt, other_response) = outputs(jnp.float32(0)), outputs(jnp.float32(1e3))
    seen = np.arange(LENGTH) >= LENGTH - prompt_len[:, None]
    np.testing.assert_array_equal(np.asarray(prompt)[seen], np.asarray(other_prompt)[seen])
    np.testing.assert_array_equal(response, other_response)


@pytest.mark.parametrize("kernel", ["splash"], indirect=True)
def test_bfloat16_is_as_exact_as_xla(kernel: str) -> None:
    """Scores and sums are float32, so that the error against float32 is that of the inputs' rounding."""
    prompt_len: Any = np.full(4, LENGTH, np.int32)
    rule = make_rule(0.3, None, None)
    rounded = [random(i, 4, LENGTH, heads, 16).astype(jnp.bfloat16) for i, heads in enumerate((4, 2, 2))]
    q, k, v = rounded
    wide = [x.astype(jnp.float32) for x in rounded]
    exact = attention.prompt_attention(wide[0], wide[1], wide[2], prompt_len, rule)
    plain = attention.prompt_attention(q, k, v, prompt_len, rule)
    fused = kernels.prompt_attention(q, k, v, prompt_len, rule, Backend(kernel, mesh_of(1, 1, 1)))
    assert fused.dtype == jnp.bfloat16
    fused_error, plain_error = (float(jnp.mean(jnp.abs(x.astype(jnp.float32) - exact))) for x in (fused, plain))
    assert 0 < fused_error < 1.5 * plain_error


# On a mesh


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 1), (6, 3), (3, 3)])
def test_on_a_mesh(kernel: str, heads: int, kv_heads: int) -> None:
    """Rows over `data` and `fsdp`; heads over `tensor` if each of the two devices can have whole ones of its own."""
    mesh, rule = mesh_of(2, 2, 2), make_rule(0.3, None, 40, mixed=True)
    prompt_len: Any = np.array([1, 40, 77, 128], np.int32)
    shapes: list[tuple[int, ...]] = [(4, 1, LENGTH, heads), (4, 1, LENGTH, kv_heads), (4, 1, LENGTH, kv_heads)]
    shapes += [(4, LENGTH, h) for h in (kv_heads, kv_heads)]
    arrays = [jax.device_put(random(i, *shape, 8), layout.batch(mesh)) for i, shape in enumerate(shapes)]
    compare(
        lambda q, k, v, *prompt: kernels.response_attention(
            q, k, v, prompt[0], prompt[1], prompt_len, rule, Backend(kernel, mesh)
        ),
        lambda q, k, v, *prompt: attention.response_attention(q, k, v, prompt[0], prompt[1], prompt_len, rule),
        arrays,
        np.ones((4, 1, LENGTH), bool),
    )


# The decoder

MODEL = dataclasses.replace(tiny.MODEL, window=40, local=(True, False), num_kv_heads=1)


@functools.cache
def gradients(kernel: str, shape: tuple[int, ...], remat: str) -> tuple[Any, str]:
    """Log-probabilities, the gradient of their sum in the adapter, probe features; and the program of the features."""
    mesh = mesh_of(*shape)
    decoder, params, lora = tiny.model(config=MODEL, attention=kernel, mesh=mesh, remat=remat)
    params, lora = (jax.device_put(tree, layout.weight_shardings(mesh, tree)) for tree in (params, lora))
    batch = jax.device_put(tiny.groups(0, 4, 2, LENGTH, LENGTH), layout.batch(mesh))

    def total(lora: Any) -> Any:
        logps = decoder.apply({"params": params, "lora": lora}, batch)
        return jnp.sum(logps), logps  # type: ignore[arg-type]

    def compute(lora: Any, batch: Groups) -> Any:
        gradient, logps = jax.grad(total, has_aux=True)(lora)
        return logps, gradient, response_features(decoder, params, lora, batch, 64, jnp.uint32(3))

    traced = jax.jit(compute).trace(lora, batch)
    return traced.lower().compile()(lora, batch), str(traced.jaxpr)


@pytest.mark.parametrize(
    ("shape", "remat"), [((1, 1, 1), "dots"), pytest.param((2, 2, 2), "full", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_decoder_and_features_equal_xla(kernel: str, shape: tuple[int, ...], remat: str) -> None:
    expected, _ = gradients("xla", (1, 1, 1), "none")
    got, program = gradients(kernel, shape, remat)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert tiny.relative_error(x, y) < 2 * BOUND
    # Mapped over responses, the prompt's forward pass stays unmapped: it is computed once.
    name = "splash_mha_fwd" if kernel == "splash" else "custom_vmap_call"
    assert name in program
    assert f"f32[4,{LENGTH},{MODEL.intermediate_size}]" in program


# The choice

PLAIN = Call(128, 256, 4, 2, 64, jnp.bfloat16, None, (None,))


def device_mesh(platform: str) -> Any:
    """As much of a mesh as the choice looks at."""
    devices = np.array([types.SimpleNamespace(platform=platform)], dtype=object)
    return types.SimpleNamespace(devices=devices, size=1)


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> Any:
    """JAX's own checks of a cuDNN call, as on a machine with a Hopper GPU."""
    checks = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo", reason="JAX keeps its checks elsewhere")
    monkeypatch.setattr(checks, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(checks, "check_compute_capability", lambda capability: True)
    kernels._refusal.cache_clear()
    yield
    kernels._refusal.cache_clear()


@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        ("cpu", {}, "xla"),
        ("rocm", {}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"softcap": 50.0, "limits": (512, None), "head_dim": 256, "dtype": jnp.float32}, "splash"),
        ("tpu", {"queries": 9, "keys": 13}, "xla"),
        ("tpu", {"queries": 128, "keys": 320}, "xla"),
        ("tpu", {"dtype": jnp.float16}, "xla"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"limits": (512, None), "head_dim": 256, "queries": 77, "keys": 200, "dtype": jnp.float16}, "cudnn"),
        ("gpu", {"softcap": 50.0}, "xla"),
        ("gpu", {"dtype": jnp.float32}, "xla"),
        ("gpu", {"head_dim": 100}, "xla"),
        ("gpu", {"head_dim": 512}, "xla"),
        ("gpu", {"queries": 32, "keys": 2080}, "xla"),  # cuDNN would compute 2080 rows for 32
    ],
)
def test_what_auto_takes(nvidia: None, platform: str, changes: dict[str, Any], expected: str) -> None:
    call = PLAIN._replace(**changes)
    assert kernels.choose(Backend("auto", device_mesh(platform)), call) == expected
    assert kernels.choose(Backend("xla", device_mesh(platform)), call) == "xla"


def test_auto_without_cudnn_takes_xla() -> None:
    kernels._refusal.cache_clear()
    assert kernels.choose(Backend("auto", device_mesh("gpu")), PLAIN) == "xla"


@pytest.mark.parametrize(
    ("kernel_name", "platform", "changes", "message"),
    [
        ("flash", "gpu", {}, "auto, xla, cudnn, splash"),
        ("splash", "gpu", {}, "TPU.*'gpu'.*'xla'"),
        ("cudnn", "tpu", {}, "NVIDIA.*'tpu'.*'xla'"),
        ("splash", "tpu", {"queries": 100, "keys": 100}, "prompts of 100.*buckets"),
        ("splash", "tpu", {"queries": 100, "keys": 228}, "responses of 100.*buckets"),
        ("splash", "tpu", {"dtype": jnp.float16}, "float16.*config.model.dtype"),
        ("cudnn", "gpu", {"softcap": 50.0}, "soft-cap.*'xla'"),
        ("cudnn", "gpu", {"head_dim": 512}, "head dim.*512.*'xla'"),
        ("cudnn", "gpu", {"dtype": jnp.float32}, "float32.*'xla'"),
    ],
)
def test_a_kernel_that_cannot_run_says_why(
    nvidia: None, kernel_name: str, platform: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"config.model.attention='{kernel_name}'.*{message}"):
        kernels.choose(Backend(kernel_name, device_mesh(platform)), PLAIN._replace(**changes))


def test_the_decoder_says_why_too() -> None:
    decoder, params, _ = tiny.model()
    with pytest.raises(ValueError, match="'splash': it needs a TPU"):
        decoder.clone(attention="splash").apply({"params": params}, tiny.groups(0, 2, 2))


# Compiled for machines that are not here


def feature_program(kernel_mesh: Mesh, head_dim: int, packing: Packing | None = None) -> Any:
    """Features and training gradient of a small bfloat16 decoder, as one jitted function, and abstract arguments."""
    config = dataclasses.replace(tiny.MODEL, num_heads=4, num_kv_heads=2, head_dim=head_dim)
    decoder = Decoder(config, tiny.LORA, jnp.bfloat16, "dots", mesh=kernel_mesh, packing=packing)
    replicated, batch = layout.replicated(kernel_mesh), layout.batch(kernel_mesh)

    def abstract(tree: Any, dtype: Any = None) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=replicated), tree)

    params = abstract(jax.eval_shape(lambda: init_params(decoder, jax.random.key(0))), jnp.bfloat16)
    lora = abstract(jax.eval_shape(lambda: init_lora(config, tiny.LORA, jax.random.key(0))))
    shapes: list[tuple[int, ...]] = [(4, LENGTH), (4,), (4, 2, LENGTH), (4, 2)]
    arrays: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch) for shape in shapes]
    groups = Groups(*arrays)

    def compute(params: Any, lora: Any, groups: Groups) -> Any:
        features = response_features(decoder, params, lora, groups, 64, jnp.uint32(3))
        return features, jax.grad(lambda w: jnp.sum(response_logps(decoder, params, w, groups)))(lora)

    return jax.jit(compute), (params, lora, groups)


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_splash_compiles_for_tpu(head_dim: int) -> None:
    pytest.importorskip("libtpu", reason="needs libtpu: pip install '.[tpu]'")
    devices = tpu_devices("v5e:2x2")
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 1, "tensor": 2}), devices)
    program, arguments = feature_program(mesh, head_dim)
    compiled = program.lower(*arguments).compile()
    text = compiled.as_text()
    for part in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{part}" in text
    assert "tpu_custom_call" in text
    assert compiled.memory_analysis().temp_size_in_bytes > 0


TWO_WIDTHS = Axis(3 * LENGTH, (Tier(1, 2 * LENGTH), Tier(3, LENGTH)))


def test_splash_compiles_for_packed_batches() -> None:
    pytest.importorskip("libtpu", reason="needs libtpu: pip install '.[tpu]'")
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), tpu_devices("v5e:2x2")[:1])
    program, arguments = feature_program(mesh, 64, Packing(TWO_WIDTHS, TWO_WIDTHS))
    assert "splash_mha_dkv" in program.lower(*arguments).compile().as_text()


def test_cudnn_lowers_for_packed_batches(nvidia: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FOR_PLATFORM", {"cpu": "cudnn"})
    program, arguments = feature_program(mesh_of(1, 1, 1), 64, Packing(TWO_WIDTHS, TWO_WIDTHS))
    text = program.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmaxBackward(" in text and "ScaleBias" not in text


@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_lowers_for_nvidia(nvidia: None, monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    """JAX makes the cuDNN calls, forwards and backwards, on a mesh and mapped over responses; no GPU runs them here."""
    monkeypatch.setattr(kernels, "_FOR_PLATFORM", {"cpu": "cudnn"})
    program, arguments = feature_program(mesh_of(2, 1, 2), head_dim)
    text = program.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax(" in text and "@__cudnn$fmhaSoftmaxBackward(" in text
    assert "ScaleBias" not in text  # no mask in memory
