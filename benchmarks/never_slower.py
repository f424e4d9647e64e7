"""Checks that drafts are never slower than plain decoding, and an atlas never slower than none.

    python benchmarks/never_slower.py [--prompts FILE.jsonl…] [--atlas FOLDER…] [--limit N] [--least 0.98]

The methods are each atlas (also one that does not fit the prompts), lookup alone at temperature 1 (in text without
repeats), and default settings at temperature 1 with and without a seed, which use different controllers. Each decodes
the same prompts as plain decoding, prompt by prompt, in rotating order; each atlas also the same as default settings
without an atlas. Where a plan is given, the adaptive controller is asked for, since a fixed policy drafts even where it
does not pay. Prompts are from the second half of each domain, since the other scripts calibrate on the first. Prints
decode tokens per second by domain, in one table over those of plain decoding and in a second one those of each atlas
over those without one, each with its smallest figure. The exit code is 1 if one of either table is under `--least`.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from knn_ssd import Atlas, Engine, Plan
from knn_ssd.bench.workload import halves, limit_each, read_workloads
from knn_ssd.plan import Policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model")
    parser.add_argument("--atlas", nargs="+", default=[], type=Path, help="atlases that need not suit the prompts")
    parser.add_argument("--limit", type=int, default=4, help="prompts per domain")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--least", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, device="cpu", answers=False)
    lookup = Plan.skipping(engine.backend.num_layers, policy=Policy(lookup=True))
    sampled = {"temperature": 1.0, "seed": args.seed}
    controlled = {**sampled, "adaptive": True}
    methods: dict[str, tuple[Engine, dict[str, Any], dict[str, Any]]] = {
        "lookup alone, temperature 1": (engine, {"plan": lookup, **controlled}, sampled),
        "default, temperature 1": (engine, controlled, sampled),
        "default, temperature 1, a seed": (engine, sampled, sampled),
    }
    without: dict[str, Engine] = {}  # one for each atlas, so that both learn from the same prompts
    for folder in args.atlas:
        name, atlas = f"atlas {folder.name}", Atlas.load(folder)
        alike: dict[str, Any] = {"answers": False, "backend": engine.backend}
        methods[name] = (Engine(engine.model, engine.tokenizer, atlas, **alike), {}, {})
        without[name] = Engine(engine.model, engine.tokenizer, **alike)
    prompts = limit_each(halves(read_workloads(args.prompts))[1], args.limit)
    for own, options in [(own, options) for own, options, _ in methods.values()] + [(e, {}) for e in without.values()]:
        own.prepare()
        own.generate("Hello", max_new_tokens=8, **options)  # the warm-up
    tokens: dict[tuple[str, str], float] = defaultdict(float)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for turn, prompt in enumerate(prompts):
        for name, (own, options, plainly) in methods.items():
            runs = [("own", own, options), ("plain", engine, {**plainly, "plain": True})]
            if name in without:
                runs.append(("without an atlas", without[name], {}))
            start = turn % len(runs)
            for way, runner, how in (*runs[start:], *runs[:start]):
                result = runner.generate(prompt.prompt, max_new_tokens=args.max_new_tokens, **how)
                for domain in (prompt.domain or "none", "all"):
                    tokens[f"{name} {way}", domain] += len(result.token_ids) - 1
                    seconds[f"{name} {way}", domain] += result.stats.decode_sec
    domains = sorted({domain for _, domain in tokens}, key=lambda domain: (domain == "all", domain))

    def print_table(title: str, names: list[str], other: str) -> float:
        """Prints speeds of methods over another way to decode, by domain, and gives the smallest."""
        print(f"{title}\n\n| method | " + " | ".join(domains) + " |\n|---|" + "--:|" * len(domains))
        least = float("inf")
        for name in names:
            speeds = [
                tokens[f"{name} own", d]
                / seconds[f"{name} own", d]
                * seconds[f"{name} {other}", d]
                / tokens[f"{name} {other}", d]
                for d in domains
            ]
            least = min(least, *speeds)
            print(f"| {name} | " + " | ".join(f"{speed:.3f}" for speed in speeds) + " |")
        print(f"\nsmallest: {least:.3f}\n")
        return least

    least = print_table("over plain decoding", list(methods), "plain")
    if without:
        least = min(least, print_table("over default settings without an atlas", list(without), "without an atlas"))
    sys.exit(least < args.least)


if __name__ == "__main__":
    main()
