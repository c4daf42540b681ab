"""Quantised base weights: the formats' error bounds, and that everything downstream sees the dequantised weights."""

import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.stats

from activedpo_jax import flags, layout, runs, start, tasks
from activedpo_jax.config import default
from activedpo_jax.evidence.gradients import (
    FeatureSpec,
    pair_features,
    reference_gradients,
    response_features,
    sketch_gradients,
)
from activedpo_jax.huggingface import loading
from activedpo_jax.models import quantise
from activedpo_jax.models.decoder import Decoder, Params, unstack
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy, response_logps
from activedpo_jax.oracles.labels import Pending
from activedpo_jax.training import losses, optimiser
from tests import test_round, tiny
from tests.tiny_hf import tiny_llama

qwix = pytest.importorskip("qwix", reason="needs qwix: pip install '.[quant]'")

FORMATS = ("int8", "nf4")
# A format has no part in what is kept, so each policy is held to one of them where a program has to be compiled.
FORMATS_AND_REMATS = [("int8", "none"), ("nf4", "dots"), ("nf4", "full")]
DIM, SEED = 256, jnp.uint32(5)
BOUND = 1e-5


def kernel(d_in: int = 192, d_out: int = 40) -> jax.Array:
    """Columns of very different sizes, one of them zero."""
    sizes = jnp.geomspace(1e-3, 10.0, d_out).at[3].set(0.0)
    return sizes * jax.random.normal(jax.random.key(0), (d_in, d_out))


def dequantised(quantised: Any) -> np.ndarray:
    """By qwix alone, as [..., in, out] float32."""
    wide = np.asarray(qwix.dequantize(quantised.astype(jnp.float32)))
    return wide.reshape(*wide.shape[:-3], -1, wide.shape[-1])


def quantised_model(form: str, **changes: Any) -> tuple[Decoder, Params, Params, Lora]:
    """A tiny decoder with quantised kernels, and with plain ones of the same values."""
    decoder, params, lora = tiny.model(**changes)
    quantised = jax.jit(quantise.quantise_params, static_argnums=1)(params, form)
    plain = jax.tree.map(
        lambda x: dequantised(x) if quantise.is_quantised(x) else x, quantised, is_leaf=quantise.is_quantised
    )
    return decoder, quantised, plain, lora


def test_int8_is_within_half_a_step() -> None:
    weights = kernel()
    quantised = quantise.quantise_kernel(weights, "int8")
    assert quantised.qvalue.shape == (1, 192, 40) and quantised.qvalue.dtype == jnp.int8
    assert quantised.scale.shape == (1, 1, 40) and quantised.scale.dtype == jnp.float32
    step = np.abs(np.asarray(weights, np.float64)).max(axis=0) / 127.5
    assert np.all(np.abs(dequantised(quantised) - weights) <= 0.5 * step + 1e-6 * 127 * step)


def test_nf4_takes_the_nearest_value_of_its_codebook() -> None:
    # The values are normal quantiles with a zero, scaled to ±1 (section 3 of the paper, and its code).
    positive = scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    book = np.sort(np.concatenate([positive, [0], negative])) / positive.max()
    np.testing.assert_allclose(quantise.NF4, book, atol=1e-6)

    weights = np.asarray(kernel(), np.float64).reshape(3, 64, 40)
    quantised = quantise.quantise_kernel(kernel(), "nf4")
    assert quantised.qvalue.shape == (3, 64, 40) and quantised.qvalue.dtype == jnp.uint4
    assert quantised.scale.shape == (3, 1, 40) and quantised.scale.dtype == jnp.bfloat16
    largest = np.abs(weights).max(axis=1, keepdims=True)
    errors = np.abs(weights[..., None] - largest[..., None] * book)
    chosen = np.take_along_axis(errors, np.asarray(quantised.qvalue, int)[..., None], axis=-1)[..., 0]
    assert np.all(chosen <= errors.min(axis=-1) + 1e-6 * largest)
    # Rounding to bfloat16 changes a scale by at most 2⁻⁸ of it.
    difference = np.abs(dequantised(quantised).reshape(weights.shape) - weights)
    assert np.all(difference <= errors.min(axis=-1) + (2.0**-8 + 1e-5) * largest)


@pytest.mark.parametrize("form", FORMATS)
def test_qwix_dequantises_to_the_same(form: str) -> None:
    quantised = quantise.quantise_kernel(kernel(), form)
    np.testing.assert_array_equal(quantise.dequantise(quantised, jnp.float32).reshape(192, 40), dequantised(quantised))
    x = jax.random.normal(jax.random.key(1), (2, 5, 192))
    y = jax.random.normal(jax.random.key(2), (2, 5, 40))
    wide = dequantised(quantised).astype(np.float64)
    assert tiny.relative_error(quantise.matmul(x, quantised), np.asarray(x, np.float64) @ wide) < 1e-6
    assert tiny.relative_error(quantise.matmul_transposed(y, quantised), np.asarray(y, np.float64) @ wide.T) < 1e-6


@pytest.mark.parametrize(("d_in", "tile"), [(640, 64), (48, 48), (130, 26), (97, 1)])
def test_tiles_of_nf4_divide_the_inputs(d_in: int, tile: int) -> None:
    assert quantise.quantise_kernel(jnp.ones((d_in, 3)), "nf4").qvalue.shape == (d_in // tile, tile, 3)


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("nf4", 4)])
def test_bits_of_a_weight_on_the_device(form: str, bits: int) -> None:
    quantised = quantise.quantise_kernel(kernel(), form)
    memory = jax.jit(lambda codes: codes.astype(jnp.float32)).lower(quantised.qvalue).compile().memory_analysis()
    assert memory is not None and memory.argument_size_in_bytes * 8 == 192 * 40 * bits


@functools.cache
def programs(remat: str) -> tuple[Any, Any]:
    """Log-probs of a batch, and its DPO gradient, from any parameters."""
    decoder, _, lora = tiny.model(remat=remat)
    batch = tiny.groups(0, 4, 2)
    pairs = losses.Preferences(jnp.array([0, 1, 1, 0]), jnp.zeros((4, 2)), jnp.full(4, 0.25))
    spec = optimiser.DpoSpec(losses.LossSpec("sigmoid", 0.1, 0.0), optimiser.OptimiserSpec(1e-4))
    return (
        jax.jit(lambda params: decoder.apply({"params": params, "lora": lora}, batch)),
        jax.jit(lambda params: optimiser.dpo_gradient(decoder, spec, params, lora, batch, pairs)[0]),
    )


@pytest.mark.parametrize(("form", "remat"), FORMATS_AND_REMATS)
def test_log_probs_and_gradients_are_of_the_dequantised_weights(form: str, remat: str) -> None:
    _, quantised, plain, _ = quantised_model(form)
    log_probs, gradient = programs(remat)
    expected_log_probs, expected_gradient = programs("none")
    assert tiny.relative_error(log_probs(quantised), expected_log_probs(plain)) < 1e-6
    errors = jax.tree.map(tiny.relative_error, gradient(quantised), expected_gradient(plain))
    assert max(jax.tree.leaves(errors)) < BOUND


def test_the_base_model_alone() -> None:
    decoder, quantised, plain, _ = quantised_model("nf4")
    log_probs = jax.jit(lambda params: decoder.apply({"params": params}, tiny.groups(0, 4, 2)))
    assert tiny.relative_error(log_probs(quantised), log_probs(plain)) < 1e-6


def test_sampling_sees_the_same_model() -> None:
    decoder, quantised, plain, lora = quantised_model("nf4")
    prompt = tiny.groups(0, 4, 2)
    unrolled = decoder.clone(unrolled=True)

    @jax.jit
    def prefill(params: Params) -> jax.Array:
        variables = {"params": unstack(params), "lora": unstack(lora)}
        return unrolled.apply(variables, prompt.prompt_ids, prompt.prompt_len, method="prefill")[0]

    assert tiny.relative_error(prefill(quantised), prefill(plain)) < 1e-6


@functools.cache
def expected_features(form: str) -> np.ndarray:
    decoder, params, _, lora = quantised_model(form)
    batch = tiny.groups(0, 4, 2)
    compute = jax.jit(lambda params: sketch_gradients(reference_gradients(decoder, params, lora, batch), DIM, SEED))
    return np.asarray(compute(params))


@pytest.mark.parametrize(("form", "remat"), FORMATS_AND_REMATS)
def test_features_are_per_example_gradients(form: str, remat: str) -> None:
    decoder, params, _, lora = quantised_model(form, remat=remat)
    batch = tiny.groups(0, 4, 2)
    got = jax.jit(lambda params: response_features(decoder, params, lora, batch, DIM, SEED))(params)
    assert tiny.relative_error(got, expected_features(form)) < BOUND


def test_a_subset_of_target_modules() -> None:
    decoder, params, plain, lora = quantised_model("nf4")
    lora = {"layers": {name: lora["layers"][name] for name in ("v_proj", "down_proj")}}
    batch = tiny.groups(0, 4, 2)
    features = jax.jit(lambda params: response_features(decoder, params, lora, batch, DIM, SEED))
    assert tiny.relative_error(features(params), features(plain)) < BOUND


def scans(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from scans(inner)
            elif hasattr(inner, "jaxpr"):
                yield from scans(inner.jaxpr)


@pytest.mark.parametrize("use", ["features", "training"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("form", FORMATS)
def test_no_layer_keeps_its_weights_for_the_backward_pass(form: str, remat: str, use: str) -> None:
    decoder, params, _, lora = quantised_model(form, remat=remat)
    batch = tiny.groups(0, 5, 2)

    def features(params: Params, lora: Lora) -> jax.Array:
        return response_features(decoder, params, lora, batch, DIM, SEED)

    def training(params: Params, lora: Lora) -> Any:
        return jax.grad(lambda w: jnp.sum(response_logps(decoder, params, w, batch)))(lora)

    program: Any = {"features": features, "training": training}[use]
    found = list(scans(jax.make_jaxpr(program)(params, lora).jaxpr))
    layers = decoder.config.num_layers
    over_layers = [eqn for eqn in found if eqn.params["length"] == layers]
    assert len(over_layers) >= 2  # forwards and backwards
    kernels = {x.size for x in jax.tree.leaves(params["layers"]) if x.dtype in (jnp.int8, jnp.uint4)}
    kept = [v.aval for eqn in over_layers for v in eqn.outvars if v.aval.shape[:1] == (layers,)]
    assert kept and not [x for x in kept if x.size in kernels]


@pytest.mark.parametrize("form", FORMATS)
def test_a_mesh_equals_one_device(form: str) -> None:
    decoder, params, _, lora = quantised_model(form)
    batch, spec = tiny.groups(0, 8, 2), FeatureSpec(DIM, "none")
    features = jax.jit(lambda params, lora, batch: pair_features(decoder, params, lora, batch, spec, SEED))
    expected = features(params, lora, batch)

    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    cut = jax.device_put(params, layout.weight_shardings(mesh, params))
    cut_lora = jax.device_put(lora, layout.weight_shardings(mesh, lora))
    got = features(cut, cut_lora, jax.device_put(batch, layout.batch(mesh)))
    assert tiny.relative_error(got, expected) < BOUND
    # A quarter of the codes on every device.
    codes = cut["layers"]["q_proj"]["kernel"].qvalue
    assert codes.addressable_shards[0].data.size * 4 == codes.size


@pytest.mark.parametrize(("form", "shape"), [("int8", (1, 128)), ("nf4", (2, 64))])
def test_codes_and_scales_are_cut_as_their_kernel(form: str, shape: tuple[int, int]) -> None:
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    layers = {name: {"kernel": jnp.ones((3, 128, 6)), "bias": jnp.ones((3, 6))} for name in ("q_proj", "down_proj")}
    params = quantise.quantise_params({"layers": layers}, form)
    specs = jax.tree.map(lambda s: tuple(s.spec), layout.weight_shardings(mesh, params))["layers"]
    inputs = (None, "fsdp") if form == "int8" else ("fsdp", None)
    assert params["layers"]["q_proj"]["kernel"].qvalue.shape == (3, *shape, 6)
    assert specs["q_proj"]["kernel"].qvalue == (None, *inputs, "tensor")
    scale_inputs = (None, None) if form == "int8" else ("fsdp", None)
    assert specs["q_proj"]["kernel"].scale == (None, *scale_inputs, "tensor")
    row = tuple({"fsdp": "tensor", None: None}[x] for x in inputs)
    assert specs["down_proj"]["kernel"].qvalue == (None, *row, "fsdp")


@pytest.mark.parametrize("form", FORMATS)
def test_loading_quantises_each_tensor_as_the_whole_tree(form: str, tmp_path: pathlib.Path) -> None:
    tiny_llama(tmp_path, hidden_size=128)
    _, params = loading.load_model(str(tmp_path))
    expected = jax.jit(quantise.quantise_params, static_argnums=1)(params, form)
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    shardings = functools.partial(layout.weight_shardings, mesh)
    for place in (None, shardings):
        _, got = loading.load_model(str(tmp_path), shardings=place, quantisation=form)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), got, shardings(expected))
    assert jax.tree.all(same)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.slow
def test_a_whole_round(form: str, tmp_path: pathlib.Path) -> None:
    config = test_round.options()
    config.model.quantisation = form
    config.rounds, config.scratch.steps, config.scratch.examples = 1, 2, 64
    mesh = layout.make_mesh(config.mesh, jax.devices()[:1])
    task = tasks.load(config, 0, mesh, tmp_path)
    params = task.load_params()
    same = jax.tree.map(lambda x, y: x.shape == y.shape and x.dtype == y.dtype, params, task.params_shape)
    assert jax.tree.all(same)
    jax.tree.map(np.testing.assert_array_equal, task.load_params(), params)  # kept as trained, quantised anew
    lora = start.initial_lora(config, task.decoder, mesh, 0)
    policy = Policy(task.decoder, params, lora)
    setting = runs.Setting(config, mesh, 0, task, policy, runs.evaluator(config, task, policy, 0, tmp_path))
    summary = runs.run(setting, "activedpo", tmp_path)
    assert not isinstance(summary, Pending)
    assert [r["labels"] for r in summary["rounds"]] == [0, 6]
    score, loss = summary["rounds"][1]["score_min"], summary["rounds"][1]["loss"]
    assert score is not None and score > 0
    assert loss is not None and loss < np.log(2)


def test_training_all_weights_is_refused() -> None:
    decoder, params, _, _ = quantised_model("int8")
    with pytest.raises(ValueError, match="config.model.quantisation=none"):
        optimiser.completion_gradient(decoder, params, None, tiny.groups(0, 2, 1), jnp.float32(1))


def test_sft_of_all_weights_is_refused_before_anything_is_loaded() -> None:
    config = default()
    config.data.train, config.model.path = "pairs.jsonl", "model"
    config.sft.data, config.sft.weights, config.model.quantisation = "sft.jsonl", "full", "nf4"
    with pytest.raises(flags.UsageError, match="config.model.quantisation: got 'nf4' with sft.weights='full'"):
        flags.validate(config, {"activedpo"})
    config.sft.weights = "lora"
    flags.validate(config, {"activedpo"})


def test_without_qwix_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"pip install 'activedpo_jax\[quant\]'"):
        quantise.quantise_kernel(kernel(), "int8")


def test_unknown_format_names_the_choices() -> None:
    with pytest.raises(ValueError, match="'int4'.*int8, nf4"):
        quantise.quantise_kernel(kernel(), "int4")
