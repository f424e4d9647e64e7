"""Texts as terms of a grammar in llguidance's variant of Lark's syntax."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Term = Callable[[str], str]  # writes a text as terms


def quoted(text: str) -> str:
    """A text as one term."""
    return json.dumps(text, ensure_ascii=False)


def without(*marks: str) -> str:
    """A terminal for any text that has none of some marks in it."""
    found = "|".join(re.escape(mark).replace("/", r"\/") for mark in marks)
    return rf"/(.|\n)*/ & ~/(.|\n)*({found})(.|\n)*/"


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a tokenizer's chat template; of several, as with tools and without, all after each other."""
    template: Any = tokenizer.chat_template or ""
    return "\n".join(template.values()) if isinstance(template, Mapping) else str(template)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens of a tokenizer by their texts."""
    return {each.content: token for token, each in tokenizer.added_tokens_decoder.items() if each.special}


def term_of(tokenizer: PreTrainedTokenizerBase) -> Term:
    """Writes a text as terms of a grammar: special tokens by their ids, other text as it is."""
    tokens = special_tokens(tokenizer)
    any_token = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    def term(text: str) -> str:
        parts = re.split(f"({any_token.pattern})", text)
        return " ".join(f"<[{tokens[part]}]>" if part in tokens else quoted(part) for part in parts if part)

    return term
