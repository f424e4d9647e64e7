"""One request from its prompt to the end of its output.

`Request` is the one place where a session is opened, a prompt prefilled, rounds decoded and the session closed again.
Generation, streams, `custom_generate`, calibration and the benchmark all run requests.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from knn_ssd.backends.base import Backend, ForwardOutput, ForwardRequest
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.outputs import Chunk, Generation, Stats, Stream, count_by_drafter
from knn_ssd.plan import Plan
from knn_ssd.routing.answers import AnswerStore, Neighbour
from knn_ssd.routing.router import Route
from knn_ssd.sampling import Sampler
from knn_ssd.speculation.cost_model import CostModel
from knn_ssd.speculation.decode import FinishReason, Round, decode
from knn_ssd.speculation.drafter import Drafter
from knn_ssd.tokenization import Detokenizer
from knn_ssd.tools.memory import MemoryUse

EndRule = Callable[[int], FinishReason | None]
"""Receives every emitted token in order, and says whether the output ends with it, and why."""


def end_at(eos_token_ids: Collection[int], stop_token_ids: Collection[int] = ()) -> EndRule:
    """The rule that ends an output at an end-of-sequence token or at a stop token."""
    reasons = {**dict.fromkeys(stop_token_ids, FinishReason.STOP), **dict.fromkeys(eos_token_ids, FinishReason.EOS)}
    return reasons.get


class Batcher(Protocol):
    """Runs the forward passes of requests, those of several requests together where it can."""

    @property
    def cost_model(self) -> CostModel:
        """What the passes cost."""

    def forward(self, request: ForwardRequest) -> ForwardOutput:
        """Runs one session's rows, perhaps in one pass with others'."""

    def prepare(self, plan: Plan) -> None:
        """Waits until forward passes can run under a plan; other requests go on meanwhile."""

    def clock(self) -> float:
        """Seconds for which the calling request has kept the machine busy."""


@dataclass(frozen=True, slots=True)
class Unbatched:
    """Runs each request's forward passes alone, at once."""

    backend: Backend
    cost_model: CostModel

    def forward(self, request: ForwardRequest) -> ForwardOutput:
        return self.backend.forward(request)

    def prepare(self, plan: Plan) -> None:
        self.backend.prepare(plan)

    def clock(self) -> float:
        return time.perf_counter()


class Request:
    """A prompt that was prefilled, and all that belongs to it until its output ends.

    Args:
        backend: executes the model.
        prompt_ids: the prompt's token ids.
        max_new_tokens: the longest output, at least 1.
        sampler: chooses tokens.
        ends: where the output ends, besides stop strings and `max_new_tokens`.
        detokenizer: makes text of the output and finds stop strings; None where no text is wanted.
        batcher: runs the forward passes; None runs them alone.
        prefix_cache: where the KV cache of prompts with the same first tokens is found and left.
        limit_reason: the finish reason where `max_new_tokens` ends the output.
        logprobs: how many of the likeliest tokens to report with each token's log-probability; None reports neither.

    Attributes:
        session: the request's.
        prefill: its result.
        context: prompt and output so far.
        route, plan: of the prompt; set by the engine once the prompt is routed.
        drafter: None decodes plainly.
        neighbours: earlier requests whose answers can draft, nearest first.
        answers: where this request is kept when its output has ended; None keeps it nowhere.
        route_sec: seconds from prompt vector to plan and neighbours.
    """

    def __init__(
        self,
        backend: Backend,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        sampler: Sampler,
        ends: EndRule,
        *,
        detokenizer: Detokenizer | None = None,
        batcher: Batcher | None = None,
        prefix_cache: PrefixCache | None = None,
        limit_reason: FinishReason = FinishReason.LENGTH,
        logprobs: int | None = None,
    ) -> None:
        self._backend = backend
        self._ends = ends
        self._detokenizer = detokenizer
        self._clock = batcher.clock if batcher is not None else time.perf_counter
        self._limit_reason = limit_reason
        self._logprobs = logprobs
        self._pieces: list[str] = []  # the text that became certain with each token
        self._held: list[int] = []  # characters that were held back after each
        self.max_new_tokens = max_new_tokens
        self.sampler = sampler
        self.context = list(prompt_ids)
        self.num_prompt_tokens = len(self.context)
        self.route: Route | None = None
        self.plan = Plan.plain(backend.num_layers)
        self.drafter: Drafter | None = None
        self.neighbours: tuple[Neighbour, ...] = ()
        self.answers: AnswerStore | None = None
        self.route_sec = 0.0
        forward = batcher.forward if batcher is not None else None
        self.session = backend.open(self.num_prompt_tokens + max_new_tokens, prefix_cache, forward)
        try:
            self.prefill = self.session.prefill(list(prompt_ids))
        except BaseException:
            self.close()
            raise

    def rounds(self) -> Iterator[Round]:
        """The rounds of the output. The session stays open."""
        rounds: list[Round] = []
        for current in self._decode():
            rounds.append(current)
            if current.finish_reason is not None and self.sampler.grammar is not None:
                self.sampler.grammar.check_end(self.context[self.num_prompt_tokens :])
            if current.finish_reason is not None and self.answers is not None:
                self._keep(self.answers, rounds)
            yield current

    def _decode(self) -> Iterator[Round]:
        return decode(
            self.session,
            self.context,
            self.prefill.logits,
            self.drafter,
            self.sampler,
            self.max_new_tokens,
            self._end,
            self._limit_reason,
            self._clock,
            self._logprobs,
        )

    def _keep(self, answers: AnswerStore, rounds: Sequence[Round]) -> None:
        """Adds this request to the answer store, and credits the neighbours whose tokens were accepted."""
        useful = Counter[int]()
        for each in rounds:
            if each.neighbour is not None:
                answer = self.neighbours[each.neighbour].answer
                useful[answer.id] += each.drafters[: each.accepted].count("retrieval")
        answers.credit(useful)
        prompt_ids, token_ids = self.context[: self.num_prompt_tokens], self.context[self.num_prompt_tokens :]
        answers.add(self.prefill.mean.cpu().numpy(), prompt_ids, token_ids, count_by_drafter(rounds))

    def stream(self) -> Stream:
        """The output as a stream, which closes the session when it ends or is left."""
        return Stream(self.route, self.plan, self.num_prompt_tokens, self.neighbours, self._chunks())

    def close(self) -> None:
        """Closes the session."""
        self.session.close()

    def __enter__(self) -> Request:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _end(self, token: int) -> FinishReason | None:
        reason = self._ends(token)
        if self._detokenizer is None or reason is FinishReason.STOP:  # a stop token is no part of the text
            self._pieces.append("")
            self._held.append(0)
            return reason
        stopped = self._detokenizer.push(token)
        self._pieces.append(self._detokenizer.take())
        self._held.append(self._detokenizer.held)
        return reason or (FinishReason.STOP if stopped else None)

    def _chunks(self) -> Generator[Chunk, None, Generation]:
        rounds: list[Round] = []
        with self:
            for current in self.rounds():
                rounds.append(current)
                if current.finish_reason is not None and self._detokenizer is not None:
                    self._pieces[-1] += self._detokenizer.finish()
                    self._held[-1] = 0
                fresh = slice(-len(current.tokens), None)
                yield Chunk(tuple(self._pieces[fresh]), current, tuple(self._held[fresh]))
        return self._generation(rounds)

    def _generation(self, rounds: Sequence[Round]) -> Generation:
        reason = rounds[-1].finish_reason
        assert reason is not None
        stats = Stats(
            tokens=sum(len(r.tokens) for r in rounds),
            rounds=len(rounds),
            drafted=sum(r.drafted for r in rounds),
            accepted=sum(r.accepted for r in rounds),
            prefill_sec=self.prefill.seconds,
            route_sec=self.route_sec,
            decode_sec=sum(r.draft_sec + r.verify_sec for r in rounds),
            exactness=self._backend.exactness,
            memory=MemoryUse.now(self._backend.weight_bytes, self._backend.low_bit_bytes),
            reused=self.prefill.reused,
            by_drafter=count_by_drafter(rounds),
        )
        token_ids = tuple(token for r in rounds for token in r.tokens)
        logprobs = tuple(each for r in rounds for each in r.logprobs)
        text = "".join(self._pieces)
        return Generation(text, token_ids, self.route, self.plan, stats, reason, logprobs, self.neighbours)
