"""Compiles the programs of a run for hardware that is not there, and prints what they need and whether they fit.

    python -m activedpo_jax.main --config configs/tldr_llama2_7b.py --compile_only=v5e:4x4

Nothing is run; the model's `config.json` and the options are read, and no weights, no tokenizer and no data.  For TPUs
`libtpu` (the extra `tpu`) brings the compiler.
"""

import pathlib
from collections.abc import Sequence

import ml_collections

from activedpo_jax import errors, files, layout, tasks
from activedpo_jax.compile_only import chips, remedies, table, topology
from activedpo_jax.compile_only.cost import Row, Target, measure
from activedpo_jax.compile_only.inventory import programs
from activedpo_jax.compile_only.topology import tpu_devices

__all__ = ["compile_for", "programs", "target_of", "tpu_devices"]


def target_of(text: str) -> Target:
    """What `--compile_only` names; see `topology.find_devices`."""
    devices = topology.find_devices(text)
    return Target(devices, chips.find(devices[0].device_kind), topology.memory_limit(devices[0]))


def compile_for(config: ml_collections.ConfigDict, text: str, folder: pathlib.Path | None = None) -> list[Row]:
    """Compiles every program of the run, prints a row as soon as it is compiled, and what a round costs at least.

    Programs that do not fit are compiled with other options, and those that make them fit are printed.

    Args:
      text: the topology: `v5e:4x4`, `v5p:2x2x1`, `2*v5e:4x4`, `cpu:8`.
      folder: where `compile_only.json`, the rows as numbers, is written; None: nowhere.

    Raises:
      ValueError: see `topology.find_devices`, `layout.make_mesh` and `tasks.outline`.
      SystemExit: with code 1, a program does not fit.
    """
    target = target_of(text)
    try:
        mesh = layout.make_mesh(config.mesh, target.devices)
    except AssertionError as error:  # JAX's, of topologies that it makes no mesh of
        raise ValueError(f"--compile_only={text}: JAX makes no mesh of these devices: {error}") from error
    task = tasks.outline(config, mesh)
    for words in table.describe(target, mesh, task.decoder.dtype):
        print(words)
    found, rows = programs(config, task, mesh), list[Row]()
    print(table.header(_WIDTH), flush=True)
    for program in found:
        rows.append(measure(program, target))
        print(table.line(rows[-1], target, _WIDTH), flush=True)
    for words in table.estimate(rows, target):
        print(words, flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "compile_only.json", {"topology": text} | table.as_json(rows, target))
    failed = [row for row in rows if row.fits is False]
    if failed:
        count = f"{len(failed)} of {len(rows)} programs do not fit"
        print(f"\n{count}; other options, tried by compiling these programs:", flush=True)
        errors.fail(f"{count} {text}: {_advice(config, target, failed)}", 1)
    if target.limit is not None:
        print(f"all {len(rows)} programs fit")
    return rows


_WIDTH = 44  # of the names


def _advice(config: ml_collections.ConfigDict, target: Target, failed: Sequence[Row]) -> str:
    for changes, rows in remedies.attempts(config, target, failed):
        given, largest = remedies.as_flags(changes), max(rows, key=lambda row: row.peak)
        if all(row.fits for row in rows):
            print(f"  {given}: they fit; the largest, {largest.name}, needs {table.in_bytes(largest.peak)}", flush=True)
            return f"they do with {given}"
        print(f"  {given}: {rows[-1].name} needs {table.in_bytes(rows[-1].peak)}, does not fit", flush=True)
    return "nor with any of the options tried; take more chips, smaller buckets or a smaller lora.rank"
