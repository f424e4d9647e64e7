"""Draws the picture of an answer store: a map of its requests, with lines from each to its neighbours.

It knows nothing of models or the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knn_ssd.errors import UsageError
from knn_ssd.routing import projection
from knn_ssd.routing.answer_file import MAX_COUNT, AnswerFile
from knn_ssd.routing.answers import NUM_NEIGHBOURS, RADIUS, AnswerStore
from knn_ssd.routing.projection import count, how_projected
from knn_ssd.tools.plot_canvas import (
    GREY,
    HEADER,
    MARGIN,
    PANEL_TITLE,
    check_format,
    draw_header,
    draw_panel_title,
    draw_text,
    new_canvas,
    new_figure,
    place_map,
    text_width,
    write_picture,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHADES = ("#88CCEE", "#332288")  # from few to many accepted draft tokens: of Paul Tol's scheme, as in the atlas
_SMALLEST, _LARGEST = 12.0, 90.0  # areas of dots, in square points
_MANY = 400  # dots, beyond which they are smaller
_MAP_WIDTH, _MAP_HEIGHT = 6.6, 5.2  # inches
_LINE_LOOK: dict[str, Any] = {"color": GREY, "linewidth": 0.5, "alpha": 0.35, "zorder": 1}
_DOTS = ("a request, by how many draft tokens", "from its answer were accepted")
_HOLLOW = ("a request without neighbours", "among the earlier ones")
_LINE = (
    f"to a neighbour: one of the {NUM_NEIGHBOURS} nearest",
    "earlier requests, within a cosine",
    f"distance of {RADIUS}",
)


@dataclass(frozen=True, slots=True, eq=False)
class RequestMap:
    """The requests of an answer store in two dimensions: the latest ones, where there are many."""

    places: np.ndarray[Any, Any]  # (N, 2), each axis in [0, 1]
    accepted: np.ndarray[Any, Any]  # (N,) draft tokens from a request's answer that were accepted
    lone: np.ndarray[Any, Any]  # (N,) whether a request has no neighbour
    lines: np.ndarray[Any, Any]  # (L, 2) a request and a neighbour of it, where both are drawn
    total: int  # requests in the store
    num_tokens: int  # tokens of all prompts and answers
    num_accepted: float  # draft tokens from all answers that were accepted

    @classmethod
    def of(cls, file: AnswerFile) -> RequestMap:
        """Reads an answer store and projects its requests.

        Raises:
            AnswerStoreError: the file is damaged.
            UsageError: there are no requests.
        """
        stored = list(file.read())
        if not stored:
            raise UsageError(
                f"the answer store in '{file.path.parent}' has no requests", "Draw it after the first ones."
            )
        first = max(len(stored) - projection.MAX_POINTS, 0)  # that is drawn
        earlier = AnswerStore(MAX_COUNT)  # which numbers its requests from 0
        lines, lone = [], []
        for number, each in enumerate(stored):
            if number >= first:
                near = [one.answer.id for one in earlier.nearest(each.vector, NUM_NEIGHBOURS, RADIUS)]
                lines += [(number - first, other - first) for other in near if other >= first]
                lone.append(not near)
            earlier.add(each.vector, [], [number])
        num_groups = len({other for _, other in lines if lone[other]}) or 1  # a group begins with a lone request
        vectors = np.stack([each.vector for each in stored[first:]]).astype(np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return cls(
            places=projection.in_two_dimensions(vectors, num_groups),
            accepted=np.array([each.accepted for each in stored[first:]]),
            lone=np.array(lone),
            lines=np.array(lines, int).reshape(-1, 2),
            total=len(stored),
            num_tokens=sum(len(each.prompt_ids) + len(each.token_ids) for each in stored),
            num_accepted=sum(each.accepted for each in stored),
        )

    @property
    def caption(self) -> str:
        """What is drawn, and how."""
        drawn = len(self.places)
        if drawn == self.total:
            return f"{count(drawn, 'request')}, {how_projected(drawn)}"
        latest = f"the latest {drawn:,} of {count(self.total, 'request')}, without lines to the others"
        return f"{latest}, {how_projected(drawn)}"


def plot_answers(file: AnswerFile, out: Path) -> Path:
    """Draws an answer store into a .png, .svg or .pdf file, which is written atomically.

    Raises:
        AnswerStoreError: the store is damaged.
        UsageError: it is empty, `out` has another suffix, or matplotlib is not installed.
        OutputError: `out` cannot be written.
    """
    check_format(out)
    return write_picture(answers_figure(file), out)


def answers_figure(file: AnswerFile) -> Figure:
    """The picture as a new matplotlib figure.

    Raises:
        AnswerStoreError: the store is damaged.
        UsageError: it is empty, or matplotlib is not installed.
    """
    figure = new_figure()
    requests = RequestMap.of(file)
    title = f"Answer store of {file.fingerprint.architecture}"
    legend = max(text_width(text, 8.5) for text in (*_DOTS, *_HOLLOW, *_LINE)) + 0.55
    texts = max(text_width(title, 15, "bold"), text_width(requests.caption, 8.5))
    width = 2 * MARGIN + max(_MAP_WIDTH + legend, texts)
    map_width, top = width - 2 * MARGIN - legend, MARGIN + _MAP_HEIGHT
    canvas = new_canvas(figure, width, top + PANEL_TITLE + HEADER)
    accepted = count(round(requests.num_accepted), "draft token") + " accepted"
    draw_header(canvas, title, (count(requests.total, "request"), count(requests.num_tokens, "token"), accepted))
    draw_panel_title(canvas, top, "Requests and their neighbours", requests.caption)
    _draw_map(place_map(canvas, MARGIN, map_width, _MAP_HEIGHT), requests)
    _draw_legend(canvas, MARGIN + map_width + 0.3, top - 0.15, requests)
    return figure


def _draw_map(axes: Axes, requests: RequestMap) -> None:
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(list(requests.places[requests.lines]), **_LINE_LOOK))
    order = np.argsort(requests.accepted, kind="stable")  # the few useful ones are not hidden by the others
    _dots(axes, requests, requests.places[order], requests.accepted[order], hollow=requests.lone[order])


def _dots(axes: Axes, requests: RequestMap, places: np.ndarray[Any, Any], accepted: Any, *, hollow: Any) -> None:
    """Draws requests at (n, 2), smaller where the map has many; `accepted` and `hollow` are of each, or of all."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    share = np.broadcast_to(accepted / max(requests.accepted.max(), 1.0), len(places))
    colours = LinearSegmentedColormap.from_list("accepted", _SHADES)(share)  # (n, 4)
    hollow, white = np.broadcast_to(hollow, len(places)), np.array(to_rgba("white"))
    scale = min(1.0, max(_MANY / len(requests.places), 0.3))
    look: dict[str, Any] = {
        "s": scale * (_SMALLEST + (_LARGEST - _SMALLEST) * share),
        "c": np.where(hollow[:, None], white, colours),
        "edgecolors": np.where(hollow[:, None], colours, white),
        "linewidths": scale**0.5 * np.where(hollow, 1.1, 0.3),
    }
    axes.scatter(places[:, 0], places[:, 1], zorder=2, **look)


def _draw_legend(canvas: Axes, left: float, top: float, requests: RequestMap) -> None:
    most = requests.accepted.max()
    height = _draw_lines(canvas, left - 0.12, top, *_DOTS)
    for value in sorted({0, round(most / 2), round(most)}):
        _dots(canvas, requests, np.array([[left, height]]), value, hollow=False)
        height = _draw_lines(canvas, left + 0.25, height, f"{value:,}")
    height -= 0.12
    _dots(canvas, requests, np.array([[left, height]]), most / 2, hollow=True)
    height = _draw_lines(canvas, left + 0.25, height, *_HOLLOW) - 0.12
    canvas.plot([left - 0.12, left + 0.12], [height] * 2, **_LINE_LOOK)
    _draw_lines(canvas, left + 0.25, height, *_LINE)


def _draw_lines(canvas: Axes, left: float, top: float, *lines: str) -> float:
    """Draws a text of the legend, and returns the middle of the row below it."""
    for row, text in enumerate(lines):
        draw_text(canvas, left, top - row * 0.17, text, size=8.5, va="center_baseline")
    return top - len(lines) * 0.17 - 0.09
