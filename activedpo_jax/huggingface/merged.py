"""To Hugging Face: base weights, with or without an adapter merged into them, as a checkpoint."""

import functools
import json
import os
import pathlib
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax import hosts, layout
from activedpo_jax.files import read_json, remove_folder, write_atomic, write_json
from activedpo_jax.huggingface import hub, loading
from activedpo_jax.huggingface.families import family
from activedpo_jax.models.config import LoraConfig
from activedpo_jax.models.decoder import Decoder, Params, init_params
from activedpo_jax.models.lora import Lora, init_lora
from activedpo_jax.models.quantise import Kernel, dequantise, is_quantised
from activedpo_jax.progress import progress
from activedpo_jax.remote import in_store

_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
# Other files of the base model that belong to the new one.
_COPIED = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "chat_template*", "additional_chat_templates/*"),
)
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as safetensors calls them


class Weights(NamedTuple):
    """Base weights, and the adapter to merge into them."""

    params: Params  # of `Decoder`, on any sharding; quantised kernels are written dequantised
    lora: Lora | None = None  # None: the parameters are written as they are, as after training all of them
    lora_config: LoraConfig = LoraConfig()  # of the adapter


class _Source(NamedTuple):
    """Where one tensor of the checkpoint comes from."""

    leaf: Kernel
    layer: int | None  # of a stacked leaf
    matrices: dict[str, jax.Array] | None  # LoRA's A and B, stacked
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = _shape(self.leaf) if self.layer is None else _shape(self.leaf)[1:]
        return shape[::-1] if self.transposed else shape


def _shape(leaf: Any) -> tuple[int, ...]:
    """The shape of a leaf, or of the kernels [L, in, out] that codes [L, tiles, in/tiles, out] stand for."""
    if not is_quantised(leaf):
        return tuple(leaf.shape)
    layers, tiles, rows, columns = leaf.qvalue.shape
    return layers, tiles * rows, columns


def save_merged(
    weights: Weights,
    base_model: str,
    revision: str,
    directory: pathlib.Path,
    dtype: Any,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes W + scale·BA as a checkpoint that `transformers` loads, with the base model's config and tokenizer.

    Tensors are merged in float32 on the devices that hold them, converted, and written one by one: host memory holds
    one at a time.  The checkpoint is written next to `directory` and renamed at the end, so that it is complete there;
    in an object store it is complete once its config.json is there, and the host's disk holds one file at a time.

    Args:
      base_model, revision: the directory or Hub name that the parameters came from.
      directory: is made; may exist if it is empty.
      dtype: of the checkpoint: float32, bfloat16 or float16.
      max_shard_size: of a file, in bytes or as "5GB"; a larger tensor gets a file of its own.

    Raises:
      ValueError: `directory` is taken; there is no such base model; parameters or adapter do not have its shapes; the
        dtype is another; a weight is not finite in it.
    """
    params, lora, lora_config = weights
    dtype = jnp.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise ValueError(f"dtype: got {dtype.name}, expected one of {', '.join(_DTYPES)}")
    if hosts.on_first(_is_taken)(directory):
        raise ValueError(f"{directory}: already there; remove it, or write to another directory")
    decoder = Decoder(loading.load_config(base_model, revision), lora_config)
    _hold_to_shapes(params, lambda: init_params(decoder, jax.random.key(0)), "parameters", base_model)
    if lora is not None:
        _hold_to_shapes(lora, lambda: init_lora(decoder.config, lora_config, jax.random.key(0)), "adapter", base_model)
    folder = hub.fetch(base_model, revision, [_CONFIG, *_COPIED], "a Hugging Face model directory", "config.model")
    config = read_json(folder / _CONFIG)

    sources = _sources(config, params, lora)
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        sources,
        get_storage_size=lambda source: int(np.prod(source.shape)) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    partial = directory if in_store(directory) else directory.with_name(directory.name + ".partial")
    hosts.on_first(_made_anew)(partial)
    with progress(total=len(sources), desc=f"writing {directory}", unit="tensor") as bar:

        def read(name: str) -> np.ndarray:
            tensor, finite = _merged(*sources[name], lora_config.scale, dtype)
            if not finite:
                raise ValueError(f"tensor {name} of {directory} has entries that are not finite in {dtype.name}")
            bar.update()
            return np.asarray(layout.get(tensor))

        for file, names in plan.filename_to_tensors.items():
            shapes = {name: sources[name].shape for name in names}
            _write(partial / file, _safetensors(shapes, dtype, read))

    hosts.on_first(_complete)(partial, directory, folder, plan, dtype)


def _is_taken(directory: pathlib.Path) -> bool:
    if in_store(directory):
        return (directory / _CONFIG).exists()
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


def _made_anew(directory: pathlib.Path) -> None:
    remove_folder(directory)
    directory.mkdir(parents=True)


def _complete(
    partial: pathlib.Path,
    directory: pathlib.Path,
    folder: pathlib.Path,
    plan: huggingface_hub.StateDictSplit,
    dtype: Any,
) -> None:
    """Writes what belongs to the weights, the base model's files in `folder` among them, and renames the whole."""
    config = read_json(folder / _CONFIG)
    if plan.is_sharded:
        write_json(partial / _INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    for source in (path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()):
        write_atomic(partial / source.relative_to(folder), source.read_bytes())
    # Versions of transformers before 4.56 know only the name `torch_dtype`.
    older = {"torch_dtype": dtype.name} if "torch_dtype" in config else {}
    write_json(partial / _CONFIG, {**config, "dtype": dtype.name, **older})
    if partial != directory:
        os.replace(partial, directory)


def _hold_to_shapes(tree: Any, init: Callable[[], Any], kind: str, base_model: str) -> None:
    expected, found = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): _shape(leaf)
            for path, leaf in jax.tree.leaves_with_path(t, is_leaf=is_quantised)
        }
        for t in (jax.eval_shape(init), tree)
    )
    for name in sorted(expected | found):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{name} of the {kind} has shape {found.get(name)}; by the config of {base_model} it has "
                f"{expected.get(name)}: give the model and the LoRA options that it was made with"
            )


def _sources(config: Mapping[str, Any], params: Params, lora: Lora | None) -> dict[str, _Source]:
    """Every tensor of the checkpoint by name, the layers in their order."""
    weights = family(config).weights
    sources: dict[str, _Source] = {}
    for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=is_quantised):
        path = tuple(k.key for k in keys)
        weight = weights[path]
        if "{layer}" not in weight.name:
            sources[weight.name] = _Source(leaf, None, None, weight.transposed)
            continue
        adapters = lora["layers"] if lora is not None and path[-1] == "kernel" else {}
        for layer in range(_shape(leaf)[0]):
            name = weight.name.format(layer=layer)
            sources[name] = _Source(leaf, layer, adapters.get(path[-2]), weight.transposed)
    natural = {name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)] for name in sources}
    return {name: sources[name] for name in sorted(sources, key=natural.__getitem__)}


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _merged(
    leaf: Kernel,
    layer: int | None,
    matrices: dict[str, jax.Array] | None,
    transposed: bool,
    scale: float,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """One tensor, and whether all of it is finite.  The layer is traced: a constant would be recompiled for each."""
    part: Any = leaf if layer is None else jax.tree.map(lambda stack: stack[layer], leaf)
    if is_quantised(part):
        part = dequantise(part, jnp.float32).reshape(-1, _shape(leaf)[-1])
    weight = part.astype(jnp.float32)
    if matrices is not None:
        # HIGHEST: by default, GPUs and TPUs multiply float32 in fewer bits.
        weight += scale * jnp.matmul(matrices["b"][layer], matrices["a"][layer], precision=jax.lax.Precision.HIGHEST).T
    weight = (weight.T if transposed else weight).astype(dtype)
    return weight, jnp.isfinite(weight).all()


def _safetensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: Any, read: Callable[[str], np.ndarray]
) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces, a tensor at a time; the library's own writer takes all of them at once.

    Format: https://huggingface.co/docs/safetensors: the length of the header (64 bits), the header, the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    yield struct.pack("<Q", len(text))
    yield text
    for name in shapes:
        # As bytes, since NumPy exports no buffer of bfloat16.
        yield np.ascontiguousarray(read(name)).reshape(-1).view(np.uint8).data


def _write(path: pathlib.Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Several processes make the pieces together, and the first writes them."""
    if not hosts.is_first():
        for _ in pieces:
            pass
        return
    if there := in_store(path):
        with tempfile.TemporaryDirectory() as place:
            _write(pathlib.Path(place) / path.name, pieces)
            there.upload(pathlib.Path(place) / path.name)
        return
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
