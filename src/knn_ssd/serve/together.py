"""Several requests on one target, in turn, on one thread; their passes run together where the target can do that.

Each request's work runs in a greenlet of its own, as if it were alone. Where it wants a pass of the model, it is put
aside until all others want one, too. Drafts go first, so that the verifications of all who draft come in one pass;
a part of one prompt goes along with each of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from greenlet import getcurrent, greenlet

from knn_ssd.controller import Costs
from knn_ssd.target.contract import Target
from knn_ssd.target.fused_session import Pass, Passed


@runtime_checkable
class Shares(Protocol):
    """A target that runs passes of several sessions together."""

    gather: Callable[[Pass], Passed] | None

    def run_together(self, passes: list[Pass]) -> list[Passed]: ...


class Left(BaseException):
    """Raised in a request's work where it is to end."""


class Turn:
    """One request's work.

    Attributes:
        busy_sec: for how long it kept the machine busy, its share of common passes included.
        wants: the pass that it waits for.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.busy_sec = 0.0
        self.wants: Pass | None = None
        self._work = greenlet(work)

    @property
    def ended(self) -> bool:
        return bool(self._work.dead)

    def go_on(self, given: Passed | BaseException | None) -> None:
        """Until it wants another pass, rests or ends; with the pass it waited for, or an error in its place."""
        self.wants = None
        if isinstance(given, BaseException):
            self._work.throw(given)
        elif given is None:
            self._work.switch()
        else:
            self._work.switch(given)


class Together:
    """Turns on one target; used by one thread.

    Args:
        target: gives its passes here until `close`.
        costs: are told how many share a pass, and what it took.
    """

    def __init__(self, target: Target, costs: Costs) -> None:
        self._target = target if isinstance(target, Shares) else None
        self._costs = costs
        self._hub = getcurrent()
        self._turns: list[Turn] = []
        self._current: Turn | None = None
        self._since = 0.0  # when the current one was let go on
        if self._target is not None:
            self._target.gather, costs.by_pass = self._gather, True

    def close(self) -> None:
        """Gives the target its passes back."""
        if self._target is not None:
            self._target.gather, self._costs.by_pass, self._costs.company = None, False, 1

    def clock(self) -> float:
        """Seconds for which the current turn kept the machine busy."""
        assert self._current is not None
        return self._current.busy_sec + time.perf_counter() - self._since

    def start(self, work: Callable[[], None]) -> Turn:
        """Begins some work, and goes on with it until it wants its first pass; errors must not leave it."""
        turn = Turn(work)
        self._turns.append(turn)
        self._go_on(turn)
        return turn

    def rest(self) -> None:
        """Within a turn: lets the others go on where passes are not shared, which keeps the turns fair."""
        if self._target is None:
            self._hub.switch()

    def end(self, turn: Turn) -> None:
        """Ends some work where it stands, within a pass that it waits for if need be."""
        self._go_on(turn, Left())

    def step(self) -> None:
        """One pass for those who want one, and everyone goes on."""
        for turn in [turn for turn in self._turns if turn.wants is None]:
            self._go_on(turn)
        wanted = _choose([(turn, turn.wants) for turn in self._turns if turn.wants is not None])
        if not wanted:
            return
        assert self._target is not None, "passes are run at once where they are not shared"
        self._costs.company = max(1, sum(turn.wants is not None and not turn.wants.is_prompt for turn in self._turns))
        rows = sum(len(each.token_ids) for _, each in wanted)
        started = time.perf_counter()
        passes = [each for _, each in wanted]
        results: Sequence[Passed | Exception]
        try:
            results = self._target.run_together(passes)
        except Exception as error:
            results = [error] * len(wanted)
        seconds = time.perf_counter() - started
        if not isinstance(results[0], Exception):
            self._tell(passes, rows, seconds)
        for (turn, each), result in zip(wanted, results, strict=True):
            turn.busy_sec += seconds * len(each.token_ids) / rows
            self._go_on(turn, result)

    def _tell(self, passes: list[Pass], rows: int, seconds: float) -> None:
        plans = {each.plan for each in passes}
        plan = plans.pop()
        if plans or any(each.is_prompt or each.run_length for each in passes):
            return  # several passes in fact, or other work beside
        if plan is None:
            self._costs.saw_verification(rows, seconds)
        else:
            self._costs.saw_steps(plan, 1, seconds, rows)

    def _gather(self, wanted: Pass) -> Passed:
        assert self._current is not None, "passes outside of a turn have nobody to wait for"
        self._current.wants = wanted
        passed: Passed = self._hub.switch()
        return passed

    def _go_on(self, turn: Turn, given: Passed | BaseException | None = None) -> None:
        self._current, self._since = turn, time.perf_counter()
        try:
            turn.go_on(given)
        finally:
            turn.busy_sec += time.perf_counter() - self._since
            self._current = None
        if turn.ended:
            self._turns.remove(turn)


def _choose(wanted: list[tuple[Turn, Pass]]) -> list[tuple[Turn, Pass]]:
    """Whose passes run next: all drafts; or all verifications, and a part of the prompt that came first."""
    drafts = [one for one in wanted if one[1].plan is not None]
    prompts = [one for one in wanted if one[1].is_prompt]
    return drafts or [one for one in wanted if not one[1].is_prompt] + prompts[:1]
