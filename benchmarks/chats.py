"""Short chats: conversations of several turns, drafted and plain, with a prefix cache and without.

    python benchmarks/chats.py [--prompts FILE.jsonl…] [--model M] [--atlas FOLDER] [--limit N] [--turns 3]

Each prompt, of the second half of its domain's, opens a conversation that goes on with questions about the answer. At
each turn all ways answer the same history, in which plain decoding has spoken; each time another way begins. Prints by
turn, over plain decoding without the cache: the time to the first token, and the speed after it and from end to end.
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
Sums = dict[str, dict[str, Counter[str]]]  # by turn and way


def converse(ways: Mapping[str, Engine], prompt: str, turns: int, count: int, begins: int, sums: Sums) -> None:
    """Holds one conversation, and adds up what every way's answers took."""
    history = [{"role": "user", "content": prompt}]
    for turn in range(turns):
        first = (begins + turn) % len(ways)
        results = {
            name: ways[name].generate(history, max_new_tokens=count, plain=name.startswith("plain"))
            for name in [*ways, *ways][first : first + len(ways)]
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
                    history=len(ways[name].encode(history)),
                    reused=stats.reused,
                    differing=result.token_ids != results["plain"].token_ids,
                )
        question = QUESTIONS[turn % len(QUESTIONS)]
        history += [{"role": "assistant", "content": results["plain"].text}, {"role": "user", "content": question}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model")
    parser.add_argument("--atlas", type=Path, help="without it, the general plan drafts")
    parser.add_argument("--limit", type=int, default=2, help="conversations of each domain")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prefix-cache", type=int, default=512, help="in MiB")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    args = parser.parse_args()
    bare = Engine.from_pretrained(args.model, device="cpu")
    atlas = Atlas.load(args.atlas) if args.atlas else None
    ways = {
        way + suffix: Engine(bare.model, bare.tokenizer, atlas, prefix_cache=size, backend=bare.backend)
        for suffix, size in (("", 0), (", cache", args.prefix_cache * 2**20))
        for way in ("plain", "auto")
    }
    for name, engine in ways.items():  # the warm-up, which makes the low-bit copies
        engine.generate("Hello", max_new_tokens=8, plain=name.startswith("plain"))
    sums: Sums = defaultdict(lambda: defaultdict(Counter))
    for begins, prompt in enumerate(limit_each(halves(read_workloads(args.prompts))[1], args.limit)):
        converse(ways, prompt.prompt, args.turns, args.max_new_tokens, begins, sums)
    print("| turn | way | history reused | accepted | first token | decoding | end to end | different from plain |")
    print("|--:|---|" + "--:|" * 6)
    for turn, by_way in sorted(sums.items()):
        plain = by_way["plain"]
        for name in ways:
            own = by_way[name]
            accepted = formatted(own["accepted"] / own["drafted"] if own["drafted"] else None, "{:.2f}")
            decoding = own["after"] / own["decoding"] * plain["decoding"] / plain["after"]
            total = own["tokens"] / own["total"] * plain["total"] / plain["tokens"]
            cells = [own["reused"] / own["history"], own["first"] / plain["first"], decoding, total]
            reused, *speeds = (f"{cell:.2f}" for cell in cells)
            print(f"| {turn} | {name} | {reused} | {accepted} | {' | '.join(speeds)} | {own['differing']} |")


if __name__ == "__main__":
    main()
