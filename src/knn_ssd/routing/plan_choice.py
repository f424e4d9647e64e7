"""Chooses the plan of each request: the requested one, that of its domain, the fallback plan, or the general plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from knn_ssd.atlas import Atlas
from knn_ssd.backends.base import Backend, Prefill
from knn_ssd.errors import UsageError
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.routing.router import Route, Router

_GENERAL_POLICY = Policy(max_draft=12, threshold=0.7, lookup=True)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a request demands of its plan.

    Args:
        plain: whether to decode without drafts.
        domain: the domain whose plan to use, whatever the route; None follows the route.
        plan: the plan to use, whatever the route and the domain; None uses that of the domain.
        adaptive: whether a controller chooses drafter, draft length and threshold by expected tokens per second,
            within the plan's policy.
        reproducible: whether the controller decides by the cost profile and this request alone.
    """

    plain: bool = False
    domain: str | None = None
    plan: Plan | None = None
    adaptive: bool = True
    reproducible: bool = False


@dataclass(frozen=True, slots=True)
class ChosenPlan:
    """The plan of one request.

    Args:
        route: the prompt's route; None without an atlas.
        plan: the plan that drafts.
        domain: the domain whose acceptance statistics the request shares; None with the fallback plan or no atlas.
        agreement: the acceptance rate that calibration measured for this plan; None where it measured none.
    """

    route: Route | None
    plan: Plan
    domain: str | None
    agreement: float | None


class PlanChooser:
    """Chooses the plan of each request.

    Args:
        backend: executes the model.
        atlas: the atlas to choose from; None gives every request the general plan.
        neighbours: the number of anchors that vote on a route.
    """

    def __init__(self, backend: Backend, atlas: Atlas | None, neighbours: int = 1) -> None:
        self._backend = backend
        self._atlas = atlas
        self._router = Router.of(atlas, neighbours, backend.device) if atlas is not None else None

    @property
    def plans(self) -> list[Plan]:
        """All plans that a request may get without naming one."""
        atlas = self._atlas
        if atlas is None:
            return [general_plan(self._backend)]
        return [atlas.plan_for(domain) for domain in (*atlas.domains, None)]

    def check(self, wanted: PlanRequest) -> None:
        """Checks a request before its prompt is run.

        Raises:
            UsageError: it names a domain that the atlas does not have, or there is no atlas, or its plan cannot be run.
        """
        if wanted.domain is not None and self._atlas is None:
            raise UsageError(f"a domain needs an atlas that has it, got '{wanted.domain}' and no atlas")
        if wanted.domain is not None and self._atlas is not None:
            self._atlas.plan_for(wanted.domain)
        if wanted.plan is not None and not wanted.plain:
            self._backend.prepare(wanted.plan)

    def choose(self, prefill: Prefill, wanted: PlanRequest) -> ChosenPlan:
        """Routes a prompt and chooses its plan, for a request that was checked."""
        route = None
        if self._atlas is not None and self._router is not None:
            route = self._router.predict(prefill.vector(self._atlas.pooling))
        domain = wanted.domain or (route.plan_domain if route is not None else None)
        own = self._atlas.plan_for(domain) if self._atlas is not None else None
        evidence = self._atlas.evidence_of(domain) if self._atlas is not None else {}
        if wanted.plain:
            plan = Plan.plain(self._backend.num_layers)
        else:
            plan = wanted.plan or own or general_plan(self._backend)
        return ChosenPlan(route, plan, domain, evidence.get("agreement") if plan == own else None)


def general_plan(backend: Backend, *, low: bool = True, lookup: bool = True) -> Plan:
    """The plan without calibration: 4-bit where the backend supports it, and lookup; plain decoding without both.

    Args:
        backend: executes the model.
        low: whether it may use 4-bit weights.
        lookup: whether it may draft by lookup.
    """
    policy = replace(_GENERAL_POLICY, lookup=lookup)
    if low and Mode.LOW in backend.modes:
        return Plan.low(backend.num_layers, policy)
    return Plan.skipping(backend.num_layers, policy=policy) if lookup else Plan.plain(backend.num_layers)
