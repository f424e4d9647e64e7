"""The plan of each request: the one asked for, that of its domain, the fallback plan, or the general plan."""

from __future__ import annotations

from dataclasses import dataclass

from knn_ssd.atlas import Atlas
from knn_ssd.backends.base import Backend, Prefill
from knn_ssd.errors import UsageError
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.routing.router import Route, Router

_GENERAL_POLICY = Policy(max_draft=12, threshold=0.7, lookup=True)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """How a request asks to be drafted for.

    Args:
        plain: decode without drafts.
        domain: use this domain's plan, whatever the route; None follows the route.
        plan: use this plan, whatever the route and the domain.
        adaptive: choose drafter, length and stop by expected tokens per second, within the plan's policy.
        reproducible: do so by the cost profile and by this request alone.
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
        route: None without an atlas.
        plan: how to draft.
        domain: whose statistics it shares; None is the fallback, or no atlas.
        agreement: the acceptance rate that calibration measured for this plan; None where it did not.
    """

    route: Route | None
    plan: Plan
    domain: str | None
    agreement: float | None


class PlanChooser:
    """Chooses the plan of each request.

    Args:
        backend: executes the model.
        atlas: None gives every request the general plan.
        neighbours: how many anchors vote on a route.
    """

    def __init__(self, backend: Backend, atlas: Atlas | None, neighbours: int = 1) -> None:
        self._backend = backend
        self._atlas = atlas
        self._router = Router.of(atlas, neighbours, backend.device) if atlas is not None else None

    @property
    def plans(self) -> list[Plan]:
        """All plans that requests may get without asking for one."""
        atlas = self._atlas
        if atlas is None:
            return [general_plan(self._backend)]
        return [atlas.plan_for(domain) for domain in (*atlas.domains, None)]

    def choose(self, prefill: Prefill, wanted: PlanRequest) -> ChosenPlan:
        """Routes a prompt and chooses its plan.

        Raises:
            UsageError: a domain that the atlas does not know, or one without an atlas.
        """
        route = None
        if self._atlas is not None and self._router is not None:
            route = self._router.predict(prefill.vector(self._atlas.pooling))
        elif wanted.domain is not None:
            raise UsageError(f"a domain needs an atlas that knows it, got '{wanted.domain}' and no atlas")
        domain = wanted.domain or (route.plan_domain if route is not None else None)
        own = self._atlas.plan_for(domain) if self._atlas is not None else None
        evidence = self._atlas.evidence_of(domain) if self._atlas is not None else {}
        if wanted.plain:
            plan = Plan.plain(self._backend.num_layers)
        else:
            plan = wanted.plan or own or general_plan(self._backend)
        return ChosenPlan(route, plan, domain, evidence.get("agreement") if plan == own else None)


def general_plan(backend: Backend) -> Plan:
    """A good plan where nothing was calibrated: everything in 4 bits where the backend can, and lookup."""
    if Mode.LOW in backend.modes:
        return Plan.low(backend.num_layers, _GENERAL_POLICY)
    return Plan.skipping(backend.num_layers, policy=_GENERAL_POLICY)
