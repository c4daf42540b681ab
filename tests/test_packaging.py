"""No setting stands twice: a tool that pyproject.toml sets up is not in setup.cfg, nor the other way."""

import configparser
import pathlib
import re
import tomllib

import activedpo_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGING = "setuptools"  # what [project], and setup.cfg's [metadata] and [options], are settings of


def tools_in_pyproject(text: str) -> set[str]:
    document = tomllib.loads(text)
    return {PACKAGING} & {PACKAGING for name in document if name != "tool"} | document.get("tool", {}).keys()


def tools_in_setup_cfg(text: str) -> set[str]:
    parser = configparser.ConfigParser()
    parser.read_string(text)  # itself refuses a section or a setting that is there twice
    # [mypy-module.*] belongs to mypy, [tool:pytest] to pytest, [options.extras_require] to packaging.
    names = {re.split(r"[-.]", section.removeprefix("tool:"))[0] for section in parser.sections()}
    return {PACKAGING if name in ("metadata", "options") else name for name in names}


def test_no_tool_is_set_up_twice() -> None:
    ours = tools_in_pyproject((ROOT / "pyproject.toml").read_text())
    theirs = tools_in_setup_cfg((ROOT / "setup.cfg").read_text())
    assert ours == {PACKAGING, "ruff"} and theirs == {"mypy", "pytest"}
    others = [
        "pytest.ini",
        ".pytest.ini",
        "tox.ini",
        "mypy.ini",
        ".mypy.ini",
        "ruff.toml",
        ".ruff.toml",
        ".flake8",
    ]
    assert [name for name in others if (ROOT / name).exists()] == []


def test_every_way_to_write_a_setting_is_seen() -> None:
    assert tools_in_pyproject("[project]\nname = 'x'\n[tool.pytest.ini_options]\nx = 1") == {
        PACKAGING,
        "pytest",
    }
    cfg = "[metadata]\nname = x\n[options.extras_require]\na = b\n[mypy-jax.*]\nx = 1\n[tool:pytest]\nx = 1"
    assert tools_in_setup_cfg(cfg) == {PACKAGING, "mypy", "pytest"}


def test_version_and_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"] and re.fullmatch(r"\d+\.\d+\.\d+", activedpo_jax.__version__)
    assert project["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]
