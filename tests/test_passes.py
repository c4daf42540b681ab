"""Evidence that outlives its round, or lies on the host: passes every k rounds, and what is brought up to date between
them."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activedpo_jax import flags, layout, specs
from activedpo_jax.data import store
from activedpo_jax.models.policy import Policy
from activedpo_jax.record.saved_work import SavedWork
from activedpo_jax.resumable import NOTHING_SAVED
from activedpo_jax.rounds import pool_pass, staged
from activedpo_jax.rounds.pool_evidence import PoolEvidence, pool_evidence
from activedpo_jax.rounds.spec import PassSpec, RoundSpec
from activedpo_jax.rounds.state import RunState, initial_state
from activedpo_jax.selection.strategies import STRATEGIES
from activedpo_jax.tasks import Task
from tests import tiny
from tests.test_round import execute, options
from tests.test_stages import BUCKETS, pool

K = 3


@pytest.fixture(scope="module")
def setting() -> tuple[RoundSpec, Policy, RunState, Any]:
    """A pool of nine prompts, padded, on two devices."""
    return setting_on(2)


def setting_on(devices: int) -> tuple[RoundSpec, Policy, RunState, Any]:
    decoder, params, lora = tiny.model()
    data, config = pool(), options()
    config.features.dim, config.features.groups_per_chunk, config.labels_per_round = 64, 2, K
    mesh = layout.make_mesh(config.mesh, jax.devices()[:devices])
    task = Task(decoder, "tiny", params, lambda: params, data, data, BUCKETS)
    spec = specs.round_spec(config, "activedpo", task, mesh)
    params, lora = (layout.put(x, layout.weight_shardings(mesh, x)) for x in (params, lora))
    return spec, Policy(decoder, params, lora), initial_state(spec, lora, 0), data


def later(state: RunState, rounds: int) -> RunState:
    """The state after more rounds, with an adapter that depends on the round; the labelled pairs are as they were."""
    number = int(state.round) + rounds
    change = lambda x: (x * (1 + 0.5 * number) + 0.05 * number).astype(x.dtype)  # noqa: E731
    return state._replace(lora=jax.tree.map(change, state.lora), round=state.round + rounds)


def with_passes(setting: Any, **passes: Any) -> Any:
    spec, policy, state, data = setting
    return dataclasses.replace(spec, passes=PassSpec(**passes)), policy, state, data


def whole(setting: Any, state: RunState) -> np.ndarray:
    """The features of a pass at the θ of this state."""
    spec, policy, _, data = setting
    return np.asarray(pool_evidence(spec, policy, state, data, BUCKETS)["features"])


@pytest.mark.parametrize("every", [0, 2, 3])
def test_a_pass_comes_every_k_rounds(setting: Any, every: int) -> None:
    spec, policy, state, data = with_passes(setting, every=every)
    evidence, states = PoolEvidence(pool_pass.Pass(spec, policy, BUCKETS)), [later(state, n) for n in range(5)]
    last = states[0]
    for number, now in enumerate(states, start=1):
        if number == 1 or (every and (number - 1) % every == 0):
            last = now
        rows = evidence.rows_for(now, data)
        np.testing.assert_array_equal(rows.arrays["features"], whole(setting, last))
        assert evidence.computed == (data.num_groups if last is now else 0)


def in_numpy(before: np.ndarray, now: np.ndarray, data: Any, lam: float) -> tuple[list[int], set[int]]:
    """The picks between passes, and the groups that are brought up to date, by a dense loop in float64."""
    current = set[int]()
    groups = data.pairs[:, 0]

    def greedy(count: int) -> list[int]:
        phi = np.where(np.isin(groups, list(current))[:, None], now, before).astype(np.float64)
        inverse, picks = np.eye(phi.shape[1]) / lam, list[int]()
        for _ in range(count):
            scores = np.einsum("nd,de,ne->n", phi, inverse, phi)
            scores[picks] = -np.inf
            picks.append(int(np.argmax(scores)))
            v = inverse @ phi[picks[-1]]
            inverse -= np.outer(v, v) / (1 + phi[picks[-1]] @ v)
        return picks

    while True:
        picks = greedy(min(2 * K, len(groups)))
        if all(groups[row] in current for row in picks[:K]):
            return picks[:K], current
        current |= {int(groups[row]) for row in picks}


@pytest.mark.parametrize("on_host", [False, True])
def test_between_passes_all_picks_are_of_the_current_weights(setting: Any, on_host: bool) -> None:
    spec, policy, state, data = with_passes(setting, every=0, in_reach=True, on_host=on_host)
    evidence, after = PoolEvidence(pool_pass.Pass(spec, policy, BUCKETS)), later(state, 1)
    staged.pick(evidence, state, data)
    picks, _ = staged.pick(evidence, after, data)
    count = data.num_pairs
    expected, current = in_numpy(whole(setting, state)[:count], whole(setting, after)[:count], data, spec.selection.lam)
    assert np.asarray(picks.rows).tolist() == expected
    assert evidence.computed == len(current) < data.num_groups


def test_what_is_in_reach_is_packed_as_all_candidates_were() -> None:
    spec, policy, state, data = with_passes(setting_on(1), every=0, in_reach=True)
    assert spec.packed
    evidence, after = PoolEvidence(pool_pass.Pass(spec, policy, BUCKETS)), later(state, 1)
    staged.pick(evidence, state, data)
    compiled = pool_pass.evidence_program._cache_size()  # type: ignore[attr-defined]
    picks, _ = staged.pick(evidence, after, data)
    assert pool_pass.evidence_program._cache_size() == compiled  # type: ignore[attr-defined]
    count = data.num_pairs
    expected, current = in_numpy(
        whole(setting_on(1), state)[:count], whole(setting_on(1), after)[:count], data, spec.selection.lam
    )
    assert np.asarray(picks.rows).tolist() == expected
    assert evidence.computed == len(current) < data.num_groups


def test_nothing_is_in_reach_twice_where_the_weights_have_not_changed(setting: Any) -> None:
    spec, policy, state, data = with_passes(setting, every=0, in_reach=True)
    evidence = PoolEvidence(pool_pass.Pass(spec, policy, BUCKETS))
    first, _ = staged.pick(evidence, state, data)
    again, _ = staged.pick(evidence, state._replace(round=state.round + 1), data)
    np.testing.assert_array_equal(first.rows, again.rows)
    assert evidence.computed == len(set(data.pairs[np.asarray(evidence_rows(spec, policy, state, data)), 0]))


def evidence_rows(spec: RoundSpec, policy: Policy, state: RunState, data: Any) -> Any:
    """The picks and those next in line."""
    rows = PoolEvidence(pool_pass.Pass(spec, policy, BUCKETS)).rows_for(state, data)
    picks, _ = rows.select(staged.with_next_in_line(spec, data.num_pairs), state, staged.host_rows(data), known(spec))
    return picks.rows


def known(spec: RoundSpec) -> Any:
    return jnp.zeros((spec.capacity, 64))


@pytest.mark.parametrize("on_host", [False, True])
def test_a_new_process_takes_up_the_evidence_of_earlier_rounds(
    setting: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, on_host: bool
) -> None:
    spec, policy, state, data = with_passes(setting, every=0, in_reach=True, on_host=on_host)
    states = [later(state, n) for n in range(3)]
    alive = PoolEvidence(pool_pass.Pass(spec, policy, BUCKETS))
    expected = [np.asarray(staged.pick(alive, now, data)[0].rows) for now in states]
    calls, program = [0], pool_pass.evidence_program

    def counted(*args: Any) -> Any:
        calls[0] += not isinstance(args[3].prompt_len, jax.core.Tracer)
        return program(*args)

    monkeypatch.setattr(pool_pass, "evidence_program", counted)
    for number, now in enumerate(states, start=1):  # each round in a process of its own
        saved = SavedWork(tmp_path, 60)
        saved.enter(number, "choice")
        calls[0] = 0
        evidence = PoolEvidence(pool_pass.Pass(spec, policy, BUCKETS), saved)
        picks, _ = staged.pick(evidence, now, data)
        np.testing.assert_array_equal(picks.rows, expected[number - 1])
        saved.forget_others()
        saved.close()
        assert sorted(path.name for path in (tmp_path / "partial").iterdir())[0] == "001"
        assert number == 1 or 0 < evidence.computed < data.num_groups
        assert calls[0] <= evidence.computed


def test_without_what_was_kept_there_is_a_pass(setting: Any, tmp_path: pathlib.Path) -> None:
    spec, policy, state, data = with_passes(setting, every=3)
    for saved in (NOTHING_SAVED, SavedWork(tmp_path, 60)):
        evidence = PoolEvidence(pool_pass.Pass(spec, policy, BUCKETS), saved)
        evidence.rows_for(later(state, 1), data)
        assert evidence.computed == data.num_groups


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (1, 1, 1)),
        pytest.param({"strategies": ("apo",)}, (1, 1, 1), marks=pytest.mark.slow),
        pytest.param({"selection.posterior": "frozen"}, (4, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_features_on_the_host_give_the_same_picks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(store, "_IN_MEMORY", 0)  # so that they are mapped from a file
    expected = execute(tmp_path / "devices", {**changes, "round.mode": "staged"}, shape)
    found = execute(tmp_path / "host", {**changes, "features.placement": "host"}, shape)
    assert found[0] == expected[0]
    for name, matrix in expected[1].items():
        np.testing.assert_array_equal(found[1][name], matrix)


def test_a_run_between_passes_says_so(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, summary = execute(tmp_path, {"selection.pass_every": 2, "selection.in_reach": True})
    first, second = summary["rounds"][1:]
    assert "computed" not in first
    assert 0 < second["computed"] < 40
    assert f"features of {second['computed']} prompts are those of the current adapter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.selection.in_reach"], "config.selection.in_reach: got True, expected False with"),
        (["--config.selection.pass_every=-1"], "config.selection.pass_every: got -1"),
        (
            ["--config.selection.pass_every=2", "--config.candidates.source=policy", "--config.oracle.kind=reward"],
            "config.selection.pass_every: got 2 with candidates.source='policy'",
        ),
        (["--config.selection.pass_every=2", "--config.round.mode=fused"], "got 2 with round.mode='fused'"),
        (["--config.features.placement=host", "--config.round.mode=fused"], "got 'host' with round.mode='fused'"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    argv = ["main", "--config=configs/quickstart.py", f"--workdir={tmp_path}", *changes]
    with pytest.raises(SystemExit):
        flags.read_config(argv, STRATEGIES)
    assert message in capsys.readouterr().err


def test_strategies_that_rank_all_at_once_need_their_features_on_the_devices(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"config\.features\.placement: got 'host' with strategy activedpo_topk"):
        execute(tmp_path, {"features.placement": "host", "strategies": ("activedpo_topk",)})
