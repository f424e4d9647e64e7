"""Speed on a machine that is not idle or not all ours: beside a process that keeps a core busy, or under a CPU quota.

    python benchmarks/busy.py [--quota CPUS] [--model M] [--prompts FILE.jsonl…] [--limit N] [--repeats N]

Each prompt is decoded plainly and with default settings under three conditions in turn: quiet; beside a spinning
process of the same terminal session; and beside one of another session (`setsid`), which the kernel schedules as a
group of its own. With `--quota`, the conditions are: quiet; a control group with a quota of so many CPUs, with the
threads that the package chooses for it; and the same with a thread for every CPU, as a program runs that does not
know of the quota. Making a control group takes the rights of root, and the cpu controller.

Prints, for each condition, the median milliseconds a token, plain speed as a share of quiet plain speed, and the
drafted speed-up over plain decoding under the same condition. Ends with 1 if plain decoding keeps less than `--least`
of its quiet speed in one of the conditions that the package answers for, or drafting is slower there than plain
decoding. With one of two cores kept busy, or a quota of one CPU of two, a fair share of the machine is half.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knn_ssd import Engine
from knn_ssd.bench.workload import limit_each, read_workloads
from knn_ssd.kernels.binding import num_threads, set_threads
from knn_ssd.kernels.threads import thread_count, usable_cpus

_SPIN = "while True: pass"
_SETTLE_SEC = 0.3  # until the other process has started and the scheduler has moved threads
_PERIOD_US = 100_000
CONDITIONS = ("quiet", "busy, same session", "busy, other session")
IGNORANT = "quota, a thread for every CPU"  # what a program comes to that does not know of the quota
QUOTA_CONDITIONS = ("quiet", "quota", IGNORANT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--limit", type=int, default=1, help="prompts per domain")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--least", type=float, default=0.45)
    parser.add_argument("--quota", type=float, metavar="CPUS", help="compare under a quota instead of beside a process")
    args = parser.parse_args()
    conditions = QUOTA_CONDITIONS if args.quota else CONDITIONS
    engine = Engine.from_pretrained(args.model, device="cpu", answers=False)
    prompts = limit_each(read_workloads(args.prompts), args.limit)
    engine.prepare()
    engine.generate("Hello", max_new_tokens=16)  # the warm-up
    ms_per_token: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(args.repeats):
        for prompt in prompts:
            for condition in conditions:
                with limited(args.quota, condition) if args.quota else busy(condition):
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
    for condition in conditions:
        plain, drafted = medians[condition, "plain"], medians[condition, "drafted"]
        share, gain = medians["quiet", "plain"] / plain, plain / drafted
        fails |= condition != IGNORANT and (share < args.least or gain < 1.0)
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


@contextmanager
def limited(quota_cpus: float, condition: str) -> Iterator[None]:
    """Moves this process into a control group with a quota for the length of the block, as the condition says."""
    if condition == "quiet":
        yield
        return
    before = num_threads()
    version_1 = Path("/sys/fs/cgroup/cpu")
    root = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    group = root / f"knn-ssd-busy-{os.getpid()}"
    group.mkdir()
    try:
        if root == version_1:
            (group / "cpu.cfs_quota_us").write_text(str(round(quota_cpus * _PERIOD_US)))
        else:
            (group / "cpu.max").write_text(f"{round(quota_cpus * _PERIOD_US)} {_PERIOD_US}")
        (group / "cgroup.procs").write_text("0")
        set_threads(usable_cpus() if condition == IGNORANT else thread_count().threads)
        yield
    finally:
        (root / "cgroup.procs").write_text("0")
        group.rmdir()
        set_threads(before)


if __name__ == "__main__":
    main()
