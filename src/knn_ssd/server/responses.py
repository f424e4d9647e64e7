"""The `knn_ssd` objects of responses, which report route and rounds to clients that ask for them."""

from __future__ import annotations

from typing import Any

from knn_ssd.outputs import Chunk
from knn_ssd.server.scheduler import PrefillDone


def prefill_fields(prefill: PrefillDone) -> dict[str, Any]:
    """The fields that are known after the prefill: the route, which is None without an atlas, and the plan."""
    route = prefill.route
    return {
        "route": None if route is None else route.domain,
        "fallback": route is not None and route.fallback,
        "anchor": None if route is None else route.anchor,
        "distance": None if route is None else route.distance,
        "plan": prefill.plan.describe(),
        "prompt_tokens": prefill.prompt_tokens,
    }


def round_fields(chunk: Chunk) -> dict[str, Any]:
    """The fields of one round: its tokens with their origin, how many were drafted and accepted, and its seconds."""
    current = chunk.round
    tokens = zip(chunk.pieces, current.origins, strict=True)
    return {
        "tokens": [{"text": text, "source": source} for text, source in tokens],
        "drafted": current.drafted,
        "accepted": current.accepted,
        "sec": current.draft_sec + current.verify_sec,
    }
