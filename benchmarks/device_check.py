"""Whether this machine's accelerator computes what a CPU computes: to be run once on a new kind of device.

    python -m benchmarks.device_check

A small random Llama with texts of many lengths, on the device and on this machine's CPU.  An error is that of the whole
result relative to the CPU's in float32, ‖x − ref‖/‖ref‖.  In bfloat16 the bound is twice what the CPU's own bfloat16 is
off by; in float32, where accelerators multiply in fewer bits unless told otherwise, a hundredth.  Selection computes in
whole float32 everywhere, and has to pick the same rows.
"""

import argparse
import concurrent.futures
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from activedpo_jax import layout, programs
from activedpo_jax.data.groups import Bucket, Groups, pad_pairs
from activedpo_jax.evidence.gradients import FeatureSpec, pair_features
from activedpo_jax.models.config import LoraConfig, ModelConfig, Rope
from activedpo_jax.models.decoder import Decoder
from activedpo_jax.models.policy import response_logps
from activedpo_jax.models.sketch import sketch_on_mesh
from activedpo_jax.selection.greedy import greedy
from benchmarks import measure, shapes

MODEL = ModelConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    rope=Rope(theta=10_000.0),
)


def model_programs(groups: Groups) -> dict[str, Callable[..., Any]]:
    """Each of a decoder, its weights and an adapter."""
    signs, seed = jnp.array([1.0, -1.0]), jnp.uint32(0)

    def gradient(decoder: Decoder, params: Any, lora: Any) -> Any:
        return jax.grad(lambda w: jnp.sum(response_logps(decoder, params, w, groups) * signs))(lora)

    def features(decoder: Decoder, params: Any, lora: Any) -> Any:
        return pair_features(decoder, params, lora, groups, FeatureSpec(1024, "response"), seed)

    return {"gradient": gradient, "features": features}


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    return error if np.isfinite(error) else float("inf")


def computed(device: jax.Device, dtype: str, attention: str, program: Callable[..., Any], shards: Any) -> np.ndarray:
    mesh = layout.make_mesh(shards, [device])
    decoder = Decoder(MODEL, LoraConfig(rank=16, alpha=32.0), jnp.dtype(dtype), attention=attention, mesh=mesh)
    with jax.default_device(jax.devices("cpu")[0]):
        params, lora = shapes.weights(decoder.clone(mesh=None, attention="xla"))
    placed = jax.device_put((params, lora), device)
    return flat(jax.jit(functools.partial(program, decoder))(*placed))


def check_model(device: jax.Device, shards: Any) -> dict[str, tuple[float, float]]:
    """Errors and their bounds."""
    cpu = jax.devices("cpu")[0]
    pool = shapes.mixed_pairs(MODEL.vocab_size, 8, 0.3)
    groups = pad_pairs(pool, np.arange(8), Bucket(128, 128))
    wanted = {
        (name, where.platform, dtype, attention): (where, dtype, attention, program, shards)
        for name, program in model_programs(groups).items()
        for where, dtype, attention in (
            (cpu, "float32", "xla"),
            (cpu, "bfloat16", "xla"),
            (device, "bfloat16", "auto"),
            (device, "bfloat16", "xla"),
            (device, "float32", "auto"),
        )
    }
    with concurrent.futures.ThreadPoolExecutor() as threads:  # most of the time is that of the compilers
        results = {key: threads.submit(computed, *arguments) for key, arguments in wanted.items()}
    found = {}
    for name in model_programs(groups):
        exact = results[name, "cpu", "float32", "xla"].result()
        rounded = relative_error(results[name, "cpu", "bfloat16", "xla"].result(), exact)
        for attention in ("auto", "xla"):
            error = relative_error(results[name, device.platform, "bfloat16", attention].result(), exact)
            found[f"{name}, bfloat16, attention {attention}"] = (error, 2 * rounded)
        error = relative_error(results[name, device.platform, "float32", "auto"].result(), exact)
        found[f"{name}, float32"] = (error, 0.01)
    return found


def check_sketch(device: jax.Device, shards: Any) -> tuple[float, float]:
    gradients = np.random.default_rng(0).standard_normal((4, 37, 4096), np.float32)
    found = []
    for where in (device, jax.devices("cpu")[0]):
        mesh = layout.make_mesh(shards, [where])
        sketch = jax.jit(lambda g, mesh=mesh: sketch_on_mesh(mesh, g, 8192, jnp.uint32(1), jnp.int32(2), "q_proj/a"))
        found.append(np.asarray(sketch(jax.device_put(gradients, where))))
    return relative_error(*found), 1e-6


def check_selection(device: jax.Device, shards: Any) -> tuple[float, float]:
    """The share of picks that differ."""
    features = np.random.default_rng(0).standard_normal((20_000, 512), np.float32) / np.float32(512**0.5)
    picks = []
    for where in (device, jax.devices("cpu")[0]):
        placed = jax.device_put((features, np.ones(len(features), bool), np.zeros((0, 512), np.float32)), where)
        mesh = layout.make_mesh(shards, [where])
        with jax.default_device(where):
            picks.append(np.asarray(greedy(*placed, 0.5, num_picks=100, block=1024, mesh=mesh).rows))
    return float(np.mean(picks[0] != picks[1])), 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="write the errors here, as JSON")
    args = parser.parse_args()
    programs.compile_faster()
    device, shards = jax.devices()[0], ml_collections.ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    errors = {"sketch": check_sketch(device, shards), "picks that differ": check_selection(device, shards)}
    errors |= check_model(device, shards)
    for name, (error, bound) in errors.items():
        print(f"{name:<52}{error:>10.1e}   bound {bound:.1e}   {'' if error <= bound else 'TOO LARGE'}", flush=True)
    measure.save(args.out, "device check", args, {"errors and bounds": errors})
    if any(error > bound for error, bound in errors.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
