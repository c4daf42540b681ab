"""The kinds of evidence by name.  A strategy names what it looks at, and only that is computed."""

from collections.abc import Iterable

import jax

from activedpo_jax.data.groups import Groups
from activedpo_jax.evidence.embeddings import embeddings
from activedpo_jax.evidence.entropies import entropies
from activedpo_jax.evidence.fisher import fisher_embeddings, fisher_features
from activedpo_jax.evidence.gradients import features, features_of_both
from activedpo_jax.evidence.log_probs import log_probs
from activedpo_jax.evidence.margins import margins
from activedpo_jax.evidence.rewards import rewards
from activedpo_jax.evidence.spec import EvidenceFunction, EvidenceSpec
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy

EVIDENCE: dict[str, EvidenceFunction] = {
    "embeddings": embeddings,
    "entropies": entropies,
    "features": features,
    "fisher_embeddings": fisher_embeddings,
    "fisher_features": fisher_features,
    "log_probs": log_probs,
    "margins": margins,
    "response_features": features_of_both,
    "rewards": rewards,
}

# Those that are vectors: sketches of `features.dim` numbers, and embeddings of as many as the decoder is wide.
SKETCHES = frozenset({"features", "fisher_features", "response_features"})
EMBEDDINGS = frozenset({"embeddings", "fisher_embeddings"})


def compute(
    names: Iterable[str], spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array
) -> dict[str, jax.Array]:
    """The named kinds of evidence about all pairs of a chunk of groups; names and spec are static.

    Args:
      lora: the adapter of π_θ.
      seed: scalar uint32.

    Returns:
      By name: [G · m(m−1)/2, ...], group by group, pairs in the order of `data.groups.group_pairs`.

    Raises:
      ValueError: there is no such kind; lists all kinds.
    """
    names = tuple(names)
    if unknown := [name for name in names if name not in EVIDENCE]:
        raise ValueError(f"there is no evidence {', '.join(unknown)}; known: {', '.join(EVIDENCE)}")
    found = {name: EVIDENCE[name](spec, policy, lora, groups, seed) for name in names}
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in found.items()}
