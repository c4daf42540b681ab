"""What labels cost in computing, and from which price a label on selection pays.

FLOPs are counted, not measured: 4 for each token of text and each parameter that it goes through, forward and backward
to the inputs, 2 for a forward pass alone, logits at response tokens alone.  What gradients of the adapter, attention,
selection itself and padding take is not counted; nor is what the policy writes.  Seconds are measured, without
evaluation: of each round the median over seeds, since the first seed's compiles programs.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from activedpo_jax.files import read_json, write_json
from activedpo_jax.record.folders import RunSummary
from activedpo_jax.selection import strategies

# FLOPs a token and parameter of each kind of evidence; rewards, and margins, are of two adapters.  What the policy
# writes for entropies is not known.
_A_TOKEN = {
    "embeddings": 2,
    "features": 4,
    "fisher_embeddings": 6,
    "fisher_features": 8,
    "log_probs": 2,
    "margins": 4,
    "response_features": 4,
    "rewards": 4,
}


class Sizes(NamedTuple):
    """What a pass over a seed's pool goes through."""

    layers: int  # parameters of the layers
    head: int  # of the unembedding
    prompts: int  # tokens
    responses: int  # tokens
    pairs: int  # of the pool; 0: the policy writes the candidates, and their tokens are not known


def write_sizes(folder: pathlib.Path, seed: int, sizes: Sizes) -> None:
    write_json(_path(folder, seed), sizes._asdict())


def read_sizes(folder: pathlib.Path, seed: int) -> Sizes:
    """Raises:
    ValueError: the file is not what `write_sizes` writes.
    """
    path = _path(folder, seed)
    try:
        return Sizes(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path}: not the sizes of a pool ({error}); restore the file") from error


def _path(folder: pathlib.Path, seed: int) -> pathlib.Path:
    return folder / "inputs" / f"sizes{seed}.json"


def selection_flops(config: ml_collections.ConfigDict, strategy: str, sizes: Sizes) -> float | None:
    """Of all rounds' passes over the pool; None: not known."""
    needs = strategies.get(strategy).needs
    if not needs:
        return 0.0
    if not sizes.pairs or not needs <= set(_A_TOKEN):
        return None
    every = config.selection.pass_every
    passes = 1 if every == 0 else -(-config.rounds // every)
    a_token = sum(_A_TOKEN[name] for name in needs)
    return float(passes * a_token * _products(sizes, sizes.prompts, sizes.responses))


def training_flops(config: ml_collections.ConfigDict, sizes: Sizes, tokens: Sequence[tuple[int, int]]) -> float:
    """Of all rounds.

    Args:
      tokens: of the prompts and of the responses of each round's labelled pairs.
    """
    of_rounds = np.array([_products(sizes, *of_round) for of_round in tokens], float)
    learnt = of_rounds if config.dpo.train_on == "newest" else np.cumsum(of_rounds)
    return float(4 * config.dpo.epochs * learnt.sum() + 2 * of_rounds.sum())  # once for log π_ref


def _products(sizes: Sizes, prompts: int, responses: int) -> int:
    """Tokens times parameters."""
    return sizes.layers * (prompts + responses) + sizes.head * responses


def seconds_by_round(summaries: Sequence[RunSummary]) -> np.ndarray:
    """[T]: of each round the median over seeds, without evaluation."""
    found = [
        [sum(s for stage, s in entry["seconds"].items() if stage != "evaluation") for entry in summary["rounds"][1:]]
        for summary in summaries
    ]
    return np.median(np.array(found, float), axis=0)


def break_even(
    ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray, needed: float | None, hour_price: float
) -> Mapping[str, Any]:
    """From which price a label on it pays to select with a strategy rather than with the baseline.

    Selection saves labels on the way to the baseline's final accuracy, and takes more computing.  It pays where
    saved × price > extra hours × price of an hour.

    Args:
      ours, theirs: [T] seconds of each round.
      labels: [T + 1], from 0.
      needed: labels until the strategy reaches the baseline's final accuracy; None: it does not.

    Returns:
      `saved` labels and `extra_seconds` of computing until then; `seconds_a_label`, extra by saved; `price` a label,
      None where an hour has no price; `pays`: "always" (it takes no more computing), "above" the price, or "never"
      (no label is saved).
    """
    if needed is None or needed >= labels[-1]:
        return {"saved": 0.0, "extra_seconds": None, "seconds_a_label": None, "price": None, "pays": "never"}
    until = float(np.interp(needed, labels, np.concatenate([[0.0], np.cumsum(ours)])))
    saved, extra = float(labels[-1] - needed), until - float(theirs.sum())
    if extra <= 0:
        return {"saved": saved, "extra_seconds": extra, "seconds_a_label": 0.0, "price": 0.0, "pays": "always"}
    price = extra / 3600 * hour_price / saved if hour_price else None
    return {"saved": saved, "extra_seconds": extra, "seconds_a_label": extra / saved, "price": price, "pays": "above"}
