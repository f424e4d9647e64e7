"""The `knn-ssd` command: its table of commands, and how errors become one sentence and an exit code.

A command is a module with `add_parser(subparsers)` and `run(args) -> int`. Only the module of the given command is
imported, and no module imports torch before `run`. This module knows nothing of what commands do.

Exit codes: 0 success; 1 a difference (`atlas diff`, `bench`) or a bug, with its traceback; 2 an error that the user can
correct; 130 Ctrl-C; 141 a broken pipe.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from knn_ssd.cli import options, output
from knn_ssd.cli.parser import Parser, Version
from knn_ssd.errors import KnnSsdError

COMMANDS = {
    "calibrate": "search for the best draft plan of each domain of prompts, and write an atlas",
    "generate": "answer prompts",
    "chat": "talk with a model in the terminal",
    "serve": "serve an OpenAI-compatible API over HTTP",
    "bench": "compare decoding methods with plain decoding",
    "atlas": "show, verify, compare and share atlases",
    "answers": "show and clear what an answer store on disk holds",
    "plot": "draw an atlas, or the requests of an answer store",
    "doctor": "show what this machine offers, and how fast a model can run on it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    Args:
        argv: the arguments after `knn-ssd`; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    output.prepare()
    try:
        code = _run(arguments)
        output.flush()
    except KnnSsdError as error:
        output.note(f"knn-ssd: {_sentence(error)}")
        return 2
    except KeyboardInterrupt:
        output.note("\nknn-ssd: interrupted" if output.stderr_is_terminal() else "knn-ssd: interrupted")
        return 130
    except BrokenPipeError:
        output.abandon_stdout()
        return 141
    return code


def _sentence(error: KnnSsdError) -> str:
    """The fact and the remedy, each with its full stop."""
    return str(error) if error.hint else f"{error}."


def _run(arguments: list[str]) -> int:
    parser = _parser(arguments)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    if getattr(args, "threads", None) is not None:
        options.use_threads(args.threads)
    if getattr(args, "no_weight_cache", False):
        options.use_no_weight_cache()
    return int(_module(args.command).run(args))


def _parser(arguments: list[str]) -> Parser:
    """The parser. Only the given command gets its options; the others are names with a line of help."""
    parser = Parser(
        prog="knn-ssd",
        description="Lossless self-speculative decoding of language models: the same output, sooner.",
        epilog="`knn-ssd COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action=Version, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, line in COMMANDS.items():
        if name in arguments[:1]:
            _module(name).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=line)
    return parser


def _module(command: str) -> Any:
    return import_module(f"knn_ssd.cli.{command}")
