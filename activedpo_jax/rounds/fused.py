"""A round as one compiled program, where the answers are known on the device: learn ∘ ask ∘ choose.

The program shows no progress, and nothing leaves the device before its end.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax import layout
from activedpo_jax.data.groups import Bucket, Candidates, pad_groups
from activedpo_jax.models.policy import Policy
from activedpo_jax.oracles.labels import Label, Preference, Question
from activedpo_jax.oracles.reward import Reward, preferences
from activedpo_jax.resumable import NOTHING_SAVED, SavedWork, pieces
from activedpo_jax.rounds.checks import check_picks
from activedpo_jax.rounds.choose import DeviceCandidates, Rows, choose
from activedpo_jax.rounds.learn import learn, training_work
from activedpo_jax.rounds.picked import Picked, picked
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import Answers, Chosen, RoundResult, RunState
from activedpo_jax.training import losses, optimiser
from activedpo_jax.training.loop import Diverged

Ask = Callable[[Chosen], Answers]  # a `jax.tree_util.Partial`, so that arrays in it are arguments of the program
Source = Callable[[RoundSpec, Policy, RunState], DeviceCandidates]  # likewise


@functools.partial(jax.jit, static_argnums=0)
def fused_round(
    spec: RoundSpec,
    policy: Policy,
    state: RunState,
    source: Source,
    ask: Ask,
    schedule: optimiser.BatchSchedule,
) -> tuple[RunState, RoundResult, DeviceCandidates | None]:
    """One round of ActiveDPO (arXiv 2505.19241, algorithm 1), from one state to the next.

    One compilation serves every round and seed, and every adapter of the same shape.

    Args:
      source: of the candidates: `given` for those of a pool.
      ask: the oracle.
      schedule: for the number of labels after this round.

    Returns:
      the state, what there is to report, and the candidates if the policy has responded: nobody else knows them.
    """
    candidates = source(spec, policy, state)
    chosen = choose(spec, policy, state, candidates)
    answers = ask(chosen)
    state, training, good_steps = learn(spec, policy, state, chosen, answers, schedule)
    fresh = None if spec.sampling is None else candidates
    return state, RoundResult(chosen, answers, training, good_steps), fresh


def place(spec: RoundSpec, candidates: Candidates, bucket: Bucket) -> DeviceCandidates:
    """The candidates of a pool on the mesh.

    Args:
      candidates: every group with as many responses.
      bucket: which holds all of them.
    """
    count = candidates.num_groups
    groups = pad_groups(candidates, np.arange(count), bucket, -(-count // spec.chunk) * spec.chunk)
    groups = jax.tree.map(lambda x: x.reshape(-1, spec.chunk, *x.shape[1:]), groups)
    rows = layout.put(host_rows(candidates), layout.replicated(spec.mesh))
    return DeviceCandidates(layout.put(groups, layout.chunks(spec.mesh)), rows)


def host_rows(candidates: Candidates) -> Rows:
    valid = np.ones(candidates.num_pairs, bool) if candidates.valid is None else candidates.valid
    return Rows(candidates.pairs.astype(np.int32), candidates.digests, valid)  # type: ignore[arg-type]


def given(candidates: DeviceCandidates, spec: RoundSpec, policy: Policy, state: RunState) -> DeviceCandidates:
    """A source, as `jax.tree_util.Partial(given, place(...))`: the same candidates in every round."""
    return candidates


def known_answers(spec: RoundSpec, known: np.ndarray) -> Ask:
    """An oracle that knows the preference of every pair of the pool, [N], and looks up those that were picked."""
    return jax.tree_util.Partial(_look_up, layout.put(known.astype(np.float32), layout.replicated(spec.mesh)))


def _look_up(known: jax.Array, chosen: Chosen) -> Answers:
    found = known[chosen.picks.rows]
    return Answers(found, jnp.ones_like(found))


def rewarded(reward: Reward) -> Ask:
    """An oracle that prefers the response with the larger reward."""
    return jax.tree_util.Partial(_compare, reward)


def _compare(reward: Reward, chosen: Chosen) -> Answers:
    found = preferences(reward, chosen.groups)
    return Answers(found, jnp.ones_like(found))


class FusedRound:
    """The verbs of a round that runs as one program: it is run by the first, and the others tell what came of it.

    Args:
      source: what the program takes its candidates from, by the number of the round.
      candidates: the same on the host, once the program has run from a state.
      ask: the oracle of the program; name: of it, for the record.
      saved: what is kept of the round until it is evaluated.
    """

    answers_per_pair = 1
    asks_whole_rounds = False
    one_program = True

    def __init__(
        self,
        spec: RoundSpec,
        policy: Policy,
        source: Callable[[int], Source],
        candidates: Callable[[RunState, DeviceCandidates | None], Candidates],
        ask: tuple[Ask, str],
        saved: SavedWork = NOTHING_SAVED,
    ) -> None:
        self._spec, self._policy, self._source, self._candidates = spec, policy, source, candidates
        self._saved = saved
        self._ask, self._name = ask
        self._after: tuple[RunState, RoundResult, list[Question]] | None = None
        self.seconds: dict[str, float] = {}
        self.useful: float | None = None  # there is one shape, and nothing to choose

    def arguments(self, number: int, seed: int) -> tuple[Source, Ask, optimiser.BatchSchedule]:
        """What `fused_round` takes beside policy and state in round `number`."""
        return self._source(number), self._ask, self._schedule(number, seed)

    def _schedule(self, number: int, seed: int) -> optimiser.BatchSchedule:
        return self._spec.schedule(np.arange(number * self._spec.selection.labels_per_round), number, seed)

    def choose(self, state: RunState) -> Picked:
        """Runs the round, and returns its picks.

        Raises:
          FloatingPointError, ValueError: see `checks.check_picks`; or the oracle has no finite answer for a pick.
        """
        clock = time.perf_counter()
        number, size = int(state.round) + 1, int(state.labelled.size)
        arguments = self._policy, state, *self.arguments(number, int(state.seed))

        def run(_: int) -> Any:
            return jax.block_until_ready(fused_round(self._spec, *arguments))

        def like(_: int) -> Any:
            found = jax.eval_shape(functools.partial(fused_round, self._spec), *arguments)
            whole = layout.replicated(self._spec.mesh)
            result, fresh = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), found[1:])
            return state, result, fresh

        # One piece, so that neither a signal waits for the evaluation nor a restart computes the round again.
        ((after, result, fresh),) = pieces(self._saved, "round", 1, run, like)
        self.seconds = {"round": time.perf_counter() - clock}
        result = layout.get(result)
        candidates = self._candidates(state, fresh)
        picks = result.chosen.picks
        check_picks(picks, candidates, np.asarray(state.labelled.digests)[:size], number)
        found = picked(self._spec, candidates, picks, result.chosen.lam, number)
        unknown = np.flatnonzero(~np.isfinite(np.asarray(result.answers.preferences)))
        if len(unknown):
            raise ValueError(
                f"{self._name}: its reward of a response of pair {found.questions[unknown[0]].pair_id!r} is not finite "
                f"({len(unknown)} such of {len(found.questions)} pairs of round {number}); expected finite rewards: "
                "correct the function.  Nothing of this round was recorded"
            )
        self._after = (after, result, list(found.questions))
        return found

    def ask(self, questions: Sequence[Question]) -> list[Label]:
        """What the program's oracle said."""
        assert self._after is not None
        _, result, asked = self._after
        words: dict[float, Preference] = {0.0: "first", 0.5: "tie", 1.0: "second"}
        said = {q.pair_id: words[float(p)] for q, p in zip(asked, result.answers.preferences, strict=True)}
        return [Label(q.pair_id, said[q.pair_id], self._name) for q in questions]

    def learn(self, state: RunState, picks: Picked, answers: Answers) -> tuple[RunState, losses.DpoMetrics | None]:
        """The state after the round, and the means over the last epoch.

        Raises:
          Diverged: a loss is not finite; names the step.
        """
        assert self._after is not None
        after, result, _ = self._after
        self._after = None
        number, step = int(after.round), int(result.good_steps)
        schedule = self._schedule(number, int(after.seed))
        if step < schedule.num_steps:
            raise Diverged(training_work(number, schedule), step, float(result.training.loss))
        return after, result.training
