"""The tables of the benchmarks' README are those that its command makes of the results."""

import pathlib

from benchmarks import tables

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
