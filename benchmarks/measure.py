"""Timing side by side, and the record of it: what all benchmarks do alike."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from activedpo_jax.compile_only import chips

Contender = Callable[[], Any]
Times = dict[str, dict[str, list[float]]]  # of each contender: "seconds", "processor seconds"

_OF_CONTENDERS = {"results", "differences", "loss and gradient norm"}  # what a record has of each contender
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "peft", "trl", "traker")


def in_turns(contenders: Mapping[str, Contender], repeats: int) -> Times:
    """Wall and processor seconds of every run, the contenders in turn.

    Args:
      contenders: each has run before, as a warm-up, and returns when its work is done.
    """
    times: Times = {name: {"seconds": [], "processor seconds": []} for name in contenders}
    for repeat in range(repeats):
        for name, run in contenders.items():
            began, used = time.perf_counter(), time.process_time()
            run()
            times[name]["seconds"].append(time.perf_counter() - began)
            times[name]["processor seconds"].append(time.process_time() - used)
        print(f"repeat {repeat + 1} of {repeats}", flush=True)
    return times


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(several["seconds"]) for name, several in times.items()}


def peak_flops(dtype: str) -> float | None:
    """FLOP/s of the device as its maker publishes them; None where nothing is published for this dtype."""
    chip = chips.find(jax.devices()[0].device_kind)
    return chip.flops if chip is not None and dtype == "bfloat16" else None


def facts() -> dict[str, Any]:
    """The machine and the versions that a measurement was made with."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "load average": os.getloadavg(),
        "versions": versions,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def save(out: pathlib.Path | None, name: str, args: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Writes a measurement into a JSON file under a name; the file's others stay.

    If one of that name is there, of other contenders at the same work (`--only`) on the same device, the two become
    one: not all fit a device at once.
    """
    if out is None:
        return
    arguments = {key: value for key, value in vars(args).items() if key not in ("out", "directory")}
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(out.read_text()) if out.exists() else {}
    record = facts() | {"arguments": arguments, **found}
    before = kept.get(name, {})
    work = _work(record)
    if work is not None and work == _work(before) and not set(before["results"]) & set(record["results"]):
        for key in _OF_CONTENDERS & before.keys() & record.keys():
            record[key] = before[key] | record[key]
    out.write_text(json.dumps(kept | {name: record}, indent=1, default=str) + "\n")


def _work(record: Mapping[str, Any]) -> Any:
    """What was measured, and on what, whoever the contenders were; None where there were none."""
    arguments = {key: str(value) for key, value in record.get("arguments", {}).items() if key != "only"}
    return (arguments, record["device"]) if "results" in record else None


def table(times: Times, against: str, tokens: int, flops: float | None = None, peak: float | None = None) -> str:
    """Medians, spread, ratio to one contender, useful tokens a second and, with FLOPs and peak, utilisation."""
    found = medians(times)
    lines = [f"{'':<28}{'seconds':>10}{'spread':>20}{f'× {against}':>14}{'tokens/s':>11}{'MFU':>7}"]
    for name, median in found.items():
        spread = f"{min(times[name]['seconds']):.4f} – {max(times[name]['seconds']):.4f}"
        used = f"{flops / median / peak:.1%}" if flops and peak else ""
        ratio = median / found[against]
        lines.append(f"{name:<28}{median:>10.4f}{spread:>20}{ratio:>14.2f}{tokens / median:>11.0f}{used:>7}")
    return "\n".join(lines)
