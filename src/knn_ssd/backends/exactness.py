"""Probes on the loaded weights whether a row's logits depend on the other rows of its forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from knn_ssd.backends.base import Exactness, ForwardOutput, ForwardRequest, SharesPasses
from knn_ssd.kernels.binding import float32_inputs, rounds_inputs

if TYPE_CHECKING:
    from knn_ssd.backends.base import Backend, Session

_PROMPT_TOKENS, _BLOCK = 11, 17
_WIDTHS = (1, 2, 3, 5, 9)  # rows; compared with the same rows of a block of `_BLOCK`
_LATER_START, _LATER_WIDTHS = 3, (1, 4)  # the same from another position on


def probe(backend: Backend) -> Exactness:
    """Runs the same tokens in blocks of several widths, at two positions and in a batch, and compares their logits.

    With equal bits, speculative output equals that of plain decoding under any plan. With different bits, the logits
    agree up to rounding, which can decide a near-tie between two tokens either way. It is a probe of blocks of 1, 2, 3,
    4, 5, 9 and 17 rows, not a proof; the tests of the kernels compare all widths. Where inputs are rounded, which hides
    most differences, it also runs with float32 inputs.
    """
    with float32_inputs():
        is_equal = _has_equal_bits(backend)
    if is_equal and rounds_inputs():
        is_equal = _has_equal_bits(backend)
    return Exactness.BITWISE if is_equal else Exactness.NUMERICAL


def _has_equal_bits(backend: Backend) -> bool:
    start = min(_PROMPT_TOKENS, max(1, backend.context_length // 3))
    tokens = [(7 * i + 3) % backend.vocab_size for i in range(min(start + _BLOCK, backend.context_length))]
    requests: list[ForwardRequest] = []

    def recorded(request: ForwardRequest) -> ForwardOutput:
        requests.append(request)
        return backend.forward(request)

    session, other = (backend.open(len(tokens), forward=recorded) for _ in range(2))
    try:
        session.prefill(tokens[:start])
        block = tokens[start:]
        expected = session.forward(block).clone()  # (17, V)
        if not all(torch.equal(session.forward(block[:width]), expected[:width]) for width in _WIDTHS):
            return False
        session.forward(block)
        session.commit(min(_LATER_START, len(block)))
        rest, later = block[_LATER_START:], expected[_LATER_START:]
        if not all(torch.equal(session.forward(rest[:width]), later[:width]) for width in _LATER_WIDTHS if rest):
            return False
        return not isinstance(backend, SharesPasses) or _is_equal_in_a_batch(backend, other, tokens, requests)
    finally:
        session.close()
        other.close()


def _is_equal_in_a_batch(
    backend: SharesPasses, other: Session, tokens: list[int], requests: list[ForwardRequest]
) -> bool:
    """Whether the last of the recorded requests gives the same bits in one pass with another session's."""
    first = requests[-1]
    other.prefill(tokens[:1])
    other.forward(tokens[1:3])
    pair = [first, requests[-1]]
    alone = [backend.forward_batch([request])[0].logits for request in pair]
    together = [output.logits for output in backend.forward_batch(pair)]
    return all(torch.equal(one, both) for one, both in zip(alone, together, strict=True))
