"""The command line: a config file, single options changed on top of it, and errors that say what to type.

    --config configs/x.py --workdir DIR [--config.dpo.beta=0.2 --config.seeds=0,1,2] [--compile_only=v5e:4x4]

A config file has `get_config()`, which starts from `config.default()` and changes some of its options.
"""

import atexit
import contextlib
import difflib
import errno
import fnmatch
import math
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import ml_collections
import numpy as np
from absl import flags as absl_flags
from ml_collections import config_flags

from activedpo_jax.config import OPTIONS
from activedpo_jax.files import flatten


class Usage(NamedTuple):
    """What `--help` says of a command."""

    about: str
    options: tuple[str, ...]  # that it looks at: names, or patterns of `fnmatch`


_MODEL_AND_TEXTS = ("model.*", "lora.*", "data.template", "data.template_kwargs", "data.buckets")
_SAMPLING = tuple(f"generation.{name}" for name in ("responses", "temperature", "top_k", "top_p", "max_new_tokens"))

# By the name of their module.
COMMANDS: dict[str, Usage] = {
    "main": Usage(
        "rounds of picking, labelling and training, and their evaluation",
        (
            *("strategies", "seeds", "rounds", "labels_per_round", "model.*", "lora.*", "data.*", "synthetic.*"),
            *("scratch.*", "sft.*", "features.*", "selection.*", "candidates.*", "oracle.*", "dpo.*", "round.*"),
            *("evaluation.*", "export.*", *_SAMPLING, "mesh.*"),
        ),
    ),
    "sft": Usage("supervised fine-tuning alone", ("seeds", *_MODEL_AND_TEXTS, "sft.*", "mesh.*")),
    "generate": Usage(
        "responses to the prompts of a file",
        (
            *("seeds", "model.path", "model.revision", "model.dtype", "model.quantisation", "model.attention"),
            *(*_MODEL_AND_TEXTS[1:], "generation.*", "mesh.*"),
        ),
    ),
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
      argv: the program's name, which tells the command, then its arguments.
      strategies: the names that `config.strategies` may hold.
    """
    atexit.register(_flush)
    if {"-h", "--help"} & set(argv[1:]):
        with clean_errors():
            print(help_text(_command(argv)))
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
        lines.append(f"{compiling}    (v5e:4x4, for instance)")
    for other, usage in COMMANDS.items():
        if other != command:
            lines.append(f"python -m activedpo_jax.{other} --help    {usage.about}")
    lines += ["", "FILE is a Python file as in configs/.  OPTION is one of these:", ""]
    rows = [("OPTION", "TYPE", "DEFAULT", "VALUES", "MEANING")]
    for name, option in OPTIONS.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in COMMANDS[command].options):
            values = ", ".join(option.choices) or option.rule.words
            rows.append((name, _type_in_a_word(option.default), _as_typed(option.default), values, option.comment))
    for row in rows:
        *cells, comment = (cell.ljust(width) for cell, width in zip(row, (29, 14, 10, 28, 0), strict=True))
        lines.append("  ".join([*cells, comment]))
    return "\n".join(lines)


_RESUMABLE = 75
_PIPE = 128 + signal.SIGPIPE

_LESS_MEMORY = (
    "lower features.groups_per_chunk, evaluation.pairs_per_chunk, dpo.pairs_per_chunk or sft.examples_per_chunk, "
    "generation.prompts_per_chunk, the largest of data.buckets, or lora.rank; or set model.remat=full or "
    "model.quantisation=int8"
)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """Around a command's work: what a user can mend ends in one line, not in a traceback.

    Exit codes: 2, a mistake in options, files or data; 1, numbers that are not finite, memory that does not suffice, a
    disk that is full or cannot be written; 75 (EX_TEMPFAIL of sysexits.h), SIGINT or SIGTERM, after which the same
    command resumes; 141, without a line, a pipe that nobody reads any more.
    """
    previous = signal.getsignal(signal.SIGTERM)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _flush()
        sys.exit(_PIPE)
    except KeyboardInterrupt:
        fail("interrupted; what is in the work directory is whole, and the same command resumes it", code=_RESUMABLE)
    except Exception as error:
        found = _in_one_line(error)
        if found is None:
            raise
        fail(found[0], code=found[1])
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def _in_one_line(error: Exception) -> tuple[str, int] | None:
    """What to print of an error, and the exit code; None: it is a defect of the program, which needs the traceback."""
    if disk := _disk_error(error):
        return f"{disk}; once the disk has space and can be written, the same command resumes", 1
    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    ):
        reason = (str(error).splitlines() or [""])[0].removeprefix("RESOURCE_EXHAUSTED: ") or "the host has no more"
        return f"out of memory ({reason}): {_LESS_MEMORY}", 1
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, FloatingPointError):
        return str(error), 1
    if isinstance(error, OSError):
        return f"{error.filename or 'file'}: {error.strerror or error}", 1
    return None


def _disk_error(error: BaseException | None) -> str | None:
    """File and reason, where a disk that is full or cannot be written is behind an error or those that led to it.

    TensorStore, which writes checkpoints, has the reason in the text of a ValueError alone.
    """
    while error is not None:
        for number in _DISK:
            reason, text = os.strerror(number), str(error)
            if isinstance(error, OSError) and error.errno == number:
                return f"{error.filename or 'file'}: {reason}"
            if isinstance(error, ValueError) and reason in text:
                file = re.search(r'"(/[^"]*)"', text)
                return f"{file[1] if file else 'file'}: {reason}"
        error = error.__cause__ or error.__context__
    return None


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _flush() -> None:
    """Writes out what was printed; where nobody reads it, drops it, of which the interpreter would complain."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    validate(config, strategies, _command(argv))
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


def validate(config: ml_collections.ConfigDict, strategies: Collection[str], command: str = "main") -> None:
    """Checks every option against `config.OPTIONS`, and those that depend on each other.

    Args:
      strategies: the names that `config.strategies` may hold.
      command: one of `COMMANDS`.

    Raises:
      UsageError: for the first option that is wrong: its name, what it is, and what was expected.
    """
    values = flatten(config)
    for name in values:
        if name not in OPTIONS:
            raise UsageError(_no_such_option(name, OPTIONS))
    for name, option in OPTIONS.items():
        if name not in values:
            raise UsageError(f"config.{name}: missing; a config file starts from config.default()")
        value = values[name]
        if not _has_type_of(option.default, value):
            raise UsageError(_expected(name, value, _type_in_words(option.default)))
        if option.choices and value not in option.choices:
            raise UsageError(_expected(name, value, _one_of(value, option.choices)))
        if not option.rule.holds(value):
            raise UsageError(_expected(name, value, option.rule.words))
        _check_width(name, option.default, value)
    for strategy in config.strategies:
        if strategy not in strategies:
            raise UsageError(_expected("strategies", strategy, _one_of(strategy, strategies)))
    _check_data_and_model(config, command)
    _check_oracle(config)
    _check_labels(config)
    _check_sizes(config)
    if config.data.train == "synthetic":
        _check_synthetic(config)


_FLOAT32 = np.finfo(np.float32)
_TINIEST, _LARGEST = float(_FLOAT32.tiny), float(_FLOAT32.max)


def _check_width(name: str, default: Any, value: Any) -> None:
    """Numbers go into arrays of int32 and float32, which must hold them."""
    if type(default) is int and abs(value) >= 2**31:
        raise UsageError(_expected(name, value, f"a number below {2**31:,}, for 32 bits"))
    if type(default) is float and value and not _TINIEST <= abs(value) <= _LARGEST:
        raise UsageError(_expected(name, value, f"a number from {_TINIEST:.1g} to {_LARGEST:.1g}, for 32 bits"))


def _check_data_and_model(config: ml_collections.ConfigDict, command: str) -> None:
    """Options that need, or exclude, each other.  An option that would be ignored is an error, too."""
    needs_no_pool = config.sft.data or config.generation.prompts
    if not (config.data.train or (command != "main" and needs_no_pool)):
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
    if not config.model.path and config.data.train != "synthetic":
        raise UsageError(
            f"config.model.path: got '' with data.train={config.data.train!r}, expected a Hugging Face "
            "directory or name; only data.train='synthetic' brings a decoder of its own"
        )


def _check_oracle(config: ml_collections.ConfigDict) -> None:
    """Who labels, what, and how."""
    oracle, source, mode = config.oracle, config.candidates.source, config.round.mode
    kind, noise = oracle.kind, oracle.noise
    if oracle.function and kind in ("dataset", "people"):
        raise UsageError(
            f"config.oracle.function: got {oracle.function!r} with oracle.kind={kind!r}, which asks no function; "
            "expected an empty one, or oracle.kind='function' or 'reward'"
        )
    if kind == "reward" and not oracle.function and config.data.train != "synthetic":
        raise UsageError(
            "config.oracle.function: got '' with oracle.kind='reward', expected module:function; only "
            "data.train='synthetic' brings a reward of its own"
        )
    if (kind == "function" or oracle.function) and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:\w+", oracle.function):
        raise UsageError(_expected("oracle.function", oracle.function, "module:function, such as my.rewards:helpful"))
    if oracle.annotators != 1 and kind != "people":
        raise UsageError(
            f"config.oracle.annotators: got {oracle.annotators} with oracle.kind={kind!r}, which answers once; "
            "expected 1, or oracle.kind='people'"
        )
    if noise != "none" and kind in ("people", "reward"):
        raise UsageError(
            f"config.oracle.noise: got {noise!r} with oracle.kind={kind!r}, whose answers are taken as they are; "
            "expected 'none', or oracle.kind='dataset' or 'function'"
        )
    if oracle.flip_probability and noise != "flip":
        raise UsageError(
            f"config.oracle.flip_probability: got {oracle.flip_probability} with "
            f"oracle.noise={noise!r}, which flips nothing; expected oracle.noise='flip'"
        )
    if oracle.temperature != 1 and noise != "bradley_terry":
        raise UsageError(
            f"config.oracle.temperature: got {oracle.temperature} with oracle.noise={noise!r}, "
            "which has no temperature; expected oracle.noise='bradley_terry'"
        )
    if source != "pool" and kind == "dataset":
        raise UsageError(
            f"config.candidates.source: got {source!r} with oracle.kind='dataset', which has no labels of fresh "
            "responses; expected 'pool', or oracle.kind='function', 'reward' or 'people'"
        )
    if config.candidates.prompts_per_round and source == "pool":
        raise UsageError(
            f"config.candidates.prompts_per_round: got {config.candidates.prompts_per_round} with "
            "candidates.source='pool', which takes all pairs; expected 0, or candidates.source='policy' or 'mixture'"
        )
    if mode == "fused" and kind in ("function", "people"):
        raise UsageError(
            f"config.round.mode: got 'fused' with oracle.kind={kind!r}, whose answers come from outside the "
            "program; expected 'auto' or 'staged'"
        )


def _check_labels(config: ml_collections.ConfigDict) -> None:
    """As many labels as there are pairs, and as the arrays of a run can hold."""
    source, synthetic = config.candidates.source, config.data.train == "synthetic"
    labels = config.rounds * config.labels_per_round
    if labels * config.dpo.epochs >= 2**31:
        raise UsageError(
            f"config.rounds: got {config.rounds} with labels_per_round={config.labels_per_round} and "
            f"dpo.epochs={config.dpo.epochs}, expected a product below {2**31:,}"
        )
    if source == "pool" and synthetic and labels > config.synthetic.pool_pairs:
        raise UsageError(
            f"config.rounds: got {config.rounds} with labels_per_round={config.labels_per_round}, expected at most "
            f"synthetic.pool_pairs={config.synthetic.pool_pairs} labels together"
        )
    prompts = config.candidates.prompts_per_round
    if synthetic and not (0 < prompts < config.synthetic.pool_pairs):
        prompts = config.synthetic.pool_pairs
    m = config.generation.responses
    if source == "policy" and prompts and config.labels_per_round > prompts * (m * (m - 1) // 2):
        raise UsageError(
            f"config.labels_per_round: got {config.labels_per_round}, expected at most {prompts * (m * (m - 1) // 2)}: "
            f"the pairs among generation.responses={m} responses to {prompts} prompts"
        )


def _check_sizes(config: ml_collections.ConfigDict) -> None:
    """Products of options that are the sizes of arrays."""
    m, response = config.generation.responses, max(response for _, response in config.data.buckets)
    for name, count in (
        ("generation.prompts_per_chunk", config.generation.prompts_per_chunk * m * config.generation.max_new_tokens),
        ("features.groups_per_chunk", config.features.groups_per_chunk * m * response),
        ("features.groups_per_chunk", config.features.groups_per_chunk * config.features.dim),
        ("evaluation.pairs_per_chunk", config.evaluation.pairs_per_chunk * 2 * response),
        ("dpo.pairs_per_chunk", config.dpo.pairs_per_chunk * 2 * response),
        ("sft.examples_per_chunk", config.sft.examples_per_chunk * response),
    ):
        if count >= 2**31:
            raise UsageError(
                f"{_expected(name, flatten(config)[name], 'less')}: an array would have {count:,} numbers, and can "
                f"have {2**31 - 1:,}"
            )
    if list(config.mesh.values()).count(-1) > 1:
        raise UsageError(f"config.mesh: got {dict(config.mesh)}, expected -1 for one axis at most")


def _check_synthetic(config: ml_collections.ConfigDict) -> None:
    """The procedural task can be written, and its decoder can be built and trained."""
    task, scratch = config.synthetic, config.scratch
    at_random = task.purity + (1 - task.purity) / task.styles
    devices = math.prod(size for axis, size in config.mesh.items() if axis != "tensor" and size > 0)
    batch = -(-scratch.batch_size // devices) * devices
    head = scratch.hidden_size // scratch.num_heads
    for wrong, name, expected in (
        (
            task.topics_per_family > task.topics,
            "synthetic.topics_per_family",
            f"at most synthetic.topics={task.topics}",
        ),
        (
            task.min_response > task.max_response,
            "synthetic.min_response",
            f"at most synthetic.max_response={task.max_response}",
        ),
        (
            at_random < 0.1,
            "synthetic.purity",
            f"more: with synthetic.styles={task.styles} a word is of its response's style with probability "
            f"{at_random:.2g}, and a style that leads would be found too rarely; 0.1 will do",
        ),
        (
            scratch.hidden_size % scratch.num_heads != 0,
            "scratch.hidden_size",
            f"a multiple of scratch.num_heads={scratch.num_heads}",
        ),
        (
            head % 2 != 0,
            "scratch.hidden_size",
            f"an even number for each of scratch.num_heads={scratch.num_heads} heads, since rotary embeddings rotate "
            f"pairs of channels; {head} is odd",
        ),
        (
            scratch.num_heads % scratch.num_kv_heads != 0,
            "scratch.num_heads",
            f"a multiple of scratch.num_kv_heads={scratch.num_kv_heads}",
        ),
        (
            scratch.examples < batch,
            "scratch.examples",
            f"{batch} or more, a batch of scratch.batch_size={scratch.batch_size} on the devices of config.mesh",
        ),
    ):
        if wrong:
            raise UsageError(_expected(name, flatten(config)[name], expected))


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
    return UsageError(_expected(found[1], found[2], _type_in_words(OPTIONS[found[1]].default)))


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


def _expected(name: str, value: Any, expected: str) -> str:
    return f"config.{name}: got {value!r}, expected {expected}"
