"""An exported adapter is what `peft` takes it for, and `peft`'s adapters are what they are taken for here."""

import dataclasses
import functools
import json
import pathlib
import re
import stat
from collections.abc import Callable
from typing import Any

import huggingface_hub
import jax
import ml_collections
import numpy as np
import peft as theirs
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM, LlamaModel

from activedpo_jax import files, flags, layout
from activedpo_jax.data.groups import Groups
from activedpo_jax.huggingface import adapters
from activedpo_jax.models.config import LoraConfig, ModelConfig
from activedpo_jax.models.decoder import Decoder
from activedpo_jax.models.lora import Lora, init_lora
from tests import tiny
from tests.tiny_hf import load_decoder, tiny_llama, torch_logps

# As `tiny_llama` makes it.
MODEL = ModelConfig(
    vocab_size=tiny.MODEL.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
)


# --- Out


def random_adapter(config: LoraConfig, seed: int = 0) -> Lora:
    """A and B both random, as after some training."""
    rng = np.random.default_rng(seed)
    zeros = init_lora(MODEL, config, jax.random.key(0))
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), zeros)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, alpha=8.0),
        LoraConfig(rank=4, alpha=8.0, rslora=True),
        LoraConfig(rank=8, alpha=32.0),
        LoraConfig(rank=2, alpha=3.5, target_modules=("v_proj", "q_proj")),
        LoraConfig(rank=3, alpha=6.0, target_modules=("o_proj", "down_proj", "up_proj"), rslora=True),
    ],
    ids=["all modules", "rsLoRA", "the paper's ratio", "two modules, broken alpha", "three modules, rsLoRA"],
)
def test_peft_gives_the_same_log_probs(tmp_path: pathlib.Path, config: LoraConfig) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    decoder, params = load_decoder(tmp_path / "base")
    assert decoder.config == MODEL
    lora = random_adapter(config)
    batch = tiny.groups(seed=1, count=3, m=2)
    ours = np.asarray(jax.jit(decoder.clone(lora=config).apply)({"params": params, "lora": lora}, batch))
    assert np.abs(ours - logps(params, batch)).max() > 0.1

    adapters.save_adapter(lora, config, str(tmp_path / "base"), tmp_path / "adapter")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(ours, torch_logps(model, batch), rtol=0, atol=1e-4)
    # What the adapter does not hold, peft would have left at its own initialisation without a word.
    assert get_peft_model_state_dict(model).keys() == tensors(tmp_path / "adapter").keys()


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping


def test_the_files(tmp_path: pathlib.Path) -> None:
    config = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
    lora = random_adapter(config)
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    sharded = jax.device_put(lora, layout.weight_shardings(mesh, lora))
    adapters.save_adapter(sharded, config, "someone/base", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "someone/base"
    assert written["target_modules"] == ["down_proj", "q_proj"]

    found = tensors(tmp_path)
    assert len(found) == 3 * 2 * 2
    assert {t.dtype.name for t in found.values()} == {"float32"}
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"
    np.testing.assert_array_equal(found[name], lora["layers"]["down_proj"]["b"][2])
    # Whoever may read the one file may read the other.
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_an_adapter_is_replaced_whole(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",))
    old, new = random_adapter(config), random_adapter(config, seed=5)
    adapters.save_adapter(old, config, "base", tmp_path)
    before = tensors(tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            adapters.save_adapter(new, config, "base", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, tensors(tmp_path), before)
    adapters.save_adapter(new, config, "base", tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors(tmp_path)[name], new["layers"]["q_proj"]["a"][0])


@pytest.mark.parametrize("change", [{"rank": 8}, {"target_modules": ("q_proj", "v_proj")}], ids=str)
def test_an_adapter_of_another_config_is_refused(tmp_path: pathlib.Path, change: dict[str, Any]) -> None:
    config = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",))
    with pytest.raises(ValueError, match="rank {'q_proj': 4}; its config says"):
        adapters.save_adapter(
            random_adapter(config), dataclasses.replace(config, **change), "base", tmp_path / "adapter"
        )
    assert not (tmp_path / "adapter").exists()


# --- In

ALL = LoraConfig().target_modules


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder, tie_word_embeddings=True)
    return folder


def make_adapter(
    base: pathlib.Path, folder: pathlib.Path, config: Any = None, bare: bool = False, dtype: Any = None, **fields: Any
) -> Any:
    """An adapter that `peft` has made and saved, whose A and B are both random, as after some training."""
    model = (LlamaModel if bare else LlamaForCausalLM).from_pretrained(base)
    config = config or theirs.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields})
    model = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
            parameter.data = parameter.data.to(dtype or torch.float32)
    model.save_pretrained(folder)
    return model.float()


@functools.cache
def compiled() -> Any:
    return jax.jit(Decoder(MODEL, LoraConfig()).apply)


def logps(params: Any, batch: Groups) -> np.ndarray:
    """Of the model without LoRA, compiled once for all tests."""
    return np.asarray(compiled()({"params": params}, batch))


def merged(params: Any, lora: Lora, config: LoraConfig) -> Any:
    """W + alpha/r·BA, or alpha/√r·BA, in float64."""
    scale = config.alpha / (np.sqrt(config.rank) if config.rslora else config.rank)
    layers = dict(params["layers"])
    for module, matrices in lora["layers"].items():
        a, b = (np.asarray(matrices[key], np.float64) for key in "ab")
        kernel = layers[module]["kernel"] + scale * np.einsum("lor,lri->lio", b, a)
        layers[module] = {"kernel": kernel.astype(np.float32)}
    return {**params, "layers": layers}


def load(folder: pathlib.Path, config: LoraConfig) -> Lora:
    return adapters.load_adapter(str(folder), "", MODEL, config)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"use_rslora": True, "r": 8, "lora_alpha": 32}, {"rank": 8, "alpha": 32.0, "rslora": True}),
        ({"target_modules": "all-linear", "lora_dropout": 0.5}, {"target_modules": ALL}),
        ({"target_modules": list(ALL), "init_lora_weights": "orthogonal"}, {"target_modules": ALL}),
        ({"target_modules": ["mlp.up_proj", "k_proj", "w1"]}, {"target_modules": ("up_proj", "k_proj")}),
        ({"layers_to_transform": [2, 0]}, {}),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, {}),
        (
            {"target_modules": r".*\.[12]\.(self_attn\.[qk]|mlp\.up)_proj"},
            {"target_modules": ("q_proj", "k_proj", "up_proj")},
        ),
        (
            {"target_modules": "all-linear", "exclude_modules": r".*\.(0\.mlp|self_attn)\..*"},
            {"target_modules": ALL[4:]},
        ),
        ({"exclude_modules": ["0.self_attn.v_proj"]}, {}),
        ({"target_modules": ["model.layers.1.mlp.down_proj", "o_proj"]}, {"target_modules": ("o_proj", "down_proj")}),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {".*": 8}}, {}),
        ({"bare": True, "target_modules": "all-linear"}, {"target_modules": ALL}),
        ({"bare": True, "target_modules": r"layers\.[01]\.mlp\..*_proj"}, {"target_modules": ALL[4:]}),
        ({"dtype": torch.bfloat16}, {}),
        ({"init_lora_weights": "gaussian", "task_type": "CAUSAL_LM"}, {}),
    ],
    ids=str,
)
def test_an_adapter_of_peft_gives_the_same_log_probs(
    tmp_path: pathlib.Path, base: pathlib.Path, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = make_adapter(base, tmp_path, **fields)
    config = LoraConfig(**{"rank": 4, "alpha": 8.0, "target_modules": ("q_proj", "v_proj"), **expected})
    lora = load(tmp_path, config)
    shapes = jax.eval_shape(lambda: init_lora(MODEL, config, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), lora) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)

    batch = tiny.groups(seed=1, count=3, m=2)
    params = load_decoder(base)[1]
    ours = logps(merged(params, lora, config), batch)
    assert np.abs(ours - logps(params, batch)).max() > 0.1
    if "bare" in fields:  # PEFT itself loads it into the bare model alone
        whole = LlamaForCausalLM.from_pretrained(base)
        whole.model = model
        model = whole
    np.testing.assert_allclose(ours, torch_logps(model, batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rsLoRA"])
def test_pissa_as_peft_converts_it(tmp_path: pathlib.Path, base: pathlib.Path, rslora: bool) -> None:
    """PiSSA changes the base weights; PEFT's conversion makes of it an adapter of twice the rank that does not."""
    config = theirs.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa", use_rslora=rslora
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "start")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa' has changed the base .*weight_conversion"):
        load(tmp_path / "pissa", LoraConfig(2, 3.0, ("q_proj", "up_proj"), rslora))

    batch = tiny.groups(seed=1, count=3, m=2)
    wanted = torch_logps(model, batch)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    config = LoraConfig(4, 3 * 2**0.5 if rslora else 6.0, ("q_proj", "up_proj"), rslora)
    lora = load(tmp_path / "converted", config)
    ours = logps(merged(load_decoder(base)[1], lora, config), batch)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)


def test_layers_without_lora_stay_without_it(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    make_adapter(base, tmp_path, target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2])
    config = LoraConfig(4, 8.0, ("q_proj", "up_proj"))
    lora = load(tmp_path, config)
    loaded, params = load_decoder(base)
    decoder: Any = loaded.clone(lora=config)
    batch = tiny.groups(seed=1, count=3, m=2)
    gradient = jax.jit(jax.grad(lambda x: decoder.apply({"params": params, "lora": x}, batch).sum()))(lora)
    for matrix in jax.tree.leaves(gradient):
        assert [bool(np.any(x)) for x in matrix] == [True, False, True]


def test_round_trip(tmp_path: pathlib.Path) -> None:
    config = LoraConfig(rank=4, alpha=7.25, target_modules=("o_proj", "gate_proj"), rslora=True)
    lora = random_adapter(config)
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    adapters.save_adapter(lora, config, "base", tmp_path)
    loaded = adapters.load_adapter(
        str(tmp_path), "", MODEL, config, lambda shapes: layout.weight_shardings(mesh, shapes)
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, lora)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path, config), lora)
    wanted = layout.weight_shardings(mesh, lora)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded, wanted))
    assert {x.dtype.name for x in jax.tree.leaves(loaded)} == {"float32"}


def test_what_is_to_be_known_of_an_adapter_is_said(
    tmp_path: pathlib.Path, base: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(base, tmp_path, lora_dropout=0.05, layers_to_transform=[0, 2])
    load(tmp_path, LoraConfig(4, 8.0, ("q_proj", "v_proj")))
    said = capsys.readouterr().out
    for part in (f"made for {base};", "lora_dropout=0.05 left out", "in some of the 3 layers alone (q_proj in 0, 2;"):
        assert part in said


def test_options_of_another_adapter_are_refused_with_the_flags_to_set(
    tmp_path: pathlib.Path, base: pathlib.Path
) -> None:
    make_adapter(base, tmp_path, use_rslora=True, lora_alpha=7)
    with pytest.raises(ValueError, match=f"{tmp_path}: .*--config.lora.rank=4 --config.lora.alpha=7 ") as error:
        load(tmp_path, LoraConfig())
    advice = re.findall(r"--\S+", str(error.value))
    assert [flag.partition("=")[0].split(".")[-1] for flag in advice] == ["rank", "alpha", "rslora", "target_modules"]
    command = ["main", "--config=configs/quickstart.py", "--workdir=x"]
    options = flags.parse([*command, *advice], ["activedpo", "random"]).config.lora
    load(tmp_path, LoraConfig(options.rank, options.alpha, options.target_modules, options.rslora))
    # What is right already is not asked for.
    with pytest.raises(ValueError, match="set --config.lora.target_modules=q_proj,v_proj$"):
        load(tmp_path, LoraConfig(4, 7.0, ("q_proj",), True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported, only plain LoRA is: merge the adapter into"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern={'q_proj': 2} .* only 4 throughout"),
        ({"alpha_pattern": {"q_proj": 2}}, r"alpha_pattern={'q_proj': 2} .* only 8 throughout"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\]"),
        ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication="),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules has model.embed_tokens"),
        ({"target_modules": r".*(q_proj|lm_head)"}, "target_modules has lm_head"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' has changed"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' has changed"),
        ({"config": theirs.IA3Config(target_modules=["k_proj"], feedforward_modules=[])}, "peft_type is 'IA3'"),
        ({"config": theirs.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "is 'PROMPT_TUNING'"),
    ],
    ids=str,
)
def test_an_adapter_of_another_kind_is_refused_by_name(
    tmp_path: pathlib.Path, base: pathlib.Path, fields: dict[str, Any], message: str
) -> None:
    make_adapter(base, tmp_path, **fields)
    with pytest.raises(ValueError, match=f"{tmp_path}/adapter_config.json: .*{message}"):
        load(tmp_path, LoraConfig(4, 8.0, ("q_proj", "v_proj")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"a_feature_of_later_years": {"x": 1}}, "a_feature_of_later_years={'x': 1} is not supported"),
        ({"r": None}, "no r; expected"),
        ({"target_modules": ["c_attn"]}, r"target_modules=\['c_attn'\] has none of q_proj"),
    ],
    ids=str,
)
def test_a_config_that_says_something_else_is_refused(
    tmp_path: pathlib.Path, base: pathlib.Path, change: dict[str, Any], message: str
) -> None:
    make_adapter(base, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{message}"):
        load(tmp_path, LoraConfig(4, 8.0, ("q_proj", "v_proj")))


V1 = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(V1), rf"missing tensor {V1}, expected with shape \[4, 32\]"),
        (lambda t: t.update({V1: t[V1][:2].copy()}), rf"{V1} has shape \[2, 32\]; expected \[4, 32\]"),
        (lambda t: t.update({V1: t[V1].astype(np.int8)}), f"{V1} is I8; expected one of F64"),
        (lambda t: t.update({V1.replace("v_", "k_"): t[V1]}), r"unexpected tensor .*k_proj.lora_A.weight of shape"),
        (lambda t: t.update({V1.replace(".1.", ".3."): t[V1]}), "unexpected tensor .*layers.3"),
        (lambda t: t.update({V1.replace("model.model.model", "model.model"): t[V1]}), "missing tensor"),
        (lambda t: [t.pop(k) for k in list(t) if "q_proj" in k], "missing tensor .*\n.*\n.*and 1 more such"),
    ],
    ids=["missing", "other rank", "quantised", "module too many", "layer too many", "two prefixes", "many"],
)
def test_tensors_that_do_not_match_are_refused(
    tmp_path: pathlib.Path, base: pathlib.Path, change: Callable[[dict[str, np.ndarray]], Any], message: str
) -> None:
    make_adapter(base, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"(?s){tmp_path}/adapter_model.safetensors: .*{message}"):
        load(tmp_path, LoraConfig(4, 8.0, ("q_proj", "v_proj")))


def test_an_adapter_of_another_model_is_refused(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    make_adapter(base, tmp_path)
    for model in (
        dataclasses.replace(MODEL, num_layers=2),
        dataclasses.replace(MODEL, num_layers=4),
        dataclasses.replace(MODEL, hidden_size=16),
    ):
        with pytest.raises(ValueError, match="do not match adapter_config.json and the base model"):
            adapters.load_adapter(str(tmp_path), "", model, LoraConfig(4, 8.0, ("q_proj", "v_proj")))


def test_what_is_no_adapter_is_refused(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    for folder, message in (
        (tmp_path / "nothing", "nothing: no such directory; expected a PEFT adapter: set config.lora.path"),
        (base, "no adapter_config.json; expected a PEFT adapter: set config.lora.path"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder, LoraConfig())
    make_adapter(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors; .*\(.bin\) has to be saved anew"):
        load(tmp_path, LoraConfig(4, 8.0, ("q_proj", "v_proj")))


def test_hub_names_from_the_cache(tmp_path: pathlib.Path, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--sft"
    make_adapter(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = LoraConfig(4, 8.0, ("q_proj", "v_proj"))
    lora = adapters.load_adapter("someone/sft", "v1", MODEL, config)
    jax.tree.map(np.testing.assert_array_equal, lora, load(repository / "snapshots" / commit, config))
    with pytest.raises(
        ValueError, match=r"someone/sft \(revision v2\): neither .*set config.lora.path or config.lora.rev"
    ):
        adapters.load_adapter("someone/sft", "v2", MODEL, config)


def test_an_adapter_that_is_not_finite_is_refused(tmp_path: pathlib.Path) -> None:
    config = LoraConfig(rank=4, alpha=8.0)
    adapters.save_adapter(random_adapter(config), config, "base", tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = sorted(stored)[3]
    stored[name] = stored[name].copy()
    stored[name][0, 0] = np.nan
    save_file(stored, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {re.escape(name)} has entries that are not finite"):
        adapters.load_adapter(str(tmp_path), "", MODEL, config)


def test_the_revision_of_the_base_is_written(tmp_path: pathlib.Path) -> None:
    config = LoraConfig(rank=4, alpha=8.0)
    adapters.save_adapter(random_adapter(config), config, "someone/base", tmp_path, "v1")
    assert theirs.PeftConfig.from_pretrained(str(tmp_path)).revision == "v1"
