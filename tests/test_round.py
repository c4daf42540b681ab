"""A run gives the same picks and the same adapter however it is executed: fused or staged, on one device or eight."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file

from activedpo_jax import layout, runs, start, tasks
from activedpo_jax.config import default
from activedpo_jax.data.groups import Bucket
from activedpo_jax.models.decoder import Decoder, init_params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy
from activedpo_jax.oracles.labels import Pending

BOUND = 1e-5
MESHES = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (2, 1, 4), (1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)]


def options() -> ml_collections.ConfigDict:
    """Two rounds of 6 from 40 pairs; the second has a posterior, and a last batch that is not full."""
    config = default()
    config.data.train = "synthetic"
    config.rounds, config.labels_per_round = 2, 6
    config.synthetic.pool_pairs, config.synthetic.heldout_pairs = 40, 24
    config.synthetic.families, config.synthetic.topics = 8, 6
    config.scratch.hidden_size, config.scratch.intermediate_size = 32, 48
    config.scratch.num_heads, config.scratch.num_kv_heads = 8, 4
    config.lora.rank, config.lora.alpha = 4, 8.0
    config.features.dim, config.features.groups_per_chunk = 128, 16
    # The paper's learning rate.  Adam divides by the gradient's own size, so where a gradient is nearly zero its
    # rounding error, which no two meshes share, becomes some thousandths of a learning rate in the adapter.
    config.dpo.epochs, config.dpo.batch_size, config.dpo.learning_rate = 2, 4, 1e-4
    config.model.remat = "none"
    config.selection.block = 4
    config.evaluation.pairs_per_chunk = 24
    return config


def execute(
    folder: pathlib.Path,
    changes: dict[str, Any],
    shape: tuple[int, int, int] = (1, 1, 1),
    buckets: Any = None,
    first: Callable[[Decoder, Mesh], Lora] | None = None,
) -> tuple[list[str], dict[str, np.ndarray], dict[str, Any]]:
    """Picks in order, the adapter, and the summary of a run on a mesh of that shape."""
    config = options()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
    config.update_from_flattened_dict(changes)
    mesh = layout.make_mesh(config.mesh, jax.devices()[: int(np.prod(shape))])
    task = tasks.load(config, 0, mesh, None)
    if buckets is not None:
        task = dataclasses.replace(task, buckets=buckets)
    params = init_params(task.decoder, jax.random.key(0))
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params)  # out of the linear range
    params = jax.device_put(params, layout.weight_shardings(mesh, params))
    reference = start.initial_lora(config, task.decoder, mesh, 0) if first is None else first(task.decoder, mesh)
    policy = Policy(task.decoder, params, reference)
    judge = runs.evaluator(config, task, policy, 0, folder)
    setting = runs.Setting(config, mesh, 0, task, policy, judge)
    summary = runs.run(setting, config.strategies[0], folder)
    assert not isinstance(summary, Pending)
    picks = []
    for number in range(1, config.rounds + 1):
        lines = (folder / "rounds" / f"{number:03d}" / "selected.jsonl").read_text().splitlines()
        picks += [json.loads(line)["pair_id"] for line in lines]
    return picks, load_file(folder / "adapter" / "adapter_model.safetensors"), dict(summary)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, np.ndarray], dict[str, Any]]:
    compiled: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            out = execute(tmp_path_factory.mktemp("one"), {"round.mode": "fused"})
    finally:
        logger.removeHandler(handler)
    assert sum("Compiling jit(fused_round)" in message for message in compiled) == 1  # one program for both rounds
    return out


def assert_same(got: Any, expected: Any) -> None:
    assert got[0] == expected[0]
    largest = max(np.abs(x).max() for x in expected[1].values())
    difference = max(np.abs(got[1][name] - expected[1][name]).max() for name in expected[1])
    assert difference / largest < BOUND
    assert got[2]["rounds"][-1]["accuracy"] == expected[2]["rounds"][-1]["accuracy"]


def test_learns_and_reports(expected: Any) -> None:
    picks, adapter, summary = expected
    assert len(set(picks)) == 12
    assert any(np.any(x) for name, x in adapter.items() if "lora_B" in name)
    rounds = summary["rounds"]
    assert [r["labels"] for r in rounds] == [0, 6, 12]
    assert rounds[0]["accuracy"] == 0.5  # the adapter is off: no pair has a margin
    assert rounds[1]["loss"] < np.log(2)
    assert rounds[1]["score_max"] >= rounds[1]["score_min"] > 0
    assert rounds[1]["information_gain"] > rounds[2]["information_gain"]


def test_staged_equals_fused(tmp_path: pathlib.Path, expected: Any) -> None:
    assert_same(execute(tmp_path, {"round.mode": "staged"}), expected)


def test_buckets_and_chunks_do_not_matter(tmp_path: pathlib.Path, expected: Any) -> None:
    chunks = {"features.groups_per_chunk": 7, "evaluation.pairs_per_chunk": 5, "dpo.pairs_per_chunk": 3}
    changes = {"round.mode": "staged", **chunks}
    assert_same(execute(tmp_path, changes, buckets=(Bucket(4, 7), Bucket(6, 12))), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_equals_one_device(shape: tuple[int, int, int], tmp_path: pathlib.Path, expected: Any) -> None:
    assert_same(execute(tmp_path, {"round.mode": "fused"}, shape), expected)


@pytest.mark.slow
def test_staged_on_a_mesh_equals_one_device(tmp_path: pathlib.Path, expected: Any) -> None:
    assert_same(execute(tmp_path, {"round.mode": "staged"}, (2, 2, 2)), expected)


def test_microbatches_do_not_matter(tmp_path: pathlib.Path, expected: Any) -> None:
    assert_same(execute(tmp_path, {"round.mode": "fused", "dpo.pairs_per_chunk": 1}), expected)


@pytest.mark.parametrize("strategy", ["activedpo", "random"])
def test_options_agree_between_fused_and_staged(strategy: str, tmp_path: pathlib.Path) -> None:
    changes = {
        "strategies": (strategy,),
        "selection.posterior": "frozen",
        "features.normalisation": "none",
        "dpo.train_on": "newest",
        "dpo.start_from": "current",
        "dpo.label_smoothing": 0.1,
        "dpo.sft_weight": 0.5,
        "dpo.loss": "kto" if strategy == "random" else "sigmoid",
    }
    fused = execute(tmp_path / "fused", {**changes, "round.mode": "fused"})
    changes["dpo.pairs_per_chunk"] = 3
    assert_same(execute(tmp_path / "staged", {**changes, "round.mode": "staged"}), fused)


def test_an_adapter_that_is_trained_already_is_the_reference(tmp_path: pathlib.Path) -> None:
    """π_ref is the adapter that the run starts from: before any training no pair has a margin, and the loss is ln 2."""

    def trained(decoder: Decoder, mesh: Mesh) -> Lora:
        lora = start.initial_lora(options(), decoder, mesh, 7)
        return jax.tree.map(lambda x: jax.device_put(x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape)), lora)

    changes = {"rounds": 1, "dpo.learning_rate": 1e-12, "dpo.weight_decay": 0.0}
    fused = execute(tmp_path / "fused", {**changes, "round.mode": "fused"}, first=trained)
    assert fused[2]["rounds"][0]["accuracy"] == 0.5
    assert abs(fused[2]["rounds"][1]["loss"] - np.log(2)) < 1e-6
    assert_same(execute(tmp_path / "staged", {**changes, "round.mode": "staged"}, first=trained), fused)


def test_too_small_a_pool_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="42 labels, but the pool has 40 pairs"):
        execute(tmp_path, {"rounds": 7})
