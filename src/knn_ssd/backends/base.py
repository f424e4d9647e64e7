"""The contract of a backend, which executes a target model, and of its sessions, one per request.

A session owns one KV cache, which grows with the output, and one cursor. Tokens before the cursor are committed. A
forward pass writes behind it, and what is not committed will be overwritten. So rewinding costs nothing, and draft and
verification share one cache: a draft writes only in the attention sublayers it runs, at positions that the verification
recomputes in every layer.

A session never calls its backend. It hands a `ForwardRequest` to the function it was opened with, which is the
backend's own `forward` or a batcher's, and gets a `ForwardOutput`.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from knn_ssd.plan import Mode, Plan
from knn_ssd.progress import Progress

if TYPE_CHECKING:
    import torch

    from knn_ssd.backends.native.prefix_cache import PrefixCache


class Pooling(StrEnum):
    """How the prompt vector is taken from the hidden states of the prompt's tokens."""

    MEAN = "mean"  # as in the released code of arXiv 2505.16162
    LAST = "last"  # as in its text; the only one that vLLM's prefix caching leaves available


class Exactness(StrEnum):
    """What a backend's forward passes guarantee, probed on the loaded weights."""

    BITWISE = "bitwise"  # a row's logits are the same bits whatever block it is computed in
    NUMERICAL = "numerical"  # they are equal up to rounding: a near-tie between two tokens may fall either way


@dataclass(frozen=True, slots=True)
class Prefill:
    """The result of running a prompt.

    Args:
        logits: (V,) for the token after the prompt.
        mean: (D,) mean over the prompt's tokens of the last hidden state, after the final norm, in float32.
        last: (D,) the last token's.
        seconds: duration of the prefill.
        reused: how many of the prompt's tokens came from the prefix cache.
    """

    logits: torch.Tensor
    mean: torch.Tensor
    last: torch.Tensor
    seconds: float
    reused: int = 0

    def vector(self, pooling: Pooling) -> torch.Tensor:
        """The prompt vector (D,) under the given pooling."""
        return self.mean if pooling is Pooling.MEAN else self.last


@dataclass(frozen=True, slots=True, eq=False)
class ForwardRequest:
    """Rows of one session to run through the model.

    Args:
        token_ids: n tokens.
        position: of the first of them: how many tokens the session has committed.
        cache: the session's KV cache, of the backend's own kind.
        plan: the modes of the sublayers; None is the full model.
        num_logits: how many of the last rows need logits.
        run_length: for teacher-forced scoring, the length of its runs (see `Session.teacher_forced_logits`); else 0.
    """

    token_ids: Sequence[int]
    position: int
    cache: Any
    plan: Plan | None
    num_logits: int
    run_length: int = 0

    @property
    def is_prefill(self) -> bool:
        """Whether these rows are a part of a prompt, not of a round."""
        return self.num_logits < len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class ForwardOutput:
    """The result of a forward pass.

    Args:
        hidden: (n, D) hidden states after the final norm.
        logits: (num_logits, V) of the last rows.
    """

    hidden: torch.Tensor
    logits: torch.Tensor


Forward = Callable[[ForwardRequest], ForwardOutput]


class Session(Protocol):
    """One request's state; sessions of one backend never see each other."""

    @property
    def length(self) -> int:
        """The cursor: how many tokens are committed."""

    @property
    def capacity(self) -> int:
        """How many tokens the session can hold."""

    def prefill(self, token_ids: list[int]) -> Prefill:
        """Runs and commits the prompt. Only on an empty session.

        Raises:
            MemoryLimitError: there is no memory for it now.
        """

    def forward(self, token_ids: list[int], plan: Plan | None = None) -> torch.Tensor:
        """Logits (n, V) of n tokens at the cursor, not yet committed; with a plan, as its draft gives them."""

    def commit(self, count: int) -> None:
        """Moves the cursor over the first `count` tokens of the last forward pass."""

    def rewind(self, length: int) -> None:
        """Moves the cursor back to `length`; what lies beyond will be overwritten."""

    def teacher_forced_logits(self, token_ids: list[int], plan: Plan, run_length: int) -> torch.Tensor:
        """Logits (n, V) that drafting would give for tokens the full model has just run at the cursor.

        Row i is drafted under the plan in runs of `run_length` tokens: it sees the full model's keys up to the start
        of its run and the draft's own from there. One pass scores many positions and writes nothing.
        """

    def rewound(self, count: int) -> AbstractContextManager[None]:
        """Moves the cursor `count` committed tokens back for the length of a `with` block, to score them again."""

    def close(self) -> None:
        """Frees the KV cache."""


class Backend(Protocol):
    """Executes a target model, in full or under a plan."""

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
        """The modes that a plan for this backend may use."""

    @property
    def exactness(self) -> Exactness: ...

    @property
    def weight_bytes(self) -> int:
        """Memory of the target model's weights as this backend holds them."""

    @property
    def low_bit_bytes(self) -> int:
        """Memory of the 4-bit copies made so far."""

    def prepare(self, plan: Plan, progress: Progress | None = None) -> None:
        """Makes what a plan needs before its first forward pass; otherwise that pass makes it.

        Args:
            plan: the plan.
            progress: receives a stage for what is made; none where all is there already.
        """

    def prepare_later(self, plan: Plan, progress: Progress | None = None) -> bool:
        """Whether forward passes can run under a plan now. If not, what they need is made in the background from then
        on; but what takes a second or two is made at once.

        Args:
            plan: the plan.
            progress: receives a stage for what is made at once.
        """

    @property
    def is_preparing(self) -> bool:
        """Whether 4-bit copies are being made in the background."""

    def forward(self, request: ForwardRequest) -> ForwardOutput:
        """Runs one session's rows."""

    def open(self, capacity: int, prefix_cache: PrefixCache | None = None, forward: Forward | None = None) -> Session:
        """Opens a session.

        Args:
            capacity: the most tokens it can hold.
            prefix_cache: where it finds, and leaves, the KV cache of prompts with the same first tokens; a backend
                that cannot reuse them runs every prompt whole.
            forward: runs the session's forward passes; None is the backend's own `forward`.

        Raises:
            MemoryLimitError: its KV cache does not fit into memory.
        """

    def most_tokens(self) -> int:
        """The most tokens, prompt and output together, that a session can have now if it is the only one: those of the
        context, or those that fit into memory.
        """


@runtime_checkable
class SharesPasses(Protocol):
    """A backend whose forward passes several sessions can share."""

    def forward_batch(self, requests: Sequence[ForwardRequest]) -> list[ForwardOutput]:
        """Runs the rows of several sessions together; each gets the bits it would get alone."""


PlanModes = tuple[tuple[Mode, ...], Mode] | None


def modes_of(plan: Plan | None) -> PlanModes:
    """What of a plan decides a forward pass: the modes of the sublayers and of the LM head; None is the full model."""
    return None if plan is None else (plan.modes, plan.head)


def run_by_modes(
    requests: Sequence[ForwardRequest], run: Callable[[list[ForwardRequest]], list[ForwardOutput]]
) -> list[ForwardOutput]:
    """The outputs of requests in their order, where those under the same modes run together.

    Args:
        requests: one for each session.
        run: runs requests under the same modes.
    """
    groups: dict[PlanModes, list[ForwardRequest]] = {}
    for request in requests:
        groups.setdefault(modes_of(request.plan), []).append(request)
    outputs: dict[int, ForwardOutput] = {}
    for group in groups.values():
        outputs |= zip(map(id, group), run(group), strict=True)
    return [outputs[id(request)] for request in requests]
