"""Options become what the programs of a round are compiled for."""

import dataclasses

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import layout, start
from activedpo_jax.data.batches import fitted, sizes, useful_share
from activedpo_jax.data.groups import Bucket, assign_buckets
from activedpo_jax.data.packing import Packing, lengths_in, multiple_on, packings, plan
from activedpo_jax.data.packing import useful_share as packed_share
from activedpo_jax.data.ragged import sizes_of
from activedpo_jax.evidence.gradients import FeatureSpec
from activedpo_jax.evidence.registry import EMBEDDINGS, EVIDENCE, SKETCHES, EvidenceSpec
from activedpo_jax.option_checks import answers_on_device
from activedpo_jax.rounds.spec import PassSpec, RoundSpec, SelectionSpec, TrainingSpec
from activedpo_jax.selection import strategies
from activedpo_jax.tasks import Task
from activedpo_jax.training.losses import LossSpec
from activedpo_jax.training.optimiser import DpoSpec, OptimiserSpec

# A fused round shows no progress while it runs, so `auto` takes it where it is short: up to so many
# token-times-parameter products in the pool, about a minute on two CPU cores.
_SHORT_ROUND = 1e12

# What the programs of a bucket take to compile, and what a device does meanwhile: both are guesses at the order.
_COMPILE_SECONDS = 30.0
_FLOPS = {"tpu": 1e14, "gpu": 1e14, "cpu": 1e11}  # a second

# Tokens that the sizes of new buckets are multiples of: on TPUs, of the attention kernel's blocks.
_MULTIPLE = {"tpu": 128, "gpu": 64, "cpu": 32}


def round_spec(config: ml_collections.ConfigDict, strategy: str, task: Task, mesh: Mesh) -> RoundSpec:
    """The options of a round.

    Raises:
      ValueError: the run would need more pairs than the pool has; the policy's responses are longer than the buckets;
        the strategy looks at what is no evidence, or cannot pick from features on the host.
    """
    rule = strategies.get(strategy)
    if unknown := sorted(rule.needs - set(EVIDENCE)):
        raise ValueError(
            f"config.strategies: {strategy} looks at {' and '.join(unknown)}, which is no evidence; known: "
            f"{', '.join(EVIDENCE)}, and groups, responses and key"
        )
    capacity, source = config.rounds * config.labels_per_round, config.candidates.source
    if source == "pool" and task.pool and capacity > task.pool.num_pairs:
        raise ValueError(
            f"rounds × labels_per_round = {capacity} labels, but the pool has {task.pool.num_pairs} pairs: "
            "lower config.rounds or config.labels_per_round, or give a larger pool"
        )
    bucket, length = task.buckets[-1], config.generation.max_new_tokens
    if (source != "pool" or config.evaluation.on_policy_prompts) and length > bucket.response:
        raise ValueError(
            f"config.generation.max_new_tokens={length}: the longest response in config.data.buckets has "
            f"{bucket.response} tokens; lower the one, or add a larger bucket"
        )
    if config.features.placement == "host" and rule.needs & (SKETCHES | EMBEDDINGS) and not rule.gains:
        usable = [name for name, other in strategies.STRATEGIES.items() if other.gains]
        raise ValueError(
            f"config.features.placement: got 'host' with strategy {strategy}, which ranks all features at once; "
            f"expected 'devices', or one of {', '.join(usable)} in config.strategies"
        )
    if is_fused(config, task):
        bucket = one_bucket(task, source)
    sampling = None
    if source != "pool":
        sampling = start.decoding_spec(config, task.decoder, task.stop, mesh)
    dpo = config.dpo
    microbatch = layout.round_up(min(dpo.pairs_per_chunk, dpo.batch_size), mesh)
    shapes: tuple[Packing, ...] = ()
    if is_packed(config, task, mesh):
        assert task.pool is not None
        shapes = packings(lengths_in(task.pool), sizes(microbatch, 1), multiple_on(mesh.devices.flat[0].platform))
    optimiser = OptimiserSpec(dpo.learning_rate, dpo.schedule, dpo.warmup_fraction, dpo.weight_decay, dpo.max_grad_norm)
    return RoundSpec(
        mesh=mesh,
        evidence=EvidenceSpec(
            features=FeatureSpec(config.features.dim, config.features.normalisation, config.features.dtype),
            beta=dpo.beta,
            mesh=mesh,
            entropy_samples=config.selection.entropy_samples,
            entropy_length=min(length, task.buckets[-1].response),
            stop=task.stop,
        ),
        selection=SelectionSpec(
            strategy=strategy,
            labels_per_round=config.labels_per_round,
            lam=float(config.selection.lam),
            frozen=config.selection.posterior == "frozen",
            block=config.selection.block,
            width_scale=float(config.selection.width_scale),
        ),
        training=TrainingSpec(
            dpo=DpoSpec(loss_spec(config), optimiser),
            epochs=dpo.epochs,
            batch_size=dpo.batch_size,
            microbatch=microbatch,
            on_newest=dpo.train_on == "newest",
            from_reference=dpo.start_from == "sft",
        ),
        sampling=sampling,
        responses=config.generation.responses,
        capacity=capacity,
        bucket=bucket,
        chunk=layout.round_up(config.features.groups_per_chunk, mesh),
        pool_only=source == "pool",
        hidden_size=task.decoder.config.hidden_size,
        passes=PassSpec(
            every=config.selection.pass_every,
            in_reach=config.selection.in_reach,
            on_host=config.features.placement == "host",
        ),
        packings=shapes,
    )


def loss_spec(config: ml_collections.ConfigDict) -> LossSpec:
    """The loss that `config.dpo` trains with, and the held-out pairs are judged by."""
    dpo = config.dpo
    return LossSpec(dpo.loss, dpo.beta, dpo.label_smoothing, dpo.sft_weight)


def can_pack(config: ml_collections.ConfigDict, mesh: Mesh) -> bool:
    """Whether batches of known texts are packed."""
    return config.data.packing and mesh.size == 1


def is_packed(config: ml_collections.ConfigDict, task: Task, mesh: Mesh) -> bool:
    """Whether the candidates are packed: the lengths of the policy's own responses are not known before, and rounds
    that are one program have one shape."""
    known = task.pool is not None and config.candidates.source == "pool"
    return known and can_pack(config, mesh) and not is_fused(config, task)


def used_buckets(task: Task) -> list[Bucket]:
    return [task.buckets[b] for b in np.unique(assign_buckets(task.candidate_texts, task.buckets))]


def num_parameters(task: Task) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(task.params_shape))


def fits_one_program(task: Task) -> bool:
    """Whether the candidates are of one shape: one bucket, and as many responses for every prompt."""
    sizes = sizes_of(task.candidate_texts.response_tokens)
    return len(used_buckets(task)) == 1 and sizes.min() == sizes.max()


def with_more_buckets(config: ml_collections.ConfigDict, task: Task) -> Task:
    """The task with up to `config.data.more_buckets` others that its pool's lengths make worth compiling for.

    Batches that are packed need none.  A bucket has to save more time in all passes over the pool than its programs
    take to compile.  The lengths of the policy's own responses are not known before, so that on-policy runs get none;
    nor do rounds that are one program.
    """
    mesh = task.decoder.mesh
    assert mesh is not None
    if task.pool is None or task.prompts is not None or is_fused(config, task) or is_packed(config, task, mesh):
        return task
    platform = mesh.devices.flat[0].platform
    kind = platform if platform in _MULTIPLE else "gpu"
    tokens_a_second = mesh.size * _FLOPS[kind] / (4 * num_parameters(task))
    passes = config.rounds * len(config.strategies) * len(config.seeds)
    worth = _COMPILE_SECONDS * tokens_a_second / passes
    buckets = fitted(task.pool, task.buckets, config.data.more_buckets, _MULTIPLE[kind], worth)
    return dataclasses.replace(task, buckets=buckets)


def padding_note(config: ml_collections.ConfigDict, task: Task) -> str:
    """What a pass over the pool computes, for the log."""
    mesh = task.decoder.mesh
    assert task.pool is not None and mesh is not None
    size = layout.round_up(config.features.groups_per_chunk, mesh)
    if is_packed(config, task, mesh):
        lengths, multiple = lengths_in(task.pool), multiple_on(mesh.devices.flat[0].platform)
        share = packed_share(lengths, *plan(lengths, size, multiple, together=False))
        return f"{share:.0%} of the tokens that a pass computes are text"
    share, used = useful_share(task.pool, task.buckets, size), used_buckets(task)
    shapes = ", ".join(f"({prompt}, {response})" for prompt, response in used)
    return f"{share:.0%} of the tokens that a pass computes are text, the rest pads it to buckets of {shapes}"


def one_bucket(task: Task, source: str) -> Bucket:
    """The bucket of a task that has one shape; the policy's own responses may need the longest of all."""
    bucket = used_buckets(task)[0]
    return bucket if source == "pool" else Bucket(bucket.prompt, task.buckets[-1].response)


def is_fused(config: ml_collections.ConfigDict, task: Task) -> bool:
    """Whether rounds run as one program.

    Raises:
      ValueError: `fused` is asked for, but the candidates do not fit into one program.
    """
    source, mode = config.candidates.source, config.round.mode
    needs_stages = config.selection.pass_every != 1 or config.features.placement == "host"
    if mode == "staged" or not answers_on_device(config) or needs_stages:
        return False
    one_shape = fits_one_program(task)
    if source == "mixture" and task.pool:
        one_shape &= task.pool.responses_per_group == config.generation.responses
    if mode == "fused":
        if not one_shape:
            raise ValueError(
                "config.round.mode='fused' needs one bucket and as many responses for every prompt: give "
                f"config.data.buckets a single entry (the pool uses {len(used_buckets(task))}), let "
                "config.generation.responses be those of the pool, or take 'staged'"
            )
        return True
    texts, bucket = task.candidate_texts, one_bucket(task, source)
    m = texts.responses_per_group if source == "pool" else config.generation.responses
    return one_shape and texts.num_groups * (bucket.prompt + m * bucket.response) * num_parameters(task) < _SHORT_ROUND
