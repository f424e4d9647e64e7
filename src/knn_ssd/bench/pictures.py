"""The charts of the report, as SVG: colours follow the page's theme, and no plotting library is needed.

This module knows nothing of records and methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

from knn_ssd.plan import Plan
from knn_ssd.routing.projection import Points

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes of a line chart.

    Args:
        title: title of the horizontal axis.
        unit: unit of the vertical axis.
        marked: value of the vertical axis with a dashed line, if any.
        min_top: smallest upper end of the vertical axis.
        unsteady: number of first points of a curve that may lie above the upper end.
        dots: whether points are marked.
    """

    title: str
    unit: str = ""
    marked: float | None = None
    min_top: float = 1.2
    unsteady: int = 0
    dots: bool = False


def legend(names: Sequence[str], colours: Mapping[str, str]) -> str:
    """The legend of a chart."""
    items = "".join(f"<li><i style='background:{colours[name]}'></i>{escape(name)}</li>" for name in names)
    return f"<ul class=key>{items}</ul>"


def bars(rows: Sequence[tuple[str, float | None, Sequence[float] | None, str]], reach: float = 0.0) -> str:
    """Horizontal bars with error bars and a line at 1; the axis extends to `reach` or further."""
    known = [(name, value, bounds, colour) for name, value, bounds, colour in rows if value is not None]
    most = max([1.2, reach, *(bounds[1] if bounds else value for _, value, bounds, _ in known)]) * 1.05
    left = max([88, *(16 + 7 * len(name) for name, *_ in known)])  # some 7 units a letter
    width, row = 280, 26
    scale = width / most
    height = row * len(known) + 24
    parts = [f"<line class=axis x1={left} y1=0 x2={left} y2={height - 20} />"]
    for i, (name, value, bounds, colour) in enumerate(known):
        y = i * row + 4
        parts.append(f"<text x={left - 8} y={y + 14} text-anchor=end>{escape(name)}</text>")
        parts.append(f"<rect x={left} y={y} width={value * scale:.1f} height=18 rx=2 style='fill:{colour}' />")
        end = value
        if bounds:
            low, high = (left + bound * scale for bound in bounds)
            parts.append(
                f"<path d='M{low:.1f} {y + 9}H{high:.1f}M{low:.1f} {y + 5}v8M{high:.1f} {y + 5}v8' "
                "style='stroke:var(--ink);fill:none' />"
            )
            end = max(value, bounds[1])
        parts.append(f"<text x={left + end * scale + 8:.1f} y={y + 14}>{value:.2f}x</text>")
    one = left + scale
    parts.append(f"<line class=one x1={one:.1f} y1=0 x2={one:.1f} y2={height - 20} />")
    parts.append(f"<text class=small x={one:.1f} y={height - 5} text-anchor=middle>1x</text>")
    return _svg(left + width + 54, height, "speed-ups", parts)


def lines(curves: Mapping[str, Sequence[Point]], colours: Mapping[str, str], axes: Axes) -> str:
    """A line chart with one curve for each name."""
    left, width, height = 44, 370, 200
    last = max(x for curve in curves.values() for x, _ in curve)
    first = min(x for curve in curves.values() for x, _ in curve)
    top = max([axes.min_top, *(y for curve in curves.values() for _, y in curve[axes.unsteady :])]) * 1.05

    def place(point: Point) -> str:
        across = (point[0] - first) / max(last - first, 1)
        return f"{left + width * across:.1f},{height - height * min(point[1], top) / top:.1f}"

    parts = []
    step = next(step for power in count() for step in (0.5 * 10**power, 10**power, 2 * 10**power) if top / step <= 8)
    for tick in (step * i for i in range(int(top / step) + 1)):
        style, y = "one" if tick == axes.marked else "axis", height - height * tick / top
        parts.append(f"<line class={style} x1={left} y1={y:.1f} x2={left + width} y2={y:.1f} />")
        parts.append(f"<text class=small x={left - 8} y={y + 4:.1f} text-anchor=end>{tick:g}{axes.unit}</text>")
    for name, curve in curves.items():
        points = " ".join(place(point) for point in curve)
        parts.append(f"<polyline points='{points}' style='fill:none;stroke:{colours[name]};stroke-width:2' />")
        if axes.dots:
            for point in curve:
                across, up = place(point).split(",")
                parts.append(f"<circle cx={across} cy={up} r=3 style='fill:{colours[name]}' />")
    parts.append(f"<text class=small x={left} y={height + 18}>{first:g}</text>")
    parts.append(f"<text class=small x={left + width} y={height + 18} text-anchor=end>{axes.title}: {last:g}</text>")
    return _svg(left + width + 10, height + 34, axes.title, parts, top=-8)


def stacked_bars(rows: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], unit: str, marked: float) -> str:
    """Horizontal stacked bars with their sums, and a dashed line at the floor `marked`."""
    left, width, row = 88, 280, 26
    most = max([marked, *(sum(parts.values()) for parts in rows.values())]) * 1.05
    scale, height = width / most, row * len(rows) + 24
    parts = []
    for i, (name, own) in enumerate(rows.items()):
        y, x = i * row + 4, float(left)
        parts.append(f"<text x={left - 8} y={y + 14} text-anchor=end>{escape(name)}</text>")
        for part, value in own.items():
            parts.append(f"<rect x={x:.1f} y={y} width={value * scale:.1f} height=18 style='fill:{colours[part]}' />")
            x += value * scale
        parts.append(f"<text x={x + 8:.1f} y={y + 14}>{sum(own.values()):.1f} {unit}</text>")
    at = left + marked * scale
    parts.append(f"<line class=one x1={at:.1f} y1=0 x2={at:.1f} y2={height - 20} />")
    parts.append(f"<text class=small x={at:.1f} y={height - 5} text-anchor=middle>floor {marked:.1f} {unit}</text>")
    return _svg(left + width + 76, height, "where the time goes", parts)


def scatter(points: Points, colours: Mapping[str, str]) -> str:
    """Prompts as small dots and anchors as large ones, coloured by domain."""
    size, edge, parts = 340, 12, []
    for index, ((x, y), domain) in enumerate(zip(points.places, points.domains, strict=True)):
        at = f"cx={edge + float(x) * (size - 2 * edge):.1f} cy={edge + (1 - float(y)) * (size - 2 * edge):.1f}"
        if index < points.num_prompts:
            parts.append(f"<circle {at} r=3 style='fill:{colours[domain]};fill-opacity:.55' />")
        else:
            parts.append(f"<circle {at} r=6 style='fill:{colours[domain]};stroke:var(--ink);stroke-width:1.5' />")
    return _svg(size, size, "prompts and anchors", parts)


def mode_map(plans: Mapping[str, Plan]) -> str:
    """The mode of every sublayer in each plan: attention above, MLP below."""
    layers = max(plan.num_layers for plan in plans.values())
    left, cell = 116, max(6.0, 300 / layers)
    parts = []
    for i, (name, plan) in enumerate(plans.items()):
        y = i * 34 + 2
        parts.append(f"<text x={left - 8} y={y + 17} text-anchor=end>{escape(name)}</text>")
        for line, modes in enumerate((plan.attention, plan.mlp)):
            for layer, mode in enumerate(modes):
                parts.append(
                    f"<rect class=m-{mode.value} x={left + layer * cell:.1f} y={y + 13 * line} width={cell - 1:.1f} "
                    f"height=12><title>layer {layer} {'mlp' if line else 'attention'}: {mode.value}</title></rect>"
                )
    return _svg(left + int(layers * cell) + 4, 34 * len(plans), "modes by sublayer", parts)


def _svg(width: float, height: float, label: str, parts: Sequence[str], top: float = 0) -> str:
    """An SVG element. Text comes last, so that no line is drawn across it."""
    drawn = "".join(sorted(parts, key=lambda part: part.startswith("<text")))
    return f"<svg viewBox='0 {top:g} {width:g} {height:g}' role=img aria-label='{label}'>{drawn}</svg>"
