"""Runs the requests of many clients on one engine: a single thread owns the model and batches them continuously.

A request reports to its callback, which is called on that thread: `PromptScored` if it was asked for, `PrefillDone`,
then a `Chunk` for each round, then a `Generation`; or an error in place of any of these. Nothing follows a
`Generation`, an error, or the `PromptScored` of a request that generates nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
from knn_ssd.scoring import prompt_logprobs
from knn_ssd.speculation.decode import TokenLogprobs
from knn_ssd.tokenization import PromptLike

logger = logging.getLogger(__name__)


class BusyError(KnnSsdError):
    """The queue is full."""


class ClosingError(KnnSsdError):
    """The server is being shut down."""


class DeadlineError(KnnSsdError):
    """The request passed its deadline."""


class ModelThreadError(KnnSsdError):
    """The thread that owns the model has failed, and no request can run any more."""


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The log-probabilities of the prompt's tokens after the first."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prompt was prefilled and routed.

    Args:
        route: the route of the prompt; None without an atlas.
        plan: the plan that drafts.
        prompt_tokens: length of the prompt.
        neighbours: the earlier requests whose answers can draft, nearest first.
        queued_sec: seconds from the request's arrival until it ran.
    """

    route: Route | None
    plan: Plan
    prompt_tokens: int
    neighbours: tuple[Neighbour, ...] = ()
    queued_sec: float = 0.0


Event = PromptScored | PrefillDone | Chunk | Generation | Exception


@dataclass(frozen=True, slots=True)
class Limits:
    """How many requests are accepted, and for how long.

    Args:
        running: the largest batch.
        waiting: the queue is full with so many requests beyond it; the several choices of one request are let in
            together.
        deadline_sec: seconds from a request's arrival until it must be done; None is no limit.
    """

    running: int = 8
    waiting: int = 64
    deadline_sec: float | None = 600.0

    def passed(self) -> DeadlineError:
        """The error of a request that took longer."""
        return DeadlineError(f"the request took longer than {self.deadline_sec:g} seconds", "Ask for fewer tokens.")


@dataclass(slots=True, eq=False)
class Job:
    """One choice of a request.

    Args:
        callback: receives every event.
        arrived: when it arrived, on the monotonic clock.
        due: when it must be done, on the same clock.

    Attributes:
        prompt: its prompt, as for `Engine.stream`.
        options: options of `Engine.stream`, where a `max_new_tokens` of 0 generates nothing.
        num_prompt_logprobs: how many of the likeliest tokens to report at each token of the prompt; None does not
            score the prompt.
    """

    callback: Callable[[Event], None]
    arrived: float
    due: float
    prompt: PromptLike = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    num_prompt_logprobs: int | None = None
    cancelled: bool = False
    prefilled: bool = False
    task: RequestTask | None = field(default=None, repr=False)


class Scheduler:
    """Runs requests until it is closed.

    Args:
        engine: its model and atlas are used by all requests. What a request may use of earlier ones is its option
            `owner`.
        limits: how many requests are accepted.

    Attributes:
        failure: the error that ended the model's thread; None while it works.
    """

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        self._batcher = ContinuousBatcher(engine.backend, engine.cost_profile)
        self.engine = engine.with_batcher(self._batcher)
        self.limits = limits or Limits()
        self.failure: BaseException | None = None
        self._reserved: list[Job] = []  # without a prompt yet
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
        """How many requests wait in the queue, or for their prompt's token ids."""
        return len(self._waiting) + len(self._reserved)

    @property
    def alive(self) -> bool:
        """Whether requests are accepted."""
        return self._thread.is_alive() and self.failure is None and not self._closing

    def submit(self, prompt: PromptLike, options: Mapping[str, Any], callback: Callable[[Event], None]) -> Job:
        """Puts a request at the end of the queue.

        Raises:
            BusyError, ClosingError, ModelThreadError: as for `reserve`.
        """
        (job,) = self.reserve([callback])
        self.start(job, prompt, options)
        return job

    def reserve(self, callbacks: Sequence[Callable[[Event], None]]) -> list[Job]:
        """Places in the queue for the choices of a request whose prompt is still to be tokenised; for `start`.

        Args:
            callbacks: one for each choice.

        Raises:
            BusyError: the queue is full.
            ClosingError: no more requests are accepted.
            ModelThreadError: the model's thread has failed.
        """
        now = time.monotonic()
        due = now + (self.limits.deadline_sec or float("inf"))
        jobs = [Job(callback, now, due) for callback in callbacks]
        with self._changed:
            if self.failure is not None:
                raise self._failed()
            if not self.alive:
                raise ClosingError("the server is shutting down")
            if self.waiting >= self.limits.waiting:
                raise BusyError(f"{self.waiting} requests are waiting already", "Try again later.")
            self._reserved += jobs
        return jobs

    def start(
        self, job: Job, prompt: PromptLike, options: Mapping[str, Any], num_prompt_logprobs: int | None = None
    ) -> None:
        """Puts a job that was reserved at the end of the queue, unless it has ended meanwhile; see `Job`."""
        with self._changed:
            if job in self._reserved:
                self._reserved.remove(job)
                job.prompt, job.options, job.num_prompt_logprobs = prompt, options, num_prompt_logprobs
                self._waiting.append(job)
                self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Ends a request before its next forward pass; its callback may still receive the current one's event."""
        with self._changed:
            job.cancelled = True
            if job in self._reserved:
                self._reserved.remove(job)
            elif job in self._waiting:
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
        try:
            self._run_until_closed()
            error: KnnSsdError = ClosingError("the server is shutting down")
        except BaseException as failure:  # whatever it was, no client waits for an answer that cannot come
            logger.critical("The model's thread has failed, and no request can run any more.", exc_info=True)
            with self._changed:
                self.failure = failure
            error = self._failed()
        with self._changed:
            left = (*self._running, *self._waiting, *self._reserved)
            self._running, self._reserved = [], []
            self._waiting.clear()
        for job in left:
            with suppress(BaseException):  # a failed task or callback must not keep the others waiting
                self._end(job, error)

    def _run_until_closed(self) -> None:
        while self._wait():
            while (next_job := self._take_waiting()) is not None:
                if not self._was_ended(next_job):
                    self._begin(next_job)
            for job in self._running:
                self._was_ended(job)
            self._batcher.step()
            self._running = [job for job in self._running if job.task is not None and not job.task.ended]

    def _wait(self) -> bool:
        """Waits for requests, and returns False once the scheduler is closed and has none left."""
        with self._changed:
            while not (self._running or self._waiting or self._closing):
                self._changed.wait()
            while self._closing and self._reserved and not (self._running or self._waiting or self._stopping):
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

    def _was_ended(self, job: Job) -> bool:
        """Ends a request that was cancelled or has passed its deadline, and returns whether it did."""
        if job.task is not None and job.task.ended:
            return False
        is_late = time.monotonic() > job.due
        if job.cancelled or is_late:
            self._end(job, None if job.cancelled else self.limits.passed())
        return job.cancelled or is_late

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
        queued_sec = time.monotonic() - job.arrived
        if job.num_prompt_logprobs is not None:
            job.callback(self._score(job, job.num_prompt_logprobs))
            job.num_prompt_logprobs = None  # once, even if the request has to wait for memory now
            if job.options.get("max_new_tokens") == 0:
                return
        with closing(self.engine.stream(job.prompt, **job.options)) as stream:
            job.prefilled = True
            job.callback(PrefillDone(stream.route, stream.plan, stream.prompt_tokens, stream.neighbours, queued_sec))
            for chunk in stream:
                job.callback(chunk)
                self._batcher.yield_()
            job.callback(stream.result)

    def _score(self, job: Job, num_top: int) -> PromptScored:
        owner = job.options.get("owner") or self.engine.owner
        found = prompt_logprobs(
            self.engine.backend,
            self.engine.encode(job.prompt),
            num_top,
            forward=self._batcher.forward,
            prefix_cache=owner.prefix_cache,
            after_pass=self._batcher.yield_,
        )
        return PromptScored(found)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        if job.task is not None and not job.task.ended:
            self._batcher.end(job.task)
        if error is not None:
            job.callback(error)

    def _failed(self) -> ModelThreadError:
        return ModelThreadError(
            f"the thread that owns the model has failed ({type(self.failure).__name__})", "Restart the server."
        )
