"""Continuous batching: sessions that share forward passes get bit for bit what each gets alone."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from helpers import endless
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import DTYPES, random_plan, tokens, wide_model

from knn_ssd import Engine
from knn_ssd.backends.base import ForwardOutput, ForwardRequest, Session
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.obstacles import NATIVE_FAMILIES
from knn_ssd.kernels import binding
from knn_ssd.outputs import Generation
from knn_ssd.plan import Plan, Policy
from knn_ssd.server.scheduler import Event, Limits, Scheduler
from knn_ssd.speculation.cost_model import CostModel

pytestmark = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_batched_forward_pass_gives_the_same_bits_as_separate_ones(
    family: str, dtype: torch.dtype, seed: int
) -> None:
    chooser = random.Random(seed)
    backend = NativeBackend(wide_model(family, dtype, intermediate_size=608))
    plans = [None, None, random_plan(chooser), Plan.low(4)]
    shapes = [
        (chooser.randint(1, 60), chooser.randint(1, 12), chooser.choice(plans)) for _ in range(chooser.randint(1, 6))
    ]

    def sessions() -> list[Session]:
        opened = [backend.open(80) for _ in shapes]
        for index, (session, (prompt, _, _)) in enumerate(zip(opened, shapes, strict=True)):
            session.prefill(tokens(prompt, seed + index))
        return opened

    def passes(opened: list[Any]) -> list[ForwardRequest]:
        return [
            ForwardRequest(
                tokens(count, seed + 50 + i),
                session.length,
                session.cache,
                plan,
                num_logits=chooser.choice((0, 1, count)) if i == 0 else count,
            )
            for i, (session, (_, count, plan)) in enumerate(zip(opened, shapes, strict=True))
        ]

    state = chooser.getstate()
    alone = [backend.forward_batch([one])[0] for one in passes(sessions())]
    chooser.setstate(state)
    opened = sessions()
    together = backend.forward_batch(passes(opened))
    for output, own in zip(together, alone, strict=True):
        assert torch.equal(output.hidden, own.hidden)
        assert torch.equal(output.logits, own.logits)
    for session, (_, count, plan) in zip(opened, shapes, strict=True):  # and what they wrote is only their own
        fresh = backend.open(80)
        fresh.prefill(tokens(session.length, seed + opened.index(session)))
        if plan is None:
            assert torch.equal(session.forward(tokens(count)), fresh.forward(tokens(count)))


class Counting:
    """Wraps a backend's `forward_batch`: counts forward passes, and may fail."""

    def __init__(self, backend: NativeBackend) -> None:
        self._run = backend.forward_batch
        self.sizes: list[int] = []
        self.fails = False
        backend.forward_batch = self  # type: ignore[method-assign, assignment]

    def __call__(self, passes: list[ForwardRequest]) -> list[ForwardOutput]:
        self.sizes.append(len(passes))
        if self.fails and len(passes) > 1:
            self.fails = False
            raise MemoryError("no room")
        return self._run(passes)


@pytest.fixture
def engine() -> Engine:
    return Engine(endless(wide_model("llama")))


def answers(
    scheduler: Scheduler, requests: list[tuple[list[int], dict[str, Any]]], seconds: float = 60
) -> list[Generation | Exception]:
    """The result of each request, all of them submitted at once."""
    results: dict[int, Generation | Exception] = {}
    done = threading.Semaphore(0)

    def listener(index: int) -> Any:
        def callback(event: Event) -> None:
            if isinstance(event, Generation | Exception):
                results[index] = event
                done.release()

        return callback

    for index, (prompt, options) in enumerate(requests):
        scheduler.submit(prompt, options, listener(index))
    assert all(done.acquire(timeout=seconds) for _ in requests)
    return [results[index] for index in range(len(requests))]


def test_requests_share_forward_passes_and_get_what_they_get_alone(engine: Engine) -> None:
    chooser = random.Random(1)
    plans = [{}, {"plain": True}, {"plan": Plan.low(4, Policy(5, 0.0))}, {"plan": random_plan(chooser)}]
    sampled = {"temperature": 1.0, "seed": 3}
    requests: list[tuple[list[int], dict[str, Any]]] = [
        (tokens(chooser.randint(1, 150), i), {"max_new_tokens": chooser.randint(1, 40), **plans[i % 4], **extra})
        for i, extra in enumerate([{}, {}, sampled, {}, sampled, {}, {}, sampled, {}, {}, {}, {}])
    ]
    alone = [engine.generate(prompt, **options).token_ids for prompt, options in requests]
    counting = Counting(engine.backend)  # type: ignore[arg-type]
    scheduler = Scheduler(engine, Limits(running=8, waiting=20))
    try:
        results = answers(scheduler, requests)
    finally:
        scheduler.close(0)
    assert [result.token_ids for result in results if isinstance(result, Generation)] == alone
    assert max(counting.sizes) >= 6
    assert sum(counting.sizes) > 2 * len(counting.sizes)
    assert engine.generate(requests[0][0], **requests[0][1]).token_ids == alone[0]  # the engine is its owner's again


def test_a_prepared_engine_makes_nothing_more_at_the_first_request() -> None:
    engine = Engine(endless(wide_model("llama")))
    assert engine.backend.low_bit_bytes == 0
    engine.prepare()
    made = engine.backend.low_bit_bytes
    assert made > 0
    engine.generate(tokens(9), max_new_tokens=20)
    assert engine.backend.low_bit_bytes == made


def test_a_shared_forward_pass_that_fails_is_run_again_for_each_request_alone(engine: Engine) -> None:
    requests: list[tuple[list[int], dict[str, Any]]] = [(tokens(9, i), {"max_new_tokens": 30}) for i in range(6)]
    alone = [engine.generate(prompt, **options).token_ids for prompt, options in requests]
    counting = Counting(engine.backend)  # type: ignore[arg-type]
    scheduler = Scheduler(engine, Limits(running=3))
    try:
        counting.fails = True
        results = answers(scheduler, requests)
        assert not counting.fails
        assert [result.token_ids for result in results if isinstance(result, Generation)] == alone
    finally:
        scheduler.close(0)


def test_a_forward_pass_that_fails_ends_only_the_request_at_fault(engine: Engine) -> None:
    fatal = 77  # any pass with this token fails
    requests = [(tokens(9, i), {"max_new_tokens": 30, "plain": True}) for i in range(6)]
    requests[2] = ([*tokens(9), fatal], requests[2][1])
    requests = [([each if each != fatal or i == 2 else 5 for each in ids], o) for i, (ids, o) in enumerate(requests)]
    run, tried = engine.backend.forward_batch, []  # type: ignore[attr-defined]

    def fails(passes: list[ForwardRequest]) -> list[ForwardOutput]:
        tried.append(len(passes))
        if any(fatal in each.token_ids and each.is_prefill for each in passes):
            raise MemoryError("no room")
        result: list[ForwardOutput] = run(passes)
        return result

    scheduler = Scheduler(engine, Limits(running=6))
    try:
        engine.backend.forward_batch = fails  # type: ignore[attr-defined]
        results = answers(scheduler, requests)
        assert [isinstance(result, MemoryError) for result in results] == [i == 2 for i in range(6)]
        assert max(tried) > 1
    finally:
        scheduler.close(0)


def test_a_failed_pass_does_not_correct_the_cost_model(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []

    def fails(passes: list[ForwardRequest]) -> list[ForwardOutput]:
        raise MemoryError("no room")

    request: tuple[list[int], dict[str, Any]] = (tokens(1), {"max_new_tokens": 5, "plain": True})
    forward_batch = engine.backend.forward_batch  # type: ignore[attr-defined]
    scheduler = Scheduler(engine)
    cost_model = scheduler.engine.cost_model
    monkeypatch.setattr(cost_model, "record_verification", lambda rows, seconds: recorded.append(rows))
    try:
        engine.backend.forward_batch = fails  # type: ignore[attr-defined]
        assert isinstance(answers(scheduler, [request])[0], MemoryError)
        assert recorded == []
        engine.backend.forward_batch = forward_batch  # type: ignore[attr-defined]
        assert isinstance(answers(scheduler, [request])[0], Generation)
        assert recorded == [1] * 5
    finally:
        scheduler.close(0)


def test_a_request_can_be_cancelled_during_its_prefill(engine: Engine) -> None:
    counting = Counting(engine.backend)  # type: ignore[arg-type]
    scheduler = Scheduler(engine, Limits(running=2))
    try:
        received: list[Event] = []
        read = threading.Event()
        job = scheduler.submit(tokens(200), {"max_new_tokens": 5}, received.append)
        counting_call = counting.__call__

        def cancelling(passes: list[ForwardRequest]) -> list[ForwardOutput]:
            scheduler.cancel(job)
            read.set()
            return counting_call(passes)

        engine.backend.forward_batch = cancelling  # type: ignore[attr-defined]
        assert read.wait(20)
        assert answers(scheduler, [(tokens(4), {"max_new_tokens": 3})])
        assert received == [] or not isinstance(received[-1], Generation)
    finally:
        scheduler.close(0)


def test_the_cost_of_a_draft_pass_is_attributed_to_the_drafting_requests() -> None:
    from knn_ssd.speculation.cost_model import typical_profile

    plan = Plan.low(4)
    cost_model = CostModel(typical_profile(4))
    alone = cost_model.draft_step_sec(plan)
    cost_model.observe_batch(8)
    for _ in range(200):
        cost_model.record_verification(8, 1.65)
    shared = cost_model.draft_step_sec(plan)
    assert shared < alone / 2  # until observed otherwise, all requests are expected to draft
    for _ in range(30):
        cost_model.record_draft_steps(plan, 1, cost_model.draft_pass_sec(plan, 1), rows=1)
    assert cost_model.draft_step_sec(plan) == pytest.approx(cost_model.draft_pass_sec(plan, 1))
    assert cost_model.draft_step_sec(plan) > 2 * shared
    for _ in range(200):
        cost_model.record_verification(8, 1.65)
    assert cost_model.draft_step_sec(plan) == pytest.approx(
        cost_model.draft_pass_sec(plan, 8) / 8
    )  # they may have changed their minds


def test_in_a_batch_a_request_s_rows_cost_their_share() -> None:
    from knn_ssd.speculation.cost_model import typical_profile

    cost_model = CostModel(typical_profile(4))
    alone = cost_model.verification_sec(4) - cost_model.verification_sec(1), cost_model.verification_sec(1)
    cost_model.observe_batch(4)
    crowded = cost_model.verification_sec(4) - cost_model.verification_sec(1), cost_model.verification_sec(1)
    assert crowded[0] > alone[0]  # a drafted token more
    assert crowded[1] < alone[1] / 2  # and a token without drafts
    cost_model.observe_batch(1)
    assert (cost_model.verification_sec(4) - cost_model.verification_sec(1), cost_model.verification_sec(1)) == alone
