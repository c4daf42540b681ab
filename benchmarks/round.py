"""A whole round, side by side: features of a pool, selection, and a DPO step on the pairs that were picked.

    python -m benchmarks.round --out benchmarks/results/round_cpu.json
    python -m benchmarks.round --on_policy --out benchmarks/results/round_cpu.json    # and sampling, before that

    ours       features in batches as a pass over a pool takes them, exact greedy selection, the DPO step of a run
    assembled  what is put together from libraries: gradients of one response at a time with PEFT, as LESS takes them
               but without projection, greedy selection on their Gram matrix, the step of TRL's `DPOTrainer`
    strongest  what PyTorch can do: batched hooks with our sketch, the same selection, a lean step

SmolLM2-135M's shape, pairs in the lengths of AlpacaEval's texts; on-policy, prompts of 128 tokens and two responses of
64 to each, which every side samples from the same weights (PyTorch's with `generate` of `transformers`), and then goes
on with the same random ones, since no two sides sample the same.  Reference log-probs are known, and answers are the
data's; judging costs nothing on any side.  Sides are compared first: the picks of `ours` and `strongest`, which have
the same sketch, and the losses on the pairs that ours picked.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from activedpo_jax import layout, programs
from activedpo_jax.config import default
from activedpo_jax.generation.decoding import DecodingSpec, Requests, respond
from activedpo_jax.generation.sampling import Sampling
from activedpo_jax.models.decoder import Decoder, unstack
from activedpo_jax.selection.greedy import greedy
from benchmarks import features, measure, shapes, torch_side, training

LAM = 1.0

Choose = Callable[[], np.ndarray]


def our_choice(args: argparse.Namespace, decoder: Decoder, weights: Any) -> tuple[Choose, list[features.Text]]:
    padded, places, texts, packing = features.batches(args, decoder.config.vocab_size)
    run = features.jax_contenders(args, decoder.clone(packing=packing), weights, padded)["response"]
    mesh = layout.make_mesh(default().mesh, jax.devices()[:1])

    def choose() -> np.ndarray:
        found = features.in_order(places, run(), (len(texts), args.dim))
        available, nothing = np.ones(len(texts), bool), np.zeros((0, args.dim), np.float32)
        return np.asarray(
            greedy(layout.put(found), available, nothing, LAM, num_picks=args.picks, block=64, mesh=mesh).rows
        )

    return choose, texts


def our_sampling(args: argparse.Namespace, decoder: Decoder, weights: Any, texts: list[features.Text]) -> Any:
    """What writes two responses to every prompt."""
    mesh, count = layout.make_mesh(default().mesh, jax.devices()[:1]), len(texts)
    params, lora = (unstack(tree, jax.default_backend() == "cpu" and i == 0) for i, tree in enumerate(weights))
    spec = DecodingSpec(decoder.clone(mesh=mesh, unrolled=True), Sampling(1.0), (), args.response, mesh)
    prompts = np.stack([prompt for prompt, _ in texts])
    samples = np.tile(np.arange(2, dtype=np.int32), (count, 1))
    requests = Requests(prompts, np.full(count, args.prompt, np.int32), np.arange(count, dtype=np.uint32), samples)
    return lambda: jax.block_until_ready(respond(spec, params, lora, requests).tokens)


def their_sampling(args: argparse.Namespace, model: Any, texts: list[features.Text]) -> Any:
    prompts = torch.from_numpy(np.stack([prompt for prompt, _ in texts]).astype(np.int64)).to(torch_side.DEVICE)
    model.generation_config.eos_token_id = None  # all write equally many tokens

    @torch.no_grad()
    def write() -> Any:
        return model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, num_return_sequences=2, top_k=0,
            max_new_tokens=args.response, pad_token_id=0,
        )  # fmt: skip

    return write


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes.add_options(found, remat="dots", repeats=2)
    found.add_argument("--groups", type=int, default=8, help="pairs in the pool")
    found.add_argument("--picks", type=int, default=2, help="pairs that are picked, and trained on")
    found.add_argument("--chunk", type=int, default=8, help="pairs at a time")
    found.add_argument("--torch_chunk", type=int, default=4, help="pairs at a time in PyTorch")
    found.add_argument("--on_policy", action="store_true", help="each side samples two responses to every prompt first")
    found.add_argument("--prompt", type=int, default=128, help="tokens, on-policy")
    found.add_argument("--response", type=int, default=64)
    found.add_argument("--dim", type=int, default=8192)
    return found


def main() -> None:
    args = parser().parse_args()
    programs.compile_faster()
    decoder = shapes.make_decoder(args)
    weights = shapes.weights(decoder)
    args.only = ["response"]
    args.batch, args.batches, args.loss = args.groups, 1, "dpo"
    args.lengths = "full" if args.on_policy else "mixed"
    choose, texts = our_choice(args, decoder, weights)
    # Neighbours are the two responses of a pair, as `torch_side` wants them.
    rows = [
        torch_side.rows(
            [(texts[i][0], r) for i in range(start, min(start + args.torch_chunk, len(texts))) for r in texts[i][1]]
        )
        for start in range(0, len(texts), args.torch_chunk)
    ]
    work = training.Work(args, decoder, weights[0])
    model = functools.partial(torch_side.peft_model, shapes.hf_config(args), decoder, *weights)
    with tempfile.TemporaryDirectory() as folder:
        of_one, of_many = model(False), model(False)
        steps = {
            "ours": training.ours(work, decoder, *weights),
            "assembled": training.of_trl(work, model(True), args.dtype, folder),
            "strongest": training.lean(work, model(True), args.dtype),
        }
        theirs = {
            "assembled": torch_side.one_at_a_time(of_one, rows, None),
            "strongest": torch_side.hooks(of_many, rows, args.dim),
        }
        choices: dict[str, Choose] = {"ours": choose} | {
            name: lambda run=run: torch_side.greedy(run(), args.picks, LAM) for name, run in theirs.items()
        }
        picked = {name: choice() for name, choice in choices.items()}
        print({name: rows.tolist() for name, rows in picked.items()}, flush=True)
        np.testing.assert_array_equal(picked["ours"], picked["strongest"])
        results = {name: step(picked["ours"]) for name, step in steps.items()}
        print({name: np.round(found, 4).tolist() for name, found in results.items()}, flush=True)
        for name, found in results.items():
            np.testing.assert_allclose(found, results["ours"], rtol=1e-3, err_msg=name)
        writers: dict[str, Callable[[], Any]] = dict.fromkeys(steps, lambda: None)
        if args.on_policy:
            written = functools.partial(their_sampling, args, of_one, texts)
            writers = {
                "ours": our_sampling(args, decoder, weights, texts),
                "assembled": written(),
                "strongest": written(),
            }
            for name in ("ours", "assembled"):  # the warm-up
                writers[name]()

        def whole(name: str) -> None:
            writers[name]()
            steps[name](choices[name]())

        rounds = {name: functools.partial(whole, name) for name in steps}
        times = measure.in_turns(rounds, args.repeats)
    tokens, _ = features.useful_tokens(texts)
    print(measure.table(times, "ours", tokens))
    found_all = {"results": times, "picks": {n: p.tolist() for n, p in picked.items()}, "useful tokens": tokens}
    measure.save(args.out, "on-policy" if args.on_policy else "round", args, found_all)


if __name__ == "__main__":
    main()
