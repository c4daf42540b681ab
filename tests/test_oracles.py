"""Functions of texts and of tokens as oracles, alone and in whole runs on a Hugging Face model."""

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from activedpo_jax import main
from activedpo_jax.data.groups import Bucket, Groups
from activedpo_jax.oracles.function import FunctionOracle, load_function
from activedpo_jax.oracles.labels import PREFERENCES, Label, Preference, Question
from activedpo_jax.oracles.noise import NO_NOISE, Noise
from activedpo_jax.oracles.reward import RewardOracle
from activedpo_jax.oracles.sentiment import positivity
from tests.test_main import command  # noqa: F401


def question(name: str, first: str, second: str) -> Question:
    return Question(name, "How was it?", first, second, None, 1, [1, 2], [3] * len(first), [3] * len(second))


def test_sentiment_is_told_by_words() -> None:
    good, bad, neither = positivity(["?"] * 3, ["A wonderful, happy day!", "Terrible. I hate it.", "It is a table."])
    assert good > neither == 0 > bad
    assert positivity(["?"], [""]) == [0.0]


def test_the_larger_reward_is_preferred() -> None:
    oracle = FunctionOracle(positivity, "sentiment", Noise())
    labels = oracle.ask([question("a", "good", "bad"), question("b", "bad", "good"), question("c", "so", "what")])
    assert [(label.pair_id, label.preference) for label in labels] == [("a", "first"), ("b", "second"), ("c", "tie")]
    flipped = FunctionOracle(positivity, "sentiment", Noise("flip", 1.0))
    assert [label.preference for label in flipped.ask([question("a", "good", "bad")])] == ["second"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, completions: [1.0], r"mine: returned 1 rewards for 2 responses"),
        (lambda prompts, completions: [1.0, float("nan")], r"mine: returned nan for 'bad'; expected a finite number"),
        (lambda prompts, completions: ["x", "y"], r"mine: returned 'x' for 'good'"),
        (lambda prompts, completions: prompts[9], r"mine: raised IndexError: .*; correct the function"),
        (lambda prompts, completions: None, r"mine: raised TypeError"),
    ],
)
def test_what_a_function_may_not_do(function: Any, message: str) -> None:
    questions = [question("a", "good", "x"), question("b", "bad", "y")]
    with pytest.raises(ValueError, match=message):
        FunctionOracle(function, "mine", Noise()).ask(questions)


@pytest.mark.parametrize("name", ["nowhere:f", "activedpo_jax.oracles.sentiment:nothing", "activedpo_jax:__version__"])
def test_functions_that_cannot_be_had(name: str) -> None:
    with pytest.raises(ValueError, match="config.oracle.function: "):
        load_function(name, "config.oracle.function")


def length_reward(groups: Groups) -> Any:
    """Longer is better."""
    return jnp.asarray(groups.response_len).astype(jnp.float32)


def unfinished_reward(groups: Groups) -> Any:
    return length_reward(groups) * jnp.nan


def test_a_reward_of_tokens() -> None:
    oracle = RewardOracle(length_reward, "length", Bucket(4, 6))
    labels = oracle.ask([question("a", "xx", "x"), question("b", "x", "xxx"), question("c", "xx", "yy")])
    assert [label.preference for label in labels] == ["first", "second", "tie"]
    with pytest.raises(ValueError, match="broken: returned rewards of shape .* 2 of them not finite"):
        RewardOracle(unfinished_reward, "broken", Bucket(4, 6)).ask([question("a", "xx", "x")])


def test_noise_on_a_reward_of_tokens() -> None:
    flipped = RewardOracle(length_reward, "length", Bucket(4, 6), Noise("flip", 1.0))
    labels = flipped.ask([question("a", "xx", "x"), question("b", "x", "xxx"), question("c", "xx", "yy")])
    assert [label.preference for label in labels] == ["second", "first", "tie"]
    drawn = RewardOracle(length_reward, "length", Bucket(4, 6), Noise("bradley_terry", temperature=2.0))
    firsts = [x.preference == "first" for x in drawn.ask([question(str(n), "xxx", "x") for n in range(2000)])]
    assert abs(np.mean(firsts) - 1 / (1 + np.exp(-1.0))) < 0.04  # 4 standard deviations


def test_noise_on_labels() -> None:
    labels = [Label(str(n), PREFERENCES[n % 5], "x", weight=0.5) for n in range(4000)]
    noisy = Noise("flip", 0.3, seed=1).on_labels(labels)
    other: dict[Preference, Preference] = {"first": "second", "second": "first"}
    changed = [x for x, y in zip(labels, noisy, strict=True) if x != y]
    assert abs(len(changed) / 1600 - 0.3) < 0.05 and {x.preference for x in changed} == {"first", "second"}
    for x, y in zip(labels, noisy, strict=True):
        assert x == y or dataclasses.replace(x, preference=other[x.preference]) == y
    assert Noise("flip", 0.3, seed=1).on_labels(labels[::-1])[::-1] == noisy and NO_NOISE.on_labels(labels) == labels


@pytest.mark.parametrize("kind", ["function", "reward"])
def test_on_policy_on_a_model(
    kind: str,
    command: list[str],  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    """Prompts alone, responses of the policy, a function that judges: the label is what the function says."""
    function = {"function": "activedpo_jax.oracles.sentiment:positivity", "reward": "tests.test_oracles:length_reward"}
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Is it {n}?"} for n in ("blue", "green", "so", "not", "today", "the sky")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    options = {
        "data.train": prompts,
        "candidates.source": "policy",
        "candidates.prompts_per_round": 4,
        "oracle.kind": kind,
        "oracle.function": function[kind],
        "generation.responses": 3,
        "generation.max_new_tokens": 8,
        "export.merged": "false",
    }
    arguments = [flag for flag in command if "sft.data" not in flag and "data.train" not in flag]
    main.main([*arguments, "--workdir", str(folder), *(f"--config.{name}={value}" for name, value in options.items())])
    for number in ("001", "002"):
        place = folder / "rounds" / number
        selected = [json.loads(line) for line in (place / "selected.jsonl").read_text().splitlines()]
        asked = [json.loads(line) for line in (place / "asked.jsonl").read_text().splitlines()][1:]
        responses = [json.loads(line) for line in (place / "responses.jsonl").read_text().splitlines()]
        assert len(responses) == 4 and all(len(row["responses"]) == 3 for row in responses)
        shown = {text for row in responses for text in row["responses"]}
        assert len(selected) == 3 and all({row["first"], row["second"]} <= shown for row in selected)
        for row, question in zip(selected, asked, strict=True):
            if kind == "reward":
                rewards = [float(len(question[f"{side}_tokens"])) for side in ("first", "second")]
            else:
                rewards = positivity(["", ""], [row["first"], row["second"]])
            assert row["preference"] == ("tie", "first", "second")[int(np.sign(rewards[0] - rewards[1]))]
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
