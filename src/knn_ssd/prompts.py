"""Prompt files, in our format and in those that others made; and the built-in sets.

A line is a JSON object. Its prompt is one of

    prompt          a text
    messages        a conversation as in OpenAI's API; an answer at its end is left out
    conversations   a conversation as in ShareGPT, of which the first message of a person is the prompt
    turns           the turns of a question as in MT-bench and Spec-Bench, of which the first is the prompt, since later
                    ones answer to the output of a model

and `domain` (or `category`), `id` (or `question_id`) and `reference` are optional. A file may also be one JSON array of
such objects.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from knn_ssd.errors import PromptError, UsageError

BUILTIN_DOMAINS = ("summarization", "math", "translation", "story", "text2sql")

_EXAMPLE = 'such as {"prompt": "Hello"}'
_PEOPLE = ("human", "user")  # who speaks in ShareGPT, besides the system and the model


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file.

    Args:
        prompt: the user's message, or a conversation of role/content messages.
        domain: the domain it belongs to; None if the file gives none.
        id: its name; made from the file's name and the line number if the file gives none.
        reference: a reference answer, or several.
    """

    prompt: str | Sequence[Mapping[str, str]]
    domain: str | None = None
    id: str = ""
    reference: str | tuple[str, ...] | None = None

    @property
    def texts(self) -> list[str]:
        """The text, or that of each message."""
        return [self.prompt] if isinstance(self.prompt, str) else [message["content"] for message in self.prompt]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file; empty lines are skipped.

    Raises:
        PromptError: there is no such file, it has no prompts, or a line is not a prompt (named by its number).
    """
    return parse_prompts(read_lines(path), str(path))


def read_lines(path: str | Path) -> list[str]:
    """The lines of a prompt file, which is read once, so that it may be a pipe. A JSON array is a line for each item.

    Raises:
        PromptError: there is no such file, or it is not text.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"'{path}' is not UTF-8 text ({error})", "Save it as UTF-8.") from error
    except OSError as error:
        raise PromptError(f"the prompt file '{path}' cannot be read: {error.strerror}", "Check the path.") from error
    if not text.lstrip().startswith("["):
        return text.split("\n")  # not splitlines: JSON text may hold U+2028
    try:
        return [json.dumps(item) for item in json.loads(text)]
    except (ValueError, RecursionError) as error:
        raise PromptError(f"'{path}' is not a JSON array: {error}", "Give one JSON object a line.") from error


def parse_prompts(lines: Iterable[str], name: str) -> list[Prompt]:
    """The prompts in some JSON lines; error messages call their source `name`.

    Raises:
        PromptError: there are none, or a line is not a prompt.
    """
    prompts = [_parse(line, name, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise PromptError(f"'{name}' has no prompts", f"Give one JSON object a line, {_EXAMPLE}.")
    return prompts


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


def parse_line(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line. Raises a `PromptError` if it is none."""
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON: {error}", "Give one JSON object a line.") from error
    return data if isinstance(data, dict) else {}


def _parse(line: str, name: str, number: int) -> Prompt:
    where = f"{name}, line {number}"
    data = parse_line(line, where)
    prompt = _prompt(data, where)
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if not any(text.strip() for text in texts):
        raise PromptError(f"{where} has an empty prompt", "Give at least one word.")
    return Prompt(
        prompt,
        domain=_text(data, ("domain", "category"), where),
        id=_id(data, where) or f"{Path(name).stem}-{number}",
        reference=_reference(data, where),
    )


def _prompt(data: dict[str, Any], where: str) -> str | list[dict[str, str]]:
    if "custom_id" in data and "body" in data:
        raise PromptError(f"{where} is a request of an OpenAI batch", "`knn-ssd generate --prompts` answers these.")
    if isinstance(data.get("prompt"), str):
        return str(data["prompt"])
    for field, read in (("messages", _last_question), ("conversations", _first_message), ("turns", _first_turn)):
        if field in data:
            return read(data[field], where)
    others = "messages, conversations (ShareGPT) or turns (MT-bench)"
    raise PromptError(f"{where} has no 'prompt' text", f"Each line needs one, {_EXAMPLE}, or {others}.")


def _last_question(messages: Any, where: str) -> str | list[dict[str, str]]:
    """A conversation without the answers at its end; the text of one that is a single message of a user."""
    found = []
    for message in messages if isinstance(messages, list) else ():
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
            content = "".join(texts) if len(texts) == len(content) and all(isinstance(t, str) for t in texts) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise PromptError(f"{where}: a message needs the texts 'role' and 'content', got {message!r:.80}")
        found.append({"role": role, "content": content})
    while found and found[-1]["role"] == "assistant":
        del found[-1]
    if not found:
        raise PromptError(f"{where} has no message of a user in 'messages'", "Correct or remove the line.")
    return found[0]["content"] if [message["role"] for message in found] == ["user"] else found


def _first_message(conversations: Any, where: str) -> str | list[dict[str, str]]:
    """The first message of a person in a conversation of ShareGPT, after those of the system."""
    found: list[dict[str, str]] = []
    for message in conversations if isinstance(conversations, list) else ():
        speaker, text = (message.get(key) if isinstance(message, dict) else None for key in ("from", "value"))
        if speaker in ("system", *_PEOPLE) and isinstance(text, str):
            found.append({"role": "system" if speaker == "system" else "user", "content": text})
        if speaker in _PEOPLE and isinstance(text, str):
            return text if len(found) == 1 else found
    raise PromptError(f"{where} has no message of a person in 'conversations'", "Correct or remove the line.")


def _first_turn(turns: Any, where: str) -> str:
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return turns[0]
    raise PromptError(f"{where} is not a question: its 'turns' are no texts", "Correct or remove the line.")


def _text(data: dict[str, Any], names: Sequence[str], where: str) -> str | None:
    for name in names:
        value = data.get(name)
        if value is not None and not isinstance(value, str):
            raise PromptError(f"{where}: '{name}' must be text, got {value!r}")
        if value is not None:
            return value
    return None


def _id(data: dict[str, Any], where: str) -> str | None:
    for name in ("id", "question_id"):
        value = data.get(name)
        if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
            raise PromptError(f"{where}: '{name}' must be text or a whole number, got {value!r}")
        if value is not None:
            return str(value)
    return None


def _reference(data: dict[str, Any], where: str) -> str | tuple[str, ...] | None:
    value = data.get("reference")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    raise PromptError(f"{where}: 'reference' must be text or a list of texts, got {value!r}")
