"""The programs of a strategy's rounds, fused or staged."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from activedpo_jax import layout, specs, tasks, verbs
from activedpo_jax.compile_only import shapes
from activedpo_jax.compile_only.program import Program, chunks, mean, parts
from activedpo_jax.data.groups import Bucket
from activedpo_jax.models.policy import Policy
from activedpo_jax.rounds import choose, evidence_rows, fresh, fused, learn, pool_pass, staged
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import Answers, Chosen, RunState, empty_labelled, vector_size
from activedpo_jax.selection import held, host, streamed
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.training import optimiser


class RoundPrograms:
    """The programs of the rounds of one strategy."""

    def __init__(self, config: ml_collections.ConfigDict, task: tasks.Task, spec: RoundSpec) -> None:
        self.config, self.task, self.spec, self.mesh = config, task, spec, spec.mesh
        self.strategy = spec.selection.strategy
        self.policy = Policy(task.decoder, task.params_shape, shapes.lora(task, self.mesh))
        seed, number = shapes.replicated(self.mesh, (jnp.uint32(0), jnp.int32(0)))
        labelled = shapes.replicated(self.mesh, jax.eval_shape(lambda: empty_labelled(spec)))
        self.state = RunState(shapes.lora(task, self.mesh), labelled, seed, number)
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
        # What evidence lies on the devices while a round selects, and, if later rounds need it, at all other times.
        on_host = spec.passes.on_host and spec.selection.rule.gains
        self.evidence = {} if on_host else self._pool_evidence()
        self.kept = (labelled, self.evidence if spec.passes.reused else {})
        self.labels = [t * spec.selection.labels_per_round for t in range(1, config.rounds + 1)]  # after each round

    def all(self) -> Iterator[Program]:
        if specs.is_fused(self.config, self.task):
            yield self._fused()
            return
        if self.spec.sampling is not None:
            yield from self._generation()
        yield from self._evidence()
        yield from self._selection()
        yield from self._training()

    def _fused(self) -> Program:
        rounds = verbs.make(self.config, self.spec, self.task, self.policy, self.config.seeds[0])
        assert isinstance(rounds, fused.FusedRound)
        source, ask, schedule = shapes.replicated(self.mesh, rounds.arguments(1, self.config.seeds[0]))
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
        turned = jax.eval_shape(functools.partial(fresh.unrolled, spec), self.policy, self.state)
        try:  # nobody but the compiler decides how the copy is laid out
            shardings = fresh.unrolled_program.lower(*arguments).compile().output_shardings
            copy = shapes.laid_out(turned, shardings)
        except jax.errors.JaxRuntimeError:  # it does not fit, which the row of this program will say
            copy = shapes.replicated(self.mesh, turned)
        labelled = self.state.labelled
        yield Program("weights for sampling", fresh.unrolled_program, arguments, held, labelled, "generation", runs=1)
        widths = sorted({bucket.prompt for bucket in self.task.buckets})
        for width in widths:
            ids, length, _, _ = shapes.groups(self.mesh, Bucket(width, 1), spec.chunk, 1)
            prompts = fresh.Prompts(ids, length)
            yield Program(
                name=f"responses {(width, spec.sampling.length)}",
                function=fresh.chunk_program,
                arguments=(spec, copy, self.state.seed, self.state.round, prompts),
                weights=(held, copy),
                data=(labelled, prompts),
                stage="generation",
                runs=chunks(self.drawn, spec.chunk) if width == widths[-1] else 0,
                pairs=spec.chunk * (spec.responses * (spec.responses - 1) // 2),
                iterations=spec.sampling.length - 1,
                reread=shapes.device_bytes(copy) + self._cache_bytes(width),
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
        whole = self.evidence
        stage = "features"
        for bucket in self.task.buckets if spec.needs else ():
            groups = shapes.groups(self.mesh, bucket, spec.chunk, self.responses)
            yield Program(
                name=f"{' and '.join(spec.needs)} {tuple(bucket)}",
                function=pool_pass.evidence_program,
                arguments=(spec, self.policy, self.state.lora, groups, self.state.seed),
                weights=self.held,
                data=(labelled, groups, whole),
                stage=stage,
                runs=self._if_largest(bucket, self._chunks()),
                pairs=spec.chunk * self.per_group,
            )
        if whole:
            rows = shapes.replicated(self.mesh, np.zeros(spec.chunk * self.per_group, np.int32))
            new = self._chunk_evidence()
            yield Program(
                name=f"{' and '.join(spec.needs)} kept, {self.strategy}",
                function=evidence_rows.write_program,
                arguments=(self.mesh, whole, new, rows),
                weights=self.held,
                data=(labelled, whole, new, rows),
                stage=stage,
                runs=self._chunks(),
            )
        for bucket in self.task.buckets if choose.needs_known(spec) else ():
            groups = shapes.groups(self.mesh, bucket, spec.chunk, 2)
            before = [n - spec.selection.labels_per_round for n in self.labels]
            yield Program(
                name=f"{spec.selection.rule.design} of labelled pairs {tuple(bucket)}",
                function=staged.vectors_program,
                arguments=(spec, self.policy, self.state.lora, groups, self.state.seed),
                weights=self.held,
                data=(labelled, groups, whole, self._known()),
                stage=stage,
                runs=self._if_largest(bucket, mean(chunks(n, spec.chunk) for n in before)),
                pairs=spec.chunk,
            )

    def _chunks(self) -> float:
        """Chunks of groups whose evidence is computed in a round, in the mean; of those within reach of selection,
        which only a run can tell, as many as have the pairs that are asked about and the next in line."""
        spec, groups = self.spec, self.groups + self.drawn
        rounds = [number + 1 for number in range(len(self.labels))]
        between = min(2 * spec.selection.labels_per_round, groups) if spec.passes.in_reach else 0
        return mean(chunks(groups if spec.passes.is_due(number) else between, spec.chunk) for number in rounds)

    def _selection(self) -> Iterator[Program]:
        if self.spec.needs and not self.evidence:
            yield from self._selection_in_blocks()
            return
        evidence, known, count = self.evidence, self._known(), evidence_rows.padded(self.candidates, self.mesh)
        empty = np.zeros((count, 3), np.int32), np.zeros((count, 4), np.uint32), np.zeros(count, bool)
        rows = choose.Rows(*shapes.replicated(self.mesh, empty))
        yield Program(
            name=f"selection, {self.strategy}",
            function=evidence_rows.select_program,
            arguments=(staged.with_next_in_line(self.spec, self.candidates), self.state, rows, evidence, known),
            weights=self.held,
            data=(self.state.labelled, rows, evidence, known),
            stage="selection",
            runs=1,
            pairs=self.candidates,
        )

    def _selection_in_blocks(self) -> Iterator[Program]:
        """From vectors on the host; how often rows are held depends on the pool."""
        selection, mesh = staged.with_next_in_line(self.spec, self.candidates).selection, self.mesh
        assert selection.rule.design is not None
        (vectors,) = (x for name, x in self._pool_evidence().items() if name == selection.rule.design)
        size, dim = min(selection.block, chunks(self.candidates, mesh.size)) * mesh.size, vectors.shape[1]

        def rows(dtype: Any, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=layout.rows(mesh))

        block, numbers = rows(vectors.dtype, dim), rows(jnp.int32)
        some = held.Rows(rows(jnp.float32), rows(jnp.float32), rows(jnp.int32))
        w, lam, limit = shapes.replicated(
            mesh, (jax.ShapeDtypeStruct((self.spec.capacity, dim), jnp.float32), np.float32(0), np.int32(0))
        )
        progress = shapes.replicated(mesh, jax.eval_shape(lambda w: held.begin(w, selection.labels_per_round), w))
        digests = shapes.replicated(mesh, np.zeros((self.candidates, 4), np.uint32))
        (filled,) = shapes.from_host((np.zeros(self.spec.capacity, bool),))
        marks = (digests, self.state.labelled.digests, filled)
        for name, program, arguments, runs in (
            ("labelled pairs", evidence_rows.taken_program, marks, 1),
            ("posterior", host.condition_program, (w, filled, shapes.from_host(np.float32(0))), 1),
            ("first pass", streamed.variances_program, (mesh, block, w, lam), chunks(self.candidates, size)),
            ("picks", streamed.hold_program, (mesh, block, some, numbers, progress, held.Bar(lam, limit, lam)), 1),
            ("further passes", streamed.refresh_program, (mesh, block, *some, progress), 0),
        ):
            yield Program(
                name=f"selection in blocks, {name}, {self.strategy}",
                function=program,
                arguments=arguments,
                weights=self.held,
                data=(self.state.labelled, self._known(), arguments),
                stage="selection",
                runs=runs,
                pairs=size,
            )

    def _training(self) -> Iterator[Program]:
        spec, state, mesh, training = self.spec, self.state, self.mesh, self.spec.training
        count, lora, stage = spec.selection.labels_per_round, shapes.lora(self.task, self.mesh), "training"
        for bucket in self.task.buckets:
            groups = shapes.groups(mesh, bucket, spec.chunk, 2)
            yield Program(
                name=f"reference {tuple(bucket)}, {self.strategy}",
                function=staged.measure_program,
                arguments=(spec, self.policy, state, groups),
                weights=self.held,
                data=(self.kept, groups),
                stage=stage,
                runs=self._if_largest(bucket, chunks(count, spec.chunk)),
                pairs=spec.chunk,
            )
        yield self._append()
        schedule = spec.schedule(np.arange(count), 1, 0)
        slots, share = (x[0][: training.microbatch] for x in (schedule.slots, schedule.weight))
        gradient = (
            shapes.lora(self.task, mesh),
            shapes.replicated(mesh, jax.eval_shape(optimiser.no_gradient, lora)[1]),
        )
        opt_state = shapes.laid_out(
            jax.eval_shape(lambda w: optimiser.init_optimiser(training.dpo.optimiser, w), lora),
            optimiser.optimiser_shardings(training.dpo.optimiser, mesh, lora),
        )
        weights = (self.held, lora, gradient, opt_state)
        learnt = [count] * len(self.labels) if training.on_newest else self.labels
        yield Program(
            name=f"moments at first, {self.strategy}",
            function=staged.init_program,
            arguments=(spec, lora),
            weights=(self.held, lora),
            data=self.kept,
            stage=stage,
            runs=1,
        )
        number = shapes.replicated(mesh, np.float32(0))
        kl = number if training.dpo.loss.needs_kl else None
        whole = learn.Whole(number, kl)
        for bucket in self.task.buckets:
            microbatch = shapes.replicated(mesh, learn.Microbatch(slots, share, bucket))
            microbatches = mean(parts(n, training.batch_size, training.microbatch) for n in learnt)
            yield Program(
                name=f"training gradient {tuple(bucket)}, {self.strategy}",
                function=staged.gradient_program,
                arguments=(spec, self.policy, lora, gradient, state.labelled, microbatch, whole),
                weights=weights,
                data=(self.kept, microbatch),
                stage=stage,
                runs=self._if_largest(bucket, training.epochs * microbatches),
                pairs=training.microbatch,
            )
            if kl is None:
                continue
            yield Program(
                name=f"estimated KL {tuple(bucket)}, {self.strategy}",
                function=staged.mismatch_program,
                arguments=(spec, self.policy, lora, kl, state.labelled, microbatch, microbatch.slots),
                weights=weights,
                data=(self.kept, microbatch),
                stage=stage,
                runs=self._if_largest(bucket, training.epochs * microbatches),
                pairs=training.microbatch,
            )
        yield Program(
            name=f"training update, {self.strategy}",
            function=staged.update_program,
            arguments=(spec, lora, opt_state, gradient[0], optimiser.Position(state.round, state.round)),
            weights=weights,
            data=self.kept,
            stage=stage,
            runs=training.epochs * mean(chunks(n, training.batch_size) for n in learnt),
        )

    def _append(self) -> Program:
        spec, state, count = self.spec, self.state, self.spec.selection.labels_per_round
        picks = Picks(np.zeros(count, np.int32), np.zeros(count, np.float32))  # type: ignore[arg-type]
        groups = shapes.groups(None, spec.bucket, count, 2)
        chosen = Chosen(picks, np.float32(0), groups, np.zeros((count, 4), np.uint32))  # type: ignore[arg-type]
        answers = Answers(np.zeros(count, np.float32), np.zeros(count, np.float32))  # type: ignore[arg-type]
        vectors = vector_size(spec) if spec.selection.frozen else None
        measured = learn.Measured(
            np.zeros((count, 2), np.float32),  # type: ignore[arg-type]
            None if vectors is None else np.zeros((count, vectors), np.float32),  # type: ignore[arg-type]
        )
        new = shapes.from_host((chosen, answers, measured))
        return Program(
            name=f"labels kept, {self.strategy}",
            function=staged.append_program,
            arguments=(spec, state.labelled, *new),
            weights=self.held,
            data=(self.kept, new),
            stage="training",
            runs=1,
        )

    def _pool_evidence(self) -> dict[str, Any]:
        """The evidence of all candidates."""
        if not self.spec.needs:
            return {}
        total, cut = evidence_rows.padded(self.candidates, self.mesh), layout.rows(self.mesh)
        rows = self._chunk_evidence()
        return {n: jax.ShapeDtypeStruct((total, *x.shape[1:]), x.dtype, sharding=cut) for n, x in rows.items()}

    def _chunk_evidence(self) -> dict[str, Any]:
        """That of one chunk."""
        groups = shapes.groups(self.mesh, self.task.buckets[0], self.spec.chunk, self.responses)
        chunk = functools.partial(choose.chunk_evidence, self.spec)
        rows = jax.eval_shape(chunk, self.policy, self.state.lora, groups, self.state.seed)
        cut = layout.batch(self.mesh)
        return {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut) for n, x in rows.items()}

    def _known(self) -> Any:
        """The vectors of the labelled pairs, where the candidates do not include them."""
        size = vector_size(self.spec) if choose.needs_known(self.spec) else None
        if size is None:
            return None
        return shapes.replicated(self.mesh, jax.eval_shape(lambda: jnp.zeros((self.spec.capacity, size))))

    def _if_largest(self, bucket: Bucket, runs: float) -> float:
        return runs if bucket == self.task.buckets[-1] else 0.0
