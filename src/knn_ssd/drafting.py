"""What the requests of one engine share to draft with: costs, experience by label, and what was said before."""

from __future__ import annotations

from collections.abc import Sequence

from knn_ssd.atlas import CostProfile
from knn_ssd.controller import Controller, Costs, Experience, FixedPolicy, new_experience, typical_profile
from knn_ssd.draft.contract import DraftSource
from knn_ssd.draft.lookup import LookupDraft, Memory
from knn_ssd.draft.self_draft import SelfDraft
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.sampling import Sampler
from knn_ssd.target.contract import Session, Target

_GENERAL_POLICY = Policy(max_draft=12, threshold=0.7, lookup=True)


class Drafting:
    """Makes the source of drafts for each request.

    Args:
        target: the model.
        cost: what passes cost, in any unit; None is what is typical.
        remember: how many tokens of earlier prompts and outputs look-up searches too, for each label.
    """

    def __init__(self, target: Target, cost: CostProfile | None = None, remember: int = 0) -> None:
        self._target = target
        self._capacity = remember
        self._memories: dict[str | None, Memory] = {}
        self._profile = cost or typical_profile(target.num_layers)
        self.costs = Costs(self._profile)
        self._experience: dict[object, Experience] = {}

    def source(
        self,
        session: Session,
        plan: Plan,
        sampler: Sampler,
        *,
        label: str | None = None,
        agreement: float | None = None,
        adaptive: bool = True,
        reproducible: bool = False,
    ) -> DraftSource | None:
        """Who drafts for a request; None is plain decoding.

        Args:
            session: of the request.
            plan: how to draft.
            sampler: of the request.
            label: whose requests share what acceptance was seen.
            agreement: what calibration measured of the plan's drafts.
            adaptive: choose length, source and stop by expected tokens per second, within the policy's bounds; else
                the policy to the letter, which knows nothing of earlier requests either.
            reproducible: adaptive by what costs are on paper and by the request alone, not by the clock, nor by other
                requests.
        """
        if plan.is_plain:
            return None
        memory = self._memory(label) if adaptive and not reproducible else None
        lookup = LookupDraft(memory) if plan.policy.lookup else None
        if not adaptive:
            drafts = plan.cheapens or lookup is None
            return FixedPolicy(plan, SelfDraft(session, plan, sampler) if drafts else None, lookup)
        self_draft = SelfDraft(session, plan, sampler) if plan.cheapens else None
        if reproducible:
            costs = Costs(self._profile)
            costs.by_pass = True  # nobody tells it what passes take
            return Controller(plan, costs, new_experience(plan, agreement), self_draft, lookup)
        key = (label, plan.modes, plan.head, sampler.greedy)
        if key not in self._experience:
            self._experience[key] = new_experience(plan, agreement)
        return Controller(plan, self.costs, self._experience[key], self_draft, lookup)

    def remember(self, label: str | None, token_ids: Sequence[int]) -> None:
        """A prompt with its output, for later look-ups of the same label."""
        memory = self._memory(label)
        if memory is not None:
            memory.add(token_ids)

    def _memory(self, label: str | None) -> Memory | None:
        if not self._capacity:
            return None
        return self._memories.setdefault(label, Memory(self._capacity))


def general_plan(target: Target) -> Plan:
    """A good plan where nothing was calibrated: everything low-bit where the target can, and look-up."""
    if Mode.LOW in target.modes:
        return Plan.low(target.num_layers, _GENERAL_POLICY)
    return Plan.skipping(target.num_layers, policy=_GENERAL_POLICY)
