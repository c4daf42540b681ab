"""What int8 and nf4 base weights save, cost and change: bytes, the time of a feature step, features and picks.

    python -m benchmarks.quantised --model models/smollm2-135m --pairs data/alpaca_eval_pairs/train.jsonl
    python -m benchmarks.quantised --compile_only v5e:2x2 --devices 1 --remat full

The first command loads the model in each format and computes the features of the same pairs, chunk by chunk with the
formats in turn, after a warm-up; times are medians over chunks of the program that only computes features.  All else is
compared with the unquantised weights: log π(y|x) of the base model, the pair features, their score in the first round
(‖φ‖², which the score of a pick equals unless a similar φ was picked before), and greedy picks, with the number that
two random sets would share.

The second compiles the feature step of the paper's model and adapter (rank 128, D = 8,192) for TPUs, without any, and
prints what a device must hold.  Both need the extra `quant`, the second `tpu`, too.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import scipy.stats

from activedpo_jax import layout
from activedpo_jax.compile_only import tpu_devices
from activedpo_jax.data.draws import limit
from activedpo_jax.data.encoding import make_encoding
from activedpo_jax.data.groups import Bucket, Groups, pad_groups
from activedpo_jax.data.records import read_records
from activedpo_jax.data.tokenize import encoded_pool
from activedpo_jax.evidence.gradients import FeatureSpec, pair_features
from activedpo_jax.huggingface import loading
from activedpo_jax.models.config import LoraConfig
from activedpo_jax.models.decoder import Decoder, init_params
from activedpo_jax.models.lora import init_lora
from activedpo_jax.models.policy import response_logps
from activedpo_jax.models.quantise import FORMATS, quantise_params
from activedpo_jax.selection.greedy import greedy

_COMPILE_ARGUMENTS = ("groups", "prompt", "response", "remat", "compile_only", "devices", "fsdp")


def device_bytes(tree: Any) -> int:
    """Bytes of arrays on a device, where two codes of 4 bits share a byte."""
    bits = lambda x: 4 if x.dtype == jnp.uint4 else 8 * x.dtype.itemsize  # noqa: E731
    return sum(x.size * bits(x) // 8 for x in jax.tree.leaves(tree))


def kernels(params: Any) -> list[Any]:
    return [module["kernel"] for module in params["layers"].values() if "kernel" in module]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The three formats side by side."""
    bucket = Bucket(args.prompt, args.response)
    records = limit(read_records(str(args.pairs)), args.pool, 0)
    pool = encoded_pool(records, make_encoding(loading.load_tokenizer(args.model), "auto", *bucket), 0)
    count = pool.num_groups // args.groups * args.groups
    chunks = [layout.put(pad_groups(pool, np.arange(i, i + args.groups), bucket)) for i in range(0, count, args.groups)]
    config, lora_config, seed = loading.load_config(args.model), LoraConfig(args.rank, 2.0 * args.rank), jnp.uint32(0)
    decoder = Decoder(config, lora_config, jnp.dtype(args.dtype), args.remat)
    lora, spec = init_lora(config, lora_config, jax.random.key(0)), FeatureSpec(args.dim)
    features_of = jax.jit(lambda params, groups: pair_features(decoder, params, lora, groups, spec, seed))
    log_probs_of = jax.jit(lambda params, groups: response_logps(decoder, params, None, groups))

    loaded = {f: loading.load_model(args.model, dtype=jnp.dtype(args.dtype), quantisation=f)[1] for f in FORMATS}
    programs: dict[str, Callable[[Groups], Any]] = {}
    for name, params in loaded.items():
        programs[name] = functools.partial(features_of, params)
        start = time.perf_counter()
        jax.block_until_ready(programs[name](chunks[0]))
        print(f"compiled and ran {name} in {time.perf_counter() - start:.1f} s", flush=True)
    features: dict[str, list[np.ndarray]] = {name: [] for name in FORMATS}
    log_probs: dict[str, list[np.ndarray]] = {name: [] for name in FORMATS}
    seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
    for i, groups in enumerate(chunks):
        for name, program in programs.items():
            start = time.perf_counter()
            made = jax.block_until_ready(program(groups))
            seconds[name].append(time.perf_counter() - start)
            features[name].append(np.asarray(made).reshape(-1, args.dim))
            log_probs[name].append(np.asarray(log_probs_of(loaded[name], groups)))
        print(f"chunk {i + 1} of {len(chunks)}", flush=True)

    tokens = np.concatenate([np.asarray(c.response_len) for c in chunks]).ravel()
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
    results: dict[str, Any] = {}
    reference: dict[str, Any] = {}
    for name in FORMATS:
        phi = np.concatenate(features[name])
        score = np.sum(phi * phi, axis=-1)
        picks = greedy(
            jnp.asarray(phi),
            jnp.ones(len(phi), bool),
            jnp.zeros((0, args.dim), jnp.float32),
            args.lam,
            num_picks=args.picks,
            block=1024,
            mesh=mesh,
        )
        logps = np.concatenate(log_probs[name]).ravel()
        result = {"phi": phi, "score": score, "logps": logps, "picks": set(np.asarray(picks.rows).tolist())}
        reference = reference or result
        cosine = np.sum(phi * reference["phi"], -1) / np.sqrt(score * reference["score"])
        results[name] = {
            "bytes of kernels": device_bytes(kernels(loaded[name])),
            "bytes of all weights": device_bytes(loaded[name]),
            "seconds a chunk": statistics.median(seconds[name]),
            "change of log-prob, nats a token": float(np.mean(np.abs(logps - reference["logps"]) / tokens)),
            "mean cosine of features": float(np.mean(cosine)),
            "lowest cosine of features": float(np.min(cosine)),
            "rank correlation of scores": float(scipy.stats.spearmanr(score, reference["score"]).statistic),
            "shared picks": len(result["picks"] & reference["picks"]),
        }
    shared_by_chance = args.picks**2 / count
    print(
        f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}, remat {args.remat}; {count} pairs of"
    )
    print(
        f"{args.prompt} + 2 × {args.response} tokens at most, {args.groups} a chunk, rank {args.rank}, D = {args.dim}"
    )
    print(f"{'':<36}" + "".join(f"{name:>14}" for name in FORMATS))
    for row in results["none"]:
        print(f"{row:<36}" + "".join(f"{results[name][row]:>14.6g}" for name in FORMATS))
    print(f"picks: {args.picks} of {count}; two random sets would share {shared_by_chance:.1f}")
    return {"results": results, "seconds": seconds, "shared by chance": shared_by_chance}


def compile_only(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes a device needs for the feature step of Llama-2-7B's shape."""
    devices = tpu_devices(args.compile_only)
    devices = devices[: args.devices or len(devices)]
    axes = ml_collections.ConfigDict({"data": -1, "fsdp": args.fsdp, "tensor": 1})
    mesh = layout.make_mesh(axes, devices)
    config = loading.load_config("configs/shapes/llama2_7b")
    decoder = Decoder(config, LoraConfig(128, 512.0), jnp.bfloat16, args.remat)

    def initial(quantisation: str) -> Any:
        params = init_params(decoder, jax.random.key(0))
        return quantise_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), quantisation)

    def abstract(function: Callable[[], Any]) -> Any:
        shapes = jax.eval_shape(function)
        shardings = layout.weight_shardings(mesh, shapes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def integers(*dimensions: int) -> Any:
        return jax.ShapeDtypeStruct(dimensions, jnp.int32, sharding=layout.batch(mesh))

    lora = abstract(lambda: init_lora(config, decoder.lora, jax.random.key(0)))
    count = layout.round_up(args.groups, mesh)
    groups = Groups(
        integers(count, args.prompt), integers(count), integers(count, 2, args.response), integers(count, 2)
    )
    spec = FeatureSpec(8192)
    features = jax.jit(lambda params, lora, groups: pair_features(decoder, params, lora, groups, spec, jnp.uint32(0)))
    print(f"{mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}, Llama-2-7B, bfloat16, remat {args.remat}")
    print(f"{count} pairs of {args.prompt} + 2 × {args.response} tokens\n{'':<8}{'arguments':>16}{'temporary':>16}")
    results = {}
    for name in FORMATS:
        params = abstract(functools.partial(initial, name))
        memory = features.lower(params, lora, groups).compile().memory_analysis()
        assert memory is not None
        sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
        results[name] = dict(zip(("arguments", "temporary"), sizes, strict=True))
        print(f"{name:<8}" + "".join(f"{size / 2**30:>12.2f} GiB" for size in sizes), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="a Hugging Face directory or Hub name")
    parser.add_argument("--pairs", type=pathlib.Path, help="a pool in JSONL or Parquet")
    parser.add_argument("--pool", type=int, default=128, help="pairs of it")
    parser.add_argument("--picks", type=int, default=50)
    parser.add_argument("--lam", type=float, default=1.0)
    parser.add_argument("--groups", type=int, default=4, help="pairs a chunk")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", default="dots", choices=["none", "dots", "full"])
    parser.add_argument("--compile_only", default="", help="platform:topology, such as v5e:4x4")
    parser.add_argument("--devices", type=int, default=0, help="the first so many of the topology; 0: all")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    if not args.compile_only and args.pairs is None:
        parser.error("--pairs: expected a pool of preferences, or --compile_only")
    record = compile_only(args) if args.compile_only else measure(args)
    arguments = {
        name: value for name, value in vars(args).items() if not args.compile_only or name in _COMPILE_ARGUMENTS
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"arguments": arguments, **record}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
