"""What is fixed when the programs of a round are compiled."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from activedpo_jax.data.groups import Bucket
from activedpo_jax.data.packing import Packing
from activedpo_jax.evidence.registry import EvidenceSpec
from activedpo_jax.generation.decoding import DecodingSpec
from activedpo_jax.selection import strategies
from activedpo_jax.training import optimiser


@dataclasses.dataclass(frozen=True)
class SelectionSpec:
    """How a round's pairs are selected."""

    strategy: str
    labels_per_round: int  # K
    lam: float  # λ of V = λI + Σ φφᵀ
    frozen: bool  # the vectors of labelled pairs stay as they were when these were picked
    block: int  # candidates that a device holds while selecting
    width_scale: float = 1.0  # c of the bounds μ ± c s

    @property
    def rule(self) -> strategies.Strategy:
        return strategies.get(self.strategy)


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """How often the evidence about all candidates is computed, and where it lies meanwhile."""

    every: int = 1  # rounds from one pass over the candidates to the next; 0: the first round alone has one
    in_reach: bool = False  # between passes, the evidence about the pairs that would be picked is computed anew
    on_host: bool = False  # vectors that are picked by greedily, while selecting; else on the devices

    @property
    def reused(self) -> bool:
        """Whether evidence outlives its round."""
        return self.every != 1

    def is_due(self, number: int) -> bool:
        """Whether round `number` begins with a pass."""
        return number == 1 or (self.every > 0 and (number - 1) % self.every == 0)


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """How a round trains."""

    dpo: optimiser.DpoSpec
    epochs: int
    batch_size: int  # pairs an optimiser step
    microbatch: int  # pairs whose activations exist at a time at most, divided evenly by the mesh
    on_newest: bool  # train on the labels of this round alone, else on all
    from_reference: bool  # each round starts from the adapter of π_ref, else from the current θ


@dataclasses.dataclass(frozen=True)
class RoundSpec:
    """Everything about a round that is fixed when it is compiled."""

    mesh: Mesh
    evidence: EvidenceSpec
    selection: SelectionSpec
    training: TrainingSpec
    sampling: DecodingSpec | None  # of the policy's own responses; None: it is not asked for any
    responses: int  # m of them a prompt
    capacity: int  # C, labels of the whole run
    bucket: Bucket  # which holds every labelled pair
    chunk: int  # examples whose evidence is computed at a time, divided evenly by the mesh
    pool_only: bool  # every labelled pair is among the candidates of every round
    hidden_size: int  # of the decoder: D of its embeddings
    passes: PassSpec = PassSpec()  # of staged rounds
    # Of minibatches of labelled pairs, by rising size, where batches are packed; none: they are padded.
    packings: tuple[Packing, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether the candidates' texts, and those of labelled pairs, lie end to end in batches."""
        return bool(self.packings)

    @property
    def needs(self) -> tuple[str, ...]:
        """The kinds of evidence that the strategy looks at."""
        return tuple(sorted(self.selection.rule.needs))

    def schedule(self, usable: np.ndarray, number: int, seed: int) -> optimiser.BatchSchedule:
        """The minibatches of round `number`.

        Args:
          usable: the places of the labels that have a preference, in rising order.
          seed: of the run.
        """
        training, per_round = self.training, self.selection.labels_per_round
        if training.on_newest:
            usable = usable[usable >= (number - 1) * per_round]
        most = per_round if training.on_newest else self.capacity
        width = -(-training.batch_size // training.microbatch) * training.microbatch  # whole microbatches
        max_steps = training.epochs * -(-most // training.batch_size)
        return optimiser.batch_schedule(
            usable, training.epochs, training.batch_size, width, max_steps, seed * 1_000_003 + number
        )
