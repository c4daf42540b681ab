"""What a compiled program needs of each device: bytes, FLOPs, bytes to other devices, and the least time for them.

All of it is read off the compiler's result; nothing has run.
"""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from activedpo_jax import hlo
from activedpo_jax.compile_only import topology
from activedpo_jax.compile_only.chips import Chip
from activedpo_jax.compile_only.program import Program
from activedpo_jax.compile_only.shapes import device_bytes


class Target(NamedTuple):
    """What is compiled for."""

    devices: Sequence[Any]
    chip: Chip | None  # None: no peak numbers are known of it
    limit: float | None  # bytes of a device; None: the compiler sets none

    @property
    def per_chip(self) -> float:
        """Devices a chip: each has its part of the peak numbers."""
        return len(self.devices) / topology.num_chips(list(self.devices))


@dataclasses.dataclass(frozen=True)
class Row:
    """One program on one device.  Bytes, FLOPs and seconds are of one run of it."""

    name: str
    stage: str
    runs: float  # see `program.Program`
    pairs: int
    weights: float  # bytes of all weights that lie there meanwhile, arguments of the program or not
    pool: float  # bytes of everything else that does: tokens, evidence, labels
    activations: float  # bytes of temporary arrays
    peak: float  # bytes, all together
    fits: bool | None  # None: there is no limit
    flops: float = 0.0  # of matrix products, bodies of loops as often as they run
    traffic: float = 0.0  # bytes from and to the device's memory, at least; see `_least_traffic`
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes, by kind
    seconds: float | None = None  # at the chip's peak numbers, which no program reaches
    bound: str = ""  # the peak number that decides: compute, memory or links
    compiled_in: float = 0.0  # seconds, on this machine
    refusal: str = ""  # of the compiler

    @property
    def communicated(self) -> float:
        return sum(self.collectives.values())


def measure(program: Program, target: Target) -> Row:
    """Compiles a program, unless its weights and data alone outgrow a device."""
    weights, pool = device_bytes(program.weights), device_bytes(program.data)
    lying = Row(program.name, program.stage, program.runs, program.pairs, weights, pool, 0.0, weights + pool, None)
    if target.limit is not None and lying.peak > target.limit:
        return dataclasses.replace(lying, fits=False, refusal="not compiled: weights and pool alone do not fit")
    clock = time.perf_counter()
    try:
        compiled = program.function.lower(*program.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        needed = topology.used_bytes(message) or lying.peak
        elsewhere = max(0.0, weights + pool - device_bytes(program.arguments))
        seconds, refusal = time.perf_counter() - clock, message.splitlines()[0]
        peak, activations = needed + elsewhere, max(0.0, needed + elsewhere - weights - pool)
        return dataclasses.replace(
            lying, activations=activations, peak=peak, fits=False, compiled_in=seconds, refusal=refusal
        )
    seconds = time.perf_counter() - clock
    memory, text = compiled.memory_analysis(), with_loop_length(compiled.as_text(), program.iterations)
    new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # On TPUs arguments are padded to tiles.  Those that the program has no use for are not in the compiler's number.
    padding = max(0.0, memory.argument_size_in_bytes - device_bytes(program.arguments))
    peak = weights + pool + padding + new
    collectives: dict[str, float] = {}
    for found in hlo.collectives(text):
        collectives[found.kind] = collectives.get(found.kind, 0.0) + found.bytes * found.count
    row = dataclasses.replace(
        lying,
        activations=float(new),
        peak=peak,
        fits=None if target.limit is None else peak <= target.limit,
        flops=hlo.flops(text),
        traffic=_least_traffic(program, memory, sum(collectives.values())),
        collectives=collectives,
        compiled_in=seconds,
    )
    return _timed(row, target)


def with_loop_length(text: str, iterations: int) -> str:
    """HLO whose loops of unknown length say that they run so often, as others do; 0: as it is, and they count once.

    Sampling ends when every response has ended, which only a run can tell: at the longest, after all tokens.
    """
    if not iterations:
        return text
    program = hlo.parse(text)
    loops = {i.name for i in program.instructions.values() if i.opcode == "while" and program.trip_count(i) is None}

    def marked(line: str) -> str:
        name = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        known = f', backend_config={{"known_trip_count":{{"n":"{iterations}"}}}}'
        return line + known if name and name[1] in loops else line

    return "\n".join(map(marked, text.splitlines()))


def _least_traffic(program: Program, memory: Any, communicated: float) -> float:
    """Bytes that have to pass between a device and its memory: arguments and results once, temporaries and what comes
    from other devices once each way, and what each iteration of sampling reads anew."""
    once = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return once + 2 * (memory.temp_size_in_bytes + communicated) + program.iterations * program.reread


def _timed(row: Row, target: Target) -> Row:
    """The roofline (Williams, Waterman & Patterson 2009): the slowest of three peak numbers, each fully used."""
    if target.chip is None:
        return row
    times = {
        "compute": row.flops / target.chip.flops,
        "memory": row.traffic / target.chip.bandwidth,
        "links": row.communicated / target.chip.interconnect,
    }
    bound = max(times, key=lambda name: times[name])
    return dataclasses.replace(row, seconds=times[bound] * target.per_chip, bound=bound)


def pairs_per_second(row: Row, target: Target) -> float | None:
    """Pairs a second and chip, at peak numbers."""
    if not row.seconds or not row.pairs:
        return None
    return row.pairs / row.seconds / topology.num_chips(list(target.devices))


def chip_seconds(rows: Sequence[Row], target: Target) -> dict[str, float]:
    """The chip-seconds of each stage: of a round, the mean over all rounds; of the stages before them, of the run.

    Programs that do not fit, or have no roofline, count nothing.
    """
    chips, found = topology.num_chips(list(target.devices)), dict[str, float]()
    for row in rows:
        if row.seconds is not None:
            found[row.stage] = found.get(row.stage, 0.0) + row.runs * row.seconds * chips
    return found
