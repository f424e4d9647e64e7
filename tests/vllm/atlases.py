"""Atlases of tiny random models, whose domains are ranges of tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from in_vllm import LAYERS

from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.base import Pooling
from knn_ssd.backends.select import select_backend
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.loading.resolve import load_model
from knn_ssd.plan import Plan, Policy
from knn_ssd.routing.router import Router
from knn_ssd.speculation.cost_model import typical_profile

FAR = Policy(max_draft=4, threshold=0.0)
PLANS = {
    "letters": Plan.skipping(LAYERS, [2], [], FAR),
    "signs": Plan.skipping(LAYERS, [], [1, 2], FAR),
    "digits": Plan.skipping(LAYERS, [1, 2], [3], FAR),
    "capitals": Plan.skipping(LAYERS, policy=FAR),
    "rest": Plan.skipping(LAYERS, [1], [1], Policy(max_draft=2, threshold=0.3)),
}
FALLBACK = Plan.skipping(LAYERS, [3], [], FAR)


def prompts_of(domain: str, count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of a domain's own tokens."""
    start = 33 + 18 * list(PLANS).index(domain)
    chance = random.Random(f"{domain} {seed}")
    return [[start + chance.randrange(18) for _ in range(chance.randrange(4, 40))] for _ in range(count)]


class Vectors:
    """Prompt vectors by our own engine, and routes by them."""

    def __init__(self, folder: Path, pooling: Pooling) -> None:
        self._loaded = load_model(str(folder), device="cpu", dtype="float32")
        self._backend = select_backend(self._loaded.model)
        self._pooling = pooling

    def of(self, prompts: list[list[int]]) -> np.ndarray:
        vectors = []
        for prompt in prompts:
            session = self._backend.open(len(prompt))
            vectors.append(session.prefill(prompt).vector(self._pooling).float().numpy())
            session.close()
        return np.stack(vectors)

    def atlas(
        self,
        radius: float = 2.0,
        prompts: Mapping[str, list[list[int]]] | None = None,
        plans: Mapping[str, Plan] = PLANS,
        fallback: Plan = FALLBACK,
    ) -> Atlas:
        """The vectors of each domain's prompts as its anchors; four of each where none are given."""
        known = prompts or {domain: prompts_of(domain, 4, seed=1) for domain in plans}
        return Atlas(
            fingerprint=fingerprint(self._loaded.model, self._loaded.tokenizer),
            pooling=self._pooling,
            anchors=np.concatenate([self.of(known[domain]) for domain in plans]),
            anchor_domains=tuple(domain for domain in plans for _ in known[domain]),
            domains={domain: DomainEntry(plan, radius) for domain, plan in plans.items()},
            fallback=fallback,
            cost=typical_profile(fallback.num_layers),
        )

    def routes(self, atlas: Atlas, prompts: list[list[int]]) -> dict[str, int]:
        """How many prompts go to each domain."""
        router = Router.of(atlas)
        names = [router.predict(torch.from_numpy(vector)).plan_name for vector in self.of(prompts)]
        return {name: names.count(name) for name in sorted(set(names))}
