"""Opens the requests of one engine: prefilled, routed, with plan, neighbours and drafter. Knows nothing of text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from knn_ssd.backends.base import Backend
from knn_ssd.owner import Owner
from knn_ssd.request import Batcher, EndRule, Request, Unbatched
from knn_ssd.routing.plan_choice import PlanChooser, PlanRequest
from knn_ssd.sampling import Sampler
from knn_ssd.speculation.cost_model import CostModel, CostProfile
from knn_ssd.speculation.drafter_factory import DrafterFactory


class RequestFactory:
    """Opens requests, and keeps what they share.

    Args:
        backend: executes the model.
        plans: chooses their plans.
        profile: what forward passes cost before any ran.
        batcher: runs their forward passes; None runs each request's alone.
    """

    def __init__(
        self, backend: Backend, plans: PlanChooser, profile: CostProfile, batcher: Batcher | None = None
    ) -> None:
        self._backend = backend
        self._plans = plans
        self.profile = profile
        self._batcher: Batcher = batcher or Unbatched(backend, CostModel(profile))
        self._drafters = DrafterFactory(backend, profile, self._batcher.cost_model)

    @property
    def cost_model(self) -> CostModel:
        """What forward passes cost, as far as these requests have seen."""
        return self._batcher.cost_model

    def open(
        self,
        token_ids: Sequence[int],
        limit: int,
        sampler: Sampler,
        ends: EndRule,
        wanted: PlanRequest,
        owner: Owner,
        *,
        store: bool = True,
        **options: Any,
    ) -> Request:
        """A prefilled request with its route, plan, neighbours and drafter.

        Args:
            token_ids: the prompt.
            limit: the longest output.
            sampler: chooses tokens.
            ends: where the output ends.
            wanted: the demands on its plan, which were checked.
            owner: what the request may use of earlier ones.
            store: whether to use the owner's answer store.
            options: further arguments of `Request`.
        """
        options |= {"batcher": self._batcher, "prefix_cache": owner.prefix_cache}
        request = Request(self._backend, token_ids, limit, sampler, ends, **options)
        try:
            started = time.perf_counter()
            chosen = self._plans.choose(request.prefill, wanted)
            request.route, request.plan = chosen.route, chosen.plan
            if store and wanted.adaptive and not wanted.reproducible and not wanted.plain:
                request.answers = owner.answers
                if chosen.plan.policy.lookup:
                    request.neighbours = owner.neighbours(request.prefill, self._backend.vocab_size)
            request.route_sec = time.perf_counter() - started
            if wanted.adaptive and not wanted.reproducible:
                self._backend.prepare_later(chosen.plan)
            else:
                self._batcher.prepare(chosen.plan)
            started = time.perf_counter()
            request.drafter = self._drafters.new_drafter(
                request.session,
                chosen.plan,
                sampler,
                domain=chosen.domain,
                agreement=chosen.agreement,
                neighbours=request.neighbours,
                adaptive=wanted.adaptive,
                reproducible=wanted.reproducible,
            )
            request.route_sec += time.perf_counter() - started
        except BaseException:
            request.close()
            raise
        return request
