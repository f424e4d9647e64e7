"""Turns a request into a full response or a stream of server-sent events, through n jobs of the scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from knn_ssd.errors import KnnSsdError
from knn_ssd.outputs import Chunk, Generation
from knn_ssd.owner import Owner
from knn_ssd.routing.answers import Neighbour
from knn_ssd.server.limits import error_body, internal_error_message
from knn_ssd.server.logprobs import Logprobs
from knn_ssd.server.metrics import Metrics
from knn_ssd.server.responses import PromptTexts, prefill_fields, round_fields
from knn_ssd.server.scheduler import Event, Job, PrefillDone, Scheduler
from knn_ssd.server.schemas import FINISH_REASONS, ChatRequest, CompletionRequest, usage

DONE = "data: [DONE]\n\n"


class ClientDisconnectedError(Exception):
    """The client disconnected before its response was complete."""


@dataclass(slots=True)
class CompletionHandler:
    """Produces the n choices of one request.

    Args:
        request: the request.
        owner: what the request may use of earlier ones, and where it is kept for later ones.
        scheduler: runs its n jobs.
        metrics: counts the finished ones.
        logprobs: writes their log-probabilities.
        prompt_texts: writes the prompts of neighbours.

    Attributes:
        id: the response's id.
        created: the response's Unix time.
        prefill: what the first job reported after its prefill; its neighbours are those that the response names.
        results: the finished choices by index.
    """

    request: ChatRequest | CompletionRequest
    owner: Owner
    scheduler: Scheduler
    metrics: Metrics
    logprobs: Logprobs
    prompt_texts: PromptTexts
    id: str = ""
    created: int = 0
    prefill: PrefillDone | None = None
    results: dict[int, Generation] = field(default_factory=dict)
    _jobs: list[Job] = field(default_factory=list)
    _events: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)
    _neighbours: dict[int, tuple[Neighbour, ...]] = field(default_factory=dict)  # of each choice
    _chunks: dict[int, list[Chunk]] = field(default_factory=dict)  # kept for logprobs and rounds
    _offsets: dict[int, int] = field(default_factory=dict)  # characters of each choice's text sent so far
    _first_fields: dict[str, Any] = field(default_factory=dict)  # sent with the first event

    async def start(self) -> PrefillDone:
        """Submits the jobs and waits for the first one's prefill, before which a request can still be refused.

        Raises:
            KnnSsdError: the prompt cannot be used, or no more requests are accepted.
        """
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        options = {**self.request.options(), "owner": self.owner}
        loop = asyncio.get_running_loop()
        # Not on the model's thread: a prompt of megabytes takes seconds to encode, and must not delay other requests.
        encode = self.scheduler.engine.encode
        token_ids = await asyncio.to_thread(encode, self.request.prompt_like, options.get("chat", True))
        try:
            for index in range(self.request.n):
                seeded = {**options, "seed": self.request.seed_of(index)}
                callback = _queue_callback(loop, self._events, index)
                self._jobs.append(self.scheduler.submit(token_ids, seeded, callback))
            self.prefill = await self._first()
            if self.request.knn_ssd.rounds:
                self._first_fields = prefill_fields(self.prefill, self.prompt_texts)
        except BaseException:
            self.cancel()
            raise
        return self.prefill

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def cancel(self) -> None:
        """Ends the jobs that are still running."""
        for job in self._jobs:
            self.scheduler.cancel(job)

    async def events(self) -> AsyncIterator[tuple[int, Chunk | Generation]]:
        """The chunks and finished choices as they come, each with its index.

        Raises:
            Exception: an error that ended one of the jobs.
        """
        try:
            while len(self.results) < self.request.n:
                index, event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Generation):
                    self.results[index] = event
                    self.metrics.finished(event)
                if isinstance(event, PrefillDone):
                    self._neighbours[index] = event.neighbours
                else:
                    yield index, event
        finally:
            self.cancel()

    async def full_response(self, http: Request) -> dict[str, Any]:
        """The response of a request without `stream`.

        Raises:
            ClientDisconnectedError: the client disconnected meanwhile.
        """
        collecting = asyncio.ensure_future(self._collect())
        leaving = asyncio.ensure_future(_disconnect(http))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientDisconnectedError
            await collecting
        finally:
            for task in (collecting, leaving):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
            self.cancel()
        results = [self.results[index] for index in range(self.request.n)]
        choices = [
            self._choice(index, result.text, self._logprobs_of(index, *self._chunks.get(index, [])), result)
            for index, result in enumerate(results)
        ]
        fields = {"knn_ssd": {**self._first_fields, "rounds": self._rounds()}} if self.request.knn_ssd.rounds else {}
        return {**self._head(streamed=False), "choices": choices, "usage": self._usage(), **fields}

    async def stream_response(self) -> AsyncIterator[str]:
        """The response as server-sent events; an error after the first of them is an event too."""
        with_usage = self.request.stream_options is not None and self.request.stream_options.include_usage
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        if self.is_chat:
            for index in range(self.request.n):
                yield self._event([_delta(index, {"role": "assistant", "content": ""}, None)], extra)
        try:
            async for index, event in self.events():
                if isinstance(event, Generation):
                    yield self._event([self._piece(index, None, None, event)], extra)
                elif event.text or self._is_detailed:
                    fields = self._round_fields(index, event) if self.request.knn_ssd.rounds else None
                    logprobs = self._logprobs_of(index, event)
                    yield self._event([self._piece(index, event.text, logprobs)], extra, fields)
        except Exception as error:
            message = str(error) if isinstance(error, KnnSsdError) else internal_error_message(error)
            yield f"data: {json.dumps(error_body(message, 'server_error'), ensure_ascii=False)}\n\n"
            return
        if with_usage:
            yield self._event([], {"usage": self._usage()})
        yield DONE

    @property
    def _is_detailed(self) -> bool:
        """Whether rounds without text are sent, too: for their tokens or their log-probabilities."""
        return self.request.knn_ssd.rounds or self.request.num_logprobs is not None

    async def _collect(self) -> None:
        async for index, event in self.events():
            if isinstance(event, Chunk) and self._is_detailed:
                self._chunks.setdefault(index, []).append(event)

    def _rounds(self) -> list[dict[str, Any]]:
        return [
            {"index": index, **self._round_fields(index, chunk)}
            for index in range(self.request.n)
            for chunk in self._chunks[index]
        ]

    def _round_fields(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """The fields of a round, with its neighbour's place among those that the response names."""
        assert self.prefill is not None
        place, named = chunk.round.neighbour, [each.answer.id for each in self.prefill.neighbours]
        found = None if place is None else self._neighbours[index][place].answer.id
        return round_fields(chunk, named.index(found) if found in named else None)

    def _logprobs_of(self, index: int, *chunks: Chunk) -> dict[str, Any] | None:
        if self.request.num_logprobs is None:
            return None
        if self.is_chat:
            return self.logprobs.chat(chunks)
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(chunk.text) for chunk in chunks)
        return self.logprobs.completion(chunks, offset)

    async def _first(self) -> PrefillDone:
        """The first `PrefillDone`. Events of other jobs that come before it are put back into the queue."""
        kept = []
        while True:
            index, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, PrefillDone):
                self._neighbours[index] = event.neighbours
                break
            kept.append((index, event))
        for each in kept:
            self._events.put_nowait(each)
        return event

    def _usage(self) -> dict[str, Any]:
        assert self.prefill is not None
        return usage(self.prefill.prompt_tokens, list(self.results.values()))

    def _head(self, streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.is_chat else "chat.completion" + ".chunk" * streamed
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def _event(self, choices: list[dict[str, Any]], extra: dict[str, Any], fields: dict[str, Any] | None = None) -> str:
        data = {**self._head(streamed=True), "choices": choices, **extra}
        if self._first_fields or fields:
            data["knn_ssd"] = {**self._first_fields, **(fields or {})}
            self._first_fields = {}
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    def _piece(
        self, index: int, text: str | None, logprobs: dict[str, Any] | None, result: Generation | None = None
    ) -> dict[str, Any]:
        if not self.is_chat:
            return self._choice(index, text or "", logprobs, result)
        return _delta(index, {} if text is None else {"content": text}, logprobs, result)

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, result: Generation | None
    ) -> dict[str, Any]:
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        )
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": _reason(result)}


def _delta(
    index: int, delta: dict[str, str], logprobs: dict[str, Any] | None, result: Generation | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": _reason(result)}


def _reason(result: Generation | None) -> str | None:
    return None if result is None else FINISH_REASONS[result.finish_reason]


def _queue_callback(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]], index: int) -> Any:
    def callback(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop was closed: the event is not needed
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    return callback


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
