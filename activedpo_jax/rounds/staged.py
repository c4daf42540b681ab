"""A round in stages: `choose` and `learn` piece by piece, with progress, and the world in between.

For pools of several buckets or too large for one program, and for answers that come from outside.  Same picks, same
weights as `fused`.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax import layout
from activedpo_jax.data.groups import Bucket, Candidates, Groups, assign_buckets, microbatches, pad_groups
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy
from activedpo_jax.progress import progress
from activedpo_jax.resumable import NOTHING_SAVED, SavedWork, pieces
from activedpo_jax.rounds import choose, learn
from activedpo_jax.rounds.checks import check_picks
from activedpo_jax.rounds.choose import EvidenceRows
from activedpo_jax.rounds.fused import host_rows
from activedpo_jax.rounds.picked import Picked, as_chosen, picked
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import Answers, Chosen, Labelled, RunState, vector_size
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.training import losses, optimiser
from activedpo_jax.training.loop import descend

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


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def gradient_program(
    spec: RoundSpec,
    policy: Policy,
    lora: Lora,
    total: tuple[Lora, losses.DpoMetrics],
    labelled: Labelled,
    microbatch: learn.Microbatch,
) -> tuple[Lora, losses.DpoMetrics]:
    """Adds the part of a batch's gradient and metrics that comes from one microbatch; compiled once per bucket."""
    return learn.added(spec, total, learn.microbatch_gradient(spec, policy, lora, labelled, microbatch))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update_program(
    spec: RoundSpec, lora: Lora, opt_state: optax.OptState, gradient: Lora, position: optimiser.Position
) -> tuple[Lora, optax.OptState]:
    rate = optimiser.learning_rate(spec.training.dpo.optimiser, position)
    lora, opt_state = optimiser.update(spec.training.dpo.optimiser, lora, opt_state, gradient, rate)
    return layout.like_weights(spec.mesh, lora), learn.like_moments(spec, opt_state, lora)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def write_program(mesh: Mesh, pool: EvidenceRows, chunk: EvidenceRows, rows: jax.Array) -> EvidenceRows:
    """Writes a chunk's evidence [n, ...] to its rows of the pool's [N, ...], which are cut over all devices.

    Args:
      rows: [n] int32; −1: nowhere.
    """

    def write(part: jax.Array, chunk: jax.Array, rows: jax.Array) -> jax.Array:
        own = rows - jax.lax.axis_index(layout.AXES) * len(part)
        return part.at[jnp.where(own >= 0, own, len(part))].set(chunk, mode="drop")

    cut, whole = P(layout.AXES), P()
    share = jax.shard_map(write, mesh=mesh, in_specs=(cut, whole, whole), out_specs=cut)
    return jax.tree.map(lambda part, new: share(part, new, rows), pool, chunk)


@functools.partial(jax.jit, donate_argnums=0)
def _write_places(known: jax.Array, chunk: jax.Array, places: jax.Array) -> jax.Array:
    return known.at[places].set(chunk, mode="drop")


class Chunks:
    """The candidates' groups as padded chunks, bucket by bucket, each with the rows of its pairs among the candidates.

    Args:
      size: groups of a chunk.
    """

    def __init__(self, candidates: Candidates, buckets: Sequence[Bucket], size: int) -> None:
        self._candidates, self._buckets, self.size = candidates, buckets, size
        self.responses = candidates.responses_per_group
        self._parts = list(microbatches(assign_buckets(candidates, buckets), size))
        # Of a pair in its group: the number of canonical pairs before (i, j).
        group, low = candidates.pairs[:, 0], candidates.pairs[:, 1:].min(axis=1)
        high = candidates.pairs[:, 1:].max(axis=1)
        m = self.responses
        self._row_of = np.full((candidates.num_groups, m * (m - 1) // 2), -1, np.int32)
        self._row_of[group, low * m - low * (low + 1) // 2 + high - low - 1] = np.arange(len(group), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._parts)

    def members(self, number: int) -> np.ndarray:
        """The groups of a chunk, [≤ size]."""
        return self._parts[number][1]

    def groups(self, number: int, mesh: Mesh) -> Groups:
        """A chunk on the mesh."""
        b, members = self._parts[number]

        def part(own: slice) -> Groups:
            return pad_groups(self._candidates, members[own], self._buckets[b], len(range(*own.indices(self.size))))

        return layout.put_rows(part, self.size, layout.batch(mesh))

    def rows(self, number: int) -> np.ndarray:
        """Where the evidence about the pairs of a chunk belongs, [size · m(m−1)/2] int32; −1: there is no such pair."""
        members = self.members(number)
        rows = np.full((self.size, self._row_of.shape[1]), -1, np.int32)
        rows[: len(members)] = self._row_of[members]
        return rows.reshape(-1)


def pool_evidence(
    spec: RoundSpec,
    policy: Policy,
    state: RunState,
    candidates: Candidates,
    buckets: Sequence[Bucket],
    saved: SavedWork = NOTHING_SAVED,
) -> EvidenceRows:
    """What the strategy looks at, of all candidates in their order: [N, ...] each, cut over all devices.

    N is rounded up to what the devices divide; rows beyond the candidates are zero.
    """
    if not spec.needs:
        return {}
    mesh, chunks = spec.mesh, Chunks(candidates, buckets, spec.chunk)

    def compute(number: int) -> EvidenceRows:
        # Waits, else the bar would count what is only queued.
        groups = chunks.groups(number, mesh)
        return jax.block_until_ready(evidence_program(spec, policy, state.lora, groups, state.seed))

    shapes = jax.eval_shape(
        lambda groups: evidence_program(spec, policy, state.lora, groups, state.seed),
        like_groups(chunks.responses, buckets[0], spec.chunk),
    )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.batch(mesh)), shapes)
    total = padded(candidates.num_pairs, mesh)
    pool: EvidenceRows = {
        name: jnp.zeros((total, *x.shape[1:]), x.dtype, device=layout.rows(mesh)) for name, x in shapes.items()
    }
    stage = f"evidence_{len(chunks)}x{spec.chunk}"
    with progress(total=candidates.num_groups, desc=" and ".join(spec.needs), unit="prompt") as bar:
        for number, chunk in enumerate(pieces(saved, stage, len(chunks), compute, lambda _: like)):
            pool = write_program(mesh, pool, chunk, layout.put(chunks.rows(number), layout.replicated(mesh)))
            bar.update(len(chunks.members(number)))
    return jax.block_until_ready(pool)


def like_groups(m: int, bucket: Bucket, size: int) -> Groups:
    """The shapes of a chunk."""
    shapes = ((size, bucket.prompt), (size,), (size, m, bucket.response), (size, m))
    return Groups(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))  # type: ignore[arg-type]


def padded(rows: int, mesh: Mesh) -> int:
    """The least number of rows, at least this, that the devices divide."""
    return -(-rows // mesh.size) * mesh.size


def pick(
    spec: RoundSpec,
    policy: Policy,
    state: RunState,
    candidates: Candidates,
    buckets: Sequence[Bucket],
    saved: SavedWork = NOTHING_SAVED,
) -> tuple[Picks, jax.Array]:
    """The first verb: rows of the candidates to ask about, and λ as used."""
    evidence = pool_evidence(spec, policy, state, candidates, buckets, saved)
    known = None
    if choose.needs_known(spec):
        known = _of_labelled(spec, policy, state, buckets)
    rows = host_rows(candidates)
    missing = padded(candidates.num_pairs, spec.mesh) - candidates.num_pairs  # these are not valid
    rows = jax.tree.map(lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), rows)
    rows = layout.put(rows, layout.replicated(spec.mesh))
    return jax.block_until_ready(select_program(spec, state, rows, evidence, known))


def _of_labelled(spec: RoundSpec, policy: Policy, state: RunState, buckets: Sequence[Bucket]) -> jax.Array:
    """The vectors of the labelled pairs at the current θ, [C, D]; empty places are zero."""
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
    number = int(state.round) + 1
    usable = np.flatnonzero(np.asarray(labelled.weights) > 0)
    schedule = spec.schedule(usable, number, int(state.seed))
    bucket_of = _bucket_of(layout.get(labelled.groups), buckets)
    place = functools.partial(layout.put, sharding=layout.replicated(spec.mesh))

    def advance(step: int, lora: Lora, opt_state: optax.OptState) -> tuple[Lora, optax.OptState, losses.DpoMetrics]:
        present = schedule.weight[step] > 0
        slots, weight = schedule.slots[step][present], schedule.weight[step][present]
        total = no_gradient_program(spec, lora)
        for b, part in microbatches(bucket_of[slots], spec.training.microbatch):
            pad = (0, spec.training.microbatch - len(part))
            microbatch = place(learn.Microbatch(np.pad(slots[part], pad), np.pad(weight[part], pad), buckets[b]))
            total = gradient_program(spec, policy, lora, total, labelled, microbatch)
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
        self.seconds: dict[str, float] = {}

    def choose(self, state: RunState) -> Picked:
        """The picks of the round.

        Raises:
          FloatingPointError, ValueError: see `checks.check_picks`.
        """
        clock, number = time.perf_counter(), int(state.round) + 1
        candidates = self._source(state)
        middle = time.perf_counter()
        picks, lam = pick(self._spec, self._policy, state, candidates, self._buckets, self._saved)
        labelled = np.asarray(state.labelled.digests)[: int(state.labelled.size)]
        check_picks(picks, candidates, labelled, number)
        self.seconds = {"candidates": middle - clock, "choose": time.perf_counter() - middle}
        return picked(self._spec, candidates, picks, lam, number)

    def learn(self, state: RunState, picks: Picked, answers: Answers) -> tuple[RunState, losses.DpoMetrics | None]:
        """The state after the round, and the means over the last epoch; see `train`."""
        clock = time.perf_counter()
        asked = as_chosen(self._spec, picks), answers
        out = jax.block_until_ready(train(self._spec, self._policy, state, asked, self._buckets, self._saved))
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
