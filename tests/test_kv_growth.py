"""KV caches that grow with the output: the same bits as one reserved at once, and little memory and copying."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import endless, transformers_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import ALL_LOW, DTYPES, random_plan, tokens, wide_model

from knn_ssd import Engine
from knn_ssd.backends import cursor as cursors
from knn_ssd.backends.base import Backend, Session
from knn_ssd.backends.cursor import CHUNK_TOKENS, Cursor
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.kv_cache import KVCache
from knn_ssd.backends.native.obstacles import NATIVE_FAMILIES
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.errors import UsageError
from knn_ssd.kernels import binding
from knn_ssd.outputs import Generation
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.server.scheduler import Event, Scheduler

needs_kernels = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
CAPACITY = 220


@contextmanager
def chunks_of(count: int) -> Iterator[None]:
    """Sessions opened in the `with` block reserve memory for so many tokens at a time."""
    cursors.CHUNK_TOKENS = count
    try:
        yield
    finally:
        cursors.CHUNK_TOKENS = CHUNK_TOKENS


def rounds_of(session: Session, seed: int, plan: Plan) -> list[torch.Tensor]:
    """Everything that a request with drafts, rewinds and teacher-forced scoring reads from a session."""
    chooser = random.Random(seed)
    prefill = session.prefill(tokens(chooser.randint(1, 60), seed))
    seen = [prefill.logits, prefill.mean, prefill.last]
    while session.length < CAPACITY - 12:
        start = session.length
        for step in range(chooser.randint(0, 5)):
            seen.append(session.forward(tokens(1, start + step), plan))
            session.commit(1)
        session.rewind(start)
        block = tokens(chooser.randint(1, 12), start)
        seen.append(session.forward(block))
        session.commit(chooser.randint(1, len(block)))
        back = min(session.length, chooser.randint(1, 20))
        with session.rewound(back):
            seen.append(session.teacher_forced_logits(tokens(back, start), plan, 3))
    return seen


def compare(backend: Backend, seed: int, plan: Plan, chunk: int) -> None:
    with chunks_of(CAPACITY):
        whole = backend.open(CAPACITY)
        expected = rounds_of(whole, seed, plan)
    with chunks_of(chunk):
        growing = backend.open(CAPACITY)
        found = rounds_of(growing, seed, plan)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    whole.close()
    growing.close()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), chunk=st.integers(1, 40))
def test_a_grown_cache_gives_the_bits_of_one_reserved_at_once(
    family: str, dtype: torch.dtype, seed: int, chunk: int
) -> None:
    backend = NativeBackend(wide_model(family, dtype))
    compare(backend, seed, random_plan(random.Random(seed)), chunk)
    compare(backend, seed, ALL_LOW, chunk)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # with and without a sliding window
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), chunk=st.integers(1, 40))
def test_so_does_that_of_the_transformers_backend(family: str, seed: int, chunk: int) -> None:
    chooser = random.Random(seed)
    modes = [tuple(chooser.choice((Mode.KEEP, Mode.SKIP)) for _ in range(4)) for _ in range(2)]
    compare(transformers_backend(family), seed, Plan(*modes), chunk)


@needs_kernels
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), chunk=st.integers(1, 40))
def test_prefixes_are_kept_and_reused_by_caches_that_grow(seed: int, chunk: int) -> None:
    """A session leaves a prefix, and another one takes it and goes on beyond what its own cache had room for."""
    backend, text = NativeBackend(wide_model("llama")), tokens(200, seed)
    outputs = []
    for count in (CAPACITY, chunk):
        store = PrefixCache(2**30)
        with chunks_of(count):
            earlier, later = (backend.open(CAPACITY, store) for _ in range(2))
            earlier.prefill(text[:30])
            earlier.forward(text[30:120])
            earlier.commit(90)
            earlier.close()
            prefill = later.prefill(text[:150])
            assert prefill.reused == 120
            outputs.append(
                [prefill.logits, prefill.mean, later.forward(text[150:]), later.forward(text[150:], ALL_LOW)]
            )
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


@needs_kernels
def test_requests_that_share_passes_say_the_same_while_their_caches_grow() -> None:
    engine = Engine(endless(wide_model("llama", max_position_embeddings=512)))
    prompts = [tokens(5 + 9 * index, index) for index in range(5)]
    plans = [None, ALL_LOW, Plan.low(4, Policy(4, 0.0)), Plan.skipping(4, (1,), (2,), policy=Policy(6, 0.0)), None]
    engine.prepare()
    with chunks_of(512):
        expected = [engine.generate(prompt, max_new_tokens=90, plain=True).token_ids for prompt in prompts]
    with chunks_of(8):
        scheduler = Scheduler(engine)
        events: list[list[Event]] = [[] for _ in prompts]
        for prompt, plan, seen in zip(prompts, plans, events, strict=True):
            scheduler.submit(prompt, {"max_new_tokens": 90, "plan": plan}, seen.append)
        scheduler.close(60)
    for seen, output in zip(events, expected, strict=True):
        assert isinstance(seen[-1], Generation), seen
        assert seen[-1].token_ids == output


@given(capacity=st.integers(1, 10**6), prompt=st.integers(1, 5000), blocks=st.lists(st.integers(1, 400), max_size=80))
def test_memory_follows_the_output_and_few_tokens_are_copied(capacity: int, prompt: int, blocks: list[int]) -> None:
    cursor = Cursor(capacity)
    copied = 0
    for index, count in enumerate([prompt, *blocks]):
        before = cursor.reserved
        if cursor.length + count > capacity:
            with pytest.raises(UsageError):
                cursor.make_room(count)
            assert cursor.reserved == before
            return
        cursor.make_room(count, ahead=0 if index else CHUNK_TOKENS // 2)
        copied += before if index and cursor.reserved > before else 0
        cursor.ran(count, None)
        cursor.commit(count)
        assert cursor.length <= cursor.reserved <= capacity
        assert cursor.reserved <= 9 * (cursor.length + CHUNK_TOKENS) // 4
    assert copied <= 3 * cursor.length


@needs_kernels
def test_a_usual_request_is_never_copied_and_a_long_one_reserves_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    grown: list[tuple[int, int]] = []
    grow: Callable[..., None] = KVCache.grow

    def watched(cache: KVCache, capacity: int, kept: int) -> None:
        grown.append((capacity, kept))
        grow(cache, capacity, kept)

    monkeypatch.setattr(KVCache, "grow", watched)
    model = endless(wide_model("llama", max_position_embeddings=100_000))
    engine = Engine(model)
    engine.generate(tokens(200), max_new_tokens=256, plain=True)
    engine.generate(tokens(400), max_new_tokens=256, plain=True)
    assert all(kept == 0 for _, kept in grown)
    session: Any = engine.backend.open(100_000)
    session.prefill(tokens(20))
    assert session.capacity == 100_000
    assert all(part.shape[2] == CHUNK_TOKENS for part in session.cache.tensors)


@needs_kernels
def test_a_cache_that_cannot_grow_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, store = NativeBackend(wide_model("llama")), PrefixCache(2**30)

    def refuse(*_: object) -> torch.Tensor:
        raise MemoryError("no more memory")

    with chunks_of(20):
        session = backend.open(CAPACITY, store)
        session.prefill(tokens(30))
        monkeypatch.setattr("knn_ssd.backends.native.kv_cache.grown", refuse)
        with pytest.raises(MemoryError):
            session.forward(tokens(40))
        with pytest.raises(AssertionError, match="could not grow"):
            session.forward(tokens(1))
        session.close()
    assert store.bytes == 0
