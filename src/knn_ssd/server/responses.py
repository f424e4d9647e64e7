"""What responses report to clients besides OpenAI's fields: headers, and the `knn_ssd` objects for those that ask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from knn_ssd.backends.base import Exactness
from knn_ssd.outputs import Chunk
from knn_ssd.server.scheduler import PrefillDone
from knn_ssd.tokenization import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 80  # characters of an earlier prompt
_TOKENS_SHOWN = 4 * _SHOWN  # enough for them, where a character is up to four tokens
_HEADER_CHARACTERS = 200  # of a text in a header
_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class PromptTexts:
    """Gives the texts of prompts, as their authors recognise them: of a conversation the last message.

    Args:
        tokenizer: the model's; None leaves all texts empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    def beginning(self, token_ids: Sequence[int]) -> str:
        """The first characters of a prompt, without what the chat template puts around its last message."""
        if self._tokenizer is None:
            return ""
        ids, (before, after) = list(token_ids), self._frame
        if after and ids[-len(after) :] == after:
            del ids[-len(after) :]
        ends = range(len(ids), len(before) - 1, -1) if before else ()
        start = next((end for end in ends if ids[end - len(before) : end] == before), 0)
        text = self._tokenizer.decode(ids[start : start + _TOKENS_SHOWN], skip_special_tokens=True)
        return str(text).strip()[:_SHOWN]

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The tokens that the chat template puts right before and after a user's message."""
        if self._tokenizer is None or not self._tokenizer.chat_template:
            return [], []
        one, other = (encode(self._tokenizer, text, 2**31) for text in ("a", "b"))
        before, after = _common(one, other), _common(one[::-1], other[::-1])[::-1]
        special = set(self._tokenizer.all_special_ids)
        last = max((place for place, token in enumerate(before) if token in special), default=0)
        return before[last:], after


def response_headers(exactness: Exactness, prefill: PrefillDone | None) -> dict[str, str]:
    """The headers of a response: the exactness, and what is known after the prefill if it is done."""
    headers = {"x-knn-ssd-exactness": exactness.value}
    if prefill is None:
        return headers
    headers |= {"x-knn-ssd-plan": prefill.plan.describe(), "x-knn-ssd-neighbours": str(len(prefill.neighbours))}
    if prefill.route is not None:
        headers["x-knn-ssd-route"] = header_value(prefill.route.plan_name)
    return headers


def header_value(text: str) -> str:
    """A text as the value of a header: what is not printable ASCII, and %, is percent-encoded as UTF-8."""
    value = quote(text[:_HEADER_CHARACTERS], safe=_PRINTABLE, errors="replace")
    return value if value == value.strip() else value.replace(" ", "%20")


def prefill_fields(prefill: PrefillDone, texts: PromptTexts) -> dict[str, Any]:
    """The fields that are known after the prefill: the route, which is None without an atlas, plan and neighbours."""
    route = prefill.route
    return {
        "route": None if route is None else route.domain,
        "fallback": route is not None and route.fallback,
        "anchor": None if route is None else route.anchor,
        "distance": None if route is None else route.distance,
        "plan": prefill.plan.describe(),
        "prompt_tokens": prefill.prompt_tokens,
        "neighbours": [
            {
                "id": each.answer.id,
                "distance": each.distance,
                "prompt": texts.beginning(each.answer.prompt_ids.tolist()),
            }
            for each in prefill.neighbours
        ],
    }


def round_fields(chunk: Chunk, neighbour: int | None) -> dict[str, Any]:
    """The fields of one round: its tokens with their origin, how many were drafted and accepted, and its seconds.

    Args:
        chunk: the round.
        neighbour: which of the response's neighbours its retrieved tokens come from.
    """
    current = chunk.round
    tokens = zip(chunk.pieces, current.origins, strict=True)
    return {
        "tokens": [{"text": text, "source": source} for text, source in tokens],
        "drafted": current.drafted,
        "accepted": current.accepted,
        "neighbour": neighbour,
        "sec": current.draft_sec + current.verify_sec,
    }


def _common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The first tokens that two sequences share."""
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
