"""Speed of generation against `transformers`, side by side in one process, on the same work.

    python -m benchmarks.generation --model models/smollm2-135m     # a Hugging Face directory
    python -m benchmarks.generation --random                        # SmolLM2-135M's shape, random weights
    python -m benchmarks.generation --random --dtype bfloat16 --batch 64   # on a GPU

Both get the same weights and the same prompts, all different, with one response each, and write the same number
of new tokens: greedy, with the end of sequence disabled.  `transformers` runs `generate` with its dynamic and with its
static cache; the faster of the two counts.  Runs are interleaved after a warm-up; the table gives medians.  Compile
time is reported apart.
"""

import argparse
import functools
import pathlib
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

from activedpo_jax import layout, programs
from activedpo_jax.generation.decoding import DecodingSpec, Requests, respond
from activedpo_jax.generation.sampling import Sampling
from activedpo_jax.huggingface import loading
from activedpo_jax.models.config import LoraConfig
from activedpo_jax.models.decoder import Decoder, unstack
from benchmarks import measure, shapes


def random_model(folder: str) -> str:
    """A checkpoint of SmolLM2-135M's shape with random weights."""
    torch.manual_seed(0)
    hf_config = shapes.hf_config(argparse.Namespace(model="smollm2_135m", layers=None))
    config = transformers.AutoConfig.for_model(**hf_config)
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
    programs.compile_faster()

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
    same = float(np.mean(outputs["activedpo_jax"] == outputs["transformers, dynamic"]))
    times = measure.in_turns(contenders, args.repeats)
    print(f"\n{args.dtype}, {args.batch} prompts of {args.prompt} tokens, {args.new_tokens} new tokens each")
    print(f"{same:.1%} of the tokens are the same; compiled in {compile_seconds:.1f} s\n")
    print(measure.table(times, "activedpo_jax", args.batch * args.new_tokens))
    found = {"results": times, "compile seconds": compile_seconds, "share of equal tokens": same}
    measure.save(args.out, "generation", args, found | {"useful tokens": args.batch * args.new_tokens})


if __name__ == "__main__":
    main()
