"""The parts of OpenAI's API that are served, as pydantic models. Any other parameter is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from knn_ssd.server.fields import FixedFields, InertFields, SamplingFields
from knn_ssd.server.messages import Message, Strict
from knn_ssd.server.structured import (
    MOST_TOOLS,
    ResponseFormat,
    TextFormat,
    Tool,
    ToolChoice,
    check_tools,
    format_grammar,
)
from knn_ssd.server.thinking import Thinking
from knn_ssd.speculation.decode import FinishReason
from knn_ssd.tokenization import PromptLike, TemplateOptions

MOST_CHOICES = 16  # of one prompt
MOST_TOTAL_CHOICES = 256  # of all prompts of a request
MOST_STOP_CHARACTERS = 100_000  # of all stop strings of a request
_SHORT_COMPLETION = 16  # tokens, the default of OpenAI's own /v1/completions
_REST = -1  # tokens: as many as the context has room for

FINISH_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
}

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[int, Field(ge=1)] | Literal[-1]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class StreamOptions(Strict):
    """What a stream contains besides its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Any = None


class DraftingOptions(Strict):
    """Extensions of this server: whether to decode plainly, and whether to report every round."""

    plain: bool = False
    rounds: bool = False


class _Request(InertFields, FixedFields, SamplingFields):
    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    store: bool | None = None
    knn_ssd: DraftingOptions = DraftingOptions()

    @field_validator("stop")
    @classmethod
    def _of_bounded_length(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if sum(map(len, [stop] if isinstance(stop, str) else stop or [])) > MOST_STOP_CHARACTERS:
            message = f"all stop strings together may have at most {MOST_STOP_CHARACTERS} characters"
            raise PydanticCustomError("too_long", message)
        return stop

    def sampling(self) -> dict[str, Any]:
        """The sampling options of `Engine.stream`."""
        stop = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        own = {"temperature": self.temperature, "top_p": self.top_p, "stop": stop, "plain": self.knn_ssd.plain}
        return {**own, **self.engine_options(), "logprobs": self.num_logprobs}

    def seed_of(self, choice: int) -> int | None:
        """The seed of one of the choices; each has its own."""
        return None if self.seed is None else (self.seed + choice) % 2**63

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report with each log-probability; None reports neither."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether the prompt is part of the answer."""
        return False

    @property
    def template(self) -> TemplateOptions | None:
        """How the chat template is applied."""
        return None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    response_format: ResponseFormat = TextFormat(type="text")
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] = Field(default_factory=list)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, most: int | None, info: ValidationInfo) -> int | None:
        if most and not info.data.get("logprobs"):
            raise PydanticCustomError("needs_logprobs", "needs 'logprobs' to be true")
        return most

    @model_validator(mode="after")
    def _of_one_form(self) -> ChatRequest:
        check_tools(self.tools, self.tool_choice)
        if self.offers_tools and not isinstance(self.response_format, TextFormat):
            message = "response_format cannot be used with tools that may be called; set tool_choice to 'none'"
            raise PydanticCustomError("two_forms", message)
        return self

    @property
    def offers_tools(self) -> bool:
        """Whether the answer may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def has_form(self) -> bool:
        """Whether the answer has or may have a form: that of the response format, or of a tool call."""
        return not isinstance(self.response_format, TextFormat) or self.offers_tools

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def prompts(self) -> list[PromptLike]:
        """The one conversation."""
        return [[message.plain() for message in self.messages]]

    @property
    def template(self) -> TemplateOptions:
        return TemplateOptions(self.add_generation_prompt, self.continue_final_message, self.chat_template_kwargs)

    def options(self, thinking: Thinking | None = None) -> dict[str, Any]:
        """The options of `Engine.stream`.

        Args:
            thinking: how an answer of a demanded form may begin.

        Raises:
            FieldError: the schema of the response format cannot be used.
        """
        limit = _limit(self.max_completion_tokens or self.max_tokens)
        return {**self.sampling(), "max_new_tokens": limit, "grammar": format_grammar(self.response_format, thinking)}


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Annotated[
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_TOTAL_CHOICES, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_TOTAL_CHOICES, fail_fast=True)],
        Field(description="A text or token ids, or a list of them with a choice each."),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | Literal[-1] = _SHORT_COMPLETION
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("needs_echo", "max_tokens must be greater than or equal to 1 without 'echo'")
        if len(self.prompts) * self.n > MOST_TOTAL_CHOICES:
            message = f"a request may have at most {MOST_TOTAL_CHOICES} choices of all its prompts"
            raise PydanticCustomError("too_many", message)
        if len(self.prompts) > 1 and self.knn_ssd.rounds:
            raise PydanticCustomError("one_prompt", "'knn_ssd.rounds' needs a single prompt")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return (self.logprobs or 0) if self.echo and (self.logprobs is not None or self.max_tokens == 0) else None

    @property
    def echoes(self) -> bool:
        return self.echo

    @property
    def prompts(self) -> list[PromptLike]:
        """The prompts; each has n choices."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [cast("PromptLike", self.prompt)]
        return list(cast("list[PromptLike]", self.prompt))

    def options(self, _thinking: Thinking | None = None) -> dict[str, Any]:
        """The options of `Engine.stream`; no completion has a demanded form."""
        return {**self.sampling(), "max_new_tokens": _limit(self.max_tokens), "chat": False}


def _limit(tokens: int | None) -> int | None:
    """The `max_new_tokens` of the engine, where None is the rest of the context."""
    return None if tokens == _REST else tokens
