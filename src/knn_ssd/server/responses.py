"""What is told of drafts to clients that ask for it: the `knn_ssd` objects of responses."""

from __future__ import annotations

from typing import Any

from knn_ssd.outputs import Chunk
from knn_ssd.server.scheduler import PrefillDone


def opening(begun: PrefillDone) -> dict[str, Any]:
    """What is known before the first token; without an atlas there is no route."""
    route = begun.route
    return {
        "route": None if route is None else route.domain,
        "fallback": route is not None and route.fallback,
        "anchor": None if route is None else route.anchor,
        "distance": None if route is None else route.distance,
        "plan": begun.plan.describe(),
        "prompt_tokens": begun.prompt_tokens,
    }


def round_told(chunk: Chunk) -> dict[str, Any]:
    """One round: its tokens with where they came from, and what it took."""
    current = chunk.round
    tokens = zip(chunk.pieces, current.origins, strict=True)
    return {
        "tokens": [{"text": text, "source": source} for text, source in tokens],
        "drafted": current.drafted,
        "accepted": current.accepted,
        "sec": current.draft_sec + current.verify_sec,
    }
