"""Plot frames as text: scales, ticks, and marks in an SVG that stretches to the room there is.

The SVG is drawn in thousandths of the plot area and stretched (`preserveAspectRatio="none"`); labels are
HTML on top of it. So one static page fits a phone and a wide screen without a script and without shrinking
its letters. A dot is a stroke without length and with round ends: unlike a circle, it stays round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_RAIL = 110  # thousandths of the height for marks that have no place on the y axis
_FENCE = 3.0  # Tukey's "far out", in interquartile ranges


def number(value: float) -> str:
    """A metric in few characters: 0.9889, 3184.38, 1.2e-06."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.2f}" if 10 <= abs(value) < 1e5 else f"{value:.4g}"


# -- scales --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Where a value lies between `low` and `high`, and which values are labelled."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """0 at `low`, 1 at `high`; beyond them it goes on."""
        if self.log:
            if value <= 0:
                return -1.0
            return math.log(value / self.low) / (math.log(self.high / self.low) or 1.0)
        return (value - self.low) / ((self.high - self.low) or 1.0)


def linear(low: float, high: float, *, count: int = 5, whole: bool = False) -> Scale:
    """Ticks at 1, 2 or 5 times a power of ten; `whole`: at whole numbers only."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    step = _nice((high - low) / count)
    step = max(1.0, step) if whole else step
    if not math.isfinite(step) or step == 0.0 or low + step == low:  # beyond what floats can part
        return Scale(low, high, [(low, f"{low:.3g}"), (high, f"{high:.3g}")])
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    large = max(abs(low), abs(high)) >= 1e6 or decimals > 6
    values = [i * step for i in range(first, last + 1)]
    return Scale(low, high, [(v, f"{v:.3g}" if large else f"{v:,.{decimals}f}") for v in values])


def _nice(step: float) -> float:
    if not math.isfinite(step) or step <= 0:
        return math.inf
    power = 10.0 ** math.floor(math.log10(step))
    return next((m * power for m in (1, 2, 5) if step <= m * power * 1.0001), 10 * power)


def logarithmic(low: float, high: float) -> Scale:
    """Ticks at powers of ten, and between them where there are few."""
    if high <= low:
        low, high = low / 2, high * 2
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        every = math.ceil((last - first + 1) / 6)
        raised = first < -2 or last > 3
        powers = range(first, last + 1, every)
        texts = [f"10{str(p).translate(_SUPERSCRIPT)}" if raised else f"{10.0**p:g}" for p in powers]
        return Scale(low, high, [(10.0**p, text) for p, text in zip(powers, texts, strict=True)], True)
    fine = [m * 10.0**p for p in range(first - 1, last + 1) for m in (1, 2, 5)]
    shown = [v for v in fine if low * 0.999 <= v <= high * 1.001] or [low, high]
    return Scale(low, high, [(v, f"{v:,.0f}" if 1e3 <= v < 1e6 else f"{v:.3g}") for v in shown], True)


def options(labels: Sequence[str]) -> Scale:
    """One place a label; value i is the i-th."""
    return Scale(-0.5, len(labels) - 0.5, [(float(i), label) for i, label in enumerate(labels)])


def seconds(high: float) -> Scale:
    """From zero, in seconds, minutes or hours."""
    unit, name = next(((u, n) for u, n in ((3600, "h"), (60, "min")) if high >= 2 * u), (1, "s"))
    inner = linear(0.0, max(high, 1e-3) / unit)
    ticks = [(value * unit, f"{text} {name}") for value, text in inner.ticks]
    return Scale(0.0, inner.high * unit, ticks)


def robust(values: Sequence[float], direction: str) -> tuple[Scale, int]:
    """A scale for scores or a metric, and how many values are worse than it shows.

    A few diverged trials would flatten all others, so values far out on the worse side may be cut off.
    """
    ordered = sorted(v for v in values if math.isfinite(v))
    if not ordered:
        return linear(0.0, 1.0), 0
    low, high = ordered[0], ordered[-1]
    q1, q3 = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    if len(ordered) >= 8 and q3 > q1:
        if direction == "maximize":
            inner = min(v for v in ordered if v >= q1 - _FENCE * (q3 - q1))
            low = inner if high - low > 2 * (high - inner) else low
        else:
            inner = max(v for v in ordered if v <= q3 + _FENCE * (q3 - q1))
            high = inner if high - low > 2 * (inner - low) else high
    cut = sum(v < low or v > high for v in ordered)
    if low > 0 and high > 100 * low:
        room = (high / low) ** 0.04
        return logarithmic(low / room, high * room), cut
    room = (high - low) * 0.05
    return linear(low - room, high + room), cut


# -- marks and frames ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """A plot area. With a `rail`, values without a place on the y axis are drawn on a strip below it."""

    x: Scale
    y: Scale
    rail: str = ""

    def px(self, value: float, keep: bool = True) -> int:
        return _thousandths(self.x.at(value), keep)

    def py(self, value: float | None, keep: bool = True) -> int:
        """`keep`: a value beyond the scale is drawn at its edge; otherwise it leaves the frame."""
        height = 1000 - (_RAIL if self.rail else 0)
        if value is None:
            return 1000 - _RAIL // 2
        return round((1000 - _thousandths(self.y.at(value), keep)) * height / 1000)

    def dot(self, x: float, y: float | None, style: str, trial: int) -> str:
        """A dot; on the rail, a tick."""
        at = f"M{self.px(x)} {self.py(y)}h0"
        if y is None:
            at = f"M{self.px(x)},{1000 - _RAIL * 3 // 4} {self.px(x)},{1000 - _RAIL // 4}"
            return f'<path class="bar tick {style}" data-t="{trial}" d="{at}"/>'
        ring = "".join(f'<path class="{name}" d="{at}"/>' for name in ("ring", "ring gap"))
        ring = ring if "best" in style.split() else ""
        return f'{ring}<path class="d {style}" data-t="{trial}" d="{at}"/>'

    def draw(
        self,
        marks: str,
        *,
        label: str,
        x_label: str,
        y_label: str,
        height: int = 260,
        style: str = "",
        may_tilt: bool = False,
    ) -> str:
        """The plot as HTML. `label` is what a screen reader says; texts are escaped here, marks are not.

        `may_tilt`: the labels of the x axis are texts, and are tilted where they would meet.
        """
        grid = "".join(f"M0 {self.py(v)}H1000" for v, _ in self.y.ticks)
        grid += "".join(f"M{self.px(v)} 0V1000" for v, _ in self.x.ticks)
        y_marks = [(self.py(v) / 10, text) for v, text in self.y.ticks]
        if self.rail:
            y_marks.append((self.py(None) / 10, self.rail))
        columns = max((len(text) for _, text in y_marks), default=1)
        tilted = may_tilt and sum(len(text) + 2 for _, text in self.x.ticks) > 38
        longest = max((len(text) for _, text in self.x.ticks), default=1)
        size = f"--h:{height}px;--w:{columns}ch;--x:{longest if tilted else 0}ch"
        rail = f'<i class="rail" style="height:{_RAIL / 10}%"></i>' if self.rail else ""
        return (
            f'<div class="plot {style}{" tilted" if tilted else ""}" style="{size}">'
            f'<div class="yl">{escape(y_label)}</div>'
            f'<div class="yt">{_labels("top", y_marks)}</div>'
            f'<div class="area">{rail}<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(label)}"><path class="g" d="{grid}"/>{marks}</svg></div>'
            f'<div class="xt">{_labels("left", [(self.px(v) / 10, t) for v, t in self.x.ticks])}</div>'
            f'<div class="xl">{escape(x_label)}</div></div>'
        )


def polyline(points: Sequence[tuple[int, int]], style: str, trial: int | None) -> str:
    """A line through points in thousandths of the frame."""
    if not points:
        return ""
    places = " ".join(f"{x},{y}" for x, y in points)
    whose = "" if trial is None else f' data-t="{trial}"'
    return f'<path class="l {style}"{whose} d="M{places}{"h0" if len(points) == 1 else ""}"/>'


def _labels(side: str, marks: Sequence[tuple[float, str]]) -> str:
    return "".join(f'<span style="{side}:{at:g}%">{escape(text)}</span>' for at, text in marks)


def _thousandths(fraction: float, keep: bool) -> int:
    if math.isnan(fraction):
        return 0
    limits = (0.0, 1.0) if keep else (-20.0, 20.0)
    return round(1000 * min(max(fraction, limits[0]), limits[1]))
