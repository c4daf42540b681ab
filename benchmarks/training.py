"""A DPO step on pairs of mixed lengths, side by side with PyTorch.

    python -m benchmarks.training --model models/smollm2-135m --pairs PAIRS.jsonl --out benchmarks/results/training.json

Each contender takes the same step from the same weights, on the same 8 pairs: gradient, clipping, AdamW.

    ours    the parts of the batch, in the buckets that the defaults fit to the pool
    lean    a PyTorch step that one can write in an hour: PEFT, one forward pass over both responses of all pairs, each
            on a row of its own, and logits at response tokens alone
    trl     `DPOTrainer.compute_loss` with reference log-probs known beforehand, then the same clipping and AdamW

Loss and gradient norm are compared first.  Steps are interleaved after a warm-up, on several batches, since lengths
matter.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers
import trl

from activedpo_jax import layout, specs, start, tasks
from activedpo_jax.config import default
from activedpo_jax.data import batches
from activedpo_jax.data.groups import PairPool, assign_buckets, pad_pairs
from activedpo_jax.huggingface import adapters
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import response_logps
from activedpo_jax.training import losses, optimiser

BETA, RATE, CLIP = 0.1, 2e-4, 1.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# From rows of the pool, of which the first response is preferred, to loss and gradient norm.
Step = Callable[[np.ndarray], tuple[float, float]]


def random_b(lora: Lora) -> Lora:
    """The adapter with a B that is not zero, so that there is something to compare."""
    key = jax.random.key(1)
    return jax.tree.map_with_path(
        lambda path, x: 0.01 * jax.random.normal(key, x.shape) if path[-1].key == "b" else x, lora
    )


def ours(task: tasks.Task, lora: Lora, size: int) -> tuple[Step, Callable[[np.ndarray], np.ndarray]]:
    """The step, and log π_ref of pairs."""
    decoder, pool, mesh = task.decoder, task.pool, task.decoder.mesh
    assert pool is not None and mesh is not None
    params = task.load_params()
    bucket_of, sizes = assign_buckets(pool, task.buckets), batches.sizes(size, 1)
    recipe = optimiser.OptimiserSpec(RATE, "constant", 0.0, max_grad_norm=CLIP)
    spec = optimiser.DpoSpec(losses.LossSpec("sigmoid", BETA, 0.0), recipe)
    state = jax.jit(functools.partial(optimiser.init_optimiser, recipe))(lora)

    @functools.partial(jax.jit, donate_argnums=1)
    def add(lora: Lora, total: Any, params: Any, groups: Any, pairs: losses.Preferences) -> Any:
        return jax.tree.map(jnp.add, total, optimiser.dpo_gradient(decoder, spec, params, lora, groups, pairs))

    @jax.jit
    def update(lora: Lora, gradient: Lora) -> tuple[Lora, jax.Array]:
        new, _ = optimiser.update(recipe, lora, state, gradient, jnp.float32(RATE))
        return new, optax.global_norm(gradient)

    nothing = jax.jit(optimiser.no_gradient)
    reference = jax.jit(lambda params, groups: response_logps(decoder, params, None, groups))

    def log_probs(rows: np.ndarray) -> np.ndarray:
        found = np.zeros((len(rows), 2), np.float32)
        for b, places, _ in batches.parts(bucket_of[rows], task.buckets, 2, sizes):
            found[places] = reference(params, pad_pairs(pool, rows[places], task.buckets[b]))
        return found

    known: dict[bytes, np.ndarray] = {}

    def step(rows: np.ndarray) -> tuple[float, float]:
        if rows.tobytes() not in known:
            known[rows.tobytes()] = log_probs(rows)
        total = nothing(lora)
        for b, places, width in batches.parts(bucket_of[rows], task.buckets, 2, sizes):
            groups = pad_pairs(pool, rows[places], task.buckets[b], width)
            pad = (0, width - len(places))
            weight = np.pad(np.full(len(places), 1 / len(rows), np.float32), pad)
            reference_logps = np.pad(known[rows.tobytes()][places], (pad, (0, 0)))
            pairs = losses.Preferences(np.zeros(width, np.float32), reference_logps, weight)
            total = add(lora, total, params, groups, pairs)
        gradient, metrics = total
        _, norm = jax.block_until_ready(update(lora, gradient))
        return float(metrics.loss), float(norm)

    return step, log_probs


def torch_model(path: str, folder: str) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def optimiser_step(model: Any, optim: Any, loss: torch.Tensor) -> tuple[float, float]:
    """Backward, clipping and AdamW; the weights are then as before, so that every step starts from the same ones."""
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(weights, CLIP)
    optim.step()
    optim.zero_grad(set_to_none=True)
    with torch.no_grad():
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
    return float(loss.detach()), float(norm)


def rows_of(pool: PairPool, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and completion mask of all first responses and then all second ones, padded on the right."""
    texts = []
    for side in (1, 2):
        for row in rows:
            group = pool.pairs[row, 0]
            texts.append((pool.prompt_tokens[group], pool.response_tokens[group][pool.pairs[row, side]]))
    width = max(len(p) + len(r) for p, r in texts)
    ids, attended, completed = (torch.zeros(len(texts), width, dtype=torch.long) for _ in range(3))
    for i, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        attended[i, :end], completed[i, len(prompt) : end] = 1, 1
    return ids, attended, completed


def lean(path: str, folder: str, pool: PairPool, reference: Callable[[np.ndarray], np.ndarray]) -> Step:
    model = torch_model(path, folder)
    model.train()
    optim = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.0)
    known: dict[bytes, torch.Tensor] = {}
    causal = model.get_base_model()

    def step(rows: np.ndarray) -> tuple[float, float]:
        if rows.tobytes() not in known:
            known[rows.tobytes()] = torch.from_numpy(reference(rows))
        ids, attended, completed = rows_of(pool, rows)
        states = causal.model(input_ids=ids, attention_mask=attended).last_hidden_state[:, :-1]
        wanted = completed[:, 1:].bool()
        logits = causal.lm_head(states[wanted])
        logps = -torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
        row = torch.nonzero(wanted)[:, 0]
        summed = torch.zeros(len(ids)).index_add(0, row, logps)
        margins = BETA * (summed.view(2, -1).T - known[rows.tobytes()])
        loss = -torch.nn.functional.logsigmoid(margins[:, 0] - margins[:, 1]).mean()
        return optimiser_step(model, optim, loss)

    return step


def of_trl(path: str, folder: str, pool: PairPool, reference: Callable[[np.ndarray], np.ndarray]) -> Step:
    model = torch_model(path, folder)
    optim = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.0)
    records = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(
            tempfile.mkdtemp(), beta=BETA, use_cpu=True, report_to=[], gradient_checkpointing=False,
            precompute_ref_log_probs=True, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=transformers.AutoTokenizer.from_pretrained(path),
    )  # fmt: skip
    known: dict[bytes, torch.Tensor] = {}
    model.train()

    def step(rows: np.ndarray) -> tuple[float, float]:
        if rows.tobytes() not in known:
            known[rows.tobytes()] = torch.from_numpy(reference(rows))
        ids, attended, completed = rows_of(pool, rows)
        chosen, rejected = known[rows.tobytes()].T
        batch = {
            "input_ids": ids, "attention_mask": attended, "completion_mask": completed,
            "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
        }  # fmt: skip
        return optimiser_step(model, optim, trainer.compute_loss(trainer.model, batch))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--pairs", default="data/alpaca_eval_pairs/train.jsonl")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="steps on each batch")
    parser.add_argument("--without", nargs="*", default=[], choices=["lean", "trl"])
    parser.add_argument("--out", type=pathlib.Path, help="write the raw times here, as JSON")
    args = parser.parse_args()

    config = default()
    config.model.path, config.data.train, config.lora.rank, config.lora.alpha = (
        args.model, args.pairs, args.rank, 2.0 * args.rank,
    )  # fmt: skip
    mesh = layout.make_mesh(config.mesh, jax.devices()[:1])
    task = specs.with_more_buckets(config, tasks.load(config, 0, mesh, None))
    assert task.pool is not None
    lora = random_b(start.fresh_lora(task.decoder, 0))
    with tempfile.TemporaryDirectory() as folder:
        adapters.save_adapter(lora, task.decoder.lora, args.model, pathlib.Path(folder), "")
        step, reference = ours(task, lora, args.batch)
        contenders: dict[str, Step] = {"ours": step}
        if "lean" not in args.without:
            contenders["lean"] = lean(args.model, folder, task.pool, reference)
        if "trl" not in args.without:
            contenders["trl"] = of_trl(args.model, folder, task.pool, reference)

    rng = np.random.default_rng(0)
    drawn = [rng.choice(task.pool.num_pairs, args.batch, replace=False) for _ in range(args.batches)]
    found: dict[str, Any] = {name: {"seconds": [], "processor seconds": []} for name in contenders}
    for rows in drawn:
        results = {name: run(rows) for name, run in contenders.items()}  # the warm-up, which compiles
        for name, (loss, norm) in results.items():
            print(f"{name:<6}loss {loss:.5f}, gradient norm {norm:.4f}", flush=True)
        for name, result in results.items():
            np.testing.assert_allclose(result, results["ours"], rtol=1e-3, err_msg=name)
        for _ in range(args.repeats):
            for name, run in contenders.items():
                began, used = time.perf_counter(), time.process_time()
                run(rows)
                found[name]["seconds"].append(time.perf_counter() - began)
                found[name]["processor seconds"].append(time.process_time() - used)
    for name, times in found.items():
        ratios = [a / b for a, b in zip(times["seconds"], found["ours"]["seconds"], strict=True)]
        times["× ours"] = statistics.median(ratios)
        print(f"{name:<6}{statistics.median(times['seconds']):>8.2f} s {times['× ours']:>6.2f} × ours", flush=True)
    if args.out:
        record = {
            "device": jax.devices()[0].device_kind,
            "processor": f"{platform.machine()}, {os.cpu_count()} cores",
            "load average": os.getloadavg(),
            "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers, peft, trl)},
            "arguments": vars(args) | {"out": None, "model": pathlib.Path(args.model).name, "pairs": "AlpacaEval"},
            "results": found,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
