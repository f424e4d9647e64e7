"""Where the output of one request stands in its grammar: which tokens may follow, and which ones have to.

Everything here is a function of the output's tokens alone, so that a row of a verified block is masked as if the draft
tokens before it had been emitted. End tokens are not part of the grammar: they may follow where it is complete.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.generation.logits_process import LogitsProcessor

from knn_ssd.errors import UsageError
from knn_ssd.grammar import Grammar, grammar_library, library_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_COMPILED = 64  # grammars that are kept compiled


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those that were used last.

    Several threads may share a compiler.

    Args:
        tokenizer: writes the output; None refuses every grammar.
        vocab_size: rows of the model's LM head.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._library_tokenizer: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Any:
        """The grammar's matcher at its beginning, which is copied for each request.

        Raises:
            UsageError: a grammar that is too complex, or a tokenizer that cannot be used with grammars.
        """
        library = grammar_library()
        with self._lock:
            if self._library_tokenizer is None:
                self._library_tokenizer = self._new_tokenizer(library)
            found = self._compiled.get(grammar)
        if found is None:  # compiled outside the lock, so that it delays no other thread's requests
            found = library.LLMatcher(self._library_tokenizer, grammar.source, log_level=0)
            if found.is_error():
                raise UsageError(f"the grammar cannot be used: {_reason(found)}", "Make it simpler.")
        with self._lock:
            self._compiled[grammar] = found
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _MOST_COMPILED:
                self._compiled.popitem(last=False)
        return found

    def start(self, grammar: Grammar, prompt_length: int, end_token_ids: Collection[int]) -> GrammarState:
        """The state of an output that begins.

        Args:
            grammar: what it must look like.
            prompt_length: how many of a context's tokens are the prompt's.
            end_token_ids: the tokens that end the output where the grammar is complete.

        Raises:
            UsageError: as in `compile`, or there is no token at which the output could end.
        """
        if not end_token_ids:
            raise UsageError("structured output needs an end-of-sequence token, and the model has none")
        matcher = self.compile(grammar)
        with self._lock:
            return GrammarState(matcher, prompt_length, end_token_ids, self._library_tokenizer.eos_tokens)

    def _new_tokenizer(self, library: Any) -> Any:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._tokenizer is None or backend is None:
            kind = "no tokenizer" if self._tokenizer is None else f"a {type(self._tokenizer).__name__}"
            raise UsageError(f"structured output needs a fast tokenizer, and the model came with {kind}")
        known = self._tokenizer.get_vocab().values()
        size = max(self._vocab_size, max(known) + 1)
        try:
            text = _without_gaps(backend.to_str(), set(known))
            return library.LLTokenizer(text, n_vocab=size, eos_token=self._tokenizer.eos_token_id)
        except Exception as error:  # of the library, which documents none
            raise UsageError(f"the tokenizer cannot be used with grammars: {error}") from error


def _without_gaps(text: str, known: set[int]) -> str:
    """A tokenizer's JSON whose ids are contiguous, as the library expects: gaps are filled with special tokens."""
    gaps = sorted(set(range(max(known))) - known)
    settings = json.loads(text)
    settings["padding"] = settings["truncation"] = None
    if gaps and isinstance(settings["model"].get("vocab"), dict):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token in gaps:
            name = f"<unused token {token}>"
            settings["model"]["vocab"][name] = token
            settings["added_tokens"].append({"id": token, "content": name, "special": True, **flags})
    return json.dumps(settings)


class GrammarState:
    """Where one output stands in its grammar.

    Asked about an output, it moves there: back to what that shares with the last one, and on from there.

    Args:
        matcher: the grammar's, at its beginning.
        prompt_length: how many of a context's tokens are the prompt's.
        end_token_ids: the tokens that end the output.
        other_end_ids: tokens that the library takes for ends.
    """

    def __init__(
        self, matcher: Any, prompt_length: int, end_token_ids: Collection[int], other_end_ids: Collection[int]
    ) -> None:
        self._beginning = matcher
        self._matcher = matcher.deep_copy()
        self._tokens: list[int] = []  # those that the matcher has consumed
        self.prompt_length = prompt_length
        self._ends = sorted(end_token_ids)
        self._all_ends = frozenset(end_token_ids) | frozenset(other_end_ids)

    def allowed(self, output: Sequence[int], vocab_size: int) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Which tokens (V,) may follow an output; None if the output has ended or is not one of the grammar.

        Where nothing can follow, although the grammar is not complete, an end token may: see `check_end`.
        """
        if not self._move(output):
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.zeros(vocab_size, np.bool_)
        if self._matcher.is_error():
            allowed[self._ends] = True
            return allowed
        found = np.unpackbits(bits, count=min(vocab_size, 8 * len(bits)), bitorder="little")
        allowed[: len(found)] = found
        allowed[[token for token in self._all_ends if token < vocab_size]] = False
        allowed[self._ends] = self._matcher.is_accepting() or not allowed.any()
        return allowed

    def mask(self, context: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        """Scores (1, V) after a context, prompt included: minus infinity for tokens that cannot follow it."""
        allowed = self.allowed(context[self.prompt_length :], scores.shape[-1])
        if allowed is None:
            return scores
        return scores.masked_fill(torch.from_numpy(~allowed).to(scores.device), float("-inf"))

    def forced(self, output: Sequence[int]) -> list[int]:
        """The tokens that have to follow an output, as far as that is known: how the tokenizer writes the bytes that
        the grammar forces, and the end token after the last of them.
        """
        if not self._move(output) or self._matcher.is_error():
            return []
        tokens: list[int] = list(self._matcher.compute_ff_tokens())
        consumed = self._matcher.try_consume_tokens(tokens)
        is_complete = consumed == len(tokens) and self._matcher.is_stopped() and not self._matcher.is_error()
        if not self._matcher.is_error():
            self._matcher.rollback(consumed)
        return tokens + self._ends if is_complete and len(self._ends) == 1 else tokens

    def count_allowed(self, output: Sequence[int], tokens: Sequence[int]) -> int:
        """How many of the first tokens can follow an output, an end token included."""
        end = next((place for place, token in enumerate(tokens) if token in self._all_ends), len(tokens))
        if not self._move(output) or self._matcher.is_error():
            return 0
        count = int(self._matcher.validate_tokens(list(tokens[:end])))
        return count + (count == end < len(tokens))

    def check_end(self, output: Sequence[int]) -> None:
        """Raises a `UsageError` if an output ends with an end token where the grammar is not complete.

        That happens where a grammar asks for characters that the tokenizer lacks, or becomes too complex on the way.
        """
        if output[-1] not in self._ends:
            return
        if not self._move(output[:-1]) or not self._matcher.is_accepting():
            reason = _reason(self._matcher) or "the tokenizer has no token that could follow"
            raise UsageError(f"the output cannot be completed by its grammar: {reason}", "Make the grammar simpler.")

    def _move(self, output: Sequence[int]) -> bool:
        """Moves to an output; False if it is none of the grammar, or has ended."""
        if self._matcher.is_error():
            self._matcher, self._tokens = self._beginning.deep_copy(), []
        shared = _shared(self._tokens, output)
        if shared < len(self._tokens):
            self._matcher.rollback(len(self._tokens) - shared)
            del self._tokens[shared:]
        fresh = list(output[shared:])
        if not self._all_ends.isdisjoint(fresh):
            return False
        consumed = self._matcher.try_consume_tokens(fresh) if fresh else 0
        self._tokens += fresh[:consumed]
        return consumed == len(fresh) or bool(self._matcher.is_error())


class GrammarMask(LogitsProcessor):
    """Leaves the tokens that a grammar allows; a function of context and logits like any logits processor.

    A row after draft tokens that the grammar refuses is left as it is: nothing is emitted from it.
    """

    def __init__(self, state: GrammarState) -> None:
        self._state = state

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (1, V) after a context (1, T)."""
        return self._state.mask(input_ids[0].tolist(), scores)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    if other[: len(one)] == one:
        return len(one)
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))


def _reason(matcher: Any) -> str:
    return library_sentence(str(matcher.get_error()))
