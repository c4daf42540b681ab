"""Supervised fine-tuning, alone or as the first stage of a run: the files around `training.finetune`.

    python -m activedpo_jax.sft --config configs/sft_smollm2.py --workdir runs/sft

A stage's folder holds `metrics.jsonl` (a record's `round` is its step), `tensorboard/`, `checkpoints/` until the stage
is done, and then the result: a PEFT adapter `adapter/`, or `model/`, a whole Hugging Face checkpoint.
"""

if __name__ == "__main__":  # first, since the imports take seconds
    from activedpo_jax import cluster, errors

    cluster.guard()
    errors.end_at_signals()

import dataclasses
import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from activedpo_jax import cluster, errors, files, flags, hosts, layout, specs, start
from activedpo_jax.data.completions import Completion, limit, read_completions
from activedpo_jax.data.draws import split_by_prompt
from activedpo_jax.data.groups import Bucket, assign_buckets, check_tokens
from activedpo_jax.data.tokenize import encoded_texts
from activedpo_jax.huggingface import adapters, loading, merged
from activedpo_jax.models.policy import Policy
from activedpo_jax.record import checkpoints, folders, inputs, metrics
from activedpo_jax.selection.strategies import STRATEGIES
from activedpo_jax.training import finetune, optimiser
from activedpo_jax.training.finetune import Examples, Recipe, Trainee
from activedpo_jax.training.loop import Work, descend


def load(config: ml_collections.ConfigDict, seed: int) -> Examples:
    """The data of `config.sft`, as the model's tokenizer and `config.data` (template, buckets) have it.

    Raises:
      ValueError: a record, the template or the buckets are not in order; says where, and what to change.
    """
    sft, data = config.sft, config.data
    completions = read_completions(sft.data, sft.split)
    if sft.limit:
        completions = limit(completions, sft.limit, seed)
    held_out: list[Completion] = []
    if sft.heldout_fraction:
        completions, held_out = split_by_prompt(completions, sft.heldout_fraction, seed)
    buckets = tuple(sorted(Bucket(*b) for b in data.buckets))
    encoding = start.encoding(config, loading.load_tokenizer(config.model.path, config.model.revision))
    texts = [encoded_texts(part, encoding) for part in (completions, held_out) if part]
    vocabulary = loading.load_config(config.model.path, config.model.revision).vocab_size
    for part in texts:
        check_tokens(part, vocabulary, sft.data)
        assign_buckets(part, buckets)  # complains of buckets that are no ladder, before a model is loaded
    return Examples(texts[0], texts[1] if held_out else None, buckets)


def described(config: ml_collections.ConfigDict, examples: Examples) -> dict[str, Any]:
    """What `inputs.hold` compares when a command resumes."""
    parts = {"SFT data": examples.train, "held-out SFT data": examples.heldout}
    found: dict[str, Any] = {n: inputs.describe_texts(t, config.sft.data) for n, t in parts.items() if t is not None}
    return found | start.fingerprints(config)


def recipe(config: ml_collections.ConfigDict, mesh: Mesh) -> Recipe:
    sft = config.sft
    return Recipe(
        optimiser.OptimiserSpec(
            sft.learning_rate, sft.schedule, sft.warmup_fraction, sft.weight_decay, sft.max_grad_norm
        ),
        sft.epochs,
        sft.batch_size,
        layout.round_up(min(sft.examples_per_chunk, sft.batch_size), mesh),
        config.checkpoint_minutes,
        specs.can_pack(config, mesh),
    )


def run(
    config: ml_collections.ConfigDict, seed: int, examples: Examples, policy: Policy, mesh: Mesh, folder: pathlib.Path
) -> Policy:
    """The whole stage, from the last checkpoint: trains, writes the result into `folder`, and says how it went.

    Args:
      policy: base weights and adapter on the mesh.  With `config.sft.weights='full'` training starts from the base
        weights as float32, best loaded so, and they are used up: use those returned.  Else a copy of the adapter is
        trained.

    Returns:
      the policy that comes of it; base weights that were trained are in the decoder's dtype.

    Raises:
      FloatingPointError: the training has diverged.
    """
    full, decoder = config.sft.weights == "full", policy.decoder
    result = result_folder(config, folder)
    base_model, revision = config.model.path, config.model.revision
    shardings = functools.partial(layout.weight_shardings, mesh)
    for name, texts in (("SFT data", examples.train), ("held-out SFT data", examples.heldout)):
        for note in texts.notes if texts is not None else ():
            print(f"{name}: {note}")
    if is_done(config, folder):
        if full:
            params = loading.load_model(str(result), "", decoder.dtype, shardings)[1]
            policy = dataclasses.replace(policy, params=params)
        else:
            lora = adapters.load_adapter(str(result), "", decoder.config, decoder.lora, shardings)
            policy = dataclasses.replace(policy, reference=lora)
    elif full:
        weights = jax.tree.map(lambda x: x.astype(jnp.float32), policy.params)
        weights = fit(recipe(config, mesh), Trainee(decoder, None, weights), examples, seed, folder)
        params = jax.tree.map(lambda x: x.astype(decoder.dtype), weights)
        merged.save_merged(merged.Weights(params), base_model, revision, result, decoder.dtype)
        policy = dataclasses.replace(policy, params=params)
    else:
        trainee = Trainee(decoder, policy.params, jax.tree.map(jnp.copy, policy.reference))
        lora = fit(recipe(config, mesh), trainee, examples, seed, folder)
        adapters.save_adapter(lora, decoder.lora, base_model, result, revision)
        policy = dataclasses.replace(policy, reference=lora)
    # The result is whole; what it took to get there is several times as large.
    hosts.on_first(files.remove_folder)(folder / "checkpoints")
    print(f"SFT, seed {seed}: {_in_words(metrics.read_metrics(folder / 'metrics.jsonl'))}")
    return policy


def fit(recipe: Recipe, trainee: Trainee, examples: Examples, seed: int, folder: pathlib.Path) -> Any:
    """Trains, from the last checkpoint in `folder` if there is one, and returns the weights; those given are used up.

    Raises:
      FloatingPointError: a loss is not finite; nothing of that step is saved.
    """
    weights, mesh = trainee.weights, trainee.mesh
    per_epoch = recipe.steps_per_epoch(examples)
    store = checkpoints.Checkpoints(folder)
    shapes = finetune.state_shapes(recipe, mesh, weights)
    done, restored = store.restore_latest(shapes)
    if restored is None:
        opt_state = finetune.initial_moments(recipe, mesh, weights)
    else:
        jax.tree.map(lambda x: x.delete(), weights)
        weights, opt_state = restored

    def heldout_loss(weights: Any) -> dict[str, float]:
        if examples.heldout is None:
            return {}
        so_far = trainee._replace(weights=weights)
        loss = finetune.mean_loss(recipe, so_far, examples.heldout, examples.buckets)
        return {"sft/heldout_loss": loss}

    first, total = done or 0, recipe.epochs * per_epoch
    clock = checkpoints.Clock(recipe.checkpoint_minutes)
    with errors.signals_wait(), metrics.MetricsWriter(folder, first + 1 if first else 0) as writer:
        if not first and examples.heldout is not None:
            writer.write(0, 0, heldout_loss(weights))
        begun = time.perf_counter()
        work = Work("SFT", first, total, "config.sft.learning_rate")
        advance = finetune.steps(recipe, trainee, examples, seed)
        for step in descend(work, weights, opt_state, advance):
            weights, number = step.weights, step.number
            speed = step.report.tokens / (time.perf_counter() - begun)
            figures = {"sft/loss": float(step.report.loss), "sft/learning_rate": float(step.report.rate)}
            figures["sft/tokens_per_second"] = speed
            if number % per_epoch == 0:
                figures |= heldout_loss(weights)
            writer.write(number, number, figures)
            if clock.is_due() and number < total:
                writer.sync()
                store.save(number, (weights, step.opt_state))  # after its figures: whatever is saved is on record
                clock.restart()
                if hosts.any_of(errors.signalled()):
                    store.wait()
                    errors.end()
            begun = time.perf_counter()
    store.close()
    return weights


def result_folder(config: ml_collections.ConfigDict, folder: pathlib.Path) -> pathlib.Path:
    """Where the stage whose folder this is leaves its result: a PEFT adapter or a Hugging Face checkpoint."""
    return folder / ("model" if config.sft.weights == "full" else "adapter")


@hosts.on_first
def is_done(config: ml_collections.ConfigDict, folder: pathlib.Path) -> bool:
    """Whether the stage has left its whole result there, which `run` then only reads."""
    last_written = "config.json" if config.sft.weights == "full" else "adapter_config.json"
    return (result_folder(config, folder) / last_written).exists()


def _in_words(records: Sequence[dict[str, Any]]) -> str:
    steps = [r for r in records if "sft/loss" in r]
    losses = [r["sft/loss"] for r in steps]
    quarter = -(-len(losses) // 4)  # one batch's loss says little
    held_out = [r["sft/heldout_loss"] for r in records if "sft/heldout_loss" in r]
    speed = statistics.median(r["sft/tokens_per_second"] for r in steps)
    return (
        f"{len(steps)} steps, loss {statistics.mean(losses[:quarter]):.3f} nats a token in the first quarter of them "
        f"and {statistics.mean(losses[-quarter:]):.3f} in the last"
        + (f", held-out {held_out[0]:.3f} before and {held_out[-1]:.3f} after" if held_out else "")
        + f", {speed:.0f} tokens/s"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command: the stage alone, once for every seed."""
    config, folder, address = flags.read_plain_run(sys.argv if argv is None else argv, STRATEGIES)
    with errors.clean_errors():
        hosts.start(address, cluster.detected(sys.argv[1:], os.environ))
        if not config.sft.data:
            raise ValueError("config.sft.data is empty; expected a file or a `datasets` name to learn from: set it")
        folders.check_workdir(folder, config, "sft")
        mesh = layout.make_mesh(config.mesh)
        examples = {seed: load(config, seed) for seed in config.seeds}  # nothing is claimed before these are valid
        folders.open_workdir(folder, config, "sft")
        for seed in config.seeds:
            inputs.hold(folder / "inputs" / f"seed{seed}.json", described(config, examples[seed]))
        for seed in config.seeds:
            place = folder if len(config.seeds) == 1 else folder / f"seed{seed}"
            result = result_folder(config, place)
            if not is_done(config, place):
                decoder = start.load_decoder(config, mesh)
                stored = jnp.float32 if config.sft.weights == "full" else decoder.dtype
                params = start.load_params(config, mesh, stored)
                lora = start.initial_lora(config, decoder, mesh, seed)
                run(config, seed, examples[seed], Policy(decoder, params, lora), mesh, place)
            print(f"{result}: start from it with --config.{_OPTION[config.sft.weights]}={result}")


_OPTION = {"lora": "lora.path", "full": "model.path"}


if __name__ == "__main__":
    main()
