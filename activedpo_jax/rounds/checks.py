"""What has to hold before anything is asked, recorded or saved."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax.selection.greedy import Picks


def check_picks(picks: Picks, labelled_rows: np.ndarray, num_rows: int, number: int) -> None:
    """Holds a round's picks to what they must be: rows of the pool, distinct, not labelled yet, with finite scores.

    Args:
      labelled_rows: the rows labelled in the rounds before; those below 0 count for nothing.

    Raises:
      FloatingPointError: they are not, as where a feature or the posterior is not finite.
    """
    rows, scores = np.asarray(picks.rows), np.asarray(picks.scores)
    valid = np.all((rows >= 0) & (rows < num_rows)) and len(np.unique(rows)) == len(rows)
    if not valid or not np.all(np.isfinite(scores)) or np.isin(rows, labelled_rows[labelled_rows >= 0]).any():
        wrong = ~np.isfinite(scores) | (rows < 0) | (rows >= num_rows)
        raise FloatingPointError(
            f"round {number}: the picks are not {len(rows)} new pairs with finite scores ({int(wrong.sum())} are not): "
            "the features or the posterior are not finite; lower config.dpo.learning_rate, raise config.selection.lam, "
            "or use config.model.dtype=float32.  Nothing of this round was recorded"
        )


def check_learnt(loss: Any, lora: Any, number: int) -> None:
    """Holds what a round has learnt to finite numbers, before it is saved.

    Raises:
      FloatingPointError: the loss or a weight is not finite.
    """
    if not np.isfinite(float(loss)) or not bool(_all_finite(lora)):
        raise FloatingPointError(
            f"round {number}: training has diverged (loss {float(loss)}); lower config.dpo.learning_rate.  Nothing of "
            "this round was saved"
        )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
