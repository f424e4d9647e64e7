"""The answer store: what is near, what is forgotten, and what its file survives and refuses."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from processes import FORKED, ended, start

from knn_ssd import Engine
from knn_ssd.errors import AnswerStoreError, AnswerStoreMismatchError, UsageError
from knn_ssd.loading.fingerprint import Fingerprint, fingerprint
from knn_ssd.routing import answer_file
from knn_ssd.routing.answer_file import FILE_NAME, AnswerFile, answer_key
from knn_ssd.routing.answers import AnswerStore, DraftCount
from knn_ssd.routing.vector_index import ExactIndex, GraphIndex, VectorIndex
from knn_ssd.testing import tiny_model

WIDTH, VOCABULARY = 8, 100
MODEL = Fingerprint("TinyForCausalLM", 4, WIDTH, VOCABULARY, "weights", "tokenizer", "float32")
PROMPT, ANSWER = [1, 2, 3], [4, 5]


def vector(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)


def open_store(folder: Path, **options: Any) -> AnswerStore:
    return AnswerStore.open(folder, MODEL, VOCABULARY, **options)


def filled(folder: Path, count: int = 5, **options: Any) -> AnswerStore:
    store = open_store(folder, **options)
    for i in range(count):
        store.add(vector(i), PROMPT, [i, i], {"lookup": DraftCount(100, i)})
    return store


def answers_of(store: AnswerStore, near: np.ndarray[Any, Any] | None = None, k: int = 10**6) -> list[list[int]]:
    found = store.nearest(vector(0) if near is None else near, k, radius=2.0)
    return [neighbour.answer.token_ids.tolist() for neighbour in found]


def sql(folder: Path, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(folder / FILE_NAME)
    with connection:
        rows = connection.execute(statement, values).fetchall()
    connection.close()
    return rows


# What is near


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(0, 40), st.integers(0, 8), st.floats(0, 2))
def test_the_nearest_are_those_of_a_search_by_brute_force(seeds: list[int], seed: int, k: int, radius: float) -> None:
    store = AnswerStore()
    for i, each in enumerate(seeds):
        store.add(vector(each), PROMPT, [i])
    wanted = vector(seed).astype(np.float64)
    distances = []
    for i, each in enumerate(seeds):
        other = vector(each).astype(np.float64)
        cosine = wanted @ other / np.linalg.norm(wanted) / np.linalg.norm(other)
        distances.append((round(1 - cosine, 5), -i))
    expected = [(-i, d) for d, i in sorted(distances)][:k]
    found = [(int(n.answer.token_ids[0]), n.distance) for n in store.nearest(vector(seed), k, radius)]
    within = [(i, d) for i, d in expected if d <= radius]
    if all(abs(d - radius) > 1e-4 for d, _ in distances):
        assert [i for i, _ in found] == [i for i, _ in within]
    assert [d for _, d in found] == pytest.approx([d for _, d in expected[: len(found)]], abs=1e-4)
    assert all(0 <= d <= radius for _, d in found)


def test_nothing_is_near_in_an_empty_store_to_a_vector_that_is_none_or_for_no_neighbours() -> None:
    store = AnswerStore()
    assert store.nearest(vector(0), 3, 2.0) == ()
    store.add(vector(0), PROMPT, ANSWER)
    for k in (0, -1):
        assert store.nearest(vector(0), k, 2.0) == ()
    for bad in (np.zeros(WIDTH, np.float32), np.full(WIDTH, np.nan, np.float32), np.full(WIDTH, np.inf, np.float32)):
        assert store.nearest(bad, 3, 2.0) == ()
        store.add(bad, PROMPT, [9])
    assert len(store) == 1


def test_a_vector_of_another_length_is_refused_when_read_and_when_added() -> None:
    store = AnswerStore()
    store.add(vector(0), PROMPT, ANSWER)
    for use in (lambda v: store.nearest(v, 1, 2.0), lambda v: store.add(v, PROMPT, [7])):
        with pytest.raises(UsageError, match=r"vectors of 8 values, got one of 9.*store of its own"):
            use(np.ones(9, np.float32))
    store.clear()
    store.add(np.ones(9, np.float32), PROMPT, ANSWER)  # an empty store in memory has no length yet
    assert len(store) == 1


def test_extreme_values_are_compared_as_well() -> None:
    store = AnswerStore()
    store.add(np.full(WIDTH, 3e38, np.float32), PROMPT, [1])
    store.add(np.full(WIDTH, -1e-40, np.float32), PROMPT, [2])
    assert [round(n.distance, 5) for n in store.nearest(np.ones(WIDTH, np.float32), 2, 2.0)] == [0, 2]


def test_what_is_found_cannot_be_changed() -> None:
    store = AnswerStore()
    store.add(vector(0), PROMPT, ANSWER)
    (near,) = store.nearest(vector(0), 1, 2.0)
    for ids in (near.answer.prompt_ids, near.answer.token_ids):
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 7


def test_the_same_prompt_and_answer_are_kept_once_and_refreshed() -> None:
    store = AnswerStore()
    for accepted in (1, 2):
        store.add(vector(0), PROMPT, ANSWER, {"lookup": DraftCount(3, accepted)})
        store.add(vector(accepted), [*PROMPT, accepted], ANSWER)
    found = store.nearest(vector(0), 5, 0.001)
    assert len(store) == 3
    assert store.num_tokens == 5 + 6 + 6
    assert [n.answer.by_drafter for n in found] == [{"lookup": (3, 2)}]
    assert [n.answer.id for n in found] == [0]


# What is forgotten


def test_of_the_older_half_those_with_the_fewest_accepted_tokens_are_evicted_first() -> None:
    store = AnswerStore(max_tokens=100)
    for i in range(20):
        store.add(vector(i), PROMPT, [i, i])
    store.credit({i: 10 * i for i in range(1, 10)})  # all but the first of the older half; they are the latest now
    assert [e.answer.id for e in store._least_useful_first()] == [0, *range(10, 19), 19, *range(1, 10)]
    store.credit({10: 5, 11: 7})
    for i in range(20, 26):
        store.add(vector(i), PROMPT, [i, i])
    order = [entry.answer.id for entry in store._least_useful_first()]
    kept = set(order)
    assert {0, 12, 13} & kept == set()  # the oldest that were never used
    assert {1, 9, 10, 11, 20, 25} <= kept


def test_a_new_request_is_kept_until_half_a_store_came_after_it() -> None:
    store = AnswerStore(max_tokens=1000)
    for i in range(200):
        store.add(vector(i), PROMPT, [i, i])
    for _ in range(5):
        store.credit(dict.fromkeys(range(200), 1000))  # all were useful
    store.add(vector(500), PROMPT, [777, 777])
    for i in range(600, 690):  # less than half a store
        store.add(vector(i), PROMPT, [i, i])
    assert [777, 777] in answers_of(store)
    assert store.num_tokens <= 1000


def test_what_was_useful_is_forgotten_when_the_topic_changes() -> None:
    store = AnswerStore(max_tokens=1000)
    for i in range(200):
        store.add(vector(i), PROMPT, [i, 0])
    store.credit(dict.fromkeys(range(200), 1000))
    for i in range(200, 3000):  # another topic, whose answers are a little useful
        store.add(vector(i), PROMPT, [i, 1])
        store.credit({i: 3})
    assert all(topic == 1 for _, topic in answers_of(store))


def test_too_long_a_request_is_not_kept_and_many_short_ones_are_bounded() -> None:
    store = AnswerStore(max_tokens=1000)
    store.add(vector(0), list(range(100)), [1])
    store.add(vector(0), PROMPT, [])
    assert len(store) == 0
    store = AnswerStore(max_tokens=100_000)
    for i in range(3000):
        store.add(vector(i), [1], [i])
    assert 0.85 * 1562 < len(store) <= 1562  # 64 tokens each, on average: else their vectors would be the larger part


def test_memory_grows_with_what_is_kept_and_is_freed() -> None:
    store = AnswerStore()
    for i in range(2000):
        store.add(vector(i), PROMPT, [i, i])
    needed = 2000 * 4 * (WIDTH + 5)
    assert needed <= store.bytes <= 1.3 * needed + 2000 * 1100
    store.clear()
    assert (len(store), store.num_tokens, store.bytes) == (0, 0, 0)
    index = ExactIndex()
    for i in range(2000):
        index.add(i, vector(i))
    full = index.bytes
    index.remove(range(10, 2000))
    assert index.bytes < 0.1 * full
    assert index.search(vector(7), 1)[0][0] == 7
    index.remove(range(10))
    assert index.search(vector(7), 1) == []


class Bounded(RuleBasedStateMachine):
    """Whatever is added, used and forgotten: tokens stay within the bound, ids are unique, and everything is found."""

    def __init__(self) -> None:
        super().__init__()
        self.store = AnswerStore(max_tokens=200)
        self.highest = -1

    @rule(seed=st.integers(0, 50), prompt=st.integers(0, 12), answer=st.lists(st.integers(0, 2), max_size=12))
    def add(self, seed: int, prompt: int, answer: list[int]) -> None:
        before = {entry.key: entry for entry in self.store._entries.values()}
        self.store.add(vector(seed), list(range(prompt)), answer)
        key = answer_key(np.arange(prompt, dtype=np.int32), np.array(answer, np.int32))
        if answer and prompt + len(answer) <= 20:
            newest = self.store._entries[self.store._ids[key]]
            assert newest.last_used == self.store._clock - 1
            if key not in before:
                assert newest.answer.id == self.highest + 1
                self.highest += 1

    @rule(used=st.dictionaries(st.integers(0, 30), st.integers(0, 20), max_size=5))
    def credit(self, used: dict[int, int]) -> None:
        self.store.credit(used)

    @invariant()
    def holds(self) -> None:
        entries = self.store._entries
        assert self.store.num_tokens == sum(e.answer.num_tokens for e in entries.values()) <= 200
        assert len(self.store) == len(entries) == len(self.store._ids) == len(self.store._index)
        found = self.store.nearest(vector(0), 10**6, 2.0)
        assert sorted(n.answer.id for n in found) == sorted(entries)


TestBounded = Bounded.TestCase


def test_threads_share_a_store() -> None:
    store = AnswerStore(max_tokens=500)
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        try:
            for i in range(300):
                store.add(vector(seed * 1000 + i), PROMPT, [seed, i])
                for near in store.nearest(vector(i), 3, 2.0):
                    store.credit({near.answer.id: 1})
                    assert near.answer.num_tokens == 5
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(answers_of(store)) == len(store) <= 100


# Many vectors


def clustered(count: int, seed: int = 0, width: int = 64) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((50, width))
    vectors = centres[random.integers(0, 50, count)] + 0.6 * random.standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_a_graph_finds_nearly_all_that_an_exact_search_finds() -> None:
    pytest.importorskip("hnswlib")
    exact, index = ExactIndex(), VectorIndex(exact_vectors=500)
    for i, each in enumerate(clustered(4000)):
        exact.add(i, each)
        index.add(i, each)
    removed = list(range(0, 4000, 5))
    exact.remove(removed)
    index.remove(removed)
    for i, each in enumerate(clustered(600, seed=1), start=4000):  # some take the places of removed ones
        exact.add(i, each)
        index.add(i, each)
    assert len(exact) == len(index) == 3800
    assert index.bytes >= 3800 * 64 * 4
    recalled = 0
    for each in clustered(100, seed=2):
        expected, found = exact.search(each, 6), index.search(each, 6)
        recalled += len({number for number, _ in expected} & {number for number, _ in found})
        cosines = [cosine for _, cosine in found]
        assert len(found) == 6
        assert cosines == sorted(cosines, reverse=True)
        assert all(number >= 4000 or number % 5 for number, _ in found)
    assert recalled / 600 > 0.95


def test_a_graph_gives_what_it_has() -> None:
    pytest.importorskip("hnswlib")
    graph = GraphIndex(WIDTH)
    assert graph.search(vector(0), 3) == []
    for i in range(3):
        graph.add(i, vector(i) / np.linalg.norm(vector(i)))
    assert graph.search(vector(1) / np.linalg.norm(vector(1)), 5)[0] == (1, pytest.approx(1, abs=1e-5))
    graph.remove([0, 1, 2, 3])
    assert graph.search(vector(0), 3) == []


# On disk


def test_requests_and_their_usefulness_survive_a_restart(tmp_path: Path) -> None:
    store = filled(tmp_path / "a" / "b")
    store.credit({1: 7, 3: 2, 4: 0, 99: 5})
    store.add(vector(2), PROMPT, [2, 2], {"self": DraftCount(1, 1)})
    again = open_store(tmp_path / "a" / "b")
    assert sorted(answers_of(again)) == [[i, i] for i in range(5)]
    (near,) = again.nearest(vector(2), 1, 0.001)
    assert near.answer.prompt_ids.tolist() == PROMPT
    assert near.answer.by_drafter == {"self": (1, 1)}
    assert isinstance(near.answer.by_drafter["self"], DraftCount)
    assert again._clock == 6
    useful = {entry.key: (entry.accepted, entry.last_used) for entry in again._entries.values()}
    assert useful == {entry.key: (entry.accepted, entry.last_used) for entry in store._entries.values()}
    assert sorted(accepted for accepted, _ in useful.values()) == [0, 0, 0, 2, 7]
    assert (tmp_path / "a" / "b" / FILE_NAME).stat().st_mode & 0o77 == 0  # prompts are for the owner's eyes only


def test_evictions_and_a_clearing_remove_rows(tmp_path: Path) -> None:
    store = filled(tmp_path, 50, max_tokens=100)
    assert len(store) <= 20
    assert sql(tmp_path, "SELECT count(*) FROM answers") == [(len(store),)]
    kept = sorted(answers_of(store))
    store.close()
    assert sorted(answers_of(open_store(tmp_path, max_tokens=100))) == kept
    smaller = open_store(tmp_path, max_tokens=50)
    assert 0 < smaller.num_tokens <= 50
    assert sql(tmp_path, "SELECT count(*) FROM answers") == [(len(smaller),)]
    smaller.clear()
    assert len(smaller) == len(open_store(tmp_path)) == 0
    smaller.add(vector(0), PROMPT, ANSWER)
    assert answers_of(open_store(tmp_path)) == [ANSWER]


def _add_for_ever(argv: list[str]) -> None:
    """Prints the number of each answer once it is kept."""
    folder, run = argv
    store = open_store(Path(folder))
    for i in range(10**6):
        store.add(vector(i), PROMPT, [int(run), i % 100, i // 100 % 100, i // 10000])
        print(i, flush=True)


def test_a_kill_loses_at_most_the_request_in_flight(tmp_path: Path) -> None:
    before = 0
    for run in range(2):  # the second writer goes on where the first was killed
        printed, errors = tmp_path / f"printed-{run}", tmp_path / "errors"
        writer = start(printed, errors, [tmp_path / "store", run], _add_for_ever)
        while not (printed.exists() and printed.read_bytes().count(b"\n") >= 150):
            assert writer.is_alive(), errors.read_text()
            time.sleep(0.01)
        writer.kill()
        assert ended(writer) == -signal.SIGKILL
        kept = before + max(int(line) for line in printed.read_text().splitlines(True) if line.endswith("\n")) + 1
        store = open_store(tmp_path / "store")
        assert kept <= len(store) <= kept + 1
        before = len(store)
        store.close()


def test_a_torn_tail_is_mended(tmp_path: Path) -> None:
    store = filled(tmp_path, 30)
    log = tmp_path / f"{FILE_NAME}-wal"
    content = {path.name: path.read_bytes() for path in (tmp_path / FILE_NAME, log)}  # as a crash would leave them
    store.close()
    for cut in (1, 100, 5000, len(content[log.name]) - 10):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        (folder / FILE_NAME).write_bytes(content[FILE_NAME])
        (folder / log.name).write_bytes(content[log.name][:-cut])
        again = open_store(folder)
        assert set(map(tuple, answers_of(again))) == {(i, i) for i in range(len(again))}
        again.add(vector(99), PROMPT, [99, 99])
        assert len(open_store(folder)) == len(again)
        assert len(again) > 25 or cut > 200


def _add_some(folder: Path, first: int) -> None:
    store = open_store(folder)
    for i in range(first, first + 20):
        store.add(vector(i), PROMPT, [i % 100, i // 100])


def test_processes_share_a_folder(tmp_path: Path) -> None:
    writers = [FORKED.Process(target=_add_some, args=(tmp_path / "new", 100 * i), daemon=True) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(open_store(tmp_path / "new")) == 80


def test_two_stores_on_one_folder_keep_what_both_add(tmp_path: Path) -> None:
    one, other = open_store(tmp_path), open_store(tmp_path)
    for i in range(10):
        one.add(vector(i), PROMPT, [i, 0])
        other.add(vector(i), PROMPT, [i, 1])
        one.add(vector(i), PROMPT, [i, 2])
        other.add(vector(i), PROMPT, [i, 2])  # the same one
    assert len(one) == len(other) == 20
    assert len(open_store(tmp_path)) == 30


# What is refused


def test_a_store_of_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    filled(tmp_path).close()
    other = replace(MODEL, hidden_size=16, weights_hash="others", dtype="bfloat16")
    with pytest.raises(AnswerStoreMismatchError) as refusal:
        AnswerStore.open(tmp_path, other, VOCABULARY)
    assert refusal.value.differences == (
        "hidden size is 16, the answer store has 8",
        "weights hash is others, the answer store has weights",
    )
    assert "folder of its own" in str(refusal.value)
    assert len(open_store(tmp_path)) == 5


def test_what_is_no_answer_store_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    file.write_text("something")
    with pytest.raises(AnswerStoreError, match="is a file, and an answer store is a folder"):
        open_store(file)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    sql(foreign, "CREATE TABLE answers (a)")
    contents = {
        "text": b"not a database, but long enough to be one " * 100,
        "foreign": (foreign / FILE_NAME).read_bytes(),
    }
    for content in contents.values():
        file.write_bytes(content)
        with pytest.raises(
            AnswerStoreError, match=r"cannot be used: file is not a database|is not an answer store's file"
        ):
            open_store(tmp_path)
        assert file.read_bytes() == content


@pytest.mark.parametrize("place", [0.002, 0.3, 0.5, 0.9])
def test_a_damaged_file_is_refused_or_its_damaged_entries_are_skipped(tmp_path: Path, place: float) -> None:
    store = filled(tmp_path, 60)
    store.clear()  # its pages go into the file itself
    for i in range(60):
        store.add(vector(i), PROMPT, [i, i])
    store.close()
    file = tmp_path / FILE_NAME
    content = bytearray(file.read_bytes())
    start = int(place * len(content))
    content[start : start + 3000] = bytes(range(256)) * 12
    file.write_bytes(content)
    try:
        damaged = open_store(tmp_path)
    except AnswerStoreError as error:
        sentence = str(error)
    else:
        assert all(one == two < 60 for one, two in answers_of(damaged))
        return
    assert FILE_NAME in sentence
    assert "\n" not in sentence


def test_a_newer_format_and_a_damaged_fingerprint_are_refused(tmp_path: Path) -> None:
    filled(tmp_path).close()
    sql(tmp_path, "UPDATE meta SET value = '2' WHERE name = 'format'")
    with pytest.raises(AnswerStoreError, match=r"has format 2, and this version of knn-ssd reads 1\. Update"):
        open_store(tmp_path)
    sql(tmp_path, "UPDATE meta SET value = '1' WHERE name = 'format'")
    shown = asdict(MODEL)
    for bad in (
        "{",
        "[]",
        "{}",
        "null",
        "[" * 9000,
        json.dumps(shown | {"more": 1}),
        json.dumps(shown | {"vocab_size": "x"}),
    ):
        sql(tmp_path, "UPDATE meta SET value = ? WHERE name = 'fingerprint'", bad)
        with pytest.raises(AnswerStoreError, match="fingerprint is damaged"):
            open_store(tmp_path)


HOSTILE = {
    "a token id beyond the vocabulary": {"token_ids": np.array([VOCABULARY], "<i4").tobytes()},
    "a negative token id": {"prompt_ids": np.array([-1], "<i4").tobytes()},
    "bytes that are no token ids": {"token_ids": b"12345"},
    "no answer": {"token_ids": b""},
    "text for token ids": {"token_ids": "1234"},
    "an answer larger than the bound": {"token_ids": b"\0" * 4 * 100_001},
    "a vector of another length": {"vector": np.ones(WIDTH + 1, "<f4").tobytes()},
    "a vector that is not finite": {"vector": np.full(WIDTH, np.nan, "<f4").tobytes()},
    "a vector of zeros": {"vector": np.zeros(WIDTH, "<f4").tobytes()},
    "usefulness that is no number": {"accepted": "a"},
    "negative usefulness": {"accepted": -1.0},
    "endless usefulness": {"accepted": float("inf")},
    "a last use in text": {"last_used": "a"},
    "a last use far ahead": {"last_used": 2**62},
    "counts that are no JSON": {"by_drafter": "{"},
    "counts that are no pairs": {"by_drafter": '{"a": 1}'},
    "counts beyond what was drafted": {"by_drafter": '{"a": [1, 2]}'},
    "counts below zero": {"by_drafter": '{"a": [1, -2]}'},
    "counts without end": {"by_drafter": json.dumps({str(i): [1, 1] for i in range(2000)})},
    "counts that are a list": {"by_drafter": "[1]"},
    "another key": {"key": b"0" * 16},
}


@pytest.mark.parametrize("columns", HOSTILE.values(), ids=HOSTILE)
def test_an_entry_that_cannot_be_true_is_skipped_and_removed_with_one_warning(
    tmp_path: Path, columns: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path).close()
    ((row,),) = sql(tmp_path, "SELECT min(id) FROM answers")
    if "key" not in columns:  # as a forger would, who knows how keys are made
        ((prompt, answer),) = sql(tmp_path, "SELECT prompt_ids, token_ids FROM answers WHERE id = ?", row)
        prompt, answer = (columns.get(n, v) for n, v in (("prompt_ids", prompt), ("token_ids", answer)))
        if all(isinstance(each, bytes) and len(each) % 4 == 0 for each in (prompt, answer)):
            columns = columns | {"key": answer_key(np.frombuffer(prompt, "<i4"), np.frombuffer(answer, "<i4"))}
    for name, value in columns.items():
        sql(tmp_path, f"UPDATE answers SET {name} = ? WHERE id = ?", value, row)
    with caplog.at_level(logging.WARNING):
        assert sorted(answers_of(open_store(tmp_path))) == [[i, i] for i in range(1, 5)]
    fact = f"'{tmp_path / FILE_NAME}' had 1 requests that are damaged or too long for it."
    assert caplog.messages == [f"{fact} They were skipped and removed."]
    assert sql(tmp_path, "SELECT count(*) FROM answers") == [(4,)]
    caplog.clear()
    open_store(tmp_path)
    assert not caplog.messages


def test_text_that_is_not_unicode_spoils_no_other_entry(tmp_path: Path) -> None:
    filled(tmp_path).close()
    first = "WHERE id = (SELECT min(id) FROM answers)"
    sql(tmp_path, f"UPDATE answers SET by_drafter = CAST(X'7bff' AS TEXT) {first}")
    assert len(open_store(tmp_path)) == 4


def test_the_largest_counts_can_be_read_again_after_more_use(tmp_path: Path) -> None:
    filled(tmp_path).close()
    sql(tmp_path, "UPDATE answers SET accepted = ?, last_used = ?", 2.0**53, 2**53)
    store = open_store(tmp_path)
    store.credit({0: 2**53})
    store.add(vector(9), PROMPT, ANSWER)
    store.add(vector(9), PROMPT, [9])
    assert len(open_store(tmp_path)) == 7


def test_an_entry_larger_than_any_that_is_written_is_skipped_as_well(tmp_path: Path) -> None:
    filled(tmp_path).close()
    huge = answer_file._MAX_ROW + 1000  # SQLite reads its length alone: it refuses to give out so much at once
    sql(tmp_path, "UPDATE answers SET prompt_ids = zeroblob(?) WHERE id = (SELECT min(id) FROM answers)", huge)
    assert len(open_store(tmp_path)) == 4


# When it cannot be written


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == answer_file.__name__]


def test_a_full_disk_is_warned_of_once_and_the_store_goes_on_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled(tmp_path)
    assert store._file is not None
    assert store._file._connection is not None
    store._file._connection.execute("PRAGMA max_page_count = 1")  # SQLite's way to say that the disk has no more room
    for i in range(200, 300):
        store.add(vector(i), PROMPT, list(range(i - 200, i - 150)))
    store.credit({0: 4})
    assert len(store) == 105
    (message,) = warnings_of(caplog)
    assert "cannot be written (database or disk is full)" in message
    assert 5 <= len(open_store(tmp_path)) < 50


def _add_where_nothing_can_be_written(argv: list[str]) -> None:
    """As another user, since root can write anywhere."""
    folder = Path(argv[0])
    vector(0)  # imports all of numpy, which another user may not be able to read
    if os.getuid() == 0:
        for parent in folder.parents:
            if str(parent).startswith("/tmp/"):
                parent.chmod(0o755)
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, 0, 65534)
            path.chmod(0o550 if path.is_dir() else 0o440)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    logging.basicConfig(format="%(message)s", force=True)
    for name in ("store", "empty"):
        store = open_store(folder / name)
        before = len(store)
        for i in range(10):
            store.add(vector(i), PROMPT, [50, i])
        print(before, len(store), len(answers_of(store)))


def test_a_read_only_folder_is_read_and_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stores, printed, errors = tmp_path / "stores", tmp_path / "printed", tmp_path / "errors"
    filled(stores / "store").close()
    (stores / "empty").mkdir()
    (stores / "store").chmod(0o500)
    (stores / "empty").chmod(0o500)
    exit_code = ended(start(printed, errors, [stores], _add_where_nothing_can_be_written))
    for path in (stores, stores / "store", stores / "empty"):
        path.chmod(0o700)
    assert exit_code == 0, errors.read_text()
    assert printed.read_text().split() == ["5", "15", "15", "0", "10", "10"]
    assert errors.read_text().count("cannot be written") == 2
    assert len(open_store(stores / "empty")) == 0


def test_a_folder_that_cannot_be_made_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(Path("/proc/no/such/place"))
    store.add(vector(0), PROMPT, ANSWER)
    assert answers_of(store) == [ANSWER]
    assert len(warnings_of(caplog)) == 1
    store.clear()
    store.close()


def test_what_exists_is_opened_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(AnswerStoreError, match="no answer store in"):
        AnswerFile(tmp_path)
    assert not list(tmp_path.iterdir())
    store = filled(tmp_path)
    file = AnswerFile(tmp_path)
    assert file.fingerprint == MODEL
    assert [stored.token_ids.tolist() for stored in file.read()] == [[i, i] for i in range(5)]
    assert file.clear() == 5
    assert file.clear() == 0
    store.add(vector(9), PROMPT, ANSWER)  # a process that has the store open goes on
    assert answers_of(open_store(tmp_path)) == [ANSWER]


# Several engines


def test_a_store_is_tied_to_the_first_model_that_is_given_it() -> None:
    one, other = (Engine(tiny_model("llama", num_hidden_layers=layers)) for layers in (2, 3))
    store = AnswerStore()
    Engine(one.model, answers=store)
    Engine(one.model, answers=store)
    with pytest.raises(AnswerStoreMismatchError, match="num layers is 3, the answer store has 2"):
        Engine(other.model, answers=store)


def test_a_store_on_disk_is_refused_to_another_model_as_an_object_too(tmp_path: Path) -> None:
    one, other = (Engine(tiny_model("llama", num_hidden_layers=layers)) for layers in (2, 3))
    store = AnswerStore.open(tmp_path, fingerprint(one.model, None), one.backend.vocab_size)
    with pytest.raises(AnswerStoreMismatchError):
        Engine(other.model, answers=store)
    store.close()


def test_the_same_request_again_keeps_its_answer_whose_automaton_is_kept() -> None:
    store = AnswerStore()
    store.add(vector(0), PROMPT, ANSWER)
    (before,) = store.nearest(vector(0), 1, 0.1)
    store.add(vector(0), PROMPT, ANSWER)
    (after,) = store.nearest(vector(0), 1, 0.1)
    assert after.answer is before.answer


def test_an_empty_store_refuses_another_width_before_anything_is_decoded() -> None:
    store = AnswerStore()
    store.bind(fingerprint(tiny_model("llama"), None))
    with pytest.raises(UsageError, match="vectors of"):
        store.nearest(np.ones(7, np.float32), 1, 1.0)
