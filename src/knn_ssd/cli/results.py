"""Formats finished answers: lines for people, JSON objects for programs. Knows nothing of how answers are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knn_ssd.outputs import Generation, Stats
    from knn_ssd.routing.answers import DraftCount, Neighbour
    from knn_ssd.routing.router import Route
    from knn_ssd.tools.memory import MemoryUse

_NUMBERS = (
    "drafted", "accepted", "rounds", "tokens", "acceptance_rate", "tokens_per_round", "tokens_per_sec", "prefill_sec",
    "route_sec", "decode_sec",
)  # fmt: skip


def summary(generation: Generation, domain: str | None = None) -> str:
    """One line: the route, the plan and the statistics of an answer.

    Args:
        generation: the answer.
        domain: the domain whose plan was requested, whatever the route; None if none was.
    """
    stats = generation.stats
    parts = [
        _route(generation.route, domain),
        generation.plan.describe(),
        _drafts(stats.by_drafter),
        _neighbours(generation.neighbours),
        f"{_count(stats.tokens, 'token')} at {stats.tokens_per_sec:.1f}/s",
        f"{stats.exactness.value} exactness",
        f"ended by {generation.finish_reason.value}",
    ]
    return "[" + " | ".join(part for part in parts if part) + "]"


def total(answers: Sequence[Stats], seconds: float | None = None) -> str:
    """One line: the statistics of several answers in total.

    Args:
        answers: their statistics.
        seconds: how long all of them took together; None where they came one after the other.
    """
    tokens = sum(stats.tokens for stats in answers)
    seconds = seconds or sum(stats.prefill_sec + stats.route_sec + stats.decode_sec for stats in answers)
    names = dict.fromkeys(name for stats in answers for name in stats.by_drafter)
    counts = {name: [stats.by_drafter[name] for stats in answers if name in stats.by_drafter] for name in names}
    drafts = {name: (sum(c.drafted for c in each), sum(c.accepted for c in each)) for name, each in counts.items()}
    speed = f"{_count(tokens, 'token')} at {tokens / seconds:.1f}/s"
    return f"[{_count(len(answers), 'answer')} | {_drafts(drafts)} | {speed}]"


def memory(use: MemoryUse) -> str:
    """One line: the memory of the weights, their 4-bit copies and the process."""
    parts = {"weights": use.weights, "4-bit copies": use.low_bit, "in all": use.resident, "at most": use.peak}
    known = (f"{name} {size / 1e6:.0f} MB" for name, size in parts.items() if size is not None)
    return f"[memory: {', '.join(known)}]"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def generation_json(name: str, generation: Generation) -> dict[str, Any]:
    """The object that `generate --json` prints for one prompt."""
    route = generation.route
    return {
        "id": name,
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "route": route and {"domain": route.domain, "distance": route.distance, "fallback": route.fallback},
        "plan": generation.plan.to_json(),
        "neighbours": [{"id": near.answer.id, "distance": near.distance} for near in generation.neighbours],
        "stats": _stats_json(generation.stats),
        "finish_reason": generation.finish_reason.value,
    }


def _stats_json(stats: Stats) -> dict[str, Any]:
    return {
        **{name: getattr(stats, name) for name in _NUMBERS},
        "by_drafter": {name: count._asdict() for name, count in stats.by_drafter.items()},
        "exactness": stats.exactness.value,
        "low_bit_bytes": stats.memory.low_bit,
        "resident_memory_bytes": stats.memory.resident,
        "peak_memory_bytes": stats.memory.peak,
    }


def _route(route: Route | None, domain: str | None) -> str:
    if route is None:
        return ""
    nearest = f"{route.domain} at distance {max(0.0, route.distance):.3f}"  # rounding can make it slightly negative
    if domain is not None:
        return f"{domain} as requested; nearest {nearest}"
    return f"fallback plan: beyond the radius of the nearest, {nearest}" if route.fallback else f"near {nearest}"


def _drafts(by_drafter: Mapping[str, DraftCount | tuple[int, int]]) -> str:
    """How many tokens were drafted and accepted, in total and by each drafter."""
    drafted, accepted = (sum(count[i] for count in by_drafter.values()) for i in (0, 1))
    if not drafted:
        return "nothing drafted"
    shares = (f"{name} {count[1]} of {count[0]}" for name, count in by_drafter.items())
    return f"drafted {drafted}, accepted {accepted} ({accepted / drafted:.0%}): {', '.join(shares)}"


def _neighbours(neighbours: Sequence[Neighbour]) -> str:
    """The numbers of the nearest earlier requests, with their distances."""
    near = ", ".join(f"{each.answer.id} at distance {each.distance:.3f}" for each in neighbours)
    return f"near requests {near}" if near else ""
