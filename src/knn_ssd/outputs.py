"""What an engine returns: a finished generation with its statistics, or a stream of chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from knn_ssd.backends.base import Exactness
from knn_ssd.errors import UsageError
from knn_ssd.plan import Plan
from knn_ssd.routing.answers import DraftCount, Neighbour
from knn_ssd.routing.router import Route
from knn_ssd.speculation.decode import FinishReason, Round, TokenLogprobs
from knn_ssd.tools.memory import MemoryUse


@dataclass(frozen=True, slots=True)
class Stats:
    """The statistics of one generation.

    Args:
        tokens: number of emitted tokens.
        rounds: number of rounds; the prefill, which gives the first token, counts as one.
        drafted: number of drafted tokens.
        accepted: number of drafted tokens that were emitted.
        prefill_sec: seconds of the prefill.
        route_sec: seconds from the prompt vector to the plan.
        decode_sec: seconds of drafting, verification and acceptance.
        exactness: what the backend's forward passes guarantee.
        memory: memory of the engine and the process at the end.
        reused: number of prompt tokens whose keys and values came from the prefix cache.
        by_drafter: numbers of drafted and accepted tokens of each drafter that drafted.
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
    by_drafter: Mapping[str, DraftCount] = field(default_factory=dict)

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float:
        return self.tokens / self.rounds

    @property
    def tokens_per_sec(self) -> float:
        """Tokens per second from end to end, the prefill included."""
        return self.tokens / (self.prefill_sec + self.route_sec + self.decode_sec)


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished output.

    Args:
        text: the output without special tokens and without the stop string that ended it.
        token_ids: the output as transformers returns it after the prompt, the end-of-sequence token included.
        route: the prompt's route; None without an atlas.
        plan: the plan that drafted; the plain one where nothing did.
        stats: the statistics.
        finish_reason: why it ended.
        logprobs: one entry for each of `token_ids` if they were asked for, else empty.
        neighbours: the earlier requests whose answers could draft, nearest first.
    """

    text: str
    token_ids: tuple[int, ...]
    route: Route | None
    plan: Plan
    stats: Stats
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """One round of a stream, and the text that became final with it.

    Args:
        pieces: the text that became final with each token of the round; it may include text of earlier tokens.
        round: the round.
        held: after each token, how many characters are held back, as they may be the beginning of a stop string.
    """

    pieces: tuple[str, ...]
    round: Round
    held: tuple[int, ...]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Stream(Iterator[Chunk]):
    """Iterates over the chunks of one output. It can be abandoned at any time; `close` frees its memory at once.

    Attributes:
        route: the prompt's route, known before the first chunk; None without an atlas.
        plan: the plan that drafts.
        prompt_tokens: number of tokens in the prompt.
        neighbours: the earlier requests whose answers can draft, nearest first; known before the first chunk.
    """

    def __init__(
        self,
        route: Route | None,
        plan: Plan,
        prompt_tokens: int,
        neighbours: tuple[Neighbour, ...],
        steps: Generator[Chunk, None, Generation],
    ) -> None:
        self.route = route
        self.plan = plan
        self.prompt_tokens = prompt_tokens
        self.neighbours = neighbours
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
        """The finished output. Runs the stream to its end if it has not ended yet."""
        for _ in self:
            pass
        if self._result is None:
            raise UsageError("a stream that was closed before its end has no result")
        return self._result

    def close(self) -> None:
        self._steps.close()


def count_by_drafter(rounds: Sequence[Round]) -> dict[str, DraftCount]:
    """Numbers of drafted and accepted tokens of each drafter that drafted in these rounds."""
    drafted, accepted = Counter[str](), Counter[str]()
    for each in rounds:
        drafted.update(each.drafters)
        accepted.update(each.drafters[: each.accepted])
    return {name: DraftCount(count, accepted[name]) for name, count in drafted.items()}
