"""The parts of OpenAI's API that are served, as pydantic models. Any other parameter is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from knn_ssd.outputs import Generation
from knn_ssd.speculation.decode import FinishReason
from knn_ssd.tokenization import PromptLike

MOST_CHOICES = 16
_SHORT_COMPLETION = 16  # tokens, the default of OpenAI's own /v1/completions

FINISH_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
}

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_name(cls, data: Any) -> Any:
        """Drops all unknown names except the first, which is reported; reporting thousands would take seconds."""
        if not isinstance(data, dict) or len(data) <= len(cls.model_fields):
            return data
        unknown = next(name for name in data if name not in cls.model_fields)
        return {name: value for name, value in data.items() if name in cls.model_fields or name == unknown}


class TextPart(_Strict):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(_Strict):
    """What a stream contains besides its text."""

    include_usage: bool = False


class DraftingOptions(_Strict):
    """Extensions of this server: whether to decode plainly, and whether to report every round."""

    plain: bool = False
    rounds: bool = False


class _Request(_Strict):
    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    store: bool | None = None
    knn_ssd: DraftingOptions = DraftingOptions()

    def sampling(self) -> dict[str, Any]:
        """The sampling options of `Engine.stream`."""
        stop = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        return {"temperature": self.temperature, "top_p": self.top_p, "stop": stop, "plain": self.knn_ssd.plain}

    def seed_of(self, choice: int) -> int | None:
        """The seed of one of the n choices; each has its own."""
        return None if self.seed is None else (self.seed + choice) % 2**63


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, most: int | None, info: ValidationInfo) -> int | None:
        if most is not None and not info.data.get("logprobs"):
            raise PydanticCustomError("needs_logprobs", "needs 'logprobs' to be true")
        return most

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report with each log-probability; None reports neither."""
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def prompt_like(self) -> PromptLike:
        return [message.plain() for message in self.messages]

    def options(self) -> dict[str, Any]:
        """The options of `Engine.stream`."""
        limit = self.max_completion_tokens or self.max_tokens
        return {**self.sampling(), "max_new_tokens": limit, "logprobs": self.num_logprobs}


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Text | Annotated[list[int], Field(min_length=1, fail_fast=True)]
    max_tokens: Tokens = _SHORT_COMPLETION
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def num_logprobs(self) -> int | None:
        """The same as in `ChatRequest`."""
        return self.logprobs

    @property
    def prompt_like(self) -> PromptLike:
        return self.prompt

    def options(self) -> dict[str, Any]:
        """The options of `Engine.stream`."""
        return {**self.sampling(), "max_new_tokens": self.max_tokens, "chat": False, "logprobs": self.logprobs}


class Problem(BaseModel):
    """An error: its message, its type, and the parameter that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: Problem


_REFUSALS: dict[int | str, str] = {
    400: "The request cannot be used: an option that is unknown or out of range, a prompt or output that is too long.",
    401: "The API key is missing or wrong.",
    404: "The model is not served.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    429: "Too many requests are waiting; Retry-After says when to try again.",
    500: "An error inside the server.",
    503: "The server is shutting down, or others' requests take the memory; Retry-After says when to try again.",
    504: "The request passed its deadline.",
    "4XX": "Any other error of the client.",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning} for status, meaning in _REFUSALS.items()
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response; with `stream`, its chunks as server-sent events that end with `[DONE]`.",
        "content": {"text/event-stream": {}},
    }
}


def usage(prompt_tokens: int, results: list[Generation]) -> dict[str, Any]:
    """Token counts over all choices. Drafted tokens are reported as the API's predicted tokens."""
    completion = sum(len(result.token_ids) for result in results)
    accepted = sum(result.stats.accepted for result in results)
    drafted = sum(result.stats.drafted for result in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": max((result.stats.reused for result in results), default=0)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }
