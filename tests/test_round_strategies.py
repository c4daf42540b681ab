"""Strategies on other evidence than gradients, in whole rounds: fused and staged agree.

A file of its own, since a process can hold the programs of so many tests only; see `conftest`.
"""

import json
import pathlib

import pytest

from tests.test_round import execute


@pytest.mark.parametrize("strategy", ["aplp", "apo"])
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
    by_margin = strategy == "aplp"
    assert ("fallback" in rounds[1]) == by_margin and "fallback" not in rounds[2]
    record = tmp_path / "fused" / "rounds" / "001" / "selected.jsonl"
    first = [json.loads(line) for line in record.read_text().splitlines()]
    assert all((row["score"] is None) == by_margin for row in first)
