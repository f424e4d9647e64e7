"""Acceptance rate and speed by the share of sublayers that a draft skips and by its confidence threshold.

    python benchmarks/skipping.py [--prompts FILE.jsonl…] [--model M] [--limit N] [--shares 0.05 0.1 …]

Every sublayer is skipped alone on the target's own continuations; sets of growing size take the least harmful ones
first. Prints for each set the agreement of its draft by teacher-forced scoring, and the timed acceptance rate and
speed-up of fixed policies of the published draft length on the same prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from _recipes import observed

from knn_ssd import Engine, Plan
from knn_ssd.bench.workload import limit_each, read_workloads
from knn_ssd.calibrate.cost import measure_cost
from knn_ssd.calibrate.objective import TeacherForcedScorer
from knn_ssd.plan import Policy
from knn_ssd.prompts import Prompt

MAX_DRAFT = 12  # as published


def skipping(layers: int, sublayers: Sequence[int], policy: Policy | None = None) -> Plan:
    """The plan that skips sublayers, given by their places in `Plan.modes`."""
    attention, mlp = ([place // 2 for place in sublayers if place % 2 == odd] for odd in (0, 1))
    return Plan.skipping(layers, attention, mlp, policy)


def timed(engine: Engine, prompts: Sequence[Prompt], plan: Plan, count: int) -> tuple[float, float]:
    """Acceptance rate, and speed-up over plain decoding."""
    sums = dict.fromkeys(("drafted", "accepted", "own sec", "plain sec"), 0.0)
    for turn, prompt in enumerate(prompts):
        for way in ("own", "plain") if turn % 2 else ("plain", "own"):
            options = {"plain": True} if way == "plain" else {"plan": plan, "adaptive": False}
            stats = engine.generate(prompt.prompt, max_new_tokens=count, **options).stats
            sums[f"{way} sec"] += stats.decode_sec
            sums["drafted"] += stats.drafted
            sums["accepted"] += stats.accepted
    return sums["accepted"] / max(sums["drafted"], 1), sums["plain sec"] / sums["own sec"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=1, help="prompts per domain")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0, 0.4, 0.8, 0.95])
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, device="cpu", answers=False)
    backend, layers = engine.backend, engine.backend.num_layers
    prompts = limit_each(read_workloads(args.prompts), args.limit)
    observations = observed(engine, prompts, args.max_new_tokens)
    with TeacherForcedScorer(backend, observations, measure_cost(backend, low=False)) as scorer:
        alone = [scorer.score(skipping(layers, [place])).agreement for place in range(2 * layers)]
        order = sorted(range(2 * layers), key=lambda place: alone[place], reverse=True)
        sets = [order[: max(round(share * 2 * layers), 1)] for share in args.shares]
        agreements = [scorer.score(skipping(layers, own)).agreement for own in sets]
    print("agreement when one sublayer is skipped:", f"{min(alone):.2f} to {max(alone):.2f}\n")
    print("| skipped | agreement | " + " | ".join(f"p ≥ {t:g}: accepted, speed" for t in args.thresholds) + " |")
    print("|--:|" + "--:|" * (1 + len(args.thresholds)))
    for own, agreement in zip(sets, agreements, strict=True):
        cells = []
        for threshold in args.thresholds:
            plan = skipping(layers, own, Policy(MAX_DRAFT, threshold))
            accepted, speed = timed(engine, prompts, plan, args.max_new_tokens)
            cells.append(f"{accepted:.2f}, {speed:.2f}")
        print(f"| {len(own)} of {2 * layers} | {agreement:.2f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
