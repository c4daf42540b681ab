"""The public face: load a model, read a pool, compute its features, choose.  In a notebook:

    model = activedpo_jax.load_model("my_org/my_model")
    pool = activedpo_jax.read_pool("pairs.jsonl", model)
    choice = activedpo_jax.choose(activedpo_jax.features(model, pool), 50)
    [pool.pair_ids[row] for row in choice.rows]

These are the pairs that the first round of `activedpo_jax.main` asks about, given the same options.
"""

import copy
import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import flags, layout, specs, start, tasks
from activedpo_jax.config import OPTIONS, default
from activedpo_jax.data.groups import Bucket, PairPool, check_tokens
from activedpo_jax.data.preferences import Record
from activedpo_jax.data.records import named_records, read_records
from activedpo_jax.data.sources import fail, kind
from activedpo_jax.data.tokenize import encoded_pool
from activedpo_jax.huggingface import loading
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy
from activedpo_jax.rounds.pool_evidence import pool_evidence
from activedpo_jax.rounds.state import initial_state
from activedpo_jax.selection import host, strategies
from activedpo_jax.selection.host import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Choice", "Model", "choose", "features", "load_model", "read_pool"]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A Hugging Face model and an adapter, on the devices."""

    decoder: Decoder
    params: Params  # base weights
    adapter: Lora  # θ
    tokenizer: "PreTrainedTokenizerBase"
    mesh: Mesh
    stop: tuple[int, ...]  # tokens that end a response
    seed: int  # of a fresh adapter, of the sketch, and of the side on which each response is shown
    config: ml_collections.ConfigDict  # the options of the model, the adapter and the texts

    @property
    def policy(self) -> Policy:
        """π_θ and π_ref before the first round of a run: both have the same adapter."""
        return Policy(self.decoder, self.params, self.adapter)


def load_model(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] = "",
    revision: str = "",
    *,
    rank: int = OPTIONS["lora.rank"].default,
    alpha: float = OPTIONS["lora.alpha"].default,
    target_modules: Sequence[str] = OPTIONS["lora.target_modules"].default,
    dtype: str = OPTIONS["model.dtype"].default,
    buckets: Sequence[tuple[int, int]] = OPTIONS["data.buckets"].default,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Loads a model onto all devices.

    Args:
      path: a Hugging Face directory or Hub name.
      adapter: directory or Hub name of a LoRA adapter, saved by `peft` or by a run; empty: a fresh one, with B = 0.
      revision: Hub branch, tag or commit of the model; empty: the default branch.
      rank, alpha, target_modules: shape of the adapter; they must describe `adapter` if it is given.
      dtype: of base weights and compute: `auto` (float32 on CPU, else bfloat16), `float32` or `bfloat16`.
      buckets: (prompt, response) tokens, the sizes to which texts are padded; longer texts than the largest are cut.
      seed: of all random numbers.
      options: other options of `activedpo_jax.config`, such as `{"model.quantisation": "int8", "lora.rslora": True}`.

    Raises:
      ValueError: an option does not exist or is out of range; the model is missing or not supported; the adapter is
        missing or has another shape.
    """
    config = default()
    changes = {
        "model.path": os.fspath(path),
        "model.revision": revision,
        "model.dtype": dtype,
        "lora.path": os.fspath(adapter),
        "lora.rank": rank,
        "lora.alpha": alpha,
        "lora.target_modules": tuple(target_modules),
        "data.buckets": tuple(tuple(bucket) for bucket in buckets),
        "data.train": "pool",  # never read: `validate` wants a name, and `read_pool` gets the data
        "seeds": (seed,),
    }
    config = _changed(config, changes | dict(options or {}))
    tokenizer = loading.load_tokenizer(config.model.path, config.model.revision)
    return load(config, layout.make_mesh(config.mesh), tokenizer)


def _changed(config: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A copy with these options changed.

    Raises:
      ValueError: an option does not exist, or cannot have this value.
    """
    for name in changes:
        if name not in OPTIONS:
            nearest = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.0)[0]
            raise ValueError(f"options: there is no option {name!r}; the nearest is {nearest!r}")
    config = copy.deepcopy(config)
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    flags.validate(config, strategies.STRATEGIES)
    return config


def load(config: ml_collections.ConfigDict, mesh: Mesh, tokenizer: "PreTrainedTokenizerBase") -> Model:
    """The model named by the options, with the first of `config.seeds`.

    Raises:
      ValueError: see `load_model`.
    """
    path, revision, seed = config.model.path, config.model.revision, config.seeds[0]
    decoder = start.load_decoder(config, mesh)
    stop = start.stop_tokens(path, revision, tokenizer, config.data.template)
    params = start.load_params(config, mesh, decoder.dtype)
    adapter = start.initial_lora(config, decoder, mesh, seed)
    return Model(decoder, params, adapter, tokenizer, mesh, stop, seed, config)


def read_pool(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]], model: Model, split: str = "train"
) -> PairPool:
    """The pairs that can be labelled, tokenised for the model, in the order of the data.

    The id of pair `row` is `pool.pair_ids[row]`.  With `group, first, second = pool.pairs[row]` its texts are
    `pool.prompt_texts[group]`, `pool.response_texts[group][first]` and `pool.response_texts[group][second]`.  Notes on
    the data (truncated texts, copies) are printed.

    Args:
      source: a list of dicts, a `datasets.Dataset`, a `.jsonl` or `.parquet` file, or a `datasets` name.  The fields of
        a row are `prompt`, `chosen`, `rejected`, or `prompt`, `responses`; `data.preferences` has the details.
      split: of a `datasets` name.

    Raises:
      ValueError: the source cannot be read, or a record is malformed; names the row (from 0) or the line (from 1).
    """
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        records: Sequence[Record] = read_records(name, split)
    else:
        name, records = "the pool", _records(source)
    pool = tokenized(records, model.config, model.tokenizer)
    check_tokens(pool, model.decoder.config.vocab_size, name)
    for note in pool.notes:
        print(f"pool: {note}")
    return pool


def _records(rows: Any) -> list[Record]:
    """Records of rows in memory, with the ids that `preferences.read_records` would give them."""
    expected = "a list of dicts, a `datasets.Dataset`, a file or a `datasets` name"
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        change = "choose one of its splits" if isinstance(rows, Mapping) else "pass one of these"
        fail("source", f"this is {kind(rows)}", expected, change)

    def located() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                fail(f"row {number}", f"this is {kind(row)}", "a dict with the fields of a record", f"pass {expected}")
            yield f"row {number}", row

    records = named_records(located())
    if not records:
        fail("source", "there is no row", "one at least", "pass more data")
    return records


def tokenized(
    records: Sequence[Record], config: ml_collections.ConfigDict, tokenizer: "PreTrainedTokenizerBase"
) -> PairPool:
    """The pool of these records, with the first of `config.seeds`.

    Raises:
      ValueError: see `start.encoding` and `data.tokenize.encoded_pool`.
    """
    return encoded_pool(records, start.encoding(config, tokenizer), config.seeds[0])


def features(
    model: Model,
    pool: PairPool,
    dim: int = OPTIONS["features.dim"].default,
    *,
    normalisation: str = OPTIONS["features.normalisation"].default,
    groups_per_chunk: int = OPTIONS["features.groups_per_chunk"].default,
) -> np.ndarray:
    """φ of every pair: the difference of the sketched LoRA gradients of its responses (arXiv 2505.19241, eq. 4 and 5).

    Args:
      pool: from `read_pool` with this model.
      dim: D.
      normalisation: `response` scales the gradient of each response to unit length; `none` does not.
      groups_per_chunk: prompts that are processed at a time, with their responses; lower it to save memory.

    Returns:
      [N, D] float32, in the order of the pool.

    Raises:
      ValueError: an option is out of range.
    """
    changes = {
        "features.dim": dim,
        "features.normalisation": normalisation,
        "features.groups_per_chunk": groups_per_chunk,
    }
    return evidence(dataclasses.replace(model, config=_changed(model.config, changes)), pool, "activedpo")["features"]


def evidence(model: Model, pool: PairPool, strategy: str) -> dict[str, np.ndarray]:
    """The evidence that a strategy needs in the first round of a run: [N, ...] each, in the order of the pool."""
    config = copy.deepcopy(model.config)
    # The evidence does not depend on these; other values could be refused.
    config.rounds = config.labels_per_round = 1
    config.candidates.source, config.round.mode, config.features.placement = "pool", "staged", "devices"
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model.params)
    task = tasks.Task(
        decoder=model.decoder,
        base_model=config.model.path,
        params_shape=shapes,
        load_params=lambda: model.params,
        pool=pool,
        heldout=pool,  # nothing is evaluated
        buckets=tuple(sorted(Bucket(*sizes) for sizes in config.data.buckets)),
        stop=model.stop,
    )
    spec = specs.round_spec(config, strategy, task, model.mesh)
    state = initial_state(spec, model.adapter, model.seed)
    found = pool_evidence(spec, model.policy, state, pool, task.buckets)
    return {name: np.asarray(x)[: pool.num_pairs] for name, x in found.items()}


def choose(
    features: Any,
    count: int,
    labelled: Any = None,
    lam: float = OPTIONS["selection.lam"].default,
    strategy: str = "activedpo",
    *,
    seed: int = 0,
) -> Choice:
    """Picks the pairs to label.

    `activedpo` picks argmax φᵀV⁻¹φ, one pair after the other, with V = λI + Σ φφᵀ over all pairs labelled or picked so
    far (arXiv 2505.19241, algorithm 1).

    Args:
      features: [N, D] floats, from `features` or elsewhere; converted to float32.
      count: K.
      labelled: the pairs labelled so far, which count in V: either row numbers [n], which are not picked again, or the
        features [n, D] of pairs outside the pool.
      lam: λ.
      strategy: one that needs only features: `activedpo`, `activedpo_norm`, `activedpo_topk`, `transductive` or
        `random`.
      seed: of all random numbers.

    Returns:
      Rows and scores [K] in pick order, and the information gain; see `Choice`.

    Raises:
      ValueError: an argument has the wrong shape or range, a row of features is not finite, or fewer than K pairs are
        left.
    """
    rule = strategies.get(strategy)
    if not rule.needs <= {"features"}:
        usable = [name for name, other in strategies.STRATEGIES.items() if other.needs <= {"features"}]
        raise ValueError(
            f"strategy: {strategy!r} needs {' and '.join(sorted(rule.needs))}, and `choose` has features alone; "
            f"expected one of {', '.join(usable)}"
        )
    if not (isinstance(lam, int | float | np.number) and math.isfinite(lam) and lam > 0):
        raise ValueError(f"lam: got {lam!r}, expected a number above 0")
    matrix = host.as_features(features, "features")
    available, known = _split(matrix, labelled)
    left = int(available.sum())
    if not (isinstance(count, int | np.integer) and 1 <= count <= left):
        raise ValueError(f"count: got {count!r}, expected from 1 to {left}, the pairs that are not labelled")
    query = host.Query(rule, int(count), float(lam), OPTIONS["selection.block"].default, seed)
    return host.choose(query, {"features": matrix}, available, known, layout.make_mesh(default().mesh))


def _split(matrix: np.ndarray, labelled: Any) -> tuple[np.ndarray, np.ndarray]:
    """Which rows may be picked, [N] bool, and the features of the labelled pairs, [n, D]."""
    available = np.ones(len(matrix), bool)
    given = np.asarray(() if labelled is None else labelled)
    if given.size == 0:
        return available, matrix[:0]
    if given.ndim == 2:
        known = host.as_features(given, "labelled")
        if known.shape[1] != matrix.shape[1]:
            raise ValueError(
                f"labelled: got features of {known.shape[1]} columns, expected {matrix.shape[1]}, as of `features`"
            )
        return available, known
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ValueError(
            f"labelled: got shape {list(given.shape)} of {given.dtype}; expected row numbers [n], or features "
            f"[n, {matrix.shape[1]}]"
        )
    wrong = given[(given < 0) | (given >= len(matrix))]
    if len(wrong) or len(np.unique(given)) < len(given):
        problem = f"row {wrong[0]}" if len(wrong) else "a row twice"
        raise ValueError(f"labelled: got {problem}, expected rows from 0 to {len(matrix) - 1}, each once")
    available[given] = False
    return available, matrix[given]
