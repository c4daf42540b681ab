"""Options that make programs fit that do not: each set of them is tried by compiling, never guessed."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from activedpo_jax import layout, tasks
from activedpo_jax.compile_only.cost import Row, Target, measure
from activedpo_jax.compile_only.inventory import programs
from activedpo_jax.files import flatten

Changes = dict[str, Any]  # values by the names of options

_CHUNKS = (
    "features.groups_per_chunk",
    "dpo.pairs_per_chunk",
    "evaluation.pairs_per_chunk",
    "sft.examples_per_chunk",
)


def candidates(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> Iterator[Changes]:
    """What to try on these devices, from what costs least time to what costs most or changes the numbers; each goes on
    from the one before."""
    given, changes, before = flatten(config), Changes(), [Changes()]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    count = len(devices) // slices
    steps: list[Changes] = [
        {"mesh.data": slices, "mesh.fsdp": count, "mesh.tensor": 1},
        {name: min(given[name], len(devices)) for name in _CHUNKS},
        {"model.remat": "full"},
    ]
    if count % 4 == 0:
        steps.append({"mesh.fsdp": count // 4, "mesh.tensor": 4})
    if not (config.sft.data and config.sft.weights == "full"):  # which trains the weights themselves
        steps.append({"model.quantisation": "int8"})
    for step in steps:
        changes = changes | step
        real = {name: value for name, value in changes.items() if given[name] != value}
        if real not in before:
            before.append(real)
            yield real


def changed(config: ml_collections.ConfigDict, changes: Changes) -> ml_collections.ConfigDict:
    """A copy of the config with these values."""
    config = copy.deepcopy(config)
    with config.unlocked():
        for name, value in changes.items():
            group, _, last = name.rpartition(".")
            config[group][last] = value
    return config


def as_flags(changes: Changes) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def attempts(
    config: ml_collections.ConfigDict, target: Target, failed: Sequence[Row]
) -> Iterator[tuple[Changes, list[Row]]]:
    """The rows of programs that do not fit, compiled with other options, until a set of options makes all of them fit.

    Yields:
      options, and the rows with them: all of them fit, or the last one does not.
    """
    names = {row.name for row in failed}
    for changes in candidates(config, target.devices):
        other = changed(config, changes)
        mesh = layout.make_mesh(other.mesh, target.devices)
        rows: list[Row] = []
        for program in programs(other, tasks.outline(other, mesh), mesh):
            if program.name in names:
                rows.append(measure(program, target))
                if not rows[-1].fits:
                    break
        yield changes, rows
        if all(row.fits for row in rows):
            return
