"""What every command begins with: a decoder, its base weights, and an adapter, as the options name them."""

import functools
import json
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import layout
from activedpo_jax.data.encoding import Encoding, make_encoding
from activedpo_jax.data.templates import make_template
from activedpo_jax.generation.decoding import DecodingSpec
from activedpo_jax.generation.sampling import Sampling
from activedpo_jax.huggingface import adapters, hub, loading
from activedpo_jax.models.config import LoraConfig, ModelConfig
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora, init_lora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def lora_config(config: ml_collections.ConfigDict) -> LoraConfig:
    lora = config.lora
    return LoraConfig(lora.rank, float(lora.alpha), tuple(lora.target_modules), lora.rslora)


def make_decoder(config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh) -> Decoder:
    """The decoder that `model` describes, with the run's options; dtype `auto` depends on the mesh's platform."""
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return Decoder(
        model,
        lora_config(config),
        jnp.dtype(dtype),
        config.model.remat,
        config.model.logits_chunk,
        config.model.attention,
        mesh,
    )


def load_decoder(config: ml_collections.ConfigDict, mesh: Mesh) -> Decoder:
    """The decoder of `config.model.path`; reads no weights.

    Raises:
      ValueError: see `huggingface.loading.load_config`.
    """
    return make_decoder(config, loading.load_config(config.model.path, config.model.revision), mesh)


def load_params(config: ml_collections.ConfigDict, mesh: Mesh, dtype: Any) -> Params:
    """The base weights of `config.model.path` on the mesh.

    Raises:
      ValueError: see `huggingface.loading.load_model`.
    """
    path, revision = config.model.path, config.model.revision
    shardings = functools.partial(layout.weight_shardings, mesh)
    return loading.load_model(path, revision, dtype, shardings, config.model.quantisation)[1]


def fresh_lora(decoder: Decoder, seed: int) -> Lora:
    return init_lora(decoder.config, decoder.lora, jax.random.fold_in(jax.random.key(seed), 0))


def initial_lora(config: ml_collections.ConfigDict, decoder: Decoder, mesh: Mesh, seed: int) -> Lora:
    """The adapter to start from, on the mesh: the one in `config.lora.path`, or a fresh one from the seed.

    Raises:
      ValueError: see `huggingface.adapters.load_adapter`.
    """
    shardings = functools.partial(layout.weight_shardings, mesh)
    if config.lora.path:
        return adapters.load_adapter(config.lora.path, config.lora.revision, decoder.config, decoder.lora, shardings)
    lora = fresh_lora(decoder, seed)
    return layout.put(lora, shardings(lora))


def template_kwargs(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """`config.data.template_kwargs` as the chat template takes them; raises as `json_object`."""
    return json_object("data.template_kwargs", config.data.template_kwargs)


def json_object(name: str, text: str) -> dict[str, Any]:
    """The fields of the option `config.<name>`; of an empty one none.

    Raises:
      ValueError: the option is not a JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"config.{name}: got {text!r}, expected a JSON object ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"config.{name}: got {text!r}, expected a JSON object")
    return found


def encoding(config: ml_collections.ConfigDict, tokenizer: "PreTrainedTokenizerBase") -> Encoding:
    """How `config.data` has texts become tokens; they are cut to the longest that a bucket holds.

    Raises:
      ValueError: see `template_kwargs` and `data.encoding.make_encoding`.
    """
    data = config.data
    prompt, response = (max(sizes) for sizes in zip(*data.buckets, strict=True))
    return make_encoding(tokenizer, data.template, prompt, response, template_kwargs(config))


def fingerprints(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Fingerprints of the files in `config.model.path` and `config.lora.path`, if given; see `huggingface.hub`."""
    sources = {"model": config.model, "adapter": config.lora}
    return {name: hub.fingerprint(source.path, source.revision) for name, source in sources.items() if source.path}


def stop_tokens(path: str, revision: str, tokenizer: "PreTrainedTokenizerBase", template: str) -> tuple[int, ...]:
    """The tokens that end a response: those named by the model's files and its tokenizer, and the last one that the
    template writes.

    Raises:
      ValueError: there is none.
    """
    writer = make_template(template, tokenizer)
    stop = {*loading.eos_token_ids(path, revision), tokenizer.eos_token_id, *writer.trailing}
    stop |= set(tokenizer(writer.end, add_special_tokens=False)["input_ids"][-1:])
    return tuple(sorted(int(token) for token in stop - {None}))


def text_of(tokenizer: "PreTrainedTokenizerBase", stop: Collection[int]) -> Callable[[np.ndarray], str]:
    """A function from a response's tokens to its text, without the token that ends it."""

    def decode(tokens: np.ndarray) -> str:
        ids = tokens[:-1] if len(tokens) and tokens[-1] in stop else tokens
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return decode


def decoding_spec(
    config: ml_collections.ConfigDict, decoder: Decoder, stop: tuple[int, ...], mesh: Mesh
) -> DecodingSpec:
    """How `config.generation` samples."""
    options = config.generation
    sampling = Sampling(float(options.temperature), options.top_k, float(options.top_p))
    return DecodingSpec(decoder.clone(unrolled=True), sampling, stop, options.max_new_tokens, mesh)
