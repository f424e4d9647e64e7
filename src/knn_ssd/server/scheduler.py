"""Runs the requests of many clients on one engine: a single thread owns the model and batches them continuously.

A request reports to its callback, which is called on that thread: `PrefillDone`, then a `Chunk` for each round, then a
`Generation`; or an error in place of any of these. Nothing follows a `Generation` or an error.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from knn_ssd.batching import Cancelled, ContinuousBatcher, RequestTask
from knn_ssd.engine import Engine
from knn_ssd.errors import KnnSsdError, MemoryInUseError
from knn_ssd.outputs import Chunk, Generation
from knn_ssd.plan import Plan
from knn_ssd.routing.answers import Neighbour
from knn_ssd.routing.router import Route
from knn_ssd.tokenization import PromptLike


class BusyError(KnnSsdError):
    """The queue is full."""


class ClosingError(KnnSsdError):
    """The server is being shut down."""


class DeadlineError(KnnSsdError):
    """The request passed its deadline."""


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prompt was prefilled and routed.

    Args:
        route: the route of the prompt; None without an atlas.
        plan: the plan that drafts.
        prompt_tokens: length of the prompt.
        neighbours: the earlier requests whose answers can draft, nearest first.
    """

    route: Route | None
    plan: Plan
    prompt_tokens: int
    neighbours: tuple[Neighbour, ...] = ()


Event = PrefillDone | Chunk | Generation | Exception


@dataclass(frozen=True, slots=True)
class Limits:
    """How many requests are accepted, and for how long.

    Args:
        running: the largest batch.
        waiting: the longest queue of requests beyond it.
        deadline_sec: seconds from a request's arrival until it must be done; None is no limit.
    """

    running: int = 8
    waiting: int = 64
    deadline_sec: float | None = 600.0


@dataclass(slots=True, eq=False)
class Job:
    """One request.

    Args:
        prompt: its prompt, as for `Engine.stream`.
        options: options of `Engine.stream`.
        callback: receives every event.
        due: the time when it must be done, on the monotonic clock.
    """

    prompt: PromptLike
    options: Mapping[str, Any]
    callback: Callable[[Event], None]
    due: float
    cancelled: bool = False
    prefilled: bool = False
    task: RequestTask | None = field(default=None, repr=False)


class Scheduler:
    """Runs requests until it is closed.

    Args:
        engine: its model and atlas are used by all requests. What a request may use of earlier ones is its option
            `owner`.
        limits: how many requests are accepted.
    """

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        self._batcher = ContinuousBatcher(engine.backend, engine.cost_profile)
        self.engine = engine.with_batcher(self._batcher)
        self.limits = limits or Limits()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._most_running = self.limits.running  # fewer while those that run take all memory
        self._changed = threading.Condition()
        self._closing = self._stopping = False
        self._thread = threading.Thread(target=self._work, name="knn-ssd-model", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """How many requests are running."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many requests wait in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are accepted."""
        return self._thread.is_alive() and not self._closing

    def submit(self, prompt: PromptLike, options: Mapping[str, Any], callback: Callable[[Event], None]) -> Job:
        """Puts a request at the end of the queue.

        Raises:
            BusyError: the queue is full.
            ClosingError: no more requests are accepted.
        """
        due = time.monotonic() + (self.limits.deadline_sec or float("inf"))
        job = Job(prompt, options, callback, due)
        with self._changed:
            if not self.alive:
                raise ClosingError("the server is shutting down")
            if len(self._waiting) >= self.limits.waiting:
                raise BusyError(f"{len(self._waiting)} requests are waiting already", "Try again later.")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Ends a request before its next round; its callback may still receive the current one."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify()

    def close(self, drain_sec: float = 30.0) -> None:
        """Accepts no more requests, gives the others `drain_sec` to finish, and ends the rest with a `ClosingError`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(drain_sec)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._wait():
            while (next_job := self._take_waiting()) is not None:
                self._begin(next_job)
            for job in self._running:
                self._check(job)
            self._batcher.step()
            self._running = [job for job in self._running if job.task is not None and not job.task.ended]
        for job in (*self._running, *self._waiting):
            self._end(job, ClosingError("the server is shutting down"))
        self._running.clear()
        self._waiting.clear()

    def _wait(self) -> bool:
        """Waits for requests, and returns False once the scheduler is closed and has none left."""
        with self._changed:
            while not (self._running or self._waiting or self._closing):
                self._changed.wait()
            return not self._stopping and bool(self._running or self._waiting)

    def _take_waiting(self) -> Job | None:
        """Moves a waiting request into the batch if there is room, and returns it."""
        with self._changed:
            if len(self._running) < self._most_running:  # then one has ended, if the memory was taken
                self._most_running = self.limits.running
            if not self._waiting or len(self._running) >= self._most_running:
                return None
            job = self._waiting.popleft()
            self._running.append(job)
        return job

    def _put_back(self, job: Job) -> bool:
        """Puts a request for which there is no memory now back to the head of the queue, until one that runs has ended;
        False if none runs that could end.
        """
        with self._changed:
            self._running.remove(job)
            if self._running:
                self._most_running = len(self._running)
                self._waiting.appendleft(job)
            return bool(self._running)

    def _check(self, job: Job) -> None:
        """Ends a request that was cancelled or has passed its deadline."""
        if job.cancelled:
            self._end(job)
        elif time.monotonic() > job.due:
            limit = self.limits.deadline_sec
            error = DeadlineError(f"the request took longer than {limit:g} seconds", "Ask for fewer tokens.")
            self._end(job, error)

    def _begin(self, job: Job) -> None:
        def work() -> None:
            with suppress(Cancelled):
                try:
                    self._run(job)
                except MemoryInUseError as error:
                    if job.prefilled or not self._put_back(job):
                        job.callback(error)
                except Exception as error:  # ends only this request
                    job.callback(error)

        job.task = self._batcher.start(work)

    def _run(self, job: Job) -> None:
        with closing(self.engine.stream(job.prompt, **job.options)) as stream:
            job.prefilled = True
            job.callback(PrefillDone(stream.route, stream.plan, stream.prompt_tokens, stream.neighbours))
            for chunk in stream:
                job.callback(chunk)
                self._batcher.yield_()
            job.callback(stream.result)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        if job.task is not None and not job.task.ended:
            self._batcher.end(job.task)
        if error is not None:
            job.callback(error)
