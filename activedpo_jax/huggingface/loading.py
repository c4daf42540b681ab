"""From Hugging Face: a model directory or a Hub name becomes a config, sharded parameters and a tokenizer.

A checkpoint is checked as a whole from the headers of its files, then goes to the devices tensor by tensor: loading
takes hardly any memory besides what the devices hold.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from activedpo_jax.files import read_json
from activedpo_jax.huggingface import hub
from activedpo_jax.huggingface.families import Family, Weight, family, model_config
from activedpo_jax.huggingface.tensors import Tensor, equal, put_tensor, read_headers
from activedpo_jax.models.config import LoraConfig, ModelConfig
from activedpo_jax.models.decoder import Decoder, Params, init_params
from activedpo_jax.models.quantise import is_quantised, quantise_kernel, quantise_params
from activedpo_jax.progress import Progress, progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_GENERATION = "generation_config.json"
_EXPECTED = ("a Hugging Face model directory", "config.model")  # what a path should hold, and the options that give it
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = ("F64", "F32", "F16", "BF16")  # anything else is a quantised checkpoint


def load_config(path: str, revision: str = "") -> ModelConfig:
    """The decoder that a model's `config.json` describes.

    Args:
      path: a directory, or a name on the Hub.
      revision: branch, tag or commit on the Hub; empty: the default branch.

    Raises:
      ValueError: there is no such model, or it has a feature that is not supported.
    """
    return _read_config(_fetch(path, revision, [_CONFIG]))[1]


def load_tokenizer(path: str, revision: str = "") -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, with its chat template if it has one; arguments and errors as in `load_config`."""
    from transformers import AutoTokenizer  # takes seconds, for which a run without a tokenizer need not wait

    hub.refuse_missing_directory(path, *_EXPECTED)
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{hub.named(path, revision)}: no tokenizer that transformers can load: {error}") from error


def eos_token_ids(path: str, revision: str = "") -> tuple[int, ...]:
    """The tokens that end a response, from `generation_config.json`, or if that names none, from `config.json`.

    Arguments and errors as in `load_config`.
    """
    folder = _fetch(path, revision, [_CONFIG, _GENERATION])
    for name in (_GENERATION, _CONFIG):
        stored = read_json(folder / name) if (folder / name).exists() else {}
        found = stored.get("eos_token_id") if isinstance(stored, dict) else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def load_model(
    path: str,
    revision: str = "",
    dtype: Any = jnp.float32,
    shardings: Callable[[Params], Any] | None = None,
    quantisation: str = "none",
) -> tuple[ModelConfig, Params]:
    """A model from safetensors, single or sharded.

    Args:
      path, revision: as in `load_config`.
      dtype: the parameters are converted to it.
      shardings: takes the parameter tree as `jax.ShapeDtypeStruct`s and returns a `jax.sharding.NamedSharding` for
        each; None: all on the default device.
      quantisation: none, int8 or nf4: the kernels are quantised one by one, from the checkpoint's own dtype.

    Returns:
      The config, and the parameters of `Decoder` ([in, out] kernels, stacked over layers), quantised as in
      `quantise_params`.

    Raises:
      ValueError: there is no such model; it has a feature that is not supported; tensors are missing, misshapen,
        quantised, or not of this family; `quantisation` needs qwix, which is not installed.
    """
    folder = _fetch(path, revision, [_CONFIG, _INDEX, _SINGLE])
    model_family, config = _read_config(folder)
    files = _weight_files(folder)
    # So far, only the small files of a sharded model on the Hub have been fetched.
    folder = _fetch(path, revision, [_CONFIG, _INDEX, *files])

    decoder = Decoder(config, LoraConfig())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype),
        jax.eval_shape(lambda: init_params(decoder, jax.random.key(0))),
    )
    paths = [tuple(k.key for k in keys) for keys, _ in jax.tree.leaves_with_path(shapes)]
    leaves = jax.tree.leaves(shapes)
    weights = [model_family.weights[path] for path in paths]
    tensors = read_headers([folder / name for name in files])
    if config.tie_embeddings and _HEAD in tensors and _EMBEDDINGS not in tensors:
        tensors[_EMBEDDINGS] = tensors.pop(_HEAD)  # one table under either name
    _check(tensors, weights, [leaf.shape for leaf in leaves], folder)

    default = jnp.zeros(()).sharding
    place = shardings or functools.partial(jax.tree.map, lambda _: default)
    unquantised = jax.tree.leaves(place(shapes))
    result = jax.eval_shape(functools.partial(quantise_params, quantisation=quantisation), shapes)
    targets, structure = jax.tree.flatten(result, is_leaf=is_quantised)
    places = jax.tree.leaves(place(result), is_leaf=is_quantised)
    parts = [[tensors[name] for name in _names(w, x.shape)] for w, x in zip(weights, leaves, strict=True)]
    transits = [_transit(x, w, several[0]) for x, w, several in zip(unquantised, weights, parts, strict=True)]
    routes = [_Route(*route) for route in zip(parts, weights, transits, targets, places, strict=True)]
    params: list[Any] = [None] * len(routes)
    # The largest tensors first: the extra memory of their conversion is free again by the time the devices fill up.
    order = sorted(range(len(routes)), key=lambda i: -math.prod(parts[i][0].shape))
    with progress(total=sum(map(len, parts)), desc=f"loading {path}", unit="tensor") as bar:
        for i in order:
            params[i] = _load_leaf(routes[i], quantisation, bar)
    return config, jax.tree.unflatten(structure, params)


def _fetch(path: str, revision: str, patterns: Sequence[str]) -> pathlib.Path:
    return hub.fetch(path, revision, patterns, *_EXPECTED)


def _read_config(folder: pathlib.Path) -> tuple[Family, ModelConfig]:
    file = folder / _CONFIG
    if not file.exists():
        raise ValueError(f"{folder}: no {_CONFIG}; expected {_EXPECTED[0]}: set {_EXPECTED[1]}.path")
    hf_config = read_json(file)
    if not isinstance(hf_config, dict):
        raise ValueError(f"{file}: got a {type(hf_config).__name__}, expected a model's config: restore the file")
    try:
        return family(hf_config), model_config(hf_config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _weight_files(folder: pathlib.Path) -> list[str]:
    """Names of the checkpoint's files: the single file, or else those of the index, as in transformers.

    Raises:
      ValueError: the index is malformed.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).exists() or not index.exists():
        return [_SINGLE]
    stored = read_json(index)
    if not isinstance(stored, dict) or not isinstance(stored.get("weight_map"), dict):
        raise ValueError(f"{index}: no weight_map in it; expected the index of a sharded checkpoint: restore the file")
    return sorted(set(stored["weight_map"].values()))


def _names(weight: Weight, shape: Sequence[int]) -> list[str]:
    """The tensors of one leaf of the parameter tree."""
    return [weight.name.format(layer=i) for i in range(shape[0])] if "{layer}" in weight.name else [weight.name]


def _check(
    tensors: Mapping[str, Tensor],
    weights: Sequence[Weight],
    shapes: Sequence[tuple[int, ...]],
    folder: pathlib.Path,
) -> None:
    """Checks the checkpoint against the config: every tensor, of the right shape, and no other."""
    expected: dict[str, tuple[int, ...]] = {}
    for weight, shape in zip(weights, shapes, strict=True):
        part = shape[1:] if "{layer}" in weight.name else shape
        expected |= dict.fromkeys(_names(weight, shape), part[::-1] if weight.transposed else part)

    faults = []
    for name, shape in expected.items():
        if name not in tensors:
            faults.append(f"{folder}: missing tensor {name}, expected with shape {list(shape)}")
            continue
        file, _, found, dtype = tensors[name]
        if found != shape:
            faults.append(f"{file}: tensor {name} has shape {list(found)}; {_CONFIG} says {list(shape)}")
        if dtype not in _DTYPES:
            faults.append(f"{file}: tensor {name} is {dtype}; expected one of {', '.join(_DTYPES)}")
    for name in sorted(tensors.keys() - expected.keys()):
        if name.endswith(".rotary_emb.inv_freq"):
            continue  # a table that older versions of transformers saved
        if name == _HEAD:  # of tied embeddings: saved under both names, or a contradiction
            if _EMBEDDINGS in tensors and not equal(tensors[_HEAD], tensors[_EMBEDDINGS]):
                faults.append(
                    f"{tensors[name].file}: tensor {name} differs from {_EMBEDDINGS}, but {_CONFIG} has "
                    "tie_word_embeddings=true: set it to false to use both, or remove the tensor"
                )
            continue
        faults.append(
            f"{tensors[name].file}: unexpected tensor {name} of shape {list(tensors[name].shape)}, "
            f"which {_CONFIG} has no place for"
        )
    if faults:
        rest = [f"... and {len(faults) - 5} more such"] if len(faults) > 5 else []
        raise ValueError("\n".join(["the checkpoint does not match its config:", *faults[:5], *rest]))


class _Route(NamedTuple):
    """How a leaf of the parameter tree gets from the checkpoint to the devices."""

    parts: Sequence[Tensor]  # one tensor, or those of all layers
    weight: Weight
    transit: Sharding  # of a tensor on its way
    leaf: Any  # shape and dtype of the leaf, or of codes and scales if it is quantised
    place: Any  # the sharding of each


def _load_leaf(route: _Route, quantisation: str, bar: Progress) -> Any:
    """A leaf of the parameter tree: one tensor, or those of all layers written one by one into their stack."""
    parts, weight, transit, leaf, place = route

    def convert(tensor: jax.Array) -> Any:
        tensor = tensor.T if weight.transposed else tensor
        return quantise_kernel(tensor, quantisation) if is_quantised(leaf) else tensor.astype(leaf.dtype)

    if "{layer}" not in weight.name:
        (part,) = parts
        converted = convert(put_tensor(part, transit))
        bar.update()
        return jax.block_until_ready(converted)

    def write(stack: Any, tensor: jax.Array, layer: int) -> Any:
        return jax.tree.map(
            lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, layer, axis=0), stack, convert(tensor)
        )

    stack = jax.tree.map(lambda x, device: jnp.zeros(x.shape, x.dtype, device=device), leaf, place)
    write_in_place = jax.jit(write, donate_argnums=0, out_shardings=place)
    for layer, part in enumerate(parts):
        stack = jax.block_until_ready(write_in_place(stack, put_tensor(part, transit), layer))
        bar.update()
    return stack


def _transit(place: Sharding, weight: Weight, part: Tensor) -> Sharding:
    """The sharding under which a tensor in the checkpoint's shape needs no exchange to become its slice of a leaf."""
    if not isinstance(place, NamedSharding):
        return place  # one device
    stacked = "{layer}" in weight.name
    axes = (*place.spec, *[None] * len(part.shape))[stacked : stacked + len(part.shape)]
    return NamedSharding(place.mesh, PartitionSpec(*(axes[::-1] if weight.transposed else axes)))
