"""Fields of requests besides what is generated from: those that are inert, those with one value only, and sampling.

A client may send every field that the API documents, with the value that it has by default. A value that would change
the answer and cannot be honoured is refused by the field's name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from knn_ssd.server.messages import Strict


def _refuse_unless(value: Any, values: tuple[Any, ...]) -> Any:
    if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
        raise PydanticCustomError("unsupported_parameter", "is not supported")
    return value


def _only(*values: Any) -> AfterValidator:
    """Accepts these values, and refuses others by the field's name."""
    return AfterValidator(lambda value: _refuse_unless(value, values))


class InertFields(Strict):
    """Fields that change no answer: about the client, its bill and its caches."""

    metadata: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    priority: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    request_id: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    user: Any = None


class FixedFields(Strict):
    """Fields of which only the default can be honoured."""

    audio: Annotated[Any, _only(None)] = None
    best_of: Annotated[Any, _only(1)] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    include_stop_str_in_output: Annotated[Any, _only(False)] = None
    length_penalty: Annotated[Any, _only(1)] = None
    logits_processors: Annotated[Any, _only([])] = None
    moderation: Annotated[Any, _only(None)] = None
    modalities: Annotated[Any, _only(["text"])] = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None  # of a completion, as are tools
    skip_special_tokens: Annotated[Any, _only(True)] = None
    suffix: Annotated[Any, _only("")] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    tools: Annotated[Any, _only([])] = None
    use_beam_search: Annotated[Any, _only(False)] = None
    verbosity: Annotated[Any, _only("medium")] = None
    web_search_options: Annotated[Any, _only(None)] = None


class SamplingFields(Strict):
    """Options of sampling besides temperature and top_p, with the names of OpenAI's API and vLLM."""

    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    top_k: Annotated[int, Field(ge=-1), AfterValidator(lambda most: max(most, 0))] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1000, fail_fast=True)] | None = None

    def engine_options(self) -> dict[str, Any]:
        """The given ones as options of `Engine.stream`."""
        given = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return {name: value for name, value in given.items() if value is not None}
