"""The pairs that a round asks about, on the host: what is put on record, asked, and learnt from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from activedpo_jax import layout
from activedpo_jax.data.groups import Candidates
from activedpo_jax.oracles.labels import Label, Question, question_groups
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import Answers, Chosen
from activedpo_jax.selection.greedy import Picks


@dataclasses.dataclass(frozen=True)
class Picked:
    """K pairs in the order in which they were picked."""

    questions: Sequence[Question]
    scores: Sequence[float]  # what the strategy ranked them by; all 0 where it ranks by nothing
    lam: float  # λ as used; see `posterior.resolved_lam`
    fallback: bool  # the strategy had nothing to rank by and picked at random
    fresh: Candidates | None = None  # what the policy responded this round, which nobody else knows
    computed: int | None = None  # prompts with evidence of the current θ, where others have that of an earlier one


def picked(spec: RoundSpec, candidates: Candidates, picks: Picks, lam: Any, number: int) -> Picked:
    """The picks of round `number` among these candidates, which `checks.check_picks` has passed."""
    rows, scores, fallback = np.asarray(picks.rows), np.asarray(picks.scores), bool(picks.fallback)
    digests = candidates.digests
    questions = []
    for row, score in zip(rows, scores, strict=True):
        group, *shown = candidates.pairs[row]
        first, second = (candidates.response_texts[group][i] for i in shown)
        questions.append(
            Question(
                pair_id=candidates.pair_ids[row],
                prompt=candidates.prompt_texts[group],
                first=first,
                second=second,
                score=float(score) if spec.selection.rule.ranks and not fallback else None,
                round=number,
                prompt_tokens=candidates.prompt_tokens[group].tolist(),
                first_tokens=candidates.response_tokens[group][shown[0]].tolist(),
                second_tokens=candidates.response_tokens[group][shown[1]].tolist(),
                digest=digests[row].tolist(),
            )
        )
    return Picked(questions, scores.tolist(), float(lam), fallback, candidates if candidates.fresh else None)


def as_chosen(spec: RoundSpec, picks: Picked) -> Chosen:
    """The same on the mesh, for `staged.train`."""
    groups = question_groups(picks.questions, spec.bucket)
    digests = np.array([q.digest for q in picks.questions], np.uint32)
    # The rows are those of candidates that are gone; nothing after the first verb looks at them.
    rows = np.full(len(picks.questions), -1, np.int32)
    chosen = Chosen(
        Picks(rows, np.array(picks.scores, np.float32), np.bool_(picks.fallback)),  # type: ignore[arg-type]
        np.float32(picks.lam),  # type: ignore[arg-type]
        groups,
        digests,  # type: ignore[arg-type]
    )
    return layout.put(chosen, layout.replicated(spec.mesh))


def as_answers(spec: RoundSpec, labels: Sequence[Label]) -> Answers:
    """What was said of a round's pairs, in pick order, on the mesh."""
    preference = {"first": 0.0, "second": 1.0}
    known = [label.preference in ("first", "second", "tie") for label in labels]
    answers = Answers(
        np.array([preference.get(label.preference, 0.5) for label in labels], np.float32),  # type: ignore[arg-type]
        np.array([label.weight if k else 0.0 for label, k in zip(labels, known, strict=True)], np.float32),  # type: ignore[arg-type]
    )
    return layout.put(answers, layout.replicated(spec.mesh))
