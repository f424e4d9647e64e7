"""An argument parser whose errors are `UsageError`s, and which says what a mistyped word was probably meant to be."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from knn_ssd.cli import output
from knn_ssd.errors import UsageError

_NUMBER = re.compile(r"-\.?\d")


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without abbreviations, exits, or guesses at what an unknown word belongs to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self._commands: Any = None

    def add_subparsers(self, **kwargs: Any) -> Any:
        self._commands = super().add_subparsers(**kwargs)
        return self._commands

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._refuse_unknown(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"See `{self.prog} --help`.")

    def _refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Looks at the words before argparse does, which would first miss what a mistyped option was to give."""
        for argument in arguments:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            if argument == "-" or not argument.startswith("-"):
                if self._commands is not None:
                    self._check(argument, self._commands.choices, "command")
                    return
            elif " " not in name and not _NUMBER.match(name):
                self._check(name, self._option_string_actions, "option")

    def _check(self, word: str, known: Iterable[str], what: str) -> None:
        known = sorted(known)
        if word in known:
            return
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"See `{self.prog} --help`."
        raise UsageError(f"`{self.prog}` has no {what} '{word}'", hint)


class Version(argparse.Action):
    """Shows the version, and looks it up only then."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "nargs": 0, "default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        output.write_line(f"knn-ssd {version('knn-ssd')}")
        parser.exit()
