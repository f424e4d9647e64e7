"""A `knn-ssd serve` process on a tiny model, as users run it: the tests know its port and its process id, no more."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import openai
from helpers import endless, endless_tokenizer
from processes import ended, start
from server import MODEL

from knn_ssd.testing import tiny_model

CONTEXT = 256  # tokens of the tiny model; one character is one token
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def save_model(folder: Path, **sizes: int) -> Path:
    """A tiny model without an end token, and its tokenizer, as `--model` takes them."""
    endless(tiny_model(**sizes)).save_pretrained(folder)
    endless_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class ServerProcess:
    """A running server.

    Args:
        process: its process.
        port: of 127.0.0.1 that it listens at.
        log: what it writes.
    """

    process: BaseProcess
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=50)

    def complete(self, prompt: str = "a fox", max_tokens: int = 8, **options: Any) -> str:
        """A greedy completion: what a normal request is."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def connect(self, timeout: float = 20.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def exchange(self, data: bytes, half_close: bool = False) -> bytes:
        """What comes back for these bytes until the server closes the connection."""
        with self.connect() as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return read_all(connection)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))

    def wait_until_idle(self, timeout_sec: float = 15.0) -> None:
        """Waits until no request is running or waiting."""
        due = time.monotonic() + timeout_sec
        while any(self.metric(f"knn_ssd_{state}_requests") for state in ("running", "waiting")):
            assert time.monotonic() < due, "requests of disconnected clients are still running"
            time.sleep(0.02)

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status")
        if status.exists():
            return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text("utf-8"))[1]) * 1024  # type: ignore[index]
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)])) * 1024


@contextmanager
def server_process(model: Path, *options: str, port: int = 0) -> Iterator[ServerProcess]:
    """Starts a server and ends it, if it was not ended meanwhile."""
    command = ["serve", "--model", model, "--name", MODEL, "--port", port, "--drain", 1, *options]
    log = model.parent / f"serve-{time.monotonic_ns()}.log"
    log.touch()
    process = start(log, log, command)
    try:
        yield ServerProcess(process, _port(process, log), log)
        process.terminate()
        assert ended(process, 20) is not None, "the server did not end"
    finally:
        process.kill()
        process.join()


def _port(process: BaseProcess, log: Path) -> int:
    """Once the server answers."""
    due = time.monotonic() + 60
    while time.monotonic() < due and process.is_alive():
        said = re.search(r"at http://[\d.]+:(\d+)/v1", log.read_text("utf-8"))
        if said:
            try:
                httpx.get(f"http://127.0.0.1:{said[1]}/health", timeout=10)
                return int(said[1])
            except httpx.TransportError:
                pass
        time.sleep(0.02)
    raise AssertionError(f"the server did not start:\n{log.read_text('utf-8')}")


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass  # the other side closed with something of ours unread
    return b"".join(parts)


def post(body: bytes, *headers: str, path: str = "/v1/completions", version: str = "1.1") -> bytes:
    """A request as bytes, after which the connection is closed."""
    fields = ["host: x", "content-type: application/json", "connection: close", *headers]
    if not any(field.lower().startswith(("content-length", "transfer-encoding")) for field in fields):
        fields.append(f"content-length: {len(body)}")
    return f"POST {path} HTTP/{version}\r\n".encode() + "".join(f"{f}\r\n" for f in fields).encode() + b"\r\n" + body


def status_of(raw: bytes) -> int:
    return int(raw.split(b" ", 2)[1])


def error_of(raw: bytes) -> dict[str, Any]:
    """The error of a raw response, which must be in OpenAI's format: a sentence, a type, and what it is about."""
    return check_error(json.loads(raw.partition(b"\r\n\r\n")[2]))


def check_error(body: Any) -> dict[str, Any]:
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"].strip()
    assert isinstance(error["type"], str)
    return error
