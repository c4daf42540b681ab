"""The command line: a config file, single options changed on top of it, and errors that say what to type.

    --config configs/x.py --workdir DIR [--config.dpo.beta=0.2 --config.seeds=0,1,2] [--compile_only=v5e:4x4]

A config file has `get_config()`, which starts from `config.default()` and changes some of its options.
"""

import contextlib
import difflib
import inspect
import math
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags

from activedpo_jax.config import default as default_config
from activedpo_jax.files import flatten

_USAGE = """\
python -m activedpo_jax.main --config FILE --workdir DIR [--config.OPTION=VALUE ...]
python -m activedpo_jax.main --config FILE --compile_only=PLATFORM:TOPOLOGY    (v5e:4x4, for instance)
python -m activedpo_jax.sft --config FILE --workdir DIR [...]         supervised fine-tuning alone: config.sft
python -m activedpo_jax.generate --config FILE --workdir DIR [...]    responses to prompts: config.generation
"""

_CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.quantisation": ("none", "int8", "nf4"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "xla", "cudnn", "splash"),
    "data.template": ("auto", "chat", "plain"),
    "features.normalisation": ("response", "none"),
    "selection.posterior": ("refreshed", "frozen"),
    "oracle.noise": ("none", "flip", "bradley_terry"),
    "sft.weights": ("lora", "full"),
    "sft.schedule": ("linear", "cosine", "constant"),
    "dpo.schedule": ("linear", "cosine", "constant"),
    "dpo.train_on": ("all", "newest"),
    "dpo.start_from": ("sft", "current"),
    "round.mode": ("auto", "fused", "staged"),
}

_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _several(value: tuple[Any, ...]) -> bool:
    return len(value) > 0 and len(set(value)) == len(value)


_Rule = tuple[Callable[[Any], bool], str]  # what must hold, and in words
_ANYTHING: _Rule = (lambda value: True, "")
_POSITIVE: _Rule = (lambda value: value > 0, "a number above 0")
_NOT_NEGATIVE: _Rule = (lambda value: value >= 0, "0 or more")
_SHARE: _Rule = (lambda value: 0 <= value <= 1, "a number from 0 to 1")
_AXIS: _Rule = (lambda value: value > 0 or value == -1, "a number of devices, or -1 for all that are left")

# Numbers that are not here must be above 0.
_RULES: dict[str, _Rule] = {
    "strategies": (_several, "one name or more, each once"),  # which names there are, `validate` is told
    "seeds": (
        lambda value: _several(value) and min(value) >= 0 and max(value) < 2**32,
        "one number or more, each once, from 0 to below 2**32",
    ),
    "lora.target_modules": (
        lambda value: _several(value) and set(value) <= set(_MODULES),
        f"some of {', '.join(_MODULES)}, each once",
    ),
    "data.heldout_fraction": (lambda value: 0 < value < 1, "a number between 0 and 1"),
    "data.train_limit": _NOT_NEGATIVE,
    "data.heldout_limit": _NOT_NEGATIVE,
    "data.buckets": (
        lambda value: _several(value) and all(len(pair) == 2 and min(pair) > 0 for pair in value),
        "pairs of (prompt, response) tokens such as ((128, 128), (256, 512)), each once",
    ),
    "synthetic.purity": _SHARE,
    "sft.limit": _NOT_NEGATIVE,
    "sft.warmup_fraction": _SHARE,
    "sft.weight_decay": _NOT_NEGATIVE,
    "sft.heldout_fraction": (lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    "oracle.flip_probability": _SHARE,
    "dpo.label_smoothing": (lambda value: 0 <= value < 0.5, "a number from 0 to below 0.5"),
    "dpo.warmup_fraction": _SHARE,
    "dpo.weight_decay": _NOT_NEGATIVE,
    "generation.responses": (lambda value: value >= 2, "2 or more, of which pairs are made"),
    "generation.top_k": _NOT_NEGATIVE,
    "generation.top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "generation.resamples": _NOT_NEGATIVE,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
}


class UsageError(ValueError):
    """The command line or the config file is wrong; the message is one line for the person who typed it."""


class Command(NamedTuple):
    config: ml_collections.ConfigDict  # locked, and valid
    workdir: pathlib.Path | None  # None only with `compile_only`
    compile_only: str  # empty, or platform and topology to compile the programs of the run for, and stop


def read_config(argv: Sequence[str], strategies: Collection[str]) -> Command:
    """Reads `sys.argv`; on a mistake prints one line that says what was expected, and exits with code 2.

    Args:
      argv: the program's name, then its arguments.
      strategies: the names that `config.strategies` may hold.
    """
    if {"-h", "--help"} & set(argv[1:]):
        print(f"{_USAGE}\nOPTION is one of these, from activedpo_jax/config.py:\n")
        print(inspect.getsource(default_config))
        sys.exit(0)
    try:
        return parse(argv, strategies)
    except UsageError as error:
        fail(error)


def read_plain_run(argv: Sequence[str], strategies: Collection[str]) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
    """As `read_config`, for commands that only run: options and work directory."""
    command = read_config(argv, strategies)
    if command.compile_only:
        fail("--compile_only is an option of activedpo_jax.main; leave it out")
    assert command.workdir is not None
    return command.config, command.workdir


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """Around a command's work: what a user can mend ends in one line, not in a traceback.

    Exit codes: 2, a mistake in options, files or data; 1, numbers that are not finite, a disk that is full or cannot be
    written; 75 (EX_TEMPFAIL of sysexits.h), SIGINT or SIGTERM, after which the same command resumes.
    """
    previous = signal.getsignal(signal.SIGTERM)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except ValueError as error:
        fail(error)
    except FloatingPointError as error:
        fail(error, code=1)
    except OSError as error:
        fail(f"{error.filename or 'file'}: {error.strerror or error}", code=1)
    except KeyboardInterrupt:
        fail("interrupted; what is in the work directory is whole, and the same command resumes it", code=_RESUMABLE)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


_RESUMABLE = 75


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def fail(error: object, code: int = 2) -> NoReturn:
    """Prints the error without a traceback, and exits; code 2 is that of every mistake in usage."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


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
    validate(config, strategies)
    if values.compile_only and not re.fullmatch(r"\w+:\d+(x\d+)*", values.compile_only):
        raise UsageError(f"--compile_only: got {values.compile_only!r}, expected PLATFORM:TOPOLOGY such as v5e:4x4")
    if not values.workdir and not values.compile_only:
        raise UsageError("--workdir is missing: the directory that the run is written to, and goes on from")
    return Command(config, pathlib.Path(values.workdir) if values.workdir else None, values.compile_only)


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


def validate(config: ml_collections.ConfigDict, strategies: Collection[str]) -> None:
    """Checks every option against `config.default()` (names and types) and against its range.

    Args:
      strategies: the names that `config.strategies` may hold.

    Raises:
      UsageError: for the first option that is wrong: its name, what it is, and what was expected.
    """
    known, values = flatten(default_config()), flatten(config)
    for name in values:
        if name not in known:
            raise UsageError(_no_such_option(name, known))
    for name, default in known.items():
        if name not in values:
            raise UsageError(f"config.{name}: missing; a config file starts from config.default()")
        value = values[name]
        if not _has_type_of(default, value):
            raise UsageError(_expected(name, value, _type_in_words(default)))
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UsageError(_expected(name, value, _one_of(value, _CHOICES[name])))
        holds, expected = _RULES.get(name, _POSITIVE if type(default) in (int, float) else _ANYTHING)
        if not holds(value):
            raise UsageError(_expected(name, value, expected))
    for strategy in config.strategies:
        if strategy not in strategies:
            raise UsageError(_expected("strategies", strategy, _one_of(strategy, strategies)))
    _check_together(config)


def _check_together(config: ml_collections.ConfigDict) -> None:
    """What no option can be checked for alone.  An option that would be ignored is an error, too."""
    if not (config.data.train or config.sft.data or config.generation.prompts):  # SFT and generation need no pool
        raise UsageError("config.data.train: got '', expected a file, the name of a data set, or synthetic")
    if config.sft.data and not config.model.path:
        raise UsageError(
            f"config.sft.data: got {config.sft.data!r} without config.model.path; expected a Hugging Face directory "
            "or name there, whose tokenizer makes tokens of the texts"
        )
    if config.sft.data and config.sft.weights == "full" and config.lora.path:
        raise UsageError(
            f"config.lora.path: got {config.lora.path!r} with sft.weights='full', which changes the base weights "
            "that the adapter was made for; expected an empty lora.path, or sft.weights='lora'"
        )
    if config.model.quantisation != "none" and config.sft.data and config.sft.weights == "full":
        raise UsageError(
            f"config.model.quantisation: got {config.model.quantisation!r} with sft.weights='full', which trains the "
            "weights themselves; expected 'none', or sft.weights='lora'"
        )
    if config.export.merged and not config.model.path:
        raise UsageError(
            "config.export.merged: got True without config.model.path; expected a Hugging Face directory or name "
            "there, into whose weights the adapter can be merged"
        )
    noise = config.oracle.noise
    if config.oracle.flip_probability and noise != "flip":
        raise UsageError(
            f"config.oracle.flip_probability: got {config.oracle.flip_probability} with "
            f"oracle.noise={noise!r}, which flips nothing; expected oracle.noise='flip'"
        )
    if config.oracle.temperature != 1 and noise != "bradley_terry":
        raise UsageError(
            f"config.oracle.temperature: got {config.oracle.temperature} with oracle.noise={noise!r}, "
            "which has no temperature; expected oracle.noise='bradley_terry'"
        )
    if not config.model.path and config.data.train != "synthetic":
        raise UsageError(
            f"config.model.path: got '' with data.train={config.data.train!r}, expected a Hugging Face "
            "directory or name; only data.train='synthetic' brings a decoder of its own"
        )
    if list(config.mesh.values()).count(-1) > 1:
        raise UsageError(f"config.mesh: got {dict(config.mesh)}, expected -1 for one axis at most")


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
    known = flatten(default_config())
    for argument in arguments:
        override = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if override and override[1] not in known:
            inside = [name for name in known if name.startswith(override[1] + ".")]
            if inside:
                raise UsageError(f"config.{override[1]}: a group of options; set one of {', '.join(inside)}")
            raise UsageError(_no_such_option(override[1], known))


def _no_such_option(name: str, known: Collection[str]) -> str:
    return f"config.{name}: no such option; the nearest is config.{_nearest(name, known)}"


def _nearest(name: str, known: Collection[str]) -> str:
    """The most similar name.  The last part counts twice: people forget the group that an option is in."""

    def similarity(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        return whole + difflib.SequenceMatcher(None, name.split(".")[-1], candidate.split(".")[-1]).ratio()

    return max(known, key=similarity)


def _wrong_value(message: str) -> UsageError:
    """absl says `flag --config.rounds=ten: invalid literal for int() ...`."""
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if not found:
        return UsageError(" ".join(message.split()))
    return UsageError(_expected(found[1], found[2], _type_in_words(flatten(default_config())[found[1]])))


def _tidy_tuples(config: ml_collections.ConfigDict) -> None:
    """Tuples as they were meant: names without quotes, which arrive as one text `a,b`, and a single pair."""
    for name, default in flatten(default_config()).items():
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


def _one_of(value: Any, choices: Collection[str]) -> str:
    return f"one of {', '.join(choices)} (the nearest is {_nearest(str(value), choices)})"


def _expected(name: str, value: Any, expected: str) -> str:
    return f"config.{name}: got {value!r}, expected {expected}"
