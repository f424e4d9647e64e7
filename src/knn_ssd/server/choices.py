"""One choice of a response as it comes about, and OpenAI's objects for it: whole, or in the pieces of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from knn_ssd.outputs import Chunk, Generation
from knn_ssd.routing.answers import Neighbour
from knn_ssd.server.logprobs import Logprobs, joined
from knn_ssd.server.reply_text import ReplyPart, ReplyText
from knn_ssd.server.scheduler import Job, PromptScored
from knn_ssd.server.schemas import FINISH_REASONS, ChatRequest, CompletionRequest
from knn_ssd.server.tool_calls import ToolCallFound


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt's tokens, and what `echo` gives back of it.

    Args:
        token_ids: its token ids.
        text: its text.
        pieces: the part of the text that each token stands for.
    """

    token_ids: Sequence[int]
    text: str = ""
    pieces: Sequence[str] = ()


@dataclass(slots=True)
class Choice:
    """One choice of a response.

    Args:
        index: its place in the response.
        job: generates it.

    Attributes:
        prompt: what it answers.
        neighbours: the earlier requests whose answers draft for it.
        scored: the log-probabilities of its prompt's tokens; None where they were not asked for.
        chunks: its rounds, where the response reports them.
        offset: characters of its text that were sent in a stream, the prompt included.
        num_tokens: tokens that were generated so far.
        result: what was generated; None until then.
        is_done: whether nothing more comes.
        reply: its text, divided into thinking, content and tool calls.
    """

    index: int
    job: Job
    prompt: EncodedPrompt = EncodedPrompt(())
    neighbours: tuple[Neighbour, ...] = ()
    scored: PromptScored | None = None
    chunks: list[Chunk] = field(default_factory=list)
    offset: int = 0
    num_tokens: int = 0
    result: Generation | None = None
    is_done: bool = False
    reply: ReplyText = field(default_factory=ReplyText)

    @property
    def calls(self) -> Sequence[ToolCallFound]:
        """Its tool calls, once it is finished."""
        return self.reply.tools.calls if self.reply.tools is not None else ()

    @property
    def reason(self) -> str | None:
        """The API's finish reason; None while more may come."""
        if not self.is_done:
            return None
        if self.calls:
            return "tool_calls"
        return "length" if self.result is None else FINISH_REASONS[self.result.finish_reason]


class ChoiceWriter:
    """Writes the objects of one response.

    Args:
        request: the request.
        logprobs: writes log-probabilities.
    """

    def __init__(self, request: ChatRequest | CompletionRequest, logprobs: Logprobs) -> None:
        self._request = request
        self._logprobs = logprobs
        self._is_chat = isinstance(request, ChatRequest)
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def head(self, streamed: bool) -> dict[str, Any]:
        """What every object begins with."""
        kind = "text_completion" if not self._is_chat else "chat.completion" + ".chunk" * streamed
        return {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        if self._is_chat:
            content: dict[str, Any] = {"message": self._message(choice)}
        else:
            text = "" if choice.result is None else choice.result.text
            content = {"text": choice.prompt.text * self._request.echoes + text}
        logprobs = self._of(choice, choice.chunks, with_prompt=True)
        return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": choice.reason}

    def _message(self, choice: Choice) -> dict[str, Any]:
        choice.reply.finish()
        message = {"role": "assistant", **_fields(ReplyPart(choice.reply.reasoning, choice.reply.content))}
        if not choice.calls:
            return {"content": "", **message}
        return {"content": None, **message, "tool_calls": [call.json() for call in choice.calls]}

    def beginning(self, choice: Choice) -> dict[str, Any]:
        """What a stream says of a choice before it is generated: its role, or its prompt with `echo`."""
        if self._is_chat:
            return self._piece(choice, {"role": "assistant", "content": ""}, None)
        logprobs = self._of(choice, (), with_prompt=True) if choice.scored is not None else None
        choice.offset = len(choice.prompt.text)
        return self._piece(choice, {"text": choice.prompt.text}, logprobs)

    def chunk(self, choice: Choice, chunk: Chunk) -> dict[str, Any]:
        """One round of a choice."""
        logprobs = self._of(choice, [chunk], with_prompt=False)
        choice.offset += len(chunk.text)
        delta = (_fields(choice.reply.push(chunk)) or {"content": ""}) if self._is_chat else {"text": chunk.text}
        return self._piece(choice, delta, logprobs)

    def end(self, choice: Choice) -> list[dict[str, Any]]:
        """The last pieces of a choice: text that was held back, tool calls, and the finish reason."""
        rest = _fields(choice.reply.finish())
        pieces: list[dict[str, Any]] = [rest] if rest else []
        pieces += [{"tool_calls": [each]} for n, call in enumerate(choice.calls) for each in call.deltas(n)]
        early = [{**self._piece(choice, piece, None), "finish_reason": None} for piece in pieces]
        return [*early, self._piece(choice, {} if self._is_chat else {"text": ""}, None)]

    def _piece(self, choice: Choice, content: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        content = {"delta": content} if self._is_chat else content
        return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": choice.reason}

    def _of(self, choice: Choice, chunks: Sequence[Chunk], *, with_prompt: bool) -> dict[str, Any] | None:
        if self._request.num_logprobs is None:
            return None
        if self._is_chat:
            return self._logprobs.chat(chunks)
        if not with_prompt or choice.scored is None:
            return self._logprobs.completion(chunks, choice.offset)
        prompt = self._logprobs.prompt(choice.prompt.token_ids, choice.prompt.pieces, choice.scored.logprobs)
        return joined(prompt, self._logprobs.completion(chunks, len(choice.prompt.text)))


def _fields(part: ReplyPart) -> dict[str, Any]:
    """The fields of a message, or of a stream's delta, for what is not empty."""
    fields = {"reasoning_content": part.reasoning, "content": part.content}
    return {name: text for name, text in fields.items() if text}
