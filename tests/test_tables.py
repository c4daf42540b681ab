"""The tables of the benchmarks' README are those that its command makes of the results."""

import argparse
import json
import pathlib

from benchmarks import measure, tables

README = pathlib.Path(tables.FOLDER / "README.md").read_text()


def test_the_tables_are_made_from_the_results() -> None:
    assert tables.made(README) == README


def test_a_changed_figure_is_found() -> None:
    """The tables are not only copied."""
    cells = [i for i, line in enumerate(README.splitlines()) if line.startswith("| activedpo_jax |")]
    assert cells
    lines = README.splitlines(keepends=True)
    lines[cells[0]] = lines[cells[0]].replace("| activedpo_jax |", "| activedpo_jax | 9", 1)
    assert tables.made("".join(lines)) == README


def test_every_table_of_times_has_ours_and_somebody_elses() -> None:
    for text in README.split("<!-- times ")[1:]:
        table = text.partition("<!-- end -->")[0]
        assert "× ours" in table and "| 1.00 |" in table


def test_contenders_at_the_same_work_share_a_record(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "found.json"

    def save(rank: int, only: str, seconds: float) -> dict[str, object]:
        args = argparse.Namespace(rank=rank, only=[only], out=out)
        measure.save(out, "x", args, {"results": {only: {"seconds": [seconds]}}})
        results: dict[str, object] = json.loads(out.read_text())["x"]["results"]
        return results

    save(8, "ours", 1.0)
    assert save(8, "hooks", 2.0) == {"ours": {"seconds": [1.0]}, "hooks": {"seconds": [2.0]}}
    assert save(8, "ours", 3.0) == {"ours": {"seconds": [3.0]}}, "measured again"
    assert save(16, "hooks", 4.0) == {"hooks": {"seconds": [4.0]}}, "other work"


def test_a_record_without_contenders_is_replaced(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "found.json"
    for seconds in (1.0, 2.0):
        measure.save(out, "startup", argparse.Namespace(out=out), {"moments": {"first start": [seconds]}})
    assert json.loads(out.read_text())["startup"]["moments"] == {"first start": [2.0]}
