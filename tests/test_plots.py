"""The pictures of an atlas and an answer store: readable at every size, right in what they show, written atomically."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.collections import LineCollection, PatchCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.base import Pooling
from knn_ssd.cli import main
from knn_ssd.errors import OutputError, UsageError
from knn_ssd.loading.fingerprint import Fingerprint
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.routing import projection
from knn_ssd.routing.answer_file import AnswerFile
from knn_ssd.routing.answers import NUM_NEIGHBOURS, RADIUS, AnswerStore
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.tools import answer_plot, plot_canvas, plot_layout, plots

WIDTH = 16
in_two_dimensions = projection.in_two_dimensions  # the real one: t-SNE, which most tests here do without


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_two(vectors: np.ndarray[Any, Any], num_groups: int) -> np.ndarray[Any, Any]:
        return np.abs(vectors[:, :2]) / np.abs(vectors[:, :2]).max()

    monkeypatch.setattr(projection, "in_two_dimensions", first_two)
    monkeypatch.setattr(plot_canvas, "_DPI", 50)


def make_plan(num_layers: int, generator: np.random.Generator, *, low: bool) -> Plan:
    modes = (Mode.KEEP, Mode.SKIP, Mode.LOW) if low else (Mode.KEEP, Mode.SKIP)
    attention, mlp = (tuple(generator.choice(modes, num_layers).tolist()) for _ in range(2))
    return Plan(tuple(map(Mode, attention)), tuple(map(Mode, mlp)), policy=Policy(12, 0.8, lookup=low))


def make_atlas(
    names: tuple[str, ...],
    num_layers: int,
    *,
    prompts: int = 8,
    anchors: int = 3,
    kept: bool = True,
    low: bool = False,
    architecture: str = "LlamaForCausalLM",
    **overrides: Any,
) -> Atlas:
    generator = np.random.default_rng(0)
    centres = np.repeat(generator.normal(size=(len(names), WIDTH)), prompts, axis=0)
    vectors = (centres + 0.3 * generator.normal(size=centres.shape)).astype(np.float32)
    plans = [make_plan(num_layers, generator, low=low) for _ in range(len(names) + 1)]
    settings: dict[str, Any] = {
        "fingerprint": Fingerprint(architecture, num_layers, WIDTH, 128, "ab", "cd", "float32"),
        "pooling": Pooling.MEAN,
        "anchors": np.concatenate([vectors[i * prompts : i * prompts + anchors] for i in range(len(names))]) + 0.01,
        "anchor_domains": tuple(name for name in names for _ in range(anchors)),
        "domains": {name: DomainEntry(plan, 0.1) for name, plan in zip(names, plans, strict=False)},
        "fallback": plans[-1],
        "cost": CostProfile(0.01, 0.001, 0.002, (0.01, 0.011)),
        "vectors": vectors if kept else None,
        "vector_domains": tuple(name for name in names for _ in range(prompts)) if kept else (),
    }
    return Atlas(**{**settings, **overrides})


FIVE = ("summarization", "math", "translation", "story", "text-to-sql")
TWELVE = (
    *FIVE,
    "code",
    "legal questions",
    "medical",
    "chat",
    "poetry",
    "json",
    "a domain of which its user is very fond",
)
CASES = {
    "five domains, 30 layers": make_atlas(FIVE, 30),
    "five domains, 80 layers": make_atlas(FIVE, 80, low=True),
    "five domains, 126 layers": make_atlas(FIVE, 126),
    "one domain": make_atlas(("math",), 30),
    "twelve domains": make_atlas(TWELVE, 32, low=True),
    "twenty-five domains": make_atlas(tuple(f"domain {index}" for index in range(25)), 24, prompts=3, anchors=1),
    "three points": make_atlas(("math",), 4, prompts=2, anchors=1),
    "two points": make_atlas(("a", "b"), 2, prompts=1, anchors=1, kept=False),
    "one point, one layer": make_atlas(("x",), 1, prompts=1, anchors=1, kept=False),
    "anchors alone": make_atlas(FIVE, 12, kept=False),
    "long names": make_atlas(("W" * 60, "i" * 60), 4, architecture="AVeryLongNameOf" * 5 + "ForCausalLM"),
    "signs that matplotlib reads": make_atlas((r"$\foo$", "a_b^c", "100 %", "_x"), 8),
}


def texts(figure: Figure) -> list[Any]:
    """Every visible text with something in it, tick domains included."""
    from matplotlib.text import Text

    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts(figure)]


@pytest.mark.parametrize("name", CASES)
def test_no_text_covers_another_or_leaves_the_page(name: str) -> None:
    check_texts(plots.atlas_figure(CASES[name]))


def check_texts(figure: Figure) -> None:
    figure.draw_without_rendering()
    shown = texts(figure)
    boxes = np.array([text.get_window_extent().extents for text in shown])  # left, low, right, high
    inside = (boxes[:, :2] >= 0).all(axis=1) & (boxes[:, 2:] <= [figure.bbox.width, figure.bbox.height]).all(axis=1)
    assert not [text.get_text() for text, fits in zip(shown, inside, strict=True) if not fits]
    for index, text in enumerate(shown):
        others = np.flatnonzero(overlap(boxes[index], boxes[index + 1 :])) + index + 1
        assert not [(text.get_text(), shown[other].get_text()) for other in others]
    for panel in figure.axes[1:]:  # the map of vectors and the skip map
        own = panel.findobj(type(shown[0]))
        covered = overlap(np.array(panel.get_window_extent().extents), boxes)
        assert not [text.get_text() for text, covers in zip(shown, covered, strict=True) if covers and text not in own]


def overlap(box: np.ndarray[Any, Any], boxes: np.ndarray[Any, Any], slack: float = 1.0) -> np.ndarray[Any, Any]:
    """Which of the boxes (n, 4) share more than `slack` pixels with one (4,), in both directions."""
    shared = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    return (shared > slack).all(axis=1)


def test_the_cells_are_the_plans() -> None:
    atlas = CASES["five domains, 80 layers"]
    figure = plots.atlas_figure(atlas)
    (cells,) = [c for axes in figure.axes for c in axes.collections if isinstance(c, PatchCollection)]
    drawn = [to_hex(colour).upper() for colour in cells.get_facecolor()]
    plans = [domain.plan for domain in atlas.domains.values()] + [atlas.fallback]
    expected = [plots._MODE_COLOURS[mode] for plan in plans for modes in (plan.attention, plan.mlp) for mode in modes]
    assert drawn == expected


def test_rows_show_domain_plan_and_plain_decoding() -> None:
    domains = {
        "math": DomainEntry(Plan.skipping(4, [1, 3], [2], Policy(5, 0.6)), 0.1),
        "story": DomainEntry(Plan.plain(4), 0.1),
    }
    low_head = Plan((Mode.LOW, Mode.KEEP), (Mode.LOW, Mode.LOW), head=Mode.LOW)
    assert plot_layout.Row("any", low_head, None).modes == "4-bit, but attention 1 in full"
    atlas = make_atlas(("math", "story"), 4, domains=domains, fallback=Plan.skipping(4))
    written = words(plots.atlas_figure(atlas))
    for text in ("math", "story", "fallback", "skip attention 1, 3 and MLP 2", "drafts up to 5 while confidence ≥ 0.6"):
        assert text in written
    assert written.count("plain decoding") == written.count("full model") == 1
    assert {"full", "skipped"} <= set(written)
    assert "4-bit" not in written  # no plan uses it
    assert "4-bit" in words(plots.atlas_figure(CASES["twelve domains"]))


def test_a_plan_of_many_exceptions_is_described_by_shares() -> None:
    every_other = Plan.skipping(40, range(0, 40, 2), range(0, 40, 2))
    assert plot_layout.Row("any", every_other, None).modes == "50% skipped"


def test_every_vector_and_anchor_is_drawn() -> None:
    atlas = CASES["five domains, 30 layers"]
    figure = plots.atlas_figure(atlas)
    vector_map = figure.axes[1]
    assert sum(len(marks.get_offsets()) for marks in vector_map.collections) == 5 * 8 + 5 * 3


def test_the_title_says_when_there_are_anchors_alone() -> None:
    assert "Anchors alone: the atlas does not have its prompt vectors" in words(
        plots.atlas_figure(CASES["anchors alone"])
    )
    assert "Prompts and anchors" in words(plots.atlas_figure(CASES["one domain"]))


def test_left_out_vectors_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "MAX_POINTS", 10)
    written = words(plots.atlas_figure(CASES["five domains, 30 layers"]))
    assert any(text.startswith("10 of 40 prompt vectors (dots) and 15 anchors") for text in written)


@pytest.mark.parametrize(
    "vectors", [np.ones((5, WIDTH)), np.zeros((5, WIDTH)), np.eye(5, WIDTH), np.eye(3, WIDTH), np.eye(1, 1)]
)
def test_few_or_equal_vectors_have_places(vectors: np.ndarray[Any, Any]) -> None:
    places = in_two_dimensions(vectors.astype(np.float32), 1)
    assert places.shape == (len(vectors), 2)
    assert np.isfinite(places).all()
    assert ((places >= 0) & (places <= 1)).all()


def test_what_is_near_is_drawn_near() -> None:
    atlas = CASES["five domains, 30 layers"]
    assert atlas.vectors is not None
    domains = np.array(atlas.vector_domains)
    places = in_two_dimensions(atlas.vectors, 5)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(len(places))
    assert (domains[distances.argmin(axis=1)] == domains).all()
    np.testing.assert_array_equal(in_two_dimensions(atlas.vectors, 5), places)


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_formats(tmp_path: Path, suffix: str, start: bytes) -> None:
    out = tmp_path / "new" / f"atlas{suffix}"
    assert plots.plot_atlas(CASES["one domain"], out) == out
    assert out.read_bytes().startswith(start)
    assert list(out.parent.iterdir()) == [out]


def test_an_older_picture_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "atlas.png"
    out.write_bytes(b"older")
    plots.plot_atlas(CASES["one domain"], out)
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["atlas.jpg", "atlas", "png", ".png"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        plots.plot_atlas(CASES["one domain"], tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for out in (tmp_path / "file" / "atlas.png", tmp_path / "folder.png", Path("/proc/atlas.png")):
        with pytest.raises(OutputError, match="cannot be written"):
            plots.plot_atlas(CASES["one point, one layer"], out)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"pip install knn-ssd\[plot\]"):
        plots.plot_atlas(CASES["one domain"], tmp_path / "atlas.png")
    assert not list(tmp_path.iterdir())


def test_pyplot_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plots.atlas_figure(CASES["one point, one layer"])


# ---- Answer stores

# Directions of prompt vectors: the first two are near to each other, and the next two.
ANGLES = (0.0, 0.3, 1.5, 1.5, 3.0)


def make_store(folder: Path, angles: tuple[float, ...] = ANGLES, architecture: str = "LlamaForCausalLM") -> AnswerFile:
    """A store of requests in these directions; `accepted` of the request i is 10 i."""
    model = Fingerprint(architecture, 4, WIDTH, 128, "ab", "cd", "float32")
    store = AnswerStore.open(folder, model, 128)
    for number, angle in enumerate(angles):
        vector = np.zeros(WIDTH, np.float32)
        vector[:2] = np.cos(angle), np.sin(angle)
        store.add(vector, [1, 2, 3], [number, number])
    for number in range(len(angles)):
        store.credit({number: 10 * number})
    store.close()
    return AnswerFile(folder)


def drawn(figure: Figure) -> tuple[list[Any], PathCollection, np.ndarray[Any, Any]]:
    """The lines of the map, its dots, and which of these are hollow."""
    lines, dots = figure.axes[1].collections
    assert isinstance(lines, LineCollection)
    assert isinstance(dots, PathCollection)
    return lines.get_segments(), dots, (np.asarray(dots.get_facecolor()) == 1).all(axis=1)


def test_requests_are_dots_with_lines_to_their_earlier_neighbours(tmp_path: Path) -> None:
    assert 1 - np.cos(0.3) < RADIUS < 1 - np.cos(1.2)
    requests = answer_plot.RequestMap.of(make_store(tmp_path))
    assert requests.lines.tolist() == [[1, 0], [3, 2]]
    assert requests.lone.tolist() == [True, False, True, False, True]
    lines, dots, hollow = drawn(answer_plot.answers_figure(AnswerFile(tmp_path)))
    places = requests.places
    np.testing.assert_allclose(lines, [places[[1, 0]], places[[3, 2]]])
    np.testing.assert_allclose(dots.get_offsets(), places)  # the most useful in front
    assert hollow.tolist() == [True, False, True, False, True]


def test_a_request_has_lines_to_the_nearest_alone(tmp_path: Path) -> None:
    number = NUM_NEIGHBOURS + 3
    lines, _, hollow = drawn(answer_plot.answers_figure(make_store(tmp_path, (0.5,) * number)))
    assert len(lines) == sum(min(index, NUM_NEIGHBOURS) for index in range(number))
    assert hollow.tolist() == [True] + [False] * (number - 1)


def test_dots_are_larger_and_darker_the_more_draft_tokens_were_accepted(tmp_path: Path) -> None:
    _, dots, hollow = drawn(answer_plot.answers_figure(make_store(tmp_path)))
    shades = np.where(hollow[:, None], dots.get_edgecolor(), dots.get_facecolor())[:, :3].sum(axis=1)
    assert (np.diff(dots.get_sizes()) > 0).all()  # the least useful first
    assert (np.diff(shades) < 0).all()


def test_the_title_counts_and_the_legend_explains(tmp_path: Path) -> None:
    written = words(answer_plot.answers_figure(make_store(tmp_path)))
    assert "Answer store of LlamaForCausalLM" in written
    assert "5 requests · 25 tokens · 100 draft tokens accepted" in written
    assert "5 requests, by t-SNE on cosine distance; the axes have no unit" in written
    assert {"0", "20", "40", "a request without neighbours"} <= set(written)
    assert any(text.startswith(f"to a neighbour: one of the {NUM_NEIGHBOURS} nearest") for text in written)


def test_of_many_requests_the_latest_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "MAX_POINTS", 4)
    file = make_store(tmp_path)
    assert answer_plot.RequestMap.of(file).lone.tolist() == [False, True, False, True]  # the first has its neighbour
    figure = answer_plot.answers_figure(file)
    lines, dots, hollow = drawn(figure)
    assert (len(lines), len(dots.get_offsets()), hollow.sum()) == (1, 4, 2)
    assert "5 requests · 25 tokens · 100 draft tokens accepted" in words(figure)
    assert any(
        text.startswith("the latest 4 of 5 requests, without lines to the others, by t-SNE") for text in words(figure)
    )


@pytest.mark.parametrize("angles", [(0.5,), (0.5, 0.5), (0.5, 2.0, 4.0), (0.5,) * 5])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "AVeryLongNameOf" * 5 + "ForCausalLM"])
def test_small_stores_have_readable_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, angles: tuple[float, ...], architecture: str
) -> None:
    monkeypatch.setattr(projection, "in_two_dimensions", in_two_dimensions)
    figure = answer_plot.answers_figure(make_store(tmp_path, angles, architecture))
    check_texts(figure)
    assert len(drawn(figure)[1].get_offsets()) == len(angles)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_command_draws_an_answer_store(
    tmp_path: Path, suffix: str, start: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "store").close()
    out = tmp_path / f"answers{suffix}"
    assert main(["plot", str(tmp_path / "store"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes().startswith(start)


def test_an_empty_store_and_folders_of_something_else_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "empty", ()).close()
    make_store(tmp_path / "store").close()
    (tmp_path / "other").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "answers.sqlite").write_bytes(b"something else" * 1000)
    for name, out, text in (
        ("empty", "a.png", "empty' has no requests"),
        ("nowhere", "a.png", "nowhere', and no answer store"),
        ("other", "a.png", "it has no atlas.json; nor an answer store: it has no answers.sqlite"),
        ("damaged", "a.png", "cannot be used: file is not a database"),
        ("store", "a.jpg", "a plot cannot be written as 'a.jpg'"),
    ):
        assert main(["plot", str(tmp_path / name), "--out", str(tmp_path / out)]) != 0
        said = capsys.readouterr().err
        assert text in said
        assert said.count("\n") == 1
        assert not (tmp_path / out).exists()
