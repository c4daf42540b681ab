"""Supervised fine-tuning against TRL's own trainer and torch; interrupted, cut up and spread out it stays the same."""

import contextlib
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import peft
import pytest
import torch
import trl
from safetensors.numpy import load_file

from activedpo_jax import layout, sft
from activedpo_jax.config import default
from activedpo_jax.data.groups import Bucket, Texts, pad_groups
from activedpo_jax.models.policy import Policy, response_logps
from activedpo_jax.record.metrics import read_metrics
from activedpo_jax.start import initial_lora, load_decoder, load_params
from activedpo_jax.training import finetune, optimiser
from activedpo_jax.training.finetune import Examples, Recipe, Trainee
from activedpo_jax.training.optimiser import OptimiserSpec
from tests import tiny
from tests.test_resume import finish, kill_when
from tests.tiny_hf import tiny_llama
from tests.tiny_tokenizer import make_tokenizer

ROWS = [
    {"prompt": "What colour is the sky?", "completion": " It is blue."},
    {"prompt": "Hello", "completion": " The grass is green, and the sky is not."},
    {"prompt": "Is the grass green today?", "completion": " It is"},
    {"prompt": "So the sky is green today?", "completion": " No, and it is not"},
    {"prompt": "Blue?", "completion": " What is"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny random Llama with a tokenizer, as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer()
    tiny_llama(folder, vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(folder)
    return folder


def options(base: pathlib.Path, folder: pathlib.Path, rows: list[dict[str, str]], **changes: Any) -> Any:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = default()
    config.model.path, config.model.remat = str(base), "none"
    config.lora.rank, config.lora.alpha = 4, 8.0
    config.data.buckets = ((16, 16), (32, 32))
    config.sft.data = str(folder / "data.jsonl")
    for name, value in changes.items():
        config.sft[name] = value
    return config


def stage(config: ml_collections.ConfigDict, folder: pathlib.Path) -> tuple[Any, Any]:
    mesh = layout.make_mesh(config.mesh, jax.devices()[:1])
    decoder = load_decoder(config, mesh)
    params, lora = load_params(config, mesh, jnp.float32), initial_lora(config, decoder, mesh, 0)
    policy = sft.run(config, 0, sft.load(config, 0), Policy(decoder, params, lora), mesh, folder)
    return policy.params, policy.reference


def learnt(records: list[dict[str, Any]]) -> list[float]:
    return [r["sft/loss"] for r in records if "sft/loss" in r]


# --- Against TRL


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_training_is_that_of_trl(base: pathlib.Path, tmp_path: pathlib.Path, weights: str) -> None:
    """From texts to trained weights: TRL's trainer and ours on the same file, all of it a batch."""
    epochs, rate = 4, 5e-3
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(default().lora.target_modules), lora_dropout=0.0)
    torch.manual_seed(1)
    trainer = trl.SFTTrainer(
        str(base),
        args=trl.SFTConfig(
            **{"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": []},
            **{"per_device_train_batch_size": len(ROWS), "num_train_epochs": epochs, "max_length": None},
            **{"learning_rate": rate, "lr_scheduler_type": "linear", "warmup_steps": 0, "max_grad_norm": 1.0},
            **{
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
                "model_init_kwargs": {"dtype": "float32"},
            },
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        peft_config=lora if weights == "lora" else None,
    )
    start = tmp_path / "start"
    trainer.model.save_pretrained(start)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "theirs")
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]

    recipe = {"epochs": epochs, "batch_size": len(ROWS), "learning_rate": rate, "warmup_fraction": 0.0}
    config = options(base, tmp_path, ROWS, weights=weights, examples_per_chunk=2, **recipe)
    if weights == "lora":
        config.lora.path = str(start)
    stage(config, tmp_path)
    losses = learnt(read_metrics(tmp_path / "metrics.jsonl"))
    assert losses[0] - losses[-1] > 0.1
    np.testing.assert_allclose(losses, [entry["loss"] for entry in theirs], rtol=0, atol=2e-4)

    name = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}[weights]
    wanted, before = load_file(tmp_path / "theirs" / name), load_file(start / name)
    got = load_file(sft.result_folder(config, tmp_path) / name)
    assert got.keys() == wanted.keys()
    for tensor in wanted:
        moved = np.abs(wanted[tensor] - before[tensor]).max()
        assert moved > rate and np.abs(got[tensor] - wanted[tensor]).max() < 0.02 * moved, tensor


def test_losses_are_those_of_torch_with_the_prompt_masked(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Labels −100 on the prompt, the mean over all tokens of the set; the held-out loss is before any step."""
    rows = ROWS + [{"prompt": f"{row['prompt']} Really?", "completion": row["completion"]} for row in ROWS]
    config = options(base, tmp_path, rows, heldout_fraction=0.4, learning_rate=1e-9, batch_size=6)
    examples = sft.load(config, 0)
    assert examples.heldout is not None
    prompts = [{tuple(p) for p in texts.prompt_tokens} for texts in (examples.train, examples.heldout)]
    assert [len(p) for p in prompts] == [6, 4] and not prompts[0] & prompts[1]
    stage(config, tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")

    model = tiny_llama(tmp_path / "again", vocab_size=len(make_tokenizer()), tie_word_embeddings=True)
    for texts, got in zip(
        (examples.train, examples.heldout), (learnt(records)[0], records[0]["sft/heldout_loss"]), strict=True
    ):
        total, tokens = 0.0, 0
        for prompt, (response,) in zip(texts.prompt_tokens, texts.response_tokens, strict=True):
            ids = torch.tensor(np.concatenate([prompt, response])[None], dtype=torch.long)
            labels = ids.clone()
            labels[0, : len(prompt)] = -100
            total += float(model(input_ids=ids, labels=labels).loss.detach()) * len(response)
            tokens += len(response)
        assert got == pytest.approx(total / tokens, abs=1e-5)
    assert records[0]["round"] == 0 and "sft/loss" not in records[0]
    assert len(records) == 2 and "sft/heldout_loss" in records[1]  # and once more after the epoch


# --- However it is cut up

BUCKETS = (Bucket(4, 5), Bucket(7, 9))


def random_texts(seed: int, count: int) -> Texts:
    rng = np.random.default_rng(seed)
    tokens = lambda longest: rng.integers(0, 97, rng.integers(1, longest + 1)).astype(np.int32)  # noqa: E731
    return Texts(prompt_tokens=[tokens(7) for _ in range(count)], response_tokens=[[tokens(9)] for _ in range(count)])


@contextlib.contextmanager
def compilations() -> Iterator[Counter[str]]:
    """How often each program of `finetune` is compiled, whatever was before."""
    names = ("no_gradient", "gradient_program", "update_program")
    for name in names:
        getattr(finetune, name).clear_cache()
    count, handler, logger = Counter[str](), logging.Handler(), logging.getLogger("jax")

    def emit(record: logging.LogRecord) -> None:
        count.update(name for name in names if f"Compiling jit({name})" in record.getMessage())

    handler.emit = emit  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield count
    finally:
        logger.removeHandler(handler)


class Trained(NamedTuple):
    first_gradient: Any
    weights: Any
    losses: list[float]
    shapes: set[Any]  # of the parts that it was trained on


def trained(
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    full: bool,
    shape: tuple[int, int, int] = (1, 1, 1),
    microbatch: int = 8,
    buckets: tuple[Bucket, ...] = BUCKETS,
    dtype: Any = jnp.float32,
    batch_size: int = 8,
    packed: bool = False,
) -> Trained:
    """An epoch of random texts."""
    decoder, params, lora = tiny.model(dtype=dtype)
    # With the weights as they are, those that float32 rounds otherwise change the gradient by 0.6e-5 to 1.9e-5 of its
    # largest entry; with half of them by 0.3e-5 at most, and a bound of 1e-5 tells a fault from rounding.
    params = jax.tree.map(lambda x: x / 2 if x.ndim > 1 and x.shape[-1] > 1 else x, params)
    sizes = default().mesh
    sizes.data, sizes.fsdp, sizes.tensor = shape
    mesh = layout.make_mesh(sizes, jax.devices()[: math.prod(shape)])
    place = lambda tree: jax.device_put(jax.tree.map(jnp.copy, tree), layout.weight_shardings(mesh, tree))  # noqa: E731
    gradients: list[Any] = []

    shapes: set[Any] = set()

    def update(*args: Any) -> Any:
        gradients.append(jax.device_get(args[4]))
        return update_program(*args)

    def gradient(*args: Any) -> Any:
        shapes.add((args[0].packing, args[4].response_ids.shape))
        return gradient_program(*args)

    gradient_program, update_program = finetune.gradient_program, finetune.update_program
    recipe = Recipe(OptimiserSpec(RATE), 1, batch_size, microbatch, checkpoint_minutes=5, packed=packed)
    base, weights = (None, place(params)) if full else (place(params), place(lora))
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "gradient_program", gradient)
        patch.setattr(finetune, "update_program", update)
        examples = Examples(random_texts(0, 20), None, buckets)
        weights = sft.fit(recipe, Trainee(decoder.clone(mesh=mesh), base, weights), examples, 3, folder)
    losses = learnt(read_metrics(folder / "metrics.jsonl"))
    return Trained(gradients[0], jax.device_get(weights), losses, shapes)


RATE = 1e-3


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.slow
def test_microbatches_buckets_packing_and_mesh_do_not_matter(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    plain = trained(tmp_path / "plain", monkeypatch, full)
    assert len(plain.losses) == 3
    ways: dict[str, dict[str, Any]] = {"eight devices": {"shape": (2, 2, 2), "microbatch": 4}}
    ways["packed"] = {"packed": True}
    if not full:
        ways["one bucket, small parts"] = {"buckets": (Bucket(9, 12),), "microbatch": 3}
    for name, changes in ways.items():
        with compilations() as compiled:
            other = trained(tmp_path / name, monkeypatch, full, **changes)
        # Once for every shape of a part: a result that is laid out in another way than what it is made from would be
        # another program's argument in the next step.
        assert compiled == {
            "no_gradient": 1,
            "gradient_program": len(other.shapes),
            "update_program": 1,
        }
        for got, wanted in zip(*map(jax.tree.leaves, (other.first_gradient, plain.first_gradient)), strict=True):
            assert tiny.relative_error(got, wanted) < 1e-5, name
        np.testing.assert_allclose(other.losses, plain.losses, rtol=1e-5, err_msg=name)
        # Adam makes steps of full size of gradients that are next to nothing, and of their rounding.
        for got, wanted in zip(*map(jax.tree.leaves, (other.weights, plain.weights)), strict=True):
            assert np.abs(got - wanted).max() < 0.05 * RATE, name


def test_the_held_out_loss_is_a_mean_over_tokens_packed_or_padded() -> None:
    decoder, params, lora = tiny.model()
    mesh = layout.make_mesh(default().mesh, jax.devices()[:1])
    texts, trainee = random_texts(3, 7), Trainee(decoder.clone(mesh=mesh), params, lora)
    recipe = Recipe(OptimiserSpec(RATE), 1, 4, 3, checkpoint_minutes=5)
    padded, packed = (finetune.mean_loss(recipe._replace(packed=p), trainee, texts, BUCKETS) for p in (False, True))
    total, count = 0.0, 0
    for row in range(7):
        group = pad_groups(texts, np.array([row]), BUCKETS[-1])
        total -= float(response_logps(decoder, params, lora, group).sum())
        count += len(texts.response_tokens[row][0])
    assert padded == pytest.approx(total / count, rel=1e-5) and packed == pytest.approx(total / count, rel=1e-5)


def test_moments_are_cut_like_their_weights() -> None:
    _, params, _ = tiny.model()
    sizes = default().mesh
    sizes.data, sizes.fsdp, sizes.tensor = 1, 4, 2
    mesh = layout.make_mesh(sizes)
    shardings = optimiser.optimiser_shardings(OptimiserSpec(1e-3), mesh, params)
    adam = shardings[1]
    assert adam.mu == adam.nu == layout.weight_shardings(mesh, params)
    assert adam.count.is_fully_replicated
    assert not adam.mu["layers"]["q_proj"]["kernel"].is_fully_replicated


def test_small_steps_are_not_lost_in_bfloat16(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = np.asarray(tiny.model()[1]["final_norm"]["scale"])
    one_step = trained(tmp_path, monkeypatch, True, dtype=jnp.bfloat16, batch_size=20)
    after = one_step.weights["final_norm"]["scale"]
    assert after.dtype == np.float32
    # Adam's first step; bfloat16 has nothing between 1 and 1 + 8e-3.
    np.testing.assert_allclose(np.abs(after - before), RATE, rtol=0.01)


def test_a_few_examples_are_learnt_by_heart(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = options(base, tmp_path, ROWS, weights="full", learning_rate=3e-3, epochs=40, schedule="constant")
    stage(config, tmp_path)
    losses = learnt(read_metrics(tmp_path / "metrics.jsonl"))
    assert losses[0] > 3 and losses[-1] < 0.2


def test_divergence_stops_before_anything_is_saved(tmp_path: pathlib.Path) -> None:
    decoder, params, _ = tiny.model(mesh=layout.make_mesh(default().mesh, jax.devices()[:1]))
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    recipe = Recipe(OptimiserSpec(1e-3), epochs=1, batch_size=2, microbatch=2, checkpoint_minutes=0)
    with pytest.raises(FloatingPointError, match="step 1 of 2: the loss is nan; lower config.sft.learning_rate"):
        sft.fit(recipe, Trainee(decoder, None, broken), Examples(random_texts(0, 4), None, BUCKETS), 0, tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())


# --- The stage and the command


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_what_is_done_is_read_not_done_again(base: pathlib.Path, tmp_path: pathlib.Path, weights: str) -> None:
    config = options(base, tmp_path, ROWS, weights=weights, learning_rate=1e-2)
    first = stage(config, tmp_path)
    mesh = layout.make_mesh(config.mesh, jax.devices()[:1])
    start = load_params(config, mesh, jnp.float32), initial_lora(config, load_decoder(config, mesh), mesh, 0)
    leaves = jax.tree.leaves
    changed = [
        any(np.any(a != b) for a, b in zip(leaves(now), leaves(was), strict=True))
        for now, was in zip(first, start, strict=True)
    ]
    assert changed == [weights == "full", weights == "lora"]
    record = (tmp_path / "metrics.jsonl").read_bytes()
    again = stage(config, tmp_path)
    for now, was in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(now, was)
    assert (tmp_path / "metrics.jsonl").read_bytes() == record and not (tmp_path / "checkpoints").exists()


def start(base: pathlib.Path, data: pathlib.Path, folder: pathlib.Path, *more: str) -> Any:
    """The command, as a user types it."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    set_to = {"model.path": base, "sft.data": data, "data.buckets": "((16,16),(32,32))", "sft.heldout_fraction": 0.1}
    set_to |= {"sft.batch_size": 4, "sft.epochs": 2, "checkpoint_minutes": 0, "sft.learning_rate": 1e-2}
    command = [sys.executable, "-m", "activedpo_jax.sft", "--config", "configs/sft_smollm2.py", f"--workdir={folder}"]
    arguments = [f"--config.{name}={value}" for name, value in set_to.items()]
    root = pathlib.Path(__file__).parents[1]
    return subprocess.Popen(
        [*command, *arguments, *more],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_behind(folder: pathlib.Path, name: str) -> tuple[bytes, list[dict[str, Any]]]:
    ignored = ("time", "sft/tokens_per_second")
    records = read_metrics(folder / "metrics.jsonl")
    return (folder / name).read_bytes(), [{k: v for k, v in r.items() if k not in ignored} for r in records]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_killed_runs_equal_the_uninterrupted_one_bit_for_bit(
    base: pathlib.Path, tmp_path: pathlib.Path, weights: str
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{row['prompt']} {i}", "completion": row["completion"]} for i in range(8) for row in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, killed, flag = tmp_path / "whole", tmp_path / "killed", f"--config.sft.weights={weights}"
    output = finish(start(base, data, whole, flag))
    result, option = {"lora": ("adapter", "lora.path"), "full": ("model", "model.path")}[weights]
    assert output.splitlines()[-1].endswith(f"--config.{option}={whole / result}")

    kill_when(start(base, data, killed, flag), (killed / "checkpoints" / "4").exists)
    assert not (killed / result).exists()
    output = finish(start(base, data, killed, flag))
    name = {"lora": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}[weights]
    assert left_behind(killed, name) == left_behind(whole, name)
    assert len(left_behind(whole, name)[1]) == 1 + 18  # step 0 has the held-out loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.sft.data="], "config.data.train: got '', expected a file"),
        (["--config.sft.data=", "--config.data.train=x.jsonl"], "config.sft.data is empty; expected a file"),
        (["--config.sft.data=absent.jsonl"], "absent.jsonl: no such file; check config.sft.data"),
        (["--config.sft.weights=all"], "config.sft.weights: got 'all', expected one of lora, full"),
        (["--config.sft.schedule=x"], "config.sft.schedule: got 'x', expected one of linear, cosine, constant"),
        (["--config.sft.limit=-1"], "config.sft.limit: got -1, expected 0 or more"),
        (
            ["--config.sft.heldout_fraction=1"],
            "config.sft.heldout_fraction: got 1.0, expected a number from 0 to below",
        ),
        (["--config.model.path="], "without config.model.path; expected a Hugging Face directory"),
        (["--config.sft.weights=full", "--config.lora.path=a"], "config.lora.path: got 'a' with sft.weights='full'"),
        (["--compile_only=v5e:4x4"], "--compile_only is an option of activedpo_jax.main"),
    ],
)
def test_mistakes_get_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        sft.main(["sft", "--config=configs/sft_smollm2.py", f"--workdir={tmp_path}", *arguments])
    error = capsys.readouterr().err
    assert raised.value.code == 2 and message in error and error.count("\n") == 1
