"""Speed of scoring, side by side with PyTorch: log π(y|x) of both responses of pairs, as an evaluation needs them.

    python -m benchmarks.scoring                       # SmolLM2-135M's shape, lengths of AlpacaEval's texts

    ours    the batches of a run's evaluation, packed
    lean    PyTorch and PEFT: each response on a row with its prompt, rows of about the same length together, logits at
            response tokens alone, no gradients

Log-probs are compared first.  Runs are interleaved after a warm-up.
"""

import argparse

import jax
import numpy as np
import torch

from activedpo_jax import layout, programs
from activedpo_jax.config import default
from activedpo_jax.evaluation import heldout
from activedpo_jax.models.policy import Policy
from activedpo_jax.resumable import NOTHING_SAVED
from benchmarks import measure, shapes, torch_side


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes.add_options(found, remat="none", repeats=3)
    found.add_argument("--pairs", type=int, default=32)
    found.add_argument("--chunk", type=int, default=8, help="pairs at a time, on both sides")
    return found


def main() -> None:
    args = parser().parse_args()
    programs.compile_faster()
    decoder = shapes.make_decoder(args)
    params, lora = shapes.weights(decoder)
    pool = shapes.mixed_pairs(decoder.config.vocab_size, args.pairs, args.factor)
    mesh, every = layout.make_mesh(default().mesh, jax.devices()[:1]), np.arange(args.pairs)
    longest = shapes.longest(pool)
    batches = heldout.Batches(pool, every, (longest,), args.chunk, mesh, packed=True)
    policy = Policy(decoder.clone(mesh=mesh), params, lora)

    model = torch_side.peft_model(shapes.hf_config(args), decoder, params, lora, False).get_base_model()
    texts = [(pool.prompt_tokens[i], response) for i in every for response in pool.response_tokens[i]]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]) + len(texts[i][1]))
    cuts = [order[i : i + 2 * args.chunk] for i in range(0, len(order), 2 * args.chunk)]
    rows = [torch_side.rows([texts[i] for i in cut]) for cut in cuts]

    def ours() -> np.ndarray:
        return heldout.log_probs(policy, lora, batches, "ours", NOTHING_SAVED)

    def lean() -> np.ndarray:
        out = np.zeros(len(texts), np.float32)
        with torch.no_grad():
            for cut, part in zip(cuts, rows, strict=True):
                out[cut] = part.log_probs(model).cpu().numpy()
        return out.reshape(-1, 2)

    found, theirs = ours(), lean()
    difference = float(np.abs(found - theirs).max() / np.abs(theirs).max())
    print(f"log-probs differ by {difference:.1e} of the largest", flush=True)
    assert difference < (1e-4 if args.dtype == "float32" else 0.02)
    times = measure.in_turns({"ours": ours, "lean_forward": lean}, args.repeats)
    responses = sum(len(response) for _, response in texts)
    tokens = responses + sum(map(len, pool.prompt_tokens))
    print(measure.table(times, "ours", tokens))
    measure.save(
        args.out,
        "scoring",
        args,
        {"results": times, "useful tokens": tokens, "differences": {"lean_forward": difference}},
    )


if __name__ == "__main__":
    main()
