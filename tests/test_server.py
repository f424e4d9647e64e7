"""The server: OpenAI's official client, many clients at once, and invalid requests of all kinds."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from helpers import endless, endless_tokenizer
from pydantic import ValidationError
from server import MODEL, Served, SlowEngine, new_store, serving

from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.cli import main
from knn_ssd.engine import Engine
from knn_ssd.errors import PromptError, UsageError
from knn_ssd.outputs import Chunk, Generation
from knn_ssd.server.app import ServeSettings, make_app
from knn_ssd.server.listen import listen
from knn_ssd.server.owners import Owners
from knn_ssd.server.scheduler import BusyError, ClosingError, DeadlineError, Event, Limits, PrefillDone, Scheduler
from knn_ssd.server.schemas import FINISH_REASONS, ChatRequest
from knn_ssd.testing import tiny_model, tiny_tokenizer

PROMPTS = ["once upon a time", "3 + 4 = ", "a fox", "SELECT name", "guten Tag"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Its clients share a prefix cache and an answer store."""
    limits, owners = Limits(running=6, waiting=200), Owners.dividing(2**20, new_store)
    yield from serving(ServeSettings(MODEL, owners, limits, max_body_bytes=20_000, body_sec=1.0))


@pytest.fixture(scope="module")
def expected() -> dict[str, Generation]:
    """The generations of a separate engine."""
    engine = Engine(endless(tiny_model()), endless_tokenizer())
    return {prompt: engine.generate(prompt, max_new_tokens=24, plain=True) for prompt in PROMPTS}


def ask(client: openai.OpenAI, prompt: str, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 24, **options}
    messages: Any = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_the_official_client_gets_the_engine_s_output(served: Served, expected: dict[str, Generation]) -> None:
    for prompt, own in expected.items():
        answer = ask(served.client, prompt)
        assert answer.choices[0].message.content == own.text
        assert answer.choices[0].finish_reason == FINISH_REASONS[own.finish_reason]
        assert answer.usage.completion_tokens == len(own.token_ids)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        details = answer.usage.completion_tokens_details
        assert details.accepted_prediction_tokens >= 0
        assert details.rejected_prediction_tokens >= 0


def test_a_stream_is_the_same_text_in_pieces(served: Served, expected: dict[str, Generation]) -> None:
    prompt = PROMPTS[0]
    chunks = list(ask(served.client, prompt, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected[prompt].text
    assert sum(bool(piece) for piece in pieces) > 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    bare = list(ask(served.client, prompt, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in bare)


def test_completions_continue_text_and_token_ids(served: Served) -> None:
    engine = Engine(endless(tiny_model()), endless_tokenizer())
    own = engine.generate("a fox", max_new_tokens=16, chat=False)
    done = served.client.completions.create(model=MODEL, prompt="a fox", temperature=0)
    assert done.choices[0].text == own.text
    assert done.usage is not None
    assert done.usage.completion_tokens == 16
    ids = engine.encode("a fox", chat=False)
    assert served.client.completions.create(model=MODEL, prompt=ids, temperature=0).choices[0].text == own.text
    stream = served.client.completions.create(model=MODEL, prompt="a fox", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == own.text


def test_stop_seed_and_n(served: Served, expected: dict[str, Generation]) -> None:
    text = expected[PROMPTS[0]].text
    stop = text[5:8]
    answer = ask(served.client, PROMPTS[0], stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    drawn = [ask(served.client, "a fox", temperature=1, seed=7, n=3) for _ in range(2)]
    said = [[choice.message.content for choice in answer.choices] for answer in drawn]
    assert said[0] == said[1]
    assert len(set(said[0])) == 3
    assert drawn[0].usage.completion_tokens == 72
    assert [choice.index for choice in drawn[0].choices] == [0, 1, 2]
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in ask(served.client, "a fox", temperature=1, seed=7, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == said[0]


def test_parts_of_text_and_a_developer_are_understood(served: Served) -> None:
    parts: Any = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "fox"}]},
    ]
    whole: Any = [{"role": "system", "content": "be short"}, {"role": "user", "content": "a fox"}]
    create = served.client.chat.completions.create
    answers = [create(model=MODEL, messages=m, temperature=0, max_tokens=8) for m in (parts, whole)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


@pytest.mark.parametrize(
    ("change", "param", "sentence"),
    [
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"logit_bias": {"100000": 1}}, None, "logit_bias has the token id 100000"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"top_logprobs": 2}, "top_logprobs", "needs 'logprobs' to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"knn_ssd": {"plane": True}}, "knn_ssd.plane", "'knn_ssd.plane' is not supported"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "Field required"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"n": 99}, "n", "less than or equal to 16"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"messages": [{"role": "user", "content": "long " * 60}]}, None, "the model's context is 256"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    served: Served, change: dict[str, Any], param: str | None, sentence: str
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a fox"}], "max_tokens": 4, **change}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert sentence in error["message"]
    if param is not None:
        assert error["param"].startswith(param)


def test_of_many_unknown_names_one_is_reported() -> None:
    names = {f"unknown-{number}": number for number in range(1000)}
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **names})
    assert [error["loc"] for error in refused.value.errors()] == [("unknown-0",)]


def test_an_error_within_a_stream_is_an_event() -> None:
    engine = SlowEngine(endless(tiny_model()), endless_tokenizer())
    for own in serving(ServeSettings(MODEL, limits=Limits(deadline_sec=1.0)), engine):
        stream = ask(own.client, "a fox", stream=True, max_tokens=200)
        next(stream)
        with pytest.raises(openai.APIError, match="took longer than 1 seconds"):
            list(stream)


def test_another_model_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served; 'tiny' is"):
        served.client.completions.create(model="gpt-9", prompt="a")
    assert [model.id for model in served.client.models.list()] == [MODEL]


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{not json", 400), (b'{"model": "\xff"}', 400), (b"[]", 400), (b"", 400), (b" " * 30_000, 413)],
)
def test_bodies_that_are_no_request(served: Served, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{served.url}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def flood(connection: socket.socket) -> None:
    """Sends a chunked body for as long as the server reads it, 80 MB at most."""
    for _ in range(20_000):
        connection.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")


def test_an_endless_body_is_refused(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(head + b"content-length: 500\r\n\r\n{")
        assert b" 408 " in slow.recv(200).split(b"\r\n")[0]
    with socket.create_connection((host, int(port)), timeout=10) as endless_body:
        endless_body.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        with pytest.raises((ConnectionError, TimeoutError)):  # once enough was read, the server reads no more
            flood(endless_body)


def test_health_readiness_and_metrics(served: Served, expected: dict[str, Generation]) -> None:
    before = metric(served, "knn_ssd_tokens_total")
    ask(served.client, PROMPTS[0])
    assert metric(served, "knn_ssd_tokens_total") == before + 24
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/ready").status_code == 200
    missing = httpx.get(f"{served.url}/nowhere")
    assert (missing.status_code, "message" in missing.json()["error"]) == (404, True)
    assert 'path="other",status="404"' in httpx.get(f"{served.url}/metrics").text


def metric(served: Served, name: str) -> float:
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


def test_many_clients_with_cancellations_and_invalid_requests_each_get_their_own_answer(
    served: Served, expected: dict[str, Generation]
) -> None:
    def one(number: int) -> str | None:
        chance = random.Random(number)
        prompt = chance.choice(PROMPTS)
        way = chance.choice(["whole", "stream", "leave", "wrong"])
        client = served.client
        if way == "wrong":
            with pytest.raises(openai.BadRequestError):
                ask(client, prompt, temperature=9)
        elif way == "leave":
            stream = ask(client, prompt, stream=True, max_tokens=150)
            next(iter(stream))
            stream.close()
        elif way == "stream":
            pieces = [c.choices[0].delta.content or "" for c in ask(client, prompt, stream=True)]
            assert "".join(pieces) == expected[prompt].text
        else:
            assert ask(client, prompt).choices[0].message.content == expected[prompt].text
        return way

    with ThreadPoolExecutor(16) as pool:
        ways = list(pool.map(one, range(100)))
    assert set(ways) == {"whole", "stream", "leave", "wrong"}
    deadline = time.monotonic() + 10
    while served.scheduler.running or served.scheduler.waiting:
        assert time.monotonic() < deadline, "requests of disconnected clients are still running"
        time.sleep(0.01)


def test_a_server_with_an_api_key_refuses_requests_without_it() -> None:
    for own in serving(ServeSettings(MODEL, Owners.dividing(keys=["secret"]))):
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            ask(own.client, "a fox")
        assert httpx.get(f"{own.url}/health").status_code == 200
        assert ask(own.client.with_options(api_key="secret"), "a fox", max_tokens=2).choices


def test_with_a_full_queue_clients_get_retry_after() -> None:
    for own in serving(ServeSettings(MODEL, limits=Limits(running=1, waiting=1))):
        streams = [ask(own.client, "a fox", stream=True, max_tokens=200)]
        next(iter(streams[0]))  # it runs, and the next one waits
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(ask, own.client, "a fox", max_tokens=2)
            while not own.scheduler.waiting and own.scheduler.running:
                time.sleep(0.001)
            if own.scheduler.running:
                with pytest.raises(openai.RateLimitError) as refused:
                    ask(own.client, "a fox", n=3, max_tokens=2)
                assert refused.value.response.headers["retry-after"] == "1"
            assert second.result(20).choices


# --- The scheduler alone


class Listener:
    """Collects the events that it receives."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Exception | Generation):
            self.ended.set()


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    own = Scheduler(Engine(endless(tiny_model()), tiny_tokenizer()), Limits(running=2, waiting=3))
    yield own
    own.close(0)
    assert not own.running
    assert not own.waiting


def test_a_request_reports_prefill_chunks_and_generation_in_order(scheduler: Scheduler) -> None:
    listener = Listener()
    scheduler.submit("a fox", {"max_new_tokens": 12}, listener)
    assert listener.ended.wait(20)
    begun, *chunks, result = listener.events
    assert isinstance(begun, PrefillDone)
    assert begun.prompt_tokens == 5
    assert isinstance(result, Generation)
    assert "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)) == result.text
    assert len(result.token_ids) == 12


def test_the_next_turn_of_a_conversation_reuses_the_prefix_cache() -> None:
    engine = Engine(endless(tiny_model("llama", hidden_size=96, head_dim=32)), tiny_tokenizer())
    with TestClient(make_app(engine, ServeSettings("tiny", Owners.dividing(2**20)))) as http:
        body = {"model": "tiny", "prompt": list(range(3, 63)), "max_tokens": 4, "temperature": 0}
        first, second = (http.post("/v1/completions", json=body).json() for _ in range(2))
    assert first["choices"] == second["choices"]
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (first, second)]
    assert cached == [0, 59 if isinstance(engine.backend, NativeBackend) else 0]


def test_requests_take_turns() -> None:
    own = Scheduler(Engine(endless(tiny_model()), tiny_tokenizer()), Limits(running=2))
    order: list[str] = []
    done = [threading.Event(), threading.Event()]

    def listener(name: str, end: threading.Event) -> Any:
        def callback(event: Event) -> None:
            if isinstance(event, Chunk):
                order.append(name)
            if isinstance(event, Generation):
                end.set()

        return callback

    for name, end in zip("ab", done, strict=True):
        own.submit("a fox", {"max_new_tokens": 40, "plain": True}, listener(name, end))
    assert all(end.wait(20) for end in done)
    own.close(0)
    both = order[order.index("b") : len(order) - 1 - order[::-1].index("a")]
    assert len(both) > 40
    assert all(first != second for first, second in itertools.pairwise(both))


def test_a_bad_prompt_ends_only_its_own_request(scheduler: Scheduler) -> None:
    bad, wrong, good = Listener(), Listener(), Listener()
    scheduler.submit("", {}, bad)
    scheduler.submit("a fox", {"max_new_tokens": 0}, wrong)
    scheduler.submit("a fox", {"max_new_tokens": 4}, good)
    assert all(listener.ended.wait(20) for listener in (bad, wrong, good))
    assert isinstance(bad.events[-1], PromptError)
    assert isinstance(wrong.events[-1], UsageError)
    assert isinstance(good.events[-1], Generation)


def test_a_cancelled_request_reports_nothing_more(scheduler: Scheduler) -> None:
    listener = Listener()
    job = scheduler.submit("a fox", {"max_new_tokens": 200}, listener)
    while len(listener.events) < 3:
        time.sleep(0.001)
    scheduler.cancel(job)
    while scheduler.running:
        time.sleep(0.001)
    received = len(listener.events)
    assert received < 150
    time.sleep(0.05)
    assert len(listener.events) == received
    assert not listener.ended.is_set()


def test_a_request_past_its_deadline_is_ended() -> None:
    own = Scheduler(Engine(endless(tiny_model()), tiny_tokenizer()), Limits(deadline_sec=1e-3))
    listener = Listener()
    own.submit("a fox", {"max_new_tokens": 200}, listener)
    assert listener.ended.wait(20)
    assert isinstance(listener.events[-1], DeadlineError)
    own.close(0)


def test_a_closed_scheduler_ends_waiting_requests_and_accepts_no_more() -> None:
    own = Scheduler(Engine(endless(tiny_model()), tiny_tokenizer()), Limits(running=1, waiting=9))
    listeners = [Listener() for _ in range(4)]
    for listener in listeners:
        own.submit("a fox", {"max_new_tokens": 240}, listener)
    own.close(0)
    assert all(listener.ended.is_set() for listener in listeners)
    assert isinstance(listeners[-1].events[-1], ClosingError)
    with pytest.raises(ClosingError):
        own.submit("a fox", {}, Listener())


def test_a_closed_scheduler_lets_running_requests_finish() -> None:
    own = Scheduler(Engine(endless(tiny_model()), tiny_tokenizer()))
    listener = Listener()
    own.submit("a fox", {"max_new_tokens": 30}, listener)
    own.close(20)
    assert isinstance(listener.events[-1], Generation)


def test_a_full_queue_refuses(scheduler: Scheduler) -> None:
    def submit_many() -> None:
        for _ in range(50):
            scheduler.submit("a fox", {"max_new_tokens": 240}, Listener())

    with pytest.raises(BusyError, match="waiting already"):
        submit_many()


# --- The command


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "99999"], "65535"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--deadline", "0"], "--deadline must be above 0"),
        (["--neighbours", "2"], "--atlas"),
        (["--model", "/nowhere", "--port", "0"], "/nowhere"),
    ],
)
def test_a_bad_option_is_reported_in_a_sentence(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *options]) == 2
    errors = capsys.readouterr().err
    assert sentence in errors
    assert "Traceback" not in errors


def test_a_port_in_use_is_reported_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    own = listen("127.0.0.1", 0)
    port = own.getsockname()[1]
    assert main(["serve", "--model", "/nowhere", "--port", str(port)]) == 2
    assert f"port {port} of '127.0.0.1' cannot be listened at" in capsys.readouterr().err
    own.close()
