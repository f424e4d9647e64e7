"""Probes on the loaded weights whether a row's logits depend on the block it is computed in, and what makes them not.

Kernels choose their order of summation by the number of rows of a pass and by the number of keys it attends to. Rows
that are never few, and numbers of keys that are rounded up, leave the choice nothing to go by. Which of it is needed
differs from processor to processor and from dtype to dtype, so each `Padding` is tried, the cheapest first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from knn_ssd.target.contract import Exactness, Session

if TYPE_CHECKING:
    from knn_ssd.target.contract import Target

_PROMPT_LENGTH = 11
_BLOCK_LENGTH = 5


@dataclass(frozen=True, slots=True)
class Padding:
    """What is added to a pass of the full model, and dropped from what it gives.

    Args:
        min_rows: a pass has at least so many rows.
        row_multiple: and a multiple of so many.
        key_multiple: attention sees a multiple of so many keys, those past the pass's own masked.
    """

    min_rows: int = 1
    row_multiple: int = 1
    key_multiple: int = 1

    def rows(self, count: int) -> int:
        """The rows of a pass over `count` tokens."""
        return _round_up(max(count, self.min_rows), self.row_multiple)

    def keys(self, count: int) -> int:
        """The keys that attention sees of `count`."""
        return _round_up(count, self.key_multiple)

    def __str__(self) -> str:
        if self == NO_PADDING:
            return "none"
        parts = [f"at least {self.min_rows} rows"] if self.min_rows > 1 else []
        parts += [f"rows to a multiple of {self.row_multiple}"] if self.row_multiple > 1 else []
        parts += [f"keys to a multiple of {self.key_multiple}"] if self.key_multiple > 1 else []
        return ", ".join(parts)


NO_PADDING = Padding()
# No padding is tried yet beyond none: those that looked sufficient failed for single rows of a block (MKL, float32, two
# threads) or in 16 bits, and cost up to three times a plain step.
PADDINGS = (NO_PADDING,)
"""What is tried, the cheapest first."""


def probe(target: Target) -> Exactness:
    """Runs the same tokens one by one and in one block, and compares the bits.

    Equal bits mean that speculative output is plain decoding's, whatever the plan. Different bits mean that they
    agree up to rounding, where a near-tie between two tokens may fall either way.
    """
    tokens = [(7 * i + 3) % target.vocab_size for i in range(_PROMPT_LENGTH + _BLOCK_LENGTH)]
    session = target.open(len(tokens))
    try:
        session.prefill(tokens[:_PROMPT_LENGTH])
        block = session.forward(tokens[_PROMPT_LENGTH:])
        for index, token in enumerate(tokens[_PROMPT_LENGTH:]):
            row = session.forward([token])
            session.commit(1)
            if not torch.equal(row[0], block[index]):
                return Exactness.NUMERICAL
    finally:
        session.close()
    return Exactness.BITWISE


# ---- Which padding makes a target exact


class PaddedSession(Session, Protocol):
    """A session that can be told how to pad, and where to be."""

    padding: Padding

    def pretend(self, length: int) -> None:
        """Moves the pointer to `length`, whatever the cache holds up to there."""

    def fill(self) -> None:
        """Something finite in the cache beyond the pointer, unlike what is before it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a target's passes promise, and how they are padded to keep it."""

    exactness: Exactness
    padding: Padding


_BOUNDARIES = (64, 256, 320, 448, 512, 1024)  # numbers of keys at which kernels have been seen to change their order
_BLOCKS = ((9, (1, 4), (2, 2), (5, 0)), (17, (1, 4), (3, 1), (8, 0)))  # rows; then rows and place of what is compared
_BEFORE = 6  # rows of a block that come before the boundary
_ELEMENTS = 500_000  # of hidden states that have to agree: rounding to 16 bits hides most differences of a sum
_MOST_TIMES = 4  # for small models


def probe_padding(session: PaddedSession, vocab_size: int, context_length: int, size: int, half: bool) -> Finding:
    """The first of `PADDINGS` under which a row's bits do not depend on the block it is computed in.

    Args:
        session: an empty one, with room for the whole of `probe_capacity`.
        vocab_size: token ids below it are run.
        context_length: positions below it are used.
        size: elements of hidden states in a row, of all layers.
        half: whether they have 16 bits.
    """
    draw = torch.Generator().manual_seed(0)
    prompt = _random_tokens(_PROMPT_LENGTH, vocab_size, draw)
    capacity = probe_capacity(context_length)
    prompt = prompt[: max(1, capacity // 4)]
    session.prefill(prompt)
    session.fill()  # a long context costs nothing: what the keys are is all the same
    session.padding = NO_PADDING
    bare = session.forward(prompt[-1:])
    for padding in PADDINGS:
        session.padding = padding
        try:
            found = _is_invariant(session, vocab_size, capacity, size if half else _ELEMENTS, draw)
            found = found and _agrees(session, len(prompt), prompt[-1:], bare, tolerance=0.1 if half else 1e-3)
        except Exception:  # whatever a model says of more keys than tokens: it cannot be padded
            if padding == NO_PADDING:
                raise
            found = False
        if found and not half:  # in 16 bits rounding hides most differences, so that equal bits show little
            return Finding(Exactness.BITWISE, padding)
    return Finding(Exactness.NUMERICAL, NO_PADDING)


def probe_capacity(context_length: int) -> int:
    """Tokens that a session for `probe_padding` has to hold."""
    return min(_BOUNDARIES[-1] + max(rows for rows, *_ in _BLOCKS), context_length)


def _is_invariant(session: PaddedSession, vocab_size: int, capacity: int, size: int, draw: torch.Generator) -> bool:
    """Whether blocks of other lengths, from other starts, and with other rows in them give a token the same logits."""
    boundaries = [b for b in _BOUNDARIES if session.padding.keys(b) == b and b < capacity] or [capacity // 2]
    agreed = 0
    for _ in range(_MOST_TIMES):
        for number, boundary in enumerate(boundaries):
            rows, *others = _BLOCKS[number % len(_BLOCKS)]
            start = max(1, min(boundary - _BEFORE, capacity - rows))
            tokens = _random_tokens(min(rows, capacity - start), vocab_size, draw)
            session.pretend(start)
            block = session.forward(tokens)
            for length, place in others:  # from the back: what comes before is as the block left it
                if place + length > len(tokens):
                    continue
                shared = max(1, length - 1)  # the last row of several is another token
                given = [*tokens[place : place + shared], *_random_tokens(length - shared, vocab_size, draw)]
                session.pretend(start + place)
                if not torch.equal(session.forward(given)[:shared], block[place : place + shared]):
                    return False
                agreed += shared * size
        if agreed >= _ELEMENTS:
            break
    return True


def _agrees(session: PaddedSession, length: int, token_ids: list[int], bare: torch.Tensor, tolerance: float) -> bool:
    """Whether the padding changes nothing but rounding: that dead keys are hidden, in every layer."""
    session.pretend(length)
    padded = session.forward(token_ids)
    return bool((padded - bare).abs().max() <= tolerance * bare.abs().max())


def _random_tokens(count: int, vocab_size: int, draw: torch.Generator) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=draw).tolist()


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
