"""`--profile`: traces of one piece of each kind of work."""

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from activedpo_jax import profiling
from activedpo_jax.flags import parse
from benchmarks import profiles


@pytest.fixture(autouse=True)
def nothing_is_traced_afterwards() -> Iterator[None]:
    yield
    profiling.trace_into("")


def traced(folder: pathlib.Path) -> list[str]:
    return sorted({path.relative_to(folder).parts[0] for path in folder.rglob("*.xplane.pb")})


def test_the_second_piece_of_each_kind_is_traced(tmp_path: pathlib.Path) -> None:
    multiply = jax.jit(lambda x: x @ x)
    profiling.trace_into(str(tmp_path))
    for number in range(4):
        out = profiling.piece(f"features of round {number}", lambda: multiply(jnp.eye(256)))
        assert jnp.array_equal(out, jnp.eye(256))
        assert traced(tmp_path) == (["features_of_round"] if number else [])
    for number in range(2):
        profiling.piece(f"DPO_{number}x4", lambda number=number: number)  # type: ignore[misc]
    assert traced(tmp_path) == ["dpo", "features_of_round"]
    found = profiles.kernels(tmp_path / "features_of_round")
    assert found and sum(seconds for seconds, _ in found.values()) > 0
    assert not any(name.startswith(("end:", "Threadpool")) for name in found)


def test_nothing_is_traced_unless_asked_for(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profiling.trace_into("")
    for _ in range(3):
        profiling.piece("DPO", lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_the_flag() -> None:
    command = ["main", "--config=configs/quickstart.py", "--workdir=x"]
    assert parse(command, ["activedpo", "random"]).profile == ""
    assert parse([*command, "--profile=traces"], ["activedpo", "random"]).profile == "traces"


def test_a_folder_without_a_trace_is_said(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match=r"no \*\.xplane\.pb in it"):
        profiles.kernels(tmp_path)
