"""What the pictures of an atlas and of an answer store share: colours, margins, titles, and the file that is written.

matplotlib is an optional dependency, imported inside functions and used without pyplot, so that no global state
changes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.errors import UsageError
from knn_ssd.io import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
INK, GREY, LINE = "#1B1F24", "#68707A", "#C9CED4"
_DPI = 200

# Inches.
MARGIN = 0.4
HEADER = 0.85
PANEL_TITLE = 0.62


def check_format(out: Path) -> None:
    """Refuses a file that a picture cannot be written to.

    Raises:
        UsageError: it has another suffix than those in `FORMATS`.
    """
    if out.suffix.lower() not in FORMATS:
        raise UsageError(f"a plot cannot be written as '{out.name}'", f"Give a file that ends in {', '.join(FORMATS)}.")


def write_picture(figure: Figure, out: Path) -> Path:
    """Writes a figure atomically, in the format of the file's suffix, and returns the file.

    Raises:
        OutputError: `out` cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format=out.suffix.lower()[1:], dpi=_DPI)
    write_whole(out, content.getvalue())
    return out


def new_figure() -> Figure:
    """An empty figure, without pyplot.

    Raises:
        UsageError: matplotlib is not installed.
    """
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


def new_canvas(figure: Figure, width: float, height: float) -> Axes:
    """Axes over a whole page of this size, with places in inches from its bottom left."""
    figure.set_size_inches(width, height)
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    canvas.set_axis_off()
    return canvas


def draw_header(canvas: Axes, title: str, facts: Iterable[str]) -> None:
    """Draws the title of the picture, with a line of facts below it."""
    top = canvas.get_ylim()[1]
    draw_text(canvas, MARGIN, top - 0.5, title, size=15, weight="bold")
    draw_text(canvas, MARGIN, top - 0.76, " · ".join(facts), size=9.5, color=GREY)


def draw_panel_title(canvas: Axes, bottom: float, title: str, caption: str) -> None:
    """Draws the title and the caption of a part of the picture."""
    draw_text(canvas, MARGIN, bottom + 0.32, title, size=11, weight="bold")
    draw_text(canvas, MARGIN, bottom + 0.12, caption, size=8.5, color=GREY)


def draw_text(canvas: Axes, x: float, y: float, text: str, *, size: float, **look: Any) -> None:
    """Draws a text, literally: a dollar sign in a domain's name does not begin a formula."""
    canvas.text(x, y, text, **{"fontsize": size, "color": INK, "parse_math": False, **look})


def place_axes(canvas: Axes, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches."""
    page_width, page_height = canvas.get_xlim()[1], canvas.get_ylim()[1]
    box = (left / page_width, bottom / page_height, width / page_width, height / page_height)
    return canvas.figure.add_axes(box, facecolor="none")


def place_map(canvas: Axes, bottom: float, width: float, height: float) -> Axes:
    """Axes with a frame at the left margin, for places in [0, 1]."""
    axes = place_axes(canvas, MARGIN, bottom, width, height)
    axes.set(xticks=[], yticks=[], xlim=(-0.04, 1.04), ylim=(-0.06, 1.06))
    for spine in axes.spines.values():
        spine.set(color=LINE, linewidth=0.8)
    return axes


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """The width of a text in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72
