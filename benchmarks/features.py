"""Speed of feature extraction, side by side on the same pairs in one process.

    python -m benchmarks.features                                  # SmolLM2-135M's shape, random weights
    python -m benchmarks.features --dtype bfloat16 --groups 32     # on a GPU
    python -m benchmarks.features --no-torch                       # without PEFT and traker (the extra `bench`)
    python -m benchmarks.features --no-project                     # without traker, which takes ten minutes on CPU

Measured, each on the same groups of one prompt and two responses:

    summed gradient   one gradient of Σ log π(y1|x) − log π(y2|x) over the batch: what any training step pays
    none              features without normalisation, one probe backward pass
    response          features normalised per response
    vmap(grad)        the readable reference: a gradient tree per response, then the same sketch
    rows              either of them with every response on a row of its own, its prompt repeated
    peft + traker     what a PyTorch user has: one response at a time, flattened, BasicProjector; run once

Runs are interleaved after a warm-up; the table gives medians and ratios of medians.  Compile time is reported apart.
"""

import argparse
import functools
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax import layout
from activedpo_jax.data.groups import Groups
from activedpo_jax.evidence.gradients import (
    FeatureSpec,
    normalise,
    pair_features,
    reference_gradients,
    response_features,
    sketch_gradients,
)
from activedpo_jax.models.config import LoraConfig, ModelConfig, Rope
from activedpo_jax.models.decoder import Decoder, init_params
from activedpo_jax.models.lora import init_lora
from activedpo_jax.models.policy import response_logps

SMOLLM2_135M = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope=Rope(theta=100_000.0),
)


def random_groups(seed: int, count: int, prompt: int, response: int) -> Groups:
    """Full groups: no padding, so that every token is useful."""
    rng = np.random.default_rng(seed)
    return Groups(
        rng.integers(0, SMOLLM2_135M.vocab_size, (count, prompt), np.int32),
        np.full(count, prompt, np.int32),
        rng.integers(0, SMOLLM2_135M.vocab_size, (count, 2, response), np.int32),
        np.full((count, 2), response, np.int32),
    )


def as_rows(groups: Groups) -> Groups:
    """Every response with a prompt of its own, as is usual."""
    count, m, length = groups.response_ids.shape
    return Groups(
        np.repeat(groups.prompt_ids, m, axis=0),
        np.repeat(groups.prompt_len, m),
        np.asarray(groups.response_ids).reshape(count * m, 1, length),
        np.asarray(groups.response_len).reshape(count * m, 1),
    )


def _wait(function: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(function(*args))


def jax_contenders(args: argparse.Namespace, groups: Groups) -> dict[str, Callable[[], Any]]:
    lora_config = LoraConfig(rank=args.rank, alpha=2.0 * args.rank)
    decoder = Decoder(SMOLLM2_135M, lora_config, jnp.dtype(args.dtype))
    params = jax.tree.map(lambda x: x.astype(args.dtype), init_params(decoder, jax.random.key(0)))
    lora = init_lora(SMOLLM2_135M, lora_config, jax.random.key(1))
    lora = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(2), x.shape), lora)
    seed = jnp.uint32(0)
    groups, rows = layout.put((groups, as_rows(groups)))
    signs = jnp.array([1.0, -1.0])

    def summed(params: Any, lora: Any, groups: Groups) -> Any:
        return jax.grad(lambda w: jnp.sum(response_logps(decoder, params, w, groups) * signs))(lora)

    def features(normalisation: str) -> Callable[..., Any]:
        spec = FeatureSpec(args.dim, normalisation)
        return lambda params, lora, groups: pair_features(decoder, params, lora, groups, spec, seed)

    def from_rows(params: Any, lora: Any, rows: Groups) -> Any:
        out = normalise(response_features(decoder, params, lora, rows, args.dim, seed).reshape(-1, 2, args.dim))
        return out[:, 0] - out[:, 1]

    def reference(params: Any, lora: Any, groups: Groups) -> Any:
        out = sketch_gradients(reference_gradients(decoder, params, lora, groups), args.dim, seed)
        return out[:, 0] - out[:, 1]

    programs: dict[str, tuple[Callable[..., Any], Groups]] = {
        "summed gradient": (summed, groups),
        "none": (features("none"), groups),
        "response": (features("response"), groups),
        "rows": (from_rows, rows),
        "vmap(grad)": (reference, groups),
    }
    contenders: dict[str, Callable[[], Any]] = {}
    for name, (function, batch) in programs.items():
        start = time.perf_counter()
        compiled = jax.jit(function).lower(params, lora, batch).compile()
        print(f"compiled {name} in {time.perf_counter() - start:.1f} s", flush=True)
        contenders[name] = functools.partial(_wait, compiled, params, lora, batch)
    return contenders


def transformers_config() -> Any:
    """SmolLM2-135M's shape for transformers."""
    import transformers

    c = SMOLLM2_135M
    return transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
        tie_word_embeddings=True,
    )


def torch_contender(args: argparse.Namespace, groups: Groups, project: bool) -> Callable[[], Any]:
    """One response at a time through PEFT, the flattened gradient projected by traker's BasicProjector."""
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers_config()).to(device, getattr(torch, args.dtype))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets))
    weights = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in weights)
    projector = None
    if project:
        from trak.projectors import BasicProjector, ProjectionType

        projector = BasicProjector(size, args.dim, 0, ProjectionType.rademacher, torch.device(device))

    def gradient(prompt: Any, response: Any) -> Any:
        ids = torch.tensor(np.concatenate([prompt, response])[None], device=device, dtype=torch.long)
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        logp = torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None]).sum()
        grads = torch.autograd.grad(logp, weights)
        return torch.cat([g.flatten() for g in grads]).float()

    def run() -> None:
        flat = [
            gradient(prompt, response)
            for prompt, responses in zip(groups.prompt_ids, groups.response_ids, strict=True)
            for response in responses
        ]
        if projector is not None:  # all at once, since it makes its random matrix anew for every call
            projector.project(torch.stack(flat), model_id=0)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--project", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=pathlib.Path, help="write the raw times here, as JSON")
    args = parser.parse_args()

    groups = random_groups(0, args.groups, args.prompt, args.response)
    contenders = jax_contenders(args, groups)
    once: dict[str, Callable[[], Any]] = {}  # too slow to repeat
    if args.torch:
        contenders["peft, no projection"] = torch_contender(args, groups, project=False)
        if args.project:
            once["peft + traker"] = torch_contender(args, groups, project=True)
    times: dict[str, list[float]] = {name: [] for name in (*contenders, *once)}

    def timed(name: str, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        run()
        times[name].append(time.perf_counter() - start)

    for run in contenders.values():
        run()
    for repeat in range(args.repeats):
        for name, run in contenders.items():
            timed(name, run)
        print(f"repeat {repeat + 1} of {args.repeats}", flush=True)
    for name, run in once.items():
        timed(name, run)

    device = jax.devices()[0].device_kind
    tokens = args.groups * (args.prompt + 2 * args.response)
    medians = {name: statistics.median(t) for name, t in times.items()}
    print(f"\n{device}, {platform.processor() or platform.machine()}, jax {jax.__version__}, {args.dtype}")
    print(f"{args.groups} groups of {args.prompt} + 2 × {args.response} tokens, rank {args.rank}, D = {args.dim}\n")
    print(f"{'':<22}{'seconds':>10}{'spread':>16}{'× summed':>10}{'× response':>12}{'tokens/s':>10}")
    for name, median in medians.items():
        low, high = min(times[name]), max(times[name])
        print(
            f"{name:<22}{median:>10.3f}{f'{low:.3f} – {high:.3f}':>16}{median / medians['summed gradient']:>10.2f}"
            f"{median / medians['response']:>12.2f}{tokens / median:>10.0f}"
        )
    if args.out:
        record = {"device": device, "jax": jax.__version__, "arguments": vars(args) | {"out": None}, "seconds": times}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
