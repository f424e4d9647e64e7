"""Checks that drafts are never slower than plain decoding: atlases that do not fit, lookup in text without repeats.

    python benchmarks/never_slower.py [--prompts FILE.jsonl…] [--atlas FOLDER…] [--limit N] [--least 0.98]

The methods are each atlas, lookup alone at temperature 1, and default settings at temperature 1 with and without a
seed, which use different controllers. Each decodes the same prompts as plain decoding, prompt by prompt, in alternating
order. Where a plan is given, the adaptive controller is asked for, since a fixed policy drafts even where it does not
pay. Prompts are from the second half of each domain, since the other scripts calibrate on the first. Prints decode
tokens per second over those of plain decoding by domain, and ends with exit code 1 if one of them is under `--least`.
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
    for folder in args.atlas:
        with_atlas = Engine(engine.model, engine.tokenizer, Atlas.load(folder), answers=False, backend=engine.backend)
        methods[f"atlas {folder.name}"] = (with_atlas, {}, {})
    prompts = limit_each(halves(read_workloads(args.prompts))[1], args.limit)
    for own, options, _ in methods.values():
        own.generate("Hello", max_new_tokens=8, **options)  # the warm-up, which makes the 4-bit copies
    tokens: dict[tuple[str, str], float] = defaultdict(float)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for turn, prompt in enumerate(prompts):
        for name, (own, options, plainly) in methods.items():
            runs = [("own", own, options), ("plain", engine, {**plainly, "plain": True})]
            for way, runner, how in runs if turn % 2 else reversed(runs):
                result = runner.generate(prompt.prompt, max_new_tokens=args.max_new_tokens, **how)
                for domain in (prompt.domain or "none", "all"):
                    tokens[f"{name} {way}", domain] += len(result.token_ids) - 1
                    seconds[f"{name} {way}", domain] += result.stats.decode_sec
    domains = sorted({domain for _, domain in tokens}, key=lambda domain: (domain == "all", domain))
    print("| method | " + " | ".join(domains) + " |\n|---|" + "--:|" * len(domains))
    least = float("inf")
    for name in methods:
        speeds = [
            tokens[f"{name} own", d]
            / seconds[f"{name} own", d]
            * seconds[f"{name} plain", d]
            / tokens[f"{name} plain", d]
            for d in domains
        ]
        least = min(least, *speeds)
        print(f"| {name} | " + " | ".join(f"{speed:.3f}" for speed in speeds) + " |")
    print(f"\nsmallest: {least:.3f}")
    sys.exit(least < args.least)


if __name__ == "__main__":
    main()
