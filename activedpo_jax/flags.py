"""The command line: a config file, single options changed on top of it, and errors that say what to type.

    --config configs/x.py --workdir DIR [--config.dpo.beta=0.2 --config.seeds=0,1,2] [--compile_only=v5e:4x4]
    [--program_cache=DIR] [--profile=DIR] [--coordinator=HOST:PORT --num_processes=N --process_id=I]

A config file has `get_config()`, which starts from `config.default()` and changes some of its options.
"""

import atexit
import difflib
import fnmatch
import math
import pathlib
import re
import sys
import traceback
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import flags as absl_flags
from ml_collections import config_flags

from activedpo_jax import errors, files, option_checks, profiling, programs
from activedpo_jax.cluster import FLAGS, Address
from activedpo_jax.config import OPTIONS
from activedpo_jax.errors import UsageError
from activedpo_jax.option_checks import wrong

TOPOLOGY = r"(\d+\*)?[a-z]\w*:\d+(x\d+)*"  # of --compile_only: slices, platform, shape in chips


class Usage(NamedTuple):
    """What `--help` says of a command."""

    about: str
    options: tuple[str, ...]  # that it looks at: names, or patterns of `fnmatch`


_MODEL_AND_TEXTS = ("model.*", "lora.*", "data.template", "data.template_kwargs", "data.buckets")
_SAMPLING = tuple(f"generation.{name}" for name in ("responses", "temperature", "top_k", "top_p", "max_new_tokens"))

_ROUNDS = (
    *("strategies", "seeds", "rounds", "labels_per_round", "checkpoint_minutes", "model.*", "lora.*", "data.*"),
    *("synthetic.*", "scratch.*", "sft.*", "features.*", "selection.*", "candidates.*", "oracle.*", "dpo.*", "round.*"),
    *("evaluation.*", "export.*", *_SAMPLING, "mesh.*"),
)

# By the name of their module.
COMMANDS: dict[str, Usage] = {
    "main": Usage("rounds of picking, labelling and training, and their evaluation", _ROUNDS),
    "compare": Usage("strategies against a baseline, over paired seeds, and a report", (*_ROUNDS, "compare.*")),
    "sft": Usage("supervised fine-tuning alone", ("seeds", "checkpoint_minutes", *_MODEL_AND_TEXTS, "sft.*", "mesh.*")),
    "generate": Usage(
        "responses to the prompts of a file",
        (
            *("seeds", "model.path", "model.revision", "model.dtype", "model.quantisation", "model.attention"),
            *(*_MODEL_AND_TEXTS[1:], "generation.*", "mesh.*"),
        ),
    ),
    "select": Usage(
        "which pairs to label, for those who train elsewhere",
        (
            *("strategies", "seeds", "select.*", *_MODEL_AND_TEXTS),
            *("data.train", "data.train_split", "data.train_limit"),
            *(f"features.{name}" for name in ("dim", "dtype", "normalisation", "groups_per_chunk")),
            *("selection.lam", "selection.block", "selection.entropy_samples"),
            *("generation.max_new_tokens", "mesh.*"),
        ),
    ),
}


class Command(NamedTuple):
    config: ml_collections.ConfigDict  # locked, and valid
    workdir: pathlib.Path | None  # None only with `compile_only`
    compile_only: str  # empty, or the topology to compile the programs of the run for, and stop
    program_cache: str  # where compiled programs are kept; empty: nowhere
    profile: str  # where traces go; empty: nowhere
    address: Address = Address()  # of the other processes of the run


def read_config(argv: Sequence[str], strategies: Collection[str]) -> Command:
    """Reads `sys.argv`, and has programs compiled faster and kept where it says.

    On a mistake it prints one line that says what was expected, and exits with code 2.

    Args:
      argv: the program's name, which tells the command, then its arguments.
      strategies: the names that `config.strategies` may hold.
    """
    atexit.register(errors.flush)
    if {"-h", "--help"} & set(argv[1:]):
        with errors.clean_errors():
            print(help_text(_command(argv)))
        sys.exit(0)
    try:
        command = parse(argv, strategies)
    except UsageError as error:
        errors.fail(error)
    programs.compile_faster()
    programs.keep(command.program_cache)
    profiling.trace_into(command.profile)
    return command


class PlainRun(NamedTuple):
    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    address: Address


def read_plain_run(argv: Sequence[str], strategies: Collection[str]) -> PlainRun:
    """As `read_config`, for commands that only run."""
    command = read_config(argv, strategies)
    if command.compile_only:
        errors.fail("--compile_only is an option of activedpo_jax.main; leave it out")
    if command.address.coordinator is not None and _command(argv) != "sft":
        errors.fail("--coordinator is an option of activedpo_jax.main and sft; leave it out")
    assert command.workdir is not None
    return PlainRun(command.config, command.workdir, command.address)


def _command(argv: Sequence[str]) -> str:
    """The module that runs: `python -m` puts its file into `sys.argv[0]`."""
    name = pathlib.Path(argv[0]).stem
    return name if name in COMMANDS else "main"


def help_text(command: str) -> str:
    """How a command is called, and a table of the options that it looks at."""
    lines = [
        f"{COMMANDS[command].about}:",
        f"python -m activedpo_jax.{command} --config FILE --workdir DIR [--config.OPTION=VALUE ...]",
    ]
    if command == "main":
        compiling = "python -m activedpo_jax.main --config FILE --compile_only=PLATFORM:TOPOLOGY"
        lines.append(f"{compiling}    what the run would need there (v5e:4x4, 2*v5e:4x4, cpu:8)")
    if command in ("main", "sft"):
        lines.append(
            "several processes find each other on Cloud TPU, GKE, Slurm and under Open MPI; elsewhere each gets "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
    lines.append(
        f"--program_cache=DIR    where compiled programs are kept for the next start ({programs.default_place()}); "
        "empty: nowhere"
    )
    lines.append("--profile=DIR    a JAX trace of one piece of each kind of work goes there")
    for other, usage in COMMANDS.items():
        if other != command:
            lines.append(f"python -m activedpo_jax.{other} --help    {usage.about}")
    lines += ["", "FILE is a Python file as in configs/.  OPTION is one of these:", ""]
    rows = [("OPTION", "TYPE", "DEFAULT", "VALUES", "MEANING")]
    for name, option in OPTIONS.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in COMMANDS[command].options):
            values = ", ".join(option.names) or option.rule.words
            rows.append((name, _type_in_a_word(option.default), _as_typed(option.default), values, option.comment))
    for row in rows:
        *cells, comment = (cell.ljust(width) for cell, width in zip(row, (29, 14, 10, 28, 0), strict=True))
        lines.append("  ".join([*cells, comment]))
    return "\n".join(lines)


def parse(argv: Sequence[str], strategies: Collection[str]) -> Command:
    """As `read_config`, without the exit.

    Raises:
      UsageError: for an unknown flag or option (names the nearest one), a value of the wrong type or out of
        range, a file that is not there or does not run.
    """
    file, rest = _take_config_file(list(argv[1:]))
    _check_names(rest)
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_string("workdir", None, "where the run lies", flag_values=values)
    absl_flags.DEFINE_string("compile_only", "", "platform:topology", flag_values=values)
    absl_flags.DEFINE_string("program_cache", programs.default_place(), "a folder", flag_values=values)
    absl_flags.DEFINE_string("profile", "", "a folder", flag_values=values)
    absl_flags.DEFINE_string("coordinator", None, "host:port of process 0", flag_values=values)
    absl_flags.DEFINE_integer("num_processes", None, "of the run", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_integer("process_id", None, "of this process, from 0", lower_bound=0, flag_values=values)
    try:
        config_flags.DEFINE_config_dict("config", load(file), flag_values=values, sys_argv=rest)
        unused = values([argv[0], *rest])[1:]
    except absl_flags.IllegalFlagValueError as error:
        raise _wrong_value(str(error)) from error
    except absl_flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from error
    if unused:
        raise UsageError(f"got {unused[0]!r}, expected flags alone; a value belongs to its flag, as --flag=value")

    config = values.config
    _tidy_tuples(config)
    validate(config, strategies, _command(argv))
    if values.compile_only and not re.fullmatch(TOPOLOGY, values.compile_only):
        raise UsageError(
            f"--compile_only: got {values.compile_only!r}, expected PLATFORM:TOPOLOGY such as v5e:4x4, several slices "
            "2*v5e:4x4, cpu:8, or gpu:1"
        )
    if not values.workdir and not values.compile_only:
        raise UsageError("--workdir is missing: the directory that the run is written to, and goes on from")
    address = Address(values.coordinator, values.num_processes, values.process_id)
    _check_address(address)
    workdir = files.folder_at(values.workdir) if values.workdir else None
    return Command(config, workdir, values.compile_only, values.program_cache, values.profile, address)


def _check_address(address: Address) -> None:
    given = " ".join(f"--{name}={value}" for name, value in zip(FLAGS, address, strict=True) if value is not None)
    if given and None in address:
        raise UsageError(f"{given}: expected --coordinator, --num_processes and --process_id, or none of them")
    if address.coordinator is not None and not re.fullmatch(r".+:\d+", address.coordinator):
        raise UsageError(f"--coordinator: got {address.coordinator!r}, expected HOST:PORT, of process 0")
    if given and address.process_id >= address.num_processes:  # type: ignore[operator]
        raise UsageError(f"{given}: expected a --process_id from 0, below --num_processes")


def load(file: str) -> ml_collections.ConfigDict:
    """Runs `get_config()` of a config file.  `x.py:word` calls `get_config("word")`.

    Raises:
      UsageError: if the file is not there, or its code fails; names file and line.
    """
    path, _, word = file.partition(":")
    try:
        code = compile(pathlib.Path(path).read_bytes(), path, "exec")
    except OSError as error:
        raise UsageError(f"--config: {path}: {error.strerror}; expected a Python file with get_config()") from error
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{path}:{getattr(error, 'lineno', 1)}: not Python: {error}") from error
    namespace: dict[str, Any] = {"__name__": "config", "__file__": path}
    try:
        exec(code, namespace)
        if "get_config" not in namespace:
            raise UsageError(f"{path}: has no get_config()")
        config = namespace["get_config"](*([word] if word else []))
    except UsageError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        message = " ".join(str(error).split())
        raise UsageError(f"{path}:{lines[-1] if lines else 1}: {type(error).__name__}: {message}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UsageError(f"{path}: get_config() returned {type(config).__name__}, expected config.default(), changed")
    return config


def validate(config: ml_collections.ConfigDict, strategies: Collection[str], command: str = "main") -> None:
    """Checks every option against `config.OPTIONS`, and those that depend on each other.

    Args:
      strategies: the names that `config.strategies` may hold.
      command: one of `COMMANDS`.

    Raises:
      UsageError: for the first option that is wrong: its name, what it is, and what was expected.
    """
    values = files.flatten(config)
    for name in values:
        if name not in OPTIONS:
            raise UsageError(_no_such_option(name, OPTIONS))
    for name, option in OPTIONS.items():
        if name not in values:
            raise UsageError(f"config.{name}: missing; a config file starts from config.default()")
        value = values[name]
        if not _has_type_of(option.default, value):
            raise wrong(name, value, _type_in_words(option.default))
        if option.names and value not in option.names:
            raise wrong(name, value, _one_of(value, option.names))
        if not option.rule.holds(value):
            raise wrong(name, value, option.rule.words)
        _check_width(name, option.default, value)
    for strategy in config.strategies:
        if strategy not in strategies and ":" not in strategy:  # a user's own is looked up where it is used
            raise wrong("strategies", strategy, _one_of(strategy, strategies))
    option_checks.check(config, command)


_FLOAT32 = np.finfo(np.float32)
_TINIEST, _LARGEST = float(_FLOAT32.tiny), float(_FLOAT32.max)


def _check_width(name: str, default: Any, value: Any) -> None:
    """Numbers go into arrays of int32 and float32, which must hold them."""
    if type(default) is int and abs(value) >= 2**31:
        raise wrong(name, value, f"a number below {2**31:,}, for 32 bits")
    if type(default) is float and value and not _TINIEST <= abs(value) <= _LARGEST:
        raise wrong(name, value, f"a number from {_TINIEST:.1g} to {_LARGEST:.1g}, for 32 bits")


def _take_config_file(arguments: list[str]) -> tuple[str, list[str]]:
    """The value of --config, and the other arguments."""
    file, rest = "", []
    while arguments:
        flag, equals, value = arguments.pop(0).partition("=")
        if flag not in ("--config", "-config"):
            rest.append(flag + equals + value)
        elif equals:
            file = value
        elif arguments:
            file = arguments.pop(0)
    if not file:
        raise UsageError("--config is missing: a Python file such as configs/quickstart.py")
    return file, rest


def _check_names(arguments: Sequence[str]) -> None:
    for argument in arguments:
        override = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if override and override[1] not in OPTIONS:
            inside = [name for name in OPTIONS if name.startswith(override[1] + ".")]
            if inside:
                raise UsageError(f"config.{override[1]}: a group of options; set one of {', '.join(inside)}")
            raise UsageError(_no_such_option(override[1], OPTIONS))


def _no_such_option(name: str, known: Collection[str]) -> str:
    return f"config.{name}: no such option; the nearest is config.{_nearest(name, known)}"


def _nearest(name: str, known: Collection[str]) -> str:
    """The most similar name.  The last part counts twice: people forget the group that an option is in."""

    def similarity(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        return whole + difflib.SequenceMatcher(None, name.split(".")[-1], candidate.split(".")[-1]).ratio()

    return max(sorted(known), key=similarity)


def _wrong_value(message: str) -> UsageError:
    """absl says `flag --config.rounds=ten: invalid literal for int() ...`."""
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if not found:
        return UsageError(" ".join(message.split()))
    return wrong(found[1], found[2], _type_in_words(OPTIONS[found[1]].default))


def _tidy_tuples(config: ml_collections.ConfigDict) -> None:
    """Tuples as they were meant: names without quotes, which arrive as one text `a,b`, and a single pair."""
    for name, option in OPTIONS.items():
        default = option.default
        if not isinstance(default, tuple):
            continue
        *groups, last = name.split(".")
        inside = config
        for group in groups:
            inside = inside[group]
        value = inside[last]
        if isinstance(default[0], str) and _has_type_of(default, value):
            inside[last] = tuple(word for text in value for word in re.split(r"[\s,()\[\]]+", text) if word)
        elif isinstance(default[0], tuple) and _has_type_of(default[0], value):
            inside[last] = (value,)


def _has_type_of(default: Any, value: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_has_type_of(default[0], item) for item in value)
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is type(default)  # so that True is no number


def _type_in_words(default: Any) -> str:
    if isinstance(default, tuple):
        one = f"a tuple such as {default[0]}" if isinstance(default[0], tuple) else _type_in_words(default[0])
        return f"{one}, or several with commas between them"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[type(default)]


def _type_in_a_word(default: Any) -> str:
    if isinstance(default, tuple):
        return "pairs" if isinstance(default[0], tuple) else f"{_type_in_a_word(default[0])}s"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[type(default)]


def _as_typed(default: Any) -> str:
    """As it stands on the command line."""
    if isinstance(default, tuple):
        return ",".join(f"({_as_typed(item)})" if isinstance(item, tuple) else _as_typed(item) for item in default)
    return str(default).lower() if isinstance(default, bool) else str(default) or "''"


def _one_of(value: Any, choices: Collection[str]) -> str:
    return f"one of {', '.join(choices)} (the nearest is {_nearest(str(value), choices)})"
