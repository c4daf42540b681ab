"""Rows as text for people, and as JSON for programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from activedpo_jax.compile_only import topology
from activedpo_jax.compile_only.cost import Row, Target, chip_seconds, pairs_per_second
from activedpo_jax.compile_only.program import OF_A_ROUND, ONCE

_COLUMNS = (
    *(("weights", 11), ("pool", 11), ("activations", 12), ("peak", 11), ("fits", 5), ("FLOPs", 10)),
    *(("collectives", 12), ("roofline", 10), ("bound", 8), ("pairs/s/chip", 13), ("compiled", 9)),
)


def header(width: int) -> str:
    return f"{'program':<{width}}" + "".join(f"{name:>{size}}" for name, size in _COLUMNS)


def line(row: Row, target: Target, width: int) -> str:
    """A row, in the columns of `header`."""
    rate = pairs_per_second(row, target)
    cells = (
        *(in_bytes(row.weights), in_bytes(row.pool)),
        *(("" if row.refusal and not row.activations else in_bytes(row.activations)), in_bytes(row.peak)),
        {True: "yes", False: "NO", None: "-"}[row.fits],
        *(f"{row.flops:.3g}" if row.flops else "", in_bytes(row.communicated) if row.communicated else ""),
        *(in_seconds(row.seconds) if row.seconds is not None else "", row.bound if row.seconds else ""),
        *(f"{rate:.3g}" if rate else "", f"{row.compiled_in:.0f} s"),
    )
    text = f"{row.name:<{width}}" + "".join(f"{c:>{size}}" for c, (_, size) in zip(cells, _COLUMNS, strict=True))
    return text if not row.refusal else f"{text}   {row.refusal}"


def describe(target: Target, mesh: Any, dtype: Any) -> list[str]:
    """What is compiled for, and what the columns mean."""
    devices, chip = target.devices, target.chip
    chips = topology.num_chips(list(devices))
    limit = "no limit of memory known" if target.limit is None else f"{in_bytes(target.limit)} for programs"
    of_chips = "" if chips == len(devices) else f" on {chips} chips"
    where = f"{devices[0].device_kind} × {len(devices)}{of_chips}"
    lines = [f"{where}, mesh {dict(mesh.shape)}, weights {dtype}; a device: {limit}"]
    if chip is not None:
        lines.append(
            f"peak numbers of a chip, published, not measured ({chip.source}): {chip.flops / 1e12:.0f} TFLOP/s in "
            f"bfloat16, {chip.memory / 1e9:.0f} GB at {chip.bandwidth / 1e9:.0f} GB/s, links "
            f"{chip.interconnect / 1e9:.0f} GB/s"
        )
        lines.append("roofline: the least time of a run at these; a run takes longer")
    else:
        lines.append("no peak numbers of this device are known: no roofline")
    lines.append("per device; pool: tokens, evidence and labels; FLOPs of matrix products, attention kernels left out")
    return lines


def estimate(rows: Sequence[Row], target: Target) -> list[str]:
    """The chip-seconds of each stage at peak numbers, summed from the rows times how often each program runs."""
    found = chip_seconds(rows, target)
    if not found:
        return []
    lines = ["", "chips × time at peak numbers, at least; all texts in the largest bucket; a round: the mean over all"]
    for stage in ONCE:
        if stage in found:
            lines.append(f"  {stage + ', once':<18}{_chip_time(found[stage])}")
    in_round = {stage: found[stage] for stage in OF_A_ROUND if stage in found}
    for stage, seconds in in_round.items():
        lines.append(f"  {stage:<18}{_chip_time(seconds)}")
    lines.append(f"  {'a round':<18}{_chip_time(sum(in_round.values()))}")
    return lines


def as_json(rows: Sequence[Row], target: Target) -> dict[str, Any]:
    """Everything that the table says, in bytes, FLOPs and seconds."""
    kept = [dataclasses.asdict(row) | {"pairs_per_second_per_chip": pairs_per_second(row, target)} for row in rows]
    return {
        "device": target.devices[0].device_kind,
        "devices": len(target.devices),
        "chips": topology.num_chips(list(target.devices)),
        "limit": target.limit,
        "peak_numbers": None if target.chip is None else target.chip._asdict(),
        "programs": kept,
        "chip_seconds": chip_seconds(rows, target),
    }


def in_bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def in_seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _chip_time(seconds: float) -> str:
    return f"{seconds:>12,.1f} chip-seconds{seconds / 3600:>12.3f} chip-hours"
