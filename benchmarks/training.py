"""A DPO or SFT step, side by side with PyTorch on the same weights and texts: gradient, clipping, AdamW.

    python -m benchmarks.training                                    # SmolLM2-135M's shape, mixed lengths
    python -m benchmarks.training --loss sft --batch 8
    python -m benchmarks.training --model llama2_7b --dtype bfloat16 --rank 128 --lengths full --remat dots  # on a GPU

    ours    the parts of the batch, packed in shapes that are fitted to the pool
    lean    a PyTorch step that one can write in an hour: PEFT, one forward pass over both responses of all pairs, each
            on a row of its own, and logits at response tokens alone
    trl     `DPOTrainer.compute_loss` with reference log-probs known beforehand, or `SFTTrainer.compute_loss`, then the
            same clipping and AdamW

SFT learns the first response of each pair.

In bfloat16 the adapter is float32 on all sides, and PyTorch computes under autocast.  Loss and gradient norm are
compared first.  Steps are interleaved after a warm-up, on several batches, since lengths matter.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import torch
import transformers
import trl

from activedpo_jax import programs
from activedpo_jax.data import batches
from activedpo_jax.data.groups import Groups, PairPool, pad_pairs
from activedpo_jax.data.packing import Batch, Packing, lengths_in, minibatch, multiple_on, packings
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import response_logps
from activedpo_jax.training import losses, optimiser
from benchmarks import measure, shapes, torch_side

BETA, RATE, CLIP = 0.1, 2e-4, 1.0

# From rows of the pool, of which the first response is preferred, to loss and gradient norm.
Step = Callable[[np.ndarray], tuple[float, float]]


class Work:
    """The pairs, in minibatches cut into parts, and log π_ref of all of them."""

    def __init__(self, args: argparse.Namespace, decoder: Decoder, params: Params) -> None:
        vocabulary, count = decoder.config.vocab_size, args.batch * args.batches
        if args.lengths == "mixed":
            self.pool = shapes.mixed_pairs(vocabulary, count, args.factor)
        else:
            self.pool = shapes.full_pairs(vocabulary, count, args.prompt, args.response)
        self.sides = 2 if args.loss == "dpo" else 1
        both = lengths_in(self.pool)
        self.lengths = both._replace(responses=both.responses[:, : self.sides])
        self.bucket = shapes.longest(self.pool)
        self.shapes = packings(self.lengths, batches.sizes(args.batch, 1), multiple_on(jax.default_backend()))
        self.batches = np.arange(count).reshape(args.batches, args.batch)
        reference = jax.jit(response_logps, static_argnums=0)
        self.reference = np.zeros((count, self.sides), np.float32)
        for rows in self.batches if args.loss == "dpo" else ():
            for places, packing in self.parts(rows):
                groups, part = self.groups(rows[places], packing), decoder.clone(packing=packing)
                self.reference[rows[places]] = reference(part, params, None, groups)[: len(places)]

    def parts(self, rows: np.ndarray) -> list[Batch]:
        """Of one minibatch, as a run cuts it."""
        return minibatch(self.lengths.of(rows), self.shapes)

    def groups(self, rows: np.ndarray, packing: Packing) -> Groups:
        groups = pad_pairs(self.pool, rows, self.bucket, packing.groups)
        return groups._replace(
            response_ids=groups.response_ids[:, : self.sides], response_len=groups.response_len[:, : self.sides]
        )

    def texts(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Prompt and response of all first responses, then of all second ones."""
        pool: PairPool = self.pool
        sides = range(self.sides)
        return [(pool.prompt_tokens[row], pool.response_tokens[row][side]) for side in sides for row in rows]

    def tokens(self) -> tuple[int, int]:
        """Useful ones of a batch, on average, and those of them in responses."""
        responses = int(self.lengths.responses.sum()) // len(self.batches)
        return int(self.lengths.text.sum()) // len(self.batches), responses


def ours(work: Work, decoder: Decoder, params: Params, lora: Lora) -> Step:
    recipe = optimiser.OptimiserSpec(RATE, "constant", 0.0, max_grad_norm=CLIP)
    spec = optimiser.DpoSpec(losses.LossSpec("sigmoid", BETA, 0.0), recipe)
    state = jax.jit(functools.partial(optimiser.init_optimiser, recipe))(lora)

    @functools.partial(jax.jit, donate_argnums=2, static_argnums=0)
    def add(packing: Packing, lora: Lora, total: Any, params: Params, groups: Any, pairs: losses.Preferences) -> Any:
        new = optimiser.dpo_gradient(decoder.clone(packing=packing), spec, params, lora, groups, pairs)
        return jax.tree.map(jnp.add, total, (new[0], new[1].loss))

    @functools.partial(jax.jit, donate_argnums=2, static_argnums=0)
    def add_completions(packing: Packing, lora: Lora, total: Any, params: Params, groups: Any, share: Any) -> Any:
        new = optimiser.completion_gradient(decoder.clone(packing=packing), params, lora, groups, share)
        return jax.tree.map(jnp.add, total, new)

    @jax.jit
    def update(lora: Lora, gradient: Lora) -> tuple[Lora, jax.Array]:
        new, _ = optimiser.update(recipe, lora, state, gradient, jnp.float32(RATE))
        return new, optax.global_norm(gradient)

    nothing = jax.jit(lambda lora: (optimiser.no_gradient(lora)[0], jnp.float32(0)))

    def step(rows: np.ndarray) -> tuple[float, float]:
        total = nothing(lora)
        for places, packing in work.parts(rows):
            groups = work.groups(rows[places], packing)
            if work.sides == 1:
                share = np.float32(1 / work.lengths.responses[rows].sum())
                total = add_completions(packing, lora, total, params, groups, share)
                continue
            pad = (0, packing.groups - len(places))
            weight = np.pad(np.full(len(places), 1 / len(rows), np.float32), pad)
            reference = np.pad(work.reference[rows[places]], (pad, (0, 0)))
            pairs = losses.Preferences(np.zeros(packing.groups, np.float32), reference, weight)
            total = add(packing, lora, total, params, groups, pairs)
        gradient, loss = total
        _, norm = jax.block_until_ready(update(lora, gradient))
        return float(loss), float(norm)

    return step


def torch_step(model: Any, dtype: str, loss_of: Callable[[np.ndarray], torch.Tensor]) -> Step:
    """Loss, backward, clipping and AdamW; the weights are then as before, so that every step starts from the same."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(weights, RATE, weight_decay=0.0)
    before = [p.detach().clone() for p in weights]

    def step(rows: np.ndarray) -> tuple[float, float]:
        with torch.autocast(torch_side.DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optim.step()
        optim.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        return float(loss.detach()), float(norm)

    return step


def lean(work: Work, model: Any, dtype: str) -> Step:
    causal = model.get_base_model()

    def loss(rows: np.ndarray) -> torch.Tensor:
        logps = torch_side.rows(work.texts(rows)).log_probs(causal)
        if work.sides == 1:
            return -logps.sum() / int(work.lengths.responses[rows].sum())
        reference = torch.from_numpy(work.reference[rows]).to(torch_side.DEVICE)
        margins = BETA * (logps.view(2, -1).T - reference)
        return -torch.nn.functional.logsigmoid(margins[:, 0] - margins[:, 1]).mean()

    return torch_step(model, dtype, loss)


def of_trl(work: Work, model: Any, dtype: str, folder: str) -> Step:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<pad>": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    common: dict[str, Any] = {
        "output_dir": folder, "use_cpu": torch_side.DEVICE.type == "cpu", "bf16": dtype == "bfloat16", "report_to": [],
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    trainer: Any
    if work.sides == 1:
        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(**common),
            train_dataset=datasets.Dataset.from_list([{"prompt": "a", "completion": "a"}]),
            processing_class=tokenizer,
        )
    else:
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(beta=BETA, precompute_ref_log_probs=True, **common),
            train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "a"}]),
            processing_class=tokenizer,
        )
    model.train()

    def loss(rows: np.ndarray) -> torch.Tensor:
        texts = torch_side.rows(work.texts(rows))
        if work.sides == 1:
            labels = texts.ids.masked_fill(texts.completed == 0, -100)
            batch = {"input_ids": texts.ids, "attention_mask": texts.attended, "labels": labels}
            loss_of: torch.Tensor = trainer.compute_loss(trainer.model, batch)
            return loss_of
        chosen, rejected = torch.from_numpy(work.reference[rows]).to(torch_side.DEVICE).T
        batch = {
            "input_ids": texts.ids, "attention_mask": texts.attended, "completion_mask": texts.completed,
            "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
        }  # fmt: skip
        found: torch.Tensor = trainer.compute_loss(trainer.model, batch)
        return found

    return torch_step(model, dtype, loss)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes.add_options(found, remat="dots", repeats=3)
    found.add_argument("--loss", default="dpo", choices=["dpo", "sft"])
    found.add_argument("--lengths", default="mixed", choices=["full", "mixed"])
    found.add_argument("--prompt", type=int, default=256, help="tokens, where lengths are full")
    found.add_argument("--response", type=int, default=256)
    found.add_argument("--batch", type=int, default=4, help="pairs of a step")
    found.add_argument("--batches", type=int, default=2)
    found.add_argument("--only", nargs="+", default=["ours", "lean", "trl"], choices=["ours", "lean", "trl"])
    found.add_argument("--name", default="training", help="under which they stand in the file")
    return found


def main() -> None:
    args = parser().parse_args()
    programs.compile_faster()
    decoder = shapes.make_decoder(args)
    params, lora = shapes.weights(decoder)
    work = Work(args, decoder, params)
    model = functools.partial(torch_side.peft_model, shapes.hf_config(args), decoder, params, lora, True)
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[[], Step]] = {
            "ours": lambda: ours(work, decoder, params, lora),
            "lean": lambda: lean(work, model(), args.dtype),
            "trl": lambda: of_trl(work, model(), args.dtype, folder),
        }
        steps = {name: makers[name]() for name in makers if name in args.only}
        results: dict[str, list[tuple[float, float]]] = {}
        for name, step in steps.items():  # the warm-up, which compiles
            results[name] = [step(rows) for rows in work.batches]
            print(f"{name}: loss and gradient norm {np.round(results[name], 4).tolist()}", flush=True)
        for name, found in results.items():
            rtol = 1e-3 if args.dtype == "float32" else 0.05
            np.testing.assert_allclose(found, next(iter(results.values())), rtol=rtol, err_msg=name)
        runs = {name: lambda step=step: [step(rows) for rows in work.batches] for name, step in steps.items()}
        times = measure.in_turns(runs, args.repeats)
    tokens, responses = work.tokens()
    flops, peak = shapes.useful_flops(decoder.config, tokens, responses), measure.peak_flops(args.dtype)
    for several in times.values():  # of one step
        several |= {key: [t / args.batches for t in values] for key, values in several.items()}
    print(f"\n{args.model}, {args.dtype}, {args.batch} examples, {tokens} useful tokens, rank {args.rank}")
    print(measure.table(times, next(iter(times)), tokens, flops, peak))
    found_all = {"results": times, "loss and gradient norm": results, "useful tokens": tokens}
    measure.save(args.out, args.name, args, found_all | {"useful FLOPs": flops, "peak FLOP/s": peak})


if __name__ == "__main__":
    main()
