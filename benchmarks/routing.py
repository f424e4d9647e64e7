"""Routing accuracy by pooling, number of anchors per domain, and number k of nearest anchors that vote.

    python benchmarks/routing.py --prompts FILE.jsonl… [--model M] [--limit N] [--anchors 1 2 …] [--k 1 3 …]

Anchors are fitted on the first half of every domain's prompts, and route the second half. Prints the share that is
routed to its own domain. Radii are not used, so no prompt gets the fallback plan.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from knn_ssd import Engine
from knn_ssd.backends.base import Pooling
from knn_ssd.bench.workload import halves, limit_each, read_workloads
from knn_ssd.calibrate.anchors import fit_anchors
from knn_ssd.prompts import Prompt
from knn_ssd.request import Request, end_at
from knn_ssd.routing.router import Router
from knn_ssd.sampling import Sampler, SamplingParams


def vectors_of(engine: Engine, prompts: list[Prompt]) -> dict[Pooling, np.ndarray]:
    """Prompt vectors (N, D) by pooling."""
    vectors: dict[Pooling, list[np.ndarray]] = {pooling: [] for pooling in Pooling}
    sampler = Sampler.from_params(SamplingParams(), engine.backend.device)
    for prompt in prompts:
        token_ids = engine.encode(prompt.prompt)
        with Request(engine.backend, token_ids, 1, sampler, end_at(frozenset())) as request:
            for pooling, known in vectors.items():
                known.append(request.prefill.vector(pooling).numpy())
    return {pooling: np.stack(known) for pooling, known in vectors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, help="prompts per domain")
    parser.add_argument("--anchors", type=int, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3, 5])
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, device="cpu", answers=False)
    first, second = halves(limit_each(read_workloads(args.prompts), args.limit))
    own, others = (np.array([prompt.domain or "none" for prompt in half]) for half in (first, second))
    ours, theirs = vectors_of(engine, first), vectors_of(engine, second)
    print(f"{len(own)} prompts are for the anchors, {len(others)} are routed")
    print("pooling  anchors per domain  " + "  ".join(f"k = {k}".rjust(7) for k in args.k))
    for pooling in Pooling:
        for count in args.anchors:
            anchors = fit_anchors(ours[pooling], own, count, seed=0)
            shares = []
            for k in args.k:
                if k > len(anchors.points):
                    shares.append("–")
                    continue
                router = Router(k).fit(torch.from_numpy(anchors.points), anchors.domains)
                found = [router.predict(torch.from_numpy(vector)).domain for vector in theirs[pooling]]
                shares.append(f"{np.mean(np.array(found) == others):.3f}")
            print(f"{pooling.value:7}  {count:18}  " + "  ".join(share.rjust(7) for share in shares))


if __name__ == "__main__":
    main()
