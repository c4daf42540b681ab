"""One device and every mesh of eight: the same base model, the same picks and responses, and the same adapter within a
bound that follows from AdamW.

Let d be the difference of a gradient's entry g between two meshes, which is its rounding.  The first step of AdamW is
rate · g/(|g| + ε) (Loshchilov & Hutter 2019, with ε = 1e-8), whose slope is ε/(|g| + ε)²: it passes on at most
rate · min(2, |d|/ε), where g is as small as ε, and a share of ε/|g| of |d|/|g| elsewhere.  Later steps divide by the
root mean square of an entry's history, so that they pass on about rate · |d|/rms.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from activedpo_jax import layout, tasks
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import response_logps
from activedpo_jax.training import losses, optimiser
from tests import tiny
from tests.test_fresh import ON_POLICY
from tests.test_round import assert_same, execute, options

MESHES = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (2, 1, 4), (1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)]
ADAM_EPSILON = 1e-8  # torch's and TRL's default
ULP = 2.0**-23
RATE = 1e-4  # the paper's
SPEC = optimiser.DpoSpec(losses.LossSpec("sigmoid", 0.1, 0.0), optimiser.OptimiserSpec(RATE))

Run = tuple[list[str], dict[str, np.ndarray], dict[str, Any]]


def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), layout.AXES)


def relative(got: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest entry of all."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))
    return max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs)


# --- The base model of the synthetic task


def test_base_model_has_the_same_bits_on_every_mesh() -> None:
    found = []
    for shape in [(1, 1, 1), (8, 1, 1), (2, 2, 2)]:
        config = options()
        config.scratch.steps, config.scratch.batch_size = 3, 9  # which no mesh divides
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
        task = tasks.load(config, 0, mesh_of(shape), None)
        params = task.load_params()
        jax.tree.map(
            lambda x, s: x.sharding == s or pytest.fail(str(s)), params, jax.tree.map(_place, task.params_shape)
        )
        found.append(jax.device_get(params))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])


def _place(x: jax.ShapeDtypeStruct) -> Any:
    return x.sharding


# --- What AdamW makes of a gradient's rounding

# A gradient's entry, from far below ε to clipped, and its rounding.
ENTRIES = st.tuples(
    st.floats(-12, 0).map(lambda e: 10.0**e),
    st.sampled_from([-1.0, 0.0, 1.0]),
    st.floats(-14, -7).map(lambda e: 10.0**e),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(ENTRIES, min_size=1, max_size=20), st.floats(1e-6, 1e-2))
def test_the_first_step_passes_on_no_more_than_the_bound(
    entries: list[tuple[float, float, float]], rate: float
) -> None:
    gradient = np.array([size * sign for size, sign, _ in entries], np.float32)
    other = gradient + np.array([rounding for *_, rounding in entries], np.float32)
    spec = optimiser.OptimiserSpec(rate, max_grad_norm=1e9)
    weights = jnp.zeros(len(entries), jnp.float32)
    state = optimiser.init_optimiser(spec, weights)
    steps = [optimiser.update(spec, weights, state, jnp.asarray(g), jnp.float32(rate))[0] for g in (gradient, other)]
    difference = np.abs(np.asarray(steps[0], np.float64) - np.asarray(steps[1], np.float64))
    assert np.all(difference <= first_step_bound(gradient, other, rate))


def first_step_bound(gradient: np.ndarray, other: np.ndarray, rate: float) -> np.ndarray:
    """What two gradients of one batch make of the first step, at most: [P] float64."""
    g, h = (np.asarray(x, np.float64) for x in (gradient, other))
    nearest = np.where(g * h > 0, np.minimum(np.abs(g), np.abs(h)), 0.0)  # to zero, between the two
    slope = ADAM_EPSILON / (nearest + ADAM_EPSILON) ** 2
    # Four roundings of the step itself; float32's 1 − 0.999 has an error of some ulps, the same in both.
    return rate * (np.minimum(2.0, slope * np.abs(g - h)) + 16 * ULP)


# --- The first steps from B = 0


@functools.cache
def first_steps(shape: tuple[int, int, int], dtype: str = "float32") -> list[tuple[Lora, Lora]]:
    """The gradient and the adapter of each of three steps from B = 0 on eight pairs."""
    mesh = mesh_of(shape)
    decoder, params, lora = tiny.model(dtype=jnp.dtype(dtype))
    decoder = decoder.clone(mesh=mesh)
    lora = {"layers": {name: {"a": m["a"], "b": 0 * m["b"]} for name, m in lora["layers"].items()}}
    groups = tiny.groups(seed=3, count=8, m=2)
    reference = np.asarray(response_logps(decoder.clone(mesh=None), params, None, groups))
    pairs = losses.Preferences(np.arange(8) % 2, reference, np.full(8, 1 / 8, np.float32))
    params, lora = (layout.put(x, layout.weight_shardings(mesh, x)) for x in (params, lora))
    groups, pairs = layout.put((groups, pairs), layout.batch(mesh))
    gradient = jax.jit(lambda lora: optimiser.dpo_gradient(decoder, SPEC, params, lora, groups, pairs)[0])
    update = jax.jit(functools.partial(optimiser.update, SPEC.optimiser))
    state = optimiser.init_optimiser(SPEC.optimiser, lora)
    found = []
    for _ in range(3):
        new = gradient(lora)
        lora, state = update(lora, state, new, jnp.float32(RATE))
        found.append((jax.device_get(new), jax.device_get(lora)))
    return found


@pytest.mark.parametrize(
    "shape", [pytest.param(x, marks=[] if x in ((8, 1, 1), (2, 2, 2)) else pytest.mark.slow) for x in MESHES], ids=str
)
def test_first_steps_from_zero(shape: tuple[int, int, int]) -> None:
    one, many = first_steps((1, 1, 1)), first_steps(shape)
    for matrices in many[0][0]["layers"].values():
        assert not np.any(matrices["a"])  # exactly: Adam would make a step of full size of any rounding
        assert np.any(matrices["b"])
    for (got, got_lora), (expected, expected_lora) in zip(many, one, strict=True):
        assert relative(got, expected) < 1e-5
        assert max(np.abs(a - b).max() for a, b in _leaves(got_lora, expected_lora)) < 1e-6
    for name in one[0][0]["layers"]:
        gradients, adapters = ([steps[0][i]["layers"][name]["b"] for steps in (one, many)] for i in (0, 1))
        difference = np.abs(np.subtract(*adapters, dtype=np.float64))
        assert np.all(difference <= first_step_bound(gradients[0], gradients[1], RATE)), name


def _leaves(a: Any, b: Any) -> Any:
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def test_the_adapters_gradient_is_added_up_in_float32() -> None:
    """Computed in bfloat16, whose rounding is 4e-3: each example's part is the same on every mesh, and the sum is in
    float32."""
    one, many = (first_steps(shape, "bfloat16")[0][0] for shape in [(1, 1, 1), (8, 1, 1)])
    assert relative(one, first_steps((1, 1, 1))[0][0]) > 1e-4  # bfloat16 it is
    assert relative(many, one) < 1e-5


# --- Whole runs of two rounds

MODES: dict[str, dict[str, Any]] = {
    "fused": {"round.mode": "fused"},
    "staged": {"round.mode": "staged"},
    "on-policy": ON_POLICY | {"round.mode": "fused"},
}


@functools.cache
def _on_one_device(mode: str, folder: pathlib.Path) -> Run:
    return execute(folder, MODES[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_whole_runs(
    shape: tuple[int, int, int], mode: str, tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = _on_one_device(mode, tmp_path_factory.getbasetemp() / f"one-{mode}")
    got = execute(tmp_path, MODES[mode], shape)
    assert_same(got, expected)
    if mode == "on-policy":
        for number in (1, 2):
            paths = [
                folder / "rounds" / f"{number:03d}" / "responses.jsonl"
                for folder in (tmp_path, tmp_path_factory.getbasetemp() / f"one-{mode}")
            ]
            assert len({path.read_text() for path in paths}) == 1
