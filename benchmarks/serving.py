"""Throughput of a server with many concurrent clients, against a single client.

    python benchmarks/serving.py [--prompts FILE.jsonl…] [--model M] [--clients 8] [--limit N] [--max-new-tokens N]

Each measurement starts its own `knn-ssd serve` with default settings, so that no prompt is in its prefix cache yet. In
each turn, one client sends all prompts one after the other; then `--clients` concurrent clients send the same prompts
to another server. Prints total tokens over wall-clock time of both, the median of their ratio over the turns, the time
to the first text, and how many answers were the same. `--prefix-cache 0` keeps prompts from sharing their beginnings.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from knn_ssd.bench.workload import read_workloads, stream


@dataclass(frozen=True)
class Reply:
    """One answer, and the seconds until its first text."""

    text: str
    tokens: int
    first_sec: float


def ask(client: httpx.Client, model: str, prompt: object, count: int) -> Reply:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": count, "stream": True}
    started, first, text, tokens = time.perf_counter(), 0.0, "", 0
    with client.stream(
        "POST", "/v1/chat/completions", json={**body, "stream_options": {"include_usage": True}}
    ) as lines:
        for line in lines.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            first = first or (time.perf_counter() - started if piece else 0.0)
            text += piece
    return Reply(text, tokens, first)


def run_clients(
    client: httpx.Client, model: str, prompts: Sequence[object], count: int, clients: int
) -> tuple[float, list[Reply]]:
    """Sends prompts from concurrent clients; returns tokens per second over all, and the answers."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda prompt: ask(client, model, prompt, count), prompts))
    return sum(reply.tokens for reply in replies) / (time.perf_counter() - started), replies


@contextmanager
def server(options: Sequence[str]) -> Iterator[httpx.Client]:
    """Starts a server, and yields a client of it."""
    command = [sys.executable, "-m", "knn_ssd", "serve", "--port", "0", "--name", "m", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = next(found[1] for line in process.stderr if (found := re.search(r"(http://\S+)/v1", line)))
        try:
            with httpx.Client(base_url=address, timeout=600) as client:
                yield client
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model")
    parser.add_argument("--atlas")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--limit", type=int, default=16, help="prompts in all, in a stream whose domain changes at each"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prefix-cache", metavar="MIB", help="as `knn-ssd serve` has it")
    args = parser.parse_args()
    prompts = [prompt.prompt for prompt in stream(read_workloads(args.prompts), 1.0)]
    if len(prompts) < args.limit + args.clients:
        sys.exit(f"{len(prompts)} prompts are too few: {args.limit} are measured, {args.clients} others warm up.")
    measured, others = prompts[: args.limit], prompts[args.limit : args.limit + args.clients]
    given = {"--model": args.model, "--atlas": args.atlas, "--prefix-cache": args.prefix_cache}
    options = [item for name, value in given.items() if value is not None for item in (name, value)]

    def measure(clients: int) -> tuple[float, list[Reply]]:
        with server([*options, "--running", str(args.clients)]) as client:
            run_clients(client, "m", others, 16, args.clients)  # the warm-up
            return run_clients(client, "m", measured, args.max_new_tokens, clients)

    alone, concurrent, ratios = [], [], []
    for _ in range(args.turns):
        one, replies = measure(1)
        many, many_replies = measure(args.clients)
        ratios.append(many / one)
        same = sum(a.text == b.text for a, b in zip(replies, many_replies, strict=True))
        alone += [reply.first_sec for reply in replies]
        concurrent += [reply.first_sec for reply in many_replies]
        print(f"one client {one:.1f} tokens/s, {args.clients} clients {many:.1f}: {many / one:.2f}x, ", end="")
        print(f"{same} of {len(measured)} answers the same", flush=True)
    waits = [f"{statistics.median(w):.2f} s (worst {max(w):.2f})" for w in (alone, concurrent)]
    print(f"median ratio {statistics.median(ratios):.2f}x; first text after {waits[0]} alone, {waits[1]} with all")


if __name__ == "__main__":
    main()
