"""What was asked in a round and what was answered, each on disk before anything comes of it.

DIR/rounds/NNN/asked.jsonl       the round's picks, in pick order, with their tokens; whole before they are asked
DIR/rounds/NNN/responses.jsonl   in on-policy rounds, all that the policy responded
DIR/rounds/NNN/labels.jsonl      the answers, a line each as it comes; only ever appended to
DIR/rounds/NNN/selected.jsonl    the two joined, once every pick has its label; see `folders.Selected`

A label once received is never asked for again, whatever kills the process: what the files hold is taken up.  Of
several processes, the first alone reads, writes and asks.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from activedpo_jax.data.groups import Candidates
from activedpo_jax.files import append_lines, plain, read_lines, write_atomic
from activedpo_jax.hosts import on_first
from activedpo_jax.oracles.labels import PREFERENCES, Label, Oracle, Pending, Question
from activedpo_jax.rounds.picked import Picked


class Verdict(NamedTuple):
    """What the answers to one question come to."""

    label: Label
    agreeing: float  # share of the pairs of votes that agree; NaN of fewer than two


class RoundRecord:
    """The files of one round.

    Args:
      folder: of the run.
      number: of the round.
    """

    def __init__(self, folder: pathlib.Path, number: int) -> None:
        self.folder = folder / "rounds" / f"{number:03d}"
        self.number = number
        self._asked, self._labels = self.folder / "asked.jsonl", self.folder / "labels.jsonl"

    @on_first
    def picked(self) -> Picked | None:
        """What was asked before the process was killed; None: nothing yet.

        Raises:
          ValueError: a line is not what `ask` writes; names file and line.
        """
        if not self._asked.exists():
            return None
        rows = list(_records(self._asked))
        if not rows:
            raise ValueError(f"{self._asked}: is empty; restore the file, or remove it to pick anew")
        head, questions = rows[0][1], []
        for location, row in rows[1:]:
            try:
                questions.append(Question(**row))
            except TypeError as error:
                raise ValueError(f"{location}: not a question ({error}); restore the file") from error
        try:
            return Picked(questions, head["scores"], head["lam"], head["fallback"], computed=head.get("computed"))
        except KeyError as error:
            raise ValueError(f"{rows[0][0]}: {error} is missing; restore the file") from error

    @on_first
    def ask(self, picked: Picked) -> None:
        """Puts the picks on record, and what the policy responded."""
        if picked.fresh is not None:
            self._write_responses(picked.fresh)
        head = {"round": self.number, "lam": picked.lam, "fallback": picked.fallback, "scores": picked.scores}
        if picked.computed is not None:
            head["computed"] = picked.computed
        rows = [head, *(dataclasses.asdict(question) for question in picked.questions)]
        write_atomic(self._asked, "".join(_line(row) for row in rows))

    def _write_responses(self, candidates: Candidates) -> None:
        """Of every prompt all responses, whether they are asked about or not."""
        first = candidates.num_groups - candidates.fresh
        rows = [
            {"prompt": candidates.prompt_texts[g], "responses": list(candidates.response_texts[g])}
            for g in range(first, candidates.num_groups)
        ]
        write_atomic(self.folder / "responses.jsonl", "".join(_line(row) for row in rows))

    def answers(self) -> list[Label]:
        """The answers so far, in the order in which they came.  A last line that was cut short by a crash is taken
        away: its answer was never acknowledged, and comes again.

        Raises:
          ValueError: another line is not what `add` writes; names file and line.
        """
        labels = []
        for location, row in _records(self._labels):
            try:
                label = Label(**row)
            except TypeError as error:
                raise ValueError(f"{location}: not a label ({error}); restore the file") from error
            if label.preference not in PREFERENCES:
                raise ValueError(f"{location}: got {label.preference!r}, expected one of {', '.join(PREFERENCES)}")
            labels.append(label)
        return labels

    def add(self, labels: Sequence[Label]) -> int:
        """Appends the answers that are new, or that change what the same annotator said of the same pair before, and
        returns once they are on disk.

        Returns:
          how many answers were overruled by a later one of the same annotator.
        """
        recorded, lines, overruled = _latest(self.answers()), [], 0
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        for answer_key, label in _latest(labels).items():
            said = {(x.preference, x.weight) for x in labels if (x.pair_id, x.annotator) == answer_key}
            before = recorded.get(answer_key)
            if before is not None:
                if (before.preference, before.weight) == (label.preference, label.weight):
                    continue
                said.add((before.preference, before.weight))
            overruled += len(said) - 1
            lines.append(_line(dataclasses.asdict(dataclasses.replace(label, time=label.time or now))))
        if lines:
            append_lines(self._labels, lines)
        return overruled

    @on_first
    def collect(self, oracle: Oracle, picked: Picked) -> dict[str, Verdict] | Pending:
        """Asks for what is not on record yet, and puts what comes on record.

        An oracle that is asked about whole rounds is always asked: people may have changed their minds.

        Returns:
          a verdict on every question; or that some of them are still open.

        Raises:
          ValueError: see `Oracle.ask`; or it answers what was not asked.
        """
        wanted = oracle.answers_per_pair
        known = {q.pair_id for q in picked.questions}

        def open_questions() -> list[Question]:
            counts = Counter(pair for pair, _ in _latest(self.answers()))
            return [q for q in picked.questions if counts[q.pair_id] < wanted]

        unanswered = open_questions()
        if unanswered or oracle.asks_whole_rounds:
            reply = oracle.ask(picked.questions if oracle.asks_whole_rounds else unanswered)
            labels = reply.labels if isinstance(reply, Pending) else reply
            if strange := [label.pair_id for label in labels if label.pair_id not in known]:
                raise ValueError(f"round {self.number}: there is an answer on {strange[0]!r}, which was not asked")
            if overruled := self.add(labels):
                print(f"round {self.number}: {overruled} answers were changed by the same annotator; the latest counts")
            if unanswered := open_questions():
                message = reply.message if isinstance(reply, Pending) else "the oracle has not answered them"
                done = len(picked.questions) - len(unanswered)
                return Pending(f"round {self.number}: {done} of {len(picked.questions)} pairs are labelled; {message}")
        return verdicts(self.answers())

    @on_first
    def late_answers(self, oracle: Oracle) -> int:
        """How many answers were given or changed after the round was learnt, which nothing comes of any more."""
        picked = self.picked() if oracle.asks_whole_rounds else None
        if picked is None:
            return 0
        reply, recorded = oracle.ask(picked.questions), _latest(self.answers())
        labels = _latest(reply.labels if isinstance(reply, Pending) else reply)
        same = [
            key in recorded and (recorded[key].preference, recorded[key].weight) == (label.preference, label.weight)
            for key, label in labels.items()
        ]
        return same.count(False)


def verdicts(labels: Sequence[Label]) -> dict[str, Verdict]:
    """What the answers come to, by pair; of several by one annotator on one pair the last counts."""
    by_pair: dict[str, list[Label]] = {}
    for label in _latest(labels).values():
        by_pair.setdefault(label.pair_id, []).append(label)
    return {pair: verdict(votes) for pair, votes in by_pair.items()}


def verdict(labels: Sequence[Label]) -> Verdict:
    """The majority of one pair's answers.

    Skipped ones abstain.  A draw between `first` and `second` is a tie, as is a draw with a tie; a draw with `both_bad`
    is not.  The weight is the mean of those that agree.
    """
    votes = [label for label in labels if label.preference != "skip"] or list(labels)
    counts = Counter(label.preference for label in votes)
    most = max(counts.values())
    winners = {preference for preference, count in counts.items() if count == most}
    if len(winners) == 1:
        outcome = winners.pop()
    else:
        outcome = "both_bad" if "both_bad" in winners and len(winners) == 2 and "tie" not in winners else "tie"
    agreeing = [label for label in votes if label.preference == outcome] or votes
    pairs = math.comb(len(votes), 2)
    agreement = sum(math.comb(count, 2) for count in counts.values()) / pairs if pairs else math.nan
    sources = sorted({label.source for label in votes})
    label = Label(
        pair_id=votes[0].pair_id,
        preference=outcome,
        source=", ".join(sources),
        annotator=", ".join(sorted({label.annotator for label in votes} - {""})),
        weight=math.fsum(label.weight for label in agreeing) / len(agreeing),
        time=max(label.time for label in votes),
    )
    return Verdict(label, agreement)


def fingerprint(labels: Sequence[Label]) -> str:
    """Of what is learnt from a round's labels, in pick order."""
    learnt = [(label.pair_id, label.preference, label.weight) for label in labels]
    return hashlib.blake2b(json.dumps(learnt).encode(), digest_size=8).hexdigest()


def _latest(labels: Sequence[Label]) -> dict[tuple[str, str], Label]:
    """The last answer of every annotator on every pair."""
    return {(label.pair_id, label.annotator): label for label in labels}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of lines, each with where it stands."""
    for number, line in enumerate(read_lines(path), start=1):
        location = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{location}: not JSON ({error.msg}); restore the file") from error
        if not isinstance(row, dict):
            raise ValueError(f"{location}: got a {type(row).__name__}, expected an object; restore the file")
        yield location, row
