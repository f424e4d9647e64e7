"""Memory: what is free, which requests and models are refused for want of it, and which wait."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from helpers import endless
from server import MODEL, Served, SlowEngine, serving
from test_native import ALL_LOW, tokens, wide_model
from test_thread_pool import machine, v2_machine

from knn_ssd import Engine
from knn_ssd.backends import admission, cursor
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.errors import MemoryInUseError, MemoryLimitError, ModelError
from knn_ssd.kernels import binding
from knn_ssd.loading import pretrained
from knn_ssd.loading.resolve import load_model
from knn_ssd.server.app import ServeSettings
from knn_ssd.server.scheduler import Event, Limits, PrefillDone
from knn_ssd.speculation.decode import FinishReason
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.tools.memory import FreeMemory, free_memory, resident_bytes, size

GIB = 2**30
PAGE = os.sysconf("SC_PAGE_SIZE")
MEMINFO = {"proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable:  8388608 kB\n"}
V1_MEMORY = "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def with_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


# ---- What is free


def test_without_a_limit_the_machine_s_available_memory_is_free(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    with_files(tmp_path, MEMINFO)
    assert free_memory(tmp_path) == FreeMemory(8 * GIB, 16 * GIB, "this machine")
    assert str(free_memory(tmp_path)) == "8.0 GiB of the 16.0 GiB of this machine are free"


def test_mapped_files_that_this_process_reads_are_not_free(tmp_path: Path) -> None:
    """Linux counts weights that were mapped from a file as available."""
    with_files(tmp_path, MEMINFO | {"proc/self/statm": f"900000 800000 {3 * GIB // PAGE} 5 0 123 0\n"})
    free = free_memory(tmp_path)
    assert free is not None
    assert free.bytes == 5 * GIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("level", ["", "app/", "app/inner/"])
def test_the_limit_of_a_cgroup_or_of_an_ancestor_counts_where_it_is_less(
    version: int, level: str, tmp_path: Path
) -> None:
    """Files in its memory are free, other than those that this process reads."""
    stat = f"anon 5\nactive_file {GIB}\ninactive_file 0\ntotal_active_file {GIB // 2}\ntotal_inactive_file {GIB // 2}\n"
    limit, used = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    files = {f"{level}{limit}": f"{6 * GIB}\n", f"{level}{used}": f"{4 * GIB}\n", f"{level}memory.stat": stat}
    if version == 2:
        v2_machine(tmp_path, "/app/inner", files)
    else:
        machine(tmp_path, "4:memory:/app/inner\n", "", {f"memory/{name}": text for name, text in files.items()})
    with_files(tmp_path, MEMINFO)
    assert free_memory(tmp_path) == FreeMemory(3 * GIB, 6 * GIB, f"the process's cgroup v{version}")
    mapped = {"proc/self/statm": f"9 9 {GIB // 2 // PAGE} 0 0 0 0"}
    assert getattr(free_memory(with_files(tmp_path, mapped)), "bytes", 0) == 5 * GIB // 2
    elsewhere = {"proc/self/statm": f"9 9 {3 * GIB // PAGE} 0 0 0 0"}  # files that another cgroup pays for
    assert getattr(free_memory(with_files(tmp_path, elsewhere)), "bytes", 0) == 2 * GIB


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", ""])
def test_a_cgroup_without_a_limit_leaves_the_machine_s_memory(limit: str, tmp_path: Path) -> None:
    files = {"app/memory.max": limit, "app/memory.current": str(GIB), "app/memory.stat": ""}
    free = free_memory(with_files(v2_machine(tmp_path, "/app", files), MEMINFO))
    assert free == FreeMemory(8 * GIB, 16 * GIB, "this machine")


def test_this_machine_has_free_memory() -> None:
    free = free_memory()
    if resident_bytes() is not None:
        assert free is not None
        assert 0 < free.bytes < free.total


def test_sizes_are_written_in_their_largest_unit() -> None:
    assert [size(n) for n in (5, 1024, 1.5 * 2**20, 2**40)] == ["5 bytes", "1.0 KiB", "1.5 MiB", "1024.0 GiB"]


# ---- Requests


@pytest.fixture(params=[NativeBackend, TransformersBackend])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param is NativeBackend and binding.kernels_obstacle() is not None:
        pytest.skip("no kernels here")
    model = endless(wide_model("llama", max_position_embeddings=4096))
    own = Engine(model, backend=request.param(model), answers=False)
    own.prepare()
    return own


def limit_to(engine: Engine, tokens: float) -> int:
    """Leaves free memory for KV caches of so many tokens; returns the memory of one."""
    own = engine.backend._admission  # type: ignore[attr-defined]
    room = math.ceil(tokens * own._peak_bytes)

    def free() -> FreeMemory:
        return FreeMemory(room - own._held, 2 * room, "this machine")

    own.free = free
    return int(own.token_bytes)


def test_a_request_that_cannot_fit_is_refused_before_its_prompt_runs(engine: Engine, monkeypatch: Any) -> None:
    limit_to(engine, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(engine.backend, "forward", None)
        with pytest.raises(MemoryLimitError) as caught:
            engine.generate(tokens(20), max_new_tokens=1100)
    assert not isinstance(caught.value, MemoryInUseError)
    numbers = re.fullmatch(
        r"the KV cache of 1120 tokens takes up to (\S+) MiB of memory at (\S+) KiB a token, beside (.*) of weights; "
        r"(.*) of the (.*) of this machine are free\. "
        r"Ask for fewer new tokens: prompt and output may have 1000 tokens together\.",
        str(caught.value),
    )
    assert numbers is not None, str(caught.value)
    assert float(numbers[1]) == pytest.approx(1120 * float(numbers[2]) / 1024, rel=0.05)
    weights = sum(weight.nbytes for weight in engine.model.parameters())
    assert numbers[3] == size(weights)


def test_a_request_that_fits_runs_and_leaves_its_memory(engine: Engine) -> None:
    expected = engine.generate(tokens(20), max_new_tokens=700, plain=True).token_ids
    limit_to(engine, 1000)
    for _ in range(3):
        assert engine.generate(tokens(20), max_new_tokens=700).token_ids == expected


def test_without_a_limit_of_its_own_an_output_ends_where_the_memory_does(engine: Engine) -> None:
    limit_to(engine, 200)
    result = engine.generate(tokens(20), max_new_tokens=None)
    assert result.finish_reason is FinishReason.CONTEXT
    assert 100 < 20 + len(result.token_ids) <= 200


def test_memory_that_others_hold_is_in_use_until_they_end(engine: Engine) -> None:
    limit_to(engine, 600)
    with closing(engine.stream(tokens(20), max_new_tokens=400)) as stream:
        next(iter(stream))
        with pytest.raises(MemoryInUseError, match="are held by other requests"):
            engine.generate(tokens(20), max_new_tokens=400)
    engine.generate(tokens(20), max_new_tokens=400)


def test_a_closed_session_holds_no_memory(engine: Engine) -> None:
    limit_to(engine, 600)
    session: Any = engine.backend.open(420)
    session.prefill(tokens(400))
    with pytest.raises(MemoryInUseError):
        engine.backend.open(420)
    session.close()
    engine.backend.open(420)


def test_long_outputs_run_side_by_side_where_they_may_stay_short(engine: Engine) -> None:
    """Each might take all memory, and is not held up for that."""
    limit_to(engine, 3000)
    streams = [engine.stream(tokens(20, index), max_new_tokens=2500) for index in range(4)]
    for stream in streams:
        next(iter(stream))
        stream.close()


def test_an_output_that_finds_no_memory_to_go_on_ends_with_the_arithmetic(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor, "CHUNK_TOKENS", 100)
    limit_to(engine, 1000)
    with closing(engine.stream(tokens(20), max_new_tokens=900, plain=True)) as stream:
        rounds = iter(stream)
        next(rounds)
        limit_to(engine, 120)  # another program has taken the rest
        with pytest.raises(MemoryLimitError, match=r"at .* a token"):
            list(rounds)
    limit_to(engine, 1000)
    engine.generate(tokens(20), max_new_tokens=400)


def test_where_free_memory_is_not_known_nothing_is_refused(engine: Engine) -> None:
    engine.backend._admission.free = lambda: None  # type: ignore[attr-defined]
    assert engine.backend.most_tokens() == engine.backend.context_length == 4096
    engine.backend.open(4096).close()


def test_the_memory_of_a_token_is_what_a_cache_takes(engine: Engine) -> None:
    session: Any = engine.backend.open(100)
    session.prefill(tokens(30))
    cache = session.cache if isinstance(engine.backend, NativeBackend) else session._cache
    parts = [*cache.tensors, session._hidden] if isinstance(engine.backend, NativeBackend) else []
    for layer in getattr(cache, "layers", ()):
        parts += [layer.keys, layer.values]
    own: admission.MemoryAdmission = engine.backend._admission  # type: ignore[attr-defined]
    assert 100 * own.token_bytes == sum(part.nbytes for part in parts)
    session.close()


# ---- 4-bit copies


@pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
def test_without_memory_for_4_bit_copies_the_rest_still_drafts(caplog: pytest.LogCaptureFixture) -> None:
    model = endless(wide_model("llama", vocab_size=8192))  # its copies take more than a short request
    expected = Engine(model).generate(tokens(20), max_new_tokens=40, plain=True).token_ids
    engine = Engine(model, backend=NativeBackend(model), answers=False)
    own = engine.backend._admission  # type: ignore[attr-defined]
    free = FreeMemory(own.low_bit_bytes - 1, GIB, "this machine")
    own.free = lambda: free
    result = engine.generate(tokens(20), max_new_tokens=40)
    assert result.token_ids == expected
    assert not result.plan.uses_low
    arithmetic = (
        f"4-bit copies take {size(own.low_bit_bytes)} of memory, beside {size(own.weight_bytes)} of weights; {free}"
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"LlamaForCausalLM drafts without 4-bit weights: {arithmetic}"
    ]
    with pytest.raises(MemoryLimitError, match="Decode plainly, or under a plan without the mode low") as caught:
        engine.generate(tokens(20), max_new_tokens=40, plan=ALL_LOW)
    assert caught.value.message == arithmetic
    assert engine.backend.low_bit_bytes == 0


@pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
def test_the_memory_of_4_bit_copies_is_known_before_they_are_made() -> None:
    backend = NativeBackend(wide_model("qwen2", hidden_size=128, intermediate_size=256, vocab_size=256))
    backend.prepare(ALL_LOW)
    assert backend._admission.low_bit_bytes == backend.low_bit_bytes


# ---- The server


@pytest.fixture
def served() -> Iterator[Served]:
    own = SlowEngine(endless(tiny_model(max_position_embeddings=2048)), tiny_tokenizer(chat=True), answers=False)
    yield from serving(ServeSettings(MODEL, limits=Limits(running=4)), own)


def wait_for(served: Served, running: int, waiting: int) -> None:
    """Waits until the scheduler has so many requests."""
    due = time.monotonic() + 20
    while (served.scheduler.running, served.scheduler.waiting) != (running, waiting):
        assert time.monotonic() < due
        time.sleep(0.001)


def complete(served: Served, count: int, **options: Any) -> Any:
    return served.client.completions.create(model=MODEL, prompt="a fox", max_tokens=count, temperature=0, **options)


def test_the_server_refuses_what_cannot_fit(served: Served) -> None:
    limit_to(served.engine, 300)
    with pytest.raises(openai.BadRequestError, match=r"at .* a token, beside .* of weights; .* are free"):
        complete(served, 400)
    assert complete(served, 20).usage.completion_tokens == 20


def test_a_request_waits_in_the_queue_for_memory_that_others_hold(served: Served) -> None:
    expected = [complete(served, count).choices[0].text for count in (120, 119, 20)]
    limit_to(served.engine, 180)
    texts: dict[int, str] = {}
    order: list[int] = []

    def ask(place: int, count: int) -> None:
        texts[place] = complete(served, count).choices[0].text
        order.append(place)

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate((120, 119, 20))]
    for place, thread in enumerate(threads):
        wait_for(served, running=min(place, 1), waiting=max(0, place - 1))
        thread.start()
    wait_for(served, running=1, waiting=2)
    for thread in threads:
        thread.join(60)
    assert [texts[place] for place in range(3)] == expected
    assert order == [0, 2, 1]  # the last one is the shortest, and fits beside the second


def test_a_request_that_was_put_back_keeps_its_place(served: Served) -> None:
    """Two wait while one runs; the first of them does not fit beside it, and the second would."""
    limit_to(served.engine, 180)
    scheduler, order = served.scheduler, list[int]()

    def submit(place: int, count: int) -> None:
        def note(event: Event) -> None:
            if isinstance(event, PrefillDone):
                order.append(place)

        scheduler.submit(tokens(5), {"max_new_tokens": count}, note)

    submit(0, 120)
    wait_for(served, running=1, waiting=0)
    with scheduler._changed:
        submit(1, 119)
        submit(2, 20)
    wait_for(served, running=0, waiting=0)
    assert order == [0, 1, 2]


def test_memory_held_outside_of_the_queue_is_503_with_retry_after(served: Served) -> None:
    limit_to(served.engine, 180)
    session: Any = served.engine.backend.open(150)
    session.prefill(tokens(120))
    body = {"model": MODEL, "prompt": "a fox", "max_tokens": 100}
    answer = httpx.post(f"{served.url}/v1/completions", json=body)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert "held by other requests" in answer.json()["error"]["message"]
    session.close()
    assert httpx.post(f"{served.url}/v1/completions", json=body).status_code == 200


# ---- Models


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    weights = sum(weight.nbytes for weight in model.parameters())
    half, packed = weights // 2, 1.0 if binding.kernels_obstacle() or binding.uses_tiles() else 1.8
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    def free_bytes(count: int) -> None:
        monkeypatch.setattr(pretrained, "free_memory", lambda: FreeMemory(count, 2 * count, "this machine"))

    free_bytes(weights - 1)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path, device="cpu")
    assert str(caught.value) == (
        f"'{tmp_path}' takes {size(weights)} of memory for {size(weights)} of weights in float32; "
        f"{pretrained.free_memory()}. "
        "Name a smaller model, a smaller dtype or another device."
    )
    free_bytes(int(packed * half) + 1)
    load_model(tmp_path, device="cpu", dtype="bfloat16")
    free_bytes(int(packed * half) - 1)
    with pytest.raises(ModelError, match="in bfloat16"):
        load_model(tmp_path, device="cpu", dtype="bfloat16")
    free_bytes(weights)
    load_model(tmp_path, device="cpu")
