"""Draws the picture of an atlas: a map of its prompt vectors and anchors, and a map of its plans.

It knows nothing of models, calibration or the command line.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knn_ssd.atlas import Atlas
from knn_ssd.plan import Mode
from knn_ssd.routing.projection import Points, count
from knn_ssd.tools.plot_canvas import (
    GREY,
    INK,
    LINE,
    MARGIN,
    check_format,
    draw_header,
    draw_panel_title,
    draw_text,
    new_canvas,
    new_figure,
    place_axes,
    place_map,
    text_width,
    write_picture,
)
from knn_ssd.tools.plot_layout import (
    BEFORE_FALLBACK,
    CELL_HEIGHT,
    PLANS_CAPTION,
    ROW_PITCH,
    Page,
    Row,
    Style,
    page_title,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MODE_COLOURS = {Mode.KEEP: "#E3E6EA", Mode.SKIP: "#1F2A36", Mode.LOW: "#F0A33F"}  # they differ in lightness too
_MODE_NAMES = {Mode.KEEP: "full", Mode.SKIP: "skipped", Mode.LOW: "4-bit"}


def plot_atlas(atlas: Atlas, out: Path) -> Path:
    """Draws an atlas into a .png, .svg or .pdf file, which is written atomically.

    Raises:
        UsageError: `out` has another suffix, or matplotlib is not installed.
        OutputError: `out` cannot be written.
    """
    check_format(out)
    return write_picture(atlas_figure(atlas), out)


def atlas_figure(atlas: Atlas) -> Figure:
    """The picture as a new matplotlib figure.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure = new_figure()
    points = Points.of(atlas)
    page = Page.of(atlas, points)
    canvas = new_canvas(figure, page.width, page.height)
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
    draw_header(canvas, page_title(atlas), facts)


def _draw_map(canvas: Axes, page: Page, points: Points) -> None:
    draw_panel_title(canvas, page.map_top, points.title, points.caption)
    axes = place_map(canvas, page.map_bottom, page.map_width, page.map_height)
    for anchors in (False, True):
        for index, name in enumerate(points.names):
            style = Style.number(index)
            _marks(axes, points.where(name, anchors=anchors), style, anchors=anchors)


def _marks(axes: Axes, places: np.ndarray[Any, Any], style: Style, *, anchors: bool) -> None:
    look: dict[str, Any] = (
        {"s": 48, "edgecolors": INK, "linewidths": 1.0, "zorder": 3}
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
        draw_text(canvas, left + 0.2, top, shortened(name), size=10, va="center_baseline")
        counts = [count(anchors[name], "anchor")]
        if points.kept:
            counts.insert(0, count(prompts[name], "prompt"))
        draw_text(canvas, left + 0.2, top - 0.165, ", ".join(counts), size=7.5, color=GREY, va="center_baseline")


def _draw_plans(canvas: Axes, page: Page) -> None:
    draw_panel_title(canvas, page.plans_top, "The plan of each domain", PLANS_CAPTION)
    _draw_mode_key(canvas, page)
    width = page.num_layers * page.cell
    axes = place_axes(canvas, page.plans_left, page.plans_top - page.plans_height, width, page.plans_height)
    axes.set(xlim=(0, page.num_layers), ylim=(page.plans_height, 0), yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    _draw_cells(axes, page)
    _label_layers(axes, page)
    for index, row in enumerate(page.rows):
        _draw_row_texts(canvas, page, row, page.plans_top - page.row_middle(index))
    above_fallback = page.plans_top - page.row_middle(len(page.rows) - 1) + (ROW_PITCH + BEFORE_FALLBACK) / 2
    canvas.plot([MARGIN, page.plans_right + page.notes], [above_fallback] * 2, color=LINE, linewidth=0.8)


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
    axes.tick_params(axis="x", length=2.5, width=0.6, color=GREY, labelsize=8, labelcolor=INK, pad=2)
    axes.set_xlabel("layer", fontsize=8.5, color=GREY, labelpad=2)


def _draw_row_texts(canvas: Axes, page: Page, row: Row, middle: float) -> None:
    upper, lower = middle + CELL_HEIGHT / 2 + 0.01, middle - CELL_HEIGHT / 2 - 0.01
    if row.style:
        _mark(canvas, MARGIN + 0.08, middle, row.style)
    draw_text(canvas, MARGIN + 0.26, middle, shortened(row.name), size=10, va="center_baseline",
          style="normal" if row.style else "italic")  # fmt: skip
    for height, sublayer in ((upper, "attention"), (lower, "MLP")):
        draw_text(
            canvas, page.plans_left - 0.07, height, sublayer, size=7, color=GREY, ha="right", va="center_baseline"
        )
    draw_text(canvas, page.plans_right + 0.14, upper, row.modes, size=9, va="center_baseline")
    draw_text(canvas, page.plans_right + 0.14, lower, row.policy, size=8, color=GREY, va="center_baseline")


def _draw_mode_key(canvas: Axes, page: Page) -> None:
    from matplotlib.patches import Rectangle

    used = {mode for row in page.rows for mode in row.plan.modes} | {Mode.KEEP, Mode.SKIP}
    right = page.width - MARGIN
    for mode in reversed([mode for mode in Mode if mode in used]):
        right -= text_width(_MODE_NAMES[mode], 9)
        baseline = page.plans_top + 0.12
        draw_text(canvas, right, baseline, _MODE_NAMES[mode], size=9)
        right -= 0.24
        canvas.add_patch(Rectangle((right, baseline - 0.03), 0.18, 0.15, facecolor=_MODE_COLOURS[mode]))
        right -= 0.25


def _mark(canvas: Axes, x: float, y: float, style: Style) -> None:
    _marks(canvas, np.array([[x, y]]), style, anchors=True)
