"""The thinking of a reasoning model before an answer of a form, or that may call tools: its grammar, and its end.

As in vLLM and SGLang, a demanded form begins after the thinking, and tool calls are looked for after it. Whether a
model thinks is read off its chat template and the end of the prompt: a prompt that ends with an open `<think>` is
continued by thinking; one that ends with `</think>`, as templates write it where thinking is switched off, is not;
elsewhere the model decides, if its template knows these marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knn_ssd.grammar import Grammar
from knn_ssd.server.terms import special_tokens, template_of, term_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENING, CLOSING = "<think>", "</think>"
NOT_THINKING = rf"~/\s*{OPENING}(.|\n)*/"  # a terminal for text that does not begin with it
_LAST_TOKENS = 16  # of a prompt, in which a mark that ends it must stand


@dataclass(frozen=True, slots=True)
class Thinking:
    """How an answer may begin with thinking.

    Args:
        is_open: whether the prompt has opened it.
        opening: the mark before it, as terms of a grammar.
        closing: the mark after it.
        special: the marks that are special tokens.
    """

    is_open: bool
    opening: str
    closing: str
    special: dict[int, str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> Thinking | None:
        """How the answer to a prompt may begin; None without thinking."""
        template = template_of(tokenizer)
        end = str(tokenizer.decode(list(prompt_ids[-_LAST_TOKENS:]), skip_special_tokens=False)).rstrip()
        if CLOSING not in template or end.endswith(CLOSING):
            return None
        term, tokens = term_of(tokenizer), special_tokens(tokenizer)
        special = {tokens[mark]: mark for mark in (OPENING, CLOSING) if mark in tokens}
        return cls(end.endswith(OPENING), term(OPENING), term(CLOSING), special)

    def rules(self) -> list[str]:
        """The rules of a grammar in which `start` is a `form` after thinking."""
        lazy = "" if self.closing.startswith("<[") else "[lazy]"  # the first mark ends it, unless it is a token
        is_token = self.opening.startswith("<[")
        opening = f"gap? {self.opening}" if is_token else rf"/\n{{0,2}}{OPENING}/"  # one terminal, unlike other text
        thought = "thought gap?" if self.is_open else f"({opening} thought gap?)?"
        return [
            f"start: {thought} form",
            rf"thought{lazy}: /(.|\n)*/ {self.closing}",
            r"gap: /\n{1,2}/",
        ]


def partial_mark(text: str, mark: str) -> int:
    """How many of a text's last characters may be the beginning of a mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


def formed(rules: Sequence[str], thinking: Thinking | None) -> Grammar:
    """The grammar of an answer: a `form`, as rules of Lark define it, after the thinking if there may be any.

    Raises:
        UsageError: the rules are no grammar.
    """
    start = ["start: form"] if thinking is None else thinking.rules()
    return Grammar.lark("\n".join(["%llguidance {}", *start, *rules]))
