"""The replay benchmark: its learner, that it repeats bit by bit, and that its selection is a run's."""

import json
import pathlib
import re
import sys
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from activedpo_jax.selection import host, strategies
from activedpo_jax.selection.user import user_strategy
from benchmarks import replay, tables
from tests.test_selection import mesh_of

M, D = 3, 24


def pool(seed: int = 0, prompts: int = 20) -> replay.Pool:
    """Random responses, whose reward is linear in ĝ."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(prompts, M, D)).astype(np.float32)
    gradients /= np.linalg.norm(gradients, axis=-1, keepdims=True)
    pairs = np.array([(g, i, j) for g in range(prompts) for i in range(M) for j in range(i + 1, M)], np.int32)
    truth, prompt, first, second = rng.normal(size=D), *pairs.T
    rewards = gradients @ truth
    heldout = rng.normal(size=(200, D)).astype(np.float32)
    return replay.Pool(
        gradients,
        rng.normal(size=(prompts, M, 8)).astype(np.float32),
        rng.random(prompts).astype(np.float32),
        pairs,
        rewards[prompt, second] > rewards[prompt, first],
        heldout * np.sign(heldout @ truth)[:, None].astype(np.float32),
    )


@pytest.mark.parametrize(("count", "precision"), [(0, 0.1), (1, 0.1), (12, 1e-3), (60, 0.5)])
def test_the_model_is_the_largest_posterior(count: int, precision: float) -> None:
    phi = np.random.default_rng(count).normal(size=(count, D))

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        scores = phi @ w
        slope = precision * w - phi.T @ (1 / (1 + np.exp(scores)))
        return float(np.logaddexp(0, -scores).sum() + precision * w @ w / 2), slope

    found = optimize.minimize(objective, np.zeros(D), jac=True, method="L-BFGS-B", tol=1e-14)
    np.testing.assert_allclose(replay.fitted(phi, precision), found.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["random", "activedpo", "deltaucb", "badge"])
def test_the_same_picks_each_time_and_no_pair_twice(strategy: str) -> None:
    first, second = (replay.replay(pool(), strategy, 3, 3, 5) for _ in range(2))
    assert first == second and len(set(first.rows)) == 15 and first.accuracy[0] == 0.5
    assert first.accuracy[-1] > 0.6
    assert replay.replay(pool(), strategy, 4, 3, 5).rows != first.rows or strategy in ("activedpo", "deltaucb")


def test_a_first_round_picks_as_outside_of_the_benchmark() -> None:
    frozen = pool()
    prompt, i, j = frozen.pairs.T
    features = frozen.gradients[prompt, i] - frozen.gradients[prompt, j]
    query = host.Query(strategies.get("activedpo"), 5, replay.LAM, 1024, 0)
    expected = host.choose(query, {"features": features}, np.ones(len(features), bool), None, mesh_of((1, 1, 1)))
    assert replay.replay(frozen, "activedpo", 0, 1, 5).rows == expected.rows.tolist()


def test_margins_are_those_of_the_model() -> None:
    """`margin` has none in its first round, and then takes the pairs that the model is least sure of."""
    frozen = pool(1)
    found = replay.replay(frozen, "margin", 0, 2, 5)
    assert found.fallbacks == 1
    prompt, i, j = frozen.pairs.T
    phi = frozen.gradients[prompt, i] - frozen.gradients[prompt, j]
    known = found.rows[:5]
    w = replay.fitted(np.where(frozen.second[known, None], -phi[known], phi[known]), replay.LAM)
    sizes = np.abs(phi @ w)
    left = [row for row in np.argsort(sizes) if row not in known]
    assert sorted(found.rows[5:]) == sorted(left[:5])


def test_a_strategy_of_ones_own(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outsider.py").write_text("def longest(features):\n    return (features**2).sum(axis=1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    user_strategy.cache_clear()
    own, ours = (replay.replay(pool(), name, 0, 2, 5) for name in ("outsider:longest", "activedpo_norm"))
    assert own == ours
    sys.modules.pop("outsider", None)


@pytest.mark.slow
def test_pools_are_made_once(tmp_path: pathlib.Path) -> None:
    sizes = replay.parser().parse_args(["--prompts", "30", "--dim", "64"])
    made = replay.load_pool(tmp_path, "balanced", 0, sizes)
    assert made.gradients.shape == (30, 3, 64) and made.pairs.shape == (90, 3) and made.heldout.shape == (512, 64)
    np.testing.assert_allclose(np.linalg.norm(made.gradients, axis=-1), 1, rtol=1e-5)
    [path] = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    again = replay.load_pool(tmp_path, "balanced", 0, sizes)
    assert path.stat().st_mtime_ns == stamp
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))


def test_the_table_has_paired_differences_and_holms_p() -> None:
    rng, noise = np.random.default_rng(0), np.random.default_rng(1).normal(size=10)
    areas = {
        "random": 0.6 + 0.1 * noise,
        "better": 0.65 + 0.1 * noise + 0.01 * rng.normal(size=10),
        "same": 0.6 + 0.1 * noise,
    }
    areas["same"] = areas["same"] + 0.02 * rng.normal(size=10)
    record = {"pools": {"heavy_tail": {name: {"area": a.tolist()} for name, a in areas.items()}}}
    rows = re.findall(r"\| `(\w+)` \| ([\d.]+) \| (.*?) \| (.*?) \|", tables.replay(record))
    assert [row[0] for row in rows][0] == "better" and {row[0] for row in rows} == set(areas)
    by_name = {name: (interval, p) for name, _, interval, p in rows}
    low, high = map(float, by_name["better"][0].split(" to "))
    assert 0 < low < 0.05 < high and float(by_name["better"][1]) < 1e-3 < 0.05 < float(by_name["same"][1])
    assert by_name["random"] == ("", "")


def test_a_strategy_becomes_a_row_of_the_table_that_is_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(replay, "load_pool", lambda folder, kind, seed, sizes: pool(seed))
    sizes = ["--seeds", "3", "--rounds", "2", "--picks", "5", "--kinds", "balanced", "--out", str(out)]

    def rows(*options: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["replay", *sizes, *options])
        replay.main()
        found: dict[str, Any] = json.loads(out.read_text())["replay"]["pools"]["balanced"]
        return found

    first = rows("--strategies", "random", "margin")
    both = rows("--strategies", "activedpo")
    assert list(both) == ["random", "margin", "activedpo"] and {n: both[n] for n in first} == first
    assert "| `activedpo` |" in capsys.readouterr().out
    assert list(rows("--strategies", "kcenter", "--picks", "6")) == ["kcenter"]  # another table
