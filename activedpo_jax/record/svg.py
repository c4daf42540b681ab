"""Drawings for a page, as SVG that takes its colours from the page's style, so that they follow its theme.

Strategies have the classes `s0`, `s1`, ...; a value under the pointer is said by its `<title>`.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from activedpo_jax.record.report import spread

_WIDTH, _LEFT, _RIGHT, _TOP = 760, 64, 150, 16


class Line(NamedTuple):
    """One strategy's curve; `low` and `high` are None where there is no band."""

    name: str
    style: int  # of the classes
    values: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]


class Span(NamedTuple):
    """An interval around a value; limits are None where there is none."""

    name: str
    style: int
    value: float
    low: float | None
    high: float | None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def curves(label: str, x: Sequence[float], lines: Sequence[Line], x_label: str, y_label: str, height: int = 380) -> str:
    """Curves with bands and their names at the right."""
    bottom, right = height - 46, _WIDTH - _RIGHT
    known = [v for line in lines for several in (line.values, line.low, line.high) for v in several if v is not None]
    low, high = min(known), max(known)
    room = 0.06 * (high - low) or 0.05
    low, high = low - room, high + room

    def px(value: float) -> float:
        return _LEFT + (value - x[0]) / ((x[-1] - x[0]) or 1) * (right - _LEFT)

    def py(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - _TOP)

    out = [_head(label, height)]
    for value in ticks(low, high):
        y = py(value)
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    whole = [value for value in ticks(x[0], x[-1], 8) if value == round(value)] if x[-1] > x[0] else [x[0]]
    for value in whole:
        out.append(f'<text class="tick" x="{px(value):.1f}" y="{bottom + 20}" text-anchor="middle">{value:g}</text>')
    middle = (_LEFT + right) / 2
    out.append(f'<text class="axis" x="{middle:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(16 {(bottom + _TOP) / 2:.0f}) rotate(-90)"'
    out.append(f'<text class="axis" {turned} text-anchor="middle">{escape(y_label)}</text>')
    for line in lines:
        upper = [(px(a), py(b)) for a, b in zip(x, line.high, strict=True) if b is not None]
        lower = [(px(a), py(b)) for a, b in zip(x, line.low, strict=True) if b is not None]
        if upper:
            out.append(f'<polygon class="band s{line.style}" points="{_points([*upper, *reversed(lower)])}"/>')
    for line in lines:
        points = [(px(a), py(b)) for a, b in zip(x, line.values, strict=True)]
        out.append(f'<polyline class="line s{line.style}" points="{_points(points)}"/>')
        for i, (a, b) in enumerate(points):
            says = f"{line.name}, {x_label} {x[i]:g}: {line.values[i]:.3f}"
            if line.low[i] is not None:
                says += f" ({line.low[i]:.3f} to {line.high[i]:.3f})"
            title = f"<title>{escape(says)}</title>"
            out.append(f'<circle class="dot s{line.style}" cx="{a:.1f}" cy="{b:.1f}" r="4">{title}</circle>')
    places = spread({f"{i}": -py(line.values[-1]) for i, line in enumerate(lines)}, 17)
    for i, line in enumerate(lines):
        y, end = -places[f"{i}"], py(line.values[-1])
        out.append(f'<line class="lead s{line.style}" x1="{right + 6}" y1="{end:.1f}" x2="{right + 16}" y2="{y:.1f}"/>')
        out.append(f'<text class="name s{line.style}" x="{right + 20}" y="{y + 4:.1f}">{escape(line.name)}</text>')
    return "".join([*out, "</svg>"])


def intervals(label: str, spans: Sequence[Span], margin: float, x_label: str) -> str:
    """Differences with their intervals, one below the other, over the margin within which they count as none."""
    row, left, right = 44, 150, _WIDTH - 24
    bottom = _TOP + row * len(spans)
    known = [0.0, -margin, margin, *(v for s in spans for v in (s.value, s.low, s.high) if v is not None)]
    low, high = min(known), max(known)
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    out = [_head(label, bottom + 46)]
    width = px(margin) - px(-margin)
    out.append(f'<rect class="margin" x="{px(-margin):.1f}" y="{_TOP}" width="{width:.1f}" height="{bottom - _TOP}"/>')
    for value in ticks(low, high, 7):
        x, number = px(value), f"{value:+.3g}" if value else "0"
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{number}</text>')
    out.append(f'<line class="zero" x1="{px(0):.1f}" x2="{px(0):.1f}" y1="{_TOP}" y2="{bottom}"/>')
    for i, span in enumerate(spans):
        y = _TOP + row * (i + 0.5)
        out.append(f'<text class="name s{span.style}" x="{left - 12}" y="{y + 4:.0f}" text-anchor="end">')
        out.append(f"{escape(span.name)}</text>")
        says = f"{span.name}: {span.value:+.3f}"
        if span.low is not None and span.high is not None:
            says += f" ({span.low:+.3f} to {span.high:+.3f})"
            ends = f'x1="{px(span.low):.1f}" x2="{px(span.high):.1f}"'
            out.append(f'<line class="span s{span.style}" {ends} y1="{y:.0f}" y2="{y:.0f}"/>')
        title = f"<title>{escape(says)}</title>"
        out.append(f'<circle class="dot s{span.style}" cx="{px(span.value):.1f}" cy="{y:.0f}" r="6">{title}</circle>')
    out.append(f'<text class="axis" x="{(left + right) / 2:.0f}" y="{bottom + 40}" text-anchor="middle">')
    return "".join([*out, f"{escape(x_label)}</text></svg>"])


def heat_map(
    label: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], unit: str
) -> str:
    """Shares from 0 to 1 as cells, the largest of which is the darkest; None: no cell."""
    left, cell = 230, min(130.0, (_WIDTH - 240) / max(1, len(columns)))
    height, top = 38, 30
    most = max((v for row in values for v in row if v is not None), default=0.0) or 1.0
    out = [_head(label, top + height * len(rows) + 8)]
    for j, column in enumerate(columns):
        x = left + cell * (j + 0.5)
        short = column if len(column) <= cell / 6.5 else column[: max(1, int(cell / 6.5) - 1)] + "…"
        out.append(
            f'<text class="tick" x="{x:.1f}" y="{top - 10}" text-anchor="middle"><title>{escape(column)}</title>'
        )
        out.append(f"{escape(short)}</text>")
    for i, row in enumerate(rows):
        y = top + height * i
        out.append(f'<text class="tick" x="{left - 10}" y="{y + 23}" text-anchor="end">{_cut(row, left)}</text>')
        for j, value in enumerate(values[i]):
            if value is None:
                continue
            x, strength = left + cell * j, value / most
            says = f"{row}, {columns[j]}: {value:.0%} {unit}"
            shape = f'x="{x + 1:.1f}" y="{y + 1}" width="{cell - 2:.1f}" height="{height - 2}" rx="4"'
            title = f"<title>{escape(says)}</title>"
            out.append(f'<rect class="cell" {shape} fill-opacity="{0.06 + 0.94 * strength:.3f}">{title}</rect>')
            ink = "ink" if strength > 0.55 else "tick"
            out.append(
                f'<text class="{ink}" x="{x + cell / 2:.1f}" y="{y + 24}" text-anchor="middle">{value:.0%}</text>'
            )
    return "".join([*out, "</svg>"])


def _head(label: str, height: float) -> str:
    name = escape(label, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{name}">'


def _cut(text: str, width: float) -> str:
    """As much of a text as there is room for; the whole of it under the pointer."""
    room = max(2, int(width / 7))
    short = text if len(text) <= room else f"{text[: room - 1]}…"
    return f"{escape(short)}<title>{escape(text)}</title>"


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
