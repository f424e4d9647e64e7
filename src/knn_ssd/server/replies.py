"""The replies that the schema documents, and the token counts in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from knn_ssd.outputs import Generation


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
    503: "Others' requests take the memory, or the server is shutting down, as Retry-After says; or it has failed.",
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


def usage(prompt_tokens: int, completion_tokens: int, results: Sequence[Generation] = ()) -> dict[str, Any]:
    """Token counts over all choices. Drafted tokens are reported as the API's predicted tokens.

    Args:
        prompt_tokens: tokens of all prompts.
        completion_tokens: tokens that were generated so far.
        results: the choices that are finished.
    """
    accepted = sum(result.stats.accepted for result in results)
    drafted = sum(result.stats.drafted for result in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": max((result.stats.reused for result in results), default=0)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }
