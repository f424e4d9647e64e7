"""A simulated clock that only forward passes advance, each by its cost in a cost profile.

With it, whatever calibration decides by time is the same in every run, however busy the machine is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from knn_ssd import request
from knn_ssd.backends.base import Session
from knn_ssd.backends.native.session import NativeSession
from knn_ssd.backends.transformers.session import TransformersSession
from knn_ssd.calibrate import cost, objective
from knn_ssd.plan import Plan
from knn_ssd.speculation import decode
from knn_ssd.speculation.cost_model import CostProfile


@contextmanager
def metered(profile: CostProfile) -> Iterator[None]:
    """Forward passes take as long as the profile says, and nothing else takes time."""
    now = 0.0

    def timed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def timed_forward(session: Session, token_ids: list[int], plan: Plan | None = None) -> torch.Tensor:
            nonlocal now
            now += profile.verification_sec(len(token_ids)) if plan is None else profile.draft_step_sec(plan)
            return forward(session, token_ids, plan)

        return timed_forward

    clock = SimpleNamespace(perf_counter=lambda: now)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (TransformersSession, NativeSession):
            patch.setattr(kind, "forward", timed(kind.forward))
        for module in (cost, objective, decode, request):
            patch.setattr(module, "time", clock)
        yield
