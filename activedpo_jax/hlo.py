"""What a compiled program does, read from the text of its optimised HLO: collectives, products, loops.

XLA's own `cost_analysis` counts the body of a loop once; here everything counts as often as the loops around it run.
The text is that of `compiled.as_text()`, for CPU, GPU or TPU: the program of one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_RESULT = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_BEYOND = {"LT": 0, "LE": 1}  # by direction of a comparison: how far a loop goes beyond its bound


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program."""

    kind: str  # one of KINDS
    bytes: int  # of one device's operands or of its results in one call, whichever are larger
    count: int  # calls in one run of the program


class Array(NamedTuple):
    """The part of an array that one device holds."""

    dtype: str  # as HLO writes it: f32, bf16, s8
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """As stored without padding; codes of 4 bits are packed."""
        width = re.search(r"\d+", self.dtype)
        bits = int(width[0]) if width else 8 * (self.dtype == "pred")
        return -(-math.prod(self.shape) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    results: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]  # names
    literal: str  # what stands between the parentheses, such as a constant's value
    attributes: str
    is_root: bool

    @property
    def called(self) -> list[str]:
        """Computations that it calls once, the bodies of loops apart."""
        return [name.strip(" %{}") for _, names in _CALLED.findall(self.attributes) for name in names.split(",")]

    @property
    def number(self) -> int | None:
        """The value of a constant that is a whole number."""
        return int(self.literal) if self.opcode == "constant" and re.fullmatch(r"-?\d+", self.literal) else None

    def attribute(self, name: str) -> str:
        """Of the form `name=value` or `name={value}`; empty if there is none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1].strip("{}%") if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a module by name, each a list of instructions, and how often each of them runs."""

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        return {i.name: i for computation in self.computations.values() for i in computation}

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in one run of the program.

        Every branch of a conditional counts as taken, and the body of a loop whose number of iterations is known only
        at run time counts as run once.
        """
        counts = dict.fromkeys(self.computations, 0)
        for name in reversed(self._callees_first):
            counts[name] += name == self.entry
            for instruction in self.computations[name]:
                for callee, times in self._calls(instruction):
                    counts[callee] += counts[name] * times
        return counts

    @functools.cached_property
    def _callees_first(self) -> list[str]:
        """The computations that the entry reaches, callees before their callers."""
        order: dict[str, None] = {}

        def visit(name: str) -> None:
            if name in order:
                return
            for instruction in self.computations[name]:
                for callee, _ in self._calls(instruction):
                    visit(callee)
            order[name] = None

        visit(self.entry)
        return list(order)

    def _calls(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        if instruction.opcode == "while":
            yield instruction.attribute("body"), self.trip_count(instruction) or 1
        elif not instruction.opcode.endswith(("-update", "-done")):  # these name what their -start calls
            for name in instruction.called:
                if name in self.computations:
                    yield name, 1

    def trip_count(self, loop: Instruction) -> int | None:
        """Iterations of a `while`; None if only a run can tell."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        # Otherwise of a loop that counts from a constant to a constant by a constant.
        compare = self._source(self._root(loop.attribute("condition")))
        direction = compare.attribute("direction")
        place, bound = self._counter(compare), self._constant(compare)
        if compare.opcode != "compare" or direction not in _BEYOND or place is None or bound is None:
            return None
        step = self._source(self._element(self._root(loop.attribute("body")), place))
        first, by = self._source(self._element(loop.operands[0], place)).number, self._constant(step)
        if step.opcode != "add" or self._counter(step) != place or first is None or not by:
            return None
        return max(0, -(-(bound - first + _BEYOND[direction]) // by))

    def _root(self, computation: str) -> str:
        return next(i.name for i in self.computations[computation] if i.is_root)

    @functools.cached_property
    def _callers(self) -> dict[str, Instruction]:
        """Of each parameter of a fused or called computation, the instruction that gives it its value."""
        found: dict[str, Instruction] = {}
        for caller in self.instructions.values():
            for name in caller.called if caller.opcode in ("fusion", "call") else ():
                found |= {i.name: caller for i in self.computations[name] if i.opcode == "parameter"}
        return found

    def _source(self, name: str) -> Instruction:
        """The instruction that a value comes from, behind copies, fusions and calls."""
        while True:
            found = self.instructions[name]
            if found.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
                name = found.operands[0]
            elif found.opcode in ("fusion", "call"):
                name = self._root(found.called[0])
            elif found.opcode == "parameter" and name in self._callers:
                name = self._callers[name].operands[int(found.literal)]
            else:
                return found

    def _element(self, name: str, place: int) -> str:
        """The value at a place of a tuple."""
        found = self._source(name)
        return found.operands[place] if found.opcode == "tuple" else name

    def _counter(self, instruction: Instruction) -> int | None:
        """The place, in the state of a loop, of the element that the instruction takes."""
        places = (self._source(o).attribute("index") for o in instruction.operands)
        return next((int(place) for place in places if place), None)

    def _constant(self, instruction: Instruction) -> int | None:
        """The constant that the instruction takes."""
        numbers = (self._source(o).number for o in instruction.operands)
        return next((number for number in numbers if number is not None), None)


def parse(text: str) -> Program:
    """The computations of a module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if line and not line[0].isspace():
            if header := _HEADER.match(line):
                current = computations[header[2]] = []
                entry = header[2] if header[1] else entry
        elif result := _RESULT.match(line):
            current.append(_instruction(line[result.end() :], result[2], bool(result[1])))
    if not entry:
        raise ValueError("no ENTRY computation: expected the text of an optimised HLO module, of compiled.as_text()")
    return Program(computations, entry)


def collectives(text: str) -> list[Collective]:
    """Every collective operation of a program, with its bytes in one device and its calls; see `Program.runs`."""
    program = parse(text)
    found, chains = [], set()
    for name, times in program.runs.items():
        for instruction in program.computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or not times:
                continue
            # On TPU, one collective that runs beside several fusions stands in each of them.
            if chain := re.search(r"chain_id=\"?(\d+)", instruction.attributes):
                if (key := (kind, instruction.attribute("channel_id"), chain[1])) in chains:
                    continue
                chains.add(key)
            # An all-reduce that a slice follows, fused.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
            given = sum(x.bytes for o in instruction.operands for x in program.instructions[o].results)
            made = sum(x.bytes for x in instruction.results)
            if instruction.opcode in ("all-gather-start", "collective-permute-start"):
                made -= given  # its result holds the operands too
            found.append(Collective(kind, max(given, made), times))
    return found


def flops(text: str) -> float:
    """Floating-point operations of one device in its matrix products and convolutions, a multiply-add as two.

    Kernels that XLA does not see into (custom calls, such as fused attention) are not counted.
    """
    program, total = parse(text), 0.0
    for name, times in program.runs.items():
        for instruction in program.computations[name] if times else ():
            if instruction.opcode in ("dot", "convolution"):
                shapes = [program.instructions[o].results[0].shape for o in instruction.operands]
                count = _dot_flops if instruction.opcode == "dot" else _convolution_flops
                total += times * count(instruction, *shapes)
    return total


def _instruction(rest: str, name: str, is_root: bool) -> Instruction:
    """`TYPE opcode(operands), attributes`."""
    end = _closed(rest, 0) if rest[0] == "(" else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closed(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    return Instruction(
        name=name,
        results=tuple(_arrays(kind)),
        opcode=rest[:opening],
        operands=tuple(_NAME.findall(inside)),
        literal=inside,
        attributes=rest[closing:],
        is_root=is_root,
    )


def _closed(text: str, opening: int) -> int:
    """The place behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"HLO with a parenthesis that is never closed: {text[:200]!r}")


def _arrays(kind: str) -> Iterator[Array]:
    for dtype, sizes in _ARRAY.findall(kind):
        yield Array(dtype, tuple(int(n.strip("<=")) for n in sizes.split(",") if n))


def _dot_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    contracted = instruction.attribute("lhs_contracting_dims")
    depth = math.prod(left[int(d)] for d in contracted.split(",") if d)
    return 2.0 * math.prod(instruction.results[0].shape) * depth


def _convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Products with real entries alone: TPU writes batched products as convolutions over mostly padding."""
    labels = re.split(r"_|->", instruction.attribute("dim_labels"))
    inputs, kernel, outputs = (
        dict(zip(label, shape, strict=True))
        for label, shape in zip(labels, (left, right, instruction.results[0].shape), strict=True)
    )
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute("window")))
    spatial = sorted(label for label in outputs if label.isdigit())
    total = 2.0 * outputs["b"] * outputs["f"] * kernel["i"]
    for i, axis in enumerate(spatial):

        def setting(name: str, default: int, i: int = i) -> int:
            return int(window[name].split("x")[i]) if name in window else default

        low = int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0
        stride, spread = setting("stride", 1), setting("lhs_dilate", 1)
        taps, gap = kernel[axis], setting("rhs_dilate", 1)
        last = (inputs[axis] - 1) * spread
        places = (out * stride + tap * gap - low for out in range(outputs[axis]) for tap in range(taps))
        total *= sum(0 <= place <= last and place % spread == 0 for place in places)
    return total
