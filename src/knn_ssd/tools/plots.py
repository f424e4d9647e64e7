"""The picture of an atlas: where prompts and anchors lie, and what each domain's plan skips.

It lays such a page out for few or many domains and layers. It knows nothing of models, calibration or the command
line. matplotlib is an extra, imported inside and used without pyplot, so that nothing global changes.

The page is laid out in inches: a map of the vectors on top, the skip map under it, and every text placed by its
measured width, because domains are the user's and layers may be four or eighty.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knn_ssd.atlas import Atlas
from knn_ssd.errors import UsageError
from knn_ssd.io import writing
from knn_ssd.plan import Mode, Plan
from knn_ssd.routing.projection import Points, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")

_DPI = 200

# Paul Tol's muted scheme, safe for the colour-blind; domains beyond the ninth change the shape of the mark.
_COLOURS = ("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
_SHAPES = ("o", "^", "s", "D", "v")
_MODE_COLOURS = {Mode.KEEP: "#E3E6EA", Mode.SKIP: "#1F2A36", Mode.LOW: "#F0A33F"}  # apart in lightness too
_INK, _GREY, _LINE = "#1B1F24", "#68707A", "#C9CED4"

# Inches.
_MARGIN = 0.4
_HEADER = 0.85
_PANEL_TITLE = 0.62
_GAP = 0.2
_MAP_HEIGHT, _MAP_WIDTH = 4.4, 6.2
_CELL_HEIGHT, _ROW_PITCH = 0.16, 0.48
_BEFORE_FALLBACK = 0.1
_AXIS = 0.5
_LONGEST_LABEL = 28  # characters
_SKIP_CAPTION = "a column is a layer, a cell one of its two sublayers; verification runs all of them"


def plot_atlas(atlas: Atlas, out: Path) -> Path:
    """Draws an atlas into a .png, .svg or .pdf file, whole or not at all.

    Raises:
        UsageError: another suffix, or matplotlib is not installed.
        OutputError: `out` cannot be written.
    """
    suffix = out.suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"a plot cannot be written as '{out.name}'", f"Give a file that ends in {', '.join(FORMATS)}.")
    figure = atlas_figure(atlas)
    content = io.BytesIO()
    figure.savefig(content, format=suffix[1:], dpi=_DPI)
    _write(out, content.getvalue())
    return out


def atlas_figure(atlas: Atlas) -> Figure:
    """The picture as a matplotlib figure of its own.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure = _new_figure()
    points = Points.of(atlas)
    page = _Page.of(atlas, points)
    figure.set_size_inches(page.width, page.height)
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, page.width), ylim=(0, page.height))
    canvas.set_axis_off()
    _draw_header(canvas, page, atlas)
    _draw_map(canvas, page, points)
    _draw_legend(canvas, page, points)
    _draw_skip_map(canvas, page)
    return figure


# ---- What is drawn


@dataclass(frozen=True, slots=True)
class _Style:
    """How a domain looks, in both parts of the picture."""

    colour: str
    shape: str

    @classmethod
    def number(cls, index: int) -> _Style:
        return cls(_COLOURS[index % len(_COLOURS)], _SHAPES[index // len(_COLOURS) % len(_SHAPES)])


@dataclass(frozen=True, slots=True)
class _Row:
    """A plan in the skip map, and what is written beside it."""

    name: str
    plan: Plan
    style: _Style | None

    @property
    def share(self) -> str:
        modes = self.plan.modes
        parts = [f"{_percent(self.plan.num_skipped, len(modes))} skipped"]
        if low := modes.count(Mode.LOW):
            parts.append(f"{_percent(low, len(modes))} low")
        if self.plan.head is Mode.LOW:
            parts.append("low head")
        return ", ".join(parts)

    @property
    def policy(self) -> str:
        policy = self.plan.policy
        if self.plan.is_plain:
            return "plain decoding"
        lookup = ", look-up" if policy.lookup else ""
        return f"drafts up to {policy.max_draft} while p ≥ {policy.threshold:.2f}{lookup}"


def _rows(atlas: Atlas) -> tuple[_Row, ...]:
    domains = [
        _Row(name, domain.plan, _Style.number(index)) for index, (name, domain) in enumerate(atlas.domains.items())
    ]
    return (*domains, _Row("fallback", atlas.fallback, None))


# ---- Where it is drawn


@dataclass(frozen=True, slots=True)
class _Page:
    """Sizes in inches, from the bottom left."""

    rows: tuple[_Row, ...]
    texts: float  # width of the longest title or caption
    cell: float
    names: float  # width of the domains' column
    notes: float  # width of the column at the right
    map_height: float
    legend: float

    @classmethod
    def of(cls, atlas: Atlas, points: Points) -> _Page:
        rows = _rows(atlas)
        num_layers = atlas.fingerprint.num_layers
        names = max(_width(_shortened(row.name), 10) for row in rows)
        captions = max(_width(text, 8.5) for text in (points.caption, _SKIP_CAPTION))
        return cls(
            rows=rows,
            texts=max(captions, _width(_title(atlas), 15, "bold"), _width(points.title, 11, "bold")),
            cell=min(max(7.8 / num_layers, 0.11), 0.34),
            names=names + 1.05,  # mark, gaps, and the words "attention" and "MLP"
            notes=max(_width(text, 9) for row in rows for text in (row.share, row.policy)) + 0.2,
            map_height=max(_MAP_HEIGHT, 0.40 * (len(rows) - 1) + 0.2),
            legend=max(names, 1.4) + 0.6,
        )

    @property
    def num_layers(self) -> int:
        return self.rows[0].plan.num_layers

    @property
    def width(self) -> float:
        skip_map = self.names + self.num_layers * self.cell + self.notes
        return 2 * _MARGIN + max(skip_map, _MAP_WIDTH + self.legend, self.texts)

    @property
    def height(self) -> float:
        return self.map_top + _PANEL_TITLE + _HEADER

    @property
    def map_width(self) -> float:
        return self.width - 2 * _MARGIN - self.legend

    @property
    def map_top(self) -> float:
        return self.map_bottom + self.map_height

    @property
    def map_bottom(self) -> float:
        return self.skip_top + _PANEL_TITLE + _GAP

    @property
    def skip_top(self) -> float:
        return _AXIS + _MARGIN / 2 + self.skip_height

    @property
    def skip_left(self) -> float:
        return _MARGIN + self.names

    @property
    def skip_right(self) -> float:
        return self.skip_left + self.num_layers * self.cell

    @property
    def skip_height(self) -> float:
        return len(self.rows) * _ROW_PITCH + _BEFORE_FALLBACK

    def row_middle(self, index: int) -> float:
        """How far under the top of the skip map a row's middle lies."""
        is_fallback = index == len(self.rows) - 1
        return (index + 0.5) * _ROW_PITCH + (_BEFORE_FALLBACK if is_fallback else 0.0)


def _width(text: str, size: float, weight: str = "normal") -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72


# ---- Drawing


def _draw_header(canvas: Axes, page: _Page, atlas: Atlas) -> None:
    model = atlas.fingerprint
    facts = (
        count(model.num_layers, "layer"),
        count(len(atlas.domains), "domain"),
        count(len(atlas.anchors), "anchor"),
        f"prompt vectors of {model.hidden_size} dimensions, {atlas.pooling.value}-pooled",
    )
    _text(canvas, _MARGIN, page.height - 0.5, _title(atlas), size=15, weight="bold")
    _text(canvas, _MARGIN, page.height - 0.76, " · ".join(facts), size=9.5, color=_GREY)


def _title(atlas: Atlas) -> str:
    return f"Atlas of {atlas.fingerprint.architecture}"


def _draw_map(canvas: Axes, page: _Page, points: Points) -> None:
    _panel_title(canvas, page.map_top, points.title, points.caption)
    axes = _axes(canvas, _MARGIN, page.map_bottom, page.map_width, page.map_height)
    axes.set(xticks=[], yticks=[], xlim=(-0.04, 1.04), ylim=(-0.06, 1.06))
    for spine in axes.spines.values():
        spine.set(color=_LINE, linewidth=0.8)
    for anchors in (False, True):
        for index, name in enumerate(points.names):
            style = _Style.number(index)
            _marks(axes, points.where(name, anchors=anchors), style, anchors=anchors)


def _marks(axes: Axes, places: np.ndarray[Any, Any], style: _Style, *, anchors: bool) -> None:
    look: dict[str, Any] = (
        {"s": 48, "edgecolors": _INK, "linewidths": 1.0, "zorder": 3}
        if anchors
        else {"s": 12, "edgecolors": "none", "alpha": 0.75, "zorder": 2}
    )
    axes.scatter(places[:, 0], places[:, 1], marker=style.shape, c=style.colour, **look)


def _draw_legend(canvas: Axes, page: _Page, points: Points) -> None:
    left = page.width - _MARGIN - page.legend + 0.3
    prompts, anchors = (
        Counter(points.domains[: points.num_prompts]),
        Counter(points.domains[points.num_prompts :]),
    )
    pitch = min(0.46, (page.map_height - 0.1) / len(points.names))
    for index, name in enumerate(points.names):
        top = page.map_top - 0.12 - index * pitch
        _mark(canvas, left, top, _Style.number(index))
        _text(canvas, left + 0.2, top, _shortened(name), size=10, va="center_baseline")
        counts = [count(anchors[name], "anchor")]
        if points.kept:
            counts.insert(0, count(prompts[name], "prompt"))
        _text(canvas, left + 0.2, top - 0.165, ", ".join(counts), size=7.5, color=_GREY, va="center_baseline")


def _draw_skip_map(canvas: Axes, page: _Page) -> None:
    _panel_title(canvas, page.skip_top, "How each label drafts", _SKIP_CAPTION)
    _draw_mode_key(canvas, page)
    width = page.num_layers * page.cell
    axes = _axes(canvas, page.skip_left, page.skip_top - page.skip_height, width, page.skip_height)
    axes.set(xlim=(0, page.num_layers), ylim=(page.skip_height, 0), yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    _draw_cells(axes, page)
    _label_layers(axes, page)
    for index, row in enumerate(page.rows):
        _draw_row_texts(canvas, page, row, page.skip_top - page.row_middle(index))
    above_fallback = page.skip_top - page.row_middle(len(page.rows) - 1) + (_ROW_PITCH + _BEFORE_FALLBACK) / 2
    canvas.plot([_MARGIN, page.skip_right + page.notes], [above_fallback] * 2, color=_LINE, linewidth=0.8)


def _draw_cells(axes: Axes, page: _Page) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    gap = min(0.12, 0.016 / page.cell)  # of a cell's width
    cells, colours = [], []
    for index, row in enumerate(page.rows):
        middle = page.row_middle(index)
        for top, modes in ((middle - _CELL_HEIGHT - 0.01, row.plan.attention), (middle + 0.01, row.plan.mlp)):
            cells += [Rectangle((layer + gap / 2, top), 1 - gap, _CELL_HEIGHT) for layer in range(len(modes))]
            colours += [_MODE_COLOURS[mode] for mode in modes]
    axes.add_collection(PatchCollection(cells, facecolors=colours, edgecolors="none"))


def _label_layers(axes: Axes, page: _Page) -> None:
    step = next((step for step in (1, 5, 10, 20, 50) if step * page.cell >= 0.21), 100)
    layers = np.arange(0, page.num_layers, step)
    axes.set_xticks(layers + 0.5, [str(layer) for layer in layers])
    axes.tick_params(axis="x", length=2.5, width=0.6, color=_GREY, labelsize=8, labelcolor=_INK, pad=2)
    axes.set_xlabel("layer", fontsize=8.5, color=_GREY, labelpad=2)


def _draw_row_texts(canvas: Axes, page: _Page, row: _Row, middle: float) -> None:
    upper, lower = middle + _CELL_HEIGHT / 2 + 0.01, middle - _CELL_HEIGHT / 2 - 0.01
    if row.style:
        _mark(canvas, _MARGIN + 0.08, middle, row.style)
    _text(canvas, _MARGIN + 0.26, middle, _shortened(row.name), size=10, va="center_baseline",
          style="normal" if row.style else "italic")  # fmt: skip
    for height, sublayer in ((upper, "attention"), (lower, "MLP")):
        _text(canvas, page.skip_left - 0.07, height, sublayer, size=7, color=_GREY, ha="right", va="center_baseline")
    _text(canvas, page.skip_right + 0.14, upper, row.share, size=9, va="center_baseline")
    _text(canvas, page.skip_right + 0.14, lower, row.policy, size=8, color=_GREY, va="center_baseline")


def _draw_mode_key(canvas: Axes, page: _Page) -> None:
    from matplotlib.patches import Rectangle

    used = {mode for row in page.rows for mode in row.plan.modes} | {Mode.KEEP, Mode.SKIP}
    right = page.width - _MARGIN
    for mode in reversed([mode for mode in Mode if mode in used]):
        right -= _width(mode.value, 9)
        baseline = page.skip_top + 0.12
        _text(canvas, right, baseline, mode.value, size=9)
        right -= 0.24
        canvas.add_patch(Rectangle((right, baseline - 0.03), 0.18, 0.15, facecolor=_MODE_COLOURS[mode]))
        right -= 0.25


def _panel_title(canvas: Axes, bottom: float, title: str, caption: str) -> None:
    _text(canvas, _MARGIN, bottom + 0.32, title, size=11, weight="bold")
    _text(canvas, _MARGIN, bottom + 0.12, caption, size=8.5, color=_GREY)


def _mark(canvas: Axes, x: float, y: float, style: _Style) -> None:
    _marks(canvas, np.array([[x, y]]), style, anchors=True)


def _text(canvas: Axes, x: float, y: float, text: str, *, size: float, **look: Any) -> None:
    # Labels are the user's: a dollar sign in one is no formula.
    canvas.text(x, y, text, **{"fontsize": size, "color": _INK, "parse_math": False, **look})


def _axes(canvas: Axes, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches."""
    page_width, page_height = canvas.get_xlim()[1], canvas.get_ylim()[1]
    box = (left / page_width, bottom / page_height, width / page_width, height / page_height)
    return canvas.figure.add_axes(box, facecolor="none")


def _new_figure() -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"plots need matplotlib, which cannot be imported ({error})",
            "Install it with `pip install knn-ssd[plot]`.",
        ) from error
    figure = Figure(facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _write(out: Path, content: bytes) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"
