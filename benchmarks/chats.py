"""Conversations of several turns, with and without drafts, with and without a prefix cache.

    python benchmarks/chats.py [--prompts FILE.jsonl…] [--model M] [--atlas FOLDER] [--limit N] [--turns 3]

Each prompt, from the second half of its domain's, opens a conversation that continues with questions about the answer.
In each turn all methods answer the same history, which has the answers of plain decoding; each time another method is
the first. Prints by turn, over plain decoding without the cache: the time to the first token, the decode speed, and the
end-to-end speed.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from knn_ssd import Atlas, Engine
from knn_ssd.bench.summary import formatted
from knn_ssd.bench.workload import halves, limit_each, read_workloads

QUESTIONS = ("Say that again in one sentence.", "Why is that so?", "What else is there to say about it?")
Sums = dict[str, dict[str, Counter[str]]]  # by turn and method


def converse(methods: Mapping[str, Engine], prompt: str, turns: int, count: int, first_method: int, sums: Sums) -> None:
    """Runs one conversation, and adds up times and counts of every method."""
    history = [{"role": "user", "content": prompt}]
    for turn in range(turns):
        first = (first_method + turn) % len(methods)
        results = {
            name: methods[name].generate(history, max_new_tokens=count, plain=name.startswith("plain"))
            for name in [*methods, *methods][first : first + len(methods)]
        }
        for name, result in results.items():
            stats = result.stats
            for row in (f"{turn + 1}", "all"):
                sums[row][name] += Counter(
                    first=stats.prefill_sec + stats.route_sec,
                    decoding=stats.decode_sec,
                    total=stats.prefill_sec + stats.route_sec + stats.decode_sec,
                    after=stats.tokens - 1,
                    tokens=stats.tokens,
                    drafted=stats.drafted,
                    accepted=stats.accepted,
                    history=len(methods[name].encode(history)),
                    reused=stats.reused,
                    differing=result.token_ids != results["plain"].token_ids,
                )
        question = QUESTIONS[turn % len(QUESTIONS)]
        history += [{"role": "assistant", "content": results["plain"].text}, {"role": "user", "content": question}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model")
    parser.add_argument("--atlas", type=Path, help="without it, drafts are made under the general plan")
    parser.add_argument("--limit", type=int, default=2, help="conversations per domain")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prefix-cache", type=int, default=512, help="in MiB")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    args = parser.parse_args()
    bare = Engine.from_pretrained(args.model, device="cpu", answers=False)
    atlas = Atlas.load(args.atlas) if args.atlas else None
    methods = {
        method + suffix: Engine(
            bare.model, bare.tokenizer, atlas, answers=False, prefix_cache=size, backend=bare.backend
        )
        for suffix, size in (("", 0), (", cache", args.prefix_cache * 2**20))
        for method in ("plain", "auto")
    }
    bare.prepare()
    for name, engine in methods.items():  # the warm-up
        engine.generate("Hello", max_new_tokens=8, plain=name.startswith("plain"))
    sums: Sums = defaultdict(lambda: defaultdict(Counter))
    for number, prompt in enumerate(limit_each(halves(read_workloads(args.prompts))[1], args.limit)):
        converse(methods, prompt.prompt, args.turns, args.max_new_tokens, number, sums)
    print("| turn | method | history reused | accepted | first token | decoding | end to end | different from plain |")
    print("|--:|---|" + "--:|" * 6)
    for turn, by_method in sorted(sums.items()):
        plain = by_method["plain"]
        for name in methods:
            own = by_method[name]
            accepted = formatted(own["accepted"] / own["drafted"] if own["drafted"] else None, "{:.2f}")
            decoding = own["after"] / own["decoding"] * plain["decoding"] / plain["after"]
            total = own["tokens"] / own["total"] * plain["total"] / plain["tokens"]
            cells = [own["reused"] / own["history"], own["first"] / plain["first"], decoding, total]
            reused, *speeds = (f"{cell:.2f}" for cell in cells)
            print(f"| {turn} | {name} | {reused} | {accepted} | {' | '.join(speeds)} | {own['differing']} |")


if __name__ == "__main__":
    main()
