"""Routing with the embedded model: held-out prompts are routed to their own domain, at negligible cost."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from knn_ssd.backends.base import Pooling
from knn_ssd.calibrate.anchors import fit_anchors
from knn_ssd.calibrate.continuations import observe
from knn_ssd.engine import Engine
from knn_ssd.prompts import BUILTIN_DOMAINS, Prompt, builtin_prompts, read_prompts
from knn_ssd.routing.router import Router
from knn_ssd.tokenization import encode

SHARED = Path(__file__).parents[2] / "shared" / "data"
FITTED, HELD_OUT = 16, 14  # prompts per domain, the shortest ones: they say the least of their domain

pytestmark = pytest.mark.real


def shared_prompts() -> Mapping[str, list[Prompt]]:
    if not SHARED.is_dir():
        pytest.skip(f"the real prompts are not at {SHARED}")
    return {path.stem: read_prompts(path) for path in sorted(SHARED.glob("*.jsonl"))}


def built_in_prompts() -> Mapping[str, list[Prompt]]:
    return {name: builtin_prompts([name]) for name in BUILTIN_DOMAINS}


@pytest.mark.parametrize("prompts_of", [shared_prompts, built_in_prompts])
def test_held_out_prompts_are_routed_to_their_own_domain(
    embedded_engine: Engine, prompts_of: Callable[[], Mapping[str, list[Prompt]]]
) -> None:
    vectors, domains, held, held_domains = [], [], [], []
    for domain, prompts in prompts_of().items():
        shortest = sorted(prompts, key=lambda prompt: len(prompt.prompt))[: FITTED + HELD_OUT]
        random.Random(0).shuffle(shortest)
        for index, prompt in enumerate(shortest):
            ids = encode(embedded_engine.tokenizer, prompt.prompt, embedded_engine.backend.context_length)
            vector = observe(embedded_engine.backend, domain, prompt.id, ids, 0, Pooling.MEAN, frozenset()).vector
            (vectors if index < FITTED else held).append(vector)
            (domains if index < FITTED else held_domains).append(domain)
    anchors = fit_anchors(np.array(vectors, dtype=np.float32), domains, 10, seed=0)
    router = Router().fit(torch.from_numpy(anchors.points), anchors.domains, anchors.radii)
    routes = [router.predict(torch.tensor(vector)) for vector in held]
    hits = [route.domain == domain for route, domain in zip(routes, held_domains, strict=True)]
    assert len(hits) == len(set(domains)) * HELD_OUT
    wrong = [(route, domain) for route, domain in zip(routes, held_domains, strict=True) if route.domain != domain]
    assert sum(hits) / len(hits) >= 0.97, wrong
    assert sum(route.fallback for route in routes) / len(routes) <= 0.1
    print(f"routed {sum(hits)} of {len(hits)}, fallback {sum(route.fallback for route in routes)}")


def test_routing_costs_less_than_a_hundredth_of_a_short_request(embedded_engine: Engine) -> None:
    router = Router().fit(torch.randn(50, embedded_engine.backend.hidden_size), [str(i % 5) for i in range(50)])
    vector = torch.randn(embedded_engine.backend.hidden_size)
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        router.predict(vector)
        seconds.append(time.perf_counter() - started)
    stats = embedded_engine.generate("Say yes.", max_new_tokens=8).stats
    assert statistics.median(seconds) < 0.01 * (stats.prefill_sec + stats.decode_sec)
