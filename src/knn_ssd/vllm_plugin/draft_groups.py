"""Which requests' drafts share passes, where requests of one batch have different plans.

Requests of one plan share them. Those of different plans can share passes of what both cheapen, which is right whatever
the plans, for a draft's quality never touches the output: a pass cheapened less reads more weights, and two passes read
what they have in common twice. The foretold costs decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from knn_ssd.plan import Mode, Plan
from knn_ssd.speculation.cost_model import CostModel


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that draft together.

    Args:
        plan: of their passes.
        rows: which requests, by their place in the batch.
        length: of the longest draft among them.
    """

    plan: Plan
    rows: tuple[int, ...]
    length: int

    def seconds(self, cost_model: CostModel) -> float:
        """What all their passes are foretold to take, if each of them drafts to the end."""
        return self.length * cost_model.draft_pass_sec(self.plan, len(self.rows))


def common(first: Plan, second: Plan) -> Plan:
    """The plan that cheapens a sublayer only as far as both do, under the first one's policy."""
    return replace(
        first,
        attention=tuple(map(_less_cheap, first.attention, second.attention)),
        mlp=tuple(map(_less_cheap, first.mlp, second.mlp)),
        head=_less_cheap(first.head, second.head),
    )


def group(wanted: Sequence[tuple[int, Plan, int]], cost_model: CostModel) -> list[Group]:
    """Groups of requests, each of them in one.

    Args:
        wanted: for each request its place in the batch, its plan, and the longest draft it may have; one that may have
            none is left out.
        costs: what passes take.
    """
    by_modes: dict[object, Group] = {}
    for row, plan, length in wanted:
        if length:
            key = (plan.modes, plan.head)
            known = by_modes.get(key, Group(plan, (), 0))
            by_modes[key] = Group(known.plan, (*known.rows, row), max(known.length, length))
    groups = list(by_modes.values())
    while (pair := _best_pair(groups, cost_model)) is not None:
        first, second = pair
        merged = _merged(groups[first], groups[second])
        groups = [each for index, each in enumerate(groups) if index not in pair] + [merged]
    return groups


def _best_pair(groups: Sequence[Group], cost_model: CostModel) -> tuple[int, int] | None:
    """The two groups that are the most time saved together; None where no two are."""
    best, most = None, 0.0
    seconds = [each.seconds(cost_model) for each in groups]
    for first in range(len(groups)):
        for second in range(first + 1, len(groups)):
            saved = seconds[first] + seconds[second] - _merged(groups[first], groups[second]).seconds(cost_model)
            if saved > most:
                best, most = (first, second), saved
    return best


def _merged(first: Group, second: Group) -> Group:
    plan = common(first.plan, second.plan)
    return Group(plan, tuple(sorted(first.rows + second.rows)), max(first.length, second.length))


def _less_cheap(first: Mode, second: Mode) -> Mode:
    if first is second:
        return first
    return Mode.LOW if Mode.KEEP not in (first, second) else Mode.KEEP
