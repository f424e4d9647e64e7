"""The HTTP application: its paths and what is shared among them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from knn_ssd.engine import Engine
from knn_ssd.owner import Owner
from knn_ssd.server.access import CLIENT_GONE, BodyLimit, keyed_route
from knn_ssd.server.choices import ChoiceWriter
from knn_ssd.server.completions import CompletionHandler
from knn_ssd.server.logprobs import Logprobs
from knn_ssd.server.metrics import Metrics
from knn_ssd.server.owners import Owners
from knn_ssd.server.page import add_page
from knn_ssd.server.problems import StatusError, add_errors
from knn_ssd.server.replies import REFUSALS, STREAMED
from knn_ssd.server.responses import PromptTexts, response_headers
from knn_ssd.server.scheduler import Limits, Scheduler
from knn_ssd.server.schemas import ChatRequest, CompletionRequest
from knn_ssd.server.streams import ClientDisconnectedError, EventStream, unless_gone

_REPORTED = [f"x-knn-ssd-{name}" for name in ("exactness", "plan", "neighbours", "route")]


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
        aliases: other names that the model has for clients.
        origins: the origins of web pages that browsers let use the server (CORS); `*` is any.
    """

    model: str
    owners: Owners = field(default_factory=Owners)
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = 4 * 2**20
    body_sec: float = 30.0
    drain_sec: float = 30.0
    aliases: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def check_model(self, name: str) -> None:
        """Raises a `StatusError` for a model that is not served."""
        if name != self.model and name not in self.aliases:
            message = f"the model '{name}' is not served; '{self.model}' is"
            raise StatusError(404, message, param="model", code="model_not_found")


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
    add_errors(app)
    api = _api(settings, scheduler, metrics)
    app.include_router(api)
    _add_status(app, scheduler, metrics)
    add_page(app, engine.atlas)
    routes = [route for route in (*api.routes, *app.routes) if isinstance(route, Route)]
    app.add_middleware(CountResponses, metrics=metrics, paths={route.endpoint: route.path for route in routes})
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_REPORTED,
        )
    return app


def _api(settings: ServeSettings, scheduler: Scheduler, metrics: Metrics) -> APIRouter:
    """The paths that need an API key, if there are keys."""
    limit = BodyLimit(settings.max_body_bytes, settings.body_sec)
    api = APIRouter(prefix="/v1", route_class=keyed_route(settings.owners, limit))
    tokenizer = scheduler.engine.tokenizer
    logprobs, prompt_texts = Logprobs(tokenizer), PromptTexts(tokenizer)

    async def respond(request: ChatRequest | CompletionRequest, http: Request) -> Response:
        settings.check_model(request.model)
        owner = Owner() if request.store is False else http.state.owner
        writer = ChoiceWriter(request, logprobs)
        handler = CompletionHandler(request, owner, scheduler, metrics, writer, prompt_texts)
        try:
            body = await unless_gone(
                http.receive, handler.start_stream() if request.stream else handler.full_response()
            )
            headers = response_headers(scheduler.engine.exactness, handler.prefill)
            if request.stream:
                return EventStream(handler.stream(), handler.cancel, headers)
            return JSONResponse(body, headers=headers)
        except ClientDisconnectedError:
            handler.cancel()
            return Response(status_code=CLIENT_GONE)
        except BaseException:
            handler.cancel()
            raise

    @api.post("/chat/completions", responses={**STREAMED, **REFUSALS})
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        """Generates the next message of a conversation."""
        return await respond(request, http)

    @api.post("/completions", responses={**STREAMED, **REFUSALS})
    async def completions(request: CompletionRequest, http: Request) -> Response:
        """Continues texts, each by itself."""
        return await respond(request, http)

    _add_models(api, settings)
    return api


def _add_models(api: APIRouter, settings: ServeSettings) -> None:
    started = int(time.time())
    refusals = {status: REFUSALS[status] for status in (401, 404, "4XX")}

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "knn-ssd"}

    @api.get("/models", responses=refusals)
    async def models() -> dict[str, Any]:
        """Lists the one model that is served."""
        return {"object": "list", "data": [described(settings.model)]}

    @api.get("/models/{model:path}", responses=refusals)
    async def model(model: str) -> dict[str, Any]:
        """Describes the model that is served, by any of its names."""
        settings.check_model(model)
        return described(model)


def _add_status(app: FastAPI, scheduler: Scheduler, metrics: Metrics) -> None:
    @app.get("/health", responses={503: {"description": "The thread that owns the model has failed."}})
    async def health() -> Response:
        """Reports that the process is running, and that the thread that owns the model is."""
        if scheduler.failure is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed", "error": type(scheduler.failure).__name__}, 503)

    @app.get("/ready", responses={503: {"description": "The server is shutting down, or has failed."}})
    async def ready() -> Response:
        """Reports whether requests are accepted."""
        if scheduler.alive:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "closing" if scheduler.failure is None else "failed"}, 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        """The metrics in Prometheus's text format."""
        return PlainTextResponse(metrics.text())


class CountResponses:
    """Middleware that counts responses by the path of their route and their status.

    Args:
        app: the application.
        metrics: where they are counted.
        paths: the path of each route's endpoint, which clients cannot make up.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Mapping[Any, str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._count(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not started and scope["type"] == "http":
                self._count(scope, 500)  # which is what the client gets
            raise

    def _count(self, scope: Scope, status: int) -> None:
        path = self._paths.get(scope.get("endpoint"), "other")
        self._metrics.responses.labels(path, str(status)).inc()
