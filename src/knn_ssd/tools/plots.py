"""Draws the picture of an atlas: a map of its prompt vectors and anchors, and a map of its plans.

It knows nothing of models, calibration or the command line. matplotlib is an optional dependency, imported inside
functions and used without pyplot, so that no global state changes.
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knn_ssd.atlas import Atlas
from knn_ssd.errors import UsageError
from knn_ssd.io import write_whole
from knn_ssd.plan import Mode
from knn_ssd.routing.projection import Points, count
from knn_ssd.tools.plot_layout import (
    BEFORE_FALLBACK,
    CELL_HEIGHT,
    MARGIN,
    PLANS_CAPTION,
    ROW_PITCH,
    Page,
    Row,
    Style,
    page_title,
    shortened,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")

_DPI = 200

_MODE_COLOURS = {Mode.KEEP: "#E3E6EA", Mode.SKIP: "#1F2A36", Mode.LOW: "#F0A33F"}  # they differ in lightness too
_MODE_NAMES = {Mode.KEEP: "full", Mode.SKIP: "skipped", Mode.LOW: "4-bit"}
_INK, _GREY, _LINE = "#1B1F24", "#68707A", "#C9CED4"


def plot_atlas(atlas: Atlas, out: Path) -> Path:
    """Draws an atlas into a .png, .svg or .pdf file, which is written atomically.

    Raises:
        UsageError: `out` has another suffix, or matplotlib is not installed.
        OutputError: `out` cannot be written.
    """
    suffix = out.suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"a plot cannot be written as '{out.name}'", f"Give a file that ends in {', '.join(FORMATS)}.")
    figure = atlas_figure(atlas)
    content = io.BytesIO()
    figure.savefig(content, format=suffix[1:], dpi=_DPI)
    write_whole(out, content.getvalue())
    return out


def atlas_figure(atlas: Atlas) -> Figure:
    """The picture as a new matplotlib figure.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure = _new_figure()
    points = Points.of(atlas)
    page = Page.of(atlas, points)
    figure.set_size_inches(page.width, page.height)
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, page.width), ylim=(0, page.height))
    canvas.set_axis_off()
    _draw_header(canvas, page, atlas)
    _draw_map(canvas, page, points)
    _draw_legend(canvas, page, points)
    _draw_plans(canvas, page)
    return figure


def _draw_header(canvas: Axes, page: Page, atlas: Atlas) -> None:
    model = atlas.fingerprint
    facts = (
        count(model.num_layers, "layer"),
        count(len(atlas.domains), "domain"),
        count(len(atlas.anchors), "anchor"),
        f"prompt vectors of {model.hidden_size} dimensions, {atlas.pooling.value}-pooled",
    )
    _text(canvas, MARGIN, page.height - 0.5, page_title(atlas), size=15, weight="bold")
    _text(canvas, MARGIN, page.height - 0.76, " · ".join(facts), size=9.5, color=_GREY)


def _draw_map(canvas: Axes, page: Page, points: Points) -> None:
    _panel_title(canvas, page.map_top, points.title, points.caption)
    axes = _axes(canvas, MARGIN, page.map_bottom, page.map_width, page.map_height)
    axes.set(xticks=[], yticks=[], xlim=(-0.04, 1.04), ylim=(-0.06, 1.06))
    for spine in axes.spines.values():
        spine.set(color=_LINE, linewidth=0.8)
    for anchors in (False, True):
        for index, name in enumerate(points.names):
            style = Style.number(index)
            _marks(axes, points.where(name, anchors=anchors), style, anchors=anchors)


def _marks(axes: Axes, places: np.ndarray[Any, Any], style: Style, *, anchors: bool) -> None:
    look: dict[str, Any] = (
        {"s": 48, "edgecolors": _INK, "linewidths": 1.0, "zorder": 3}
        if anchors
        else {"s": 12, "edgecolors": "none", "alpha": 0.75, "zorder": 2}
    )
    axes.scatter(places[:, 0], places[:, 1], marker=style.shape, c=style.colour, **look)


def _draw_legend(canvas: Axes, page: Page, points: Points) -> None:
    left = page.width - MARGIN - page.legend + 0.3
    prompts, anchors = Counter(points.domains[: points.num_prompts]), Counter(points.domains[points.num_prompts :])
    pitch = min(0.46, (page.map_height - 0.1) / len(points.names))
    for index, name in enumerate(points.names):
        top = page.map_top - 0.12 - index * pitch
        _mark(canvas, left, top, Style.number(index))
        _text(canvas, left + 0.2, top, shortened(name), size=10, va="center_baseline")
        counts = [count(anchors[name], "anchor")]
        if points.kept:
            counts.insert(0, count(prompts[name], "prompt"))
        _text(canvas, left + 0.2, top - 0.165, ", ".join(counts), size=7.5, color=_GREY, va="center_baseline")


def _draw_plans(canvas: Axes, page: Page) -> None:
    _panel_title(canvas, page.plans_top, "The plan of each domain", PLANS_CAPTION)
    _draw_mode_key(canvas, page)
    width = page.num_layers * page.cell
    axes = _axes(canvas, page.plans_left, page.plans_top - page.plans_height, width, page.plans_height)
    axes.set(xlim=(0, page.num_layers), ylim=(page.plans_height, 0), yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    _draw_cells(axes, page)
    _label_layers(axes, page)
    for index, row in enumerate(page.rows):
        _draw_row_texts(canvas, page, row, page.plans_top - page.row_middle(index))
    above_fallback = page.plans_top - page.row_middle(len(page.rows) - 1) + (ROW_PITCH + BEFORE_FALLBACK) / 2
    canvas.plot([MARGIN, page.plans_right + page.notes], [above_fallback] * 2, color=_LINE, linewidth=0.8)


def _draw_cells(axes: Axes, page: Page) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    gap = min(0.12, 0.016 / page.cell)  # of a cell's width
    cells, colours = [], []
    for index, row in enumerate(page.rows):
        middle = page.row_middle(index)
        for top, modes in ((middle - CELL_HEIGHT - 0.01, row.plan.attention), (middle + 0.01, row.plan.mlp)):
            cells += [Rectangle((layer + gap / 2, top), 1 - gap, CELL_HEIGHT) for layer in range(len(modes))]
            colours += [_MODE_COLOURS[mode] for mode in modes]
    axes.add_collection(PatchCollection(cells, facecolors=colours, edgecolors="none"))


def _label_layers(axes: Axes, page: Page) -> None:
    step = next((step for step in (1, 5, 10, 20, 50) if step * page.cell >= 0.21), 100)
    layers = np.arange(0, page.num_layers, step)
    axes.set_xticks(layers + 0.5, [str(layer) for layer in layers])
    axes.tick_params(axis="x", length=2.5, width=0.6, color=_GREY, labelsize=8, labelcolor=_INK, pad=2)
    axes.set_xlabel("layer", fontsize=8.5, color=_GREY, labelpad=2)


def _draw_row_texts(canvas: Axes, page: Page, row: Row, middle: float) -> None:
    upper, lower = middle + CELL_HEIGHT / 2 + 0.01, middle - CELL_HEIGHT / 2 - 0.01
    if row.style:
        _mark(canvas, MARGIN + 0.08, middle, row.style)
    _text(canvas, MARGIN + 0.26, middle, shortened(row.name), size=10, va="center_baseline",
          style="normal" if row.style else "italic")  # fmt: skip
    for height, sublayer in ((upper, "attention"), (lower, "MLP")):
        _text(canvas, page.plans_left - 0.07, height, sublayer, size=7, color=_GREY, ha="right", va="center_baseline")
    _text(canvas, page.plans_right + 0.14, upper, row.modes, size=9, va="center_baseline")
    _text(canvas, page.plans_right + 0.14, lower, row.policy, size=8, color=_GREY, va="center_baseline")


def _draw_mode_key(canvas: Axes, page: Page) -> None:
    from matplotlib.patches import Rectangle

    used = {mode for row in page.rows for mode in row.plan.modes} | {Mode.KEEP, Mode.SKIP}
    right = page.width - MARGIN
    for mode in reversed([mode for mode in Mode if mode in used]):
        right -= text_width(_MODE_NAMES[mode], 9)
        baseline = page.plans_top + 0.12
        _text(canvas, right, baseline, _MODE_NAMES[mode], size=9)
        right -= 0.24
        canvas.add_patch(Rectangle((right, baseline - 0.03), 0.18, 0.15, facecolor=_MODE_COLOURS[mode]))
        right -= 0.25


def _panel_title(canvas: Axes, bottom: float, title: str, caption: str) -> None:
    _text(canvas, MARGIN, bottom + 0.32, title, size=11, weight="bold")
    _text(canvas, MARGIN, bottom + 0.12, caption, size=8.5, color=_GREY)


def _mark(canvas: Axes, x: float, y: float, style: Style) -> None:
    _marks(canvas, np.array([[x, y]]), style, anchors=True)


def _text(canvas: Axes, x: float, y: float, text: str, *, size: float, **look: Any) -> None:
    # Names of domains are the user's: a dollar sign in one does not begin a formula.
    canvas.text(x, y, text, **{"fontsize": size, "color": _INK, "parse_math": False, **look})


def _axes(canvas: Axes, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches."""
    page_width, page_height = canvas.get_xlim()[1], canvas.get_ylim()[1]
    box = (left / page_width, bottom / page_height, width / page_width, height / page_height)
    return canvas.figure.add_axes(box, facecolor="none")


def _new_figure() -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"plots need matplotlib, which cannot be imported ({error})", "Install it with `pip install knn-ssd[plot]`."
        ) from error
    figure = Figure(facecolor="white")
    FigureCanvasAgg(figure)
    return figure
