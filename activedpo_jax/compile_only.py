"""Compiles the programs of a run for a TPU topology, on a machine without one, and prints what they need.

`libtpu` (the extra `tpu`) brings the compiler; nothing is run and no weights are read.
"""

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from activedpo_jax import layout, main, sft, start, tasks
from activedpo_jax.data.groups import Bucket, Groups
from activedpo_jax.evaluation import heldout
from activedpo_jax.rounds import fused, staged
from activedpo_jax.training import finetune, optimiser

Program = tuple[str, Any, tuple[Any, ...]]  # name, jitted function, arguments


def compile_for(config: ml_collections.ConfigDict, topology: str) -> None:
    """Compiles every program of the run and prints bytes and FLOPs per device.

    Args:
      topology: as TPUs are ordered: `v5e:4x4`, `v5p:2x2x1`, `v6e:4x4`.

    Raises:
      SystemExit: as of `tpu_devices`.
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
    # Otherwise libtpu looks for the TPU machine that this is not, and takes minutes to give up.
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
    like = lambda tree: _abstract(tree, layout.replicated(mesh))  # noqa: E731
    spec = main.round_spec(config, config.strategies[0], task, mesh)
    lora = _weights(mesh, jax.eval_shape(lambda: start.fresh_lora(task.decoder, 0)))
    params = task.params_shape
    key, seed = like(jax.eval_shape(lambda: jax.random.key(0))), like(jnp.uint32(0))
    lam, number = like(jnp.float32(0)), like(jnp.int32(0))

    if task.base_model == tasks.SYNTHETIC:
        scratch = tasks.scratch_optimiser(config)
        weights = tasks.params_shape(task.decoder, mesh, jnp.float32, "none")
        opt_state = jax.eval_shape(lambda p: optimiser.init_optimiser(scratch, p), weights)
        batch = _groups(mesh, task.buckets[0], layout.round_up(config.scratch.batch_size, mesh), 2)
        arguments: tuple[Any, ...] = (task.decoder, scratch, weights, like(opt_state), batch, lam)
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

    m = task.pool.responses_per_group
    for strategy in config.strategies:
        spec = main.round_spec(config, strategy, task, mesh)
        labelled = like(jax.eval_shape(lambda spec=spec: fused.no_labels(spec)))
        if main.is_fused(config, task, spec):
            bucket = task.buckets[0]
            chunks = -(-task.pool.num_groups // spec.chunk)
            groups = jax.tree.map(
                lambda x, spec=spec, chunks=chunks: jax.ShapeDtypeStruct(
                    (chunks, *x.shape), x.dtype, sharding=layout.chunks(mesh)
                ),
                _groups(mesh, bucket, spec.chunk, m),
            )
            n = task.pool.num_pairs
            pool = fused.DevicePool(groups, like(np.zeros((n, 3), np.int32)), like(np.zeros(n, np.int32)))
            schedule = like(spec.schedule(config.labels_per_round, 0))
            arguments = (spec, params, lora, labelled, lora, pool, schedule, key, seed, lam)
            yield f"round, {strategy}", fused.compiled_round, arguments
            continue
        opt_state = jax.eval_shape(lambda w, spec=spec: optimiser.init_optimiser(spec.dpo.optimiser, w), lora)
        gradient = (lora, like(jax.eval_shape(optimiser.no_gradient, lora)[1]))
        schedule = spec.schedule(config.labels_per_round, 0)
        for bucket in task.buckets:
            groups, pairs = _groups(mesh, bucket, spec.chunk, m), _groups(mesh, bucket, spec.microbatch, 2)
            if spec.needs_features:
                yield f"features {tuple(bucket)}", staged.features_program, (spec, params, lora, groups, seed)
            part = like((schedule.slots[0][: spec.microbatch], schedule.weight[0][: spec.microbatch]))
            arguments = (spec, params, lora, gradient, pairs, labelled, *part)
            yield f"training gradient {tuple(bucket)}, {strategy}", staged.gradient_program, arguments
        arguments = (spec, lora, like(opt_state), lora, number, number)
        yield f"training update, {strategy}", staged.update_program, arguments
        features = None
        if spec.needs_features:
            shape = (-(-task.pool.num_pairs // mesh.size) * mesh.size, spec.features.dim)
            features = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout.rows(mesh))
        rows = task.pool.num_pairs if features is None else features.shape[0]
        yield f"selection, {strategy}", staged.select_program, (spec, features, labelled, rows, key, lam)


def _abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding), tree)


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
