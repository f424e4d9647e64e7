"""What is made of a model's weights is kept between starts: never another model's, never torn, within its bound."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import share_kernels
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from knn_ssd.backends import copy_maker, kept_copies, packed
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.transformers.kernel_backend import KernelBackend
from knn_ssd.cli import main
from knn_ssd.engine import Engine
from knn_ssd.errors import UsageError
from knn_ssd.io import cache_directory
from knn_ssd.kernels import binding
from knn_ssd.kernels.binding import kernels, kernels_obstacle
from knn_ssd.kernels.quantisation import quantise
from knn_ssd.kernels.weights import TensorKeeper, make_matrix
from knn_ssd.loading.fingerprint import identify_weights
from knn_ssd.plan import Mode, Plan
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.weight_cache import LIMIT_VARIABLE, WeightCache, limit_gib

needs_kernels = pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")
LOW = Plan.low(4)
PROMPT = [5, 9, 12, 7]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a model; the cache directory is a new one, and weights are kept there."""
    monkeypatch.setenv("KNN_SSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT_VARIABLE)
    return saved(tmp_path / "model")


def saved(directory: Path, seed: int = 0) -> Path:
    tiny_model("llama", seed=seed, hidden_size=96, intermediate_size=160, head_dim=32).save_pretrained(directory)
    tiny_tokenizer(chat=True).save_pretrained(directory)
    return directory


def weights_folder() -> Path:
    return cache_directory() / "weights"


def kept(what: str = "4-bit copies") -> list[Path]:
    """The files with what was made of weights, and whatever else is there."""
    files = sorted(weights_folder().iterdir()) if weights_folder().is_dir() else []
    return [file for file in files if what in key_of(file)]


def key_of(file: Path) -> str:
    with safe_open(file, "pt") as opened:
        return str(opened.metadata()["key"])


class Steps:
    """Counts the matrices that a stage reports."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.steps = 0

    def stage(self, name: str, total: int | None) -> None:
        self.stages.append((name, total))

    def advance(self, note: str = "") -> None:
        self.steps += 1


def prepared(directory: Path, **options: Any) -> tuple[Engine, Steps]:
    """An engine whose copies are there, and what making them reported."""
    engine, steps = Engine.from_pretrained(directory, device="cpu", **options), Steps()
    engine.prepare(steps)
    return engine, steps


def copies(engine: Engine) -> dict[str, torch.Tensor]:
    assert isinstance(engine.backend, NativeBackend)
    return engine.backend.low.maker.tensors


def draft_logits(engine: Engine) -> torch.Tensor:
    session = engine.backend.open(16)
    session.prefill(PROMPT)
    return session.forward([3, 4, 5], LOW)


# ---- Copies of a model


@needs_kernels
def test_the_next_start_takes_the_copies_that_the_first_made(model: Path) -> None:
    first, made = prepared(model)
    second, taken = prepared(model)
    assert made.stages == [("making 4-bit copies", 4 * 7 + 1)]
    assert made.steps == 4 * 7 + 1
    assert taken.stages == []
    assert len(kept()) == 1
    assert copies(first).keys() == copies(second).keys()
    assert all(torch.equal(tensor, copies(second)[name]) for name, tensor in copies(first).items())
    assert torch.equal(draft_logits(first), draft_logits(second))
    assert first.memory.low_bit == second.memory.low_bit > 0


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_next_start_takes_the_blocks_that_the_first_made(
    model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == "bfloat16" and binding.uses_tiles():
        pytest.skip("the tile unit reads the checkpoint's tensors")
    first, _ = prepared(model, dtype=dtype)
    assert len(kept("weights in blocks")) == 1
    monkeypatch.setattr(packed, "best_blocks", lambda *_: pytest.fail("made again"))
    second, _ = prepared(model, dtype=dtype)
    logits = [engine.backend.open(9).prefill(PROMPT).logits for engine in (first, second)]
    assert torch.equal(*logits)
    assert first.memory.weights == second.memory.weights > 0


@needs_kernels
def test_kept_blocks_of_other_shapes_are_made_again(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = prepared(model)
    (file,) = kept("weights in blocks")
    tensors, key = load_file(file), key_of(file)
    tensors["2.up.data"] = tensors["2.up.data"][:-1].clone()
    save_file(tensors, file, metadata={"key": key})
    second, _ = prepared(model)
    assert "are not those of this model" in caplog.text
    assert torch.equal(*[engine.backend.open(9).prefill(PROMPT).logits for engine in (first, second)])


@needs_kernels
def test_a_plan_that_skips_keeps_what_any_plan_takes(model: Path) -> None:
    engine, _ = prepared(model)
    part = Engine.from_pretrained(model, device="cpu")
    part.backend.prepare(Plan((Mode.LOW, *[Mode.KEEP] * 3), (Mode.SKIP,) * 4))
    assert copies(part).keys() == copies(engine).keys()
    plain = Engine.from_pretrained(model, device="cpu")
    plain.backend.prepare(Plan.plain(4))
    assert copies(plain) == {}


# ---- The transformers backend with the kernels


@pytest.fixture
def other(model: Path) -> Path:
    """The directory of a model that the kernels run on the transformers backend: a mixture."""
    return saved_mixture(model.parent / "other")


def saved_mixture(directory: Path, seed: int = 0) -> Path:
    tiny_model("gpt_oss", seed=seed).save_pretrained(directory)
    tiny_tokenizer(chat=True).save_pretrained(directory)
    return directory


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_transformers_backend_takes_what_the_first_start_made(
    other: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, made = prepared(other, dtype=dtype)
    assert type(first.backend) is KernelBackend
    matrices = 4 * (4 + 2 * 4) + 1  # q, k, v and o, two for each expert, and the head
    assert made.stages == [("making 4-bit copies", matrices)]
    assert made.steps == matrices
    assert len(kept()) == 1
    tiles = dtype == "bfloat16" and binding.uses_tiles()
    assert len(kept("weights in blocks")) == (0 if tiles else 1)
    if not tiles:
        monkeypatch.setattr(packed, "best_blocks", lambda *_: pytest.fail("packed again"))
    monkeypatch.setattr(copy_maker, "quantise_rows", lambda *_: pytest.fail("quantised again"))
    second, taken = prepared(other, dtype=dtype)
    assert taken.stages == []
    assert torch.equal(draft_logits(first), draft_logits(second))
    assert torch.equal(*[engine.backend.open(9).prefill(PROMPT).logits for engine in (first, second)])
    assert first.memory.low_bit == second.memory.low_bit > 0
    assert first.memory.weights == second.memory.weights > 0


@needs_kernels
def test_the_transformers_backend_never_takes_what_was_made_of_another_checkpoint(other: Path) -> None:
    prepared(other)
    saved_mixture(other, seed=1)
    changed, made = prepared(other)
    fresh, _ = prepared(other, weight_cache=False)
    assert made.steps > 0
    assert torch.equal(draft_logits(changed), draft_logits(fresh))


@needs_kernels
def test_the_transformers_backend_keeps_nothing_without_the_weight_cache(other: Path) -> None:
    prepared(other, weight_cache=False)
    assert kept() == kept("weights in blocks") == []


@needs_kernels
def test_the_transformers_backend_makes_again_what_it_cannot_read(
    other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = prepared(other)
    for file in (*kept(), *kept("weights in blocks")):
        tensors, key = load_file(file), key_of(file)
        name = next(name for name in tensors if "experts.5" in name and tensors[name].dim() > 1)
        tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, file, metadata={"key": key})
    second, _ = prepared(other)
    assert caplog.text.count("are not those of this model") == 2
    assert torch.equal(draft_logits(first), draft_logits(second))


@needs_kernels
def test_one_checkpoint_on_both_backends_keeps_both(model: Path) -> None:
    native, _ = prepared(model)
    cache = WeightCache.of(native.model, model)
    backend = KernelBackend(native.model, None, cache)
    backend.prepare(LOW)
    assert len(kept()) == len(kept("weights in blocks")) == 2


# ---- What identifies a model


def identities_of_changes(directory: Path) -> list[str]:
    """What identifies a model's weights: at first, and after each of several changes to its files."""

    def identity(dtype: torch.dtype = torch.float32) -> str:
        model = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32, dtype=dtype)
        return identify_weights(model, directory)

    file, config = directory / "model.safetensors", directory / "config.json"
    found = [identity(), identity(torch.bfloat16)]
    status, content = file.stat(), file.read_bytes()
    with file.open("r+b") as writing:  # one value between the samples, and the times of before
        writing.seek(-2, os.SEEK_END)
        writing.write(b"\x01\x01")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    found.append(identity())
    file.with_suffix(".new").write_bytes(content)
    os.utime(file.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    file.with_suffix(".new").replace(file)
    found.append(identity())
    os.utime(file)
    found.append(identity())
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    found.append(identity())
    return found


def test_any_change_of_a_file_is_another_model(tmp_path: Path) -> None:
    found = identities_of_changes(saved(tmp_path))
    assert len(set(found)) == len(found) == 6


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    """Even where the files say nothing, the loaded weights do."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
    directory = saved(tmp_path)
    same = [identify_weights(tiny_model("llama", seed=0, **sizes), directory) for _ in range(2)]
    assert same[0] == same[1] != identify_weights(tiny_model("llama", seed=1, **sizes), directory)


@needs_kernels
def test_the_key_takes_whatever_decides_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [kept_copies.copies_cache_key()]
    for name, value in (
        ("_VERSION", 0),
        ("GROUP_SIZE", 32),
        ("NUM_RANGES", 8),
        ("MIN_IMPORTANCE", 0.1),
        ("SAMPLE_TOKENS", 8),
        ("uses_tiles", lambda: not binding.uses_tiles()),
        ("kernels", lambda: type("Kernels", (), {"knn_ssd_lanes": staticmethod(lambda: 4)})),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(kept_copies, name, value)
            keys.append(kept_copies.copies_cache_key())
    assert len(set(keys)) == len(keys) == 8


GOLDEN = {  # by lanes
    8: "fc75a9a2be2859d3",
    16: "97f0e94719777a20",
}


@needs_kernels
def test_copies_change_with_their_version_only() -> None:
    """Whoever changes how copies are made increases `kept_copies._VERSION`, so that none made before is taken."""
    digest = hashlib.sha256(f"{kept_copies._VERSION}".encode())
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(160, 40, bias=False, dtype=dtype)
        numbers = torch.arange(40 * 160).view(40, 160)
        with torch.no_grad():
            linear.weight.copy_((numbers * 37 % 101 - 50) / 64 / (1 + numbers % 7))
        importance = 1 + torch.arange(160) % 5 / 2
        keeper = TensorKeeper()
        for tensor in quantise(make_matrix(linear.weight, None, keeper), importance):
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[kernels().knn_ssd_lanes()]


# ---- Files that cannot be used


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


def of_something_else(content: bytes) -> bytes:
    return content.replace(b"4-bit copies", b"8-bit copies")


UNUSABLE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "header alone": lambda content: content[:100],
    "torn": torn,
    "without its end": lambda content: content[:-1],
    "text": lambda _: b"this is no safetensors file at all",
    "of something else": of_something_else,
}


@needs_kernels
@pytest.mark.parametrize("change", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_file_is_made_again_with_a_warning(
    change: Callable[[bytes], bytes], model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = prepared(model)
    (file,) = kept()
    good = file.read_bytes()
    bad = change(good)
    file.unlink()
    file.write_bytes(bad)
    with caplog.at_level(logging.WARNING):
        second, made = prepared(model)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(file) in caplog.text
    assert made.steps == 4 * 7 + 1
    assert torch.equal(draft_logits(first), draft_logits(second))
    assert file.read_bytes() == good


@needs_kernels
@pytest.mark.parametrize("change", ["shape", "dtype", "name", "missing", "one more"])
def test_tensors_of_other_forms_never_reach_the_kernels(
    change: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared(model)
    (file,) = kept()
    tensors = load_file(file)
    name = next(iter(tensors))
    if change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.int32)
    elif change in ("name", "missing"):
        moved = tensors.pop(name)
        tensors |= {"another": moved} if change == "name" else {}
    else:
        tensors["another"] = torch.zeros(1)
    WeightCache.of(Engine.from_pretrained(model, device="cpu").model, model).store(
        kept_copies.copies_cache_key(), tensors
    )
    with caplog.at_level(logging.WARNING):
        _, made = prepared(model)
    assert "are not those of this model" in caplog.text
    assert made.steps == 4 * 7 + 1
    assert prepared(model)[1].stages == []


@needs_kernels
def test_a_cache_that_cannot_be_written_is_one_warning(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache_directory().mkdir()
    weights_folder().write_text("in the way")
    with caplog.at_level(logging.WARNING):
        engine, made = prepared(model)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert made.steps == 4 * 7 + 1
    output = engine.generate(PROMPT, max_new_tokens=12)
    assert output.token_ids == engine.generate(PROMPT, max_new_tokens=12, plain=True).token_ids


FULL_DISK = """
import resource, sys, logging
from knn_ssd.engine import Engine
engine = Engine.from_pretrained(sys.argv[1], device="cpu")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
engine.prepare()
print(engine.memory.low_bit)
"""


@needs_kernels
@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_full_disk_is_one_warning_and_leaves_nothing(model: Path) -> None:
    share_kernels(cache_directory())
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(model)], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10_000
    assert done.stderr.count("cannot be kept") == 1
    assert kept() == []


# ---- Choices


@needs_kernels
def test_nothing_is_kept_without_the_weight_cache(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(model, weight_cache=False)
    assert kept() == []
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    prepared(model)
    assert kept() == []


@needs_kernels
@pytest.mark.parametrize("option", [[], ["--no-weight-cache"]])
def test_the_command_line_keeps_copies_unless_told_not_to(
    option: list[str], model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "1")  # restored afterwards, whatever the command sets
    command = ["generate", "--model", str(model), "--prompt", "a fox", "--max-new-tokens", "4", *option]
    assert main(command) == 0
    assert len(kept()) == (0 if option else 1)
    first = capsys.readouterr()
    assert main(command) == 0
    second = capsys.readouterr()
    assert first.out == second.out
    assert "making 4-bit copies" in first.err
    assert ("making 4-bit copies" in second.err) == bool(option)


@needs_kernels
def test_plain_decoding_makes_no_copies(model: Path) -> None:
    assert main(["generate", "--model", str(model), "--prompt", "a fox", "--max-new-tokens", "2", "--plain"]) == 0
    assert kept() == []


@pytest.mark.parametrize(("text", "limit"), [("", 32), ("0", 0), ("1.5", 1.5), ("64", 64)])
def test_the_limit_is_read_from_the_environment(text: str, limit: float) -> None:
    assert limit_gib({LIMIT_VARIABLE: text}) == limit
    assert limit_gib({}) == 32


@pytest.mark.parametrize("text", ["-1", "off", "nan", "inf", "1 GiB"])
def test_a_limit_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"{LIMIT_VARIABLE} must be a number of GiB, 0 or more, got '{text}'"):
        limit_gib({LIMIT_VARIABLE: text})


# ---- Any tensors

ONE = {"a": torch.arange(1000, dtype=torch.int16), "b": torch.ones(3, 4)}  # 2,048 bytes
SIZE = 2_048


def test_what_is_stored_under_a_key_is_found_under_that_key_only(tmp_path: Path) -> None:
    cache = WeightCache("model", tmp_path / "new", 10**6)
    assert cache.load("packed") is None
    cache.store("packed", ONE)
    found = cache.load("packed")
    assert found is not None
    assert all(torch.equal(tensor, found[name]) for name, tensor in ONE.items())
    assert cache.load("pack") is None
    assert WeightCache("another model", tmp_path / "new", 10**6).load("packed") is None
    cache.store("packed", {"a": torch.zeros(2)})
    assert list(cache.load("packed") or {}) == ["a"]
    assert torch.equal(found["a"], ONE["a"]), "what is mapped stays as it was"


def test_the_least_recently_used_files_go_first(tmp_path: Path) -> None:
    cache = WeightCache("model", tmp_path, 4 * SIZE)
    for age, key in enumerate(["one", "two", "three"]):
        cache.store(key, ONE)
        os.utime(cache._path(key), (age, age))
    assert cache.load("one") is not None  # now the most recently used
    cache.store("four", ONE)
    assert [key for key in ("one", "two", "three", "four") if cache.load(key) is not None] == ["one", "three", "four"]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4 * SIZE


def test_what_is_larger_than_the_bound_is_not_stored_and_removes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    WeightCache("model", tmp_path, 4 * SIZE).store("one", ONE)
    small = WeightCache("model", tmp_path, SIZE - 1)
    small.store("two", ONE)
    assert LIMIT_VARIABLE in caplog.text
    assert small.load("two") is None
    assert small.load("one") is not None


def test_what_killed_writers_left_is_removed_a_day_later(tmp_path: Path) -> None:
    for name, age in (("old", 0), ("new", None)):
        (tmp_path / f".{name}").mkdir()
        save_file(ONE, tmp_path / f".{name}" / "part.safetensors")
        if age is not None:
            os.utime(tmp_path / f".{name}", (age, age))
    WeightCache("model", tmp_path, 10 * SIZE).store("key", ONE)
    assert not (tmp_path / ".old").exists()
    assert (tmp_path / ".new" / "part.safetensors").exists()


def test_readers_never_see_half_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, ended = WeightCache("model", tmp_path, 10**7), threading.Event()
    values = [{"a": torch.full((10_000,), float(i))} for i in range(2)]

    def write() -> None:
        for i in range(40):
            cache.store("key", values[i % 2])
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not ended.is_set():
        if (found := cache.load("key")) is not None:
            seen += 1
            assert found["a"].unique().numel() == 1
    writer.join()
    assert seen > 0
    assert caplog.text == ""
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
