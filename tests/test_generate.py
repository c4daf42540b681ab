"""Generation: sampled tokens are the model's, greedy ones are `transformers`', and nothing else has a say in them."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from activedpo_jax import layout
from activedpo_jax.data.groups import Groups
from activedpo_jax.data.pool_files import PoolFiles
from activedpo_jax.data.prompts import PromptRecord, read_prompts
from activedpo_jax.data.records import read_records
from activedpo_jax.generation.decoding import DecodingSpec, Requests, respond
from activedpo_jax.generation.responses import GenerationSpec, Responder, generate
from activedpo_jax.generation.sampling import Sampling, truncate
from activedpo_jax.huggingface import loading
from activedpo_jax.models.config import LoraConfig, Rope
from activedpo_jax.models.decoder import Decoder, unstack
from activedpo_jax.start import stop_tokens
from tests import tiny
from tests.tiny_hf import tiny_model
from tests.tiny_tokenizer import CHATML, make_tokenizer

VOCABULARY = tiny.MODEL.vocab_size


@functools.cache
def mesh(data: int = 8, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    sizes = ml_collections.ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})
    return layout.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def spec(decoder: Decoder, length: int, where: Any = None, stop: tuple[int, ...] = (), **sampling: Any) -> DecodingSpec:
    return DecodingSpec(decoder.clone(unrolled=True), Sampling(**sampling), stop, length, where or mesh(1))


def requests(batch: Groups, m: int, seed: int = 0, first: int = 0) -> Requests:
    count = len(batch.prompt_len)
    seeds = np.arange(seed, seed + count, dtype=np.uint32)
    return Requests(
        batch.prompt_ids, batch.prompt_len, seeds, np.tile(first + np.arange(m, dtype=np.int32), (count, 1))
    )


# --- The model's own log-probs

LOCAL = {"local": (True, False), "window": 5, "local_rope": Rope(50.0)}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma 3": {**LOCAL, "norms": "both", "qk_norm": "head", "activation": "gelu_tanh", "scale_embeddings": True},
    "gemma 2": {**LOCAL, "attention_softcap": 2.0, "logit_softcap": 3.0, "norm_offset": 1.0, "query_scale": 0.2},
    "olmo 2": {"norms": "post", "qk_norm": "width", "tie_embeddings": False, "num_kv_heads": 1},
    "qwen 2, smollm 3": {"qkv_bias": True, "unrotated": (False, True), "num_kv_heads": 4},
}


@pytest.mark.parametrize(
    ("variant", "with_lora", "m"),
    [("llama", True, 3), ("llama", False, 1), ("gemma 3", True, 2), ("gemma 2", True, 1), ("olmo 2", False, 2)]
    + [("qwen 2, smollm 3", True, 3)],
)
def test_log_probs_equal_those_of_the_scoring_path(variant: str, with_lora: bool, m: int) -> None:
    decoder, params, lora = tiny.model(config=dataclasses.replace(tiny.MODEL, **VARIANTS[variant]))
    batch = tiny.groups(seed=1, count=4, m=1, prompt=7)
    decoding = spec(decoder, 9, stop=(3, 4), temperature=1.3, top_k=60, top_p=0.95)
    score = jax.jit(decoder.apply)
    for outputs_first in (False, True) if variant == "llama" else (True,):
        out = respond(
            decoding, unstack(params, outputs_first), unstack(lora) if with_lora else None, requests(batch, m)
        )
        variables = {"params": params, "lora": lora} if with_lora else {"params": params}
        scored = score(variables, Groups(batch.prompt_ids, batch.prompt_len, out.tokens, out.length))
        assert np.asarray(out.length).min() >= 1
        assert tiny.relative_error(out.logps, scored) < 1e-5


# --- Distribution


def truth(logps: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """What `transformers` samples from, [..., V] float64, given the model's log-probs."""
    scores = torch.tensor(logps.reshape(-1, logps.shape[-1]), dtype=torch.float64)
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1).numpy().reshape(logps.shape)


@functools.cache
def all_pairs() -> tuple[np.ndarray, np.ndarray]:
    """log π(first) [V] and log π(second | first) [V, V] of one prompt, by the scoring path."""
    decoder, params, lora = tiny.model()
    batch = tiny.groups(seed=2, count=1, m=1)
    every = np.stack(np.meshgrid(np.arange(VOCABULARY), np.arange(VOCABULARY), indexing="ij"), -1).reshape(1, -1, 2)
    groups = Groups(batch.prompt_ids, batch.prompt_len, every, np.full(every.shape[:2], 2))
    logps = np.asarray(decoder.apply({"params": params, "lora": lora}, groups)).reshape(VOCABULARY, VOCABULARY, 2)
    return logps[:, 0, 0], logps[:, :, 1]


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of a chi-square test; what is expected fewer than ten times counts together."""
    assert not counts[expected == 0].any()  # a token that was cut off
    rare = expected < 10
    merged = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    if not merged[1][-1]:
        merged = [x[:-1] for x in merged]
    return float(scipy.stats.chisquare(*merged).pvalue)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 12, 1.0), (1.0, 0, 0.7), (1.5, 30, 0.8)]
)
def test_sampled_tokens_follow_the_models_distribution(temperature: float, top_k: int, top_p: float) -> None:
    decoder, params, lora = tiny.model()
    batch = tiny.groups(seed=2, count=1, m=1)
    prompts, m = 1024, 32
    repeated = Groups(*(np.repeat(x, prompts, axis=0) for x in batch))
    decoding = spec(decoder, 2, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = np.asarray(respond(decoding, unstack(params), unstack(lora), requests(repeated, m)).tokens).reshape(-1, 2)

    first, second = (truth(logps, temperature, top_k, top_p) for logps in all_pairs())
    count = lambda x, n: np.bincount(x, minlength=n).astype(float)  # noqa: E731
    assert p_value(count(tokens[:, 0], VOCABULARY), len(tokens) * first) > 1e-3
    joint = (first[:, None] * second).ravel()
    pairs = count(tokens[:, 0] * VOCABULARY + tokens[:, 1], VOCABULARY**2)
    assert p_value(pairs, len(tokens) * joint) > 1e-3
    warmer = first ** (2 / 3) / np.sum(first ** (2 / 3))  # the test can tell: half as much again is another temperature
    assert p_value(count(tokens[:, 0], VOCABULARY), len(tokens) * warmer) < 1e-6


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, 1.0), (0, 0.3), (0, 0.9), (0, 0.999), (40, 0.6), (1, 0.5), (500, 1.0)]
)
def test_what_is_cut_off_is_what_transformers_cuts_off(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32) * np.linspace(0.1, 9, 64)[:, None]
    logits = logits.astype(np.float32)
    ours = np.asarray(truncate(Sampling(1.0, top_k, top_p), jax.numpy.asarray(logits)))
    kept = truth(logits.astype(np.float64), 1.0, top_k, top_p) > 0
    np.testing.assert_array_equal(np.isfinite(ours), kept)
    np.testing.assert_array_equal(ours[kept], logits[kept])


def test_equally_likely_tokens_stay_together() -> None:
    logits = jax.numpy.asarray([[2.0, 1.0, 1.0, 0.0, -0.0]])
    assert np.isfinite(np.asarray(truncate(Sampling(top_k=2), logits))).tolist() == [[True] * 3 + [False] * 2]
    assert np.isfinite(np.asarray(truncate(Sampling(top_k=4), logits))).all()


# --- Greedy decoding


def greedy_of_transformers(model: Any, prompts: list[np.ndarray], length: int) -> np.ndarray:
    rows = []
    model.generation_config.eos_token_id = None  # else `min_new_tokens` would forbid what ours may write
    for prompt in prompts:
        ids = torch.tensor(prompt[None], dtype=torch.long)
        kwargs = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
        rows.append(out[0, len(prompt) :].numpy())
    return np.stack(rows)


def in_order(batches: Iterable[dict[int, Any]]) -> list[Any]:
    results = {row: result for batch in batches for row, result in batch.items()}
    return [results[row] for row in range(len(results))]


def our_greedy(folder: pathlib.Path, prompts: list[np.ndarray], length: int) -> np.ndarray:
    config, params = loading.load_model(str(folder))
    generation = GenerationSpec(spec(Decoder(config, LoraConfig()), length, temperature=0.0), 1, 0, 4)
    widths = [8, max(map(len, prompts))]
    text = lambda tokens: " ".join(map(str, tokens))  # noqa: E731
    seeds = np.zeros(len(prompts), np.uint32)
    responder = Responder(generation, unstack(params, True), None, text)
    out = in_order(generate(responder, prompts, seeds, widths, range(len(prompts))))
    return np.stack([one.tokens[0] for one in out])


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("gemma3_text", {"sliding_window": 16, "sliding_window_pattern": 2, "head_dim": 8}),
        ("mistral", {"sliding_window": 20}),
    ],
)
def test_greedy_equals_transformers(tmp_path: pathlib.Path, model_type: str, changes: dict[str, Any]) -> None:
    model = tiny_model(tmp_path, model_type, **changes)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in (1, 5, 8, 30)]
    ours = our_greedy(tmp_path, prompts, 64)
    np.testing.assert_array_equal(ours, greedy_of_transformers(model, prompts, 64))
    assert len(np.unique(ours)) > 4


@pytest.mark.parametrize("variable", ["ACTIVEDPO_SMOLLM2", "ACTIVEDPO_GEMMA3"])
def test_greedy_of_a_real_model_equals_transformers(variable: str) -> None:
    folder = os.environ.get(variable, "")
    if not pathlib.Path(folder, "config.json").is_file():
        pytest.skip(f"set {variable} to the model's directory")
    tokenizer: Any = loading.load_tokenizer(folder)
    texts = ["The capital of France is", "Once upon a time there was a king who", "def fibonacci(n):\n"]
    prompts = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = greedy_of_transformers(model, prompts, 64)
    del model
    np.testing.assert_array_equal(our_greedy(pathlib.Path(folder), prompts, 64), expected)


# --- What a response depends on


def sampled(where: Any, batch: Groups, m: int, length: int = 6, seed: int = 0, first: int = 0) -> np.ndarray:
    decoder, params, lora = tiny.model(mesh=where)
    weights = [jax.device_put(x, layout.weight_shardings(where, x)) for x in (params, lora)]
    weights = [jax.jit(unstack)(x) for x in weights]
    batch = jax.device_put(requests(batch, m, seed, first), layout.batch(where))
    return np.asarray(respond(spec(decoder, length, where, top_p=0.9), *weights, batch).tokens)


def test_samples_depend_on_seed_index_and_place_alone() -> None:
    batch = tiny.groups(seed=3, count=8, m=1)
    whole = sampled(mesh(1), batch, 4)
    assert len({tuple(r) for g in whole for r in g}) == 32
    for where in (mesh(8), mesh(2, 2, 2), mesh(1, 4, 2)):
        np.testing.assert_array_equal(sampled(where, batch, 4), whole)
    one = Groups(*(x[5:6] for x in batch))
    np.testing.assert_array_equal(sampled(mesh(1), one, 4, seed=5), whole[5:6])
    np.testing.assert_array_equal(sampled(mesh(1), tiny.widen(batch, 12, 6), 4), whole)
    np.testing.assert_array_equal(sampled(mesh(1), batch, 4, length=9)[..., :6], whole)
    np.testing.assert_array_equal(sampled(mesh(1), batch, 2, first=2), whole[:, 2:])
    assert (sampled(mesh(1), batch, 4, seed=100) != whole).any(axis=(1, 2)).all()


def test_weights_stay_cut_when_they_are_taken_apart() -> None:
    _, params, _ = tiny.model()
    where = mesh(2, 2, 2)
    apart = jax.jit(unstack)(jax.device_put(params, layout.weight_shardings(where, params)))
    kernel = apart["layers_1"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0] // 2, kernel.shape[1] // 2)


def test_the_stop_token_ends_a_response_and_is_part_of_it() -> None:
    decoder, params, lora = tiny.model()
    batch, apart = tiny.groups(seed=4, count=16, m=1), (unstack(params), unstack(lora))
    free = respond(spec(decoder, 12), *apart, requests(batch, 3))
    stop = tuple(np.bincount(np.asarray(free.tokens).ravel()).argsort()[-2:].tolist())
    cut = respond(spec(decoder, 12, stop=stop), *apart, requests(batch, 3))
    assert np.asarray(free.length).min() == 12 and not np.asarray(free.ended).any()
    assert 0 < np.asarray(cut.ended).sum() < 48
    for g in range(16):
        for j in range(3):
            tokens = np.asarray(free.tokens)[g, j]
            ends = np.flatnonzero(np.isin(tokens, stop))
            length = ends[0] + 1 if len(ends) else 12
            assert cut.length[g, j] == length and cut.ended[g, j] == bool(len(ends))
            np.testing.assert_array_equal(cut.tokens[g, j], np.where(np.arange(12) < length, tokens, 0))
            assert not np.asarray(cut.logps)[g, j, length:].any()


def test_the_loop_stops_when_all_have_ended() -> None:
    """Every token is a stop token: a loop that went on would take hours for so many."""
    decoder, params, _ = tiny.model()
    decoding = spec(decoder, 100_000, stop=tuple(range(VOCABULARY)))
    start = time.perf_counter()
    out = jax.block_until_ready(
        respond(decoding, unstack(params), None, requests(tiny.groups(seed=0, count=1, m=1), 1))
    )
    assert np.asarray(out.length).tolist() == [[1]] and time.perf_counter() - start < 60


# --- Flaws


def sample_texts(resamples: int, text_of: Any, m: int = 4, count: int = 6) -> list[Any]:
    decoder, params, _ = tiny.model()
    generation = GenerationSpec(spec(decoder, 3), m, resamples, 4)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCABULARY, 3 + i).astype(np.int32) for i in range(count)]
    seeds = np.arange(count, dtype=np.uint32)
    responder = Responder(generation, unstack(params), None, text_of)
    return in_order(generate(responder, prompts, seeds, [4, 16], range(count)))


def test_empty_and_equal_responses_are_sampled_anew() -> None:
    def text_of(tokens: np.ndarray) -> str:  # a third is empty, and the others are of eight kinds
        return "" if tokens[0] % 3 == 0 else "  "[: tokens[1] % 3] + f"kind {tokens[0] % 8}"

    once, again = sample_texts(0, text_of), sample_texts(20, text_of)
    assert sum(bool(one.flawed) for one in once) > 3
    for before, after in zip(once, again, strict=True):
        assert not after.flawed and len({text.strip() for text in after.texts} - {""}) == 4
        for j in set(range(4)) - set(before.flawed):  # what was good stays
            np.testing.assert_array_equal(before.tokens[j], after.tokens[j])
        for tokens, text, logps in zip(after.tokens, after.texts, after.logps, strict=True):
            assert text == text_of(tokens) and len(logps) == len(tokens)


def test_what_cannot_be_mended_is_kept_and_reported(tmp_path: pathlib.Path) -> None:
    def text_of(tokens: np.ndarray) -> str:  # no prompt has more than two different responses
        return f"kind {tokens[0] % 2}"

    none, some = sample_texts(2, lambda tokens: "always the same"), sample_texts(9, text_of)
    assert all(one.flawed == [1, 2, 3] and len(one.tokens) == 4 for one in none)
    assert all(len(one.flawed) == 2 for one in some)
    records = [PromptRecord(f"id{i}", f"prompt {i}", "") for i in range(12)]
    files = PoolFiles(tmp_path, records)
    files.add(dict(enumerate([*none, *some])))
    report = files.finish(4, 3, 2)
    assert "responses.jsonl: 6 prompts; " in report
    assert "responses.jsonl: 6 prompts with fewer than 4 responses, the others being empty or equal still" in report
    assert "too_few.jsonl: 6 prompts with fewer than two" in report and "id0, id1, id2, id3, id4, id5" in report
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [row["missing"] for row in rows] == [2] * 6
    assert all(sorted(row["responses"]) == ["kind 0", "kind 1"] for row in rows)


def test_several_greedy_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="3 responses with temperature 0 would all be the same"):
        GenerationSpec(spec(tiny.model()[0], 3, temperature=0.0), 3, 0, 4)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}], ids=lambda x: str(x)
)
def test_sampling_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected"):
        Sampling(**wrong)


# --- The command


def test_prompts_of_all_kinds(tmp_path: pathlib.Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    rows = [
        {"prompt": "One", "id": 7},
        {"prompt": chat},
        {"prompt": "Two", "chosen": "a", "rejected": "b", "id": "pair"},
        {"prompt": "Two", "chosen": "a", "rejected": "c"},
        {"prompt": "Three", "responses": ["a", "b"]},
        {"prompt": "One "},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_prompts(str(file))
    assert [r.prompt for r in records] == ["One", chat, "Two", "Three"]
    assert records[0].id == "7" and len({r.id for r in records}) == 4 and "pair" not in {r.id for r in records}
    file.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(ValueError, match="prompts.jsonl:2: the fields are text; expected `prompt`"):
        read_prompts(str(file))


def test_stop_tokens_are_those_of_config_tokenizer_and_template(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer(CHATML)
    assert stop_tokens(str(tmp_path), "", tokenizer, "auto") == (2, 4)  # </s> and <|im_end|>
    assert stop_tokens(str(tmp_path), "", tokenizer, "plain") == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 4]}')
    assert stop_tokens(str(tmp_path), "", tokenizer, "auto") == (2, 4, 5)


def command(folder: pathlib.Path, model: pathlib.Path, prompts: pathlib.Path) -> Any:
    config = folder.with_suffix(".py")
    config.write_text(
        "from activedpo_jax.config import default\n"
        "def get_config():\n"
        "    config = default()\n"
        f"    config.model.path = {str(model)!r}\n"
        f"    config.generation.prompts = {str(prompts)!r}\n"
        "    config.generation.max_new_tokens = 4\n"
        "    config.generation.prompts_per_chunk = 2\n"
        "    config.data.buckets = ((24, 4), (48, 4))\n"
        "    return config\n"
    )
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    arguments = [sys.executable, "-m", "activedpo_jax.generate", "--config", str(config), "--workdir", str(folder)]
    root = pathlib.Path(__file__).parents[1]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, cwd=root, env=environment, **pipes)


def finish(process: Any) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return str(output)


def test_a_killed_command_goes_on_as_if_nothing_had_happened(tmp_path: pathlib.Path) -> None:
    model = tmp_path / "model"
    tokenizer = make_tokenizer(CHATML)
    tiny_model(model, "llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"What is {i} times seven?" + " And why is that so?" * (i % 2) for i in range(40)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = finish(command(whole, model, prompts))
    assert "40 prompts" in output
    expected = (whole / "responses.jsonl").read_text()
    records = read_records(str(whole / "responses.jsonl"))
    assert [r.prompt for r in records] == texts and all(len(r.responses) == 3 for r in records)

    process = command(killed, model, prompts)
    file = killed / "responses.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) < 40
    file.write_bytes(b"".join(lines)[:-20])  # as if the power had failed while the last line was written
    finish(command(killed, model, prompts))
    assert file.read_text() == expected
    finish(command(killed, model, prompts))  # and then there is nothing more to do
    assert file.read_text() == expected
