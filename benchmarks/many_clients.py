"""Many clients at once: `knn-ssd serve` against the servers of llama.cpp and vLLM, under the same load.

    python benchmarks/many_clients.py --out ROWS.json [--prompts FILE.jsonl…] [--model M] [--clients 1 2 4 8 16]

In every round each server is started, one at a time, warmed up, and gets all prompts from 1 client, then from 2
concurrent ones, and so on: each client, OpenAI's own, sends its next prompt when it has its answer. The servers take
turns in coming first. No server keeps anything of a prompt for the next one: prefix caches are off, and so is
knn-ssd's answer store. Otherwise knn-ssd has its default settings, drafts included. Decoding is greedy, without a
repetition penalty, and ends at the end-of-sequence token or after `--max-new-tokens`; tokens are those of the server's
`usage`.

Prints, for each number of clients, the median over the rounds of tokens per second: all tokens over the time from the
first request to the last answer, prefill included. Behind it the median of its ratio to knn-ssd's in the same round,
where 0.50 is half as fast, and the seconds until a request's first text: the median over all requests, and the longest
wait. "same" counts the answers that are those of the first number of clients in the same round. If the servers count
different tokens in the same prompts, their chat templates differ, and a note says so. A server that fails is left out
from there on, with its last lines, and the exit code is 1. Weights or a KV cache in fewer bits than the model's own are
lossy. ROWS.json gets a row for each measurement. Other programs are installed at first use, as docs/benchmarking.md
says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from _programs import OURS, RUN_PEER, SERVERS, Program
from _recipes import write_rows
from openai import AsyncOpenAI, OpenAIError

from knn_ssd.bench.workload import read_workloads, stream
from knn_ssd.kernels.threads import thread_count
from knn_ssd.loading.resolve import load_tokenizer, model_dir
from knn_ssd.tokenization import encode

START_SEC = 1200  # a server that is built, or a model that is converted or compiled first, takes minutes
WARM_UP_TOKENS = 8
USUAL = (OURS, "llama-cpp-16-kv16", "llama-cpp-4", "vllm-cpu")


def starting(program: Program, model: str | None, port: int, clients: int, context: int, threads: int) -> list[str]:
    """What starts a server for this many concurrent clients with this many tokens each."""
    if program.peer is None:
        command = [sys.executable, "-m", "knn_ssd", "serve", "--running", f"{clients}", "--prefix-cache", "0"]
        return [*command, "--no-answers", "--port", f"{port}", "--threads", f"{threads}", *_named(model)]
    common = ["--port", f"{port}", "--clients", f"{clients}", "--context", f"{context}", "--threads", f"{threads}"]
    return ["sh", str(RUN_PEER), "serve", program.peer, "--model", str(model_dir(model)), *common, *program.options]


def _named(model: str | None) -> list[str]:
    return [] if model is None else ["--model", model]


class ServerFailedError(Exception):
    """A server did not start, ended, or did not answer as it should; the message says which and what it last wrote."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its text, the tokens by the server's usage, and the seconds until its first text."""

    text: str
    prompt_tokens: int
    tokens: int
    first_text_sec: float


@dataclass(frozen=True, slots=True)
class Row:
    """All prompts from some number of clients to one server, in one round.

    Args:
        server, weights, kv_cache, threads: what ran.
        clients, round: which measurement.
        seconds: from the first request to the last answer.
        tokens, prompt_tokens: of all answers and of all prompts, by the server's usage.
        tokens_per_sec: new tokens over seconds.
        first_text_sec: of each request, in the order of the prompts.
        same: answers that equal those of the first number of clients of this round.
        requests: how many there were.
    """

    server: str
    weights: str
    kv_cache: str
    threads: int
    clients: int
    round: int
    seconds: float
    tokens: int
    prompt_tokens: int
    tokens_per_sec: float
    first_text_sec: tuple[float, ...]
    same: int
    requests: int


async def ask(client: AsyncOpenAI, model: str, prompt: Any, count: int) -> Answer:
    """Sends one prompt and reads its answer to the end."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(map(dict, prompt))
    started, first, pieces, usage = time.perf_counter(), None, [], None
    chunks = await client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        temperature=0.0,
        max_tokens=count,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"repetition_penalty": 1.0},
    )
    async for chunk in chunks:
        usage = chunk.usage or usage
        piece = "".join(choice.delta.content or "" for choice in chunk.choices)
        if piece and first is None:
            first = time.perf_counter() - started
        pieces.append(piece)
    if usage is None:
        raise ServerFailedError("it gave no usage at the end of an answer, so its tokens cannot be counted")
    first = time.perf_counter() - started if first is None else first
    return Answer("".join(pieces), usage.prompt_tokens, usage.completion_tokens, first)


async def load(address: str, prompts: Sequence[Any], count: int, clients: int) -> tuple[float, list[Answer]]:
    """Sends prompts from concurrent clients; returns the seconds that all took, and the answers in their order."""
    waiting = iter(list(enumerate(prompts)))
    answers: dict[int, Answer] = {}
    # A connection for each request: llama.cpp's server closes one after some requests, which the next one would notice.
    once = {"Connection": "close"}
    async with AsyncOpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=3600.0, default_headers=once
    ) as client:
        model = (await client.models.list()).data[0].id

        async def send_the_next() -> None:
            for place, prompt in waiting:
                answers[place] = await ask(client, model, prompt, count)

        started = time.perf_counter()
        await asyncio.gather(*(send_the_next() for _ in range(clients)))
        seconds = time.perf_counter() - started
    return seconds, [answers[place] for place in range(len(prompts))]


@contextmanager
def running(name: str, command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """Starts a server, waits until it answers, yields its address, and ends it with all its processes.

    Raises:
        ServerFailedError: it did not start, or it failed within the `with` block.
    """
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        end = time.monotonic() + START_SEC
        while not _answers(address):
            if process.poll() is not None:
                raise ServerFailedError("it ended before it answered")
            if time.monotonic() > end:
                raise ServerFailedError(f"it was not ready after {START_SEC} seconds")
            time.sleep(0.2)
        yield address
    except (ServerFailedError, OpenAIError) as error:
        written = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ServerFailedError(f"{written}\nThe server '{name}' failed: {error}. Its last lines are above.") from error
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)


def _answers(address: str) -> bool:
    with (
        suppress(OSError, HTTPException, ValueError),
        urllib.request.urlopen(f"{address}/v1/models", timeout=5) as reply,
    ):
        return bool(json.load(reply)["data"])
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(
    args: argparse.Namespace, prompts: Sequence[Any], context: int, failed: dict[str, ServerFailedError]
) -> Iterator[Row]:
    """Runs the load of every number of clients on every server, in rounds. A server that fails is left out from there
    on, and is in `failed` by its name.
    """
    for number in range(args.rounds):
        first = number % len(args.servers)
        for name in args.servers[first:] + args.servers[:first]:
            if name in failed:
                continue
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            try:
                yield from measure_server(args, name, number, prompts, context)
            except ServerFailedError as error:
                failed[name] = error
                print(error, file=sys.stderr)


def measure_server(
    args: argparse.Namespace, name: str, number: int, prompts: Sequence[Any], context: int
) -> Iterator[Row]:
    """Starts a server and runs the load of every number of clients on it."""
    server, port, most = SERVERS[name], free_port(), max(args.clients)
    command = starting(server, args.model, port, most, context, args.threads)
    with tempfile.TemporaryDirectory() as folder, running(name, command, port, Path(folder) / "log") as address:
        asyncio.run(load(address, prompts[:most], WARM_UP_TOKENS, most))
        expected: list[str] = []
        for clients in args.clients:
            seconds, answers = asyncio.run(load(address, prompts, args.max_new_tokens, clients))
            texts = [answer.text for answer in answers]
            expected = expected or texts
            tokens = sum(answer.tokens for answer in answers)
            yield Row(
                name,
                server.weights,
                server.kv_cache,
                args.threads,
                clients,
                number,
                seconds,
                tokens,
                sum(answer.prompt_tokens for answer in answers),
                tokens / seconds,
                tuple(answer.first_text_sec for answer in answers),
                sum(a == b for a, b in zip(texts, expected, strict=True)),
                len(answers),
            )


def table(rows: Sequence[Row]) -> str:
    """Medians over the rounds in Markdown: a row for each server and number of clients."""
    lines = [f"| server | weights | KV cache | clients | tokens/s | over {OURS} | first text, s | same |"]
    lines.append(f"|{'---|' * 3}{'--:|' * 5}")
    ours = {(row.clients, row.round): row for row in rows if row.server == OURS}
    for server, clients in dict.fromkeys((row.server, row.clients) for row in rows):
        own = [row for row in rows if (row.server, row.clients) == (server, clients)]
        ratios = [row.tokens_per_sec / ours[key].tokens_per_sec for row in own if (key := (clients, row.round)) in ours]
        speed = statistics.median(row.tokens_per_sec for row in own)
        waits = [wait for row in own for wait in row.first_text_sec]
        same = f"{sum(row.same for row in own)} of {sum(row.requests for row in own)}"
        over = f"{statistics.median(ratios):.2f}" if ratios else "–"
        cells = [server, own[0].weights, own[0].kv_cache, f"{clients}", f"{speed:.1f}", over]
        lines.append(f"| {' | '.join(cells)} | {statistics.median(waits):.2f} (worst {max(waits):.2f}) | {same} |")
    return "\n".join(lines)


def other_prompts(rows: Sequence[Row]) -> str | None:
    """A note where servers counted different prompt tokens for the same prompts, so that they ran different ones."""
    counted = {row.server: row.prompt_tokens for row in rows}
    return f"note: the servers' prompts differ in length: {counted}" if len(set(counted.values())) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the rows, in JSON")
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model", help="directory or name (default: the embedded model)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    parser.add_argument("--limit", type=int, default=32, help="prompts in all, of all domains in turns (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=list(USUAL), help=f"default: {' '.join(USUAL)}"
    )
    parser.add_argument("--threads", type=int, default=thread_count().threads, help="default: as knn-ssd has it")
    args = parser.parse_args()
    if min(*args.clients, args.rounds, args.max_new_tokens) < 1:
        parser.error("--clients, --rounds and --max-new-tokens must be 1 or more")
    prompts = [prompt.prompt for prompt in stream(read_workloads(args.prompts), 1.0)][: args.limit]
    if len(prompts) < max(args.clients):
        parser.error(f"{len(prompts)} prompts are too few for {max(args.clients)} clients: give more, or raise --limit")
    tokenizer = load_tokenizer(args.model)
    lengths = [len(encode(tokenizer, prompt, sys.maxsize)) for prompt in prompts]
    context = -(-(max(lengths) + args.max_new_tokens + 1) // 256) * 256  # llama.cpp takes multiples of it
    rows: list[Row] = []
    failed: dict[str, ServerFailedError] = {}
    for row in measure(args, prompts, context, failed):
        rows.append(row)
        write_rows(args.out, rows)
        print(f"{row.server}, {row.clients} clients: {row.tokens_per_sec:.1f} tokens/s", file=sys.stderr)
    if rows:
        print(table(rows))
    if note := other_prompts(rows):
        print(note)
    if failed:
        sys.exit(f"Not measured to the end, for the reasons above: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
