"""Every program of a run on abstract arguments, with what else lies on the devices while it runs and how often it runs.

Nothing is computed here: arguments are `jax.ShapeDtypeStruct`s, laid out as the run lays out its arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import layout, sft, specs, start, tasks, verbs
from activedpo_jax.data.groups import Bucket, Groups
from activedpo_jax.evaluation import heldout
from activedpo_jax.models.policy import Policy
from activedpo_jax.rounds import choose, fresh, fused, learn, staged
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import Answers, Chosen, RunState, empty_labelled, vector_size
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.training import finetune, optimiser

# The stages whose costs are added up: the first two are done once in a run, the others in every round.
ONCE = ("base model", "SFT")
OF_A_ROUND = ("round", "generation", "features", "selection", "training", "evaluation")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of a run, and its place in it."""

    name: str
    function: Any  # jitted
    arguments: tuple[Any, ...]
    weights: Any  # every weight on the devices while it runs, optimiser and gradients included, argument or not
    data: Any  # everything else on them: tokens, evidence, labels
    stage: str
    runs: float = 0.0  # in a round, the mean over all rounds; of `ONCE`: in the run
    pairs: int = 0  # of responses, that it works on
    iterations: int = 0  # of a loop whose length only a run can tell, at most; 0: there is none, or it is short
    reread: float = 0.0  # bytes of a device that each of these iterations reads


def programs(config: ml_collections.ConfigDict, task: tasks.Task, mesh: Mesh) -> Iterator[Program]:
    """The programs of a run, in the order in which it comes to them.

    Of several buckets, the largest is taken to hold everything: `runs` of the others' programs is 0.
    """
    yield from _base_model(config, task, mesh)
    yield from _sft(config, task, mesh)
    lora = _lora(task, mesh)
    size = layout.round_up(config.evaluation.pairs_per_chunk, mesh)
    for bucket in task.buckets:
        pairs = _groups(mesh, bucket, size, 2)
        yield Program(
            name=f"evaluation {tuple(bucket)}",
            function=heldout.score,
            arguments=(task.decoder, task.params_shape, lora, pairs),
            weights=(task.params_shape, lora, _lora(task, mesh)),
            data=pairs,
            stage="evaluation",
            runs=_chunks(task.heldout.num_pairs, size) if bucket == task.buckets[-1] else 0,
            pairs=size,
        )
    for strategy in config.strategies:
        yield from _Round(config, task, specs.round_spec(config, strategy, task, mesh)).programs()


def _base_model(config: ml_collections.ConfigDict, task: tasks.Task, mesh: Mesh) -> Iterator[Program]:
    if task.base_model != tasks.SYNTHETIC:
        return
    scratch, size = tasks.scratch_optimiser(config), layout.round_up(config.scratch.batch_size, mesh)
    weights = tasks.params_shape(task.decoder, mesh, jnp.float32, "none")
    opt_state = jax.eval_shape(lambda p: optimiser.init_optimiser(scratch, p), weights)
    trained, batch = (weights, _replicated(mesh, opt_state)), _groups(mesh, task.buckets[0], size, 2)
    arguments = (task.decoder, scratch, *trained, batch, _replicated(mesh, jnp.float32(0)))
    name, steps = "base model step", config.scratch.steps
    yield Program(name, tasks.language_model_step, arguments, trained, batch, "base model", steps, size)


def _sft(config: ml_collections.ConfigDict, task: tasks.Task, mesh: Mesh) -> Iterator[Program]:
    if not config.sft.data:
        return
    recipe, full, lora, params = sft.recipe(config, mesh), config.sft.weights == "full", _lora(task, mesh), None
    trained: Any = lora
    if full:
        wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), task.params_shape)
        trained = _weights(mesh, wide)
    else:
        params = task.params_shape
    number, rate = _from_host((jnp.int32(0), jnp.float32(0)))
    opt_state = _laid_out(
        jax.eval_shape(lambda w: optimiser.init_optimiser(recipe.optimiser, w), trained),
        optimiser.optimiser_shardings(recipe.optimiser, mesh, trained),
    )
    # The adapter that the rounds start from lies there, too, and the copy of it is what is trained.
    weights = (params, lora, trained, opt_state, trained)
    examples = config.sft.limit or config.data.assumed_records
    parts = _parts(examples, recipe.batch_size, recipe.microbatch)
    for bucket in task.buckets:
        groups = _groups(mesh, bucket, recipe.microbatch, 1)
        yield Program(
            name=f"SFT gradient {tuple(bucket)}",
            function=finetune.gradient_program,
            arguments=(task.decoder, mesh, params, trained, (trained, rate), groups, rate),
            weights=weights,
            data=groups,
            stage="SFT",
            runs=recipe.epochs * parts if bucket == task.buckets[-1] else 0,
        )
    arguments = (recipe.optimiser, mesh, trained, opt_state, trained, number, number)
    steps = recipe.epochs * _chunks(examples, recipe.batch_size)
    yield Program("SFT update", finetune.update_program, arguments, weights, (), "SFT", steps)


class _Round:
    """The programs of the rounds of one strategy."""

    def __init__(self, config: ml_collections.ConfigDict, task: tasks.Task, spec: RoundSpec) -> None:
        self.config, self.task, self.spec, self.mesh = config, task, spec, spec.mesh
        self.strategy = spec.selection.strategy
        self.policy = Policy(task.decoder, task.params_shape, _lora(task, self.mesh))
        seed, number = _replicated(self.mesh, (jnp.uint32(0), jnp.int32(0)))
        labelled = _replicated(self.mesh, jax.eval_shape(lambda: empty_labelled(spec)))
        self.state = RunState(_lora(task, self.mesh), labelled, seed, number)
        self.held = (self.policy, self.state.lora)  # the weights that are always there
        m = 2 if task.pool is None else task.pool.responses_per_group
        self.responses = m if spec.sampling is None else max(m, spec.responses)
        self.groups = 0 if task.pool is None else task.pool.num_groups
        self.drawn = 0
        if task.prompts is not None:
            prompts = len(task.prompts.ids)
            self.drawn = min(config.candidates.prompts_per_round or prompts, prompts)
        self.per_group = self.responses * (self.responses - 1) // 2
        known = 0 if task.pool is None else task.pool.num_pairs
        self.candidates = known + self.drawn * (spec.responses * (spec.responses - 1) // 2)
        self.labels = [t * spec.selection.labels_per_round for t in range(1, config.rounds + 1)]  # after each round

    def programs(self) -> Iterator[Program]:
        if specs.is_fused(self.config, self.task):
            yield self._fused()
            return
        if self.spec.sampling is not None:
            yield from self._generation()
        yield from self._evidence()
        yield self._selection()
        yield from self._training()

    def _fused(self) -> Program:
        rounds = verbs.make(self.config, self.spec, self.task, self.policy, self.config.seeds[0])
        assert isinstance(rounds, fused.FusedRound)
        source, ask, schedule = _replicated(self.mesh, rounds.arguments(1, self.config.seeds[0]))
        return Program(
            name=f"round, {self.strategy}",
            function=fused.fused_round,
            arguments=(self.spec, self.policy, self.state, source, ask, schedule),
            weights=self.held,
            data=(self.state.labelled, source, ask, schedule),
            stage="round",
            runs=1,
            pairs=self.candidates,
        )

    def _generation(self) -> Iterator[Program]:
        spec, held = self.spec, self.held
        assert spec.sampling is not None
        arguments = (spec, self.policy, self.state)
        # Nobody but the compiler decides how the copy is laid out.
        shardings = fresh.unrolled_program.lower(*arguments).compile().output_shardings
        shapes = jax.eval_shape(functools.partial(fresh.unrolled, spec), self.policy, self.state)
        copy = _laid_out(shapes, shardings)
        labelled = self.state.labelled
        yield Program(
            "weights for sampling", fresh.unrolled_program, arguments, held, labelled, "generation", runs=1
        )
        widths = sorted({bucket.prompt for bucket in self.task.buckets})
        for width in widths:
            ids, length, _, _ = _groups(self.mesh, Bucket(width, 1), spec.chunk, 1)
            prompts = fresh.Prompts(ids, length)
            yield Program(
                name=f"responses {(width, spec.sampling.length)}",
                function=fresh.chunk_program,
                arguments=(spec, copy, self.state.seed, _from_host(jnp.int32(0)), prompts),
                weights=(held, copy),
                data=(labelled, prompts),
                stage="generation",
                runs=_chunks(self.drawn, spec.chunk) if width == widths[-1] else 0,
                pairs=spec.chunk * (spec.responses * (spec.responses - 1) // 2),
                iterations=spec.sampling.length - 1,
                reread=device_bytes(copy) + self._cache_bytes(width),
            )

    def _cache_bytes(self, width: int) -> float:
        """Keys and values that a token of every response attends to on one device, half of the responses' places."""
        spec, model, decoder = self.spec, self.task.decoder.config, self.task.decoder
        assert spec.sampling is not None
        tokens = spec.chunk * (width + spec.responses * spec.sampling.length / 2)
        heads = 2 * model.num_kv_heads * model.head_dim * np.dtype(decoder.dtype).itemsize
        return tokens * heads * model.num_layers / self.mesh.size

    def _evidence(self) -> Iterator[Program]:
        spec, labelled = self.spec, self.state.labelled
        whole = self._pool_evidence()
        stage = "features"
        for bucket in self.task.buckets if spec.needs else ():
            groups = _groups(self.mesh, bucket, spec.chunk, self.responses)
            yield Program(
                name=f"{' and '.join(spec.needs)} {tuple(bucket)}",
                function=staged.evidence_program,
                arguments=(spec, self.policy, self.state.lora, groups, self.state.seed),
                weights=self.held,
                data=(labelled, groups, whole),
                stage=stage,
                runs=self._if_largest(bucket, _chunks(self.groups + self.drawn, spec.chunk)),
                pairs=spec.chunk * self.per_group,
            )
        for bucket in self.task.buckets if choose.needs_known(spec) else ():
            groups = _groups(self.mesh, bucket, spec.chunk, 2)
            before = [n - spec.selection.labels_per_round for n in self.labels]
            yield Program(
                name=f"{spec.selection.rule.design} of labelled pairs {tuple(bucket)}",
                function=staged.vectors_program,
                arguments=(spec, self.policy, self.state.lora, groups, self.state.seed),
                weights=self.held,
                data=(labelled, groups, whole, self._known()),
                stage=stage,
                runs=self._if_largest(bucket, _mean(_chunks(n, spec.chunk) for n in before)),
                pairs=spec.chunk,
            )

    def _selection(self) -> Program:
        evidence, known, count = self._pool_evidence(), self._known(), self.candidates
        empty = np.zeros((count, 3), np.int32), np.zeros((count, 4), np.uint32), np.zeros(count, bool)
        rows = choose.Rows(*_replicated(self.mesh, empty))
        return Program(
            name=f"selection, {self.strategy}",
            function=staged.select_program,
            arguments=(self.spec, self.state, rows, evidence, known),
            weights=self.held,
            data=(self.state.labelled, rows, evidence, known),
            stage="selection",
            runs=1,
            pairs=count,
        )

    def _training(self) -> Iterator[Program]:
        spec, state, mesh, training = self.spec, self.state, self.mesh, self.spec.training
        count, lora, stage = spec.selection.labels_per_round, _lora(self.task, self.mesh), "training"
        for bucket in self.task.buckets:
            groups = _groups(mesh, bucket, spec.chunk, 2)
            yield Program(
                name=f"reference {tuple(bucket)}, {self.strategy}",
                function=staged.measure_program,
                arguments=(spec, self.policy, state, groups),
                weights=self.held,
                data=(state.labelled, groups),
                stage=stage,
                runs=self._if_largest(bucket, _chunks(count, spec.chunk)),
                pairs=spec.chunk,
            )
        yield self._append()
        schedule = spec.schedule(np.arange(count), 1, 0)
        part = (schedule.slots[0][: training.microbatch], schedule.weight[0][: training.microbatch])
        share = _from_host(part)
        gradient = (_lora(self.task, mesh), _replicated(mesh, jax.eval_shape(optimiser.no_gradient, lora)[1]))
        opt_state = _laid_out(
            jax.eval_shape(lambda w: optimiser.init_optimiser(training.dpo.optimiser, w), lora),
            optimiser.optimiser_shardings(training.dpo.optimiser, mesh, lora),
        )
        weights = (self.held, lora, gradient, opt_state)
        learnt = [count] * len(self.labels) if training.on_newest else self.labels
        for bucket in self.task.buckets:
            parts = _mean(_parts(n, training.batch_size, training.microbatch) for n in learnt)
            yield Program(
                name=f"training gradient {tuple(bucket)}, {self.strategy}",
                function=staged.gradient_program,
                arguments=(spec, self.policy, lora, gradient, state.labelled, share, bucket),
                weights=weights,
                data=(state.labelled, share),
                stage=stage,
                runs=self._if_largest(bucket, training.epochs * parts),
                pairs=training.microbatch,
            )
        yield Program(
            name=f"training update, {self.strategy}",
            function=staged.update_program,
            arguments=(spec, lora, opt_state, gradient[0], *_from_host((jnp.int32(0), jnp.int32(0)))),
            weights=weights,
            data=state.labelled,
            stage=stage,
            runs=training.epochs * _mean(_chunks(n, training.batch_size) for n in learnt),
        )

    def _append(self) -> Program:
        spec, state, count = self.spec, self.state, self.spec.selection.labels_per_round
        picks = Picks(np.zeros(count, np.int32), np.zeros(count, np.float32))  # type: ignore[arg-type]
        groups = _groups(None, spec.bucket, count, 2)
        chosen = Chosen(picks, np.float32(0), groups, np.zeros((count, 4), np.uint32))  # type: ignore[arg-type]
        answers = Answers(np.zeros(count, np.float32), np.zeros(count, np.float32))  # type: ignore[arg-type]
        vectors = vector_size(spec) if spec.selection.frozen else None
        measured = learn.Measured(
            np.zeros((count, 2), np.float32),  # type: ignore[arg-type]
            None if vectors is None else np.zeros((count, vectors), np.float32),  # type: ignore[arg-type]
        )
        new = _from_host((chosen, answers, measured))
        return Program(
            name=f"labels kept, {self.strategy}",
            function=staged.append_program,
            arguments=(spec, state.labelled, *new),
            weights=self.held,
            data=(state.labelled, new),
            stage="training",
            runs=1,
        )

    def _pool_evidence(self) -> dict[str, Any]:
        """The evidence of all candidates, in rows that the devices divide."""
        spec = self.spec
        if not spec.needs:
            return {}
        padded = -(-self.candidates // self.mesh.size) * self.mesh.size
        groups = _groups(self.mesh, self.task.buckets[0], spec.chunk, self.responses)
        chunk = functools.partial(choose.chunk_evidence, spec)
        shapes = jax.eval_shape(chunk, self.policy, self.state.lora, groups, self.state.seed)
        rows = layout.rows(self.mesh)
        return {n: jax.ShapeDtypeStruct((padded, *x.shape[1:]), x.dtype, sharding=rows) for n, x in shapes.items()}

    def _known(self) -> Any:
        """The vectors of the labelled pairs, where the candidates do not include them."""
        size = vector_size(self.spec) if choose.needs_known(self.spec) else None
        if size is None:
            return None
        return _replicated(self.mesh, jax.eval_shape(lambda: jnp.zeros((self.spec.capacity, size))))

    def _if_largest(self, bucket: Bucket, runs: float) -> float:
        return runs if bucket == self.task.buckets[-1] else 0.0


def device_bytes(tree: Any) -> float:
    """The bytes that arrays (or their shapes) take on one device, from their shardings alone; without one, all of them."""
    total = 0
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
            shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
            total += math.prod(shape) * x.dtype.itemsize
    return float(total)


def _replicated(mesh: Mesh, tree: Any) -> Any:
    """Shapes of replicated arrays; shapes that have a sharding keep it."""

    def shape(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None:
            return x
        if isinstance(x, jax.Array) and x.committed:  # put on the mesh, whose devices are attached
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=layout.replicated(mesh))

    return jax.tree.map(shape, tree)


def _from_host(tree: Any) -> Any:
    """Shapes of arrays that the run hands over from the host: JAX puts them where the others are."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


def _lora(task: tasks.Task, mesh: Mesh) -> Any:
    """An adapter; every call makes another one."""
    return _weights(mesh, jax.eval_shape(lambda: start.fresh_lora(task.decoder, 0)))


def _weights(mesh: Mesh, tree: Any) -> Any:
    return _laid_out(tree, layout.weight_shardings(mesh, tree))


def _laid_out(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _groups(mesh: Mesh | None, bucket: Bucket, size: int, m: int) -> Groups:
    """A batch on the mesh, or zeros on the host."""
    shapes: tuple[tuple[int, ...], ...] = ((size, bucket.prompt), (size,), (size, m, bucket.response), (size, m))
    if mesh is None:
        return Groups(*(np.zeros(s, np.int32) for s in shapes))
    return Groups(*(jax.ShapeDtypeStruct(s, jnp.int32, sharding=layout.batch(mesh)) for s in shapes))  # type: ignore[arg-type]


def _chunks(count: int, size: int) -> int:
    return -(-count // size)


def _parts(examples: int, batch: int, microbatch: int) -> int:
    """The microbatches of an epoch, of a single bucket."""
    whole, rest = divmod(examples, batch)
    return whole * _chunks(batch, microbatch) + _chunks(rest, microbatch)


def _mean(counts: Iterator[int]) -> float:
    several = list(counts)
    return sum(several) / len(several)

