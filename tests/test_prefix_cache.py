"""Keys and values of earlier requests: what is reused is the same bits, what is kept is bounded."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile

import pytest
import torch
from helpers import endless
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import DTYPES, tokens, wide_model

from knn_ssd import Engine
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.obstacles import NATIVE_FAMILIES
from knn_ssd.backends.native.prefix_cache import MIN_LENGTH, CachedPrefix, PrefixCache
from knn_ssd.errors import UsageError
from knn_ssd.kernels import binding
from knn_ssd.plan import Plan, Policy

pytestmark = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")


def prefix(token_ids: list[int]) -> CachedPrefix:
    rows = torch.zeros(1, 1, len(token_ids), 1)
    return CachedPrefix(tuple(token_ids), (rows, rows), torch.zeros(len(token_ids), 2))


PER_TOKEN = prefix([0]).bytes


@given(
    some=st.lists(st.lists(st.integers(0, 1), min_size=MIN_LENGTH - 4, max_size=MIN_LENGTH + 12), max_size=12),
    room=st.integers(0, 80),
    asked=st.lists(st.integers(0, 1), max_size=40),
)
def test_the_store_is_bounded_and_finds_the_longest(some: list[list[int]], room: int, asked: list[int]) -> None:
    store = PrefixCache(room * PER_TOKEN)
    kept: list[list[int]] = []  # the least recently added first
    for each in some:
        if store.wants(each, len(each) * PER_TOKEN):
            store.add(prefix(each))
            kept = [old for old in kept if old != each[: len(old)]]
            while sum(map(len, kept)) + len(each) > room:
                kept.pop(0)
            kept.append(each)
        assert store.bytes == sum(map(len, kept)) * PER_TOKEN <= store.max_bytes
    shared = [sum(takewhile(bool, (1 if a == b else 0 for a, b in zip(k, asked, strict=False)))) for k in kept]
    found = store.find(asked)
    longest = max(shared, default=0)
    assert (found[1] if found else 0) == (longest if longest >= MIN_LENGTH else 0)


def test_what_was_used_stays_longest() -> None:
    store = PrefixCache(40 * PER_TOKEN)
    first, second, third = ([start] * 20 for start in (1, 2, 3))
    for each in (first, second):
        assert store.wants(each, 20 * PER_TOKEN)
        store.add(prefix(each))
    assert store.find(first)
    assert store.wants(third, 20 * PER_TOKEN)
    store.add(prefix(third))
    assert store.find(first)
    assert store.find(second) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_prompt_that_begins_as_an_earlier_one_is_the_same_bits(family: str, dtype: torch.dtype, seed: int) -> None:
    chooser = random.Random(seed)
    model = wide_model(family, dtype)
    keeping, forgetful = NativeBackend(model), NativeBackend(model)
    store = PrefixCache(2**30)
    text = tokens(200, seed)
    earlier = keeping.open(200, store)
    prompt = chooser.randint(1, 100)
    earlier.prefill(text[:prompt])
    earlier.forward(text[prompt : prompt + 20])
    earlier.commit(chooser.randint(0, 20))
    earlier.forward(tokens(1, seed + 9), Plan.low(4))  # an abandoned draft
    earlier.commit(1)
    ran = earlier.length - 1
    earlier.close()
    own = text[: chooser.randint(1, 180)]
    one, other = keeping.open(200, store), forgetful.open(200)
    reused, whole = one.prefill(own), other.prefill(own)
    expected = min(ran, len(own) - 1)
    assert reused.reused == (expected if expected >= MIN_LENGTH else 0)
    assert whole.reused == 0
    for name in ("logits", "mean", "last"):
        assert torch.equal(getattr(reused, name), getattr(whole, name))
    for plan in (Plan.low(4), None):
        assert torch.equal(one.forward(tokens(5, seed), plan), other.forward(tokens(5, seed), plan))
    one.close()


def test_a_conversation_is_not_computed_twice_and_says_the_same() -> None:
    model = endless(wide_model("llama"))
    keeping, forgetful = Engine(model, prefix_cache=2**30), Engine(model)
    said = tokens(40)
    plan = Plan.low(4, Policy(4, 0.0))
    for turn in range(4):
        ours, theirs = (engine.generate(said, max_new_tokens=30, plan=plan) for engine in (keeping, forgetful))
        assert ours.token_ids == theirs.token_ids
        assert theirs.stats.reused == 0
        assert ours.stats.reused == (len(said) - 6 - 1 if turn else 0)  # all but the question and the last token
        said = [*said, *ours.token_ids, *tokens(6, turn)]


def test_nothing_is_kept_unless_asked_and_no_more_than_asked() -> None:
    model = endless(wide_model("llama"))
    for room, reuses in ((0, False), (4096, False), (2**24, True)):
        engine = Engine(model, prefix_cache=room)
        engine.generate(tokens(60), max_new_tokens=4)
        assert (engine.generate(tokens(60), max_new_tokens=4).stats.reused > 0) == reuses


def test_engines_on_one_target_keep_their_own() -> None:
    keeping = Engine(endless(wide_model("llama")), prefix_cache=2**24)
    keeping.generate(tokens(60), max_new_tokens=4)
    other = Engine(keeping.model, backend=keeping.backend)
    assert [engine.generate(tokens(60), max_new_tokens=4).stats.reused for engine in (other, keeping)] == [0, 59]


def test_less_than_nothing_cannot_be_kept() -> None:
    with pytest.raises(UsageError, match="prefix_cache must be 0 or more bytes, got -1"):
        Engine(endless(wide_model("llama")), prefix_cache=-1)


def test_a_search_survives_another_threads_search() -> None:
    """While one search compares tokens, another one moves its own prefix to the end of the store."""
    store = PrefixCache(2**20)
    first, second = [1] * 40, [*[1] * 20, *[2] * 20]
    for each in (first, second):
        assert store.wants(each, len(each) * PER_TOKEN)
        store.add(prefix(each))

    class Interrupted(list[int]):
        def __iter__(self) -> Iterator[int]:
            store.find(first)
            return super().__iter__()

    found = store.find(Interrupted(second))
    assert found is not None
    assert (list(found[0].token_ids), found[1]) == (second, 40)


def test_the_same_prefix_is_added_once() -> None:
    store = PrefixCache(2**20)
    assert store.wants([1] * 20, 20 * PER_TOKEN)
    assert store.wants([1] * 20, 20 * PER_TOKEN)
    for _ in range(2):
        store.add(prefix([1] * 20))
    assert store.bytes == 20 * PER_TOKEN


def test_threads_that_share_a_prefix_cache_get_what_they_would_get_alone() -> None:
    """Prompts of some 600 tokens share their first tokens; one store keeps them all, the other one a few of them."""
    model = endless(wide_model("llama", max_position_embeddings=1024))
    prompts = [[*tokens(80 * (i % 7) + 40, 1), *tokens(560 - 80 * (i % 7), 2 + i)] for i in range(28)]
    alone = Engine(model)
    expected = [alone.generate(prompt, max_new_tokens=3).token_ids for prompt in prompts]
    engines = [Engine(model, prefix_cache=room * 2**20) for room in (8, 256, 256, 256)]

    def outputs(seed: int) -> list[bool]:
        order = random.Random(seed).sample(range(len(prompts)), len(prompts))
        return [e.generate(prompts[i], max_new_tokens=3).token_ids == expected[i] for e in engines for i in order * 2]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads meet within the store's methods
    try:
        with ThreadPoolExecutor(4) as pool:
            equal = [each for part in pool.map(outputs, range(4)) for each in part]
    finally:
        sys.setswitchinterval(interval)
    assert all(equal), f"{equal.count(False)} of {len(equal)} outputs differ"
