"""The command line: what is typed arrives, and every mistake gets one line that says what to type instead."""

import dataclasses
import fnmatch
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from activedpo_jax import config, flags, layout
from activedpo_jax.config import OPTIONS
from activedpo_jax.files import flatten
from activedpo_jax.models.config import LINEAR_MAPS, LoraConfig
from activedpo_jax.models.lora import linear_shapes
from tests import tiny

STRATEGIES = ("activedpo", "random")
POLICY = ("--config.candidates.source=policy", "--config.generation.max_new_tokens=9")
JUDGE = ("--config.oracle.kind=judge", "--config.oracle.url=http://h/v1", "--config.oracle.model=m")
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
        (["--config.candidates.source=x"], "expected one of pool, policy, mixture"),
        (["--config.oracle.kind=human"], "expected one of dataset, function, reward, people"),
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
        (["--config.evaluation.on_policy_prompts=9"], "config.evaluation.reward: got '', expected module:function"),
        (["--config.evaluation.reward=a:b"], "config.evaluation.reward: got 'a:b', expected '' with"),
        (
            [
                *("--config.oracle.kind=function", "--config.oracle.function=a:b"),
                *("--config.evaluation.on_policy_prompts=9", "--config.evaluation.reward=a:b"),
            ],
            "config.evaluation.reward: got 'a:b', expected another function than oracle.function: the reward that",
        ),
        (["--config.dpo.loss=kto", "--config.dpo.batch_size=1"], "config.dpo.batch_size: got 1, expected more with"),
        (["--config.synthetic.purity=2"], "config.synthetic.purity: got 2.0, expected a number from 0 to 1"),
        (["--config.scratch.steps=-1"], "config.scratch.steps: got -1, expected a number above 0"),
        (["--config.seeds=1,1"], "config.seeds: got (1, 1), expected one number or more, each once"),
        (["--config.strategies="], "config.strategies: got (), expected one name or more"),
        (["--config.data.buckets=(1,2,3),(4,5,6)"], "expected pairs of (prompt, response) tokens"),
        (["--config.data.buckets=(1,0),(4,5)"], "expected pairs of (prompt, response) tokens"),
        (["--config.mesh.fsdp=0"], "config.mesh.fsdp: got 0, expected a number of devices, or -1"),
        (["--config.mesh.fsdp=-1"], "config.mesh: got {'data': -1, 'fsdp': -1, 'tensor': 1}"),
        (["--config.rounds=2147483648"], "config.rounds: got 2147483648, expected a number below 2,147,483,648"),
        (["--config.dpo.learning_rate=1e39"], "config.dpo.learning_rate: got 1e+39, expected a number from 1e-38 to"),
        (["--config.selection.lam=1e-40"], "config.selection.lam: got 1e-40, expected a number from 1e-38 to 3e+38"),
        (["--config.seeds=4294967296"], "config.seeds: got (4294967296,), expected one number or more"),
        (["--config.lora.rank=65536"], "config.lora.rank: got 65536, expected a number from 1 to 65,535"),
        (["--config.features.dim=2147483647"], "config.features.dim: got 2147483647, expected a number from 1 to"),
        (["--config.dpo.batch_size=1048577"], "config.dpo.batch_size: got 1048577, expected a number from 1 to"),
        (["--config.data.buckets=(1,2097152),"], "expected pairs of (prompt, response) tokens"),
        (["--config.generation.responses=1"], "config.generation.responses: got 1, expected a number from 2 to"),
        (["--config.candidates.prompts_per_round=-1"], "got -1, expected 0 or more"),
        (["--config.selection.entropy_samples=0"], "got 0, expected a number from 1 to 1,024"),
        (["--config.oracle.annotators=0"], "config.oracle.annotators: got 0, expected a number above 0"),
        (["--config.rounds=100000", "--config.labels_per_round=100000"], "expected a product below 2,147,483,648"),
        (
            ["--config.rounds=103", "--config.labels_per_round=10"],
            "config.rounds: got 103 with labels_per_round=10, expected at most synthetic.pool_pairs=1024 labels",
        ),
        (
            ["--config.features.groups_per_chunk=1000000"],
            "config.features.groups_per_chunk: got 1000000, expected less: an array would have 8,192,000,000 numbers",
        ),
        (
            ["--config.generation.prompts_per_chunk=10000", "--config.generation.max_new_tokens=100000"],
            "config.generation.prompts_per_chunk: got 10000, expected less: an array would have 3,000,000,000",
        ),
        # the synthetic task
        (["--config.synthetic.styles=1"], "config.synthetic.styles: got 1, expected a number from 2 to 26"),
        (
            ["--config.synthetic.topics_per_family=13"],
            "config.synthetic.topics_per_family: got 13, expected at most synthetic.topics=12",
        ),
        (
            ["--config.synthetic.min_response=9"],
            "config.synthetic.min_response: got 9, expected at most synthetic.max_response=8",
        ),
        (
            ["--config.synthetic.styles=20", "--config.synthetic.purity=0.01"],
            "config.synthetic.purity: got 0.01, expected more: with synthetic.styles=20",
        ),
        (
            ["--config.scratch.hidden_size=66"],
            "config.scratch.hidden_size: got 66, expected a multiple of scratch.num_heads=4",
        ),
        (["--config.scratch.hidden_size=68"], "rotate pairs of channels; 17 is odd"),
        (
            ["--config.scratch.num_kv_heads=3"],
            "config.scratch.num_heads: got 4, expected a multiple of scratch.num_kv_heads=3",
        ),
        (
            [*POLICY, "--config.oracle.kind=reward", "--config.generation.max_new_tokens=10"],
            "config.generation.max_new_tokens: got 10, expected at most 9 with candidates.source='policy'",
        ),
        (
            ["--config.candidates.source=mixture", "--config.oracle.kind=people", "--config.synthetic.max_response=6"],
            "config.generation.max_new_tokens: got 128, expected at most 7 with candidates.source='mixture'",
        ),
        # options that would be ignored, or need others
        (
            ["--config.oracle.function=a:b"],
            "config.oracle.function: got 'a:b' with oracle.kind='dataset', which asks no function",
        ),
        (["--config.oracle.kind=people", "--config.oracle.function=a:b"], "with oracle.kind='people', which asks no"),
        (
            ["--config.oracle.kind=function"],
            "config.oracle.function: got '', expected module:function, such as my.rewards:helpful",
        ),
        (["--config.oracle.kind=function", "--config.oracle.function=a.b"], "got 'a.b', expected module:function"),
        (["--config.oracle.kind=reward", "--config.oracle.function=a:"], "got 'a:', expected module:function"),
        (
            ["--config.oracle.kind=reward", "--config.data.train=x.jsonl", "--config.model.path=m"],
            "config.oracle.function: got '' with oracle.kind='reward', expected module:function; only "
            "data.train='synthetic'",
        ),
        (["--config.oracle.annotators=2"], "config.oracle.annotators: got 2 with oracle.kind='dataset'"),
        (
            ["--config.oracle.kind=people", "--config.oracle.noise=bradley_terry"],
            "config.oracle.noise: got 'bradley_terry' with oracle.kind='people', which has no rewards to draw from",
        ),
        (
            ["--config.oracle.kind=reward", "--config.oracle.noise=flip", "--config.round.mode=fused"],
            "got 'fused' with oracle.kind='reward' and oracle.noise='flip', whose answers come from outside",
        ),
        (
            ["--config.oracle.kind=judge"],
            "config.oracle.url: got '', expected where the judge's /chat/completions is",
        ),
        ([*JUDGE[:2]], "config.oracle.model: got '', expected the name by which http://h/v1 knows it"),
        ([*JUDGE, "--config.oracle.url=h/v1"], "config.oracle.url: got 'h/v1', expected http://HOST:PORT/PATH"),
        (
            [*JUDGE, "--config.oracle.noise=bradley_terry"],
            "got 'bradley_terry' with oracle.kind='judge', which has no rewards to draw from",
        ),
        (
            [*JUDGE, "--config.oracle.api_key_variable=sk-123"],
            "config.oracle.api_key_variable: expected the name of an environment variable, such as OPENAI_API_KEY",
        ),
        ([*JUDGE, "--config.oracle.device=cuda"], "config.oracle.device: got 'cuda' with oracle.kind='judge'"),
        ([*JUDGE, "--config.round.mode=fused"], "config.round.mode: got 'fused' with oracle.kind='judge'"),
        (["--config.oracle.model=m"], "config.oracle.model: got 'm' with oracle.kind='dataset', which does not look"),
        (
            ["--config.oracle.kind=reward_model"],
            "config.oracle.path: got '' with oracle.url='' and oracle.kind='reward_model'; expected one of them",
        ),
        (
            ["--config.oracle.kind=reward_model", "--config.oracle.url=http://h/v1", "--config.oracle.model=m"],
            "config.oracle.url: got 'http://h/v1', expected vLLM's /classify or /pooling",
        ),
        (
            ["--config.oracle.kind=reward_model", "--config.oracle.path=m", "--config.oracle.attempts=2"],
            "config.oracle.attempts: got 2 with oracle.kind='reward_model', which does not look at it; expected 6, or "
            "oracle.kind=judge or reward_model with oracle.url",
        ),
        (
            ["--config.candidates.source=mixture"],
            "config.candidates.source: got 'mixture' with oracle.kind='dataset', which has no labels of fresh",
        ),
        (
            ["--config.candidates.prompts_per_round=5"],
            "config.candidates.prompts_per_round: got 5 with candidates.source='pool', which takes all pairs",
        ),
        (
            ["--config.oracle.kind=people", "--config.round.mode=fused"],
            "config.round.mode: got 'fused' with oracle.kind='people', whose answers come from outside the program",
        ),
        (
            [*POLICY, "--config.oracle.kind=function", "--config.oracle.function=a:b", "--config.round.mode=fused"],
            "config.round.mode: got 'fused' with oracle.kind='function'",
        ),
        (
            [*POLICY, "--config.oracle.kind=reward", "--config.candidates.prompts_per_round=16"],
            "config.labels_per_round: got 50, expected at most 48: the pairs among generation.responses=3 responses "
            "to 16 prompts",
        ),
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


@pytest.mark.parametrize(
    "arguments",
    [
        (*POLICY, "--config.oracle.kind=reward", "--config.round.mode=fused"),
        (
            *POLICY,
            "--config.oracle.kind=reward",
            "--config.oracle.noise=bradley_terry",
            "--config.oracle.temperature=2",
        ),
        ("--config.oracle.kind=people", "--config.oracle.noise=flip", "--config.oracle.flip_probability=0.1"),
        (*JUDGE, "--config.oracle.prompt_price=0.15", "--config.oracle.concurrency=2", "--config.oracle.noise=flip"),
        ("--config.oracle.kind=reward_model", "--config.oracle.path=m", "--config.oracle.device=cuda"),
        (*POLICY, "--config.oracle.kind=reward", "--config.candidates.prompts_per_round=17"),
        (*POLICY, "--config.candidates.source=mixture", "--config.oracle.kind=people", "--config.oracle.annotators=3"),
        ("--config.oracle.kind=function", "--config.oracle.function=a.b_c:d", "--config.oracle.noise=bradley_terry"),
        ("--config.oracle.kind=reward", "--config.oracle.function=a:b", "--config.rounds=20"),
        ("--config.synthetic.topics_per_family=12", "--config.synthetic.min_response=8"),
        ("--config.lora.rank=65535", "--config.seeds=4294967295", "--config.dpo.learning_rate=1e-30"),
    ],
)
def test_what_goes_together_passes(parse: Parse, arguments: tuple[str, ...]) -> None:
    parse(*arguments)


def test_each_command_says_what_it_lacks(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.py").write_text(CONFIG.replace('"synthetic"', '""'))
    arguments = [
        "--config",
        str(tmp_path / "x.py"),
        "--workdir=w",
        "--config.model.path=m",
        "--config.sft.data=x.jsonl",
    ]
    flags.parse(["/somewhere/activedpo_jax/sft.py", *arguments], STRATEGIES)
    with pytest.raises(flags.UsageError, match="config.data.train: got ''"):
        flags.parse(["/somewhere/activedpo_jax/main.py", *arguments], STRATEGIES)


# The table of options


def test_defaults_are_what_they_may_be() -> None:
    """`data.train` alone has no default that a run could have."""
    options = config.default()
    options.data.train = "synthetic"
    flags.validate(options, STRATEGIES)
    assert flatten(config.default()) == {name: option.default for name, option in OPTIONS.items()}


@pytest.mark.parametrize(("name", "option"), [(n, o) for n, o in OPTIONS.items() if type(o.default) in (int, float)])
def test_every_number_has_limits(name: str, option: config.Option) -> None:
    options = config.default()
    options.data.train = "synthetic"
    for value in (-2, 2**31) if isinstance(option.default, int) else (-1e-3, 1e39):
        options.update_from_flattened_dict({name: value})
        with pytest.raises(flags.UsageError, match=rf"^config\.{name}: got {value}, expected ".replace("+", r"\+")):
            flags.validate(options, STRATEGIES)


def test_linear_maps_are_the_same_everywhere() -> None:
    assert OPTIONS["lora.target_modules"].default == LoraConfig().target_modules == tuple(linear_shapes(tiny.MODEL))
    model = dataclasses.replace(tiny.MODEL, hidden_size=3, intermediate_size=5, num_heads=4, num_kv_heads=2, head_dim=6)
    assert linear_shapes(model) == {
        "q_proj": (3, 24),
        "k_proj": (3, 12),
        "v_proj": (3, 12),
        "o_proj": (24, 3),
        "gate_proj": (3, 5),
        "up_proj": (3, 5),
        "down_proj": (5, 3),
    }
    kernels = {m: {"kernel": jax.ShapeDtypeStruct((2, 8, 8), np.float32)} for m in LINEAR_MAPS}
    mesh = layout.make_mesh(config.default().mesh)
    cut = layout.weight_shardings(mesh, {"layers": kernels})["layers"]
    assert all(len([axis for axis in cut[m]["kernel"].spec if axis]) == 2 for m in LINEAR_MAPS)


@pytest.mark.parametrize("command", flags.COMMANDS)
def test_help_is_a_table_of_the_options_of_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        flags.read_config([f"activedpo_jax/{command}.py", "--help"], STRATEGIES)
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m activedpo_jax.{command} --config FILE --workdir DIR" in shown
    assert ("--compile_only=PLATFORM:TOPOLOGY" in shown) == (command == "main")
    rows = {line.split()[0]: line for line in shown.splitlines() if line.split() and line.split()[0] in OPTIONS}
    used = {n for n in OPTIONS if any(fnmatch.fnmatchcase(n, p) for p in flags.COMMANDS[command].options)}
    assert rows.keys() == used
    for name, line in rows.items():
        option = OPTIONS[name]
        assert option.comment and line.endswith(option.comment)
        assert all(choice in line for choice in option.names) and option.rule.words in line
    assert rows["seeds"].split()[1:4] == ["whole", "numbers", "0"]
    assert rows["data.buckets"].split()[1:3] == ["pairs", "(128,128),(256,512)"]
    assert rows["lora.path"].split()[1:3] == ["text", "''"] and rows["lora.rslora"].split()[4] == "false"


def test_every_option_is_used_by_a_command() -> None:
    patterns = [pattern for usage in flags.COMMANDS.values() for pattern in usage.options]
    assert [name for name in OPTIONS if not any(fnmatch.fnmatchcase(name, p) for p in patterns)] == []
    assert [pattern for pattern in patterns if not fnmatch.filter(OPTIONS, pattern)] == []
    assert "dpo.beta" not in flags.help_text("sft") and "sft.data" not in flags.help_text("generate")
