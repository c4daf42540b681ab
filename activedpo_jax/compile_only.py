"""Compiles the programs of a run for a TPU topology, on a machine without one, and prints what they need.

`libtpu` (the extra `tpu`) brings the compiler; nothing is run and no weights are read.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from activedpo_jax import layout, sft, specs, start, tasks, verbs
from activedpo_jax.data.groups import Bucket, Groups
from activedpo_jax.evaluation import heldout
from activedpo_jax.models.policy import Policy
from activedpo_jax.rounds import choose, fresh, fused, staged
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import RunState, empty_labelled, vector_size
from activedpo_jax.training import finetune, optimiser

Program = tuple[str, Any, tuple[Any, ...]]  # name, jitted function, arguments


def compile_for(config: ml_collections.ConfigDict, topology: str) -> None:
    """Compiles every program of the run and prints bytes and FLOPs per device.

    Args:
      topology: a name and a shape in chips: `v5e:4x4`, `v5p:2x2x1`, `v6e:4x4`.

    Raises:
      SystemExit: see `tpu_devices`.
    """
    devices = tpu_devices(topology)
    mesh = layout.make_mesh(config.mesh, devices)
    task = tasks.load(config, config.seeds[0], mesh, None)
    print(f"{devices[0].device_kind} × {len(devices)}, mesh {dict(mesh.shape)}, weights {task.decoder.dtype}")
    print(f"{'program':<44}{'arguments':>12}{'temporary':>12}{'output':>12}{'FLOPs':>12}   per device")
    for name, function, arguments in programs(config, task, mesh):
        compiled = function.lower(*arguments).compile()
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes)
        columns = "".join(f"{_bytes(size):>12}" for size in sizes)
        print(f"{name:<44}{columns}{cost.get('flops', float('nan')):>12.3g}", flush=True)


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a TPU topology, to compile for.

    Raises:
      SystemExit: libtpu is not installed, or does not know the topology.
    """
    # Otherwise libtpu looks for the metadata of a TPU machine, and takes minutes to give up.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is touched, so two may compile at a time
    }.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        raise SystemExit(
            f"error: --compile_only={topology}: {error}; expected a topology such as v5e:4x4, and libtpu "
            "(pip install 'activedpo_jax[tpu]')"
        ) from error


def programs(config: ml_collections.ConfigDict, task: tasks.Task, mesh: Mesh) -> Iterator[Program]:
    """The programs of a run on abstract arguments."""
    replicated = functools.partial(_abstract, sharding=layout.replicated(mesh))
    lora = _weights(mesh, jax.eval_shape(lambda: start.fresh_lora(task.decoder, 0)))
    params = task.params_shape
    policy = Policy(task.decoder, params, lora)
    lam, number = replicated(jnp.float32(0)), replicated(jnp.int32(0))

    if task.base_model == tasks.SYNTHETIC:
        scratch = tasks.scratch_optimiser(config)
        decoder = tasks.scratch_decoder(task.decoder, mesh)
        assert decoder.mesh is not None
        alone = functools.partial(_abstract, sharding=layout.replicated(decoder.mesh))
        weights = tasks.params_shape(decoder, decoder.mesh, jnp.float32, "none")
        opt_state = jax.eval_shape(lambda p: optimiser.init_optimiser(scratch, p), weights)
        batch = _groups(decoder.mesh, task.buckets[0], config.scratch.batch_size, 2)
        rate = alone(jnp.float32(0))
        arguments: tuple[Any, ...] = (decoder, scratch, weights, alone(opt_state), batch, rate)
        yield "base model step", tasks.language_model_step, arguments

    if config.sft.data:
        recipe, full = sft.recipe(config, mesh), config.sft.weights == "full"
        trained: Any = lora
        if full:
            trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), params)
        for bucket in task.buckets:
            groups = _groups(mesh, bucket, recipe.microbatch, 1)
            arguments = (task.decoder, mesh, None if full else params, trained, (trained, lam), groups, lam)
            yield f"SFT gradient {tuple(bucket)}", finetune.gradient_program, arguments
        opt_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(lambda w: optimiser.init_optimiser(recipe.optimiser, w), trained),
            optimiser.optimiser_shardings(recipe.optimiser, mesh, trained),
        )
        arguments = (recipe.optimiser, mesh, trained, opt_state, trained, number, number)
        yield "SFT update", finetune.update_program, arguments

    for bucket in task.buckets:
        pairs = _groups(mesh, bucket, layout.round_up(config.evaluation.pairs_per_chunk, mesh), 2)
        yield (
            f"evaluation {tuple(bucket)}",
            heldout.score,
            (task.decoder, params, lora, pairs),
        )

    for strategy in config.strategies:
        spec = specs.round_spec(config, strategy, task, mesh)
        shapes = jax.eval_shape(lambda spec=spec: empty_labelled(spec))
        state = RunState(lora, replicated(shapes), replicated(jnp.uint32(0)), number)
        yield from _round_programs(config, task, spec, policy, state)


def _round_programs(
    config: ml_collections.ConfigDict, task: tasks.Task, spec: RoundSpec, policy: Policy, state: RunState
) -> Iterator[Program]:
    mesh, strategy = spec.mesh, spec.selection.strategy
    replicated = functools.partial(_abstract, sharding=layout.replicated(mesh))
    if specs.is_fused(config, task):
        rounds = verbs.make(config, spec, task, policy, config.seeds[0])
        assert isinstance(rounds, fused.FusedRound)
        arguments: tuple[Any, ...] = (spec, policy, state, *replicated(rounds.arguments(1, config.seeds[0])))
        yield f"round, {strategy}", fused.fused_round, arguments
        return
    lora, number = state.lora, state.round
    m = 2 if task.pool is None else task.pool.responses_per_group
    if spec.sampling is not None:
        m = max(m, spec.responses)
        weights = jax.eval_shape(functools.partial(fresh.unrolled, spec), policy, state)
        weights = tuple(_weights(mesh, w) for w in weights)
        for bucket in task.buckets:
            ids, length, _, _ = _groups(mesh, bucket, spec.chunk, m)
            arguments = (spec, weights, state.seed, number, fresh.Prompts(ids, length))
            yield f"responses {tuple(bucket)}", fresh.chunk_program, arguments
    schedule = spec.schedule(np.arange(config.labels_per_round), 1, 0)
    part = replicated((schedule.slots[0][: spec.training.microbatch], schedule.weight[0][: spec.training.microbatch]))
    gradient = (lora, replicated(jax.eval_shape(optimiser.no_gradient, lora)[1]))
    for bucket in task.buckets:
        groups = _groups(mesh, bucket, spec.chunk, m)
        if spec.needs:
            arguments = (spec, policy, lora, groups, state.seed)
            yield f"{' and '.join(spec.needs)} {tuple(bucket)}", staged.evidence_program, arguments
        arguments = (spec, policy, lora, gradient, state.labelled, part, bucket)
        yield f"training gradient {tuple(bucket)}, {strategy}", staged.gradient_program, arguments
    opt_state = jax.eval_shape(lambda w: optimiser.init_optimiser(spec.training.dpo.optimiser, w), lora)
    arguments = (spec, lora, replicated(opt_state), lora, number, number)
    yield f"training update, {strategy}", staged.update_program, arguments
    count = task.candidate_texts.num_groups * m * (m - 1) // 2 if task.pool is None else task.pool.num_pairs
    padded = -(-count // mesh.size) * mesh.size
    evidence = {}
    if spec.needs:
        groups = _groups(mesh, task.buckets[0], spec.chunk, m)
        shapes = jax.eval_shape(functools.partial(choose.chunk_evidence, spec), policy, lora, groups, state.seed)
        evidence = {
            name: jax.ShapeDtypeStruct((padded, *x.shape[1:]), x.dtype, sharding=layout.rows(mesh))
            for name, x in shapes.items()
        }
    empty = np.zeros((padded, 3), np.int32), np.zeros((padded, 4), np.uint32), np.zeros(padded, bool)
    rows = choose.Rows(*replicated(empty))
    vectors = vector_size(spec) if choose.needs_known(spec) else None
    known = None if vectors is None else replicated(jax.eval_shape(lambda: jnp.zeros((spec.capacity, vectors))))
    yield f"selection, {strategy}", staged.select_program, (spec, state, rows, evidence, known)


def _abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Shapes of arrays with this sharding; shapes that already have one keep it."""

    def shape(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None:
            return x
        return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding)

    return jax.tree.map(shape, tree)


def _weights(mesh: Mesh, tree: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout.weight_shardings(mesh, tree)
    )


def _groups(mesh: Mesh, bucket: Bucket, size: int, m: int) -> Groups:
    def abstract(shape: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.batch(mesh))

    shapes: tuple[tuple[int, ...], ...] = ((size, bucket.prompt), (size,), (size, m, bucket.response), (size, m))
    return Groups(*(abstract(s) for s in shapes))


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
