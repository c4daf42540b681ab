"""Where the time of a batch of features goes: the same programs with one part after another left out.

    python -m benchmarks.ablation --repeats 3 --out benchmarks/results/features_cpu.json   # options of `features`

Each program lacks what those above it lack, too, and so computes nothing of use: only the differences in time do.  A
trace slows this down more than it shows, since operations are short and run beside each other.  Beside the times stand
the FLOPs of the matrix products of the linear maps and the logits, and what these would take at the rate of a large
product by itself.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax import layout, programs
from activedpo_jax.data.groups import Groups
from activedpo_jax.models import lora as maps
from activedpo_jax.models.config import ModelConfig
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.packed import Packed
from activedpo_jax.models.policy import response_logps
from benchmarks import features, measure, shapes

KINDS = ("response", "none")


def no_sketch(mesh: Any, gradients: jax.Array, *, dim: int, seed: Any, layer: Any, name: str) -> jax.Array:
    """[B, D], of one number of each gradient, so that these are computed."""
    return jnp.zeros((len(gradients), dim), jnp.float32) + jnp.sum(gradients[:, :1, :1], axis=(1, 2))[:, None]


def no_outer_products(packed: Packed, outer_sum: Any, lefts: Sequence[jax.Array], rights: Sequence[jax.Array]) -> Any:
    """[G, i, j], of one token each, so that both sides are computed."""
    one = 1e-9 * sum(jnp.sum(x[:1]) for x in (*lefts, *rights))
    return jnp.zeros((len(packed.prompts.length), lefts[0].shape[-1], rights[0].shape[-1])) + one


def no_attention(packed: Packed, qkv: Sequence[Sequence[jax.Array]], rule: Any, backend: Any) -> list[jax.Array]:
    return [
        (q + jnp.repeat(k + v, q.shape[1] // k.shape[1], 1)).reshape(len(q), -1) for q, k, v in zip(*qkv, strict=True)
    ]


# Left out one after the other: (of what, its name, what takes its place).
PARTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "sketch": (maps, "sketch_on_mesh", no_sketch),
    "outer products": (Packed, "per_group", no_outer_products),
    "attention": (Packed, "attention", no_attention),
}


def compiled(args: Any, decoder: Decoder, weights: tuple[Params, Lora], groups: Groups) -> dict[str, Any]:
    """By name: programs of the weights and the groups."""

    def forward(params: Params, lora: Lora, groups: Groups) -> jax.Array:
        return response_logps(decoder, params, lora, groups)

    found: dict[str, Any] = {"forward": jax.jit(forward).lower(*weights, groups).compile()}
    with contextlib.ExitStack() as left_out:
        for part, patch in [("", None), *PARTS.items()]:
            if patch is not None:
                left_out.enter_context(mock.patch.object(*patch))
                jax.clear_caches()
            programs_of = features.jax_programs(args, decoder)
            for kind in KINDS:
                name = f"{kind}, less {part}" if part else kind
                found[name] = jax.jit(programs_of[kind]).lower(*weights, groups).compile()
                print(f"compiled {name}", flush=True)
    return found


def products(config: ModelConfig, texts: Sequence[features.Text]) -> dict[str, float]:
    """FLOPs of the matrix products of base weights in a batch, forward and backward to the inputs, by program."""
    prompts = sum(len(prompt) for prompt, _ in texts)
    responses = sum(len(r) for _, several in texts for r in several)
    rows = sum(len(prompt) + len(r) for prompt, several in texts for r in several)
    once = shapes.useful_flops(config, prompts + responses, responses) / 2
    again = shapes.useful_flops(config, rows - prompts - responses, 0) / 2  # prompts, for every response but one
    return {"forward": once, "none": 2 * once, "response": 2 * once + again}


def product_rates(config: ModelConfig) -> dict[str, float]:
    """FLOP/s of one product of 1,024 tokens with a feed-forward map, by itself, in JAX and in PyTorch."""
    import torch  # of the extra `bench`

    rng, tokens = np.random.default_rng(0), 1024
    x, w = (
        rng.standard_normal(shape, np.float32)
        for shape in ((tokens, config.hidden_size), (config.hidden_size, config.intermediate_size))
    )
    program, in_jax, in_torch = jax.jit(jnp.matmul), jax.device_put((x, w)), list(map(torch.from_numpy, (x, w)))
    contenders: dict[str, Callable[[], Any]] = {
        "JAX": lambda: jax.block_until_ready(program(*in_jax)),
        "PyTorch": lambda: torch.matmul(*in_torch),
    }
    for contender in contenders.values():
        contender()
    times = measure.in_turns(contenders, 20)
    return {name: 2 * tokens * w.size / seconds for name, seconds in measure.medians(times).items()}


def main() -> None:
    args = features.parser().parse_args()
    programs.compile_faster()
    decoder = shapes.make_decoder(args)
    weights = jax.block_until_ready(shapes.weights(decoder))
    padded, places, texts, packing = features.batches(args, decoder.config.vocab_size)
    [groups] = layout.put(padded[:1])
    found = compiled(args, decoder.clone(packing=packing), weights, groups)
    contenders = {name: functools.partial(run, program, weights, groups) for name, program in found.items()}
    for contender in contenders.values():
        contender()
    times, rates = measure.in_turns(contenders, args.repeats), product_rates(decoder.config)
    flops = products(decoder.config, [texts[i] for i in places[0]])
    for name, several in times.items():
        bound = f", its products alone {flops[name] / rates['JAX']:.2f}" if name in flops else ""
        print(f"{name:<34}{statistics.median(several['seconds']):>8.2f} s{bound}", flush=True)
    print(", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    measure.save(args.out, "ablation", args, {"results": times, "FLOPs": flops, "FLOP/s of a product": rates})


def run(program: Any, weights: tuple[Params, Lora], groups: Groups) -> None:
    jax.block_until_ready(program(*weights, groups))


if __name__ == "__main__":
    main()
