"""Strategies on other evidence than gradients, in whole rounds: fused and staged agree.

A file of its own, since a process can hold the programs of so many tests only; see `conftest`.
"""

import json
import pathlib

import pytest

from tests.test_fresh import ON_POLICY
from tests.test_round import execute


@pytest.mark.parametrize(
    "strategy",
    [
        "aplp",
        "apo",
        "adpo",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("activedpo_fisher", "badge", "dopt", "kcenter")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("apl_entropy", "transductive")),
    ],
)
def test_every_strategy_agrees_between_fused_and_staged(strategy: str, tmp_path: pathlib.Path) -> None:
    changes = {
        "strategies": (strategy,),
        "generation.max_new_tokens": 5,
        "selection.entropy_samples": 2,
        "dpo.learning_rate": 1e-2,  # margins that differ by more than their rounding
    }
    fused = execute(tmp_path / "fused", changes | {"round.mode": "fused"})
    staged = execute(tmp_path / "staged", changes | {"round.mode": "staged", "features.groups_per_chunk": 7})
    assert staged[0] == fused[0] and len(set(fused[0])) == 12
    rounds = fused[2]["rounds"]
    by_margin = strategy == "aplp"  # of those that fall back before any training
    assert ("fallback" in rounds[1]) == by_margin and "fallback" not in rounds[2]
    record = tmp_path / "fused" / "rounds" / "001" / "selected.jsonl"
    first = [json.loads(line) for line in record.read_text().splitlines()]
    assert all((row["score"] is None) == by_margin for row in first)


BY_PROMPT = ON_POLICY | {"strategies": ("dts",), "dpo.learning_rate": 1e-2, "round.mode": "fused"}


@pytest.mark.slow
def test_a_round_that_chooses_on_every_prompt(tmp_path: pathlib.Path) -> None:
    """Three responses to each of 20 prompts, and six pairs, each of another prompt."""
    picks, _, summary = execute(tmp_path, BY_PROMPT | {"rounds": 1})
    record = tmp_path / "rounds" / "001" / "selected.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(set(picks)) == 6 == len({json.dumps(line["prompt"]) for line in lines})
    assert "fallback" not in summary["rounds"][1] and all(line["score"] is None for line in lines)


@pytest.mark.slow
def test_strategies_that_choose_on_every_prompt_agree_between_fused_and_staged(tmp_path: pathlib.Path) -> None:
    fused = execute(tmp_path / "fused", BY_PROMPT)
    staged = execute(tmp_path / "staged", BY_PROMPT | {"round.mode": "staged", "features.groups_per_chunk": 7})
    assert staged[0] == fused[0] and len(set(fused[0])) == 12


@pytest.mark.slow
def test_two_responses_leave_nothing_to_choose(tmp_path: pathlib.Path) -> None:
    _, _, summary = execute(tmp_path, {"strategies": ("deltaucb",), "round.mode": "fused", "rounds": 1})
    assert summary["rounds"][1]["fallback"] == "no prompt has two pairs to choose from: picked at random"
