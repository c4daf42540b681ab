"""A run compiled for hardware that is not there: which programs, what they need, whether they fit."""

import collections
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.experimental import topologies

from activedpo_jax import compile_only, flags, hlo, layout, tasks
from activedpo_jax.compile_only import chips, cost, inventory, remedies, table, topology
from activedpo_jax.compile_only.program import OF_A_ROUND, Program
from activedpo_jax.compile_only.shapes import device_bytes
from activedpo_jax.evaluation import heldout
from activedpo_jax.rounds import evidence_rows, fresh, pool_pass, staged
from activedpo_jax.selection import host, streamed
from activedpo_jax.selection.strategies import STRATEGIES
from tests import tiny
from tests.test_fresh import ON_POLICY
from tests.test_round import MESHES, execute, options

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
SCALE = ["tldr_gemma_2b", "tldr_llama2_7b", "tldr_llama3_70b", "webgpt_qwen3_4b"]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: '.[tpu]'")


def read(name: str, *more: str) -> ml_collections.ConfigDict:
    """A shipped config, with flags."""
    word = ":cpu" if name == "alpaca_eval_smollm2" else ""
    arguments = ["main", f"--config={ROOT}/configs/{name}.py{word}", "--workdir=unused", *more]
    return flags.parse(arguments, STRATEGIES).config


def topology_of(name: str) -> str:
    """That which the docstring of a config names."""
    found = re.findall(r"--compile_only=(\S+)", (ROOT / "configs" / f"{name}.py").read_text())
    assert len(found) == 1
    return str(found[0])


# Which programs, how often, on what


STAGES = ON_POLICY | {"round.mode": "staged"}
HOST = {"features.placement": "host", "selection.pass_every": 2}


@pytest.mark.parametrize("changes", [STAGES, HOST], ids=["on-policy", "features on the host, one pass"])
def test_programs_run_as_often_as_said_and_on_what_is_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """A staged run on eight devices, its calls counted, and their arguments compared.

    Where the programs are the same text, too, the run finds those that were compiled before in JAX's persistent cache.
    """
    config = options()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.update_from_flattened_dict(changes)
    mesh = layout.make_mesh(config.mesh)
    listed = list(inventory.programs(config, tasks.outline(config, mesh), mesh))
    calls: dict[Any, list[Any]] = collections.defaultdict(list)
    texts: dict[Any, str] = {}

    def watch(module: Any, name: str) -> None:
        program = getattr(module, name)

        def called(*arguments: Any) -> Any:
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments)):
                return program(*arguments)  # only its shapes are asked for
            calls[program].append(_shapes(arguments))
            if program in cached and program not in texts:
                texts[program] = program.lower(*arguments).as_text()
            return program(*arguments)

        monkeypatch.setattr(module, name, called)

    cached = {heldout.score, fresh.chunk_program, fresh.unrolled_program, pool_pass.evidence_program}
    cached |= {staged.vectors_program, staged.measure_program}
    for module, names in (
        (heldout, ["score"]),
        (fresh, ["chunk_program", "unrolled_program"]),
        *(
            (module, [name for name in vars(module) if name.endswith("_program") and name != "no_gradient_program"])
            for module in (staged, pool_pass, evidence_rows, streamed, host)
        ),
    ):
        for name in names:
            watch(module, name)
    execute(tmp_path, changes, (2, 2, 2))

    of_rounds = [program for program in listed if program.stage in OF_A_ROUND]
    assert {program.function for program in of_rounds if program.runs} <= calls.keys()
    assert calls.keys() <= {program.function for program in of_rounds}
    for program in of_rounds:
        if program.function in (streamed.hold_program, streamed.refresh_program):
            continue  # how often depends on the features
        judged_before = program.runs if program.stage == "evaluation" else 0  # the reference, once
        assert len(calls[program.function]) == config.rounds * program.runs + judged_before, program.name
        if program.function in cached:
            assert program.function.lower(*program.arguments).as_text() == texts[program.function], program.name
        said = _shapes(program.arguments)
        for got in calls[program.function]:
            assert got.keys() == said.keys()
            for place, (shape, dtype, sharding) in got.items():
                assert (shape, dtype) == said[place][:2], (program.name, place)
                if sharding is not None and said[place][2] is not None:
                    assert sharding.is_equivalent_to(said[place][2], len(shape)), (program.name, place)


def _shapes(arguments: Any) -> dict[str, tuple[Any, ...]]:
    """Of every array among them; the sharding is None where JAX is free to move the array."""
    found = {}
    for path, x in jax.tree.leaves_with_path(arguments):
        if isinstance(x, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
            bound = isinstance(x, jax.ShapeDtypeStruct) or (isinstance(x, jax.Array) and x.committed)
            found[jax.tree_util.keystr(path)] = (x.shape, x.dtype, x.sharding if bound else None)  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("shape", MESHES)
def test_bytes_of_a_device_are_those_of_its_shards(shape: tuple[int, int, int]) -> None:
    config = options()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
    mesh = layout.make_mesh(config.mesh)
    _, params, lora = tiny.model()
    put = [jax.device_put(tree, layout.weight_shardings(mesh, tree)) for tree in (params, lora)]
    held: dict[Any, int] = collections.defaultdict(int)
    for x in jax.tree.leaves(put):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {int(device_bytes(put))}


# What they need


def test_a_loop_of_unknown_length_counts_as_often_as_it_may_run() -> None:
    def program(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.any(x > 0), lambda x: jnp.tanh(x @ x), x)

    text = jax.jit(program).lower(jnp.ones((16, 16))).compile().as_text()
    assert text is not None
    assert hlo.flops(cost.with_loop_length(text, 0)) == 2 * 16**3
    assert hlo.flops(cost.with_loop_length(text, 7)) == 7 * 2 * 16**3


def test_a_row_adds_up() -> None:
    """The peak of a program is its arguments, what it makes, and what lies there besides."""
    mesh = layout.make_mesh(options().mesh)
    x, other = (jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=layout.rows(mesh)) for _ in range(2))
    program = Program("product", jax.jit(lambda x: x @ x.T), (x,), x, other, "round", runs=2, pairs=80)
    chip = chips.Chip(flops=1e9, memory=1e9, bandwidth=1e12, interconnect=1e12, source="made up")
    target = cost.Target(jax.devices(), chip, 2.0**20)
    row = cost.measure(program, target)
    own = 1024 // 8 * 64 * 4
    assert row.weights == row.pool == own
    assert row.peak >= 2 * own + 1024 * 1024 * 4 / 8  # the product is cut by rows
    assert row.flops == 2 * 1024 * 1024 * 64 / 8
    assert row.collectives.keys() == {"all-gather"} and row.communicated == 1024 * 64 * 4
    assert row.fits and row.bound == "compute" and row.seconds == row.flops / 1e9
    assert cost.pairs_per_second(row, target) == pytest.approx(80 / row.seconds / 8)
    assert cost.chip_seconds([row, row], target) == {"round": pytest.approx(2 * 2 * row.seconds * 8)}
    assert "compute" in table.line(row, target, 20) and "yes" in table.line(row, target, 20)

    small = cost.measure(program, target._replace(limit=row.peak - 1))
    assert small.fits is False and small.peak == row.peak
    tiny_limit = cost.measure(program, target._replace(limit=own))
    assert tiny_limit.fits is False and "not compiled" in tiny_limit.refusal


def test_peak_numbers_are_found_by_the_longest_name() -> None:
    """JAX calls v5e `TPU v5 lite` and v5p `TPU v5`."""
    v5e, v5p = chips.find("TPU v5 lite"), chips.find("TPU v5")
    assert v5e is not None and v5p is not None and (v5e.flops, v5p.flops) == (197e12, 459e12)
    assert chips.find("cpu") is None


def test_what_the_compiler_says_of_memory() -> None:
    used = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 22.10G of"
    assert topology.used_bytes(f"{used} 15.75G hbm. Exceeded hbm capacity by 6.35G.") == 22.1 * 2**30
    assert topology.available_bytes(f"{used} 15.75G hbm. Exceeded hbm capacity by 6.35G.") == 15.75 * 2**30
    alone = "the total memory required for HLO temporaries (4.00T) exceeds available HBM (15.75G)."
    assert topology.available_bytes(alone) == 15.75 * 2**30 and topology.used_bytes(alone) == 4 * 2**40


# Whether they fit, and what to do


def test_options_that_make_programs_fit_are_tried(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options()
    # Most of it are weights, in layers of which one at a time is whole.
    config.scratch.hidden_size, config.scratch.intermediate_size, config.scratch.num_layers = 128, 512, 16
    config.evaluation.pairs_per_chunk = 8
    config.mesh.data, config.mesh.fsdp = 8, 1
    everything = inventory.programs

    def evaluation(*arguments: Any) -> Any:
        return (program for program in everything(*arguments) if program.stage == "evaluation")

    monkeypatch.setattr(compile_only, "programs", evaluation)
    monkeypatch.setattr(remedies, "programs", evaluation)

    def peak(fsdp: int) -> float:
        other = remedies.changed(config, {"mesh.data": 8 // fsdp, "mesh.fsdp": fsdp})
        mesh = layout.make_mesh(other.mesh)
        (program,) = evaluation(other, tasks.outline(other, mesh), mesh)
        return cost.measure(program, cost.Target(jax.devices(), None, None)).peak

    whole, cut = peak(1), peak(8)
    assert cut < whole
    for limit, words in (
        ((whole + cut) / 2, "they do with --config.mesh.data=1 --config.mesh.fsdp=8"),
        (100.0, "nor with any of the options tried"),
    ):
        target = cost.Target(jax.devices(), None, limit)
        monkeypatch.setattr(compile_only, "target_of", lambda text, target=target: target)
        with pytest.raises(SystemExit) as raised:
            compile_only.compile_for(config, "cpu:8", tmp_path)
        printed = capsys.readouterr()
        assert raised.value.code == 1 and words in printed.err and printed.err.count("\n") == 1
    (row,) = json.loads((tmp_path / "compile_only.json").read_text())["programs"]
    assert row["name"] == "evaluation (4, 9)" and not row["fits"]
    assert config.mesh.data == 8  # the config itself stays as it was


def test_weights_that_are_trained_are_not_quantised() -> None:
    config = options()
    config.sft.data, config.sft.weights = "x.jsonl", "full"
    for weights, tried in (("full", False), ("lora", True)):
        config.sft.weights = weights
        assert any("model.quantisation" in c for c in remedies.candidates(config, jax.devices())) == tried


# Topologies


@pytest.mark.parametrize("text", ["v5e:4x4", "v5p:2x2x2", "2*v5e:4x4", "cpu:8", "gpu:1", "tpu7x:2x2x1"])
def test_topologies_on_the_command_line(text: str) -> None:
    command = flags.parse(["main", f"--config={ROOT}/configs/quickstart.py", f"--compile_only={text}"], STRATEGIES)
    slices, platform, shape = topology.parse(command.compile_only)
    assert (f"{slices}*" if slices > 1 else "") + f"{platform}:{shape}" == text
    for wrong in (text.replace(":", ""), f"{text}x", f"*{text}", f"x*{text}", text.upper()):
        with pytest.raises(flags.UsageError, match="expected PLATFORM:TOPOLOGY such as v5e:4x4, several slices"):
            flags.parse(["main", f"--config={ROOT}/configs/quickstart.py", f"--compile_only={wrong}"], STRATEGIES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu:9", "this process has 8 CPU devices; expected 9"),
        ("cpu:2x4", "expected cpu:NUMBER"),
        ("gpu:1", "JAX sees 0 GPUs here, and XLA compiles for attached GPUs alone"),
        ("2*cpu:4", "expected cpu:NUMBER"),
    ],
)
def test_devices_that_are_not_there(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--compile_only={text}")) as raised:
        topology.find_devices(text)
    assert message in str(raised.value)


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: Any) -> Any:
        raise RuntimeError("no plugin\nof this name")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match="v5e:4x4: no plugin of this name; .*pip install 'activedpo_jax"):
        topology.find_devices("v5e:4x4")


@needs_libtpu
@pytest.mark.parametrize(
    ("text", "devices", "count", "gigabytes"),
    [("v5e:4x4", 16, 16, 16), ("v5p:2x2x2", 8, 8, 95), ("2*v5e:2x2", 8, 8, 16), ("v4:2x2x1", 8, 4, 16)],
)
def test_topologies_of_tpus(text: str, devices: int, count: int, gigabytes: float) -> None:
    found = topology.find_devices(text)
    assert (len(found), topology.num_chips(found)) == (devices, count)
    limit = topology.memory_limit(found[0])  # the compiler keeps a little for itself
    assert limit is not None and 0.9 * gigabytes * 2**30 < limit < 1.02 * gigabytes * 2**30


@needs_libtpu
def test_slices_share_examples_alone() -> None:
    found, config = topology.find_devices("2*v5e:2x2"), options()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    grid = layout.make_mesh(config.mesh, found).devices
    assert [{device.slice_index for device in part.flat} for part in grid] == [{0}, {1}]
    config.mesh.data, config.mesh.fsdp = 1, 4
    with pytest.raises(ValueError, match="config.mesh.data=1 on 2 slices: expected a multiple of 2"):
        layout.make_mesh(config.mesh, found)


@needs_libtpu
def test_unknown_topology_is_an_error_in_one_line() -> None:
    command = [sys.executable, "-m", "activedpo_jax.main", "--config", "configs/quickstart.py"]
    done = subprocess.run([*command, "--compile_only=v5e:9x9"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1
    assert "v5e:9x9" in lines[0] and "Traceback" not in done.stderr


# The shipped configs


@pytest.fixture
def stand_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ml_collections.ConfigDict]:
    """A shipped config with a tiny model of its family on eight devices, of which there is a `config.json` alone."""

    def small(name: str) -> ml_collections.ConfigDict:
        monkeypatch.chdir(tmp_path)
        shape = ROOT / "configs" / "shapes" / {"webgpt_qwen3_4b": "qwen3_4b"}.get(name, name.removeprefix("tldr_"))
        family = json.loads((shape / "config.json").read_text()) if shape.exists() else {"model_type": "llama"}
        sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        (tmp_path / "config.json").write_text(json.dumps({**family, **sizes, **heads}))
        more = [] if name == "quickstart" else [f"--config.model.path={tmp_path}", "--config.data.buckets=(16,8)"]
        if name == "sft_smollm2":  # for the command of this name, which needs no pool
            more += ["--config.data.train=rounds.jsonl"]
        config = read(name, *more, "--config.lora.rank=4", "--config.features.dim=64", "--config.strategies=activedpo")
        config.generation.max_new_tokens = min(8, config.generation.max_new_tokens)
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = (2, 2, 2) if config.mesh.tensor > 1 else (1, 8, 1)
        return config

    return small


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_its_programs_without_weights_or_data(
    name: str, stand_in: Callable[[str], ml_collections.ConfigDict]
) -> None:
    config = stand_in(name)
    mesh = layout.make_mesh(config.mesh)
    stages = set()
    for program in inventory.programs(config, tasks.outline(config, mesh), mesh):
        program.function.lower(*program.arguments)
        stages.add(program.stage)
    if name in SCALE:
        assert stages == {"SFT", "evaluation", "generation", "features", "selection", "training"}
    else:
        assert {"evaluation", "round"} <= stages or {"evaluation", "features", "training"} <= stages


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_compiles(name: str, stand_in: Callable[[str], ml_collections.ConfigDict]) -> None:
    rows = compile_only.compile_for(stand_in(name), "cpu:8")
    assert all(row.flops > 0 for row in rows if row.name.startswith(("training gradient", "features (", "features of")))


@needs_libtpu
@pytest.mark.parametrize("name", SCALE)
@pytest.mark.slow
def test_weights_and_pool_of_the_configs_for_scale_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In full size on the topology that the docstring names, from shapes alone; compiling takes minutes."""
    monkeypatch.chdir(ROOT)
    shape = re.search(r"--config.model.path=(configs/shapes/\S+)", (ROOT / "configs" / f"{name}.py").read_text())
    assert shape is not None
    config = read(name, f"--config.model.path={shape[1]}")
    target = compile_only.target_of(topology_of(name))
    mesh = layout.make_mesh(config.mesh, target.devices)
    assert target.limit is not None and target.chip is not None
    names = []
    for program in inventory.programs(config, tasks.outline(config, mesh), mesh):
        names.append(program.name)
        lying = device_bytes((program.weights, program.data))
        assert lying < 0.6 * target.limit, program.name  # the rest is for activations
    assert len(names) >= 10


def test_shapes_are_those_of_the_models() -> None:
    """Their numbers of parameters, as their makers publish them."""
    billions = {"llama2_7b": 6.74, "gemma_2b": 2.51, "qwen3_4b": 4.02, "llama3_70b": 70.55}
    for name, expected in billions.items():
        config = read("tldr_llama2_7b", f"--config.model.path={ROOT}/configs/shapes/{name}")
        config.mesh.fsdp = 8
        task = tasks.outline(config, layout.make_mesh(config.mesh))
        count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(task.params_shape))
        assert round(count / 1e9, 2) == expected, name


@pytest.mark.slow
@needs_libtpu
def test_quickstart_compiles_for_v5e() -> None:
    command = [sys.executable, "-m", "activedpo_jax.main", "--config", "configs/quickstart.py"]
    mesh = ["--config.mesh.data=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    done = subprocess.run(
        [*command, *mesh, "--compile_only=v5e:4x4"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for words in ("base model step", "evaluation (4, 9)", "round, activedpo", "round, random", "all 4 programs fit"):
        assert words in done.stdout
