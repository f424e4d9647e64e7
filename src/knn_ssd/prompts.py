"""Prompt files: JSON lines with `prompt` (required), `domain`, `id`, `reference`; and the built-in sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from knn_ssd.errors import PromptError, UsageError

BUILTIN_DOMAINS = ("summarization", "math", "translation", "story", "text2sql")

_FIELDS = ("prompt", "domain", "id", "reference")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file.

    Args:
        prompt: the user's message.
        domain: the domain it belongs to; None if the file gives none.
        id: its name; made from the file's name and the line number if the file gives none.
        reference: a reference answer.
    """

    prompt: str
    domain: str | None = None
    id: str = ""
    reference: str | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a JSON lines file; empty lines are skipped.

    Raises:
        PromptError: there is no such file, it has no prompts, or a line is not a prompt (named by its number).
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # not splitlines: JSON text may hold U+2028
    except UnicodeDecodeError as error:
        raise PromptError(f"'{path}' is not UTF-8 text ({error})", "Save it as UTF-8.") from error
    except OSError as error:
        raise PromptError(f"the prompt file '{path}' cannot be read: {error.strerror}", "Check the path.") from error
    prompts = parse_prompts(lines, str(path))
    if not prompts:
        raise PromptError(f"'{path}' has no prompts", 'Give one JSON object a line, such as {"prompt": "Hello"}.')
    return prompts


def parse_prompts(lines: Iterable[str], name: str) -> list[Prompt]:
    """The prompts in some JSON lines; error messages call their source `name`."""
    return [_parse(line, name, number) for number, line in enumerate(lines, start=1) if line.strip()]


def builtin_prompts(domains: Sequence[str] = BUILTIN_DOMAINS) -> list[Prompt]:
    """The prompts of the built-in sets, which were written for this project.

    Raises:
        UsageError: there is no built-in set for a domain.
    """
    prompts = []
    for domain in domains:
        if domain not in BUILTIN_DOMAINS:
            raise UsageError(
                f"there is no built-in domain '{domain}'",
                f"Choose from {', '.join(BUILTIN_DOMAINS)}, or give --prompts.",
            )
        text = files("knn_ssd.data").joinpath("prompts", f"{domain}.jsonl").read_text("utf-8")
        prompts += parse_prompts(text.split("\n"), f"{domain}.jsonl")
    return prompts


def _parse(line: str, name: str, number: int) -> Prompt:
    where = f"{name}, line {number}"
    try:
        data: Any = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where} is not JSON: {error}", "Give one JSON object a line.") from error
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise PromptError(f"{where} has no 'prompt' text", 'Each line needs one, such as {"prompt": "Hello"}.')
    if not data["prompt"].strip():
        raise PromptError(f"{where} has an empty prompt", "Give at least one word.")
    wrong = [field for field in _FIELDS if not isinstance(data.get(field, ""), str | None)]
    if wrong:
        raise PromptError(f"{where}: '{wrong[0]}' must be text, got {data[wrong[0]]!r}")
    fields = {field: data[field] for field in _FIELDS if data.get(field) is not None}
    return Prompt(**{"id": f"{Path(name).stem}-{number}", **fields})
