"""What strategies picked: lengths, clusters of prompts, the nearest pair labelled before, and who agrees with whom.

Texts are compared by their words: tf-idf vectors of unit length (logarithmic idf, smoothed), whose inner product is a
cosine.  That needs no model, and says whether texts share words, not whether they mean the same.
"""

import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from activedpo_jax.record.folders import read_selected
from activedpo_jax.record.labels import RoundRecord

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_STARTS = 5  # of k-means
_WORDS = 1024  # the most frequent ones, that vectors are made of


class Pick(NamedTuple):
    """A labelled pair."""

    pair_id: str
    prompt: str
    first: str
    second: str
    score: float | None
    preference: str
    prompt_tokens: int
    response_tokens: int  # of both

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.first} {self.second}"


Rounds = list[list[Pick]]  # of a run: each round's picks, in pick order


def read_picks(folder: pathlib.Path, rounds: int) -> Rounds:
    """The picks of a run's first rounds.

    Raises:
      FileNotFoundError, ValueError: a round's files are missing or damaged; see `folders.read_selected`.
    """
    found: Rounds = []
    for number in range(1, rounds + 1):
        asked = RoundRecord(folder, number).picked()
        if asked is None:
            raise ValueError(f"{folder}: round {number} has no asked.jsonl; restore the file")
        lengths = {
            q.pair_id: (len(q.prompt_tokens), len(q.first_tokens) + len(q.second_tokens)) for q in asked.questions
        }
        rows = read_selected(folder, number)
        found.append(
            [
                Pick(
                    row.pair_id,
                    shown(row.prompt),
                    row.first,
                    row.second,
                    row.score,
                    row.preference,
                    *lengths[row.pair_id],
                )
                for row in rows
            ]
        )
    return found


def shown(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as one text."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def mean_lengths(runs: Sequence[Rounds]) -> list[float]:
    """Tokens of a picked response, by round, over all runs of a strategy."""
    return [
        float(np.mean([pick.response_tokens / 2 for rounds in runs for pick in rounds[t]])) for t in range(len(runs[0]))
    ]


def jaccard(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Shared pairs by all pairs of the two."""
    return len(set(ours) & set(theirs)) / max(1, len(set(ours) | set(theirs)))


def rank_overlap(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Of two lists in pick order the mean, over all depths, of the share that their beginnings have in common: the
    average overlap (Fagin, Kumar and Sivakumar 2003).  1: the same pairs in the same order."""
    depths = range(1, min(len(ours), len(theirs)) + 1)
    return float(np.mean([len(set(ours[:d]) & set(theirs[:d])) / d for d in depths])) if depths else 0.0


class Agreement(NamedTuple):
    """Of two strategies, means over the seeds that both have."""

    overall: float  # Jaccard of all pairs labelled in the end
    by_round: list[float]  # Jaccard of all pairs labelled so far
    order: float  # rank overlap of the first round, in which both choose from the same pool with the same weights


def agreement(ours: dict[int, Rounds], theirs: dict[int, Rounds]) -> Agreement | None:
    """Of runs by seed; None: they share none."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    count = len(ours[seeds[0]])

    def labelled(rounds: Rounds, number: int) -> list[str]:
        return [pick.pair_id for picks in rounds[:number] for pick in picks]

    by_round = [
        float(np.mean([jaccard(labelled(ours[s], t), labelled(theirs[s], t)) for s in seeds]))
        for t in range(1, count + 1)
    ]
    order = float(np.mean([rank_overlap(labelled(ours[s], 1), labelled(theirs[s], 1)) for s in seeds]))
    return Agreement(by_round[-1], by_round, order)


def vectors(texts: Sequence[str], least: int = 1) -> tuple[FloatArray, list[str]]:
    """tf-idf vectors of unit length, [n, words], and the words, which occur in so many texts at least; a text without
    any of them is 0."""
    split = [re.findall(r"\w+", text.lower()) for text in texts]
    documents = Counter(word for words in split for word in set(words))
    frequent = sorted(documents.items(), key=lambda item: (-item[1], item[0]))[:_WORDS]
    vocabulary = [word for word, count in frequent if count >= least]
    places = {word: i for i, word in enumerate(vocabulary)}
    found = np.zeros((len(texts), len(vocabulary)))
    for row, words in enumerate(split):
        for word, count in Counter(words).items():
            if word in places:
                found[row, places[word]] = count * (np.log((1 + len(texts)) / (1 + documents[word])) + 1)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12), vocabulary


def nearest_before(found: FloatArray) -> tuple[FloatArray, np.ndarray]:
    """For each row the largest cosine to one before it, and that row; the first has 0 and −1."""
    similarity = np.tril(found @ found.T, -1)
    similarity[np.triu_indices(len(found))] = -1
    rows = similarity.argmax(1)
    best = similarity[np.arange(len(found)), rows]
    return np.maximum(best, 0), np.where(best < 0, -1, rows)


def clusters(prompts: Sequence[str], most: int = 8, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Spherical k-means of prompts by the words that two or more of them have, the largest cluster first; the best of
    several starts.

    Returns:
      of each prompt its cluster, [n]; of each cluster the words that weigh most in its centre.
    """
    distinct, places = np.unique(np.array(prompts, object).astype(str), return_inverse=True)
    found, vocabulary = vectors(distinct.tolist(), least=2)
    rng = np.random.default_rng(seed)
    starts = [_centres(found, min(most, len(distinct)), rng) for _ in range(_STARTS)]
    centres = max(starts, key=lambda centres: (found @ centres.T).max(1).sum())
    of_distinct = (found @ centres.T).argmax(1)
    labels = of_distinct[places]
    order = np.argsort(-np.bincount(labels, minlength=len(centres)), kind="stable")
    heaviest = [[vocabulary[i] for i in np.argsort(-centres[c], kind="stable")[:3] if centres[c, i] > 0] for c in order]
    names = [", ".join(words) or "other words" for words in heaviest]
    return np.argsort(order)[labels], names


def _centres(found: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    """k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's steps until nothing changes, or 30 of them."""
    centres = found[[int(rng.integers(len(found)))]]
    while len(centres) < count:
        distance = np.maximum(0, 1 - (found @ centres.T).max(1))
        if distance.sum() < 1e-9:
            break
        centres = np.concatenate([centres, found[[int(rng.choice(len(found), p=distance / distance.sum()))]]])
    labels = np.full(len(found), -1)
    for _ in range(30):
        now = (found @ centres.T).argmax(1)
        if np.array_equal(now, labels):
            break
        labels = now
        for c in range(len(centres)):
            total = found[labels == c].sum(0)
            if np.linalg.norm(total) > 0:
                centres[c] = total / np.linalg.norm(total)
    return centres
