"""Decoding speed with default settings against plain decoding of the same engine, and against `transformers.generate`.

    python benchmarks/decoding.py --prompts FILE.jsonl… [--model M] [--limit N] [--max-new-tokens N] [--hf float32]

The methods run prompt by prompt in turn, in rotating order, in one process; every output ends at the end-of-sequence
token. Prints total tokens over total decode time per domain, and on how many prompts the output was that of plain
decoding. `--hf` also times transformers, prefill included: our tokens per second over its own, and on how many prompts
its output was that of plain decoding, too.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict

import torch

from knn_ssd import Engine
from knn_ssd.prompts import read_prompts


def transformers_output(
    model: torch.nn.Module, token_ids: list[int], max_new_tokens: int
) -> tuple[tuple[int, ...], float]:
    """The greedy output of `model.generate`, and its seconds, prefill included."""
    prompt = torch.tensor([token_ids])
    started = time.perf_counter()
    output = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens
    )
    return tuple(output[0, len(token_ids) :].tolist()), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--model")
    parser.add_argument("--atlas")
    parser.add_argument("--limit", type=int, default=8, help="prompts per file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--hf", metavar="DTYPE", help="time transformers too, in this dtype")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, atlas=args.atlas, device="cpu", answers=False)
    reference = Engine.from_pretrained(args.model, dtype=args.hf, device="cpu").model if args.hf else None
    chooser = random.Random(args.seed)
    files = [read_prompts(path) for path in args.prompts]
    chosen = [chooser.sample(prompts, min(args.limit, len(prompts))) for prompts in files]
    order = [prompts[i] for i in range(args.limit) for prompts in chosen if i < len(prompts)]
    engine.prepare()
    engine.generate("Hello", max_new_tokens=8)  # the warm-up
    sums: dict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for turn, prompt in enumerate(order):
        results = {}
        for method in ("plain", "auto") if turn % 2 else ("auto", "plain"):
            options = {
                "max_new_tokens": args.max_new_tokens,
                "temperature": args.temperature,
                "plain": method == "plain",
            }
            results[method] = engine.generate(prompt.prompt, **options)
        for domain in (prompt.domain or "none", "all"):
            total = sums[domain]
            for method, result in results.items():
                total[f"{method} tokens"] += len(result.token_ids)
                total[f"{method} sec"] += result.stats.decode_sec
                total[f"{method} prefill"] += result.stats.prefill_sec
            total["prompts"] += 1
            total["same"] += results["plain"].token_ids == results["auto"].token_ids
            total["drafted"] += results["auto"].stats.drafted
            total["accepted"] += results["auto"].stats.accepted
            total["rounds"] += results["auto"].stats.rounds
        if reference is not None:
            output, taken = transformers_output(reference, engine.encode(prompt.prompt), args.max_new_tokens)
            for domain in (prompt.domain or "none", "all"):
                sums[domain]["hf sec"] += taken
                sums[domain]["hf tokens"] += len(output)
                sums[domain]["hf same"] += output == results["plain"].token_ids
    print(
        "domain          plain ms/token  auto ms/token  speed-up  accepted  tokens/round  prefill  same as plain",
        end="",
    )
    print("  end to end over transformers  transformers same as plain" if args.hf else "")
    for domain, t in sorted(sums.items(), key=lambda item: item[0] == "all"):
        plain, auto = (1e3 * t[f"{method} sec"] / t[f"{method} tokens"] for method in ("plain", "auto"))
        print(
            f"{domain:15} {plain:14.2f} {auto:14.2f} {plain / auto:9.2f} {t['accepted'] / max(t['drafted'], 1):9.2f} "
            f"{t['auto tokens'] / t['rounds']:13.2f} {t['auto prefill'] / t['plain prefill']:8.3f} "
            f"{t['same']:.0f} of {t['prompts']:.0f}",
            end="",
        )
        if args.hf:
            ours, theirs = t["auto tokens"] / (t["auto sec"] + t["auto prefill"]), t["hf tokens"] / t["hf sec"]
            print(f"  {ours / theirs:28.2f}  {t['hf same']:.0f} of {t['prompts']:.0f}", end="")
        print()
    means = [
        t["plain sec"] / t["plain tokens"] * t["auto tokens"] / t["auto sec"] for d, t in sums.items() if d != "all"
    ]
    print(f"mean speed-up over the domains: {sum(means) / len(means):.2f}")


if __name__ == "__main__":
    main()
