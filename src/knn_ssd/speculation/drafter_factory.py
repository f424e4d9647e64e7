"""Makes the drafter of each request, from what the requests of one engine share: costs and acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from knn_ssd.backends.base import Backend, Session
from knn_ssd.plan import Plan
from knn_ssd.routing.answers import Neighbour
from knn_ssd.sampling import Sampler
from knn_ssd.speculation.acceptance import AcceptanceStats, initial_acceptance
from knn_ssd.speculation.controller import Controller, FixedPolicy
from knn_ssd.speculation.cost_model import CostModel, CostProfile, typical_profile
from knn_ssd.speculation.drafter import Drafter
from knn_ssd.speculation.grammar_draft import GrammarDraft
from knn_ssd.speculation.lookup import LookupDraft
from knn_ssd.speculation.retrieval import RetrievalDraft
from knn_ssd.speculation.self_draft import SelfDraft


class DrafterFactory:
    """Makes drafters, and keeps what they share.

    Args:
        backend: executes the model.
        profile: what forward passes cost, in any unit; None is what is typical.
        cost_model: the same, corrected by the passes that ran; None is a new one.
    """

    def __init__(
        self,
        backend: Backend,
        profile: CostProfile | None = None,
        cost_model: CostModel | None = None,
    ) -> None:
        self._backend = backend
        self.profile = profile or typical_profile(backend.num_layers)
        self.cost_model = cost_model or CostModel(self.profile)
        self._acceptance: dict[object, AcceptanceStats] = {}

    def new_drafter(
        self,
        session: Session,
        plan: Plan,
        sampler: Sampler,
        *,
        domain: str | None = None,
        agreement: float | None = None,
        neighbours: Sequence[Neighbour] = (),
        adaptive: bool = True,
        reproducible: bool = False,
    ) -> Drafter | None:
        """The drafter of a request; None is plain decoding.

        Args:
            session: the request's.
            plan: how to draft.
            sampler: the request's.
            domain: requests of one domain share their acceptance statistics.
            agreement: the acceptance rate that calibration measured for the plan.
            neighbours: earlier requests whose answers an adaptive drafter may copy from, nearest first.
            adaptive: choose drafter, length and stop by expected tokens per second, within the policy's bounds.
                Otherwise follow the policy to the letter, whatever earlier requests came to.
            reproducible: adaptive by the profile and by this request alone, not by the clock or other requests.
        """
        if plan.is_plain:
            return None
        lookup = LookupDraft() if plan.policy.lookup else None
        grammar = GrammarDraft(sampler.grammar) if sampler.grammar is not None else None
        if not adaptive:
            drafts = plan.cheapens or lookup is None
            return FixedPolicy(plan, SelfDraft(session, plan, sampler) if drafts else None, lookup, grammar)
        is_ready = partial(self._backend.prepare_later, plan)
        self_draft = SelfDraft(session, plan, sampler, is_ready) if plan.cheapens else None
        if reproducible:
            on_paper = CostModel(self.profile, learns_from_rounds=False)
            return Controller(plan, on_paper, initial_acceptance(plan, agreement), self_draft, lookup, grammar=grammar)
        key = (domain, plan.modes, plan.head, sampler.greedy)
        if key not in self._acceptance:
            self._acceptance[key] = initial_acceptance(plan, agreement)
        retrieval = RetrievalDraft(neighbours, session.length) if neighbours and plan.policy.lookup else None
        return Controller(plan, self.cost_model, self._acceptance[key], self_draft, lookup, retrieval, grammar)
