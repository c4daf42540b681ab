"""Speed of generation against `transformers`, side by side in one process, on the same work.

    python -m benchmarks.generation --model models/smollm2-135m     # a Hugging Face directory
    python -m benchmarks.generation --random                        # SmolLM2-135M's shape, random weights
    python -m benchmarks.generation --random --dtype bfloat16 --batch 64   # on a GPU

Both get the same weights and the same prompts, all different, with one response each, and write the same number
of new tokens: greedy, with the end of sequence disabled.  `transformers` runs `generate` with its dynamic and with its
static cache; the faster of the two counts.  Runs are interleaved after a warm-up; the table gives medians.  Compile
time is reported apart.

`cpu s` is the processor time of all threads: on a machine shared with other processes, this is the figure to compare.
"""

import argparse
import functools
import json
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import torch
import transformers

from activedpo_jax import layout
from activedpo_jax.generation.decoding import DecodingSpec, Requests, respond
from activedpo_jax.generation.sampling import Sampling
from activedpo_jax.huggingface import loading
from activedpo_jax.models.config import LoraConfig
from activedpo_jax.models.decoder import Decoder, unstack
from benchmarks import shapes


def random_model(folder: str) -> str:
    """A checkpoint of SmolLM2-135M's shape with random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**shapes.MODELS["smollm2-135m"])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def ours(path: str, dtype: str, prompts: np.ndarray, new_tokens: int) -> tuple[Callable[[], np.ndarray], float]:
    """A function that generates [batch, new tokens], and the seconds that it took to compile."""
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
    config, params = loading.load_model(path, dtype=jnp.dtype(dtype))
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    params = jax.jit(unstack, static_argnums=1)(params, on_cpu)
    batch, width = prompts.shape
    spec = DecodingSpec(
        Decoder(config, LoraConfig(), jnp.dtype(dtype), mesh=mesh, unrolled=True), Sampling(0.0), (), new_tokens, mesh
    )
    requests = Requests(
        prompts, np.full(batch, width, np.int32), np.zeros(batch, np.uint32), np.zeros((batch, 1), np.int32)
    )
    start = time.perf_counter()
    compiled = respond.lower(spec, params, None, requests).compile()
    seconds = time.perf_counter() - start
    return lambda: np.asarray(compiled(params, None, requests).tokens)[:, 0], seconds


def theirs(model: Any, prompts: np.ndarray, new_tokens: int, cache: str) -> np.ndarray:
    ids = torch.tensor(prompts, dtype=torch.long, device=model.device)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            cache_implementation=cache,
            pad_token_id=0,
        )
    return out[:, prompts.shape[1] :].cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--random", action="store_true", help="random weights of SmolLM2-135M's shape")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="write the raw times here, as JSON")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = random_model(folder) if args.random else args.model
        vocabulary = loading.load_config(path).vocab_size
        prompts = np.random.default_rng(0).integers(0, vocabulary, (args.batch, args.prompt)).astype(np.int32)
        run, compile_seconds = ours(path, args.dtype, prompts, args.new_tokens)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    # Without an end of sequence, all generate equally many tokens, and `min_new_tokens` has nothing to forbid.
    model.generation_config.eos_token_id = None
    contenders: dict[str, Callable[[], np.ndarray]] = {"activedpo_jax": run}
    for cache in ("dynamic", "static"):
        contenders[f"transformers, {cache}"] = functools.partial(theirs, model, prompts, args.new_tokens, cache)

    outputs = {name: contender() for name, contender in contenders.items()}
    same = np.mean(outputs["activedpo_jax"] == outputs["transformers, dynamic"])
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(args.repeats):
        for name, contender in contenders.items():
            start, used = time.perf_counter(), time.process_time()
            contender()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
        print(f"repeat {repeat + 1} of {args.repeats}", flush=True)

    device, threads = jax.devices()[0].device_kind, torch.get_num_threads()
    tokens = args.batch * args.new_tokens
    seconds, used_seconds = ({n: statistics.median(t) for n, t in times.items()} for times in (wall, cpu))
    best, best_cpu = (min(m[n] for n in m if n != "activedpo_jax") for m in (seconds, used_seconds))
    print(f"\n{device}, {platform.processor() or platform.machine()}, {threads} torch threads")
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, {args.dtype}")
    print(f"{args.batch} prompts of {args.prompt} tokens, {args.new_tokens} new tokens each; {same:.1%} of them equal")
    print(f"compiled in {compile_seconds:.1f} s\n")
    print(f"{'':<24}{'seconds':>9}{'spread':>18}{'tokens/s':>10}{'cpu s':>8}")
    for name in contenders:
        spread = f"{min(wall[name]):.2f} – {max(wall[name]):.2f}"
        print(f"{name:<24}{seconds[name]:>9.2f}{spread:>18}{tokens / seconds[name]:>10.1f}{used_seconds[name]:>8.2f}")
    print(
        f"\n{best / seconds['activedpo_jax']:.2f} × the tokens per second of transformers, "
        f"{best_cpu / used_seconds['activedpo_jax']:.2f} × per second of processor time"
    )
    if args.out:
        record = {
            "device": device,
            "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "arguments": vars(args) | {"out": None},
            "compile_seconds": compile_seconds,
            "share_of_equal_tokens": float(same),
            "seconds": wall,
            "cpu_seconds": cpu,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
