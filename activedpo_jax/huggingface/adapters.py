"""PEFT's LoRA adapters: written as `peft.PeftModel.from_pretrained` loads them, and read as the start of a run."""

import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from activedpo_jax import hosts, layout
from activedpo_jax.files import read_json, write_atomic, write_json
from activedpo_jax.huggingface import hub
from activedpo_jax.huggingface.families import LINEAR_MAPS
from activedpo_jax.huggingface.tensors import Tensor, read_headers
from activedpo_jax.models.config import LoraConfig, ModelConfig
from activedpo_jax.models.lora import Lora, init_lora

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DTYPES = ("F64", "F32", "F16", "BF16")

# Fields of an adapter's config that are read here, or that do not affect what the adapter computes.  In any other
# field, known or from a later PEFT, a value that is not off makes it another kind of adapter.
_READ = {"r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_READ |= {"peft_type", "rank_pattern", "alpha_pattern", "init_lora_weights", "lora_dropout", "base_model_name_or_path"}
_IRRELEVANT = {"auto_mapping", "inference_mode", "peft_version", "revision", "task_type", "runtime_config"}
_IRRELEVANT |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # for `init_lora_weights`
_IRRELEVANT |= {"qalora_group_size", "megatron_core", "ensure_weight_tying"}  # for features that are off
# These leave the base weights as they are.  The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract the first BA
# from them, and the adapter belongs to what remains; PEFT's own conversion of such an adapter writes `true`.
_INITIALISATIONS = {"none", "true", "false", "gaussian", "orthogonal", "eva", "mica"}
_ADVICE = "merge the adapter into its base model with peft, and set config.model.path to the result"


def save_adapter(
    lora: Lora, lora_config: LoraConfig, base_model_name: str, directory: pathlib.Path, revision: str = ""
) -> None:
    """Writes `adapter_model.safetensors` (float32) and `adapter_config.json`, each whole or not at all.

    Args:
      lora: {"layers": {module: {"a": [L, r, d_in], "b": [L, d_out, r]}}}.
      base_model_name, revision: directory or Hub name of the model that the adapter belongs to, and its revision.

    Raises:
      ValueError: the matrices are not those of `lora_config`.
    """
    layers = layout.get(lora["layers"])
    found = {module: matrices["a"].shape[1] for module, matrices in layers.items()}
    expected = dict.fromkeys(lora_config.target_modules, lora_config.rank)
    if found != expected:
        raise ValueError(f"the adapter has matrices of rank {found}; its config says {expected}")
    _write(layers, lora_config, (base_model_name, revision), directory)


@hosts.on_first
def _write(layers: Any, lora_config: LoraConfig, base_model: tuple[str, str], directory: pathlib.Path) -> None:
    base_model_name, revision = base_model
    tensors = {}
    for module, matrices in layers.items():
        name = f"{_PREFIX}{LINEAR_MAPS[module]}"
        for key, matrix in (("lora_A", matrices["a"]), ("lora_B", matrices["b"])):
            for layer, part in enumerate(matrix):
                tensors[f"{name.format(layer=layer)}.{key}.weight"] = np.ascontiguousarray(part, np.float32)

    # Not `save_file`, whose files only their owner can read.
    write_atomic(directory / _WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(
        directory / _CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model_name,
            "r": lora_config.rank,
            "lora_alpha": _plain_number(lora_config.alpha),
            "use_rslora": lora_config.rslora,
            "target_modules": sorted(layers),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            **({"revision": revision} if revision else {}),
        },
    )


def load_adapter(
    path: str,
    revision: str,
    model_config: ModelConfig,
    lora_config: LoraConfig,
    shardings: Callable[[Lora], Any] | None = None,
) -> Lora:
    """A LoRA adapter saved by `peft`, as the starting point of a run; prints notes about it.

    It may have been trained on the model with its language-model head, or without it.  In layers that it leaves out
    (`layers_to_transform`, a regular expression), A and B are zero: there is no LoRA, in training too, since the
    gradient of either is a multiple of the other.

    Args:
      path: a directory, or a name on the Hub.
      revision: branch, tag or commit on the Hub; empty: the default branch.
      model_config: of the base model.  Whether the adapter was trained on its weights is not checked.
      lora_config: must describe the adapter.
      shardings: takes the adapter as `jax.ShapeDtypeStruct`s and returns a `jax.sharding.Sharding` for each; None:
        all on the default device.

    Returns:
      {"layers": {module: {"a": [L, r, d_in], "b": [L, d_out, r]}}}, float32.

    Raises:
      ValueError: there is no such adapter; it is not plain LoRA on the linear maps of the layers; `lora_config`
        describes another (says which flags to set); tensors are missing, misshapen, not finite, or unexpected.
    """
    folder = hub.fetch(path, revision, [_CONFIG, _WEIGHTS], "a PEFT adapter", "config.lora")
    if not (folder / _CONFIG).exists():
        raise ValueError(f"{folder}: no {_CONFIG}; expected a PEFT adapter: set config.lora.path")
    if not (folder / _WEIGHTS).exists():
        raise ValueError(f"{folder}: no {_WEIGHTS}; an adapter in another format (.bin) has to be saved anew by peft")
    adapter = read_json(folder / _CONFIG)
    tensors = read_headers([folder / _WEIGHTS])
    bare = any(name.startswith(f"{_PREFIX}layers.") for name in tensors)
    maps = {m: name.removeprefix("model.") if bare else name for m, name in LINEAR_MAPS.items()}
    try:
        _refuse_unsupported(adapter)
        layers = _target_layers(adapter, maps, model_config.num_layers)
    except ValueError as error:
        raise ValueError(f"{folder / _CONFIG}: {error}") from error
    _hold_to_options(hub.named(path, revision), adapter, tuple(layers), lora_config)

    shapes = jax.eval_shape(lambda: init_lora(model_config, lora_config, jax.random.key(0)))
    expected = {
        name: shapes["layers"][module][key].shape[1:]
        for module in layers
        for key, _, name in _tensor_names(maps[module], layers[module])
    }
    _check(tensors, expected, folder)
    places = {"layers": {m: {"a": None, "b": None} for m in layers}} if shardings is None else shardings(shapes)
    lora: Lora = {"layers": {module: {} for module in layers}}
    with safe_open(folder / _WEIGHTS, framework="numpy") as file:
        for module in layers:
            stacks = {key: np.zeros(shape.shape, np.float32) for key, shape in shapes["layers"][module].items()}
            for key, layer, name in _tensor_names(maps[module], layers[module]):
                stacks[key][layer] = file.get_tensor(name)
                if not np.all(np.isfinite(stacks[key][layer])):
                    raise ValueError(
                        f"{folder / _WEIGHTS}: tensor {name} has entries that are not finite: train it anew"
                    )
            lora["layers"][module] = {k: layout.put(x, places["layers"][module][k]) for k, x in stacks.items()}
    print(f"adapter {hub.named(path, revision)}: {'; '.join(_notes(adapter, layers, model_config.num_layers))}")
    return lora


def _tensor_names(linear_map: str, layers: list[int]) -> Iterator[tuple[str, int, str]]:
    """(matrix, layer, tensor name) for each matrix of one module."""
    for layer in layers:
        for key in ("a", "b"):
            yield key, layer, f"{_PREFIX}{linear_map.format(layer=layer)}.lora_{key.upper()}.weight"


def _refuse_unsupported(adapter: Mapping[str, Any]) -> None:
    if adapter.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {adapter.get('peft_type')!r}; only LORA is supported: {_ADVICE}")
    missing = [name for name in ("r", "lora_alpha", "target_modules") if not adapter.get(name)]
    if missing:
        raise ValueError(f"no {', '.join(missing)}; expected in the config of every LoRA adapter")
    init = adapter.get("init_lora_weights", True)
    if str(init).lower() not in _INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={init!r} has changed the base weights that this adapter belongs to: save it with "
            f"peft's path_initial_model_for_weight_conversion, or {_ADVICE}"
        )
    for pattern, default in (("rank_pattern", adapter["r"]), ("alpha_pattern", adapter["lora_alpha"])):
        if set((adapter.get(pattern) or {}).values()) - {default}:
            raise ValueError(
                f"{pattern}={adapter[pattern]!r} is not supported, only {default} throughout is: {_ADVICE}"
            )
    for name in sorted(adapter.keys() - _READ - _IRRELEVANT):
        off: tuple[Any, ...] = (None, "none") if name == "bias" else (None, False, [], {})
        if adapter[name] not in off:
            raise ValueError(f"{name}={adapter[name]!r} is not supported, only plain LoRA is: {_ADVICE}")


def _target_layers(adapter: Mapping[str, Any], maps: Mapping[str, str], num_layers: int) -> dict[str, list[int]]:
    """Which layers have LoRA on each of the modules, by module; those with none are left out."""
    for name in ("lm_head", "model.embed_tokens", "embed_tokens"):
        if adapter["target_modules"] != "all-linear" and _is_target(adapter, name, None):
            raise ValueError(f"target_modules has {name}; LoRA is supported on {', '.join(maps)}: {_ADVICE}")
    found = {
        module: [i for i in range(num_layers) if _is_target(adapter, name.format(layer=i), i)]
        for module, name in maps.items()
    }
    if not any(found.values()):
        raise ValueError(f"target_modules={adapter['target_modules']!r} has none of {', '.join(maps)}")
    return {module: layers for module, layers in found.items() if layers}


def _is_target(adapter: Mapping[str, Any], name: str, layer: int | None) -> bool:
    """PEFT's rule: a string is a regular expression of whole names, a list has whole names or their ends."""

    def matches(pattern: str | list[str] | None) -> bool:
        if isinstance(pattern, str):
            return re.fullmatch(pattern, name) is not None
        return any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern or ())

    targets, layers = adapter["target_modules"], adapter.get("layers_to_transform")
    if matches(adapter.get("exclude_modules")):
        return False
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or matches(targets)
    if name in targets or layers in (None, []):
        return matches(targets)
    return matches(targets) and layer in ([layers] if isinstance(layers, int) else layers)


def _hold_to_options(source: str, adapter: Mapping[str, Any], modules: tuple[str, ...], config: LoraConfig) -> None:
    found = {
        "rank": (adapter["r"], config.rank),
        "alpha": (_plain_number(adapter["lora_alpha"]), config.alpha),
        "rslora": (bool(adapter.get("use_rslora")), config.rslora),
    }
    flags = [f"--config.lora.{name}={stored}" for name, (stored, given) in found.items() if stored != given]
    if set(modules) != set(config.target_modules):
        flags.append(f"--config.lora.target_modules={','.join(modules)}")
    if flags:
        raise ValueError(
            f"{source}: config.lora describes another adapter; to start from this one set {' '.join(flags)}"
        )


def _plain_number(value: float) -> float:
    return int(value) if value == int(value) else value


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], folder: pathlib.Path) -> None:
    faults = []
    for name, shape in expected.items():
        if name not in tensors:
            faults.append(f"missing tensor {name}, expected with shape {list(shape)}")
        elif tensors[name].shape != shape:
            faults.append(f"tensor {name} has shape {list(tensors[name].shape)}; expected {list(shape)}")
        elif tensors[name].dtype not in _DTYPES:
            faults.append(f"tensor {name} is {tensors[name].dtype}; expected one of {', '.join(_DTYPES)}")
    for name in sorted(tensors.keys() - expected.keys()):
        faults.append(f"unexpected tensor {name} of shape {list(tensors[name].shape)}")
    if faults:
        rest = [f"... and {len(faults) - 5} more such"] if len(faults) > 5 else []
        start = f"{folder / _WEIGHTS}: the tensors do not match {_CONFIG} and the base model:"
        raise ValueError("\n".join([start, *faults[:5], *rest]))


def _notes(adapter: Mapping[str, Any], layers: Mapping[str, list[int]], num_layers: int) -> list[str]:
    notes = [f"made for {adapter.get('base_model_name_or_path') or 'a model without a name'}"]
    if adapter.get("lora_dropout"):
        notes.append(f"lora_dropout={adapter['lora_dropout']} left out, training here has none")
    partial = [f"{module} in {', '.join(map(str, i))}" for module, i in layers.items() if len(i) < num_layers]
    if partial:
        notes.append(f"LoRA in some of the {num_layers} layers alone ({'; '.join(partial)})")
    return notes
