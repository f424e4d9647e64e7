"""What forward passes cost, in seconds: a measured profile, corrected online by every pass that runs.

The profile gives the shape (what a block of n rows costs, what a plan saves); observed times correct it. This module
knows plans and seconds. It knows nothing of drafts, acceptance or models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from knn_ssd.errors import UsageError
from knn_ssd.plan import Mode, Plan

_LEVEL_RATE, _KEY_RATE = 0.1, 0.02  # share of an error that corrects all costs, and those of one kind of pass
_STALE_PASSES = 12  # a kind of pass unseen for so many passes is corrected as fast as a new one
_EMA_UP, _EMA_DOWN = 0.02, 0.15  # how fast the number of drafting requests is believed to rise, and to fall
_FIRST_PLAIN, _PLAIN_EVERY = 8, 64  # passes without a plain step before one is asked for; doubles up to the second
_MAX_ROWS = 32  # longer blocks are corrected as blocks of this many rows
_NEIGHBOUR_SHARE = 0.95  # share of a correction that a block one row longer or shorter takes over
_LEAST_SEC, _MOST_SEC = 1e-9, 1e6  # of a forward pass in a profile; beyond them, ratios of costs overflow
_MAX_ERROR = 2.0  # one observation counts as off by no more than this factor, except the first


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Seconds of forward passes on the machine they were measured on.

    Args:
        step_sec: one token through the full model.
        attention_sec: seconds saved by skipping one attention sublayer.
        mlp_sec: seconds saved by skipping one MLP sublayer.
        verify_sec: a forward pass over 1, 2, 3, … tokens.
        low_attention_sec, low_mlp_sec, low_head_sec: seconds saved by running one of them on 4-bit weights; 0 where
            the backend has none.

    Raises:
        UsageError: no verification was measured, or a value is out of its range.
    """

    step_sec: float
    attention_sec: float
    mlp_sec: float
    verify_sec: tuple[float, ...]
    low_attention_sec: float = 0.0
    low_mlp_sec: float = 0.0
    low_head_sec: float = 0.0

    def __post_init__(self) -> None:
        if not self.verify_sec:
            raise UsageError("a cost profile needs the seconds of at least one verification, got none")
        for seconds in (self.step_sec, *self.verify_sec):
            if not _LEAST_SEC <= seconds <= _MOST_SEC:
                raise UsageError(f"a forward pass takes {_LEAST_SEC:g} to {_MOST_SEC:g} seconds, got {seconds}")
        for saved in (self.attention_sec, self.mlp_sec, self.low_attention_sec, self.low_mlp_sec, self.low_head_sec):
            if not -_MOST_SEC <= saved <= _MOST_SEC:
                raise UsageError(f"a sublayer saves at most {_MOST_SEC:g} seconds, got {saved}")

    def draft_step_sec(self, plan: Plan) -> float:
        """Seconds to draft one token under a plan."""
        saved = len(plan.skipped_attention) * self.attention_sec + len(plan.skipped_mlp) * self.mlp_sec
        saved += plan.attention.count(Mode.LOW) * self.low_attention_sec + plan.mlp.count(Mode.LOW) * self.low_mlp_sec
        saved += self.low_head_sec if plan.head is Mode.LOW else 0.0
        return max(self.step_sec - saved, 0.0)

    def verification_sec(self, rows: int) -> float:
        """Seconds of a forward pass over `rows` tokens, at least 1; extrapolated in a straight line beyond what was
        measured.
        """
        known = self.verify_sec
        if rows <= len(known):
            return known[rows - 1]
        return known[-1] + (rows - len(known)) * max(known[-1] - known[0], 0.0) / max(len(known) - 1, 1)


@dataclass(slots=True)
class PlainTiming:
    """When a step without drafts has to be timed again: while every step drafts, the cost of plain decoding is unknown.

    Args:
        interval: takes how many plain steps were timed so far, and gives how many steps may run until the next one.

    Attributes:
        timed: plain steps timed so far.
        waited: steps since the last of them.
    """

    interval: Callable[[int], int]
    timed: int = 0
    waited: int = 0

    @property
    def is_due(self) -> bool:
        """Whether the next step should be a plain one."""
        return self.waited >= self.interval(self.timed)

    def count_step(self) -> None:
        """Counts one step of any kind."""
        self.waited += 1

    def record_plain(self) -> None:
        """Counts a plain step that was timed."""
        self.timed, self.waited = self.timed + 1, 0


class CostModel:
    """Expected seconds of forward passes, shared by all requests of an engine.

    With continuous batching the requests of a batch share each pass, and a method gives the part of its cost that is
    attributed to one of them.

    Args:
        profile: the measured shape; its unit does not matter, since the first observation sets the scale.
        learns_from_rounds: whether controllers report the times of their rounds. False where a batcher reports whole
            passes instead, or where nothing may depend on the clock.
    """

    def __init__(self, profile: CostProfile, *, learns_from_rounds: bool = True) -> None:
        self.learns_from_rounds = learns_from_rounds
        self._profile = profile
        self._batch_size = 1
        self._drafting_requests = 1.0  # moving average of how many requests of the batch draft together
        self._level: float | None = None  # observed over profile, for all passes alike
        self._by_rows = [1.0] * (_MAX_ROWS + 1)
        self._by_modes: dict[tuple[Mode, ...], list[float]] = {}  # factors of draft passes, by plan and rows
        self._seen: dict[object, tuple[int, int]] = {}  # per kind of pass: times observed in a row, last pass number
        self._passes = 0
        self._plain_timing = PlainTiming(_plain_interval)

    @property
    def batch_size(self) -> int:
        """How many requests share the next forward pass, at least 1."""
        return self._batch_size

    def observe_batch(self, size: int) -> None:
        """Notes that `size` requests, at least 1, share the next forward pass."""
        self._batch_size = size

    def verification_sec(self, rows: int) -> float:
        """Seconds attributed to one request for a verification pass in which it has `rows` rows."""
        return self._block_sec(rows * self._batch_size) / self._batch_size

    def draft_step_sec(self, plan: Plan, drafting: int | None = None) -> float:
        """Seconds attributed to one request for drafting one token.

        The whole batch waits for a draft pass, so its cost is attributed to the requests that draft.

        Args:
            plan: the modes while drafting.
            drafting: how many requests draft together, at least 1; None is the moving average so far.
        """
        if drafting is None:
            drafting = max(1, min(self._batch_size, round(self._drafting_requests)))
        return self.draft_pass_sec(plan, drafting) / drafting

    def draft_pass_sec(self, plan: Plan, rows: int) -> float:
        """Seconds of a whole pass that drafts one token for each of `rows` requests."""
        extra_rows = self._block_sec(rows) - self._block_sec(1)  # mostly arithmetic, whatever the weights
        predicted = self._profile.draft_step_sec(plan) * (self._level or 1.0) + max(0.0, extra_rows)
        return predicted * self._draft_factors(plan)[min(rows, _MAX_ROWS)]

    def record_verification(self, rows: int, seconds: float) -> None:
        """Corrects the costs by a verification pass of `rows` rows that took `seconds`."""
        factor = self._correction(rows, seconds / max(self._block_sec(rows), 1e-9))
        if rows == 1:
            self._plain_timing.record_plain()
        self._drafting_requests += _EMA_UP * (self._batch_size - self._drafting_requests)
        _correct(self._by_rows, rows, factor)

    def record_draft_steps(self, plan: Plan, count: int, seconds: float, rows: int = 1) -> None:
        """Corrects the costs by `count` draft passes of `rows` rows each that took `seconds` together."""
        self._drafting_requests += _EMA_DOWN * (rows - self._drafting_requests)
        key = (plan.modes, rows)
        factor = self._correction(key, seconds / max(count * self.draft_pass_sec(plan, rows), 1e-9))
        _correct(self._draft_factors(plan), rows, factor)

    @property
    def needs_plain_timing(self) -> bool:
        """Whether no plain step ran for so long that the cost of plain decoding has to be measured again."""
        if self._batch_size > 1:
            return False  # no pass would have a single row
        return self._plain_timing.is_due

    def _draft_factors(self, plan: Plan) -> list[float]:
        """Correction factors of a plan's draft passes, by rows."""
        return self._by_modes.setdefault(plan.modes, [1.0] * (_MAX_ROWS + 1))

    def _block_sec(self, rows: int) -> float:
        known = self._profile.verification_sec(rows) * self._by_rows[min(rows, _MAX_ROWS)]
        return known * (self._level or 1.0)

    def _correction(self, key: object, ratio: float) -> float:
        """The factor by which one kind of pass is corrected; the very first observation only sets the level.

        Most of what slows a machine slows all passes alike, so the level follows first. If the factors of the passes
        that run followed instead, passes that do not run would look cheap, or stay expensive after the slow spell.

        Args:
            key: the kind of pass.
            ratio: observed over expected seconds.
        """
        self._passes += 1
        self._plain_timing.count_step()
        seen, when = self._seen.get(key, (0, self._passes))
        seen = min(seen, 1) + 1 if self._passes - when > _STALE_PASSES else seen + 1
        self._seen[key] = (seen, self._passes)
        if self._level is None:
            self._level = ratio
            return 1.0
        ratio = min(max(ratio, 1 / _MAX_ERROR), _MAX_ERROR)
        self._level *= ratio**_LEVEL_RATE
        return float(ratio ** max(_KEY_RATE, 0.5 / seen))


def _plain_interval(timed: int) -> int:
    return min(_FIRST_PLAIN << min(timed, _PLAIN_EVERY), _PLAIN_EVERY)


def _correct(factors: list[float], rows: int, factor: float) -> None:
    """Applies a correction to blocks of `rows` rows, and most of it to blocks of similar length.

    Otherwise lengths that were never run would keep the profile's cost, and look expensive beside lengths that turned
    out cheap.
    """
    if rows == 1:
        factors[1] *= factor
        return
    for other in range(2, len(factors)):
        factors[other] *= factor ** (_NEIGHBOUR_SHARE ** abs(other - rows))


def typical_profile(num_layers: int) -> CostProfile:
    """Typical costs relative to one plain step, where nothing was measured: two cores, weights read from memory."""
    attention, mlp, head = 0.2 / num_layers, 0.6 / num_layers, 0.2
    return CostProfile(
        step_sec=1.0,
        attention_sec=attention,
        mlp_sec=mlp,
        verify_sec=(1.0, 1.05, 1.1, 1.15, 1.25, 1.4, 1.5, 1.65, 1.9, 2.1, 2.3, 2.5, 2.7),
        low_attention_sec=0.5 * attention,
        low_mlp_sec=0.5 * mlp,
        low_head_sec=0.5 * head,
    )
