"""Compares this code with an earlier commit of it: plain and default decoding, and prefill, prompt by prompt.

    git worktree add /tmp/before 64f13e7
    python benchmarks/trees.py --before /tmp/before --prompts FILE.jsonl… [--model M] [--limit N] [--max-new-tokens N]

Each tree runs in a process of its own, one at a time, in a random order for each prompt, without an answer store. A
ratio above 1 says how much faster the second is. `end to end` includes the prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from knn_ssd.prompts import read_prompts

SERVED = """
import inspect, json, sys
from knn_ssd import Engine
options = {"answers": False} if "answers" in inspect.signature(Engine.from_pretrained).parameters else {}
engine = Engine.from_pretrained(sys.argv[1] or None, device="cpu", **options)
engine.prepare()
engine.generate("Hello", max_new_tokens=8)
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    prompt, count, plain = json.loads(line)
    result = engine.generate(prompt, max_new_tokens=count, plain=plain)
    stats = result.stats
    print(json.dumps([list(result.token_ids), stats.prefill_sec, stats.decode_sec]), flush=True)
"""
RATIOS = (
    ("plain decoding: before / now", ("before", True), ("now", True), False),
    ("default before: plain before / default before", ("before", True), ("before", False), False),
    ("default now: plain before / default now", ("before", True), ("now", False), False),
    ("default now: plain now / default now", ("now", True), ("now", False), False),
    ("default: before / now", ("before", False), ("now", False), False),
    ("end to end: plain before / default now", ("before", True), ("now", False), True),
    ("end to end, default: before / now", ("before", False), ("now", False), True),
)


class Tree:
    """A process that decodes with the code of a source tree."""

    def __init__(self, root: Path, model: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root / "src")}
        command = [sys.executable, "-c", SERVED, model]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self._read()

    def run(self, prompt: str, count: int, plain: bool) -> tuple[list[int], float, float]:
        """Token ids, and seconds of prefill and of decoding."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([prompt, count, plain]) + "\n")
        self._process.stdin.flush()
        ids, prefill, decode = self._read()
        return ids, prefill, decode

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a source tree could not load the model")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    args = parser.parse_args()
    trees = {
        "before": Tree(args.before, args.model),
        "now": Tree(Path(__file__).resolve().parent.parent, args.model),
    }
    chooser = random.Random(0)
    prompts = [each for path in args.prompts for each in chooser.sample(read_prompts(path), args.limit)]
    chooser.shuffle(prompts)
    ratios: dict[str, list[float]] = {}
    same: dict[str, int] = dict.fromkeys([*trees, "both"], 0)
    for prompt in prompts:
        turns = [(name, plain) for name in trees for plain in (True, False)]
        chooser.shuffle(turns)
        found = {turn: trees[turn[0]].run(prompt.prompt, args.max_new_tokens, turn[1]) for turn in turns}
        for tree in trees:
            same[tree] += found[tree, True][0] == found[tree, False][0]
        same["both"] += all(each[0] == found["now", True][0] for each in found.values())
        for name, first, second, with_prefill in RATIOS:
            one, other = (
                (found[turn][2] + found[turn][1] * with_prefill) / len(found[turn][0]) for turn in (first, second)
            )
            ratios.setdefault(name, []).append(one / other)
        ratios.setdefault("prefill: before / now", []).append(found["before", True][1] / found["now", True][1])
    for name, each in ratios.items():
        low, median, high = statistics.quantiles(each, n=4)
        print(f"{name:50} median {median:.2f}, mean {statistics.mean(each):.2f}, quartiles {low:.2f} to {high:.2f}")
    for tree in trees:
        print(f"{tree}: default as plain {same[tree]} of {len(prompts)}")
    print(f"the same in both: {same['both']} of {len(prompts)}")


if __name__ == "__main__":
    main()
