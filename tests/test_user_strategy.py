"""A user's own strategy: the README's recipe as it is printed, and names that cannot be used."""

import pathlib
import re
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from activedpo_jax import flags, specs
from activedpo_jax.record.folders import run_folder
from activedpo_jax.selection import strategies
from activedpo_jax.selection.user import user_strategy
from tests.test_round import execute, options
from tests.test_strategies import N, changed, pick, some_evidence

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def rules(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """`my_rules` with both of the README's strategies, importable."""
    blocks = [
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "unsure" in block or "WIDEST" in block
    ]
    assert len(blocks) == 2
    path = tmp_path / "my_rules.py"
    path.write_text(
        "\n\n".join([*blocks, "NUMBER = 3", "def flat(margins): return margins[:2]", "def odd(surprise): ..."])
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    user_strategy.cache_clear()
    yield path
    sys.modules.pop("my_rules", None)


def test_a_function_names_its_evidence_and_scores_rows(rules: pathlib.Path) -> None:
    evidence, available = some_evidence(0), np.arange(N) % 3 != 0
    scores = np.linalg.norm(evidence["features"].astype(float), axis=1) - np.abs(evidence["margins"].astype(float))
    expected = sorted(np.flatnonzero(available), key=lambda row: -scores[row])
    for shape in [(1, 1, 1), (2, 2, 2)]:
        picks = pick("my_rules:unsure_and_long", evidence, available, shape)
        assert picks.rows.tolist() == expected[: len(picks.rows)]
        np.testing.assert_allclose(picks.scores, scores[picks.rows], rtol=1e-5)
    assert strategies.get("my_rules:unsure_and_long").needs == {"features", "margins"}


def test_a_strategy_that_goes_round_the_prompts(rules: pathlib.Path) -> None:
    evidence = some_evidence(1)
    rows = pick("my_rules:WIDEST", evidence, np.ones(N, bool), num_picks=N).rows
    turns = [np.sum(evidence["groups"][rows[:i]] == evidence["groups"][row]) for i, row in enumerate(rows)]
    assert sorted(rows) == list(range(N)) and turns == sorted(turns)
    broken = changed(evidence, features=np.where(np.arange(N)[:, None] == 3, np.nan, evidence["features"]))
    assert (pick("my_rules:WIDEST", broken, np.ones(N, bool)).rows == -1).all()


def test_whole_rounds(rules: pathlib.Path, tmp_path: pathlib.Path) -> None:
    picks, _, summary = execute(tmp_path / "run", {"strategies": ("my_rules:unsure_and_long",), "round.mode": "fused"})
    assert len(set(picks)) == 12 and summary["strategy"] == "my_rules:unsure_and_long"


def test_names_that_cannot_be_used(rules: pathlib.Path) -> None:
    for name, message in [
        ("my_rules:nothing", "cannot be had"),
        ("no_such_module:rule", "cannot be had"),
        ("my_rules:NUMBER", "is a int; expected a `Strategy`"),
    ]:
        with pytest.raises(ValueError, match=f"config.strategies: .*{message}"):
            strategies.get(name)
    with pytest.raises(ValueError, match=r"my_rules:flat returned scores of shape \[2\]; expected \[\d+\]"):
        pick("my_rules:flat", some_evidence(0), np.ones(N, bool))
    config = options()
    config.strategies = ("my_rules:odd",)
    with pytest.raises(ValueError, match="my_rules:odd looks at surprise, which is no evidence; known: .*features"):
        specs.round_spec(config, "my_rules:odd", None, None)  # type: ignore[arg-type]
    flags.validate(config, strategies.STRATEGIES)
    config.strategies = ("activedp",)
    with pytest.raises(flags.UsageError, match="activedpo"):
        flags.validate(config, strategies.STRATEGIES)


def test_the_folder_of_a_run_has_no_colon(tmp_path: pathlib.Path) -> None:
    config = options()
    config.strategies = ("random", "my_rules:odd")
    assert run_folder(tmp_path, config, "my_rules:odd", 2) == tmp_path / "my_rules.odd" / "seed2"
