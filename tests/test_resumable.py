"""Work kept on disk while it is under way: what a kill costs, and that a resumed run equals an undisturbed one."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activedpo_jax import errors, layout, specs, verbs
from activedpo_jax.evaluation import heldout
from activedpo_jax.models.policy import Policy
from activedpo_jax.oracles.labels import Label, Preference
from activedpo_jax.record.labels import fingerprint
from activedpo_jax.record.saved_work import SavedWork
from activedpo_jax.resumable import NothingSaved, pieces
from activedpo_jax.rounds import fused, pool_pass, staged
from activedpo_jax.rounds.picked import as_answers
from activedpo_jax.rounds.pool_evidence import pool_evidence
from activedpo_jax.rounds.state import Answers, Chosen, RunState, initial_state
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.tasks import Task
from activedpo_jax.training import optimiser
from tests import test_fresh, tiny
from tests.test_round import options
from tests.test_stages import BUCKETS, pool


class InMemory(NothingSaved):
    """As `SavedWork` on disk, with chosen moments."""

    def __init__(self, due: Iterator[bool]) -> None:
        self._due, self._kept = due, dict[tuple[int, int], Any]()

    def spans(self, stage: str) -> Sequence[tuple[int, int]]:
        return sorted(self._kept)

    def restore(self, stage: str, span: tuple[int, int], like: Any) -> Any:
        assert like == [f"like {i}" for i in range(*span)]
        return self._kept[span]

    def save(self, stage: str, span: tuple[int, int], tree: Any) -> None:
        self._kept[span] = tree

    def replace(self, stage: str, count: int, tree: Any) -> None:
        raise NotImplementedError

    def is_due(self) -> bool:
        return next(self._due)


@given(st.integers(0, 12), st.lists(st.booleans(), min_size=40, max_size=40), st.lists(st.integers(0, 12), max_size=4))
def test_pieces_come_once_each_and_in_order_whenever_the_process_is_killed(
    count: int, due: list[bool], kills: list[int]
) -> None:
    computed: list[int] = []

    def compute(i: int) -> str:
        computed.append(i)
        return f"piece {i}"

    moments = iter(due * 3)
    saved = InMemory(moments)
    for kill in kills:
        for number, found in enumerate(pieces(saved, "", count, compute, lambda i: f"like {i}")):
            assert found == f"piece {number}"
            if number == kill:
                break  # as a kill would: nothing after this point runs
    kept = max((end for _, end in saved.spans("")), default=0)
    before = len(computed)
    assert list(pieces(saved, "", count, compute, lambda i: f"like {i}")) == [f"piece {i}" for i in range(count)]
    assert computed[before:] == list(range(kept, count))


class Kill(Exception):
    pass


@pytest.fixture
def setting() -> tuple[Any, Policy, RunState, Any]:
    decoder, params, lora = tiny.model()
    data, config = pool(), options()
    config.features.dim, config.features.groups_per_chunk = 64, 2
    config.dpo.batch_size, config.dpo.epochs = 4, 3
    mesh = layout.make_mesh(config.mesh, jax.devices()[:2])
    task = Task(decoder, "tiny", params, lambda: params, data, data, BUCKETS)
    spec = specs.round_spec(config, "activedpo", task, mesh)
    params, lora = (layout.put(x, layout.weight_shardings(mesh, x)) for x in (params, lora))
    return spec, Policy(decoder, params, lora), initial_state(spec, lora, 0), data


def is_traced(args: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))


def dying(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The function, which is killed in its call after so many; calls for the shapes alone do not count."""
    calls = 0

    def run(*args: Any) -> Any:
        nonlocal calls
        calls += not is_traced(args)
        if calls > after:
            raise Kill
        return function(*args)

    return run


@pytest.mark.parametrize("minutes", [0, 60])
def test_features_of_a_killed_pass_are_read_not_computed_again(
    setting: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, minutes: float
) -> None:
    spec, policy, state, data = setting
    whole = pool_evidence(spec, policy, state, data, BUCKETS)["features"]
    chunks = len(pool_pass.Chunks(data, BUCKETS, spec.chunk))
    program, calls = pool_pass.evidence_program, 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += not is_traced(args)
        return program(*args)

    killed = SavedWork(tmp_path, minutes)
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(pool_pass, "evidence_program", dying(program, 3))
        pool_evidence(spec, policy, state, data, BUCKETS, killed)
    killed.close()
    saved = SavedWork(tmp_path, minutes)
    monkeypatch.setattr(pool_pass, "evidence_program", counted)
    again = pool_evidence(spec, policy, state, data, BUCKETS, saved)["features"]
    saved.close()
    np.testing.assert_array_equal(again, whole)
    assert calls == (chunks - 3 if minutes == 0 else chunks)


def test_a_damaged_piece_is_done_again_and_named(
    setting: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, policy, state, data = setting
    saved = SavedWork(tmp_path, 0)
    whole = pool_evidence(spec, policy, state, data, BUCKETS, saved)["features"]
    saved.close()
    (stage,) = (tmp_path / "partial" / "000" / "all").iterdir()
    damaged = sorted(stage.iterdir())[1]
    for file in damaged.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    saved = SavedWork(tmp_path, 60)
    again = pool_evidence(spec, policy, state, data, BUCKETS, saved)["features"]
    np.testing.assert_array_equal(again, whole)
    assert f"{damaged}: cannot be read, and is done again" in capsys.readouterr().out
    saved.enter(7, "choice")
    assert list(saved.spans(stage.name)) == []
    saved.forget_others()
    assert not list((tmp_path / "partial").iterdir())


def asked(spec: Any, data: Any) -> tuple[Chosen, Answers]:
    from activedpo_jax.data.groups import pad_pairs

    rows = np.arange(spec.selection.labels_per_round)
    groups = pad_pairs(data, rows, spec.bucket)
    picks = Picks(rows.astype(np.int32), np.zeros(len(rows), np.float32), np.bool_(False))  # type: ignore[arg-type]
    chosen = Chosen(picks, jnp.float32(1), groups, data.digests[rows])
    return chosen, Answers(jnp.asarray(data.preferences[rows], jnp.float32), jnp.ones(len(rows)))


def test_training_resumes_within_an_epoch_bit_for_bit(
    setting: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, policy, state, data = setting
    whole, means = staged.train(spec, policy, state, asked(spec, data), BUCKETS)
    steps = spec.training.epochs * -(-spec.selection.labels_per_round // spec.training.batch_size)
    killed = SavedWork(tmp_path, 0)
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(staged, "update_program", dying(staged.update_program, steps - 1))
        staged.train(spec, policy, state, asked(spec, data), BUCKETS, killed)
    killed.close()
    saved = SavedWork(tmp_path, 0)
    taken: list[int] = []
    program = staged.update_program
    monkeypatch.setattr(staged, "update_program", lambda *a: taken.append(1) or program(*a))  # type: ignore[func-returns-value]
    again, means_again = staged.train(spec, policy, state, asked(spec, data), BUCKETS, saved)
    saved.close()
    assert len(taken) == 1
    for a, b in zip(jax.tree.leaves((again, means_again)), jax.tree.leaves((whole, means)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_on_other_labels_begins_anew(setting: Any, tmp_path: pathlib.Path) -> None:
    """As where somebody changes an answer after the process was killed."""
    spec, policy, state, data = setting
    chosen, answers = asked(spec, data)
    other = chosen, answers._replace(preferences=1 - answers.preferences)
    whole, _ = staged.train(spec, policy, state, other, BUCKETS)
    parts: list[str] = []
    said: list[tuple[Any, Preference]] = [((chosen, answers), "first"), (other, "second")]
    for what, preference in said:
        saved = SavedWork(tmp_path, 0)
        parts.append(f"learnt_from_{fingerprint([Label('a', preference, 'people', time='now')])}")
        saved.enter(1, parts[-1])
        found, _ = staged.train(spec, policy, state, what, BUCKETS, saved)
        saved.close()
    jax.tree.map(np.testing.assert_array_equal, found.lora, whole.lora)
    assert len(set(parts)) == 2
    assert fingerprint([Label("a", "first", "a tool", time="later")]) == parts[0].removeprefix("learnt_from_")
    assert fingerprint([Label("a", "first", "people", weight=0.5)]) not in "".join(parts)


def test_a_signal_saves_and_ends(setting: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, policy, state, data = setting
    monkeypatch.setattr(errors, "signalled", lambda: True)

    def end() -> None:
        raise Kill

    monkeypatch.setattr(errors, "end", end)
    saved = SavedWork(tmp_path, 60)
    with pytest.raises(Kill):
        pool_evidence(spec, policy, state, data, BUCKETS, saved)
    (stage,) = (tmp_path / "partial" / "000" / "all").iterdir()
    assert saved.spans(stage.name) == [(0, 1)]  # whole on disk before the end


@pytest.mark.parametrize("changes", [{"candidates.source": "pool"}, {}], ids=["pool", "on-policy"])
def test_a_fused_round_is_kept_until_it_is_evaluated(
    changes: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, task, policy, spec, state = test_fresh.setting({"round.mode": "fused"} | changes)

    def picked_and_learnt() -> Any:
        saved = SavedWork(tmp_path, 0)
        rounds = verbs.make(config, spec, task, policy, 0, saved)
        picks = rounds.choose(state)
        saved.close()
        assert isinstance(rounds, fused.FusedRound)
        labels = rounds.ask(picks.questions)
        return picks.questions, [str(label) for label in labels], rounds.learn(state, picks, as_answers(spec, labels))

    whole = picked_and_learnt()
    monkeypatch.setattr(jax, "block_until_ready", lambda _: pytest.fail("computed again"))
    again = picked_and_learnt()
    assert again[:2] == whole[:2]
    jax.tree.map(np.testing.assert_array_equal, again[2], whole[2])
    restored = [(a.sharding, b.sharding) for a, b in zip(*map(jax.tree.leaves, (again[2][0], state)), strict=True)]
    assert all(a == b for a, b in restored)  # or the next round would be compiled anew


def test_held_out_scores_resume(setting: Any, tmp_path: pathlib.Path) -> None:
    spec, policy, state, data = setting
    batches = heldout.Batches(data, np.arange(data.num_pairs), BUCKETS, 4, spec.mesh)
    saved = SavedWork(tmp_path, 0)
    whole = heldout.log_probs(policy, state.lora, batches, "evaluation", saved)
    saved.close()
    saved = SavedWork(tmp_path, 60)
    assert saved.spans("evaluation")[-1][1] == len(batches)
    again = heldout.log_probs(policy, state.lora, batches, "evaluation", saved)
    np.testing.assert_array_equal(again, whole)


def test_moments_are_laid_out_like_their_weights(setting: Any) -> None:
    spec, policy, state, _ = setting
    _, learning = staged._resumed(spec, policy, state, SavedWork(pathlib.Path("/nonexistent"), 60))
    expected = optimiser.optimiser_shardings(spec.training.dpo.optimiser, spec.mesh, state.lora)
    for leaf, sharding in zip(jax.tree.leaves(learning.opt_state), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
