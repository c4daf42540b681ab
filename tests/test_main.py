"""The whole command on a Hugging Face model: SFT, rounds, and an adapter and a checkpoint that their users can load."""

import json
import pathlib
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from activedpo_jax import flags, layout, main, tasks
from activedpo_jax.compile_only import programs
from activedpo_jax.selection.strategies import STRATEGIES
from tests.tiny_hf import tiny_llama
from tests.tiny_tokenizer import CHATML, make_tokenizer

CONFIG = """
from activedpo_jax.config import default

def get_config():
    config = default()
    config.model.remat = "none"
    config.lora.rank, config.lora.alpha = 4, 8.0
    config.data.buckets = ((32, 16),)
    config.features.dim = 64
    config.rounds, config.labels_per_round = 2, 3
    config.dpo.learning_rate = 1e-2
    config.sft.learning_rate = 1e-2
    config.export.merged = True
    return config
"""
PROMPTS = ["What colour is the sky?", "Is the grass green?", "Hello", "So it is blue", "And today?", "What is green?"]


@pytest.fixture
def command(tmp_path: pathlib.Path) -> list[str]:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    tiny_llama(tmp_path / "base", vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": p, "chosen": f"It is blue. {p}", "rejected": f"{p} Not today"} for p in PROMPTS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.py").write_text(CONFIG)
    data = str(tmp_path / "pairs.jsonl")
    options = {"model.path": str(tmp_path / "base"), "data.train": data, "data.heldout": data, "sft.data": data}
    return ["main", "--config", str(tmp_path / "config.py"), *(f"--config.{name}={v}" for name, v in options.items())]


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_after_sft_an_adapter_and_a_checkpoint_come_out(
    command: list[str], tmp_path: pathlib.Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = [*command, "--workdir", str(folder), f"--config.sft.weights={weights}"]
    main.main(command)
    assert "SFT, seed 0: 1 steps" in capsys.readouterr().out

    rounds = json.loads((folder / "summary.json").read_text())["rounds"]
    assert rounds[0]["accuracy"] == 0.5 and rounds[0]["margin"] == 0  # π_ref is the SFT model
    assert rounds[1]["loss"] < np.log(2)

    start = tmp_path / "base" if weights == "lora" else folder / "sft" / "seed0" / "model"
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(start)
    merged = logps(AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32), folder / "merged")
    adapted = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    plain = logps(adapted, start)
    adapted = logps(peft.PeftModel.from_pretrained(adapted, folder / "adapter"), start)
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=1e-4)
    assert np.abs(adapted - plain).max() > 1e-2
    if weights == "full":
        assert np.abs(plain - logps(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), start)).max() > 1e-2

    # The same command finds everything done.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("**/*.safetensors") if "adapter" not in path.parts}
    assert before
    main.main(command)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert json.loads((folder / "summary.json").read_text())["rounds"] == rounds


def logps(model: Any, tokenizer_from: pathlib.Path) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    ids = tokenizer("What colour is the sky? It is blue, and the grass is green today.", return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return out.numpy()


@pytest.mark.slow
def test_a_start_from_an_adapter_goes_on_from_it(command: list[str], tmp_path: pathlib.Path) -> None:
    """The adapter of one run is the start, and so the reference, of the next."""
    without_sft = [flag for flag in command if "sft.data" not in flag]
    main.main([*without_sft, "--workdir", str(tmp_path / "one"), "--config.rounds=1"])
    one = tmp_path / "one" / "adapter"
    more = [f"--config.lora.path={one}", "--config.rounds=1", "--config.dpo.learning_rate=1e-12"]
    main.main([*without_sft, "--workdir", str(tmp_path / "two"), *more])
    rounds = json.loads((tmp_path / "two" / "summary.json").read_text())["rounds"]
    assert rounds[0]["accuracy"] == 0.5
    assert abs(rounds[1]["loss"] - np.log(2)) < 1e-5

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    before = logps(peft.PeftModel.from_pretrained(base, one), tmp_path / "base")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "merged", dtype=torch.float32)
    np.testing.assert_allclose(logps(after, tmp_path / "base"), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_every_program_of_such_a_run_can_be_made_from_shapes_alone(command: list[str], weights: str) -> None:
    """What `--compile_only` compiles, SFT included, but for the compiling."""
    argv = [*command, "--workdir=unused", f"--config.sft.weights={weights}", "--config.round.mode=staged"]
    config = flags.read_config(argv, STRATEGIES).config
    mesh = layout.make_mesh(config.mesh)
    names = []
    for program in programs(config, tasks.load(config, 0, mesh, None), mesh):
        program.function.lower(*program.arguments)
        names.append(program.name)
    assert "SFT gradient (32, 16)" in names and "SFT update" in names
    assert "features (32, 16)" in names and "training update, activedpo" in names


def test_another_shape_than_the_adapters_names_the_flags(
    command: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_sft = [flag for flag in command if "sft.data" not in flag]
    main.main([*without_sft, "--workdir", str(tmp_path / "one"), "--config.rounds=1"])
    with pytest.raises(SystemExit):
        other = [f"--config.lora.path={tmp_path / 'one' / 'adapter'}", "--config.lora.rank=8"]
        main.main([*without_sft, "--workdir", str(tmp_path / "two"), *other])
    assert "--config.lora.rank=4" in capsys.readouterr().err
