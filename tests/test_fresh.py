"""On-policy rounds: the policy's own responses as candidates, alone and beside a pool."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from activedpo_jax import layout, specs, tasks, verbs
from activedpo_jax.data.groups import Bucket, pad_groups
from activedpo_jax.data.synthetic import SyntheticReward, SyntheticTask
from activedpo_jax.models.decoder import init_params
from activedpo_jax.models.policy import Policy
from activedpo_jax.rounds import fresh
from activedpo_jax.rounds.state import initial_state
from tests.test_round import assert_same, execute, options

ON_POLICY = {
    "candidates.source": "policy",
    "oracle.kind": "reward",
    "generation.responses": 3,
    "generation.max_new_tokens": 6,
    "features.groups_per_chunk": 16,
    "synthetic.pool_pairs": 20,
}


@pytest.mark.parametrize("source", ["policy", "mixture"])
@pytest.mark.slow
def test_fused_equals_staged(source: str, tmp_path: pathlib.Path) -> None:
    changes = ON_POLICY | {"candidates.source": source}
    if source == "mixture":
        changes["generation.responses"] = 2
    fused = execute(tmp_path / "fused", changes | {"round.mode": "fused"})
    staged = execute(tmp_path / "staged", changes | {"round.mode": "staged", "features.groups_per_chunk": 7})
    assert_same(staged, fused)
    assert len(set(fused[0])) == 12
    rounds = [name.split("/")[1] for name in fused[0] if "/round" in name]
    assert rounds if source == "mixture" else rounds == ["round1"] * 6 + ["round2"] * 6
    for name in ("asked", "labels", "selected", "responses"):
        for number in (1, 2):
            paths = [tmp_path / mode / "rounds" / f"{number:03d}" / f"{name}.jsonl" for mode in ("fused", "staged")]
            rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
            assert [[without_floats(row) for row in some] for some in rows][0] == [without_floats(r) for r in rows[1]]


def without_floats(row: dict[str, Any]) -> dict[str, Any]:
    """Two programs round differently, and two runs label at different times."""
    kept = {k: v for k, v in row.items() if k not in ("score", "scores", "lam", "time")}
    return kept


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path: pathlib.Path) -> None:
    changes = ON_POLICY | {"round.mode": "fused"}
    one = execute(tmp_path / "one", changes)
    assert_same(execute(tmp_path / "eight", changes, (4, 2, 1)), one)


def setting(changes: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
    config = options()
    config.update_from_flattened_dict(ON_POLICY | changes)
    mesh = layout.make_mesh(config.mesh, jax.devices()[:1])
    task = tasks.load(config, 0, mesh, None)
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, init_params(task.decoder, jax.random.key(0)))
    lora = tasks.start.initial_lora(config, task.decoder, mesh, 0)
    policy = Policy(task.decoder, params, lora)
    spec = specs.round_spec(config, "activedpo", task, mesh)
    return config, task, policy, spec, initial_state(spec, lora, 0)


def test_responses_depend_on_seed_round_and_prompt_alone() -> None:
    config, task, policy, spec, state = setting({"round.mode": "staged"})
    assert task.prompts is not None
    everything = fresh.fresh_candidates(spec, policy, state, task.prompts, [4, 8])
    some = task.prompts.draw(7, 0, 1)
    assert some.ids == sorted(some.ids) and len(some.ids) == 7 and some.ids != task.prompts.ids[:7]
    few = fresh.fresh_candidates(spec, policy, state, some, [4])
    tokens = dict(zip(task.prompts.ids, everything.response_tokens, strict=True))
    for name, responses in zip(some.ids, few.response_tokens, strict=True):
        jax.tree.map(np.testing.assert_array_equal, responses, tokens[name])
    later = state._replace(round=state.round + 1)
    again = fresh.fresh_candidates(spec, policy, later, task.prompts, [4])
    same = [np.array_equal(a, b) for g, h in zip(again.response_tokens, everything.response_tokens, strict=True)
            for a, b in zip(g, h, strict=True)]  # fmt: skip
    assert np.mean(same) < 0.5


def test_equal_and_empty_responses_make_no_pair() -> None:
    """At a low temperature most responses of a prompt are equal; the pairs that are left are of different tokens."""
    config, task, policy, spec, state = setting({"generation.temperature": 0.05, "round.mode": "staged"})
    found = fresh.fresh_candidates(spec, policy, state, task.prompts, [4])
    assert found.valid is not None and 0 < found.valid.sum() < found.num_pairs
    stop = task.stop[0]
    for (group, i, j), valid in zip(found.pairs, found.valid, strict=True):
        responses = [tuple(t for t in r.tolist() if t != stop) for r in found.response_tokens[group]]
        first = [responses.index(r) == k and r != () for k, r in enumerate(responses)]
        assert valid == (first[i] and first[j])
    with pytest.raises(ValueError, match=r"round 1: \d+ pairs can be asked about, and the round is to label"):
        config.labels_per_round = int(found.valid.sum()) + 1
        wide = specs.round_spec(config, "activedpo", task, spec.mesh)
        verbs.make(config, wide, task, policy, 0).choose(initial_state(wide, policy.reference, 0))


def test_responses_that_read_the_same_make_no_pair() -> None:
    _, task, policy, spec, state = setting({"round.mode": "staged"})
    told = {2: " so it is", 3: "so it is ", 4: " "}  # by length: others are told apart
    same = dataclasses.replace(task.prompts, text_of=lambda tokens: told.get(len(tokens), str(tokens)))
    plain = fresh.fresh_candidates(spec, policy, state, task.prompts, [4])
    found = fresh.fresh_candidates(spec, policy, state, same, [4])
    assert plain.valid is not None and found.valid is not None and found.valid.sum() < plain.valid.sum()
    for (group, i, j), valid, before in zip(found.pairs, found.valid, plain.valid, strict=True):
        texts = [text.strip() for text in found.response_texts[group]]
        first = [texts.index(text) == k and bool(text) for k, text in enumerate(texts)]
        assert valid == (before and first[i] and first[j])


def test_a_reward_that_is_not_finite_ends_a_fused_round_before_anything_is_recorded(tmp_path: pathlib.Path) -> None:
    changes = ON_POLICY | {
        "rounds": 1,
        "round.mode": "fused",
        "oracle.function": "tests.test_oracles:unfinished_reward",
    }
    with pytest.raises(
        ValueError, match=r"unfinished_reward: its reward of a response of pair '.*' is not finite \(6 "
    ):
        execute(tmp_path, changes)
    assert not (tmp_path / "rounds").exists()


def test_a_pair_is_known_again_whatever_its_padding() -> None:
    _, task, policy, spec, state = setting({"round.mode": "staged"})
    narrow = fresh.fresh_candidates(spec, policy, state, task.prompts, [4])
    wide = fresh.fresh_candidates(spec, policy, state, task.prompts, [9])
    np.testing.assert_array_equal(narrow.digests, wide.digests)
    assert narrow.valid is not None
    assert len(np.unique(narrow.digests[narrow.valid], axis=0)) == narrow.valid.sum()


def test_the_synthetic_reward_is_that_of_the_task() -> None:
    task = SyntheticTask(
        8, 3, 6, topics_per_family=2, context_words=2, min_response=5, max_response=8, purity=0.7, zipf=1.5
    )
    pool = task.pool(3, 50)
    reward = jax.jit(SyntheticReward(task))
    likings = np.asarray(task.likings(3), np.float32)
    for bucket in (task.bucket, Bucket(9, 12)):
        got = reward(likings, pad_groups(pool, np.arange(50), bucket))
        assert pool.rewards is not None
        np.testing.assert_allclose(got, pool.rewards, atol=1e-6)
