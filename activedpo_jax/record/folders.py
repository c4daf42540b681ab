"""The work directory of a command.

DIR/config.json                the command and its options, written at the start and compared on resuming
DIR/inputs/                    what data, model and adapter the command began with; see `inputs`
DIR/.lock                      held by the process working here, and released when it ends, however it ends; in an
                               object store see `remote`
DIR/<strategy>/seed<seed>/     one folder per run if there are several; a single run lies in DIR itself
    rounds/NNN/                asked.jsonl, labels.jsonl and selected.jsonl: see `labels`
    metrics.jsonl, tensorboard/, checkpoints, adapter/
    summary.json               see `RunSummary`
    heldout.npz                see `outcomes`
    evaluation.json(l)         on request, see `evaluation.on_policy`
    calibration.json           on request, see `evaluation.calibration`
"""

import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import ml_collections

from activedpo_jax import __version__, remote
from activedpo_jax.files import flatten, plain, read_json, write_atomic, write_json
from activedpo_jax.hosts import on_first
from activedpo_jax.oracles.labels import PREFERENCES, Preference
from activedpo_jax.record import copied_checkpoints
from activedpo_jax.record.labels import Verdict
from activedpo_jax.rounds.picked import Picked


class RoundSummary(TypedDict):
    """What `summary.json` says about one round.  Round 0, before any label, has no picks or training."""

    round: int
    labels: int  # so far
    accuracy: float  # held-out preference accuracy
    margin: float  # mean held-out margin of the implicit reward
    heldout_loss: NotRequired[float]  # of the held-out pairs, that which is trained; none with `kto`
    # The other figures of the held-out pairs: see `evaluation.heldout.figures`
    heldout_label_nll: NotRequired[float]
    heldout_nll: NotRequired[float]
    heldout_ratio_preferred: NotRequired[float]
    heldout_ratio_rejected: NotRequired[float]
    heldout_tokens: NotRequired[float]
    heldout_tokens_labels: NotRequired[float]
    heldout_longer: NotRequired[float]
    heldout_longer_labels: NotRequired[float]
    seconds: dict[str, float]  # by stage
    loss: NotRequired[float | None]  # of training, mean of the last epoch; null: it was not finite
    information_gain: NotRequired[float | None]  # of the round's picks: the growth of log det V, in nats
    score_min: NotRequired[float | None]  # of the round's picks
    score_max: NotRequired[float | None]
    lam: NotRequired[float]  # the λ used, where it differs from the option
    useful: NotRequired[float]  # of the tokens that staged training computed, the share that are text, not padding
    computed: NotRequired[int]  # prompts with evidence of the round's θ, where that of others is of an earlier one
    fallback: NotRequired[str]  # why the strategy picked at random
    unlearnt: NotRequired[int]  # pairs of the round without a preference: skipped, or both bad
    ties: NotRequired[int]  # pairs of the round
    agreement: NotRequired[float]  # of annotators: share of pairs of answers that agree, mean over the round's pairs
    oracle: NotRequired[dict[str, float]]  # what it took: requests, tokens, cost; see `JudgeOracle.used`


class RunSummary(TypedDict):
    """What `summary.json` of one run holds."""

    strategy: str
    seed: int
    rounds: list[RoundSummary]


@dataclasses.dataclass(frozen=True)
class Selected:
    """One picked pair with its label: a line of `selected.jsonl`."""

    pair_id: str
    prompt: str | list[dict[str, str]]  # as a person reads it: text, or chat messages
    first: str  # the response shown first
    second: str
    score: float | None  # what the strategy ranked it by when it was picked; None: it does not rank
    preference: Preference  # which of the two is better, if any
    weight: float  # of the label in the loss
    source: str  # where the label came from
    round: int


@on_first
def open_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict, command: str) -> None:
    """Makes the work directory of a new command, or checks that an old one belongs to the same command and options.

    The process holds the directory until it ends.  Call this once the inputs are known to be valid: a mistyped path
    should claim nothing.

    Args:
      command: the module that is run: `main`, `compare`, `sft`, `generate` or `select`.

    Raises:
      ValueError: see `check_workdir`; or another process works in the directory.
      OSError: the directory cannot be made or written to.
    """
    check_workdir(workdir, config, command)
    _lock(workdir)
    check_workdir(workdir, config, command)
    path, now = workdir / "config.json", _record(config, command)
    if not path.exists() or read_json(path) != now:  # what differs may differ
        write_json(path, now)


@on_first
def check_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict, command: str) -> None:
    """Compares the options with those of an existing work directory; writes nothing.

    Raises:
      ValueError: `config.json` has other options (names each of them with both values) or is malformed; a file is in
        the way of the directory; it is in an object store where so many processes cannot write checkpoints.
    """
    if command in ("main", "sft"):
        copied_checkpoints.check_processes(workdir)
    for place in () if remote.in_store(workdir) else (workdir, *workdir.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"--workdir {workdir}: {place} is a file; expected a directory: give another one")
    path = workdir / "config.json"
    if not path.exists():
        return
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: got a {type(stored).__name__}, expected a run's options: give another --workdir")
    before, now = flatten(stored), flatten(_record(config, command))
    absent = object()

    def show(value: Any) -> str:
        return "absent" if value is absent else json.dumps(value, ensure_ascii=False)

    differences = [
        f"{name} (was {show(before.get(name, absent))}, now {show(now.get(name, absent))})"
        for name in now | before
        if before.get(name, absent) != now.get(name, absent)
        and not (name in _MAY_CHANGE and name in before and _MAY_CHANGE[name](before[name], now[name]))
    ]
    if differences:
        raise ValueError(
            f"{path}: this work directory belongs to other options: {', '.join(differences)}; "
            "to resume it give the same options as before, of which config.rounds alone may be higher, with the same "
            "version of activedpo_jax, for a new run another --workdir"
        )


# Where a server is, how it is asked, and what is made of its failures: a judge that needs more tokens for a round than
# it was given would end the run for good.
_OF_SERVERS = ("url", "api_key_variable", "concurrency", "timeout_seconds", "attempts", "request", "max_failed")
# Options that may differ when a command resumes, as these functions of the old and the new value say: a finished run
# can have more rounds, and the price of the machine changes what is said of the runs, not the runs.
_MAY_CHANGE: Mapping[str, Callable[[Any, Any], bool]] = {
    "checkpoint_minutes": lambda was, now: True,
    "compare.hour_price": lambda was, now: True,
    "compare.retry": lambda was, now: True,
    "rounds": lambda was, now: now >= was,
    **{f"oracle.{name}": lambda was, now: True for name in (*_OF_SERVERS, "prompt_price", "completion_price")},
}


def _record(config: ml_collections.ConfigDict, command: str) -> dict[str, Any]:
    return dict(plain({"command": command, "version": __version__, **config.to_dict()}))


_locks: dict[pathlib.Path, int] = {}  # descriptors that hold a lock until the process ends


def _lock(workdir: pathlib.Path) -> None:
    """Takes the directory for this process; the kernel releases it when the process ends, however it ends."""
    if there := remote.in_store(workdir):
        remote.lock(there)
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path = (workdir / ".lock").resolve()
    if path in _locks:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        raise ValueError(
            f"{workdir}: process {holder or 'unknown'} works here; wait for its end, or give another --workdir"
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    _locks[path] = descriptor


def run_folder(workdir: pathlib.Path, config: ml_collections.ConfigDict, strategy: str, seed: int) -> pathlib.Path:
    """The folder of one of the command's runs: the work directory itself if there is only one run."""
    if len(config.strategies) * len(config.seeds) == 1:
        return workdir
    # A user's own strategy is `module:name`, and not all file systems take a colon.
    return workdir / strategy.replace(":", ".") / f"seed{seed}"


def selected_path(folder: pathlib.Path, round_number: int) -> pathlib.Path:
    return folder / "rounds" / f"{round_number:03d}" / "selected.jsonl"


@on_first
def write_selected(folder: pathlib.Path, round_number: int, rows: Sequence[Selected]) -> None:
    """Writes a round's picks, in pick order, all or nothing."""
    lines = [json.dumps(plain(dataclasses.asdict(row)), ensure_ascii=False, allow_nan=False) for row in rows]
    write_atomic(selected_path(folder, round_number), "".join(line + "\n" for line in lines))


@on_first
def write_summary(folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Writes `summary.json`, all or nothing."""
    write_json(folder / "summary.json", summary)


@on_first
def write_evaluation(folder: pathlib.Path, figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `evaluation.jsonl`, a line for each row, and then `evaluation.json`, each all or nothing."""
    lines = [json.dumps(plain(row), ensure_ascii=False, allow_nan=False) for row in rows]
    write_atomic(folder / "evaluation.jsonl", "".join(line + "\n" for line in lines))
    write_json(folder / "evaluation.json", figures)


@on_first
def is_of_round(path: pathlib.Path, number: int) -> bool:
    """Whether a report is there and is of the state after this round."""
    return path.exists() and read_json(path)["round"] == number


def joined(picked: Picked, verdicts: Mapping[str, Verdict]) -> list[Selected]:
    """A round's picks, in pick order, with their labels."""
    rows = []
    for question in picked.questions:
        label = verdicts[question.pair_id].label
        rows.append(
            Selected(
                pair_id=question.pair_id,
                prompt=question.prompt,  # type: ignore[arg-type]
                first=question.first,
                second=question.second,
                score=question.score,
                preference=label.preference,
                weight=label.weight,
                source=label.source,
                round=question.round,
            )
        )
    return rows


@on_first
def resumed_summary(folder: pathlib.Path, strategy: str, seed: int, done: int | None) -> RunSummary:
    """The summary up to the last round that was saved.

    Raises:
      ValueError: the summary lacks a round that was saved, or there are rounds on record and no checkpoint.
    """
    path = folder / "summary.json"
    if done is None:
        if (folder / "rounds").exists() and not (folder / "checkpoints").exists():
            raise ValueError(
                f"{folder}: there are rounds on record, but no checkpoints/; restore it, or give another --workdir "
                "to start again"
            )
        return {"strategy": strategy, "seed": seed, "rounds": []}
    summary = read_json(path) if path.exists() else None
    rounds = summary.get("rounds") if isinstance(summary, dict) else None
    if not isinstance(rounds, list) or len(rounds) <= done:
        raise ValueError(f"{path}: missing, or without round {done}, which was saved; restore the file")
    return {"strategy": strategy, "seed": seed, "rounds": rounds[: done + 1]}


def read_selected(folder: pathlib.Path, round_number: int) -> list[Selected]:
    """Reads a round's picks back, in pick order.

    Raises:
      FileNotFoundError: if the round was not written.
      ValueError: if a line is not one that `write_selected` writes; names file, line and field.
    """
    path = selected_path(folder, round_number)
    rows = []
    with path.open(encoding="utf-8") as file:  # not splitlines(): U+2028 in a response does not end a line
        for number, line in enumerate(file, start=1):
            try:
                rows.append(_selected(json.loads(line), round_number))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}; restore the file, or remove its round") from error
    return rows


def _selected(row: Any, round_number: int) -> Selected:
    fields = [field.name for field in dataclasses.fields(Selected)]
    if not isinstance(row, dict) or sorted(row) != sorted(fields):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"got {found}, expected an object with the fields {', '.join(fields)}")
    expected: dict[str, tuple[bool, str]] = {
        "prompt": (isinstance(row["prompt"], str | list), "a string or a list of messages"),
        "score": (isinstance(row["score"], int | float | None), "a number or null"),
        "preference": (row["preference"] in PREFERENCES, f"one of {', '.join(PREFERENCES)}"),
        "weight": (isinstance(row["weight"], int | float), "a number"),
        "round": (row["round"] == round_number, str(round_number)),
    }
    for name in ("pair_id", "first", "second", "source"):
        expected[name] = (isinstance(row[name], str), "a string")
    for name, (holds, description) in expected.items():
        if not holds:
            raise ValueError(f"{name}: got {row[name]!r}, expected {description}")
    return Selected(**row)
