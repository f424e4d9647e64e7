"""Measures what forward passes cost on this machine.

All passes run in turn, and each is set against the full step of the same turn, so that other load on the machine slows
both. Medians count; the warm-up does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from knn_ssd.backends.base import Backend, Session
from knn_ssd.plan import Mode, Plan
from knn_ssd.speculation.cost_model import CostProfile

_CONTEXT = 64  # tokens in the cache while measuring
_MEASURED_ROWS = (1, 2, 3, 5, 8, 9, 13, 17)  # around multiples of 8, the block size of kernels
_FULL_STEP = "full step"
_MIN_TOTAL_SEC, _MAX_TURNS = 2.0, 50  # a model whose passes take a few milliseconds is measured more often


def measure_cost(backend: Backend, low: bool = False, min_turns: int = 7) -> CostProfile:
    """Measures the cost profile of a target model: one-row passes under a few plans, and verifications of 1 to 17 rows.

    Args:
        backend: executes the target model.
        low: whether to measure what 4-bit weights save, too.
        min_turns: how often each pass is timed at least.
    """
    layers = range(backend.num_layers)
    kept, lowered = (Mode.KEEP,) * backend.num_layers, (Mode.LOW,) * backend.num_layers
    plans = {
        _FULL_STEP: Plan.skipping(backend.num_layers),
        "attention": Plan.skipping(backend.num_layers, attention=layers),
        "mlp": Plan.skipping(backend.num_layers, mlp=layers),
    }
    if low:
        plans |= {
            "low attention": Plan(lowered, kept),
            "low mlp": Plan(kept, lowered),
            "low head": Plan(kept, kept, Mode.LOW),
        }
        for plan in plans.values():
            backend.prepare(plan)
    context = min(_CONTEXT, backend.context_length - max(_MEASURED_ROWS))
    session = backend.open(context + max(_MEASURED_ROWS))
    try:
        session.prefill([3 % backend.vocab_size] * context)
        passes: dict[str | int, Callable[[], object]] = {
            name: _step(session, [3 % backend.vocab_size], plan) for name, plan in plans.items()
        }
        passes |= {rows: _step(session, [3 % backend.vocab_size] * rows, None) for rows in _MEASURED_ROWS}
        seconds = _interleaved(passes, min_turns)
    finally:
        session.close()
    step = seconds[_FULL_STEP]

    def saved(name: str) -> float:
        return max(0.0, step - seconds[name]) if name in seconds else 0.0

    return CostProfile(
        step_sec=step,
        attention_sec=saved("attention") / backend.num_layers,
        mlp_sec=saved("mlp") / backend.num_layers,
        verify_sec=_interpolated(seconds),
        low_attention_sec=saved("low attention") / backend.num_layers,
        low_mlp_sec=saved("low mlp") / backend.num_layers,
        low_head_sec=saved("low head"),
    )


def _step(session: Session, tokens: list[int], plan: Plan | None) -> Callable[[], object]:
    return lambda: session.forward(tokens, plan)


def _interleaved(passes: dict[str | int, Callable[[], object]], min_turns: int) -> dict[str | int, float]:
    turns: list[dict[str | int, float]] = []
    for run in passes.values():  # the warm-up
        run()
    while len(turns) < min_turns or (
        len(turns) < _MAX_TURNS and sum(sum(turn.values()) for turn in turns) < _MIN_TOTAL_SEC
    ):
        turns.append({name: _seconds(run) for name, run in passes.items()})
    step = statistics.median(turn[_FULL_STEP] for turn in turns)
    return {name: step * statistics.median(turn[name] / turn[_FULL_STEP] for turn in turns) for name in passes}


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _interpolated(seconds: dict[str | int, float]) -> tuple[float, ...]:
    """Seconds by number of rows, interpolated linearly; never decreasing, since a decrease would only be noise."""
    values = np.maximum.accumulate([seconds[rows] for rows in _MEASURED_ROWS])
    return tuple(np.interp(range(1, _MEASURED_ROWS[-1] + 1), _MEASURED_ROWS, values).tolist())
