"""Writes the help of all commands into docs/cli.md, below its marker: `python docs/generate_cli.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from knn_ssd.cli import COMMANDS, _parser
from knn_ssd.cli.parser import Parser

PAGE = Path(__file__).with_name("cli.md")
MARKER = "<!-- From here on written by docs/generate_cli.py. -->\n"


def page() -> str:
    """The whole page."""
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}  # argparse reads both
    found = [_parser([]), *(p for name in COMMANDS for p in _parsers(_parser([name])._commands.choices[name]))]
    sections = [f"\n## {parser.prog}\n\n```text\n{parser.format_help()}```\n" for parser in found]
    return PAGE.read_text("utf-8").partition(MARKER)[0] + MARKER + "".join(sections)


def _parsers(parser: Parser) -> Iterator[Parser]:
    """A parser and those of its subcommands."""
    yield parser
    for command in parser._commands.choices.values() if parser._commands is not None else ():
        yield from _parsers(command)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
