"""Tests on the loaded weights whether a row's logits depend on the other rows of its forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from knn_ssd.backends.base import Exactness

if TYPE_CHECKING:
    from knn_ssd.backends.base import Backend

_PROMPT_LENGTH = 11
_BLOCK_LENGTH = 5


def probe(backend: Backend) -> Exactness:
    """Runs the same tokens one by one and in one block, and compares the bits of their logits.

    With equal bits, speculative output equals that of plain decoding under any plan. With different bits, the logits
    agree up to rounding, which can decide a near-tie between two tokens either way.
    """
    tokens = [(7 * i + 3) % backend.vocab_size for i in range(_PROMPT_LENGTH + _BLOCK_LENGTH)]
    session = backend.open(len(tokens))
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
