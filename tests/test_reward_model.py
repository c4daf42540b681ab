"""Reward models: numbers equal to transformers' own, a fake of vLLM's server, what is refused, and whole runs."""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from activedpo_jax.errors import StoreError
from activedpo_jax.oracles import client, known, local_reward_model
from activedpo_jax.oracles.client import Server
from activedpo_jax.oracles.labels import Question
from activedpo_jax.oracles.local_reward_model import LocalModel
from activedpo_jax.oracles.noise import NO_NOISE, Noise
from activedpo_jax.oracles.reward_model import Numbers, RemoteModel, RewardModelOracle, Text
from tests.http_server import Answer, HttpServer
from tests.tiny_tokenizer import CHATML, make_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is green?"}]
TEXTS = [
    Text("What colour is the sky?", "It is blue, and the grass is green."),
    Text("Hello", "x"),
    Text(MESSAGES, "The grass. " * 9),
    Text("So?", ""),
    Text("Is it <|im_end|>?", "ends in <|im_end|><pad>"),
]


def save_model(folder: pathlib.Path, kind: str = "qwen3", labels: int = 1, **tokenizer: Any) -> Any:
    """A random classifier that prefers the known pair's good answer, with its tokenizer."""
    words = make_tokenizer(**{"chat_template": CHATML, "eos": "<|im_end|>", **tokenizer})
    shape = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8} if kind != "bert" else {}
    heads |= {} if kind != "bert" else {"num_attention_heads": 4, "max_position_embeddings": 128}
    config = AutoConfig.for_model(kind, **shape, **heads, num_labels=labels, pad_token_id=0, initializer_range=0.5)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    words.save_pretrained(folder)
    model.save_pretrained(folder)
    good, bad = reference(folder, [Text(known.PROMPT, response) for response in (known.GOOD, known.BAD)])
    if labels == 1 and good < bad:
        head = model.score if kind != "bert" else model.classifier
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.neg_()
        model.save_pretrained(folder)
    return model


def reference(folder: pathlib.Path, texts: list[Text]) -> list[float]:
    """As the model cards of Skywork-Reward have it: one text at a time, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewards = []
    for text in texts:
        if tokenizer.chat_template is None:
            inputs = tokenizer(text.prompt, text.response, return_tensors="pt")
        else:
            before = [{"role": "user", "content": text.prompt}] if isinstance(text.prompt, str) else text.prompt
            messages = [*before, {"role": "assistant", "content": text.response}]
            written = tokenizer.apply_chat_template(messages, tokenize=False)
            if tokenizer.bos_token is not None and written.startswith(tokenizer.bos_token):
                written = written[len(tokenizer.bos_token) :]
            inputs = tokenizer(written, return_tensors="pt")
        with torch.no_grad():
            rewards.append(model(**inputs).logits[0][0].item())
    return rewards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("reward")
    save_model(place)
    return place


def local(folder: pathlib.Path, batch_size: int = 8) -> LocalModel:
    return LocalModel(str(folder), "", "cpu", "auto", batch_size)


def question(name: str, first: str, second: str) -> Question:
    return Question(name, "Which?", first, second, 1.0, 1)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rewards_equal_those_of_single_texts(folder: pathlib.Path, batch_size: int) -> None:
    found = local(folder, batch_size).numbers(TEXTS)
    np.testing.assert_allclose(np.array(found)[:, 0], reference(folder, TEXTS), rtol=0, atol=1e-5)
    assert np.ptp(np.array(found)) > 0.1


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"bos": True, "chat_template": "{{ bos_token }}" + CHATML}), ("bert", {"chat_template": None})],
)
def test_other_families(kind: str, options: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """A template that writes BOS for a tokenizer that does, too; and an encoder that reads two sequences."""
    save_model(tmp_path, kind, **options)
    texts = [text for text in TEXTS if isinstance(text.prompt, str)]
    np.testing.assert_allclose(np.ravel(local(tmp_path).numbers(texts)), reference(tmp_path, texts), rtol=0, atol=1e-5)
    if kind == "llama":
        ids = local_reward_model.encoded(AutoTokenizer.from_pretrained(tmp_path), TEXTS[0])["input_ids"]
        assert ids.count(1) == 1
    else:
        with pytest.raises(ValueError, match="no chat template, and the prompts are chat messages; expected a "):
            local(tmp_path).numbers(TEXTS)
        (long,) = local(tmp_path).numbers([Text("Hello", "x y " * 100)])
        assert isinstance(long, str) and "tokens, the model's context 128" in long


def test_without_padding_texts_go_alone(tmp_path: pathlib.Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pad_token_id"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = np.ravel(local(tmp_path).numbers(TEXTS))
    np.testing.assert_allclose(found, reference(tmp_path, TEXTS), rtol=0, atol=1e-5)


def test_the_larger_reward_is_preferred(folder: pathlib.Path) -> None:
    oracle = RewardModelOracle(local(folder), 0.1, NO_NOISE)
    oracle.check()
    questions = [question("a", "blue", "green"), question("b", "green", "blue"), question("c", "sky", "sky")]
    one, other = reference(folder, [Text("Which?", "blue"), Text("Which?", "green")])
    expected = ["first", "second", "tie"] if one > other else ["second", "first", "tie"]
    labels = oracle.ask(questions)
    assert [(x.pair_id, x.preference) for x in labels] == list(zip("abc", expected, strict=True))
    assert {x.source for x in labels} == {f"reward model {folder}"}
    noisy = RewardModelOracle(local(folder), 0.1, Noise("flip", 1.0)).ask(questions[:2])
    assert [x.preference for x in noisy] == expected[1::-1]
    drawn = RewardModelOracle(local(folder), 0.1, Noise("bradley_terry", temperature=1e6)).ask(
        [question(str(n), "blue", "green") for n in range(40)]
    )
    assert 8 < sum(x.preference == "first" for x in drawn) < 32  # at this temperature a coin


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (None, "gives 3 numbers to a response, not one: it classifies, embeds, or rewards each token"),
        ("score.weight", "has no weights for score.weight; expected a model that was trained to reward"),
        ("everything", "cannot be loaded as a sequence classifier on 'cpu'"),
    ],
)
def test_models_that_are_none(rename: str | None, message: str, tmp_path: pathlib.Path) -> None:
    model = save_model(tmp_path, labels=1 if rename else 3)
    if rename == "everything":
        (tmp_path / "config.json").unlink()
    elif rename:
        model.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        RewardModelOracle(local(tmp_path), 0.1, NO_NOISE).check()


def test_no_torch_and_no_such_model(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no such directory; expected a Hugging Face sequence classifier: set con"):
        local(tmp_path / "a").prepare()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"a reward model needs torch .*pip install 'activedpo_jax\[reward\]'"):
        local(tmp_path).prepare()


class Given:
    """A model that gives what it is told to."""

    name = "given"

    def __init__(self, *numbers: Numbers) -> None:
        self._numbers = numbers

    def prepare(self) -> None:
        pass

    def numbers(self, texts: Any) -> list[Numbers]:
        return list(self._numbers)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ([1.0, 2.0], [0.0, 1.0], "gives 2 numbers to a response, not one"),
        ([], [], "gives 0 numbers"),
        ([np.nan], [0.0], "rewards a response with nan; expected a finite number"),
        ([3.0], [np.inf], "rewards a response with inf"),
        ([3.0], [3.0], "rewards .* alike, with 3; expected a reward model"),
        ([-1.0], [2.0], "rewards 'Bananas.* with 2, 'The capital .* with -1; expected a reward model"),
        ([1.0], [0.0], "look like probabilities that are saturated; expected logits"),
        ([0.99999], [0.9999], "look like probabilities that are saturated"),
        ("is too long", [1.0], "'What is the capital of France.' is too long; expected"),
    ],
)
def test_the_known_pair(good: Numbers, bad: Numbers, message: str) -> None:
    with pytest.raises(ValueError, match=f"given: .*{message}"):
        RewardModelOracle(Given(good, bad), 0.1, NO_NOISE).check()


@pytest.mark.parametrize(("good", "bad"), [(0.7, 0.2), (0.9999, 0.5), (12.0, -8.0), (1.0, -3.0)])
def test_known_pairs_that_pass(good: float, bad: float) -> None:
    RewardModelOracle(Given([good], [bad]), 0.1, NO_NOISE).check()


def test_pairs_without_a_reward(capsys: pytest.CaptureFixture[str]) -> None:
    questions = [question(str(n), "x", "y") for n in range(4)]
    numbers: list[Numbers] = [[1.0], [2.0], [2.0], [1.0], [1.0], "is too long", [1.0], [1.0]]
    labels = RewardModelOracle(Given(*numbers), 0.25, NO_NOISE).ask(questions)
    assert [(x.pair_id, x.preference) for x in labels] == [("0", "second"), ("1", "first"), ("2", "skip"), ("3", "tie")]
    assert "given: 1 of 4 pairs have no reward; pair '2' is too long: skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 of 4 .*expected at most config.oracle.max_failed=0.2 of them"):
        RewardModelOracle(Given(*numbers), 0.2, NO_NOISE).ask(questions)
    numbers[5] = [np.nan]
    with pytest.raises(ValueError, match="given: pair '2': rewards a response with nan"):
        RewardModelOracle(Given(*numbers), 0.25, NO_NOISE).ask(questions)


# Behind vLLM, as its versions are: the field that asks for logits has had two names, and others are ignored.


def logit(text: str) -> float:
    return 4.0 if text == known.GOOD else -5.0 if text == known.BAD else len(text) / 10


def vllm(field: str = "use_activation", raw: Callable[[str], Any] = logit) -> Callable[[dict[str, Any], int], Answer]:
    def respond(request: dict[str, Any], number: int) -> Answer:
        value = raw(request["messages"][-1]["content"])
        if request.get(field, True):
            value = 1 / (1 + np.exp(-np.array(value)))
        values = np.ravel(value).tolist()
        data = {"index": 0, "label": "LABEL_0", "probs": values, "num_classes": len(values)}
        return Answer({"object": "list", "data": [data]})

    return respond


def remote(url: str, **changes: Any) -> RewardModelOracle:
    return RewardModelOracle(RemoteModel(Server(url, "", 3, 5.0, 3)._replace(**changes), "m"), 0.34, NO_NOISE)


@pytest.mark.parametrize("field", ["use_activation", "activation"])
def test_a_server_is_asked_for_logits(field: str) -> None:
    questions = [question("a", "long", "x"), question("b", "x", "xx"), question("c", "x", "y")]
    with HttpServer(vllm(field)) as there:
        oracle = remote(f"{there.url}/classify")
        oracle.check()
        assert [x.preference for x in oracle.ask(questions)] == ["first", "second", "tie"]
        assert set(there.paths) == {"/classify"} and there.most <= 3
        assert len({json.dumps(request) for request in there.requests[-6:]}) == 4  # of six responses, "x" thrice
        assert there.requests[-1][field] is False and there.requests[-1]["model"] == "m"
        assert there.requests[-1]["messages"][0] == {"role": "user", "content": "Which?"}


def test_logits_may_lie_between_0_and_1() -> None:
    with HttpServer(vllm(raw=lambda text: 0.7 if text == known.GOOD else 0.2)) as there:
        remote(f"{there.url}/classify").check()
    assert there.requests[-1]["use_activation"] is False


def pooling(request: dict[str, Any], number: int) -> Answer:
    """`/pooling` of a reward model, which gives a list of one number, or of one for each token."""
    return Answer({"object": "list", "data": [{"index": 0, "object": "pooling", "data": [[logit(last(request))]]}]})


def last(request: dict[str, Any]) -> str:
    return str(request["messages"][-1]["content"])


def test_pooling_and_too_long() -> None:
    def respond(request: dict[str, Any], number: int) -> Answer:
        return Answer(b"maximum context length", 400) if last(request) == "long" else pooling(request, number)

    with HttpServer(respond) as there:
        oracle = remote(f"{there.url}/pooling")
        oracle.check()
        labels = oracle.ask([question("a", "xx", "x"), question("b", "long", "x"), question("c", "x", "xx")])
        assert [x.preference for x in labels] == ["first", "skip", "second"]


@pytest.mark.parametrize(
    ("respond", "kind", "message"),
    [
        (vllm("none"), ValueError, r"gives 0.982014 and 0.00669285 with an activation and without.*--pooler-config"),
        (vllm("none", lambda t: 90 * logit(t)), ValueError, "gives 1 and .* with an activation and without"),
        (vllm(raw=lambda t: [logit(t), 1.0]), ValueError, "gives 2 numbers to a response, not one"),
        (vllm(raw=lambda t: [[1.0, 2.0], [1.0, 2.0]]), ValueError, "gives 4 numbers to a response"),
        (vllm(raw=lambda t: -logit(t)), ValueError, "rewards 'Bananas"),
        (lambda r, n: Answer({"data": []}), ValueError, r"expected what vLLM's /classify or /pooling does"),
        (lambda r, n: Answer({"data": [{"data": "AAAA"}]}), ValueError, r"expected what vLLM's /classify or"),
        (lambda r, n: Answer(b"no template", 400), ValueError, r"is refused by the server \(400: no template\)"),
        (lambda r, n: Answer(status=404), ValueError, "answers 404"),
        (lambda r, n: Answer(status=500), StoreError, "answers 500"),
    ],
)
def test_servers_that_are_refused(
    respond: Callable[[dict[str, Any], int], Answer],
    kind: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    with HttpServer(respond) as there, pytest.raises(kind, match=message):
        remote(f"{there.url}/classify").check()
