"""The command line: what is typed arrives, and every mistake gets one line that says what to type instead."""

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from activedpo_jax import config, flags
from activedpo_jax.files import flatten

STRATEGIES = ("activedpo", "random")
CONFIG = """\
from activedpo_jax.config import default


def get_config(size="small"):
    config = default()
    config.data.train = "synthetic"
    config.rounds = {"small": 3, "large": 9}[size]
    return config
"""


@pytest.fixture
def parse(tmp_path: pathlib.Path) -> Callable[..., flags.Command]:
    (tmp_path / "x.py").write_text(CONFIG)

    def parse(*arguments: str) -> flags.Command:
        return flags.parse(["main", "--config", str(tmp_path / "x.py"), "--workdir=w", *arguments], STRATEGIES)

    return parse


Parse = Callable[..., flags.Command]


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ((), "rounds", 3),
        (("--config.rounds=7",), "rounds", 7),
        (("--config.rounds", "7"), "rounds", 7),
        (("--config.dpo.learning_rate=1e-3",), "dpo.learning_rate", 1e-3),
        (("--config.dpo.beta=1",), "dpo.beta", 1.0),
        (("--config.lora.rslora",), "lora.rslora", True),
        (("--config.lora.rslora=false",), "lora.rslora", False),
        (("--noconfig.lora.rslora",), "lora.rslora", False),
        (("--config.data.heldout=a,b.jsonl",), "data.heldout", "a,b.jsonl"),
        (("--config.seeds=0,1,2",), "seeds", (0, 1, 2)),
        (("--config.seeds=(0,1,2)",), "seeds", (0, 1, 2)),
        (("--config.seeds=4",), "seeds", (4,)),
        (("--config.seeds=4", "--config.seeds=2"), "seeds", (4, 2)),
        (('--config.strategies=("activedpo","random")',), "strategies", ("activedpo", "random")),
        (("--config.strategies=activedpo,random",), "strategies", ("activedpo", "random")),
        (("--config.strategies=(activedpo, random)",), "strategies", ("activedpo", "random")),
        (("--config.strategies", "random"), "strategies", ("random",)),
        (("--config.data.buckets=(16,32),(64,64)",), "data.buckets", ((16, 32), (64, 64))),
        (("--config.data.buckets=((16,32),(64,64))",), "data.buckets", ((16, 32), (64, 64))),
        (("--config.data.buckets=16,32",), "data.buckets", ((16, 32),)),
        (("--config.mesh.data=2", "--config.mesh.fsdp=-1"), "mesh.fsdp", -1),
    ],
)
def test_what_is_typed_arrives(parse: Parse, arguments: tuple[str, ...], name: str, expected: Any) -> None:
    command = parse(*arguments)
    value = flatten(command.config)[name]
    assert value == expected and type(value) is type(expected)
    assert command.workdir == pathlib.Path("w") and command.compile_only == ""
    with pytest.raises(AttributeError):
        command.config.new = 1  # locked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # names
        (["--config.dpo.betta=1"], "config.dpo.betta: no such option; the nearest is config.dpo.beta"),
        (["--config.modle.path=x"], "config.modle.path: no such option; the nearest is config.model.path"),
        (
            ["--config.learning_rate=1"],
            "config.learning_rate: no such option; the nearest is config.dpo.learning_rate",
        ),
        (["--config.scrach.batch_size=1"], "the nearest is config.scratch.batch_size"),
        (["--config.seed=1"], "config.seed: no such option; the nearest is config.seeds"),
        (["--noconfig.lora.rslor"], "config.lora.rslor: no such option; the nearest is config.lora.rslora"),
        (
            ["--config.mesh=1"],
            "config.mesh: a group of options; set one of mesh.data, mesh.fsdp, mesh.tensor",
        ),
        (
            ["--config.strategies=activdpo"],
            "got 'activdpo', expected one of activedpo, random (the nearest is activedpo)",
        ),
        (["--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir ?"),
        (["stray"], "got 'stray', expected flags alone"),
        # types
        (["--config.rounds=ten"], "config.rounds: got 'ten', expected a whole number"),
        (["--config.rounds=1.5"], "config.rounds: got '1.5', expected a whole number"),
        (["--config.dpo.beta=x"], "config.dpo.beta: got 'x', expected a number"),
        (["--config.dpo.beta=nan"], "config.dpo.beta: got nan, expected a number"),
        (["--config.lora.rslora=maybe"], "config.lora.rslora: got 'maybe', expected true or false"),
        (
            ["--config.seeds=0,x"],
            "config.seeds: got ('0,x',), expected a whole number, or several with commas",
        ),
        (
            ["--config.seeds=0,1.5"],
            "config.seeds: got (0, 1.5), expected a whole number, or several with commas",
        ),
        (
            ["--config.data.buckets=[[1,2]]"],
            "config.data.buckets: got ([1, 2],), expected a tuple such as (128, 128)",
        ),
        (["--config.rounds"], "Missing value for flag --config.rounds"),
        # choices
        (["--config.model.dtype=bf16"], "expected one of auto, float32, bfloat16 (the nearest is bfloat16)"),
        (["--config.model.remat=all"], "config.model.remat: got 'all', expected one of none, dots, full"),
        (["--config.data.template=x"], "config.data.template: got 'x', expected one of auto, chat, plain"),
        (["--config.features.normalisation=pair"], "expected one of response, none"),
        (["--config.selection.posterior=x"], "expected one of refreshed, frozen"),
        (["--config.oracle.noise=flips"], "expected one of none, flip, bradley_terry (the nearest is flip)"),
        (["--config.dpo.schedule=x"], "expected one of linear, cosine, constant"),
        (["--config.dpo.train_on=x"], "expected one of all, newest"),
        (["--config.dpo.start_from=x"], "expected one of sft, current"),
        (["--config.round.mode=x"], "expected one of auto, fused, staged"),
        (
            ["--config.lora.target_modules=q_proj,query"],
            "got ('q_proj', 'query'), expected some of q_proj, k_proj",
        ),
        # ranges
        (["--config.rounds=0"], "config.rounds: got 0, expected a number above 0"),
        (
            ["--config.oracle.noise=flip", "--config.oracle.flip_probability=1.5"],
            "got 1.5, expected a number from 0 to 1",
        ),
        (
            ["--config.data.heldout_fraction=1"],
            "config.data.heldout_fraction: got 1.0, expected a number between",
        ),
        (["--config.dpo.label_smoothing=0.5"], "config.dpo.label_smoothing: got 0.5, expected"),
        (["--config.synthetic.purity=2"], "config.synthetic.purity: got 2.0, expected a number from 0 to 1"),
        (["--config.scratch.steps=-1"], "config.scratch.steps: got -1, expected a number above 0"),
        (["--config.seeds=1,1"], "config.seeds: got (1, 1), expected one number or more, each once"),
        (["--config.strategies="], "config.strategies: got (), expected one name or more"),
        (["--config.data.buckets=(1,2,3),(4,5,6)"], "expected pairs of (prompt, response) tokens"),
        (["--config.data.buckets=(1,0),(4,5)"], "expected pairs of (prompt, response) tokens"),
        (["--config.mesh.fsdp=0"], "config.mesh.fsdp: got 0, expected a number of devices, or -1"),
        (["--config.mesh.fsdp=-1"], "config.mesh: got {'data': -1, 'fsdp': -1, 'tensor': 1}"),
        # options that would be ignored
        (["--config.oracle.flip_probability=0.1"], "with oracle.noise='none', which flips nothing"),
        (["--config.oracle.temperature=2"], "with oracle.noise='none', which has no temperature"),
        (["--config.data.train=pairs.jsonl"], "config.model.path: got '' with data.train='pairs.jsonl'"),
        (["--config.export.merged=true"], "config.export.merged: got True without config.model.path"),
        (
            ["--config.data.train="],
            "config.data.train: got '', expected a file, the name of a data set, or synthetic",
        ),
        (["--compile_only=v5e"], "--compile_only: got 'v5e', expected PLATFORM:TOPOLOGY such as v5e:4x4"),
    ],
)
def test_mistakes_get_one_line(parse: Parse, arguments: list[str], message: str) -> None:
    with pytest.raises(flags.UsageError) as raised:
        parse(*arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_compiling_needs_no_workdir(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.py").write_text(CONFIG)
    command = flags.parse(["main", f"--config={tmp_path / 'x.py'}:large", "--compile_only=v5e:4x4"], STRATEGIES)
    assert (command.workdir, command.compile_only, command.config.rounds) == (None, "v5e:4x4", 9)
    with pytest.raises(flags.UsageError, match="--workdir is missing"):
        flags.parse(["main", f"--config={tmp_path / 'x.py'}"], STRATEGIES)
    for arguments in (["main"], ["main", "--config"]):
        with pytest.raises(flags.UsageError, match="--config is missing"):
            flags.parse(arguments, STRATEGIES)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "config.rounds = {",
            "config.dpo.betta = {",
            "config.dpo.betta: no such option; the nearest is config.dpo.beta",
        ),
        ("config.rounds = {", "config.dop.beta = {", "x.py:7: AttributeError: "),
        (
            "config.rounds = {",
            "config.runds = {",
            "config.runds: no such option; the nearest is config.rounds",
        ),
        ('= "synthetic"', "= 3", "x.py:6: TypeError: "),
        ("[size]", '["huge"]', "x.py:7: KeyError: 'huge'"),
        ("return config", "return", "get_config() returned NoneType, expected config.default(), changed"),
        ("return config", "retrun config", "x.py:8: not Python: invalid syntax"),
        ("def get_config", "def config", "x.py: has no get_config()"),
        ("= default()", '= default(); del config.dpo["beta"]', "config.dpo.beta: missing"),
        (
            "= default()",
            "= default(); config.rounds = True",
            "config.rounds: got True, expected a whole number",
        ),
    ],
)
def test_mistakes_in_the_config_file_are_named(tmp_path: pathlib.Path, old: str, new: str, message: str) -> None:
    assert CONFIG.count(old) == 1
    if "True" in new:  # the file's own later line would put it right
        (tmp_path / "x.py").write_text(CONFIG.replace(old, new).replace('    config.rounds = {"small"', "    {'small'"))
    else:
        (tmp_path / "x.py").write_text(CONFIG.replace(old, new))
    with pytest.raises(flags.UsageError) as raised:
        flags.parse(["main", "--config", str(tmp_path / "x.py"), "--workdir", "w"], STRATEGIES)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_missing_config_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(flags.UsageError, match="nowhere.py: No such file or directory"):
        flags.parse(["main", "--config", str(tmp_path / "nowhere.py"), "--workdir", "w"], STRATEGIES)


def test_a_process_prints_the_line_and_exits_with_2(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.py").write_text(CONFIG)
    script = "import sys; from activedpo_jax.flags import read_config; read_config(sys.argv, ('activedpo',))"
    command = [sys.executable, "-c", script, "--config", str(tmp_path / "x.py"), "--config.dpo.betta=1"]
    root = pathlib.Path(flags.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: config.dpo.betta: no such option; the nearest is config.dpo.beta\n"


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        flags.read_config(["main", "--help"], STRATEGIES)
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert "--config FILE --workdir DIR" in shown
    for name in flatten(config.default()):
        assert f"config.{name} = " in shown


def test_rules_and_defaults_agree() -> None:
    """Every rule is of an option, and holds for its default; `data.train` alone has none."""
    assert flags._RULES.keys() | flags._CHOICES.keys() <= flatten(config.default()).keys()
    options = config.default()
    options.data.train = "synthetic"
    flags.validate(options, STRATEGIES)
