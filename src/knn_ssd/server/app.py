"""The HTTP application: its paths, errors in OpenAI's format, API keys and the limits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from knn_ssd.engine import Engine
from knn_ssd.errors import KnnSsdError, MemoryInUseError, MemoryLimitError, PromptError, UsageError
from knn_ssd.owner import Owner
from knn_ssd.server.completions import ClientDisconnectedError, CompletionHandler
from knn_ssd.server.limits import CLIENT_GONE, BodyLimit, error_body, internal_error_message
from knn_ssd.server.logprobs import Logprobs
from knn_ssd.server.metrics import Metrics
from knn_ssd.server.owners import Owners
from knn_ssd.server.page import add_page
from knn_ssd.server.responses import PromptTexts, prefill_headers
from knn_ssd.server.scheduler import BusyError, ClosingError, DeadlineError, Limits, Scheduler
from knn_ssd.server.schemas import REFUSALS, STREAMED, ChatRequest, CompletionRequest

_INVALID = "invalid_request_error"
_STATUS = {PromptError: 400, UsageError: 400, BusyError: 429, ClosingError: 503, DeadlineError: 504}
_STATUS |= {MemoryInUseError: 503, MemoryLimitError: 400}  # the first counts that an error is an instance of
_RETRY_SEC = 1


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """The settings of a server.

    Args:
        model: the model name that clients send.
        owners: the API keys that clients must send, and what is kept for each; by default no key, and nothing.
        limits: limits on the number and duration of requests.
        max_body_bytes: the longest request body.
        body_sec: seconds within which a body must arrive.
        drain_sec: seconds that running requests have to finish when the server is shut down.
    """

    model: str
    owners: Owners = field(default_factory=Owners)
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = 4 * 2**20
    body_sec: float = 30.0
    drain_sec: float = 30.0


def make_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """Makes the application. Its model thread runs until the application is shut down."""
    scheduler = Scheduler(engine, settings.limits)
    metrics = Metrics(scheduler)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        scheduler.close(settings.drain_sec)

    app = FastAPI(title="knn-ssd", lifespan=lifespan)
    app.state.scheduler = scheduler
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, timeout_sec=settings.body_sec)
    _add_errors(app)
    _add_middleware(app, settings, metrics)
    _add_completions(app, settings, scheduler, metrics)
    _add_status(app, settings, scheduler, metrics)
    add_page(app, engine.atlas)
    return app


def _add_completions(app: FastAPI, settings: ServeSettings, scheduler: Scheduler, metrics: Metrics) -> None:
    tokenizer = scheduler.engine.tokenizer
    logprobs, prompt_texts = Logprobs(tokenizer), PromptTexts(tokenizer)

    async def respond(request: ChatRequest | CompletionRequest, http: Request) -> Response:
        if request.model != settings.model:
            message = f"the model '{request.model}' is not served; '{settings.model}' is"
            return JSONResponse(error_body(message, _INVALID, "model", "model_not_found"), 404)
        owner = Owner() if request.store is False else http.state.owner
        handler = CompletionHandler(request, owner, scheduler, metrics, logprobs, prompt_texts)
        headers = {"x-knn-ssd-exactness": scheduler.engine.exactness.value, **prefill_headers(await handler.start())}
        if request.stream:
            return StreamingResponse(handler.stream_response(), media_type="text/event-stream", headers=headers)
        try:
            return JSONResponse(await handler.full_response(http), headers=headers)
        except ClientDisconnectedError:
            return Response(status_code=CLIENT_GONE)

    @app.post("/v1/chat/completions", responses={**STREAMED, **REFUSALS})
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        """Generates the next message of a conversation."""
        return await respond(request, http)

    @app.post("/v1/completions", responses={**STREAMED, **REFUSALS})
    async def completions(request: CompletionRequest, http: Request) -> Response:
        """Continues a text."""
        return await respond(request, http)


def _add_status(app: FastAPI, settings: ServeSettings, scheduler: Scheduler, metrics: Metrics) -> None:
    started = int(time.time())

    @app.get("/v1/models", responses={status: REFUSALS[status] for status in (401, "4XX")})
    async def models() -> dict[str, Any]:
        """Lists the one model that is served."""
        own = {"id": settings.model, "object": "model", "created": started, "owned_by": "knn-ssd"}
        return {"object": "list", "data": [own]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Reports that the process is running."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "The server is shutting down."}})
    async def ready() -> Response:
        """Reports whether requests are accepted."""
        return JSONResponse({"status": "ready" if scheduler.alive else "closing"}, 200 if scheduler.alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        """The metrics in Prometheus's text format."""
        return PlainTextResponse(metrics.text())


def _add_middleware(app: FastAPI, settings: ServeSettings, metrics: Metrics) -> None:
    @app.middleware("http")
    async def check_key_and_count(http: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        path = http.url.path
        if path.startswith("/v1/"):
            http.state.owner = settings.owners.find(http.headers.get("authorization", "").removeprefix("Bearer "))
            if http.state.owner is None:
                body = error_body("the API key is missing or wrong", "authentication_error", None, "invalid_api_key")
                return JSONResponse(body, 401)
        response = await proceed(http)
        known = any(getattr(route, "path", None) == path for route in app.routes)
        metrics.responses.labels(path if known else "other", str(response.status_code)).inc()
        return response


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(KnnSsdError)
    async def known_error(_http: Request, error: KnnSsdError) -> Response:
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
        kind = _INVALID if status == 400 else "rate_limit_error" if status == 429 else "server_error"
        headers = {"retry-after": str(_RETRY_SEC)} if status in (429, 503) else None
        return JSONResponse(error_body(str(error), kind), status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_http: Request, error: RequestValidationError) -> Response:
        param = code = None
        problems = [([str(part) for part in each["loc"] if part != "body"], each) for each in error.errors()]
        place, first = problems[0]
        if first["type"] == "json_invalid":
            message = f"the body is not JSON, at character {place[0]}: {first['ctx']['error']}"
        elif first["type"] in ("model_attributes_type", "missing") and not place:
            message = "the body must be a JSON object, and the header content-type: application/json"
        elif first["type"] == "extra_forbidden":
            param, code = ".".join(place), "unsupported_parameter"
            message = f"'{param}' is not supported"
        else:
            param = next(iter(place), None)
            reasons = dict.fromkeys(str(each["msg"]) for other, each in problems if other[:1] == place[:1])
            message = ": ".join(filter(None, (param, "; or ".join(reasons))))
        return JSONResponse(error_body(message, _INVALID, param, code), 400)

    @app.exception_handler(HTTPException)
    async def http_error(_http: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail), _INVALID), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unknown_error(_http: Request, error: Exception) -> Response:
        return JSONResponse(error_body(internal_error_message(error), "server_error"), 500)
