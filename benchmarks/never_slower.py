"""Whether anything is slower than plain decoding: atlases that do not fit, look-up in text that does not repeat.

    python benchmarks/never_slower.py [--prompts FILE.jsonl…] [--atlas FOLDER…] [--limit N] [--least 0.98]

Each atlas, look-up alone at temperature 1, and default settings at temperature 1, under the controller of requests
without a seed and under that of those with one, decode the same prompts as plain decoding does, one prompt after the
other and in turn who begins. The controller is asked for where a plan is given, for it alone promises this: a policy
that is followed to the letter drafts whether it pays or not. Prompts are of the second half of each domain's, for the
other recipes calibrate on the first. Prints tokens per second over those of plain decoding by domain, after the first
token, and ends with 1 if one of them is under `--least`.
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
    engine = Engine.from_pretrained(args.model, device="cpu")
    lookup = Plan.skipping(engine.backend.num_layers, policy=Policy(lookup=True))
    sampled = {"temperature": 1.0, "seed": args.seed}
    controlled = {**sampled, "adaptive": True}
    ways: dict[str, tuple[Engine, dict[str, Any], dict[str, Any]]] = {
        "look-up alone, temperature 1": (engine, {"plan": lookup, **controlled}, sampled),
        "default, temperature 1": (engine, controlled, sampled),
        "default, temperature 1, a seed": (engine, sampled, sampled),
    }
    for folder in args.atlas:
        with_atlas = Engine(engine.model, engine.tokenizer, Atlas.load(folder), backend=engine.backend)
        ways[f"atlas {folder.name}"] = (with_atlas, {}, {})
    prompts = limit_each(halves(read_workloads(args.prompts))[1], args.limit)
    for own, options, _ in ways.values():
        own.generate("Hello", max_new_tokens=8, **options)  # the warm-up, which makes the low-bit copies
    tokens: dict[tuple[str, str], float] = defaultdict(float)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for turn, prompt in enumerate(prompts):
        for name, (own, options, plainly) in ways.items():
            runs = [("own", own, options), ("plain", engine, {**plainly, "plain": True})]
            for way, runner, how in runs if turn % 2 else reversed(runs):
                result = runner.generate(prompt.prompt, max_new_tokens=args.max_new_tokens, **how)
                for domain in (prompt.domain or "none", "all"):
                    tokens[f"{name} {way}", domain] += len(result.token_ids) - 1
                    seconds[f"{name} {way}", domain] += result.stats.decode_sec
    domains = sorted({domain for _, domain in tokens}, key=lambda domain: (domain == "all", domain))
    print("| way | " + " | ".join(domains) + " |\n|---|" + "--:|" * len(domains))
    least = float("inf")
    for name in ways:
        speeds = [
            tokens[f"{name} own", d]
            / seconds[f"{name} own", d]
            * seconds[f"{name} plain", d]
            / tokens[f"{name} plain", d]
            for d in domains
        ]
        least = min(least, *speeds)
        print(f"| {name} | " + " | ".join(f"{speed:.3f}" for speed in speeds) + " |")
    print(f"\nthe least: {least:.3f}")
    sys.exit(least < args.least)


if __name__ == "__main__":
    main()
