"""Turns a request into a full response or a stream of server-sent events, through jobs of the scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

from knn_ssd.outputs import Chunk, Generation
from knn_ssd.owner import Owner
from knn_ssd.server.choices import Choice, ChoiceWriter, EncodedPrompt
from knn_ssd.server.messages import with_arguments_for
from knn_ssd.server.metrics import Metrics
from knn_ssd.server.problems import error_body, error_message
from knn_ssd.server.replies import usage
from knn_ssd.server.reply_text import ReplyText
from knn_ssd.server.responses import PromptTexts, prefill_fields, round_fields
from knn_ssd.server.scheduler import Event, PrefillDone, PromptScored, Scheduler
from knn_ssd.server.schemas import ChatRequest, CompletionRequest
from knn_ssd.server.streams import DONE, PING, PING_SEC, event
from knn_ssd.server.terms import template_of
from knn_ssd.server.thinking import Thinking
from knn_ssd.server.tool_calls import ToolUse
from knn_ssd.tokenization import Messages, PromptLike, echoed

HEADERS_SEC = 1.0  # in which a stream's headers wait for the first prefill, which some of them report


@dataclass(slots=True)
class CompletionHandler:
    """Produces the choices of one request: n for each of its prompts.

    Args:
        request: the request.
        owner: what the request may use of earlier ones, and where it is kept for later ones.
        scheduler: runs its jobs.
        metrics: counts the finished ones.
        writer: writes its choices.
        prompt_texts: writes the prompts of neighbours.

    Attributes:
        choices: the choices, in order.
        prefill: what the first job reported after its prefill; its neighbours are those that the response names.
    """

    request: ChatRequest | CompletionRequest
    owner: Owner
    scheduler: Scheduler
    metrics: Metrics
    writer: ChoiceWriter
    prompt_texts: PromptTexts
    choices: list[Choice] = field(default_factory=list)
    prefill: PrefillDone | None = None
    _events: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)
    _early: list[tuple[Choice, Event]] = field(default_factory=list)  # reported before the headers were sent
    _num_done: int = 0  # choices of which nothing more comes
    _first_fields: dict[str, Any] = field(default_factory=dict)  # sent with the next event

    def cancel(self) -> None:
        """Ends the jobs that are still running."""
        for choice in self.choices:
            self.scheduler.cancel(choice.job)

    async def full_response(self) -> dict[str, Any]:
        """The response of a request without `stream`.

        Raises:
            KnnSsdError: the prompt cannot be used, no more requests are accepted, or the deadline has passed.
        """
        await self._start()
        async for choice, each in self._reported():
            if isinstance(each, Chunk):
                choice.reply.push(each)
                choice.chunks += [each] * self._is_detailed
        choices = [self.writer.whole(choice) for choice in self.choices]
        fields = {"knn_ssd": {**self._first_fields, "rounds": self._rounds()}} if self.request.knn_ssd.rounds else {}
        return {**self.writer.head(streamed=False), "choices": choices, "usage": self._usage(), **fields}

    async def start_stream(self) -> None:
        """Starts a request with `stream`, and waits a moment for its first prefill, before which it can be refused.

        Raises:
            KnnSsdError: the prompt cannot be used, or no more requests are accepted.
        """
        await self._start()
        first = await self._next(HEADERS_SEC)
        if first is not None:
            self._early.append(first)

    async def stream(self) -> AsyncGenerator[str, None]:
        """The response as server-sent events; an error after the headers is an event too."""
        try:
            if isinstance(self.request, ChatRequest) or (
                self.request.echoes and self.request.num_prompt_logprobs is None
            ):
                for choice in self.choices:
                    yield self._event(self.writer.beginning(choice))
            async for choice, each in self._reported():
                piece = PING if each is None else self._piece(choice, each)
                if piece is not None:
                    yield piece
        except Exception as error:
            yield event(error_body(error_message(error), "server_error"))
            return
        if self.request.stream_options.include_usage:
            yield event({**self.writer.head(streamed=True), "choices": [], "usage": self._usage()})
        yield DONE

    async def _start(self) -> None:
        """Takes places in the queue, and submits the jobs once the prompts are tokenised.

        That is done on another thread than the model's: a prompt of megabytes takes seconds, and must not delay other
        requests.
        """
        prompts, n = self.request.prompts, self.request.n
        loop = asyncio.get_running_loop()
        callbacks = [_queue_callback(loop, self._events, index) for index in range(len(prompts) * n)]
        self.choices = [Choice(index, job) for index, job in enumerate(self.scheduler.reserve(callbacks))]
        try:
            async with self._in_time():
                encoded = await asyncio.to_thread(lambda: [self._encode(prompt) for prompt in prompts])
                thinking = self._thinking(encoded[0])
                options = await asyncio.to_thread(self._options, thinking)
            for choice in self.choices:
                choice.reply = self._reply(thinking)
                choice.prompt = encoded[choice.index // n]
                seeded = {**options, "seed": self.request.seed_of(choice.index % n)}
                num_logprobs = self.request.num_prompt_logprobs
                self.scheduler.start(choice.job, choice.prompt.token_ids, seeded, num_logprobs)
        except BaseException:
            self.cancel()
            raise

    @property
    def _tools(self) -> ToolUse | None:
        """The tools that the answer may call."""
        request, tokenizer = self.request, self.scheduler.engine.tokenizer
        if not isinstance(request, ChatRequest) or not request.offers_tools or tokenizer is None:
            return None
        return ToolUse(request.tools, request.tool_choice, request.parallel_tool_calls, tokenizer)

    def _thinking(self, prompt: EncodedPrompt) -> Thinking | None:
        """How an answer that has or may have a form may begin with thinking."""
        tokenizer = self.scheduler.engine.tokenizer
        if not isinstance(self.request, ChatRequest) or not self.request.has_form or tokenizer is None:
            return None
        return Thinking.of(tokenizer, prompt.token_ids)

    def _reply(self, thinking: Thinking | None) -> ReplyText:
        """The text of a choice that begins."""
        special = {} if thinking is None else thinking.special
        if self._tools is None:
            return ReplyText(thinking, None, special)
        return ReplyText(thinking, self._tools.reply(), {**special, **self._tools.special_tokens})

    def _options(self, thinking: Thinking | None) -> dict[str, Any]:
        """The options of `Engine.stream`, with a grammar that was compiled if there is one."""
        options = {**self.request.options(thinking), "owner": self.owner}
        if self._tools is not None:
            options["grammar"] = self._tools.grammar(thinking)
        if options.get("grammar") is not None:
            self.scheduler.engine.check_options(options)
        return options

    def _encode(self, prompt: PromptLike) -> EncodedPrompt:
        engine, template = self.scheduler.engine, self.request.template
        if self._tools is not None and template is not None:
            tools, form = self._tools.described, self._tools.format
            prompt = form.messages(cast("Messages", prompt), tools)
            template = replace(template, tools=() if form.is_described else tools)
        if template is not None and engine.tokenizer is not None:
            prompt = with_arguments_for(template_of(engine.tokenizer), cast("Messages", prompt))
        token_ids = engine.encode(prompt, isinstance(self.request, ChatRequest), template)
        if not self.request.echoes:
            return EncodedPrompt(token_ids)
        pieces = echoed(engine.tokenizer, token_ids)
        return EncodedPrompt(token_ids, prompt if isinstance(prompt, str) else "".join(pieces), pieces)

    async def _reported(self) -> AsyncIterator[tuple[Choice, Event | None]]:
        """What the jobs report as it comes, with the choice that it belongs to; None where nothing came for a while.

        Raises:
            Exception: an error that ended one of the jobs; the others are ended as well.
        """
        try:
            for choice, early in self._early:
                yield choice, early
            while self._num_done < len(self.choices):
                yield await self._next(PING_SEC) or (self.choices[0], None)
        finally:
            self.cancel()

    async def _next(self, patience_sec: float) -> tuple[Choice, Event] | None:
        """What is reported next, once it was noted; None if nothing comes for so long."""
        if self._events.empty():
            async with self._in_time():
                try:
                    async with asyncio.timeout(patience_sec):
                        index, reported = await self._events.get()
                except TimeoutError:
                    return None
        else:
            index, reported = self._events.get_nowait()
        if isinstance(reported, Exception):
            raise reported
        self._note(self.choices[index], reported)
        return self.choices[index], reported

    def _note(self, choice: Choice, reported: Event) -> None:
        if isinstance(reported, PromptScored):
            choice.scored = reported
            choice.is_done = self.request.max_tokens == 0
            self._num_done += choice.is_done
        elif isinstance(reported, PrefillDone):
            choice.neighbours = reported.neighbours
            self.metrics.started(reported)
            if self.prefill is None:
                self.prefill = reported
                if self.request.knn_ssd.rounds:
                    self._first_fields = prefill_fields(reported, self.prompt_texts)
        elif isinstance(reported, Chunk):
            choice.num_tokens += len(reported.round.tokens)
        elif isinstance(reported, Generation):
            choice.result, choice.is_done = reported, True
            self._num_done += 1
            self.metrics.finished(reported)

    def _piece(self, choice: Choice, reported: Event) -> str | None:
        """The event of a stream for what was reported; None where it brings nothing."""
        if isinstance(reported, PromptScored):
            return self._event(self.writer.beginning(choice))
        if isinstance(reported, Chunk):
            piece = self.writer.chunk(choice, reported)
            if not (reported.text or self._is_detailed or any(piece.get("delta", {}).values())):
                return None
            fields = self._round_fields(choice, reported) if self.request.knn_ssd.rounds else None
            return self._event(piece, fields)
        if not isinstance(reported, Generation):
            return None
        return "".join(self._event(piece) for piece in self.writer.end(choice))

    @property
    def _is_detailed(self) -> bool:
        """Whether rounds without text are sent, too: for their tokens or their log-probabilities."""
        return self.request.knn_ssd.rounds or self.request.num_logprobs is not None

    def _rounds(self) -> list[dict[str, Any]]:
        return [
            {"index": choice.index, **self._round_fields(choice, chunk)}
            for choice in self.choices
            for chunk in choice.chunks
        ]

    def _round_fields(self, choice: Choice, chunk: Chunk) -> dict[str, Any]:
        """The fields of a round, with its neighbour's place among those that the response names."""
        assert self.prefill is not None
        place, named = chunk.round.neighbour, [each.answer.id for each in self.prefill.neighbours]
        found = None if place is None else choice.neighbours[place].answer.id
        return round_fields(chunk, named.index(found) if found in named else None)

    def _usage(self) -> dict[str, Any]:
        prompts = self.choices[:: self.request.n]
        results = [choice.result for choice in self.choices if choice.result is not None]
        generated = sum(choice.num_tokens for choice in self.choices)
        return usage(sum(len(choice.prompt.token_ids) for choice in prompts), generated, results)

    def _event(self, piece: dict[str, Any], fields: dict[str, Any] | None = None) -> str:
        options = self.request.stream_options
        data: dict[str, Any] = {**self.writer.head(streamed=True), "choices": [piece]}
        if options.continuous_usage_stats:
            data["usage"] = self._usage()
        elif options.include_usage:
            data["usage"] = None
        if self._first_fields or fields:
            data["knn_ssd"] = {**self._first_fields, **(fields or {})}
            self._first_fields = {}
        return event(data)

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Ends what is awaited at the request's deadline, whatever the model's thread is busy with."""
        due = self.choices[0].job.due
        try:
            async with asyncio.timeout(None if due == math.inf else max(due - time.monotonic(), 0.0)) as limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise self.scheduler.limits.passed() from None
            raise


def _queue_callback(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]], index: int) -> Any:
    def callback(reported: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop was closed: the event is not needed
            loop.call_soon_threadsafe(events.put_nowait, (index, reported))

    return callback
