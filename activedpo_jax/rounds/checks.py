"""What has to hold before anything is asked, recorded or saved."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax.data.groups import Candidates
from activedpo_jax.models.lora import Lora
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.training.losses import DpoMetrics


def check_picks(picks: Picks, candidates: Candidates, labelled: np.ndarray, number: int) -> None:
    """Holds a round's picks to what they must be: rows of the candidates, distinct, not labelled yet, with finite
    scores.

    Args:
      labelled: [n, 4] uint32, the digests of the pairs that are labelled.

    Raises:
      FloatingPointError: they are not, as where a feature or the posterior is not finite.
      ValueError: there are fewer pairs than the round is to label.
    """
    rows, scores = np.asarray(picks.rows), np.asarray(picks.scores)
    count, found = len(rows), int(np.sum(rows >= 0))
    if np.all(np.isfinite(scores)) and found < count and np.all(rows[:found] >= 0):
        raise ValueError(
            f"round {number}: {found} pairs can be asked about, and the round is to label {count}: the others are "
            "labelled, or their responses are empty or equal; lower config.labels_per_round or config.rounds, or give "
            "more prompts or responses"
        )
    wrong = ~np.isfinite(scores) | (rows < 0) | (rows >= candidates.num_pairs)
    again = np.zeros(count, bool)
    if not wrong.any():
        known = {digest.tobytes() for digest in labelled}
        again = np.array([digest.tobytes() in known for digest in candidates.digests[rows]], bool)
    if wrong.any() or again.any() or len(np.unique(rows)) < count:
        names = ", ".join(candidates.pair_ids[row] for row in rows[again][:8])
        raise FloatingPointError(
            f"round {number}: the picks are not {count} new pairs with finite scores ({int(wrong.sum())} are not"
            f"{f'; labelled already: {names}' if names else ''}): the features or the posterior are not finite; lower "
            "config.dpo.learning_rate, raise config.selection.lam, or use config.model.dtype=float32.  Nothing of this "
            "round was recorded"
        )


def check_learnt(training: DpoMetrics | None, lora: Lora, number: int) -> None:
    """Holds what a round has learnt to finite numbers, before it is saved.

    Raises:
      FloatingPointError: the loss or a weight is not finite.
    """
    loss = 0.0 if training is None else float(training.loss)
    if not (np.isfinite(loss) and bool(_all_finite(lora))):
        raise FloatingPointError(
            f"round {number}: training has diverged (loss {loss}); lower config.dpo.learning_rate.  Nothing of "
            "this round was saved"
        )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
