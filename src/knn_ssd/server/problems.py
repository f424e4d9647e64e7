"""Errors as clients get them: in the format of OpenAI's API, each with its status."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from knn_ssd.errors import KnnSsdError, MemoryInUseError, MemoryLimitError, PromptError, UsageError
from knn_ssd.server.scheduler import BusyError, ClosingError, DeadlineError, ModelThreadError
from knn_ssd.server.structured import FieldError

INVALID = "invalid_request_error"
_STATUS = {
    PromptError: 400,
    UsageError: 400,
    BusyError: 429,
    ClosingError: 503,
    ModelThreadError: 503,
    MemoryInUseError: 503,
    MemoryLimitError: 400,
    DeadlineError: 504,
}
_RETRY_SEC = 1
_MAX_ECHO = 1000  # characters of a client's own text that an error message repeats


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in the format of OpenAI's API. Texts that a client sent may stand in it as they are."""
    return {"error": {"message": _printable(message), "type": kind, "param": param and _printable(param), "code": code}}


def _printable(text: str) -> str:
    """The text, shortened and without lone surrogates, which cannot be encoded."""
    short = text if len(text) <= _MAX_ECHO else f"{text[:_MAX_ECHO]}…"
    return short.encode("utf-8", "backslashreplace").decode()


class StatusError(Exception):
    """A request that is refused with a status and an error in OpenAI's format.

    Args:
        status: the status.
        message: the error's message.
        kind: its type.
        param: the parameter that it is about.
        code: its code.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind, param, code)
        self.headers = headers


def error_message(error: Exception) -> str:
    """The message that clients get for any error: the sentence of a known one, the kind of a bug in the server."""
    return str(error) if isinstance(error, KnnSsdError) else f"an error inside the server: {type(error).__name__}"


def add_errors(app: FastAPI) -> None:
    """Has every error of an application answered in OpenAI's format."""

    @app.exception_handler(KnnSsdError)
    async def known_error(_http: Request, error: KnnSsdError) -> Response:
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
        kind = INVALID if status == 400 else "rate_limit_error" if status == 429 else "server_error"
        again = isinstance(error, BusyError | ClosingError | MemoryInUseError)
        param = error.field if isinstance(error, FieldError) else None
        headers = {"retry-after": str(_RETRY_SEC)} if again else None
        return JSONResponse(error_body(str(error), kind, param), status, headers)

    @app.exception_handler(StatusError)
    async def refused(_http: Request, error: StatusError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_http: Request, error: RequestValidationError) -> Response:
        return JSONResponse(_validation_body(error), 400)

    @app.exception_handler(HTTPException)
    async def http_error(_http: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail), INVALID), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unknown_error(_http: Request, error: Exception) -> Response:
        return JSONResponse(error_body(error_message(error), "server_error"), 500)


def _validation_body(error: RequestValidationError) -> dict[str, Any]:
    """What is wrong with a body: the first parameter that cannot be used, and all that is wrong with it."""
    param = code = None
    problems = [([str(part) for part in each["loc"] if part != "body"], each) for each in error.errors()]
    place, first = problems[0]
    if first["type"] == "json_invalid":
        message = f"the body is not JSON, at character {place[0]}: {first['ctx']['error']}"
    elif first["type"] in ("model_attributes_type", "missing") and not place:
        message = "the body must be a JSON object, and the header content-type: application/json"
    elif first["type"] in ("extra_forbidden", "unsupported_parameter"):
        param, code = ".".join(place), "unsupported_parameter"
        reason = str(first["msg"]) if first["type"] == "unsupported_parameter" else "is not supported"
        message = f"'{param}' {reason}"
    else:
        alike = [(other, each) for other, each in problems if other[:1] == place[:1]]
        reasons = dict.fromkeys(str(each["msg"]) for _, each in alike)
        places = [other for other, _ in alike]  # of one value, they differ in the type that was tried
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(min(places), max(places), strict=False))
        param = ".".join(one for one, _ in shared) or None
        message = ": ".join(filter(None, (param, "; or ".join(reasons))))
    return error_body(message, INVALID, param, code)
