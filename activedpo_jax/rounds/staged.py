"""A round in stages: `choose` and `learn` piece by piece, with progress, and the world in between.

For pools of several buckets or too large for one program, and for answers that come from outside.  Same picks, same
weights as `fused`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from activedpo_jax import layout
from activedpo_jax.data import batches
from activedpo_jax.data.groups import Bucket, Candidates, Groups
from activedpo_jax.data.packing import Lengths, Packing, minibatch
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy
from activedpo_jax.progress import progress
from activedpo_jax.resumable import NOTHING_SAVED, SavedWork
from activedpo_jax.rounds import choose, learn
from activedpo_jax.rounds.checks import check_picks
from activedpo_jax.rounds.fused import host_rows
from activedpo_jax.rounds.picked import Picked, as_chosen, picked
from activedpo_jax.rounds.pool_evidence import PoolEvidence
from activedpo_jax.rounds.pool_pass import Pass
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import Answers, Chosen, Labelled, RunState, vector_size
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.training import losses, optimiser
from activedpo_jax.training.loop import descend

vectors_program = jax.jit(choose.labelled_vectors, static_argnums=0)
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


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def gradient_program(
    spec: RoundSpec,
    policy: Policy,
    lora: Lora,
    total: tuple[Lora, losses.DpoMetrics],
    labelled: Labelled,
    microbatch: learn.Microbatch,
    whole: learn.Whole,
) -> tuple[Lora, losses.DpoMetrics]:
    """Adds the part of a batch's gradient and metrics that comes from one microbatch; compiled once per shape."""
    return learn.added(spec, total, learn.microbatch_gradient(spec, policy, lora, labelled, microbatch, whole))


@functools.partial(jax.jit, static_argnums=0)
def mismatch_program(
    spec: RoundSpec,
    policy: Policy,
    lora: Lora,
    total: jax.Array,
    labelled: Labelled,
    microbatch: learn.Microbatch,
    answered: jax.Array,
) -> jax.Array:
    """Adds the part of a batch's estimate of KL(π_θ ‖ π_ref) that comes from one microbatch, likewise."""
    return total + learn.mismatch(spec, policy, lora, labelled, microbatch, answered)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update_program(
    spec: RoundSpec, lora: Lora, opt_state: optax.OptState, gradient: Lora, position: optimiser.Position
) -> tuple[Lora, optax.OptState]:
    rate = optimiser.learning_rate(spec.training.dpo.optimiser, position)
    lora, opt_state = optimiser.update(spec.training.dpo.optimiser, lora, opt_state, gradient, rate)
    return layout.like_weights(spec.mesh, lora), learn.like_moments(spec, opt_state, lora)


@functools.partial(jax.jit, donate_argnums=0)
def _write_places(known: jax.Array, chunk: jax.Array, places: jax.Array) -> jax.Array:
    return known.at[places].set(chunk, mode="drop")


def pick(evidence: PoolEvidence, state: RunState, candidates: Candidates) -> tuple[Picks, jax.Array]:
    """The first verb: rows of the candidates to ask about, and λ as used."""
    spec = evidence.one_pass.spec
    pool = evidence.rows_for(state, candidates)
    known = None
    if choose.needs_known(spec):
        known = _of_labelled(evidence.one_pass, state)
    rows = host_rows(candidates)
    asked = spec if evidence.computed == candidates.num_groups else with_next_in_line(spec, candidates.num_pairs)
    while True:
        picks, lam = pool.select(asked, state, rows, known)
        if not spec.passes.in_reach or not evidence.brought_up_to_date(state, candidates, np.asarray(picks.rows)):
            break
    wanted = slice(spec.selection.labels_per_round)
    return picks._replace(rows=picks.rows[wanted], scores=picks.scores[wanted]), lam


def with_next_in_line(spec: RoundSpec, count: int) -> RoundSpec:
    """Selects, from `count` candidates, as many pairs again as are asked about, if these are to be brought up to date
    together."""
    if not spec.passes.in_reach:
        return spec
    several = min(2 * spec.selection.labels_per_round, count)
    return dataclasses.replace(spec, selection=dataclasses.replace(spec.selection, labels_per_round=several))


def _of_labelled(one_pass: Pass, state: RunState) -> jax.Array:
    """The vectors of the labelled pairs at the current θ, [C, D]; empty places are zero."""
    spec, policy, buckets = one_pass
    labelled = layout.get(state.labelled.groups)
    count = int(state.labelled.size)
    known = jnp.zeros((spec.capacity, vector_size(spec)), jnp.float32, device=layout.replicated(spec.mesh))
    with progress(total=count, desc="labelled pairs", unit="pair") as bar:
        for part, groups in _batches(spec, labelled, np.arange(count), buckets):
            places = np.full(spec.chunk, spec.capacity, np.int32)
            places[: len(part)] = part
            chunk = vectors_program(spec, policy, state.lora, groups, state.seed)
            known = jax.block_until_ready(_write_places(known, chunk, layout.put(places, layout.replicated(spec.mesh))))
            bar.update(len(part))
    return known


class Learning(NamedTuple):
    """Training under way, as it is kept."""

    lora: Lora
    opt_state: optax.OptState
    sums: losses.DpoMetrics  # over the steps of the last epoch so far


def train(
    spec: RoundSpec,
    policy: Policy,
    state: RunState,
    asked: tuple[Chosen, Answers],
    buckets: Sequence[Bucket],
    saved: SavedWork = NOTHING_SAVED,
) -> tuple[RunState, losses.DpoMetrics | None]:
    """The third verb: the state after the round, and the means over the last epoch.

    Returns:
      None for the means where no pair has a preference, so that nothing could be learnt.

    Raises:
      Diverged: a loss is not finite; names the step.
    """
    labelled = layout.put(_labelled(spec, policy, state, asked, buckets), layout.replicated(spec.mesh))
    lengths, preferences = layout.get((labelled.groups.response_len, labelled.preferences))
    number = int(state.round) + 1
    after = state._replace(labelled=labelled, round=jnp.int32(number))
    schedule, plan = _plan(spec, after, buckets)
    mismatched = _plan(spec, after, buckets, learn.others)[1] if spec.training.dpo.loss.needs_kl else None
    place = functools.partial(layout.put, sharding=layout.replicated(spec.mesh))

    def microbatch(step: int, part: _Part) -> learn.Microbatch:
        pad = (0, part.size - len(part.places))
        slots = np.pad(schedule.slots[step][part.places], pad, constant_values=-1)
        return place(
            learn.Microbatch(slots, np.pad(schedule.weight[step][part.places], pad), part.bucket, part.packing)
        )

    def estimated_kl(step: int, lora: Lora) -> jax.Array | None:
        if mismatched is None:
            return None
        total, answered = place(np.float32(0)), learn.others(schedule.slots[step], schedule.weight[step])
        for part in mismatched[step]:
            own = place(np.pad(answered[part.places], (0, part.size - len(part.places))))
            total = mismatch_program(spec, policy, lora, total, labelled, microbatch(step, part), own)
        return total

    def advance(step: int, lora: Lora, opt_state: optax.OptState) -> tuple[Lora, optax.OptState, losses.DpoMetrics]:
        share = learn.token_share(lengths, preferences, schedule.slots[step], schedule.weight[step])
        whole = learn.Whole(place(np.float32(share)), estimated_kl(step, lora))
        total = no_gradient_program(spec, lora)
        for part in plan[step]:
            total = gradient_program(spec, policy, lora, total, labelled, microbatch(step, part), whole)
        gradient, metrics = total
        position = place(optimiser.Position(np.int32(step), np.int32(schedule.num_steps)))
        return *update_program(spec, lora, opt_state, gradient, position), metrics

    done, learning = _resumed(spec, policy, state, saved)
    work = learn.training_work(number, schedule, done)
    for step in descend(work, learning.lora, learning.opt_state, advance):
        sums = learning.sums
        if step.number > schedule.num_steps - schedule.steps_per_epoch:
            sums = jax.tree.map(jnp.add, sums, step.report)
        learning = Learning(step.weights, step.opt_state, sums)
        if saved.is_due():
            saved.replace(_TRAINING, step.number, learning)
    state = RunState(learning.lora, labelled, state.seed, state.round + 1)
    if not schedule.num_steps:
        return state, None
    return state, jax.tree.map(lambda x: x / schedule.steps_per_epoch, learning.sums)


_TRAINING = "training"


class _Part(NamedTuple):
    """Pairs of a step that go through the model together."""

    places: np.ndarray  # [n] int64, in the step's batch
    size: int  # the number to which they are made up, at least n
    bucket: Bucket
    packing: Packing | None

    @property
    def tokens(self) -> int:
        """What is computed."""
        if self.packing is not None:
            return self.packing.tokens(2)
        return self.size * (self.bucket.prompt + 2 * self.bucket.response)


def _plan(
    spec: RoundSpec,
    after: RunState,
    buckets: Sequence[Bucket],
    answered: Callable[[np.ndarray, np.ndarray], Any] = lambda slots, weights: slots,
) -> tuple[optimiser.BatchSchedule, list[list[_Part]]]:
    """The labels of every step of a round's training, and their microbatches, as places in the step's batch.

    Args:
      after: the round, with its labels and its number.
      answered: of a batch's slots and weights, the slots of the responses that go with its prompts.
    """
    usable = np.flatnonzero(np.asarray(after.labelled.weights) > 0)
    schedule = spec.schedule(usable, int(after.round), int(after.seed))
    prompts, responses = layout.get((after.labelled.groups.prompt_len, after.labelled.groups.response_len))
    steps = []
    for step in range(schedule.num_steps):
        count = len(schedule.examples(step))
        slots, weights = schedule.slots[step, :count], schedule.weight[step, :count]
        own = prompts[slots], responses[answered(slots, weights)]
        steps.append(Lengths(*(x.astype(np.int64) for x in own)))
    if spec.packed:
        found = [minibatch(lengths, spec.packings) for lengths in steps]
        return schedule, [[_Part(rows, shape.groups, spec.bucket, shape) for rows, shape in part] for part in found]
    sizes = batches.sizes(spec.training.microbatch, layout.round_up(1, spec.mesh))
    cut = [batches.parts(_bucket_of(lengths, buckets), buckets, 2, sizes) for lengths in steps]
    return schedule, [[_Part(places, size, buckets[b], None) for b, places, size in part] for part in cut]


def _useful(spec: RoundSpec, after: RunState, buckets: Sequence[Bucket]) -> float | None:
    """The share of the tokens that a round's training computed that are text; None: nothing was learnt."""
    schedule, plan = _plan(spec, after, buckets)
    groups = after.labelled.groups
    lengths = np.asarray(groups.prompt_len) + np.asarray(groups.response_len).sum(axis=1)
    computed = sum(part.tokens for parts in plan for part in parts)
    text = sum(int(lengths[schedule.examples(step)].sum()) for step in range(schedule.num_steps))
    return text / computed if computed else None


def _resumed(spec: RoundSpec, policy: Policy, state: RunState, saved: SavedWork) -> tuple[int, Learning]:
    """The steps that are done, and the training after them."""
    start = policy.reference if spec.training.from_reference else state.lora
    # A step donates its adapter, and the one to start from must live on.
    fresh = Learning(
        jax.tree.map(jnp.copy, start),
        init_program(spec, start),
        layout.put(losses.DpoMetrics(*(jnp.float32(0),) * 3), layout.replicated(spec.mesh)),
    )
    for span in saved.spans(_TRAINING)[-1:]:
        if (kept := saved.restore(_TRAINING, span, fresh)) is not None:
            return span[1], kept
    return 0, fresh


def _labelled(
    spec: RoundSpec, policy: Policy, state: RunState, asked: tuple[Chosen, Answers], buckets: Sequence[Bucket]
) -> Labelled:
    """The labelled pairs with those of the round."""
    chosen, answers = asked
    groups = layout.get(chosen.groups)
    count = len(groups.prompt_len)
    shapes = jax.eval_shape(functools.partial(learn.measure, spec), policy, state, groups)
    measured = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    with progress(total=count, desc="reference", unit="pair") as bar:
        for part, batch in _batches(spec, groups, np.arange(count), buckets):
            found = layout.get(measure_program(spec, policy, state, batch))
            for whole, new in zip(jax.tree.leaves(measured), jax.tree.leaves(found), strict=True):
                whole[part] = new[: len(part)]
            bar.update(len(part))
    return append_program(spec, state.labelled, chosen, answers, measured)


class StagedRound:
    """The verbs of a round in stages.

    Args:
      source: of a round's candidates, for a state.
      buckets: which hold every candidate, the last of them all.
      saved: what is kept of a round under way.
    """

    one_program = False

    def __init__(
        self,
        spec: RoundSpec,
        policy: Policy,
        source: Callable[[RunState], Candidates],
        buckets: Sequence[Bucket],
        saved: SavedWork = NOTHING_SAVED,
    ) -> None:
        self._spec, self._policy, self._source, self._buckets, self._saved = spec, policy, source, buckets, saved
        self._evidence = PoolEvidence(Pass(spec, policy, buckets), saved)
        self.seconds: dict[str, float] = {}
        self.useful: float | None = None  # of the tokens that training computed, the share that are text

    def choose(self, state: RunState) -> Picked:
        """The picks of the round.

        Raises:
          FloatingPointError, ValueError: see `checks.check_picks`.
        """
        clock, number = time.perf_counter(), int(state.round) + 1
        candidates = self._source(state)
        middle = time.perf_counter()
        picks, lam = pick(self._evidence, state, candidates)
        labelled = np.asarray(state.labelled.digests)[: int(state.labelled.size)]
        check_picks(picks, candidates, labelled, number)
        self.seconds = {"candidates": middle - clock, "choose": time.perf_counter() - middle}
        found = picked(self._spec, candidates, picks, lam, number)
        if not self._spec.needs or self._evidence.computed == candidates.num_groups:
            return found
        return dataclasses.replace(found, computed=self._evidence.computed)

    def learn(self, state: RunState, picks: Picked, answers: Answers) -> tuple[RunState, losses.DpoMetrics | None]:
        """The state after the round, and the means over the last epoch; see `train`."""
        clock = time.perf_counter()
        asked = as_chosen(self._spec, picks), answers
        out = jax.block_until_ready(train(self._spec, self._policy, state, asked, self._buckets, self._saved))
        self.seconds |= {"learn": time.perf_counter() - clock}
        self.useful = _useful(self._spec, out[0], self._buckets)
        return out


def _batches(
    spec: RoundSpec, pairs: Groups, rows: np.ndarray, buckets: Sequence[Bucket]
) -> Iterator[tuple[np.ndarray, Groups]]:
    """Some pairs of wide groups, bucket by bucket: their rows, and a batch of `spec.chunk` on the mesh."""
    bucket_of = _bucket_of(Lengths(*(np.asarray(x)[rows] for x in (pairs.prompt_len, pairs.response_len))), buckets)
    for b, part, _ in batches.parts(bucket_of, buckets, 2, (spec.chunk,)):
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


def _bucket_of(pairs: Lengths, buckets: Sequence[Bucket]) -> np.ndarray:
    """The smallest bucket that holds each of some pairs."""
    prompt, response = pairs.prompts, pairs.responses.max(axis=1)
    return np.array([(prompt <= b.prompt) & (response <= b.response) for b in buckets]).argmax(axis=0)
