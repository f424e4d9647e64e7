"""`knn-ssd serve` on the embedded model, for real clients: run by the Python that KNN_SSD_PYTHON names."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

KEY = "sk-of-the-tests"
MODEL = "SmolLM2-135M-Instruct"
START_SEC = 300  # the embedded model is converted at its first use
PYTHON = os.environ.get("KNN_SSD_PYTHON", "")


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        url: its address.
    """

    url: str
    key: str = KEY
    model: str = MODEL

    @property
    def api(self) -> str:
        """What clients call the base URL."""
        return f"{self.url}/v1"

    def post(self, path: str, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.post(f"{self.api}{path}", json={"model": self.model, **body}, headers=headers, timeout=120)

    def say(self, content: str, **options: Any) -> str:
        """A greedy answer without any client library: what the clients must report."""
        messages = [{"role": "user", "content": content}]
        response = self.post("/chat/completions", messages=messages, temperature=0, **options)
        text: str = response.raise_for_status().json()["choices"][0]["message"]["content"]
        return text

    def complete(self, prompt: str, **options: Any) -> str:
        """The same for a completion."""
        text: str = self.post("/completions", prompt=prompt, temperature=0, **options).json()["choices"][0]["text"]
        return text


@contextmanager
def serving(log: Path, *options: str) -> Iterator[Server]:
    """Starts a server on the embedded model, and ends it."""
    command = [PYTHON, "-m", "knn_ssd", "serve", "--port", "0", "--drain", "1", *options]
    with log.open("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "KNN_SSD_API_KEY": KEY})
        try:
            yield Server(_address(process, log))
        finally:
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    due = time.monotonic() + START_SEC
    while time.monotonic() < due and process.poll() is None:
        if found := re.search(r"(http://[\d.]+:\d+)/v1", log.read_text("utf-8")):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{log.read_text('utf-8')}")
