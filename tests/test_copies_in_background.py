"""4-bit copies are made while requests run: the output stays the same, and nothing is left half made."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NUM_LAYERS, endless, endless_tokenizer
from server import MODEL, serving
from test_weight_cache import Steps, copies, kept, saved, saved_mixture, weights_folder

from knn_ssd.backends import background, copy_maker
from knn_ssd.backends.background import BackgroundWork
from knn_ssd.backends.copy_maker import CopyMaker
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.transformers import backend as transformers_backend
from knn_ssd.backends.transformers.kernel_backend import KernelBackend
from knn_ssd.cli import main, options
from knn_ssd.engine import Engine
from knn_ssd.kernels.arena import Arena
from knn_ssd.kernels.binding import kernels_obstacle
from knn_ssd.kernels.quantisation import PART_ROWS, empty_copy, quantise, quantise_rows
from knn_ssd.kernels.weights import TensorKeeper, best_blocks, make_matrix
from knn_ssd.outputs import Generation
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.request_options import BatchRequest
from knn_ssd.routing import plan_choice
from knn_ssd.server.app import ServeSettings
from knn_ssd.speculation import controller
from knn_ssd.testing import tiny_model
from knn_ssd.tools.memory import FreeMemory
from knn_ssd.weight_cache import LIMIT_VARIABLE, WeightCache

pytestmark = pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")

PROMPT = [5, 9, 12, 7]
ALL_LOW = Plan.low(NUM_LAYERS, Policy(4, 0.0))
SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}


@pytest.fixture(autouse=True)
def every_copy_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the model is; and wherever they are there, they draft."""
    monkeypatch.setattr(copy_maker, "BACKGROUND_WEIGHTS", 0)
    monkeypatch.setattr(controller, "_MIN_GAIN", 1e9)
    monkeypatch.setattr(plan_choice, "_GENERAL_POLICY", replace(plan_choice._GENERAL_POLICY, lookup=False))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Copies are made once it is set."""
    opened = threading.Event()
    real = copy_maker.empty_copy
    monkeypatch.setattr(copy_maker, "empty_copy", lambda *args: (opened.wait(60), real(*args))[1])
    yield opened
    opened.set()


@pytest.fixture(params=["native", "kernels"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return new_engine(request.param)


def new_engine(kind: str = "native") -> Engine:
    if kind == "native":
        model = endless(tiny_model("llama", **SIZES))
        return Engine(model, backend=NativeBackend(model), answers=False)
    model = endless(tiny_model("gpt2"))
    return Engine(model, backend=KernelBackend(model), answers=False)


def maker(engine: Engine) -> CopyMaker:
    backend: Any = engine.backend
    found: CopyMaker = backend.low.maker if isinstance(backend, NativeBackend) else backend._linears.copies
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    due = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.005)


def wait_until_made(engine: Engine) -> None:
    wait_until(lambda: not engine.backend.is_preparing)


def self_drafted(generation: Generation) -> int:
    found = generation.stats.by_drafter.get("self")
    return found.drafted if found is not None else 0


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    return thread, results


# ---- Output


def test_a_request_before_one_across_and_one_after_say_what_plain_decoding_says(
    engine: Engine, gate: threading.Event
) -> None:
    plain = engine.generate(PROMPT, max_new_tokens=120, plain=True).token_ids
    before = engine.generate(PROMPT, max_new_tokens=120)
    assert engine.backend.is_preparing
    stream = engine.stream(PROMPT, max_new_tokens=120)
    chunks = iter(stream)
    for _ in range(10):
        next(chunks)
    gate.set()
    wait_until_made(engine)
    for _ in chunks:
        pass
    after = engine.generate(PROMPT, max_new_tokens=120)
    assert before.token_ids == stream.result.token_ids == after.token_ids == plain
    assert self_drafted(before) == 0
    assert self_drafted(stream.result) > 0
    assert self_drafted(after) > 0


def test_requests_that_share_passes_do_not_wait_for_copies(gate: threading.Event) -> None:
    engine = new_engine()
    prompts = [[5, 9, 12, 7 + index] for index in range(4)]
    plain = [engine.generate(prompt, max_new_tokens=40, plain=True).token_ids for prompt in prompts]
    while_made = engine.generate_batch(prompts, max_new_tokens=40)
    assert engine.backend.is_preparing
    gate.set()
    wait_until_made(engine)
    afterwards = engine.generate_batch(prompts, max_new_tokens=40)
    assert [each.token_ids for each in while_made] == [each.token_ids for each in afterwards] == plain
    assert not any(map(self_drafted, while_made))
    assert all(map(self_drafted, afterwards))


def test_copies_made_in_the_background_have_the_bytes_of_those_made_at_once(engine: Engine) -> None:
    kind = "native" if isinstance(engine.backend, NativeBackend) else "kernels"
    at_once = new_engine(kind)
    at_once.prepare()
    assert not engine.prepare_later()
    wait_until_made(engine)
    assert engine.prepare_later()
    first, second = maker(engine).tensors, maker(at_once).tensors
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert engine.backend.low_bit_bytes == maker(engine).total_bytes == at_once.backend.low_bit_bytes


@pytest.mark.parametrize("rows", [1, 64, 130, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_matrix_are_quantised_as_the_whole(rows: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    keeper, importance = TensorKeeper(), torch.rand(96) + 0.5
    matrix = make_matrix(weight, None, keeper, best_blocks(weight, Arena()))
    whole, parts = quantise(matrix, importance), empty_copy(matrix, Arena())
    for first in reversed(range(0, rows, PART_ROWS)):
        quantise_rows(matrix, importance, range(first, min(first + PART_ROWS, rows)), *parts)
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))


# ---- Who waits


@pytest.mark.parametrize(
    "wanted", [{"temperature": 1.0, "seed": 3}, {"plan": ALL_LOW}, {"adaptive": False}], ids=lambda each: str([*each])
)
def test_what_must_not_depend_on_time_waits_for_the_copies(
    wanted: dict[str, Any], engine: Engine, gate: threading.Event
) -> None:
    assert not engine.prepare_later()
    thread, results = in_thread(lambda: engine.generate(PROMPT, max_new_tokens=30, **wanted))
    thread.join(0.3)
    assert not results
    gate.set()
    thread.join(30)
    again = engine.generate(PROMPT, max_new_tokens=30, **wanted)
    assert results[0].token_ids == again.token_ids
    assert self_drafted(results[0]) == self_drafted(again) > 0


def test_one_that_waits_in_a_batch_keeps_no_other_waiting(gate: threading.Event) -> None:
    engine = new_engine()
    seeded = {"max_new_tokens": 30, "temperature": 1.0, "seed": 3}
    requests = [BatchRequest(PROMPT, seeded), BatchRequest(PROMPT, seeded), BatchRequest([5, 9], {"max_new_tokens": 9})]
    outputs = engine.stream_batch(requests)
    assert next(outputs)[0] == 2
    gate.set()
    assert {place: output.token_ids for place, output in outputs} == dict.fromkeys(
        (0, 1), engine.generate(PROMPT, **seeded).token_ids
    )


def test_whoever_waits_makes_the_rest_and_sees_the_progress(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real, halfway = copy_maker.empty_copy, threading.Event()

    def slow(*args: Any) -> Any:
        if len(maker(engine).tensors) >= 10 and threading.current_thread() is not threading.main_thread():
            halfway.set()
            time.sleep(0.05)
        return real(*args)

    monkeypatch.setattr(copy_maker, "empty_copy", slow)
    engine.prepare_later()
    halfway.wait(30)
    steps = Steps()
    maker(engine).prepare(maker(engine)._matrices, steps)
    assert not engine.backend.is_preparing
    assert steps.stages == [("making 4-bit copies", steps.steps)]
    assert 0 < steps.steps < len(maker(engine)._matrices)
    assert engine.backend.low_bit_bytes == maker(engine).total_bytes
    engine.prepare(again := Steps())
    assert again.stages == []


def test_few_copies_are_made_at_once_and_reported(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_maker, "BACKGROUND_WEIGHTS", 10**9)
    assert maker(engine).prepare_later(maker(engine)._matrices, steps := Steps())
    assert steps.stages == [("making 4-bit copies", len(maker(engine)._matrices))]
    assert self_drafted(engine.generate(PROMPT, max_new_tokens=40)) > 0


def test_a_plan_without_4_bit_weights_makes_no_copies(engine: Engine) -> None:
    assert engine.backend.prepare_later(Plan.skipping(NUM_LAYERS, mlp=[1]))
    engine.generate(PROMPT, max_new_tokens=4, plain=True)
    assert not engine.backend.is_preparing
    assert engine.backend.low_bit_bytes == 0


# ---- Errors and ends


def test_an_error_is_one_sentence_and_drafting_goes_on_without_copies(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = engine.generate(PROMPT, max_new_tokens=30, plain=True).token_ids
    with monkeypatch.context() as patch:
        patch.setattr(copy_maker, "empty_copy", lambda *_: (_ for _ in ()).throw(MemoryError("no memory is left")))
        engine.prepare_later()
        wait_until_made(engine)
    outputs = [engine.generate(PROMPT, max_new_tokens=30) for _ in range(2)]
    assert [each.token_ids for each in outputs] == [plain] * 2
    assert not any(map(self_drafted, outputs))
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == [
        "Drafts go on without 4-bit weights, whose copies cannot be made: no memory is left"
    ]
    engine.prepare()  # who asks for them may try again
    assert self_drafted(engine.generate(PROMPT, max_new_tokens=40)) > 0


def test_a_sample_that_fails_leaves_no_importance_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = engine.backend
    expected = new_engine("native" if isinstance(backend, NativeBackend) else "kernels")
    expected.prepare()
    method = "_run_rows" if isinstance(backend, NativeBackend) else "_run"
    with monkeypatch.context() as patch:
        patch.setattr(backend, method, lambda *_args, **_options: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            engine.prepare()
    engine.prepare()
    tensors = maker(expected).tensors
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in maker(engine).tensors.items())


ENDS = """
import os, signal, sys, time
from knn_ssd.backends import copy_maker
from knn_ssd.engine import Engine
copy_maker.BACKGROUND_WEIGHTS = 0
real = copy_maker.quantise_rows
def slow(*args):
    time.sleep(0.3)
    real(*args)
copy_maker.quantise_rows = slow
engine = Engine.from_pretrained(sys.argv[1], device="cpu")
engine.generate([5, 9, 12], max_new_tokens=2)
assert engine.backend.is_preparing
"""
INTERRUPT = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell has it ignored
os.kill(os.getpid(), signal.SIGINT)
time.sleep(20)
"""
FORK = """
child = os.fork()
if child == 0:
    copy_maker.quantise_rows = real
    before = engine.generate([5, 9, 12], max_new_tokens=9).token_ids
    engine.prepare()
    same = before == engine.generate([5, 9, 12], max_new_tokens=9).token_ids
    os._exit(0 if same and engine.memory.low_bit else 9)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a model; the cache directory is a new one, and weights are kept there."""
    monkeypatch.setenv("KNN_SSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT_VARIABLE)
    return saved(tmp_path / "model")


def run(script: str, model: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, str(model)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("raise ValueError('x')", 1),
        (INTERRUPT, -signal.SIGINT),
    ],
)
def test_a_process_ends_at_once_and_leaves_nothing_half_made(end: str, code: int, model: Path) -> None:
    done = run(ENDS + end, model)
    assert done.returncode == code, done.stderr
    assert "Fatal" not in done.stderr
    assert kept() == []
    assert [each for each in weights_folder().iterdir() if each.suffix != ".safetensors"] == []


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags") or sys.platform == "darwin", reason="fork with threads")
@pytest.mark.parametrize("save", [saved, saved_mixture])
def test_a_forked_process_makes_its_own(save: Callable[[Path], Path], model: Path) -> None:
    done = run(ENDS + FORK, save(model.with_name("other")))
    assert done.returncode == 0, done.stderr


def test_requests_go_on_while_copies_are_stored(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, may_go_on = threading.Event(), threading.Event()
    real = WeightCache.store

    def slow(*args: Any) -> None:
        stored.set()
        assert may_go_on.wait(30)
        real(*args)

    engine = Engine.from_pretrained(model, device="cpu", answers=False)
    monkeypatch.setattr(WeightCache, "store", slow)
    engine.prepare_later()
    assert stored.wait(30)
    generation = engine.generate(PROMPT, max_new_tokens=12)
    assert self_drafted(generation) > 0
    assert engine.backend.is_preparing
    may_go_on.set()
    wait_until_made(engine)


def test_two_engines_on_one_model_keep_one_file_that_the_third_takes(model: Path) -> None:
    engines = [Engine.from_pretrained(model, device="cpu") for _ in range(2)]
    for each in engines:
        assert not each.prepare_later()
    for each in engines:
        wait_until_made(each)
    assert len(kept()) == 1
    third = Engine.from_pretrained(model, device="cpu")
    assert third.prepare_later(), "kept copies are read at once"
    assert all(torch.equal(tensor, copies(third)[name]) for name, tensor in copies(engines[0]).items())


def test_replacing_copies_ends_the_making_of_others(model: Path) -> None:
    other = Engine.from_pretrained(model, device="cpu")
    other.prepare()
    kept()[0].unlink()
    engine = Engine.from_pretrained(model, device="cpu")
    assert isinstance(engine.backend, NativeBackend)
    engine.prepare_later()
    engine.backend.replace_low_bit(copies(other))
    assert not engine.backend.is_preparing
    assert engine.prepare_later()
    assert all(tensor is copies(other)[name] for name, tensor in copies(engine).items())


# ---- The thread


def test_work_ends_after_the_current_step_and_at_the_end_of_the_process() -> None:
    steps, stopped = [], BackgroundWork(lambda: True)

    def work() -> Iterator[None]:
        while True:
            steps.append(len(steps))
            yield

    stopped.start(work())
    wait_until(lambda: len(steps) > 2)
    assert stopped.is_running
    background._stop_all()
    assert not stopped.is_running
    count = len(steps)
    time.sleep(0.02)
    assert len(steps) == count
    assert not background._running


def test_it_pauses_only_while_others_want_the_processor() -> None:
    pauses: list[bool] = []
    is_busy = iter([True, False, True])

    def asked() -> bool:
        pauses.append(next(is_busy))
        return pauses[-1]

    work = BackgroundWork(asked)
    work.start(iter([None, None, None]))
    wait_until(lambda: not work.is_running)
    assert pauses == [True, False, True]


def test_requests_are_what_it_takes_turns_with(engine: Engine) -> None:
    is_busy = engine.backend._admission.is_busy  # type: ignore[attr-defined]
    assert not is_busy()
    stream = engine.stream(PROMPT, max_new_tokens=4)
    assert is_busy()
    assert stream.result.token_ids
    wait_until(lambda: not is_busy())  # the sample that copies are fitted to may be running in a session of its own


# ---- Memory


def test_memory_for_copies_that_are_being_made_is_set_aside(engine: Engine, gate: threading.Event) -> None:
    own = engine.backend._admission  # type: ignore[attr-defined]
    own.free = lambda: FreeMemory(own.low_bit_bytes + 100 * own.token_bytes, 2**30, "this machine")
    before = own.most_tokens(10**9)
    engine.prepare_later()
    during = own.most_tokens(10**9)
    gate.set()
    wait_until_made(engine)
    assert during < 100 < before == own.most_tokens(10**9)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
def test_the_copies_of_experts_count(family: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    backend: Any = KernelBackend(tiny_model(family))
    needed = backend._admission.low_bit_bytes
    backend.prepare(ALL_LOW)
    assert needed == backend.low_bit_bytes > 0
    real = transformers_backend.MemoryAdmission
    for room, has_copies in ((needed, True), (needed - 1, False)):
        free = FreeMemory(room, 2**30, "this machine")
        monkeypatch.setattr(
            transformers_backend, "MemoryAdmission", lambda *args, free=free: real(*args, free=lambda: free)
        )
        assert (Mode.LOW in KernelBackend(tiny_model(family)).modes) == has_copies
    assert "drafts without 4-bit weights: 4-bit copies take" in caplog.text


# ---- The command line and the server


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies take a while where nobody waits for them."""
    real = copy_maker.empty_copy

    def slow(*args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(copy_maker, "empty_copy", slow)


COMMAND = ["generate", "--prompt", "a fox", "--max-new-tokens", "4", "--model"]
REST = "making the rest of the 4-bit copies"


@pytest.mark.usefixtures("slowly")
def test_generate_answers_first_and_then_keeps_the_copies(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, str(model)]) == 0
    first = capsys.readouterr()
    assert "in the background" in first.err
    assert first.err.index("in the background") < first.err.index(REST)
    assert len(kept()) == 1
    assert main([*COMMAND, str(model)]) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert "4-bit copies" not in second.err


@pytest.mark.usefixtures("slowly")
def test_generate_waits_for_no_copies_that_nobody_keeps(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    assert main([*COMMAND, str(model)]) == 0
    assert REST not in capsys.readouterr().err


@pytest.mark.usefixtures("slowly")
def test_ctrl_c_after_the_answer_is_no_failure(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_engine: Engine) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "prepare", interrupted)
    assert main([*COMMAND, str(model)]) == 0
    assert REST in capsys.readouterr().err


def test_metrics_say_whether_copies_are_being_made(gate: threading.Event) -> None:
    import httpx

    engine = Engine(endless(tiny_model("llama", **SIZES)), endless_tokenizer())
    for served in serving(ServeSettings(MODEL), engine):
        engine.prepare_later()
        assert "knn_ssd_making_copies 1.0" in httpx.get(f"{served.url}/metrics").text
        answer = served.client.completions.create(model=MODEL, prompt="a fox", max_tokens=8, temperature=0)
        assert answer.choices[0].text
        gate.set()
        wait_until_made(engine)
        assert "knn_ssd_making_copies 0.0" in httpx.get(f"{served.url}/metrics").text
