"""What comes back from an engine: a finished output with its stats, and a stream of its pieces."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from knn_ssd.backends.base import Exactness
from knn_ssd.errors import UsageError
from knn_ssd.plan import Plan
from knn_ssd.routing.router import Route
from knn_ssd.speculation.decode import FinishReason, Round, TokenLogprobs
from knn_ssd.tools.memory import MemoryUse


@dataclass(frozen=True, slots=True)
class Stats:
    """What one generation took and brought.

    Args:
        tokens: how many were emitted.
        rounds: in how many rounds, the prefill's first token being one.
        drafted: tokens drafted.
        accepted: drafted tokens that were emitted.
        prefill_sec: the pass over the prompt.
        route_sec: from prompt vector to plan.
        decode_sec: drafting, verifying and accepting.
        exactness: what the target's passes promise.
        memory: what the engine and the process held at the end.
        reused: how many of the prompt's tokens an earlier request had run.
    """

    tokens: int
    rounds: int
    drafted: int
    accepted: int
    prefill_sec: float
    route_sec: float
    decode_sec: float
    exactness: Exactness
    memory: MemoryUse
    reused: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float:
        return self.tokens / self.rounds

    @property
    def tokens_per_sec(self) -> float:
        """Tokens over all seconds, the prompt's included."""
        return self.tokens / (self.prefill_sec + self.route_sec + self.decode_sec)


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished output.

    Args:
        text: without special tokens, and without the stop string that ended it.
        token_ids: as transformers returns them after the prompt, the end-of-sequence token included.
        route: which anchor was nearest; None without an atlas.
        plan: what drafted; a plain one where nothing did.
        stats: what it took.
        finish_reason: why it ended.
        logprobs: of each of `token_ids`, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    route: Route | None
    plan: Plan
    stats: Stats
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """One round of a stream, and the text that became certain with it.

    Args:
        pieces: what became certain with each of the round's tokens; it may belong to those before it, too.
        round: the round.
    """

    pieces: tuple[str, ...]
    round: Round

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Stream(Iterator[Chunk]):
    """The chunks of one output. It can be left at any time; `close` frees its memory at once.

    Attributes:
        route: known before the first chunk; None without an atlas.
        plan: what drafts.
        prompt_tokens: length of the prompt.
    """

    def __init__(
        self, route: Route | None, plan: Plan, prompt_tokens: int, steps: Generator[Chunk, None, Generation]
    ) -> None:
        self.route = route
        self.plan = plan
        self.prompt_tokens = prompt_tokens
        self._steps = steps
        self._result: Generation | None = None

    def __next__(self) -> Chunk:
        try:
            return next(self._steps)
        except StopIteration as end:
            self._result = end.value or self._result
            raise StopIteration from None

    @property
    def result(self) -> Generation:
        """The whole output, once the stream has ended; runs it to its end if it has not."""
        for _ in self:
            pass
        if self._result is None:
            raise UsageError("a stream that was closed before its end has no result")
        return self._result

    def close(self) -> None:
        self._steps.close()
