"""Every program of a run on abstract arguments, with what else lies on the devices while it runs and how often it runs.

Nothing is computed here: arguments are `jax.ShapeDtypeStruct`s, laid out as the run lays out its arrays.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from activedpo_jax import layout, sft, specs, tasks
from activedpo_jax.compile_only import shapes
from activedpo_jax.compile_only.program import Program, chunks, parts
from activedpo_jax.compile_only.rounds import RoundPrograms
from activedpo_jax.evaluation import heldout
from activedpo_jax.training import finetune, optimiser


def programs(config: ml_collections.ConfigDict, task: tasks.Task, mesh: Mesh) -> Iterator[Program]:
    """The programs of a run, in the order in which it comes to them.

    Of several buckets, the largest is taken to hold everything: `runs` of the others' programs is 0.  What needs less
    of the same is left out: buckets that a run adds for the lengths of its pool, parts of a batch that are smaller than
    a whole microbatch, and packed batches, whose shapes only the data can tell.
    """
    yield from _base_model(config, task, mesh)
    yield from _sft(config, task, mesh)
    lora = shapes.lora(task, mesh)
    size = layout.round_up(config.evaluation.pairs_per_chunk, mesh)
    rounds = [RoundPrograms(config, task, specs.round_spec(config, name, task, mesh)) for name in config.strategies]
    kept = max((one.kept for one in rounds), key=shapes.device_bytes)
    for bucket in task.buckets:
        pairs = shapes.groups(mesh, bucket, size, 2)
        yield Program(
            name=f"evaluation {tuple(bucket)}",
            function=heldout.score,
            arguments=(task.decoder, task.params_shape, lora, pairs),
            weights=(task.params_shape, lora, shapes.lora(task, mesh)),
            data=(pairs, kept),
            stage="evaluation",
            runs=chunks(task.heldout.num_pairs, size) if bucket == task.buckets[-1] else 0,
            pairs=size,
        )
    for one in rounds:
        yield from one.all()


def _base_model(config: ml_collections.ConfigDict, task: tasks.Task, mesh: Mesh) -> Iterator[Program]:
    if task.base_model != tasks.SYNTHETIC:
        return
    scratch, size = tasks.scratch_optimiser(config), config.scratch.batch_size
    decoder = tasks.scratch_decoder(task.decoder, mesh)
    assert decoder.mesh is not None
    mesh = decoder.mesh
    weights = tasks.params_shape(decoder, mesh, jnp.float32, "none")
    opt_state = jax.eval_shape(lambda p: optimiser.init_optimiser(scratch, p), weights)
    trained, batch = (weights, shapes.replicated(mesh, opt_state)), shapes.groups(mesh, task.buckets[0], size, 2)
    arguments = (decoder, scratch, *trained, batch, shapes.replicated(mesh, jnp.float32(0)))
    name, steps = "base model step", config.scratch.steps
    yield Program(name, tasks.language_model_step, arguments, trained, batch, "base model", steps, size)


def _sft(config: ml_collections.ConfigDict, task: tasks.Task, mesh: Mesh) -> Iterator[Program]:
    if not config.sft.data:
        return
    recipe, full, lora, params = sft.recipe(config, mesh), config.sft.weights == "full", shapes.lora(task, mesh), None
    trained: Any = lora
    if full:
        wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), task.params_shape)
        trained = shapes.weights(mesh, wide)
    else:
        params = task.params_shape
    number, rate = shapes.from_host((jnp.int32(0), jnp.float32(0)))
    opt_state = shapes.laid_out(
        jax.eval_shape(lambda w: optimiser.init_optimiser(recipe.optimiser, w), trained),
        optimiser.optimiser_shardings(recipe.optimiser, mesh, trained),
    )
    # The adapter that the rounds start from lies there, too, and the copy of it is what is trained.
    weights = (params, lora, trained, opt_state, trained)
    examples = config.sft.limit or config.data.assumed_records
    microbatches = recipe.epochs * parts(examples, recipe.batch_size, recipe.microbatch)
    for bucket in task.buckets:
        groups = shapes.groups(mesh, bucket, recipe.microbatch, 1)
        yield Program(
            name=f"SFT gradient {tuple(bucket)}",
            function=finetune.gradient_program,
            arguments=(task.decoder, params, trained, (trained, rate), groups, rate),
            weights=weights,
            data=groups,
            stage="SFT",
            runs=microbatches if bucket == task.buckets[-1] else 0,
        )
    arguments = (recipe.optimiser, mesh, trained, opt_state, trained, optimiser.Position(number, number))
    steps = recipe.epochs * chunks(examples, recipe.batch_size)
    yield Program("SFT update", finetune.update_program, arguments, weights, (), "SFT", steps)
