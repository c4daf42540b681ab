"""What a run works on: a model, a pool to label from, a held-out set, made from the options."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import hosts, layout, start
from activedpo_jax.data.draws import limit, split_by_prompt
from activedpo_jax.data.groups import Bucket, Groups, PairPool, Texts, check_tokens, pad_groups, shared_prompts
from activedpo_jax.data.preferences import Record
from activedpo_jax.data.prompts import PromptRecord, prompts_of, read_prompts
from activedpo_jax.data.records import Records, read_records
from activedpo_jax.data.store import ALONE, Hosts
from activedpo_jax.data.synthetic import STOP, SyntheticReward, SyntheticTask
from activedpo_jax.data.tokenize import encoded_pool, encoded_texts, shown_texts
from activedpo_jax.huggingface import loading
from activedpo_jax.models.config import ModelConfig
from activedpo_jax.models.decoder import Decoder, Params, init_params
from activedpo_jax.models.quantise import quantise_params
from activedpo_jax.oracles.reward import Reward
from activedpo_jax.record import checkpoints
from activedpo_jax.rounds.fresh import PromptSet
from activedpo_jax.training import optimiser
from activedpo_jax.training.loop import Work, descend

SYNTHETIC = "synthetic"


@dataclasses.dataclass(frozen=True)
class Task:
    """A decoder with its data.  `load_params` is called when weights are needed, which compiling alone does not."""

    decoder: Decoder
    base_model: str  # the name that an exported adapter refers to
    params_shape: Params  # jax.ShapeDtypeStruct with sharding
    load_params: Callable[[], Params]
    pool: PairPool | None  # None: the policy responds to prompts, and nothing else is a candidate
    heldout: PairPool
    buckets: tuple[Bucket, ...]  # the last holds whatever the others hold
    stop: tuple[int, ...] = ()  # tokens that end a response
    prompts: PromptSet | None = None  # that the policy responds to
    reward: Reward | None = None  # of the synthetic task
    text_of: Callable[[np.ndarray], str] = str  # the text of a response's tokens; unknown where nothing is read

    @property
    def candidate_texts(self) -> Texts:
        """What is known of the candidates before the first round: the pool, or the prompts alone."""
        if self.pool is not None:
            return self.pool
        assert self.prompts is not None
        return self.prompts.texts


def load(
    config: ml_collections.ConfigDict, seed: int, mesh: Mesh, cache: pathlib.Path | None, readers: Hosts = ALONE
) -> Task:
    """The task of one seed.

    Args:
      cache: where a model trained from nothing is kept for the other runs of the seed and for going on.
      readers: each reads and tokenises a share of the data, and all get the whole.
    """
    if config.data.train == SYNTHETIC:
        return _synthetic(config, seed, mesh, cache)
    return _from_files(config, seed, mesh, readers)


def outline(config: ml_collections.ConfigDict, mesh: Mesh) -> Task:
    """The task for compiling, from the model's `config.json` and the options: without weights, tokenizer and data.

    Texts are placeholders, as many as the options say and as long as the buckets, which they share evenly.

    Raises:
      ValueError: there is no such model, or it is not supported.
    """
    if config.data.train == SYNTHETIC:
        return _synthetic(config, config.seeds[0], mesh, None)
    data, path, revision = config.data, config.model.path, config.model.revision
    buckets = tuple(sorted(Bucket(*b) for b in data.buckets))
    decoder = start.load_decoder(config, mesh)
    source, records = config.candidates.source, data.assumed_records
    held_out = data.heldout_limit or (records if data.heldout else max(1, round(records * data.heldout_fraction)))
    prompts = None
    if source != "pool":
        count = max(records, config.candidates.prompts_per_round)
        texts = Texts(
            prompt_tokens=[np.zeros(buckets[i % len(buckets)].prompt, np.int32) for i in range(count)],
            response_tokens=[[np.zeros(0, np.int32)]] * count,
        )
        prompts = PromptSet([f"prompt-{i}" for i in range(count)], texts, [""] * count, lambda tokens: "")
    return Task(
        decoder=decoder,
        base_model=path,
        params_shape=params_shape(decoder, mesh, decoder.dtype, config.model.quantisation),
        load_params=functools.partial(start.load_params, config, mesh, decoder.dtype),
        pool=None if source == "policy" else _placeholders(data.train_limit or records, buckets),
        heldout=_placeholders(held_out, buckets),
        buckets=buckets,
        stop=loading.eos_token_ids(path, revision),
        prompts=prompts,
    )


def _placeholders(count: int, buckets: Sequence[Bucket]) -> PairPool:
    """Pairs of empty texts, one to a prompt."""
    prompts = [np.zeros(bucket.prompt, np.int32) for bucket in buckets]
    responses = [[np.zeros(bucket.response, np.int32)] * 2 for bucket in buckets]
    rows = np.arange(count, dtype=np.int32)
    return PairPool(
        prompt_tokens=[prompts[i % len(buckets)] for i in rows],
        response_tokens=[responses[i % len(buckets)] for i in rows],
        pairs=np.stack([rows, np.zeros_like(rows), np.ones_like(rows)], axis=1),
        pair_ids=[f"pair-{i}" for i in rows],
        prompt_texts=[""] * count,
        response_texts=[("", "")] * count,
        preferences=np.zeros(count, np.int8),
        rewards=None,
    )


def params_shape(decoder: Decoder, mesh: Mesh, dtype: Any, quantisation: str) -> Params:
    """The decoder's parameters as `jax.ShapeDtypeStruct`s with shardings."""

    def init() -> Params:
        params = jax.tree.map(lambda x: x.astype(dtype), init_params(decoder, jax.random.key(0)))
        return quantise_params(params, quantisation)

    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        layout.weight_shardings(mesh, shapes),
    )


def _from_files(config: ml_collections.ConfigDict, seed: int, mesh: Mesh, readers: Hosts) -> Task:
    data, path, revision = config.data, config.model.path, config.model.revision
    buckets = tuple(sorted(Bucket(*b) for b in data.buckets))
    source = config.candidates.source
    if source == "policy" and data.train_limit:
        raise ValueError(
            f"config.data.train_limit={data.train_limit} counts pairs, of which there are none with "
            "config.candidates.source='policy'; expected 0: set config.candidates.prompts_per_round instead"
        )
    records, prompt_records, heldout_records = _sources(config, seed, readers)
    tokenizer = loading.load_tokenizer(path, revision)
    encoding = start.encoding(config, tokenizer)
    decoder = start.load_decoder(config, mesh)
    stop = start.stop_tokens(path, revision, tokenizer, data.template)
    pool = None if records is None else encoded_pool(records, encoding, seed, readers)
    prompts, text_of = None, start.text_of(tokenizer, stop)
    if prompt_records is not None:
        texts = encoded_texts(prompt_records, encoding, readers)
        texts = dataclasses.replace(texts, response_tokens=[[np.zeros(0, np.int32)]] * len(prompt_records))
        shown, _ = shown_texts(prompt_records)
        prompts = PromptSet(prompt_records.ids, texts, shown, text_of).distinct()
    heldout = encoded_pool(heldout_records, encoding, seed, readers)
    load_params = functools.partial(start.load_params, config, mesh, decoder.dtype)
    shape = params_shape(decoder, mesh, decoder.dtype, config.model.quantisation)
    task = Task(decoder, path, shape, load_params, pool, heldout, buckets, stop, prompts, text_of=text_of)
    shared = shared_prompts(heldout, task.candidate_texts)
    notes = (f"{shared} of {heldout.num_groups} records have a prompt of the pool",) if shared else ()
    heldout = dataclasses.replace(heldout, notes=(*heldout.notes, *notes))
    for texts, name in ((task.candidate_texts, data.train), (heldout, data.heldout or data.train)):
        check_tokens(texts, decoder.config.vocab_size, name)
    return dataclasses.replace(task, heldout=heldout)


def _sources(
    config: ml_collections.ConfigDict, seed: int, readers: Hosts
) -> tuple[Records[Record] | None, Records[PromptRecord] | None, Records[Record]]:
    """The records of the pool and the prompts to respond to, None where there is no such source; the held-out records.

    Every seed is judged by the same held-out pairs, where there is a limit on them.
    """
    data, source = config.data, config.candidates.source
    records: Records[Record] | None = None
    prompts: Records[PromptRecord] | None = None
    if source == "policy" and data.heldout:
        prompts = read_prompts(data.train, data.train_split, readers)
        heldout = read_records(data.heldout, data.heldout_split, readers)
    else:
        everything = read_records(data.train, data.train_split, readers)
        if data.heldout:
            heldout = read_records(data.heldout, data.heldout_split, readers)
        else:
            everything, heldout = split_by_prompt(everything, data.heldout_fraction, seed)
        if data.train_limit:
            everything = limit(everything, data.train_limit, seed)
        records = None if source == "policy" else everything
        prompts = None if source == "pool" else prompts_of(everything)
    if data.heldout_limit:
        heldout = limit(heldout, data.heldout_limit, 0)
    return records, prompts, heldout


def _synthetic(config: ml_collections.ConfigDict, seed: int, mesh: Mesh, cache: pathlib.Path | None) -> Task:
    options = config.synthetic.to_dict()
    pool_pairs, heldout_pairs = options.pop("pool_pairs"), options.pop("heldout_pairs")
    task, scratch = SyntheticTask(**options), config.scratch
    if scratch.examples < scratch.batch_size:
        raise ValueError(
            f"config.scratch.examples={scratch.examples} is less than a batch, config.scratch.batch_size="
            f"{scratch.batch_size}: raise the one, or lower the other"
        )
    decoder = start.make_decoder(
        config,
        ModelConfig(
            vocab_size=task.vocab_size,
            hidden_size=scratch.hidden_size,
            intermediate_size=scratch.intermediate_size,
            num_layers=scratch.num_layers,
            num_heads=scratch.num_heads,
            num_kv_heads=scratch.num_kv_heads,
            head_dim=scratch.hidden_size // scratch.num_heads,
        ),
        mesh,
    )
    trained = params_shape(decoder, mesh, jnp.float32, "none")
    shape = params_shape(decoder, mesh, jnp.float32, config.model.quantisation)

    def quantised(params: Params) -> Params:
        shardings = jax.tree.map(lambda x: x.sharding, shape)
        return layout.put(quantise_params(params, config.model.quantisation), shardings)

    def load_params() -> Params:
        path = None if cache is None else cache / "base" / f"seed{seed}"
        if path is not None and hosts.on_first(checkpoints.is_whole)(path):
            return quantised(checkpoints.restore_tree(path, trained))
        params = _train_from_scratch(config, task, decoder, mesh, seed)
        if path is not None:
            checkpoints.save_tree(path, params)
        return quantised(params)

    source, pool = config.candidates.source, task.pool(seed, pool_pairs)
    prompts = None
    words = lambda tokens: " ".join(task.word(t) for t in tokens if t not in STOP)  # noqa: E731
    if source != "pool":
        texts = Texts(prompt_tokens=pool.prompt_tokens, response_tokens=[[np.zeros(0, np.int32)]] * pool.num_groups)
        names = [f"prompt-{i:05d}" for i in range(pool.num_groups)]
        prompts = PromptSet(names, texts, pool.prompt_texts, words).distinct()
    return Task(
        decoder=decoder,
        base_model=SYNTHETIC,
        params_shape=shape,
        load_params=load_params,
        pool=None if source == "policy" else pool,
        heldout=task.heldout(seed, heldout_pairs),
        buckets=(task.bucket,),
        stop=STOP,
        prompts=prompts,
        reward=jax.tree_util.Partial(SyntheticReward(task), jnp.asarray(task.likings(seed), jnp.float32)),
        text_of=words,
    )


language_model_step = jax.jit(optimiser.language_model_step, static_argnums=(0, 1), donate_argnums=(2, 3))


def scratch_optimiser(config: ml_collections.ConfigDict) -> optimiser.OptimiserSpec:
    return optimiser.OptimiserSpec(config.scratch.learning_rate, "cosine", 0.1)


def scratch_decoder(decoder: Decoder, mesh: Mesh) -> Decoder:
    """The decoder while it is trained from scratch: on the first of this process's devices alone.

    Training all weights at a large rate makes the last bits of a gradient's sum, which differ between meshes, larger
    and larger, so that every comparison between meshes would start from two base models.
    """
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return decoder.clone(mesh=Mesh(np.array(own[:1]).reshape(1, 1, 1), layout.AXES))


def _train_from_scratch(
    config: ml_collections.ConfigDict, task: SyntheticTask, decoder: Decoder, mesh: Mesh, seed: int
) -> Params:
    """The synthetic task's base model: all weights, on responses of all families and styles alike, without labels.

    The same to the last bit whatever the mesh; every process trains its own.
    """
    scratch, spec = config.scratch, scratch_optimiser(config)
    texts = task.language(seed, scratch.examples)
    groups = pad_groups(texts, np.arange(texts.num_groups), task.bucket)
    decoder = scratch_decoder(decoder, mesh)
    assert decoder.mesh is not None
    place = layout.replicated(decoder.mesh)
    params = jax.device_put(init_params(decoder, jax.random.key(seed)), place)
    rng = np.random.default_rng(seed)

    def advance(step: int, params: Params, opt_state: Any) -> tuple[Params, Any, tuple[jax.Array]]:
        rows = rng.choice(texts.num_groups, scratch.batch_size, replace=False)
        batch = layout.put(Groups(*(np.asarray(x)[rows] for x in groups)), place)
        rate = optimiser.learning_rate(spec, optimiser.Position(jnp.float32(step), jnp.float32(scratch.steps)))
        params, opt_state, loss = language_model_step(decoder, spec, params, opt_state, batch, rate)
        return params, opt_state, (loss,)

    work = Work("training the base model", 0, scratch.steps, "config.scratch.learning_rate")
    for step in descend(work, params, optimiser.init_optimiser(spec, params), advance):
        params, (loss,) = step.weights, step.report
    print(f"base model of seed {seed}: {float(loss):.3f} nats a token after {scratch.steps} steps")
    return layout.put(jax.device_get(params), layout.weight_shardings(mesh, params))
