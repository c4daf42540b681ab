"""A round in stages: `choose` and `learn` piece by piece, with progress, and the world in between.

For pools of several buckets or too large for one program, and for answers that come from outside.  Same picks, same
weights as `fused`.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from activedpo_jax import layout
from activedpo_jax.data.groups import Bucket, Candidates, Groups, assign_buckets, microbatches, pad_groups
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy
from activedpo_jax.progress import progress
from activedpo_jax.rounds import choose, learn
from activedpo_jax.rounds.checks import check_picks
from activedpo_jax.rounds.choose import EvidenceRows
from activedpo_jax.rounds.fused import host_rows
from activedpo_jax.rounds.picked import Picked, as_chosen, picked
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import Answers, Chosen, Labelled, RunState, vector_size
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.training import losses, optimiser
from activedpo_jax.training.loop import Work, descend

evidence_program = jax.jit(choose.chunk_evidence, static_argnums=0)
vectors_program = jax.jit(choose.labelled_vectors, static_argnums=0)
select_program = jax.jit(choose.select, static_argnums=0)
measure_program = jax.jit(learn.measure, static_argnums=0)
append_program = jax.jit(learn.append, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def init_program(spec: RoundSpec, lora: Lora) -> optax.OptState:
    """The optimiser's state before the first step."""
    opt_state = optimiser.init_optimiser(spec.training.dpo.optimiser, lora)
    return learn.like_moments(spec, opt_state, lora)


@functools.partial(jax.jit, static_argnums=0)
def no_gradient_program(spec: RoundSpec, lora: Lora) -> tuple[Lora, losses.DpoMetrics]:
    """Zeros, to which the parts of a batch are added."""
    gradient, metrics = optimiser.no_gradient(lora)
    return layout.like_weights(spec.mesh, gradient), metrics


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def gradient_program(
    spec: RoundSpec,
    policy: Policy,
    lora: Lora,
    total: tuple[Lora, losses.DpoMetrics],
    labelled: Labelled,
    share: tuple[jax.Array, jax.Array],
    bucket: Bucket,
) -> tuple[Lora, losses.DpoMetrics]:
    """Adds the part of a batch's gradient and metrics that comes from one microbatch."""
    return learn.added(spec, total, learn.microbatch_gradient(spec, policy, lora, labelled, share, bucket))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update_program(
    spec: RoundSpec, lora: Lora, opt_state: optax.OptState, gradient: Lora, step: jax.Array, total: jax.Array
) -> tuple[Lora, optax.OptState]:
    rate = optimiser.learning_rate(spec.training.dpo.optimiser, step, total)
    lora, opt_state = optimiser.update(spec.training.dpo.optimiser, lora, opt_state, gradient, rate)
    return layout.like_weights(spec.mesh, lora), learn.like_moments(spec, opt_state, lora)


@jax.jit
def _assemble(chunks: list[Any], order: jax.Array) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *chunks)


def pool_evidence(
    spec: RoundSpec, policy: Policy, state: RunState, candidates: Candidates, buckets: Sequence[Bucket]
) -> EvidenceRows:
    """What the strategy looks at, of all candidates in their order: [N, ...] each."""
    if not spec.needs:
        return {}
    bucket_of = assign_buckets(candidates, buckets)
    m = candidates.responses_per_group
    per_group = m * (m - 1) // 2
    first_place = np.zeros(candidates.num_groups, np.int64)  # of a group's pairs in the concatenated chunks
    chunks: list[EvidenceRows] = []
    done = 0
    with progress(total=candidates.num_groups, desc=" and ".join(spec.needs), unit="prompt") as bar:
        for b, members in microbatches(bucket_of, spec.chunk):
            groups = layout.put(pad_groups(candidates, members, buckets[b], spec.chunk), layout.batch(spec.mesh))
            chunks.append(evidence_program(spec, policy, state.lora, groups, state.seed))
            first_place[members] = done + np.arange(len(members)) * per_group
            done += spec.chunk * per_group
            jax.block_until_ready(chunks[-1])  # else the bar would count what is only queued
            bar.update(len(members))
    # Of a pair in its group: the number of canonical pairs before (i, j).
    group, low = candidates.pairs[:, 0], candidates.pairs[:, 1:].min(axis=1)
    high = candidates.pairs[:, 1:].max(axis=1)
    return _assemble(chunks, first_place[group] + low * m - low * (low + 1) // 2 + high - low - 1)


def pick(
    spec: RoundSpec, policy: Policy, state: RunState, candidates: Candidates, buckets: Sequence[Bucket]
) -> tuple[Picks, jax.Array]:
    """The first verb: rows of the candidates to ask about, and λ as used."""
    evidence = pool_evidence(spec, policy, state, candidates, buckets)
    known = None
    if choose.needs_known(spec):
        known = _of_labelled(spec, policy, state, buckets)
    rows = layout.put(host_rows(candidates), layout.replicated(spec.mesh))
    return jax.block_until_ready(select_program(spec, state, rows, evidence, known))


def _of_labelled(spec: RoundSpec, policy: Policy, state: RunState, buckets: Sequence[Bucket]) -> jax.Array:
    """The vectors of the labelled pairs at the current θ, [C, D]; empty places are zero."""
    labelled = jax.device_get(state.labelled.groups)
    count = int(state.labelled.size)
    order = np.zeros(count, np.int64)
    chunks: list[jax.Array] = []
    with progress(total=count, desc="labelled pairs", unit="pair") as bar:
        for part, groups in _batches(spec, labelled, np.arange(count), buckets):
            order[part] = len(chunks) * spec.chunk + np.arange(len(part))
            chunks.append(vectors_program(spec, policy, state.lora, groups, state.seed))
            jax.block_until_ready(chunks[-1])
            bar.update(len(part))
    size = chunks[0].shape[1] if chunks else vector_size(spec)
    found = jnp.zeros((spec.capacity, size), jnp.float32)
    return found.at[:count].set(_assemble(chunks, order)) if chunks else found


def train(
    spec: RoundSpec,
    policy: Policy,
    state: RunState,
    chosen: Chosen,
    answers: Answers,
    buckets: Sequence[Bucket],
) -> tuple[RunState, losses.DpoMetrics | None]:
    """The third verb: the state after the round, and the means over the last epoch.

    Returns:
      None for the means where no pair has a preference, so that nothing could be learnt.

    Raises:
      FloatingPointError: a loss is not finite; names the step.
    """
    groups = jax.device_get(chosen.groups)
    count = len(groups.prompt_len)
    shapes = jax.eval_shape(functools.partial(learn.measure, spec), policy, state, groups)
    measured = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    with progress(total=count, desc="reference", unit="pair") as bar:
        for part, batch in _batches(spec, groups, np.arange(count), buckets):
            found = jax.device_get(measure_program(spec, policy, state, batch))
            for whole, new in zip(jax.tree.leaves(measured), jax.tree.leaves(found), strict=True):
                whole[part] = new[: len(part)]
            bar.update(len(part))
    labelled = append_program(spec, state.labelled, chosen, answers, measured)
    labelled = layout.put(labelled, layout.replicated(spec.mesh))

    number = int(state.round) + 1
    usable = np.flatnonzero(np.asarray(labelled.weights) > 0)
    schedule = spec.schedule(usable, number, int(state.seed))
    bucket_of = _bucket_of(jax.device_get(labelled.groups), buckets)
    # The step donates its adapter, and the one to start from must live on.
    lora = jax.tree.map(jnp.copy, policy.reference if spec.training.from_reference else state.lora)
    opt_state = init_program(spec, lora)

    def advance(step: int, lora: Lora, opt_state: optax.OptState) -> tuple[Lora, optax.OptState, losses.DpoMetrics]:
        present = schedule.weight[step] > 0
        slots, weight = schedule.slots[step][present], schedule.weight[step][present]
        total = no_gradient_program(spec, lora)
        for b, part in microbatches(bucket_of[slots], spec.training.microbatch):
            pad = (0, spec.training.microbatch - len(part))
            share = np.pad(slots[part], pad), np.pad(weight[part], pad)
            total = gradient_program(spec, policy, lora, total, labelled, share, buckets[b])
        gradient, metrics = total
        place, count = jnp.int32(step), jnp.int32(schedule.num_steps)
        return *update_program(spec, lora, opt_state, gradient, place, count), metrics

    last_epoch: list[Any] = []
    work = Work(f"training, round {number}", 0, schedule.num_steps, "config.dpo.learning_rate")
    for done in descend(work, lora, opt_state, advance):
        lora = done.weights
        if done.number > schedule.num_steps - schedule.steps_per_epoch:
            last_epoch.append(done.report)
    state = RunState(lora, labelled, state.seed, state.round + 1)
    if not last_epoch:
        return state, None
    return state, jax.tree.map(lambda *x: jnp.mean(jnp.stack(x)), *last_epoch)


class StagedRound:
    """The verbs of a round in stages.

    Args:
      source: of a round's candidates, for a state.
      buckets: which hold every candidate, the last of them all.
    """

    one_program = False

    def __init__(
        self,
        spec: RoundSpec,
        policy: Policy,
        source: Callable[[RunState], Candidates],
        buckets: Sequence[Bucket],
    ) -> None:
        self._spec, self._policy, self._source, self._buckets = spec, policy, source, buckets
        self.seconds: dict[str, float] = {}

    def choose(self, state: RunState) -> Picked:
        """The picks of the round.

        Raises:
          FloatingPointError, ValueError: see `checks.check_picks`.
        """
        clock, number = time.perf_counter(), int(state.round) + 1
        candidates = self._source(state)
        middle = time.perf_counter()
        picks, lam = pick(self._spec, self._policy, state, candidates, self._buckets)
        labelled = np.asarray(state.labelled.digests)[: int(state.labelled.size)]
        check_picks(picks, candidates, labelled, number)
        self.seconds = {"candidates": middle - clock, "choose": time.perf_counter() - middle}
        return picked(self._spec, candidates, picks, lam, number)

    def learn(self, state: RunState, picks: Picked, answers: Answers) -> tuple[RunState, losses.DpoMetrics | None]:
        """The state after the round, and the means over the last epoch; see `train`."""
        clock = time.perf_counter()
        chosen = as_chosen(self._spec, picks)
        out = jax.block_until_ready(train(self._spec, self._policy, state, chosen, answers, self._buckets))
        self.seconds |= {"learn": time.perf_counter() - clock}
        return out


def _batches(
    spec: RoundSpec, pairs: Groups, rows: np.ndarray, buckets: Sequence[Bucket]
) -> Iterator[tuple[np.ndarray, Groups]]:
    """Some pairs of wide groups, bucket by bucket: their rows, and a batch of `spec.chunk` on the mesh."""
    for b, part in microbatches(_bucket_of(Groups(*(x[rows] for x in pairs)), buckets), spec.chunk):
        prompt, response = buckets[b]
        chunk = np.pad(rows[part], (0, spec.chunk - len(part)), mode="edge")
        width = pairs.prompt_ids.shape[1]
        batch = Groups(
            pairs.prompt_ids[chunk, width - prompt :],
            pairs.prompt_len[chunk],
            pairs.response_ids[chunk, :, :response],
            pairs.response_len[chunk],
        )
        yield rows[part], layout.put(batch, layout.batch(spec.mesh))


def _bucket_of(pairs: Groups, buckets: Sequence[Bucket]) -> np.ndarray:
    """The smallest bucket that holds each of some pairs."""
    prompt, response = np.asarray(pairs.prompt_len), np.asarray(pairs.response_len).max(axis=1)
    return np.array([(prompt <= b.prompt) & (response <= b.response) for b in buckets]).argmax(axis=0)
