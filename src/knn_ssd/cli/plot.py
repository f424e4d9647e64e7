"""`knn-ssd plot`: draws an atlas or an answer store."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from knn_ssd.cli import options, output
from knn_ssd.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "plot",
        description="Draws an atlas: prompt vectors and anchors in two dimensions, and the plan of each domain; or an "
        "answer store: its requests in two dimensions, with a line from each to its neighbours.",
    )
    parser.add_argument("folder", metavar="DIR", help="the folder of an atlas or of an answer store")
    text = "the picture to write: a .png, .svg or .pdf file"
    options.option(parser, "--out", "FILE", text, options.filled, required=True)


def run(args: argparse.Namespace) -> int:
    """Draws the picture and prints its path."""
    output.write_line(str(_draw(Path(args.folder), Path(args.out))))
    return 0


def _draw(folder: Path, out: Path) -> Path:
    from knn_ssd.atlas import MANIFEST, Atlas
    from knn_ssd.routing.answer_file import FILE_NAME, AnswerFile
    from knn_ssd.tools.answer_plot import plot_answers
    from knn_ssd.tools.plots import plot_atlas

    if not folder.exists():
        raise UsageError(f"there is no atlas at '{folder}', and no answer store", "Give the folder of one.")
    if (folder / FILE_NAME).exists():
        with closing(AnswerFile(folder)) as file:
            return plot_answers(file, out)
    if not (folder / MANIFEST).exists():
        raise UsageError(
            f"'{folder}' is not an atlas: it has no {MANIFEST}; nor an answer store: it has no {FILE_NAME}",
            "Give the folder of one.",
        )
    return plot_atlas(Atlas.load(folder), out)
