"""A server stays alive and closed to strangers: clients that leave, hostile values, deadlines, a failed thread."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from helpers import endless
from server import MODEL, Served, SlowEngine, serving
from test_native import wide_model

from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.base import ForwardOutput, ForwardRequest, Pooling, SharesPasses
from knn_ssd.engine import Engine
from knn_ssd.errors import PromptError
from knn_ssd.kernels.binding import kernels_obstacle
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.plan import Plan
from knn_ssd.server import completions
from knn_ssd.server.app import ServeSettings, make_app
from knn_ssd.server.owners import Owners
from knn_ssd.server.responses import header_value
from knn_ssd.server.scheduler import BusyError, Limits, ModelThreadError, Scheduler
from knn_ssd.server.schemas import MOST_STOP_CHARACTERS
from knn_ssd.server.streams import event
from knn_ssd.speculation.cost_model import typical_profile
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.tokenization import Detokenizer

BODY = {"model": MODEL, "prompt": "a fox", "max_tokens": 4, "temperature": 0}
LONG = {**BODY, "max_tokens": 240}
running_server = contextmanager(serving)


def tiny() -> Engine:
    return Engine(endless(tiny_model()), tiny_tokenizer(chat=True))


def until(condition: Callable[[], bool], sec: float = 10) -> None:
    due = time.monotonic() + sec
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.01)


def post(url: str, body: dict[str, Any] = BODY, path: str = "completions", **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json=body, timeout=30, **options)


# --- Stop strings


def test_a_long_stop_string_costs_no_more_than_the_text() -> None:
    tokenizer = tiny_tokenizer()
    stop = "ab" * 5_000_000  # whose every beginning must not be tried at every token
    detokenizer = Detokenizer(tokenizer, [stop])
    began = time.monotonic()
    for token in tokenizer("ab" * 500)["input_ids"]:
        detokenizer.push(token)
        assert detokenizer.take() == ""
    assert detokenizer.finish() == "ab" * 500
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("stop", ["x" * (MOST_STOP_CHARACTERS + 1), ["x" * 10_000] * 11], ids=["one", "all"])
def test_stop_strings_are_of_bounded_length(stop: Any) -> None:
    with TestClient(make_app(tiny(), ServeSettings(MODEL))) as http:
        refused = http.post("/v1/completions", json={**BODY, "stop": stop})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "stop"
        assert f"at most {MOST_STOP_CHARACTERS} characters" in refused.json()["error"]["message"]
        assert http.post("/v1/completions", json={**BODY, "stop": ["x" * 10_000] * 10}).status_code == 200


# --- The API key


KEYED = ["/v1/models", "/v1/models/tiny", "/v1/completions", "/v1/chat/completions"]


def keyed_app() -> FastAPI:
    return make_app(tiny(), ServeSettings(MODEL, Owners.dividing(keys=["secret"])))


def status_of(http: TestClient, path: str, authorization: str | None) -> int:
    headers = {} if authorization is None else {"authorization": authorization}
    if path.endswith("completions"):
        return http.post(path, json={}, headers=headers).status_code
    return http.get(path, headers=headers).status_code


@pytest.mark.parametrize("way", ["bare", "mounted", "root path", "both"])
def test_the_key_is_needed_under_whatever_path_the_application_is(way: str) -> None:
    app, prefix = keyed_app(), "/llm" if way in ("mounted", "both") else ""
    if prefix:
        parent = FastAPI()
        parent.mount(prefix, app)
    else:
        parent = app
    with TestClient(parent, root_path="/proxy" if way in ("root path", "both") else "") as http:
        for path in KEYED:
            served = []
            for spelled in (prefix + path, prefix + "//" + path[1:], "/proxy" + prefix + path):
                wanted = 401 if status_of(http, spelled, "Bearer secret") in (200, 400) else 404
                assert status_of(http, spelled, None) == wanted, spelled
                assert status_of(http, spelled, "Bearer wrong") == wanted, spelled
                served.append(wanted == 401)
            assert any(served)
    app.state.scheduler.close(0)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("BEARER   secret", 200),
        ("secret", 401),
        ("Basic secret", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearersecret", 401),
        ("Bearer secre", 401),
        ("Bearer secret2", 401),
        ("", 401),
    ],
)
def test_a_key_is_a_bearer_token(authorization: str, status: int) -> None:
    with TestClient(keyed_app()) as http:
        assert status_of(http, "/v1/models", authorization) == status


def test_every_path_but_the_public_ones_needs_a_key() -> None:
    app = keyed_app()
    with TestClient(app) as http:
        documented = http.get("/openapi.json").json()["paths"]
        public = {path for path in documented if status_of(http, path.format(model="tiny"), None) != 401}
    assert public == {"/health", "/ready", "/metrics", "/atlas"}
    assert set(documented) - public == {path.replace("/tiny", "/{model}") for path in KEYED}


def test_a_body_is_not_read_without_a_key() -> None:
    with TestClient(keyed_app()) as http:
        assert http.post("/v1/completions", content=b"{" * 10_000_000).status_code == 401


# --- Texts of others in headers and streams


def with_domains(*names: str) -> Engine:
    """An engine whose atlas has these domains, all with the same anchor; the first is nearest."""
    model, tokenizer = endless(tiny_model()), tiny_tokenizer(chat=True)
    own = fingerprint(model, tokenizer)
    anchors = torch.ones(len(names), own.hidden_size).numpy()
    atlas = Atlas(
        own,
        Pooling.MEAN,
        anchors,
        names,
        {name: DomainEntry(Plan.plain(own.num_layers), 2.0) for name in names},
        Plan.plain(own.num_layers),
        typical_profile(own.num_layers),
    )
    return Engine(model, tokenizer, atlas)


DOMAINS = {
    "数学": "%E6%95%B0%E5%AD%A6",
    "Größe": "Gr%C3%B6%C3%9Fe",
    "a\nset-cookie: b=c": "a%0Aset-cookie: b=c",
    "a\r\n\r\nb": "a%0D%0A%0D%0Ab",
    "50% \0": "50%25 %00",
    " led ": "%20led%20",
    "small talk": "small talk",
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_of_any_name_is_a_header(domain: str) -> None:
    with running_server(ServeSettings(MODEL), with_domains(domain)) as own:
        whole = post(own.url)
        assert whole.status_code == 200
        assert whole.headers["x-knn-ssd-route"] == DOMAINS[domain]
        streamed = post(own.url, {**BODY, "stream": True})
        assert streamed.headers["x-knn-ssd-route"] == DOMAINS[domain]
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert "set-cookie" not in whole.headers
        assert httpx.get(f"{own.url}/metrics").status_code == 200


def test_headers_are_of_bounded_length() -> None:
    assert len(header_value("ü" * 100_000)) <= 1200
    assert header_value("\ud800").isascii()


def test_a_stream_has_no_characters_that_end_lines() -> None:
    ends = "\u2028\u2029\x85\x0b\x0c\x1c\r\n"
    text = event({"text": ends})
    assert len(text.splitlines()) == 2  # with the empty one
    assert json.loads(text.removeprefix("data: ")) == {"text": ends}
    with TestClient(make_app(tiny(), ServeSettings(MODEL))) as http:
        echoed = http.post("/v1/completions", json={**BODY, "prompt": f"a{ends}", "echo": True, "stream": True}).text
        assert all(not line or line.startswith("data: ") for line in echoed.splitlines())


# --- Clients that leave


def left_by(url: str, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.2)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_while_it_waits_gives_its_place_back(streamed: bool) -> None:
    settings = ServeSettings(MODEL, limits=Limits(running=1, waiting=4))
    engine = SlowEngine(endless(tiny_model()), tiny_tokenizer(chat=True))
    with running_server(settings, engine) as own:
        with httpx.stream("POST", f"{own.url}/v1/completions", json={**LONG, "stream": True}) as first:
            lines = first.iter_lines()  # which closes the connection when it is no longer kept
            next(lines)
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda _: left_by(own.url, {**BODY, "stream": streamed}), range(4)))
            until(lambda: own.scheduler.waiting == 0, 1)
            assert own.scheduler.running == 1
        assert post(own.url).status_code == 200


def slow_forward(engine: Engine, sec: float) -> list[int]:
    """Makes each forward pass over more than 8 tokens take at least so long; returns the lengths of those that ran."""
    ran: list[int] = []
    backend: Any = engine.backend
    if isinstance(backend, SharesPasses):
        run_batch = backend.forward_batch

        def forward_batch(requests: list[ForwardRequest]) -> list[ForwardOutput]:
            longest = max(len(each.token_ids) for each in requests)
            if longest > 8:
                ran.append(longest)
                time.sleep(sec)
            return run_batch(requests)

        backend.forward_batch = forward_batch
        return ran
    run = backend.forward

    def forward(request: ForwardRequest) -> ForwardOutput:
        if len(request.token_ids) > 8:
            ran.append(len(request.token_ids))
            time.sleep(sec)
        result: ForwardOutput = run(request)
        return result

    backend.forward = forward
    return ran


@pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")
@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_during_its_prefill_ends_it(streamed: bool) -> None:
    engine = Engine(endless(wide_model("llama")), tiny_tokenizer(chat=True))
    ran = slow_forward(engine, 0.5)
    with running_server(ServeSettings(MODEL, limits=Limits(running=1)), engine) as own:
        left_by(own.url, {**LONG, "prompt": list(range(3, 100)) * 2, "max_tokens": 5, "stream": streamed})
        until(lambda: own.scheduler.running == 0, 3)
        assert len(ran) < 4  # chunks of 64 tokens


def test_a_stream_whose_client_left_before_its_headers_runs_on_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> dict[str, str]:
        raise ValueError("as a header that cannot be encoded would")

    monkeypatch.setattr("knn_ssd.server.app.response_headers", fails)
    engine = SlowEngine(endless(tiny_model()), tiny_tokenizer(chat=True))
    with running_server(ServeSettings(MODEL, limits=Limits(running=1)), engine) as own:
        assert post(own.url, {**LONG, "stream": True}).status_code == 500
        until(lambda: own.scheduler.running == 0, 1)


# --- Deadlines


def test_the_deadline_holds_during_a_prefill_in_one_pass_and_in_the_queue() -> None:
    engine = tiny()
    slow_forward(engine, 3.0)
    with running_server(ServeSettings(MODEL, limits=Limits(running=1, deadline_sec=0.5)), engine) as own:
        began = time.monotonic()
        with ThreadPoolExecutor(3) as pool:
            body = {**BODY, "prompt": "a fox and a goose"}
            replies = list(pool.map(lambda _: post(own.url, body), range(3)))
        assert time.monotonic() - began < 2
        assert [reply.status_code for reply in replies] == [504] * 3
        assert all("took longer than 0.5 seconds" in reply.json()["error"]["message"] for reply in replies)
        assert own.scheduler.waiting == 0


def test_the_deadline_holds_in_a_stream_whose_prefill_takes_longer() -> None:
    engine = tiny()
    slow_forward(engine, 4.0)
    with running_server(ServeSettings(MODEL, limits=Limits(running=1, deadline_sec=1.5)), engine) as own:
        began = time.monotonic()
        reply = post(own.url, {**BODY, "prompt": "a fox and a goose", "stream": True})
        assert time.monotonic() - began < 3
        assert reply.status_code == 200  # the headers were sent already
        assert "took longer than 1.5 seconds" in reply.text


# --- The model's thread


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, MemoryError])
def test_if_the_model_s_thread_fails_nobody_waits_and_health_says_so(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error("on purpose")

    settings = ServeSettings(MODEL, limits=Limits(running=1, waiting=10))
    engine = SlowEngine(endless(tiny_model()), tiny_tokenizer(chat=True))
    with running_server(settings, engine) as own:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(post, own.url, LONG) for _ in range(3)]
            streamed = pool.submit(post, own.url, {**LONG, "stream": True})
            until(lambda: own.scheduler.running == 1 and own.scheduler.waiting == 3)
            own.scheduler._batcher.step = fail  # type: ignore[method-assign]
            replies = [each.result(5) for each in asked]
            assert {reply.status_code for reply in replies} <= {503, 200}
            assert "model has failed" in streamed.result(5).text
        assert sum(reply.status_code == 503 for reply in replies) >= 2
        health = httpx.get(f"{own.url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed", "error": error.__name__})
        assert httpx.get(f"{own.url}/ready").json() == {"status": "failed"}
        after = post(own.url)
        assert after.status_code == 503
        assert "Restart the server" in after.json()["error"]["message"]


def test_a_failed_scheduler_accepts_nothing_and_closes() -> None:
    own = Scheduler(tiny())
    own._batcher.step = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    events: list[Any] = []
    own.submit("a fox", {"max_new_tokens": 200}, events.append)
    until(lambda: own.failure is not None)
    until(lambda: bool(events) and isinstance(events[-1], ModelThreadError))
    with pytest.raises(ModelThreadError, match="ZeroDivisionError"):
        own.submit("a fox", {}, events.append)
    own.close(0)


def test_a_callback_that_raises_keeps_no_other_request_waiting() -> None:
    own = Scheduler(tiny(), Limits(running=1))

    def raises(_: Any) -> None:
        raise SystemExit

    events: list[Any] = []
    jobs = own.reserve([raises, events.append])
    for job in jobs:
        own.start(job, "a fox", {"max_new_tokens": 2})
    until(lambda: bool(events) and isinstance(events[-1], ModelThreadError))
    own.close(0)


# --- Prompts


def test_a_full_queue_refuses_before_anything_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SlowEngine(endless(tiny_model()), tiny_tokenizer(chat=True))
    encoded: list[str] = []
    with running_server(ServeSettings(MODEL, limits=Limits(running=1, waiting=1)), engine) as own:
        encode = type(engine).encode

        def watched(self: Engine, prompt: Any, *options: Any) -> list[int]:
            encoded.append(prompt)
            return encode(self, prompt, *options)

        monkeypatch.setattr(type(engine), "encode", watched)
        with httpx.stream("POST", f"{own.url}/v1/completions", json={**LONG, "stream": True}) as first:
            lines = first.iter_lines()  # which closes the connection when it is no longer kept
            next(lines)
            with ThreadPoolExecutor(1) as pool:
                second = pool.submit(post, own.url)
                until(lambda: own.scheduler.waiting == 1)
                before = len(encoded)
                assert post(own.url, {**BODY, "prompt": "a goose"}).status_code == 429
                assert "a goose" not in encoded[before:]
                first.close()
                assert second.result(20).status_code == 200


def test_prompts_that_are_being_tokenised_have_places_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(completions.CompletionHandler, "_encode", lambda *_: release.wait(20) and 1 / 0)
    with running_server(ServeSettings(MODEL, limits=Limits(running=1, waiting=2))) as own:
        with ThreadPoolExecutor(2) as pool:
            held = [pool.submit(post, own.url) for _ in range(2)]
            until(lambda: own.scheduler.waiting == 2)
            assert post(own.url).status_code == 429
            release.set()
            assert [each.result(20).status_code for each in held] == [500, 500]
        assert own.scheduler.waiting == 0


def test_the_queue_counts_a_request_once_whatever_its_choices() -> None:
    own = Scheduler(tiny(), Limits(running=1, waiting=1))
    jobs = own.reserve([lambda _: None] * 5)
    with pytest.raises(BusyError):
        own.reserve([lambda _: None])
    for job in jobs:
        own.cancel(job)
    assert own.waiting == 0
    own.close(0)


@pytest.fixture
def refusing() -> Iterator[Served]:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages, please') }}{% endif %}"
        "{% if messages[0]['content'] == 'add' %}{{ 1 + 'a' }}{% endif %}{{ messages[0]['content'] }}"
    )
    yield from serving(ServeSettings(MODEL), Engine(endless(tiny_model()), tokenizer))


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "system", "content": "be short"}, "no system messages, please"),
        ({"role": "user", "content": "add"}, "unsupported operand"),
    ],
)
def test_what_the_chat_template_raises_is_the_client_s_to_read(
    refusing: Served, message: dict[str, str], sentence: str
) -> None:
    with pytest.raises(PromptError, match=sentence):
        refusing.engine.generate([message])
    reply = post(refusing.url, {"model": MODEL, "messages": [message]}, "chat/completions")
    assert reply.status_code == 400
    assert sentence in reply.json()["error"]["message"]
