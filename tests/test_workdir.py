"""The work directory: files whole or as they were, options that may not change, picks that come back."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from activedpo_jax import config, files
from activedpo_jax.record import folders
from activedpo_jax.record.folders import Selected

ROWS = [
    # What JSON lines trip over: line ends in the text, among them U+2028, which splitlines() takes for one.
    Selected("b/7", "two\nlines", 'say "yes"', "sep\u2028arator", 1.5, "second", 1.0, "dataset", 2),
    Selected("a/1", [{"role": "user", "content": "héllo"}], "x", "y", None, "both_bad", 0.5, "dataset, flipped", 2),
]


def test_selected_comes_back_in_pick_order(tmp_path: pathlib.Path) -> None:
    folders.write_selected(tmp_path, 2, ROWS)
    assert folders.read_selected(tmp_path, 2) == ROWS
    lines = (tmp_path / "rounds/002/selected.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["pair_id"] for line in lines[:-1]] == ["b/7", "a/1"] and lines[-1] == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"preference": "chosen"},
            r"selected\.jsonl:2: preference: got 'chosen', expected one of first, second, tie,",
        ),
        ({"pair_id": 3}, r"selected\.jsonl:2: pair_id: got 3, expected a string"),
        ({"score": "high"}, r"selected\.jsonl:2: score: got 'high', expected a number or null"),
        ({"round": 3}, r"selected\.jsonl:2: round: got 3, expected 2"),
        (
            {"extra": 1},
            r"selected\.jsonl:2: got \[.*'extra'.*\], expected an object with the fields pair_id, ",
        ),
    ],
)
def test_damaged_selected_is_refused(tmp_path: pathlib.Path, change: dict[str, Any], message: str) -> None:
    folders.write_selected(tmp_path, 2, ROWS)
    path = folders.selected_path(tmp_path, 2)
    first, second = path.read_text(encoding="utf-8").split("\n")[:2]
    path.write_text(f"{first}\n{json.dumps(json.loads(second) | change)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        folders.read_selected(tmp_path, 2)


def test_kill_while_writing_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "summary.json"
    files.write_json(path, {"rounds": 1})
    script = (
        "import os, pathlib, signal, sys\n"
        "from activedpo_jax import files\n"
        # The last moment before the new file takes the old one's place.
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_json(pathlib.Path(sys.argv[1]), {'rounds': 2})\n"
    )
    root = pathlib.Path(files.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, check=False)
    assert done.returncode == -9
    assert files.read_json(path) == {"rounds": 1}
    files.write_json(path, {"rounds": 3})  # what the killed process left is not in the way
    assert files.read_json(path) == {"rounds": 3}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_plain_takes_what_a_run_holds() -> None:
    given = {
        "loss": jnp.float32(0.5),
        "n": np.int64(3),
        "scores": np.array([1.0, np.inf]),
        4: (True, None, "x"),
    }
    expected = {"loss": 0.5, "n": 3, "scores": [1.0, None], "4": [True, None, "x"]}
    assert files.plain(given) == expected
    assert files.plain(float("nan")) is None
    assert files.plain({"a": config.default()})["a"]["dpo"]["beta"] == 0.1
    with pytest.raises(TypeError, match="type set cannot be written as JSON"):
        files.plain({1})


def test_same_options_go_on_and_others_are_named(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "runs" / "a"
    folders.open_workdir(folder, config.default(), "main")
    written = (folder / "config.json").read_bytes()
    assert json.loads(written)["data"]["buckets"] == [[128, 128], [256, 512]]
    folders.open_workdir(folder, config.default(), "main")

    with pytest.raises(ValueError, match=r'other options: command \(was "main", now "sft"\); .*--workdir'):
        folders.open_workdir(folder, config.default(), "sft")

    other = config.default()
    other.dpo.beta = 0.2
    other.seeds = (0, 1)
    with pytest.raises(ValueError) as raised:
        folders.open_workdir(folder, other, "main")
    message = str(raised.value)
    assert str(folder / "config.json") in message
    assert "dpo.beta (was 0.1, now 0.2)" in message and "seeds (was [0], now [0, 1])" in message
    assert message.count("(was ") == 2 and "--workdir" in message
    assert (folder / "config.json").read_bytes() == written

    old = json.loads(written)
    old["dpo"].pop("epochs")
    old["dpo"]["gone"] = "x"
    files.write_json(folder / "config.json", old)
    with pytest.raises(ValueError, match=r"dpo.epochs \(was absent, now 4\).*dpo.gone \(was \"x\", now absent\)"):
        folders.open_workdir(folder, config.default(), "main")


def test_a_file_that_is_not_json_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text('{\n"rounds": \n}')
    with pytest.raises(ValueError, match=r"config\.json:3: not JSON"):
        folders.open_workdir(tmp_path, config.default(), "main")


def test_run_folders(tmp_path: pathlib.Path) -> None:
    options = config.default()
    assert folders.run_folder(tmp_path, options, "activedpo", 0) == tmp_path
    options.seeds = (0, 7)
    assert folders.run_folder(tmp_path, options, "activedpo", 7) == tmp_path / "activedpo" / "seed7"
