"""An argument parser that raises `UsageError`s and suggests a correction for a mistyped word."""

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
    """`argparse.ArgumentParser` that accepts no abbreviations, never exits on an error, and checks words first."""

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
        """Checks options and commands before argparse does, whose error would be about a missing required option."""
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
    """Shows the version, which is looked up only when it is asked for."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "nargs": 0, "default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        output.write_line(f"knn-ssd {version('knn-ssd')}")
        parser.exit()
