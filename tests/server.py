"""A server on a free port, for tests that speak HTTP with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import uvicorn
from helpers import endless, endless_tokenizer

from knn_ssd.engine import Engine
from knn_ssd.request import EndRule
from knn_ssd.routing.answers import AnswerStore
from knn_ssd.server.app import ServeSettings, make_app
from knn_ssd.server.listen import listen
from knn_ssd.server.scheduler import Scheduler
from knn_ssd.speculation.decode import FinishReason
from knn_ssd.testing import tiny_model

MODEL = "tiny"


def new_store(_name: str, max_tokens: int) -> AnswerStore:
    """An owner's answer store, in memory."""
    return AnswerStore(max_tokens)


class SlowEngine(Engine):
    """Waits for each token, so that a test has time to stop it."""

    def _open(self, token_ids: Any, limit: int, sampler: Any, ends: EndRule, *args: Any, **options: Any) -> Any:
        def slowly(token: int) -> FinishReason | None:
            time.sleep(0.01)
            return ends(token)

        return super()._open(token_ids, limit, sampler, slowly, *args, **options)


@dataclass
class Served:
    """A server on a free port, and its engine, which nothing else may use while the server runs."""

    engine: Engine
    scheduler: Scheduler
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


def serving(settings: ServeSettings, engine: Engine | None = None) -> Iterator[Served]:
    """A tiny model's server, or that of another engine, until the test is done with it."""
    engine = engine or Engine(endless(tiny_model()), endless_tokenizer())
    app = make_app(engine, settings)
    own = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(engine, app.state.scheduler, f"http://127.0.0.1:{own.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        own.close()
