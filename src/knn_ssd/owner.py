"""What is kept between the requests of one owner: a process, or an API key of a server."""

from __future__ import annotations

from dataclasses import dataclass

from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.routing.answers import AnswerStore


@dataclass(frozen=True, slots=True)
class Owner:
    """What the requests of one owner share, and those of others must not see.

    Args:
        answers: earlier requests, whose answers draft for near ones; None keeps none.
        prefix_cache: KV caches of earlier prompts; None keeps none.
    """

    answers: AnswerStore | None = None
    prefix_cache: PrefixCache | None = None
