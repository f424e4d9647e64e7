"""A list of prompts several at a time, by `generate_batch`, against the same prompts one by one.

    python benchmarks/batches.py --prompts FILE.jsonl… [--model M] [--limit N] [--concurrency 8] [--repeats N]

Both decode with default settings and without an answer store, and take turns. Prints tokens per second of both from end
to end, the median of their ratio over the turns, and how many outputs were the same.
"""

from __future__ import annotations

import argparse
import statistics
import time

from knn_ssd import Engine
from knn_ssd.bench.workload import limit_each, read_workloads, stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, help="prompts per domain")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, device="cpu", answers=False)
    engine.prepare()
    prompts = [each.prompt for each in stream(limit_each(read_workloads(args.prompts), args.limit), mix_ratio=1.0)]
    speeds: dict[int, list[float]] = {1: [], args.concurrency: []}
    outputs: dict[int, list[tuple[int, ...]]] = {}
    engine.generate_batch(prompts[:2], max_new_tokens=4)  # what the first use makes
    for turn in range(args.repeats):
        for concurrency in sorted(speeds, reverse=bool(turn % 2)):
            started = time.perf_counter()
            results = engine.generate_batch(prompts, concurrency=concurrency, max_new_tokens=args.max_new_tokens)
            seconds = time.perf_counter() - started
            outputs[concurrency] = [tuple(each.token_ids) for each in results]
            speeds[concurrency].append(sum(map(len, outputs[concurrency])) / seconds)
    for concurrency, each in speeds.items():
        print(f"{concurrency} at a time: {statistics.median(each):.1f} tokens/s ({min(each):.1f} to {max(each):.1f})")
    ratios = [many / one for one, many in zip(speeds[1], speeds[args.concurrency], strict=True)]
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    same = sum(one == many for one, many in zip(outputs[1], outputs[args.concurrency], strict=True))
    print(f"the same outputs: {same} of {len(prompts)}")


if __name__ == "__main__":
    main()
