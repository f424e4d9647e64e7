"""What the rounds ask of a model that can draft for itself: a `Target`, and one `Session` per request.

A session owns one static key/value cache and one pointer. Tokens before the pointer are committed; a forward pass
writes behind it, and what is not committed is dead and will be overwritten. So rewinding costs nothing, and the draft
and the verification share one cache: a draft writes only in the attention sublayers it runs, at positions that the
verification recomputes in every layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch

from knn_ssd.atlas import Pooling
from knn_ssd.plan import Mode, Plan
from knn_ssd.target.prefixes import Prefixes


class Exactness(StrEnum):
    """What the target's passes promise, probed on the loaded weights."""

    BITWISE = "bitwise"  # a row's logits are the same bits whatever block it is computed in
    NUMERICAL = "numerical"  # the same up to rounding: a near-tie may fall either way


@dataclass(frozen=True, slots=True)
class Prefill:
    """What the pass over the prompt leaves behind.

    Args:
        logits: (V,) for the token after the prompt.
        mean: (D,) mean over the prompt's tokens of the last hidden state, after the final norm, float32.
        last: (D,) that of the last token.
        seconds: duration of the pass.
        reused: how many of the prompt's tokens an earlier session had run.
    """

    logits: torch.Tensor
    mean: torch.Tensor
    last: torch.Tensor
    seconds: float
    reused: int = 0

    def vector(self, pooling: Pooling) -> torch.Tensor:
        """The prompt vector (D,) under the given pooling."""
        return self.mean if pooling is Pooling.MEAN else self.last


class Session(Protocol):
    """One request's state on a target; sessions of one target never see each other."""

    @property
    def length(self) -> int:
        """The pointer: how many tokens are committed."""

    @property
    def capacity(self) -> int:
        """How many tokens the session can hold."""

    def prefill(self, token_ids: list[int]) -> Prefill:
        """Runs and commits the prompt. Only on an empty session."""

    def forward(self, token_ids: list[int], plan: Plan | None = None) -> torch.Tensor:
        """Logits (n, V) of n tokens at the pointer, not yet committed; with a plan, as a draft."""

    def commit(self, count: int) -> None:
        """Moves the pointer over the first `count` tokens of the last forward."""

    def rewind(self, length: int) -> None:
        """Moves the pointer back to `length`; what lies beyond is dead."""

    def rehearse(self, token_ids: list[int], plan: Plan, run_length: int) -> torch.Tensor:
        """Logits (n, V) that drafting would give for tokens the full model has just run at the pointer.

        Row i is drafted under the plan in runs of `run_length` tokens: it sees the full model's keys up to the start
        of its run and the draft's own from there. One pass for many positions, writing nothing: calibration's measure.
        """

    def looking_back(self, count: int) -> AbstractContextManager[None]:
        """Puts the pointer `count` committed tokens back, to rehearse them again, and then where it was."""

    def close(self) -> None:
        """Gives the cache's memory back."""


class Target(Protocol):
    """A model that can draft for itself."""

    @property
    def num_layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and output together, that the model was made for."""

    @property
    def device(self) -> torch.device: ...

    @property
    def modes(self) -> frozenset[Mode]:
        """The modes that a plan for this target may use."""

    @property
    def exactness(self) -> Exactness: ...

    @property
    def low_bit_bytes(self) -> int:
        """Memory of the low-bit copies made so far."""

    def prepare(self, plan: Plan) -> None:
        """Makes what a plan needs before its first pass, once; else that pass does."""

    def open(self, capacity: int, prefixes: Prefixes | None = None) -> Session:
        """A new session for at most `capacity` tokens.

        It takes over what earlier sessions left in the store for the same first tokens, and leaves its own there; on a
        target that cannot do so, every prompt is run whole.
        """
