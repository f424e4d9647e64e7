"""Groups the requests of a batch for drafting, where they have different plans.

Requests of one plan share their draft passes. Requests of different plans can share passes in which only those
sublayers are cheapened that both plans cheapen. That is safe, since drafts never change the output. Such a pass reads
more weights than either plan alone, but two separate passes read what they have in common twice. The predicted costs
decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from knn_ssd.plan import Mode, Plan
from knn_ssd.speculation.cost_model import CostModel


@dataclass(frozen=True, slots=True)
class DraftGroup:
    """Requests that draft together.

    Args:
        plan: the modes of their draft passes.
        rows: the requests' rows in the batch.
        length: length of the longest draft among them.
    """

    plan: Plan
    rows: tuple[int, ...]
    length: int

    def seconds(self, cost_model: CostModel) -> float:
        """Predicted seconds of all their draft passes, if each request drafts to its limit."""
        return self.length * cost_model.draft_pass_sec(self.plan, len(self.rows))


def common_plan(first: Plan, second: Plan) -> Plan:
    """The plan that cheapens each sublayer only as far as both plans do, with the first one's policy."""
    return replace(
        first,
        attention=tuple(map(_less_cheapened, first.attention, second.attention)),
        mlp=tuple(map(_less_cheapened, first.mlp, second.mlp)),
        head=_less_cheapened(first.head, second.head),
    )


def group_drafts(wanted: Sequence[tuple[int, Plan, int]], cost_model: CostModel) -> list[DraftGroup]:
    """Puts each request into one group, and merges groups as long as that saves time.

    Args:
        wanted: for each request its row in the batch, its plan, and its longest draft. Requests with 0 are left out.
        cost_model: predicts the seconds of draft passes.
    """
    by_modes: dict[object, DraftGroup] = {}
    for row, plan, length in wanted:
        if length:
            key = (plan.modes, plan.head)
            known = by_modes.get(key, DraftGroup(plan, (), 0))
            by_modes[key] = DraftGroup(known.plan, (*known.rows, row), max(known.length, length))
    groups = list(by_modes.values())
    while (pair := _best_merge(groups, cost_model)) is not None:
        first, second = pair
        merged = _merged(groups[first], groups[second])
        groups = [each for index, each in enumerate(groups) if index not in pair] + [merged]
    return groups


def _best_merge(groups: Sequence[DraftGroup], cost_model: CostModel) -> tuple[int, int] | None:
    """The two groups whose merging saves the most time; None where none does."""
    best, most = None, 0.0
    seconds = [each.seconds(cost_model) for each in groups]
    for first in range(len(groups)):
        for second in range(first + 1, len(groups)):
            saved = seconds[first] + seconds[second] - _merged(groups[first], groups[second]).seconds(cost_model)
            if saved > most:
                best, most = (first, second), saved
    return best


def _merged(first: DraftGroup, second: DraftGroup) -> DraftGroup:
    plan = common_plan(first.plan, second.plan)
    return DraftGroup(plan, tuple(sorted(first.rows + second.rows)), max(first.length, second.length))


def _less_cheapened(first: Mode, second: Mode) -> Mode:
    if first is second:
        return first
    return Mode.LOW if Mode.KEEP not in (first, second) else Mode.KEEP
