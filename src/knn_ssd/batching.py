"""Continuous batching: several requests share the forward passes of one model, on one thread.

The server runs its requests so, and so does `Engine.generate_batch`. Each request's work runs in a greenlet of its own,
as if it were alone. Where it asks for a forward pass, it waits until all other requests ask for one, too. Draft passes
run first, so that the verifications of all drafting requests share one pass; each such pass also runs a chunk of one
waiting prompt (chunked prefill).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import TypeVar

from greenlet import getcurrent, greenlet

from knn_ssd.backends.base import Backend, ForwardOutput, ForwardRequest, SharesPasses
from knn_ssd.plan import Plan
from knn_ssd.speculation.cost_model import CostModel, CostProfile

T = TypeVar("T")
_WAIT_SEC = 0.005  # between two looks at what is being made


class Cancelled(BaseException):
    """Raised inside a request's work to end it."""


class RequestTask:
    """One request's work.

    Attributes:
        busy_sec: seconds for which it kept the machine busy, including its share of the batch's forward passes.
        waits_for: the forward pass that it waits for.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.busy_sec = 0.0
        self.waits_for: ForwardRequest | None = None
        self._work = greenlet(work)

    @property
    def ended(self) -> bool:
        return bool(self._work.dead)

    def resume(self, output: ForwardOutput | BaseException | None) -> None:
        """Runs the work until it asks for another forward pass, yields or ends.

        Args:
            output: the output of the forward pass it waited for, or an error to raise instead.
        """
        self.waits_for = None
        if isinstance(output, BaseException):
            self._work.throw(output)
        elif output is None:
            self._work.switch()
        else:
            self._work.switch(output)


class ContinuousBatcher:
    """Runs the work of several requests; see `request.Batcher`. Used by one thread.

    Args:
        backend: executes the model. If sessions cannot share its forward passes, each pass runs alone and at once.
        profile: the expected costs of forward passes before any ran.

    Attributes:
        cost_model: the expected costs, corrected by the forward passes that run here.
    """

    def __init__(self, backend: Backend, profile: CostProfile) -> None:
        self._backend = backend
        self._sharing = backend if isinstance(backend, SharesPasses) else None
        self.cost_model = CostModel(profile, learns_from_rounds=self._sharing is None)
        self._tasks: list[RequestTask] = []
        self._current: RequestTask | None = None
        self._resumed_at = 0.0
        self._scheduler = getcurrent()

    def forward(self, request: ForwardRequest) -> ForwardOutput:
        """Runs a forward pass in the batch; called inside a task, which waits for it."""
        if self._sharing is None:
            return self._backend.forward(request)
        assert self._current is not None, "a forward pass outside of a task would wait for ever"
        self._current.waits_for = request
        output: ForwardOutput = self._scheduler.switch()
        return output

    def prepare(self, plan: Plan) -> None:
        """Lets the other tasks run until the 4-bit copies that a plan uses are there; called inside a task."""
        while not self._backend.prepare_later(plan) and self._backend.is_preparing:
            if not any(task.waits_for for task in self._tasks):
                time.sleep(_WAIT_SEC)
            self._scheduler.switch()
        self._backend.prepare(plan)

    def clock(self) -> float:
        """Seconds for which the current task has kept the machine busy."""
        assert self._current is not None
        return self._current.busy_sec + time.perf_counter() - self._resumed_at

    def start(self, work: Callable[[], None]) -> RequestTask:
        """Starts a task and runs it until it asks for its first forward pass; `work` must raise no errors."""
        task = RequestTask(work)
        self._tasks.append(task)
        self._resume(task)
        return task

    def run_all(self, works: Iterable[Callable[[], T]], concurrency: int) -> Iterator[tuple[int, T]]:
        """Runs works and yields the index and result of each as it ends.

        Args:
            works: each runs the forward passes of one request.
            concurrency: how many run at the same time; one where passes are not shared.

        Raises:
            Exception: the error of a work. The others end where they stand, as they do when the iterator is closed.
        """
        ended: list[tuple[int, T]] = []
        errors: list[Exception] = []

        def start(index: int, work: Callable[[], T]) -> RequestTask:
            def run() -> None:
                with suppress(Cancelled):
                    try:
                        ended.append((index, work()))
                    except Exception as error:
                        errors.append(error)

            return self.start(run)

        waiting = enumerate(works)
        room = concurrency if self._sharing is not None else 1
        try:
            while True:
                for index, work in islice(waiting, room - len(self._tasks)):
                    start(index, work)
                self.step()
                if errors:
                    raise errors[0]
                if not (ended or self._tasks):
                    return
                yield from ended
                ended.clear()
        finally:
            for task in list(self._tasks):
                self.end(task)

    def yield_(self) -> None:
        """Lets the other tasks run if passes are not shared, which keeps them fair; called inside a task."""
        if self._sharing is None:
            self._scheduler.switch()

    def end(self, task: RequestTask) -> None:
        """Ends a task where it stands, even while it waits for a forward pass."""
        self._resume(task, Cancelled())

    def step(self) -> None:
        """Runs one forward pass for the tasks that wait for one, and resumes them."""
        for task in [task for task in self._tasks if task.waits_for is None]:
            self._resume(task)
        waiting = [(task, task.waits_for) for task in self._tasks if task.waits_for is not None]
        if not waiting:
            return
        assert self._sharing is not None, "passes are run at once where they are not shared"
        self.cost_model.observe_batch(max(1, sum(not request.is_prefill for _, request in waiting)))
        chosen = _choose(waiting)
        requests = [request for _, request in chosen]
        rows = sum(len(request.token_ids) for request in requests)
        started = time.perf_counter()
        outputs: Sequence[ForwardOutput | Exception]
        try:
            outputs = self._sharing.forward_batch(requests)
        except Exception as error:  # ends only the requests at fault
            outputs = [error] if len(requests) == 1 else [self._run_alone(request) for request in requests]
        else:
            self._record_cost(requests, rows, time.perf_counter() - started)
        seconds = time.perf_counter() - started
        for (task, request), output in zip(chosen, outputs, strict=True):
            task.busy_sec += seconds * len(request.token_ids) / rows
            self._resume(task, output)

    def _run_alone(self, request: ForwardRequest) -> ForwardOutput | Exception:
        """The output of a request whose batch failed, or its own error: it writes the same cache rows once more."""
        try:
            return self._backend.forward(request)
        except Exception as error:
            return error

    def _record_cost(self, requests: Sequence[ForwardRequest], rows: int, seconds: float) -> None:
        """Corrects the cost model by a pass of one kind; a mixed pass says nothing of either kind's cost."""
        plans = {request.plan for request in requests}
        plan = plans.pop()
        if plans or any(request.is_prefill or request.run_length for request in requests):
            return
        if plan is None:
            self.cost_model.record_verification(rows, seconds)
        else:
            self.cost_model.record_draft_steps(plan, 1, seconds, len(requests))

    def _resume(self, task: RequestTask, output: ForwardOutput | BaseException | None = None) -> None:
        self._scheduler = getcurrent()
        self._current, self._resumed_at = task, time.perf_counter()
        try:
            task.resume(output)
        finally:
            task.busy_sec += time.perf_counter() - self._resumed_at
            self._current = None
        if task.ended:
            self._tasks.remove(task)


def _choose(waiting: list[tuple[RequestTask, ForwardRequest]]) -> list[tuple[RequestTask, ForwardRequest]]:
    """The requests of the next batch: all draft passes; or all verifications, and a chunk of the earliest prompt."""
    drafts = [each for each in waiting if each[1].plan is not None]
    prefills = [each for each in waiting if each[1].is_prefill]
    return drafts or [each for each in waiting if not each[1].is_prefill] + prefills[:1]
