"""Faults around a server: broken, slow and disconnected clients, nonsense bodies, a killed process.

After each of these the server still gives its normal answer, and no error of its own was the reply.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from processes import ended
from server import serving
from server_process import (
    CONTEXT,
    HEAD,
    MODEL,
    ServerProcess,
    error_of,
    post,
    read_all,
    save_model,
    server_process,
    status_of,
)

from knn_ssd.server.app import ServeSettings
from knn_ssd.server.scheduler import Limits

pytestmark = pytest.mark.xdist_group("server process")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[ServerProcess]:
    """Its model's folder is gone for as long as it runs: what was loaded is all it needs."""
    away = folder.with_name("away")
    with server_process(folder) as own:
        folder.rename(away)
        yield own
        away.rename(folder)


@pytest.fixture(scope="module")
def normal(running: ServerProcess) -> str:
    return running.complete()


@pytest.fixture
def server(running: ServerProcess, normal: str) -> Iterator[ServerProcess]:
    """A server that must work normally after the test."""
    yield running
    assert running.complete() == normal
    running.wait_until_idle()
    assert "Traceback" not in running.log.read_text("utf-8")
    failed = [line for line in httpx.get(f"{running.url}/metrics").text.splitlines() if 'status="500"' in line]
    assert not failed


def body(**change: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "a fox", "max_tokens": 2, "temperature": 0, **change}).encode()


def chat(content: bytes) -> bytes:
    text = b'{"model":"tiny","max_tokens":2,"messages":[{"role":"user","content":' + content + b"}]}"
    return post(text, path="/v1/chat/completions")


def with_field(field: bytes) -> bytes:
    return post(b'{"model":"tiny","prompt":"a",' + field + b"}")


REFUSED: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "malformed": (lambda: post(b'{"model":'), 400, "the body is not JSON, at character 9"),
    "cut": (lambda: post(body()[:-5]), 400, "the body is not JSON"),
    "an array": (lambda: post(b"[]"), 400, "must be a JSON object"),
    "no content type": (lambda: post(body()).replace(b"application/json", b"text/plain"), 400, "content-type: app"),
    "deep arrays": (lambda: post(b"[" * 100_000 + b"]" * 100_000), 400, "parsing the body"),
    "deep objects": (lambda: post(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), 400, "parsing the body"),
    "a deep prompt": (lambda: with_field(b'"stop":' + b"[" * 100_000 + b"]" * 100_000), 400, "parsing the body"),
    "a deep message": (lambda: chat(b"[" * 100_000 + b"]" * 100_000), 400, "parsing the body"),
    "ten megabytes": (lambda: post(body(prompt="x" * 10_000_000)), 413, "longer than 4194304 bytes"),
    "ten megabytes in chunks": (
        lambda: post(b"989680\r\n" + b" " * 10_000_000 + b"\r\n0\r\n\r\n", "transfer-encoding: chunked"),
        413,
        "longer than 4194304 bytes",
    ),
    "a body announced beyond all measure": (lambda: post(b"", "content-length: 99999999999"), 413, "longer than"),
    "a long body that asks first": (
        lambda: post(b"", "content-length: 9999999", "expect: 100-continue"),
        413,
        "longer than",
    ),
    "more tokens than the context": (lambda: post(body(prompt="x" * CONTEXT)), 400, "the model's context is 256"),
    "half a million wrong messages": (
        lambda: post(b'{"model":"tiny","messages":[' + b"1," * 500_000 + b"1]}", path="/v1/chat/completions"),
        400,
        "messages",
    ),
    "200 000 unknown names": (lambda: post(body(**{f"k{n}": 1 for n in range(200_000)})), 400, "'k0' is not supported"),
    "invalid UTF-8": (lambda: post(b'{"model":"tiny","prompt":"\xff\xfe"}'), 400, "parsing the body"),
    "a length that is too short": (lambda: post(body(), "content-length: 5"), 400, "the body is not JSON"),
    "NaN": (lambda: with_field(b'"temperature":NaN'), 400, "temperature"),
    "infinity": (lambda: with_field(b'"temperature":Infinity'), 400, "temperature"),
    "minus infinity": (lambda: with_field(b'"top_p":-Infinity'), 400, "top_p"),
    "a number beyond floats": (lambda: with_field(b'"temperature":1e999'), 400, "temperature"),
    "a number of 5000 digits": (lambda: with_field(b'"max_tokens":' + b"9" * 5000), 400, "parsing the body"),
    "a seed of 100 digits": (lambda: with_field(b'"seed":' + b"9" * 100), 400, "seed"),
    "huge token ids": (lambda: post(body(prompt=[10**30])), 400, "the model's vocabulary is 128"),
    "negative token ids": (lambda: post(body(prompt=[-1])), 400, "the model's vocabulary is 128"),
    "half a character as prompt": (lambda: post(body(prompt="a\ud800")), 400, "unicode"),
    "half a character in a message": (lambda: chat(b'"a\\ud800"'), 400, "not Unicode text"),
    "half a character as model": (lambda: post(body(model="\ud800")), 404, r"'\ud800' is not served"),
    "half a character as name": (lambda: post(body(**{"\ud800": 1})), 400, "unicode"),
    "half a character as end": (lambda: post(body(stop="\ud800")), 400, "stop"),
    "a name of a megabyte": (lambda: post(body(**{"k" * 1_000_000: 1})), 400, "kkk…"),
    "another path": (lambda: post(body(), path="/v1/nothing"), 404, "Not Found"),
    "another method": (lambda: post(body()).replace(b"POST", b"GET", 1), 405, "Method Not Allowed"),
    "no method": (lambda: post(body()).replace(b"POST", b"BREW", 1), 405, "Method Not Allowed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_request_is_refused_in_a_sentence(server: ServerProcess, name: str) -> None:
    request, status, sentence = REFUSED[name]
    began = time.monotonic()
    reply = server.exchange(request())
    assert time.monotonic() - began < 8
    assert status_of(reply) == status
    error = error_of(reply)
    assert sentence in error["message"]
    assert len(error["message"]) < 2000


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(body(prompt="a\0fox")),
        chat(b'"a\\u0000fox"'),
        post(body(), version="1.0"),
        post(body(stream=True), version="1.0"),
        with_field(b'"max_tokens":' + b"9" * 100 + b',"stop":["e"]'),  # as many as the context has room for
        post(body(stop=["x" * 100_000])),
        post(body(), "x-long: " + "a" * 50_000),
    ],
    ids=["NUL", "NUL in a message", "HTTP/1.0", "HTTP/1.0 stream", "many tokens", "a long end", "a long header"],
)
def test_an_unusual_but_valid_request_is_answered(server: ServerProcess, request_bytes: bytes) -> None:
    assert status_of(server.exchange(request_bytes)) == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\xff\r\n\r\n",  # TLS
        b"GET /\xff%zz%00 HTTP/1.1\r\nhost: x\r\n\r\n",
        post(body(), "content-length: -1"),
        post(body(), "content-length: 5", "content-length: 6"),
        post(b"zz\r\nhello\r\n", "transfer-encoding: chunked"),
    ],
    ids=["TLS", "a path of bytes", "a negative length", "two lengths", "a wrong chunk"],
)
def test_input_that_is_not_http_is_refused(server: ServerProcess, raw: bytes) -> None:
    assert status_of(server.exchange(raw)) == 400


def test_the_official_client_receives_the_refusal_of_a_body_that_is_too_long(server: ServerProcess) -> None:
    with pytest.raises(openai.APIStatusError, match="the body is longer than 4194304 bytes") as refused:
        server.client.completions.create(model=MODEL, prompt="x" * 10_000_000)
    assert refused.value.status_code == 413


def test_a_body_that_arrives_too_slowly_is_refused() -> None:
    for own in serving(ServeSettings(MODEL, body_sec=1.0)):
        host, port = own.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
            connection.settimeout(0.05)
            reply, began = b"", time.monotonic()
            while not reply:
                assert time.monotonic() - began < 5
                connection.sendall(b"1\r\n \r\n")
                try:
                    reply = connection.recv(65536)
                except TimeoutError:
                    continue
            connection.settimeout(1)
            with suppress(OSError):  # its body may come in another packet
                while piece := connection.recv(65536):
                    reply += piece
        assert status_of(reply) == 408
        assert "did not arrive within 1 seconds" in error_of(reply)["message"]


def test_an_error_in_mid_stream_is_the_stream_s_last_event() -> None:
    for own in serving(ServeSettings(MODEL, limits=Limits(running=16, deadline_sec=1.0))):
        own.client.completions.create(model=MODEL, prompt="a", max_tokens=1)
        stream = own.client.completions.create(model=MODEL, prompt="a", max_tokens=CONTEXT, n=16, stream=True)
        with pytest.raises(openai.APIError, match="took longer than 1 seconds"):
            collections.deque(stream)


def test_clients_that_hang_up_are_not_answered(server: ServerProcess) -> None:
    long = post(body(max_tokens=200, stream=True))
    for data in (HEAD, HEAD + b"content-length: 500\r\n\r\n{", post(body(max_tokens=200)), long, b"", b"POST"):
        with server.connect() as connection:
            connection.sendall(data)
    for data in (HEAD + b"content-length: 500\r\n\r\n{", long):
        server.exchange(data, half_close=True)  # whatever comes, the connection is closed and nothing goes on
    server.wait_until_idle()
    assert "Traceback" not in server.log.read_text("utf-8")


def test_idle_connections_leave_room_for_others(server: ServerProcess, normal: str) -> None:
    with ExitStack() as opened:
        connections = [opened.enter_context(server.connect()) for _ in range(200)]
        for connection in connections[::2]:
            connection.sendall(HEAD[:20])
        assert server.complete() == normal
        connections[1].sendall(post(body()))
        assert status_of(read_all(connections[1])) == 200


def test_a_long_prompt_delays_no_other_request(server: ServerProcess, normal: str) -> None:
    """Three megabytes take the tokenizer seconds, and are refused."""
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        long = pool.submit(server.exchange, post(body(prompt="x" * 3_000_000)))
        longest = 0.0
        while not long.done():
            one = time.monotonic()
            assert server.complete() == normal
            longest = max(longest, time.monotonic() - one)
        whole = time.monotonic() - began
    assert "the prompt has 3000000 tokens" in error_of(long.result())["message"]
    assert longest < max(0.6 * whole, 1.0)


def test_a_slow_reader_delays_no_other_request_and_its_buffer_is_bounded(server: ServerProcess, normal: str) -> None:
    """Its 16 answers are as long as the context lets them be, which is all that is ever kept for it."""
    before = server.resident_bytes()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.settimeout(20)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(post(body(max_tokens=CONTEXT, stream=True, n=16)))
        assert slow.recv(1) == b"H"
        began = time.monotonic()
        for _ in range(3):
            assert slow.recv(1)
            assert server.complete() == normal
            time.sleep(1)
        assert time.monotonic() - began < 20
        server.wait_until_idle()  # the model is free, although the answer was not read
        # 16 answers x 256 tokens x about 300 bytes of an event are 1.2 MB; the rest is the allocator's.
        assert server.resident_bytes() - before < 30 * 2**20
        slow.settimeout(20)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        rest = read_all(slow)
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert rest.count(b'"finish_reason": "length"') == 16


def test_a_killed_server_starts_again_on_its_port_at_once(folder: Path, normal: str, running: ServerProcess) -> None:
    copy = folder.with_name("copy")
    shutil.copytree(folder.with_name("away"), copy)
    with server_process(copy) as first:
        with first.connect() as client, first.connect():
            client.sendall(post(body(max_tokens=200, stream=True)))
            assert status_of(client.recv(100)) == 200
            first.process.kill()
            assert ended(first.process, 10) == -signal.SIGKILL
            assert not read_all(client).endswith(b"[DONE]\n\n")
        with server_process(copy, port=first.port) as second:
            assert second.port == first.port
            assert second.complete() == normal
            os.kill(second.process.pid or 0, signal.SIGINT)
            assert ended(second.process, 20) == 0
