"""Log-probabilities of tokens in OpenAI's two formats: that of chat completions, and that of /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from knn_ssd.outputs import Chunk
from knn_ssd.speculation.decode import TokenLogprobs
from knn_ssd.tokenization import Spelling, spell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST = -9999.0  # OpenAI's value for a probability of zero, since JSON has no infinity


class Logprobs:
    """Writes the log-probabilities of one engine's tokens.

    Args:
        tokenizer: gives the tokens' texts; None leaves them empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._spell = lru_cache(4096)(lambda token: spell(tokenizer, token))

    def chat(self, chunks: Iterable[Chunk]) -> dict[str, Any]:
        """`choices[].logprobs` of a chat completion: one entry for each emitted token, those without text included."""
        content = [
            {**self._entry(each.token, each.logprob), "top_logprobs": [self._entry(*one) for one in each.top]}
            for chunk in chunks
            for each in chunk.round.logprobs
        ]
        return {"content": content, "refusal": None}

    def completion(self, chunks: Iterable[Chunk], offset: int = 0) -> dict[str, Any]:
        """`choices[].logprobs` of a completion; `offset` is the number of its characters before these chunks."""
        found: list[TokenLogprobs] = []
        pieces: list[str] = []
        for chunk in chunks:
            found += chunk.round.logprobs
            pieces += chunk.pieces
        return self._lists(found, pieces, offset)

    def prompt(
        self, token_ids: Sequence[int], pieces: Sequence[str], logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        """The same for a prompt that is echoed: its first token follows nothing and has no log-probability."""
        first = {
            "tokens": [self._key(token_ids[0])],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [0],
        }
        return joined(first, self._lists(logprobs, pieces[1:], len(pieces[0])))

    def _lists(self, logprobs: Sequence[TokenLogprobs], pieces: Sequence[str], offset: int) -> dict[str, Any]:
        tokens, own, tops, offsets = [], [], [], []
        for each, piece in zip(logprobs, pieces, strict=True):
            tokens.append(self._key(each.token))
            own.append(_finite(each.logprob))
            tops.append(self._top((*each.top, (each.token, each.logprob))))
            offsets.append(offset)
            offset += len(piece)
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, likeliest_first: Iterable[tuple[int, float]]) -> dict[str, float]:
        """Log-probabilities by token; of several tokens that are spelled alike, that of the likeliest."""
        found: dict[str, float] = {}
        for token, logprob in likeliest_first:
            found.setdefault(self._key(token), _finite(logprob))
        return found

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelling = self._spell(token)
        data = None if spelling.data is None else list(spelling.data)
        return {"token": spelling.text, "logprob": _finite(logprob), "bytes": data}

    def _key(self, token: int) -> str:
        """A token's key as in OpenAI's API: tokens that are not whole characters are written as their bytes."""
        spelling: Spelling = self._spell(token)
        if spelling.data is None or spelling.data == spelling.text.encode():
            return spelling.text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling.data)


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The lists of one text's log-probabilities followed by those of the text after it."""
    return {name: [*values, *other[name]] for name, values in one.items()}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
