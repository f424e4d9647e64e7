"""Speed on a machine that is not idle: plain and drafted decoding beside a process that keeps one core busy.

    python benchmarks/busy.py [--model M] [--prompts FILE.jsonl…] [--limit N] [--repeats N] [--max-new-tokens N]

Each prompt is decoded plainly and with default settings under three conditions in turn: quiet; beside a spinning
process of the same terminal session; and beside one of another session (`setsid`), which the kernel schedules as a
group of its own. Prints, for each condition, the median milliseconds a token, plain speed as a share of quiet plain
speed, and the drafted speed-up over plain decoding under the same condition. Ends with 1 if plain decoding keeps less
than `--least` of its quiet speed, or drafting is slower than plain decoding. With one of two cores kept busy, a fair
share of the machine is half.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from knn_ssd import Engine
from knn_ssd.bench.workload import limit_each, read_workloads

_SPIN = "while True: pass"
_SETTLE_SEC = 0.3  # until the other process has started and the scheduler has moved threads
CONDITIONS = ("quiet", "busy, same session", "busy, other session")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--limit", type=int, default=1, help="prompts per domain")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--least", type=float, default=0.45)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, device="cpu")
    prompts = limit_each(read_workloads(args.prompts), args.limit)
    engine.generate("Hello", max_new_tokens=16)  # the warm-up, which makes the 4-bit copies
    ms_per_token: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(args.repeats):
        for prompt in prompts:
            for condition in CONDITIONS:
                with busy(condition):
                    for way in ("plain", "drafted"):
                        result = engine.generate(
                            prompt.prompt, max_new_tokens=args.max_new_tokens, plain=way == "plain"
                        )
                        if len(result.token_ids) > 1:
                            decoded = len(result.token_ids) - 1
                            ms_per_token[condition, way].append(1e3 * result.stats.decode_sec / decoded)
    medians = {key: statistics.median(values) for key, values in ms_per_token.items()}
    print("| condition | plain, ms a token | share of quiet | drafted, ms a token | over plain |")
    print("|---|--:|--:|--:|--:|")
    fails = False
    for condition in CONDITIONS:
        plain, drafted = medians[condition, "plain"], medians[condition, "drafted"]
        share, gain = medians["quiet", "plain"] / plain, plain / drafted
        fails |= share < args.least or gain < 1.0
        print(f"| {condition} | {plain:.2f} | {share:.2f} | {drafted:.2f} | {gain:.2f} |")
    sys.exit(fails)


@contextmanager
def busy(condition: str) -> Iterator[None]:
    """Keeps one core busy for the length of the block, as the condition says."""
    if condition == "quiet":
        yield
        return
    spinning = subprocess.Popen([sys.executable, "-c", _SPIN], start_new_session="other" in condition)
    try:
        time.sleep(_SETTLE_SEC)
        yield
    finally:
        spinning.kill()
        spinning.wait()


if __name__ == "__main__":
    main()
