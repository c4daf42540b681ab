"""The evidence about the candidates of staged rounds, and when it is computed: in every round, or as `PassSpec` says.

With `every` = k a pass over all candidates comes every k rounds, and between two of them the evidence stays as it was:
selection then is that of the paper at the θ of the last pass.  With `in_reach` it is computed anew, between passes, for
the pairs that would be picked, until all picks rest on the current θ.  Scores of the others are taken to be bounds,
which is an approximation: a pair whose score has risen since the last pass may be missed.
"""

from collections.abc import Sequence

import numpy as np

from activedpo_jax import layout
from activedpo_jax.data.groups import Bucket, Candidates
from activedpo_jax.models.policy import Policy
from activedpo_jax.resumable import NOTHING_SAVED, SavedWork
from activedpo_jax.rounds.choose import EvidenceRows
from activedpo_jax.rounds.evidence_rows import OnDevices, OnHost
from activedpo_jax.rounds.pool_pass import Chunks, Part, Pass
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import RunState


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
    rows = PoolEvidence(Pass(spec, policy, buckets), saved).rows_for(state, candidates)
    assert isinstance(rows, OnDevices)
    return rows.arrays


class PoolEvidence:
    """The evidence about the candidates, from round to round.

    Args:
      saved: what is kept of the passes.
    """

    def __init__(self, one_pass: Pass, saved: SavedWork = NOTHING_SAVED) -> None:
        self.one_pass, self._saved = one_pass, saved
        self._rows: OnDevices | OnHost | None = None  # of the last round, where they are needed again
        self._number = self._since = 0  # the last round; that of the last pass
        self._current = np.zeros(0, bool)  # [groups] whether the evidence is that of the current θ
        self._turns = 0  # in which groups were brought up to date, in this round

    @property
    def computed(self) -> int:
        """The groups whose evidence is of the current θ."""
        return int(self._current.sum())

    def rows_for(self, state: RunState, candidates: Candidates) -> OnDevices | OnHost:
        """The evidence with which the round after this state begins."""
        spec, number = self.one_pass.spec, int(state.round) + 1
        rows, self._rows = self._rows, None
        if spec.passes.is_due(number):
            rows = None
        elif rows is None or self._number != number - 1:
            rows = self._restored(state, candidates, number)
        self._number, self._turns = number, 0
        self._current = np.full(candidates.num_groups, rows is None)
        if rows is None:
            self._since = number
            rows = self._empty(state, candidates)
            if spec.needs:
                chunks = self.one_pass.chunks(candidates)
                for part in self.one_pass.run(state, chunks, self._saved, _stage(chunks)):
                    _write(rows, chunks, part)
        self._saved.lasts(self._since)
        if spec.passes.reused:
            self._rows = rows
        return rows

    def brought_up_to_date(self, state: RunState, candidates: Candidates, picks: np.ndarray) -> bool:
        """Computes the evidence about the groups of these picks at the current θ, where it is not.

        Args:
          picks: [n ≥ K] rows of the candidates, those after the first K being next in line; −1: none.

        Returns:
          whether there was one among the first K, so that the picks may be others now.
        """
        groups = candidates.pairs[picks[picks >= 0], 0]
        count = self.one_pass.spec.selection.labels_per_round
        if np.all(self._current[groups[:count]]):
            return False
        assert self._rows is not None
        stale = np.unique(groups[~self._current[groups]])
        chunks, self._turns = self.one_pass.chunks(candidates, stale), self._turns + 1
        for part in self.one_pass.run(state, chunks, self._saved, f"reach_{self._turns}_{_stage(chunks)}"):
            _write(self._rows, chunks, part)
        self._current[stale] = True
        return True

    def _empty(self, state: RunState, candidates: Candidates) -> OnDevices | OnHost:
        spec, like = self.one_pass.spec, {}
        if spec.needs:
            like = self.one_pass.like(state, candidates.responses_per_group).evidence
        if spec.passes.on_host and spec.selection.rule.gains:
            return OnHost(like, candidates.num_pairs)
        return OnDevices(spec.mesh, like, candidates.num_pairs)

    def _restored(self, state: RunState, candidates: Candidates, number: int) -> OnDevices | OnHost | None:
        """What rounds before `number` have kept; None: there is no whole pass that counts still, or it is damaged."""
        spec, chunks = self.one_pass.spec, self.one_pass.chunks(candidates)
        like, stage = self.one_pass.like(state, candidates.responses_per_group), _stage(chunks)
        first = max(1, number - spec.passes.every + 1) if spec.passes.every else 1
        for since in range(number - 1, first - 1, -1):
            spans = self._saved.of_round(since).spans(stage)
            if spans and spans[-1][1] == len(chunks):
                break
        else:
            return None
        rows = self._empty(state, candidates)
        for earlier in range(since, number):
            saved = self._saved.of_round(earlier)
            stages = [stage] if earlier == since else sorted(saved.stages("reach_"), key=lambda s: int(s.split("_")[1]))
            for name in stages:
                for first, end in saved.spans(name):
                    parts = saved.restore(name, (first, end), [like] * (end - first))
                    if parts is None:
                        return None
                    for part in parts:
                        _write(rows, chunks, part)
        self._since = since
        return rows


def _write(rows: OnDevices | OnHost, chunks: Chunks, part: Part) -> None:
    members = np.asarray(layout.get(part.members))
    rows.write(part.evidence, chunks.rows(members))


def _stage(chunks: Chunks) -> str:
    return f"evidence_{len(chunks)}x{chunks.size}"
