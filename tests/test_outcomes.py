"""Outcomes of held-out pairs: accuracies are their means, and what a checkpoint builds on is never lost."""

import pathlib

import numpy as np
import pytest

from activedpo_jax.record import outcomes

PROMPTS = np.array([5, 5, 9], np.uint64)
ROWS = np.array([[0, 0, 0], [1, -1, 0], [0.5, 2, -3]], np.float32)


def written(folder: pathlib.Path) -> outcomes.Outcomes:
    writer = outcomes.OutcomesWriter(folder, PROMPTS, 0)
    for row in ROWS:
        writer.add(row)
    return outcomes.read(folder)


def test_ties_count_half(tmp_path: pathlib.Path) -> None:
    found = written(tmp_path)
    np.testing.assert_array_equal(found.margins, ROWS)
    np.testing.assert_array_equal(found.prompts, PROMPTS)
    np.testing.assert_array_equal(found.correct, [[0.5, 0.5, 0.5], [1, 0, 0.5], [1, 1, 0]])


def test_a_round_that_is_done_again_replaces_what_was_there(tmp_path: pathlib.Path) -> None:
    written(tmp_path)
    content = (tmp_path / "heldout.npz").read_bytes()
    writer = outcomes.OutcomesWriter(tmp_path, PROMPTS, 2)  # round 2 was evaluated, and not saved
    writer.add(ROWS[2])
    assert (tmp_path / "heldout.npz").read_bytes() == content


def test_lost_outcomes_are_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="heldout.npz: missing, or without round 0"):
        outcomes.OutcomesWriter(tmp_path, PROMPTS, 1)
    written(tmp_path)
    for prompts, rounds in ((PROMPTS, 4), (PROMPTS[::-1], 2)):
        with pytest.raises(ValueError, match=f"without round {rounds - 1}"):
            outcomes.OutcomesWriter(tmp_path, prompts, rounds)
    (tmp_path / "heldout.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="heldout.npz: cannot be read"):
        outcomes.read(tmp_path)


def test_prompts_are_told_apart_by_their_tokens() -> None:
    prompts = [
        np.array(tokens, dtype) for tokens, dtype in (([1, 2], np.int32), ([1, 2], np.int64), ([1, 3], np.int32))
    ]
    first, same, other = outcomes.prompt_digests(prompts)
    assert first == same != other
