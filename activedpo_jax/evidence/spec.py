"""What a program that computes evidence is compiled for."""

import dataclasses
from typing import Protocol

import jax
from jax.sharding import Mesh

from activedpo_jax.data.groups import Groups
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy

NORMALISATIONS = ("response", "none")


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """D, how a response's sketch is scaled, and what features are stored in.

    Raises:
      ValueError: there is no such normalisation.
    """

    dim: int
    normalisation: str = "response"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f"features.normalisation={self.normalisation!r}: expected one of {NORMALISATIONS}")


@dataclasses.dataclass(frozen=True)
class EvidenceSpec:
    """How each kind of evidence is computed."""

    features: FeatureSpec
    beta: float  # of the implicit reward r̂
    mesh: Mesh
    entropy_samples: int  # N responses per prompt, from which its entropy is estimated
    entropy_length: int  # largest number of tokens of each
    stop: tuple[int, ...]  # tokens that end a response


class EvidenceFunction(Protocol):
    def __call__(self, spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
        """One kind of evidence about every pair of responses of each group; traceable under `jax.jit`.

        Args:
          spec: static.
          lora: the adapter of π_θ.
          groups: G groups of m responses.  A response without tokens is padding: the values for its pairs are finite,
            and mean nothing.
          seed: scalar uint32, for everything random.

        Returns:
          [G, m(m−1)/2, ...] float32 (those of gradients: `spec.features.dtype`), pairs in the order of
          `data.groups.group_pairs`.  A pair's value does not depend on its batch, bucket or padding.
        """
        ...
