"""Speed of feature extraction, side by side on the same pairs in one process.

    python -m benchmarks.features                                   # SmolLM2-135M's shape
    python -m benchmarks.features --lengths mixed --groups 16       # lengths of AlpacaEval's texts
    python -m benchmarks.features --model llama2_7b --dtype bfloat16 --rank 128 --remat dots   # on a GPU
    python -m benchmarks.features --only summed response            # without PyTorch (the extra `bench`)

Measured, each on the same groups of a prompt and two responses:

    summed        one gradient of Σ log π(y1|x) − log π(y2|x): what any training step pays, and the floor
    none          features without normalisation: one probe backward pass
    response      features normalised per response
    rows          the same with every response on a row of its own, its prompt repeated
    vmap          the readable reference in JAX: a gradient tree per response, then the same sketch
    hooks         the strongest that a PyTorch user could write: every response on a row of a batch, per-example
                  gradients by einsum from hooks on PEFT's layers, no gradient of any weight, our sketch
    torch_vmap    `torch.func.vmap(grad)` on the same rows (eager attention), then our sketch
    peft          one response at a time, gradients flattened
    traker        the same, and traker's BasicProjector

The features of `hooks` and `torch_vmap` are compared with those of `response` first.  Runs are interleaved after a
warm-up; the table gives medians.  Compile time is reported apart.  With mixed lengths, ours takes packed
batches as a run does, and the rows of `hooks` are sorted by length before they are cut into batches.
"""

import argparse
import concurrent.futures
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax import layout, programs
from activedpo_jax.data.groups import Groups, pad_pairs
from activedpo_jax.data.packing import Packing, lengths_in, multiple_on, plan, useful_share
from activedpo_jax.evidence.gradients import (
    FeatureSpec,
    normalise,
    pair_features,
    reference_gradients,
    response_features,
    sketch_gradients,
)
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import response_logps
from benchmarks import measure, shapes
from benchmarks.measure import Contender

JAX_SIDE = ("summed", "none", "response", "rows", "vmap")
TORCH_SIDE = ("hooks", "torch_vmap", "peft", "traker")

Text = tuple[np.ndarray, list[np.ndarray]]  # a prompt and its responses


def as_rows(groups: Groups) -> Groups:
    """Every response with a prompt of its own, as is usual."""
    count, m, length = groups.response_ids.shape
    return Groups(
        np.repeat(groups.prompt_ids, m, axis=0),
        np.repeat(groups.prompt_len, m),
        np.asarray(groups.response_ids).reshape(count * m, 1, length),
        np.asarray(groups.response_len).reshape(count * m, 1),
    )


class Batches(NamedTuple):
    """A pool as a pass over it takes it."""

    groups: list[Groups]
    places: list[list[int]]  # which texts each batch holds
    texts: list[Text]
    packing: Packing


def batches(args: argparse.Namespace, vocabulary: int) -> Batches:
    """Of the pool that the options describe."""
    if args.lengths == "full":
        pool = shapes.full_pairs(vocabulary, args.groups, args.prompt, args.response)
    else:
        pool = shapes.mixed_pairs(vocabulary, args.groups, args.factor)
    lengths = lengths_in(pool)
    found, packing = plan(lengths, args.chunk, multiple_on(jax.default_backend()), together=False)
    groups = [pad_pairs(pool, rows, shapes.longest(pool), packing.groups) for rows in found]
    texts = list(zip(pool.prompt_tokens, map(list, pool.response_tokens), strict=True))
    print(f"{len(found)} batches, {useful_share(lengths, found, packing):.2f} of them text, {packing}")
    return Batches(groups, [rows.tolist() for rows in found], texts, packing)


def jax_programs(args: argparse.Namespace, decoder: Decoder) -> dict[str, Callable[..., Any]]:
    """Each of params, lora and groups."""
    seed, signs, apart = jnp.uint32(0), jnp.array([1.0, -1.0]), decoder.clone(packing=None)

    def summed(params: Params, lora: Lora, groups: Groups) -> Any:
        return jax.grad(lambda w: jnp.sum(response_logps(decoder, params, w, groups) * signs))(lora)

    def features(normalisation: str, params: Params, lora: Lora, groups: Groups) -> Any:
        return pair_features(decoder, params, lora, groups, FeatureSpec(args.dim, normalisation), seed)[:, 0]

    def from_rows(params: Params, lora: Lora, rows: Groups) -> Any:
        out = normalise(response_features(apart, params, lora, rows, args.dim, seed).reshape(-1, 2, args.dim))
        return out[:, 0] - out[:, 1]

    def reference(params: Params, lora: Lora, groups: Groups) -> Any:
        out = normalise(sketch_gradients(reference_gradients(apart, params, lora, groups), args.dim, seed))
        return out[:, 0] - out[:, 1]

    none, response = (functools.partial(features, n) for n in ("none", "response"))
    return {"summed": summed, "none": none, "response": response, "rows": from_rows, "vmap": reference}


def jax_contenders(
    args: argparse.Namespace, decoder: Decoder, weights: tuple[Params, Lora], padded: Sequence[Groups]
) -> dict[str, Contender]:
    found = {name: program for name, program in jax_programs(args, decoder).items() if name in args.only}
    placed = {name: layout.put([as_rows(g) for g in padded] if name == "rows" else list(padded)) for name in found}

    def compiled(name: str, groups: Groups) -> Callable[..., Any]:
        began = time.perf_counter()
        program = jax.jit(found[name]).lower(*weights, groups).compile()
        print(f"compiled {name} {groups.response_ids.shape} in {time.perf_counter() - began:.1f} s", flush=True)
        return program

    shapes_of = {name: {g.response_ids.shape + g.prompt_ids.shape: g for g in placed[name]} for name in found}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiling = {
            (name, key): pool.submit(compiled, name, groups)
            for name, by_shape in shapes_of.items()
            for key, groups in by_shape.items()
        }
        compiled_of = {key: future.result() for key, future in compiling.items()}

    def run(name: str) -> Any:
        out = [compiled_of[name, g.response_ids.shape + g.prompt_ids.shape](*weights, g) for g in placed[name]]
        return jax.block_until_ready(out)

    return {name: functools.partial(run, name) for name in found}


def torch_contenders(
    args: argparse.Namespace, decoder: Decoder, weights: tuple[Params, Lora], texts: Sequence[Text]
) -> tuple[dict[str, Contender], list[int]]:
    """The contenders, and the order in which they return the texts' features."""
    from benchmarks import torch_side

    order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]) - max(map(len, texts[i][1])))
    cuts = [order[i : i + args.torch_chunk] for i in range(0, len(order), args.torch_chunk)]
    rows = [torch_side.rows([(texts[i][0], r) for i in cut for r in texts[i][1]]) for cut in cuts]
    make = functools.partial(torch_side.peft_model, shapes.hf_config(args), decoder, *weights)
    makers: dict[str, Callable[[], Contender]] = {
        "hooks": lambda: torch_side.hooks(make(False), rows, args.dim),
        "torch_vmap": lambda: torch_side.vmap_of_grad(make(False, "eager"), rows, args.dim),
        "peft": lambda: torch_side.one_at_a_time(make(False), rows, None),
        "traker": lambda: torch_side.one_at_a_time(make(False), rows, args.dim),
    }
    return {name: maker() for name, maker in makers.items() if name in args.only}, order


def in_order(places: Sequence[Sequence[int]], found: Sequence[Any], shape: tuple[int, int]) -> np.ndarray:
    """The features [N, D] of a pool from those of its parts, which hold the texts at `places`."""
    out = np.zeros(shape, np.float32)
    for where, part in zip(places, found, strict=True):
        out[where] = part[: len(where)]
    return out


def useful_tokens(texts: Sequence[Text]) -> tuple[int, int]:
    """All of them, and those of responses."""
    responses = sum(len(r) for _, several in texts for r in several)
    return responses + sum(len(prompt) for prompt, _ in texts), responses


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes.add_options(found, remat="dots", repeats=5)
    found.add_argument("--lengths", default="full", choices=["full", "mixed"])
    found.add_argument("--groups", type=int, default=4)
    found.add_argument("--prompt", type=int, default=128, help="tokens, where lengths are full")
    found.add_argument("--response", type=int, default=64)
    found.add_argument("--chunk", type=int, default=4, help="groups at a time")
    found.add_argument("--torch_chunk", type=int, default=4, help="groups at a time in PyTorch")
    found.add_argument("--attention_only", action="store_true", help="LoRA on the four maps of attention alone")
    found.add_argument("--dim", type=int, default=8192)
    names = (*JAX_SIDE, *TORCH_SIDE)
    found.add_argument("--only", nargs="+", default=[n for n in names if n != "traker"], choices=names)
    found.add_argument("--profile", type=pathlib.Path, help="write a JAX trace of one run of `response` here")
    found.add_argument("--name", default="features", help="under which they stand in the file")
    return found


def main() -> None:
    args = parser().parse_args()
    programs.compile_faster()
    decoder = shapes.make_decoder(args)
    config = decoder.config
    weights = jax.block_until_ready(shapes.weights(decoder))
    padded, places, texts, packing = batches(args, config.vocab_size)
    contenders = jax_contenders(args, decoder.clone(packing=packing), weights, padded)
    theirs: dict[str, Contender] = {}
    if set(args.only) & set(TORCH_SIDE):
        theirs, order = torch_contenders(args, decoder, weights, texts)
    contenders |= theirs

    found = {name: run() for name, run in contenders.items()}
    differences = {}
    if "response" in found:
        ours = in_order(places, found["response"], (len(texts), args.dim))
        for name in {"hooks", "torch_vmap"} & theirs.keys():
            wanted = ours[order]
            differences[name] = float(np.linalg.norm(found[name].cpu().numpy() - wanted) / np.linalg.norm(wanted))
            print(f"{name} and response differ by {differences[name]:.1e}", flush=True)
            assert differences[name] < (1e-4 if args.dtype == "float32" else 0.2)
    if args.profile:
        with jax.profiler.trace(str(args.profile)):
            contenders["response"]()
    times = measure.in_turns(contenders, args.repeats)
    tokens, responses = useful_tokens(texts)
    flops, peak = shapes.useful_flops(config, tokens, responses), measure.peak_flops(args.dtype)
    print(
        f"\n{args.model}, {args.dtype}, {len(texts)} groups, {tokens} useful tokens, rank {args.rank}, D = {args.dim}"
    )
    print(measure.table(times, "response" if "response" in times else next(iter(times)), tokens, flops, peak))
    results = {"results": times, "differences": differences, "useful tokens": tokens, "useful FLOPs": flops}
    measure.save(args.out, args.name, args, results | {"peak FLOP/s": peak})


if __name__ == "__main__":
    main()
