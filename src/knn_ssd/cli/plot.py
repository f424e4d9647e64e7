"""`knn-ssd plot`: draws an atlas."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from knn_ssd.cli import options, output


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "plot", description="Draws an atlas: prompt vectors and anchors in two dimensions, and the plan of each domain."
    )
    parser.add_argument("atlas", metavar="ATLAS", help="the folder of an atlas")
    text = "the picture to write: a .png, .svg or .pdf file"
    options.option(parser, "--out", "FILE", text, options.filled, required=True)


def run(args: argparse.Namespace) -> int:
    """Draws the picture and prints its path."""
    from knn_ssd.atlas import Atlas
    from knn_ssd.tools.plots import plot_atlas

    output.write_line(str(plot_atlas(Atlas.load(args.atlas), Path(args.out))))
    return 0
