"""The policy's own responses beside the SFT model's: what they are, how they compare, and that a kill loses none."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from activedpo_jax import layout
from activedpo_jax.data.groups import Groups
from activedpo_jax.evaluation import on_policy, win_rates
from activedpo_jax.generation.decoding import DecodingSpec
from activedpo_jax.generation.sampling import Sampling
from activedpo_jax.models.policy import Policy, response_logps
from activedpo_jax.record.saved_work import SavedWork
from activedpo_jax.resumable import NOTHING_SAVED
from tests import tiny
from tests.test_round import execute, options
from tests.test_stages import BUCKETS, pool

REWARD = "tests.test_on_policy:vowels"


def vowels(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """A reward that has labelled nothing."""
    return [sum(letter in "aeiou0123" for letter in text) / (1 + len(text)) for text in completions]


def setting(devices: int = 1, packed: bool = True) -> on_policy.Setting:
    decoder, params, _ = tiny.model()
    mesh = layout.make_mesh(options().mesh, jax.devices()[:devices])
    reference = tiny.model(1)[2]
    params, reference = (layout.put(x, layout.weight_shardings(mesh, x)) for x in (params, reference))
    decoder = decoder.clone(mesh=mesh)
    decoding = DecodingSpec(decoder.clone(unrolled=True), Sampling(), (0, 1, 2, 3, 4), BUCKETS[-1].response, mesh)
    text_of = lambda tokens: " ".join(map(str, tokens))  # noqa: E731
    return on_policy.Setting(Policy(decoder, params, reference), decoding, BUCKETS, 4, packed, text_of)


@pytest.fixture(scope="module")
def compared() -> on_policy.Compared:
    return on_policy.compare(setting(), tiny.model()[2], on_policy.draw_prompts(pool(), 7), 0, NOTHING_SAVED)


def test_prompts_are_different_ones_of_the_held_out_set() -> None:
    data = pool()
    twice = dataclasses.replace(
        data,
        prompt_tokens=[*data.prompt_tokens, *data.prompt_tokens],
        prompt_texts=[str(i) for i in range(18)],
    )
    every, some = on_policy.draw_prompts(twice, 100), on_policy.draw_prompts(twice, 5)
    contents = [prompt.tobytes() for prompt in data.prompt_tokens]
    first = [i for i, content in enumerate(contents) if content not in contents[:i]]
    assert every.shown == [str(i) for i in first] and len(first) == len(set(every.ids)) == 8
    assert len(some.ids) == 5 and set(some.ids) < set(every.ids)
    assert some.ids == on_policy.draw_prompts(data, 5).ids


def test_responses_are_those_of_the_models_and_as_likely_as_said(compared: on_policy.Compared) -> None:
    decoder, params, lora = tiny.model()
    both = lora, tiny.model(1)[2]
    logps = jax.jit(lambda lora, groups: response_logps(decoder, params, lora, groups))
    for i, prompt in enumerate(compared.prompts.texts.prompt_tokens):
        for j, tokens in enumerate(compared.tokens[i]):
            assert compared.texts[i][j] == " ".join(map(str, tokens))
            ends = [t for t in tokens if t < 5]
            assert len(ends) == int(compared.ended[i, j]) and (not ends or tokens[-1] == ends[0])
            assert compared.ended[i, j] or len(tokens) == BUCKETS[-1].response
            padded = np.zeros((1, 7), np.int32), np.zeros((1, 1, 9), np.int32)
            padded[0][0, 7 - len(prompt) :], padded[1][0, 0, : len(tokens)] = prompt, tokens
            groups = Groups(padded[0], np.array([len(prompt)]), padded[1], np.array([[len(tokens)]]))
            wanted = [float(logps(one, groups)[0, 0]) for one in both]
            assert [compared.logps[i, j], compared.ref_logps[i, j]] == pytest.approx(wanted, abs=1e-4)
    assert compared.logps[:, 0].mean() > compared.ref_logps[:, 0].mean()  # each model likes its own responses better
    assert compared.logps[:, 1].mean() < compared.ref_logps[:, 1].mean()


def test_the_same_on_a_mesh_and_the_models_draw_different_numbers(compared: on_policy.Compared) -> None:
    prompts = compared.prompts
    again = on_policy.compare(setting(2, packed=False), tiny.model()[2], prompts, 0, NOTHING_SAVED)
    assert again.texts == compared.texts
    np.testing.assert_allclose(again.logps, compared.logps, atol=1e-4)
    # π_θ = π_ref: were the random numbers the same, so were the responses, and every prompt a tie.
    same = on_policy.compare(setting(), tiny.model(1)[2], prompts, 0, NOTHING_SAVED)
    assert sum(first != second for first, second in same.texts) > len(same.texts) / 2
    np.testing.assert_allclose(same.logps, same.ref_logps, atol=1e-5)


def test_figures_and_lines(compared: on_policy.Compared) -> None:
    rewards = np.array([vowels([], several) for several in compared.texts])
    found, lines = on_policy.figures(compared, rewards), on_policy.lines(compared, rewards)
    assert json.loads(json.dumps(lines)) == lines
    policy, sft = ([line[name] for line in lines] for name in ("policy", "sft"))
    won = [
        1.0 if a["reward"] > b["reward"] else 0.5 if a["reward"] == b["reward"] else 0
        for a, b in zip(policy, sft, strict=True)
    ]
    ratios, tokens = [p["log_ratio"] for p in policy], [p["tokens"] for p in policy]
    assert found["win_rate"]["mean"] == pytest.approx(np.mean(won))
    assert found["kl"]["mean"] == pytest.approx(np.mean(ratios))
    assert found["kl_a_token"] == pytest.approx(sum(ratios) / sum(tokens))
    assert found["policy"]["reward"]["mean"] == pytest.approx(np.mean([p["reward"] for p in policy]))
    assert found["policy"]["tokens"] == pytest.approx(np.mean(tokens))
    assert found["sft"]["cut"] == pytest.approx(np.mean([not s["ended"] for s in sft]))
    controlled = win_rates.length_controlled(
        np.array(won), np.array(tokens, float), np.array([s["tokens"] for s in sft], float)
    )
    assert found["length_controlled_win_rate"]["mean"] == pytest.approx(controlled.win_rate.mean)


def test_a_killed_comparison_goes_on(
    compared: on_policy.Compared, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    respond = on_policy.respond

    def dying(*arguments: Any) -> Any:
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments)):
            asked.append(1)
            if len(asked) == 2:
                raise KeyboardInterrupt
        return respond(*arguments)

    monkeypatch.setattr(on_policy, "respond", dying)
    saved = SavedWork(tmp_path, 0)
    saved.enter(1, "on_policy")
    with pytest.raises(KeyboardInterrupt):
        on_policy.compare(setting(), tiny.model()[2], compared.prompts, 0, saved)
    saved.close()
    saved = SavedWork(tmp_path, 0)
    saved.enter(1, "on_policy")
    found = on_policy.compare(setting(), tiny.model()[2], compared.prompts, 0, saved)
    saved.close()
    assert len(asked) == 5  # of four batches the second twice
    assert found.texts == compared.texts


def test_a_run_ends_with_the_comparison(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "rounds": 1,
        "evaluation.on_policy_prompts": 6,
        "evaluation.reward": REWARD,
        "generation.max_new_tokens": 9,
        "dpo.learning_rate": 1e-2,
    }
    execute(tmp_path, changes)
    out = capsys.readouterr().out
    assert f"against the SFT model on 6 held-out prompts, by {REWARD}: win rate 0." in out
    found = json.loads((tmp_path / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert found["round"] == 1 and found["prompts"] == len(lines) == 6 and found["reward"] == REWARD
    assert [vowels([], [line["policy"]["response"]])[0] for line in lines] == [
        line["policy"]["reward"] for line in lines
    ]
    execute(tmp_path, changes)  # finds it done
    assert "against the SFT model" not in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
