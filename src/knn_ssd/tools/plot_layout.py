"""The layout of an atlas's picture: what is drawn, and where on the page, in inches.

Every text is placed by its measured width, because domains have any name and models any number of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from knn_ssd.atlas import Atlas
from knn_ssd.plan import Mode, Plan
from knn_ssd.routing.projection import Points
from knn_ssd.tools.plot_canvas import HEADER, MARGIN, PANEL_TITLE, text_width

# Paul Tol's muted scheme, safe for the colour-blind; domains beyond the ninth change the shape of the mark.
_COLOURS = ("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
_SHAPES = ("o", "^", "s", "D", "v")

# Inches.
_GAP = 0.2
MAP_HEIGHT, MAP_WIDTH = 4.4, 6.2
CELL_HEIGHT, ROW_PITCH = 0.16, 0.48
BEFORE_FALLBACK = 0.1
_AXIS = 0.5
_LONGEST_NAME, _LONGEST_MODES = 28, 44  # characters
PLANS_CAPTION = "one column per layer, with its attention and its MLP; verification runs the full model"


@dataclass(frozen=True, slots=True)
class Style:
    """The colour and mark of a domain in both parts of the picture."""

    colour: str
    shape: str

    @classmethod
    def number(cls, index: int) -> Style:
        return cls(_COLOURS[index % len(_COLOURS)], _SHAPES[index // len(_COLOURS) % len(_SHAPES)])


@dataclass(frozen=True, slots=True)
class Row:
    """A plan in the map of plans, and the text beside it."""

    name: str
    plan: Plan
    style: Style | None

    @property
    def modes(self) -> str:
        """The modes by their exceptions, or by their shares where the exceptions are too many to list."""
        if self.plan.is_plain:
            return "plain decoding"
        text, modes = self.plan.describe_modes(), self.plan.modes
        if len(text) <= _LONGEST_MODES:
            return text
        shares = ((Mode.SKIP, "skipped"), (Mode.LOW, "in 4 bits"))
        return ", ".join(f"{modes.count(mode) / len(modes):.0%} {word}" for mode, word in shares if mode in modes)

    @property
    def policy(self) -> str:
        return "" if self.plan.is_plain else self.plan.describe_policy().replace(">=", "≥")


def _rows(atlas: Atlas) -> tuple[Row, ...]:
    domains = [
        Row(name, domain.plan, Style.number(index)) for index, (name, domain) in enumerate(atlas.domains.items())
    ]
    return (*domains, Row("fallback", atlas.fallback, None))


@dataclass(frozen=True, slots=True)
class Page:
    """The sizes of a page in inches; places are measured from its bottom left."""

    rows: tuple[Row, ...]
    texts: float  # width of the longest title or caption
    cell: float  # width of a layer
    names: float  # width of the column of domains
    notes: float  # width of the column of plan texts
    map_height: float
    legend: float

    @classmethod
    def of(cls, atlas: Atlas, points: Points) -> Page:
        rows = _rows(atlas)
        num_layers = atlas.fingerprint.num_layers
        names = max(text_width(shortened(row.name), 10) for row in rows)
        captions = max(text_width(text, 8.5) for text in (points.caption, PLANS_CAPTION))
        return cls(
            rows=rows,
            texts=max(captions, text_width(page_title(atlas), 15, "bold"), text_width(points.title, 11, "bold")),
            cell=min(max(7.8 / num_layers, 0.11), 0.34),
            names=names + 1.05,  # mark, gaps, and the words "attention" and "MLP"
            notes=max(text_width(text, 9) for row in rows for text in (row.modes, row.policy)) + 0.2,
            map_height=max(MAP_HEIGHT, 0.40 * (len(rows) - 1) + 0.2),
            legend=max(names, 1.4) + 0.6,
        )

    @property
    def num_layers(self) -> int:
        return self.rows[0].plan.num_layers

    @property
    def width(self) -> float:
        plans = self.names + self.num_layers * self.cell + self.notes
        return 2 * MARGIN + max(plans, MAP_WIDTH + self.legend, self.texts)

    @property
    def height(self) -> float:
        return self.map_top + PANEL_TITLE + HEADER

    @property
    def map_width(self) -> float:
        return self.width - 2 * MARGIN - self.legend

    @property
    def map_top(self) -> float:
        return self.map_bottom + self.map_height

    @property
    def map_bottom(self) -> float:
        return self.plans_top + PANEL_TITLE + _GAP

    @property
    def plans_top(self) -> float:
        return _AXIS + MARGIN / 2 + self.plans_height

    @property
    def plans_left(self) -> float:
        return MARGIN + self.names

    @property
    def plans_right(self) -> float:
        return self.plans_left + self.num_layers * self.cell

    @property
    def plans_height(self) -> float:
        return len(self.rows) * ROW_PITCH + BEFORE_FALLBACK

    def row_middle(self, index: int) -> float:
        """The distance from the top of the map of plans to the middle of a row."""
        is_fallback = index == len(self.rows) - 1
        return (index + 0.5) * ROW_PITCH + (BEFORE_FALLBACK if is_fallback else 0.0)


def page_title(atlas: Atlas) -> str:
    """The title of the picture."""
    return f"Atlas of {atlas.fingerprint.architecture}"


def shortened(name: str) -> str:
    """A domain's name, cut where it is too long for the page."""
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
