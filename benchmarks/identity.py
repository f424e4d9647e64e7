"""Checks on many prompts whether the output with default settings is that of plain decoding. Nothing is timed.

    python benchmarks/identity.py --prompts FILE.jsonl… [--model M] [--atlas A] [--limit N] [--max-new-tokens N]

Prompts run several at a time with continuous batching, as in the server: the bits of a row do not depend on its batch.
They run with plain decoding first, then with default settings, which reuse the prompts' KV cache. Every eighth prompt
is decoded plainly once more, alone and without the prefix cache, to show that neither batch nor cache changes anything.
Prints by domain how many outputs were the same, and ends with exit code 1 if one was not.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.progress import track

from knn_ssd import Engine
from knn_ssd.bench.workload import limit_each, read_workloads
from knn_ssd.outputs import Generation
from knn_ssd.prompts import Prompt
from knn_ssd.server.scheduler import Event, Limits, Scheduler

ALONE_EVERY = 8


def outputs(engine: Engine, prompts: Sequence[Prompt], clients: int, what: str, **options: Any) -> list[list[int]]:
    """The token ids of every prompt's output, in the order of the prompts."""
    scheduler = Scheduler(engine, Limits(running=clients, waiting=len(prompts), deadline_sec=None))
    found: dict[int, Generation] = {}
    ended = threading.Semaphore(0)
    failed: list[Exception] = []

    def receive(index: int, event: Event) -> None:
        if isinstance(event, Generation):
            found[index] = event
        elif isinstance(event, Exception):
            failed.append(event)
        if isinstance(event, Generation | Exception):
            ended.release()

    try:
        for index, prompt in enumerate(prompts):
            scheduler.submit(prompt.prompt, options, lambda event, index=index: receive(index, event))
        for _ in track(prompts, what):
            ended.acquire()
            if failed:
                raise failed[0]
    finally:
        scheduler.close(0.0)
    return [list(found[index].token_ids) for index in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--model")
    parser.add_argument("--atlas")
    parser.add_argument("--limit", type=int, default=40, help="prompts per domain")
    parser.add_argument("--clients", type=int, default=8, help="prompts that run at the same time")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--cache", type=int, default=6 * 2**30, help="size of the prefix cache in bytes")
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, atlas=args.atlas, device="cpu", prefix_cache=args.cache)
    engine.prepare()
    prompts = limit_each(read_workloads(args.prompts), args.limit)
    count = args.max_new_tokens
    plain = outputs(engine, prompts, args.clients, "plain", max_new_tokens=count, plain=True)
    default = outputs(engine, prompts, args.clients, "default settings", max_new_tokens=count)
    fresh = Engine(engine.model, engine.tokenizer, engine.atlas, backend=engine.backend)
    alone = {
        index: list(fresh.generate(prompts[index].prompt, max_new_tokens=count, plain=True).token_ids)
        for index in track(range(0, len(prompts), ALONE_EVERY), "plain, alone")
    }
    same: dict[str, list[bool]] = defaultdict(list)
    for prompt, one, other in zip(prompts, plain, default, strict=True):
        for domain in (prompt.domain or "none", "all"):
            same[domain].append(one == other)
    tokens = sum(map(len, plain))
    print(f"exactness: {engine.backend.exactness}; {tokens} tokens")
    for domain in sorted(same, key=lambda domain: (domain == "all", domain)):
        print(f"{domain:14} {sum(same[domain])} of {len(same[domain])} outputs the same")
    agree = sum(plain[index] == ids for index, ids in alone.items())
    print(f"plain decoding alone: {agree} of {len(alone)} the same as batched")
    sys.exit(not all(same["all"]) or agree < len(alone))


if __name__ == "__main__":
    main()
