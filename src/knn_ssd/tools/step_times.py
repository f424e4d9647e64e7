"""Measures how long decode steps take on one backend, or on several in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from knn_ssd.backends.base import Backend
from knn_ssd.plan import Plan
from knn_ssd.sampling import most_likely

_PROMPT_LENGTH = 16
_STEPS = 8


def measure_step(backend: Backend, plan: Plan | None = None) -> float:
    """Median seconds of a plain decode step, or of a draft step under a plan."""
    return measure_steps([backend], plan)[0]


def measure_steps(backends: Sequence[Backend], plan: Plan | None = None) -> list[float]:
    """Median seconds of a plain decode step, or of a draft step under a plan, on each of several backends in turn."""
    with ExitStack() as sessions:
        steps = [sessions.enter_context(_stepping(backend, plan)) for backend in backends]
        for step in steps:
            step()
        times = [[_timed(step) for step in steps] for _ in range(_STEPS)]
    return [statistics.median(each) for each in zip(*times, strict=True)]


@contextmanager
def _stepping(backend: Backend, plan: Plan | None) -> Iterator[Callable[[], None]]:
    """Gives a function that runs one decode step of a session."""
    if plan is not None:
        backend.prepare(plan)
    session = backend.open(_PROMPT_LENGTH + _STEPS + 1)
    try:
        (token,) = most_likely(session.prefill([0] * _PROMPT_LENGTH).logits[None])

        def step() -> None:
            nonlocal token
            (token,) = most_likely(session.forward([token], plan))
            session.commit(1)

        yield step
    finally:
        session.close()


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
