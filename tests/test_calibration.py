"""The calibration report: data whose posterior is known exactly, the program's widths, and a whole run."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activedpo_jax import runs
from activedpo_jax.evaluation import calibration
from tests.test_round import execute, options


def linear_data(noise_of_prior: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, truths and widths of 4,000 pairs: w ~ N(0, I/λ), 40 answers φᵀw + N(0, 1)."""
    rng, lam, dim, found = np.random.default_rng(0), 0.5, 16, []
    for _ in range(200):
        w = rng.normal(size=dim) * noise_of_prior / np.sqrt(lam)
        phi, new = rng.normal(size=(40, dim)), rng.normal(size=(20, dim))
        v = lam * np.eye(dim) + phi.T @ phi
        mean = np.linalg.solve(v, phi.T @ (phi @ w + rng.normal(size=40)))
        found.append((new @ mean, new @ w, np.sqrt(np.einsum("nd,nd->n", new, np.linalg.solve(v, new.T).T))))
    return tuple(np.concatenate(x) for x in zip(*found, strict=True))  # type: ignore[return-value]


def test_an_exact_posterior_is_calibrated() -> None:
    means, truths, widths = linear_data()
    report = calibration.calibration(means, truths, widths, 1.0)
    assert report["within"]["1.0"] == pytest.approx(0.683, abs=0.03)
    assert report["within"]["2.0"] == pytest.approx(0.954, abs=0.02)
    assert all(factor == pytest.approx(1, abs=0.08) for factor in report["needed"].values())
    assert report["correlation"] > 0.1 and not report["fitted"]
    half = calibration.calibration(means, truths, widths / 3, 1.0)
    assert all(half["needed"][share] == pytest.approx(3 * factor) for share, factor in report["needed"].items())
    assert "times" in calibration.in_words(report)


def test_the_scale_of_rewards_is_fitted_where_labels_do_not_tell_it() -> None:
    means, truths, widths = linear_data()
    expected = calibration.calibration(means, truths, widths, None)
    report = calibration.calibration(means, truths * 7, widths, None)
    assert report["fitted"] and report["scale"] == pytest.approx(expected["scale"] / 7)
    assert report["needed"] == pytest.approx(expected["needed"])
    residual = means - report["scale"] * 7 * truths
    assert abs(residual @ truths) < 1e-6 * (means @ means)


def test_pairs_without_a_width_do_not_count() -> None:
    means, truths, widths = np.array([1.0, 2.0]), np.array([1.0, 5.0]), np.array([0.5, 0.0])
    assert calibration.calibration(means, truths, widths, 1.0)["pairs"] == 1
    with pytest.raises(ValueError, match="every held-out pair has width 0"):
        calibration.calibration(means, truths, 0 * widths, 1.0)


def test_the_posterior_is_that_of_the_labelled_pairs() -> None:
    known = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    counts = np.arange(6) < 4
    w, lam = calibration.posterior_of(jnp.asarray(known), jnp.asarray(counts), 0.3)
    expected = np.linalg.inv(0.3 * np.eye(5) + known[:4].T.astype(float) @ known[:4])
    np.testing.assert_allclose(np.eye(5) / lam - np.asarray(w).T @ np.asarray(w), expected, atol=1e-5)


@pytest.mark.slow
def test_a_run_reports_on_its_heldout_pairs(tmp_path: pathlib.Path) -> None:
    changes = {"evaluation.calibration": True, "round.mode": "fused", "strategies": ("random",), "rounds": 1}
    execute(tmp_path, changes)
    report = json.loads((tmp_path / "calibration.json").read_text())
    assert report["pairs"] == 24 and report["fitted"] and 0 <= report["within"]["1.0"] <= report["within"]["2.0"] <= 1
    assert report["round"] == 1
    execute(tmp_path, changes | {"rounds": 2})
    later = json.loads((tmp_path / "calibration.json").read_text())
    assert later["round"] == 2 and later["needed"] != report["needed"]


def test_rewards_are_asked_for_before_anything_is_claimed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options()
    config.evaluation.calibration = True
    load = runs.tasks.load

    def without_rewards(*args: object) -> object:
        task = load(*args)  # type: ignore[arg-type]
        return dataclasses.replace(task, heldout=dataclasses.replace(task.heldout, rewards=None))

    monkeypatch.setattr(runs.tasks, "load", without_rewards)
    mesh = runs.heldout.layout.make_mesh(config.mesh, jax.devices()[:1])
    with pytest.raises(ValueError, match="config.evaluation.calibration: held-out pairs have no rewards"):
        runs.begin(config, tmp_path / "run", mesh, "main")
    assert not (tmp_path / "run" / "config.json").exists()
