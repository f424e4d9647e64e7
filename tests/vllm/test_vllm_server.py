"""vLLM's own server with the plugin, by the flags that its documentation gives, under many clients at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from atlases import PLANS, Vectors, prompts_of
from openai import AsyncOpenAI

from knn_ssd.backends.base import Pooling
from knn_ssd.vllm_plugin.hooks import PROPOSER

CLIENTS = 64
START_SEC = 300  # with other work on the machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[str]:
    """A server's address; its end is waited for."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "32", "--served-model-name", "tiny"]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=file, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(START_SEC * 2):
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(address + "/health", timeout=2):
                break
            time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start in {START_SEC} seconds:\n{log.read_text()[-3000:]}")
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


async def ask(address: str, prompts: list[list[int]]) -> list[str]:
    """All prompts at once, each streamed to its end."""
    client = AsyncOpenAI(base_url=address + "/v1", api_key="none", timeout=240, max_retries=0)

    async def one(prompt: list[int]) -> str:
        stream = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=40, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


@pytest.mark.timeout(900)
def test_64_streams_say_what_they_say_without_drafts(tiny: Path, tmp_path: Path) -> None:
    atlas = Vectors(tiny, Pooling.LAST).atlas().save(tmp_path / "atlas")
    asked = [prompt for domain in PLANS for prompt in prompts_of(domain, CLIENTS // len(PLANS) + 1)][:CLIENTS]
    with serving(tiny, tmp_path / "plain.log") as address:
        plain = asyncio.run(ask(address, asked))
    options = [
        "--speculative-config",
        json.dumps({"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 4}),
        "--additional-config",
        json.dumps({"knn_ssd": {"atlas": str(atlas), "adaptive": False}}),
    ]
    with serving(tiny, tmp_path / "drafted.log", *options) as address:
        drafted = asyncio.run(ask(address, asked))
        time.sleep(11)  # the counts by plan are logged every ten seconds, while requests run
        asyncio.run(ask(address, asked[:1]))
        with urllib.request.urlopen(address + "/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
    assert drafted == plain
    assert all(len(text) > 10 for text in plain)
    (count,) = [line for line in metrics.splitlines() if line.startswith("vllm:spec_decode_num_draft_tokens_total")]
    assert float(count.split()[-1]) > CLIENTS
    assert "Accepted of drafted tokens by plan" in (tmp_path / "drafted.log").read_text()
