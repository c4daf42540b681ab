"""ActiveDPO, round after round.

    python -m activedpo_jax.main --config configs/quickstart.py --workdir runs/quickstart [--config.dpo.beta=0.2]

The same command on the same work directory goes on where it stopped.  With `--compile_only=v5e:4x4` it compiles the
programs of the run for that TPU topology, prints what they need, and stops.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import files, flags, layout, sft, start, tasks
from activedpo_jax.data.groups import PairPool, assign_buckets, pad_groups, shared_prompts
from activedpo_jax.evaluation import heldout
from activedpo_jax.evidence.gradients import FeatureSpec
from activedpo_jax.huggingface import adapters, merged
from activedpo_jax.models.lora import Lora
from activedpo_jax.oracles.dataset import answers
from activedpo_jax.record import checkpoints, comparison, folders, inputs, metrics, report
from activedpo_jax.rounds import fused, staged
from activedpo_jax.rounds.checks import check_learnt, check_picks
from activedpo_jax.selection.posterior import information_gain
from activedpo_jax.selection.strategies import STRATEGIES
from activedpo_jax.training.optimiser import DpoSpec, OptimiserSpec

# A fused round shows no progress while it runs, so `auto` takes it where it is short: up to so many
# token-times-parameter products in the pool, about a minute on two CPU cores.
_SHORT_ROUND = 1e12


def main(argv: Sequence[str] | None = None) -> None:
    command = flags.read_config(sys.argv if argv is None else argv, STRATEGIES)
    config, folder = command.config, command.workdir
    if command.compile_only:
        from activedpo_jax import compile_only  # needs libtpu, an extra

        compile_only.compile_for(config, command.compile_only)
        return
    assert folder is not None
    with flags.clean_errors():
        folders.check_workdir(folder, config, "main")
        mesh = layout.make_mesh(config.mesh)
        first = tasks.load(config, config.seeds[0], mesh, folder)  # nothing is claimed before the inputs are valid
        folders.open_workdir(folder, config, "main")
        compete(config, folder, mesh, first)


def compete(config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh, first: tasks.Task) -> None:
    """Every strategy on every seed, and their comparison."""
    summaries = []
    for seed in config.seeds:
        with flags.clean_errors():
            task = first if seed == config.seeds[0] else tasks.load(config, seed, mesh, folder)
            inputs.hold(folder / "inputs" / f"seed{seed}.json", described(config, task))
            for name, pool in (("pool", task.pool), ("held-out set", task.heldout)):
                for note in pool.notes:
                    print(f"{name}: {note}")
        task, params, sft_lora = starting_point(config, task, mesh, seed, folder)
        judge = evaluator(config, task, params, sft_lora, mesh, seed)
        for strategy in config.strategies:
            place = folders.run_folder(folder, config, strategy, seed)
            summaries.append(run(config, strategy, seed, task, params, sft_lora, judge, mesh, place))
    finish(folder, summaries)


def described(config: ml_collections.ConfigDict, task: tasks.Task) -> dict[str, Any]:
    """What `inputs.hold` compares when a command resumes."""
    found: dict[str, Any] = {
        "pool": inputs.describe_pool(task.pool, config.data.train),
        "held-out set": inputs.describe_pool(task.heldout, config.data.heldout or config.data.train),
    }
    return found | start.fingerprints(config)


def starting_point(
    config: ml_collections.ConfigDict, task: tasks.Task, mesh: Mesh, seed: int, folder: pathlib.Path
) -> tuple[tasks.Task, Any, Lora]:
    """The base weights and the adapter that all runs of a seed begin with, and that are π_ref: after SFT, if asked for.

    Returns:
      the task too, whose base model is another one after SFT of all weights.
    """
    place, full = folder / "sft" / f"seed{seed}", config.sft.weights == "full"
    with flags.clean_errors():
        lora = start.initial_lora(config, task.decoder, mesh, seed)
        if not config.sft.data:
            return task, task.load_params(), lora
        examples = sft.load(config, seed)
        inputs.hold(folder / "inputs" / f"seed{seed}_sft.json", sft.described(config, examples))
        for name, texts in (("the pool", task.pool), ("the held-out set", task.heldout)):
            if shared := shared_prompts(examples.train, texts):
                print(f"SFT data: {shared} of {examples.train.num_groups} examples have a prompt of {name}")
        # All weights are trained in float32, and are read from the stage's result once that is there.
        params: Any = {}
        if not full:
            params = task.load_params()
        elif not sft.is_done(config, place):
            params = start.load_params(config, mesh, jnp.float32)
    params, lora = sft.run(config, seed, examples, task.decoder, params, lora, mesh, place)
    if full:
        task = dataclasses.replace(task, base_model=str(sft.result_folder(config, place)))
    return task, params, lora


def run(
    config: ml_collections.ConfigDict,
    strategy: str,
    seed: int,
    task: tasks.Task,
    params: Any,
    sft_lora: Lora,
    judge: heldout.Evaluator,
    mesh: Mesh,
    folder: pathlib.Path,
) -> folders.RunSummary:
    """One strategy on one seed: rounds of features, selection, labels, DPO and evaluation, from where it stopped."""
    oracle = config.oracle
    with flags.clean_errors():
        spec = round_spec(config, strategy, task, mesh)
        preferences = answers(task.pool, oracle.noise, oracle.flip_probability, oracle.temperature, seed)
        one_program = is_fused(config, task, spec)
    lam, key, sketch_seed = jnp.float32(config.selection.lam), jax.random.key(seed), jnp.uint32(seed)

    lora, labelled = jax.tree.map(jnp.copy, sft_lora), jax.device_put(fused.no_labels(spec), layout.replicated(mesh))
    store = checkpoints.Checkpoints(folder)
    with flags.clean_errors():
        done, restored = store.restore_latest((lora, labelled))
        if restored is not None:
            lora, labelled = restored
        summary = resumed_summary(folder, strategy, seed, done)

    pool = on_device(spec, task, preferences) if one_program else None
    told = False

    with metrics.MetricsWriter(folder, 0 if done is None else done + 1) as writer:
        if done is None:
            summary["rounds"] = [round_zero(judge.untrained())]
            writer.write(0, 0, scalars(summary["rounds"][0]))
            files.write_json(folder / "summary.json", summary)
            store.save(0, (lora, labelled))  # last: whatever is in a checkpoint is on record
        for number in range((done or 0) + 1, config.rounds + 1):
            clock = time.perf_counter()
            labels = number * config.labels_per_round
            schedule = spec.schedule(labels, seed * 1_000_003 + number)
            round_key = jax.random.fold_in(key, number)
            arguments = (schedule, round_key, sketch_seed, lam)

            def check(picks: Any, number: int = number, taken: np.ndarray = np.asarray(labelled.rows)) -> None:  # noqa: B008
                check_picks(picks, taken, task.pool.num_pairs, number)

            def record(picks: Any, answered: np.ndarray, number: int = number) -> None:
                rows = selected(spec, task.pool, picks, answered, f"dataset ({oracle.noise} noise)", number)
                folders.write_selected(folder, number, rows)

            if pool is not None:
                lora, labelled, result = jax.block_until_ready(
                    fused.compiled_round(spec, params, lora, labelled, sft_lora, pool, *arguments)
                )
                check(result.picks)
                check_learnt(result.training.loss, lora, number)
                record(result.picks, np.asarray(result.preferences))
                seconds = {"round": time.perf_counter() - clock}
            else:
                lora, labelled, result, seconds = staged.staged_round(
                    spec,
                    params,
                    lora,
                    labelled,
                    sft_lora,
                    task.pool,
                    task.buckets,
                    *arguments,
                    check=check,
                    ask=lambda rows: preferences[rows],
                    answered=on_record(task.pool, folder, number),
                    on_labels=record,
                )
            check_learnt(result.training.loss, lora, number)
            if not told and float(result.lam) > np.float32(config.selection.lam):
                told = True
                print(
                    f"{strategy}, seed {seed}: config.selection.lam={config.selection.lam} is below what float32 "
                    f"resolves for these features; {float(result.lam):.3g} is used, and scores and gains are those "
                    "under it: set a larger one, or a larger config.features.dim",
                    flush=True,
                )
            clock = time.perf_counter()
            scores = judge(lora)
            seconds["evaluation"] = time.perf_counter() - clock
            entry = round_summary(spec, number, labels, result, scores, seconds)
            summary["rounds"].append(entry)
            writer.write(number, labels, scalars(entry))
            files.write_json(folder / "summary.json", summary)
            store.save(number, (lora, labelled))
            print(report.round_line(strategy, seed, config.rounds, entry), flush=True)
    store.close()
    decoder, model = task.decoder, task.base_model
    revision = config.model.revision if model == config.model.path else ""
    adapters.save_adapter(lora, decoder.lora, model, folder / "adapter", revision)
    if config.export.merged and not (folder / "merged").exists():
        merged.save_merged(params, lora, decoder.lora, model, revision, folder / "merged", decoder.dtype)
    return summary


def evaluator(
    config: ml_collections.ConfigDict, task: tasks.Task, params: Any, sft_lora: Lora, mesh: Mesh, seed: int
) -> heldout.Evaluator:
    """The judge of a seed's runs: the held-out pairs, with the labels that the data has, without noise."""
    with flags.clean_errors():
        truth = answers(task.heldout, "none", 0.0, 1.0, seed)
    every = np.arange(task.heldout.num_pairs)
    batches = heldout.Batches(task.heldout, every, task.buckets, config.evaluation.pairs_per_chunk, mesh)
    dpo = config.dpo
    return heldout.Evaluator(
        task.decoder, params, sft_lora, task.heldout, truth, batches, dpo.beta, dpo.label_smoothing
    )


def finish(folder: pathlib.Path, summaries: Sequence[folders.RunSummary]) -> None:
    """The table and the picture of all runs; of several runs their comparison in `summary.json`, too."""
    if len(summaries) > 1:
        files.write_json(folder / "summary.json", {**comparison.compare(summaries), "runs": list(summaries)})
    report.plot_curves(summaries, folder / "curves.png", folder.resolve().name)
    print(f"\n{report.final_table(summaries)}\n\n{folder / 'curves.png'}")


def round_spec(config: ml_collections.ConfigDict, strategy: str, task: tasks.Task, mesh: Mesh) -> fused.RoundSpec:
    """The options of a round, as its programs take them.

    Raises:
      ValueError: the run would need more pairs than the pool has.
    """
    capacity = config.rounds * config.labels_per_round
    if capacity > task.pool.num_pairs:
        raise ValueError(
            f"rounds × labels_per_round = {capacity} labels, but the pool has {task.pool.num_pairs} pairs: "
            "lower config.rounds or config.labels_per_round, or give a larger pool"
        )
    dpo = config.dpo
    optimiser = OptimiserSpec(dpo.learning_rate, dpo.schedule, dpo.warmup_fraction, dpo.weight_decay, dpo.max_grad_norm)
    return fused.RoundSpec(
        decoder=task.decoder,
        mesh=mesh,
        features=FeatureSpec(config.features.dim, config.features.normalisation),
        dpo=DpoSpec(dpo.beta, dpo.label_smoothing, optimiser),
        strategy=strategy,
        frozen_posterior=config.selection.posterior == "frozen",
        labels_per_round=config.labels_per_round,
        capacity=capacity,
        block=config.selection.block,
        chunk=layout.round_up(config.features.groups_per_chunk, mesh),
        epochs=dpo.epochs,
        batch_size=dpo.batch_size,
        microbatch=layout.round_up(min(dpo.pairs_per_chunk, dpo.batch_size), mesh),
        train_on_newest=dpo.train_on == "newest",
        start_from_sft=dpo.start_from == "sft",
    )


def is_fused(config: ml_collections.ConfigDict, task: tasks.Task, spec: fused.RoundSpec) -> bool:
    """Whether rounds run as one program.

    Raises:
      ValueError: `fused` is asked for, but the pool does not fit into one program.
    """
    if config.round.mode == "staged":
        return False
    m = task.pool.responses_per_group
    used = np.unique(assign_buckets(task.pool, task.buckets))
    one_shape = len(used) == 1 and all(len(r) == m for r in task.pool.response_tokens)
    if config.round.mode == "fused":
        if not one_shape:
            raise ValueError(
                "config.round.mode='fused' needs one bucket and as many responses for every prompt: give "
                f"config.data.buckets a single entry (the pool uses {len(used)}), or take 'staged'"
            )
        return True
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(task.params_shape))
    tokens = task.pool.num_groups * (task.buckets[used[0]].prompt + m * task.buckets[used[0]].response)
    return one_shape and tokens * parameters < _SHORT_ROUND


def on_device(spec: fused.RoundSpec, task: tasks.Task, preferences: np.ndarray) -> fused.DevicePool:
    """The pool of a fused round, padded to whole chunks."""
    bucket = task.buckets[int(assign_buckets(task.pool, task.buckets)[0])]
    count = task.pool.num_groups
    groups = pad_groups(task.pool, np.arange(count), bucket, -(-count // spec.chunk) * spec.chunk)
    return fused.device_pool(spec, groups, task.pool.pairs, preferences)


def selected(
    spec: fused.RoundSpec, pool: PairPool, picks: Any, preferences: np.ndarray, source: str, number: int
) -> list[folders.Selected]:
    """The picks of a round as a person reads them."""
    out = []
    for row, score, preference in zip(np.asarray(picks.rows), np.asarray(picks.scores), preferences, strict=True):
        group, first, second = pool.pairs[row]
        out.append(
            folders.Selected(
                pair_id=pool.pair_ids[row],
                prompt=pool.prompt_texts[group],
                first=pool.response_texts[group][first],
                second=pool.response_texts[group][second],
                score=float(score) if spec.needs_features else None,
                preference="second" if preference else "first",
                source=source,
                round=number,
            )
        )
    return out


def on_record(pool: PairPool, folder: pathlib.Path, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Rows, scores and preferences of a round whose labels came in before the process was killed."""
    if not folders.selected_path(folder, number).exists():
        return None
    lines = folders.read_selected(folder, number)
    row_of = {name: row for row, name in enumerate(pool.pair_ids)}
    unknown = [line.pair_id for line in lines if line.pair_id not in row_of]
    if unknown:
        raise ValueError(
            f"{folders.selected_path(folder, number)}: pair {unknown[0]!r} is not in the pool; "
            "the data has changed since: restore it, or start with another --workdir"
        )
    rows = np.array([row_of[line.pair_id] for line in lines], np.int32)
    scores = np.array([line.score or 0.0 for line in lines], np.float32)
    return rows, scores, np.array([line.preference == "second" for line in lines], np.int32)


def resumed_summary(folder: pathlib.Path, strategy: str, seed: int, done: int | None) -> folders.RunSummary:
    """The summary up to the last round that was saved.

    Raises:
      ValueError: a round was saved and the summary does not have it, or there are rounds on record and no checkpoint.
    """
    path = folder / "summary.json"
    if done is None:
        if (folder / "rounds").exists() and not (folder / "checkpoints").exists():
            raise ValueError(
                f"{folder}: there are rounds on record, but no checkpoints/; restore it, or give another --workdir "
                "to start again"
            )
        return {"strategy": strategy, "seed": seed, "rounds": []}
    summary = files.read_json(path) if path.exists() else None
    rounds = summary.get("rounds") if isinstance(summary, dict) else None
    if not isinstance(rounds, list) or len(rounds) <= done:
        raise ValueError(f"{path}: missing, or without round {done}, which was saved; restore the file")
    return {"strategy": strategy, "seed": seed, "rounds": rounds[: done + 1]}


def scalars(entry: folders.RoundSummary) -> dict[str, float]:
    """A round's figures under TensorBoard's names, `seconds/features` say."""
    return {name.replace(".", "/"): value for name, value in files.flatten(entry).items() if name != "round"}


def round_zero(scores: dict[str, float]) -> folders.RoundSummary:
    return {
        "round": 0,
        "labels": 0,
        "accuracy": scores["accuracy"],
        "margin": scores["margin"],
        "heldout_loss": scores["loss"],
        "seconds": {},
    }


def round_summary(
    spec: fused.RoundSpec,
    number: int,
    labels: int,
    result: fused.RoundResult,
    scores: dict[str, float],
    seconds: dict[str, float],
) -> folders.RoundSummary:
    """What `summary.json` and `metrics.jsonl` say of one round."""
    entry: folders.RoundSummary = {
        "round": number,
        "labels": labels,
        "accuracy": scores["accuracy"],
        "margin": scores["margin"],
        "heldout_loss": scores["loss"],
        "loss": float(result.training.loss),
        "seconds": seconds,
    }
    if spec.needs_features:
        picked = np.asarray(result.picks.scores)
        entry["information_gain"] = float(information_gain(result.picks.scores))
        entry["score_min"], entry["score_max"] = float(picked.min()), float(picked.max())
    return entry


if __name__ == "__main__":
    main()
