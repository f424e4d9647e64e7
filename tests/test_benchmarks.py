"""The scripts under benchmarks/ run with the code that they measure."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import torch
from gguf import GGUFReader
from gguf_files import write_family, write_gguf

from knn_ssd import Engine
from knn_ssd.backends.native.obstacles import native_obstacle
from knn_ssd.calibrate import cost
from knn_ssd.kernels import binding
from knn_ssd.kernels.threads import THREADS_VARIABLE, thread_count, usable_cpus
from knn_ssd.loading.resolve import load_model
from knn_ssd.outputs import Generation, Stream
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.tokenization import PromptLike

FOLDER = Path(__file__).parents[1] / "benchmarks"


class Run:
    """Runs scripts in this process, which saves their imports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(cost, "_MIN_TOTAL_SEC", 0.0)  # precise costs do not matter here

    def __call__(self, script: str, *options: str, code: int = 0) -> str:
        """Runs a script, checks its exit code, and returns what it printed."""
        self._monkeypatch.setattr(sys, "argv", [script, *options])
        ended, threads = 0, torch.get_num_threads()
        try:
            runpy.run_path(str(FOLDER / script), run_name="__main__")
        except SystemExit as end:
            ended = int(end.code or 0)
        finally:
            torch.set_num_threads(threads)
        assert ended == code
        return self._capsys.readouterr().out


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("[!_]*.py")))
def test_a_script_prints_its_usage(run: Run, script: str) -> None:
    assert "usage:" in run(script, "--help")


@pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
def test_kernels_are_timed(run: Run) -> None:
    shown = run("kernels.py", "--rows", "64", "--cols", "128")
    assert "native, bfloat16" in shown
    assert "native, 4 bits" in shown


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The folder of a tiny model, and a file of prompts of two domains."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "model")
    tiny_tokenizer(chat=True).save_pretrained(folder / "model")
    prompts = [
        {"id": f"{domain}-{number}", "domain": domain, "prompt": f"{symbol * 8} {number} {symbol * number}"}
        for domain, symbol in (("letters", "abc"), ("signs", "%&"))
        for number in range(1, 5)
    ]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), "utf-8")
    return str(folder / "model"), str(file)


def rows(shown: str) -> list[list[str]]:
    """The cells of the Markdown tables in what a script printed, without their heads' rules."""
    lines = [line for line in shown.splitlines() if line.startswith("|") and "--:|" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_best_score_is_printed_by_strategy_and_budget(run: Run, tiny: tuple[str, str]) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--domain", "letters", "--trials", "16", "--limit", "1"]
    head, *found = rows(run("budget.py", *options, "--strategies", "greedy", "bayes", "--max-new-tokens", "8"))
    assert head == ["strategy", "8 plans", "16 plans"]
    assert [row[0] for row in found] == ["`greedy`", "`bayes`"]
    assert all(float(row[1]) <= float(row[2]) for row in found)


@pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
def test_weights_as_they_are_and_unpacked_are_compared(run: Run, tiny: tuple[str, str]) -> None:
    options = ["--model", tiny[0], "--prompts", tiny[1], "--limit", "2", "--max-new-tokens", "8"]
    head, *found = run("formats.py", *options, "--unpacked", "bfloat16").splitlines()
    assert head.startswith("weights")
    assert [row.split()[0] for row in found] == ["as", "bfloat16"]
    assert all("2 of 2" in row for row in found)


@pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
def test_values_of_a_file_are_checked(run: Run, tiny: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_family(file, "llama", "llama", lambda name: "Q5_0" if "q_proj" in name else "Q8_0", splitting="smollm")
    shown = run("formats.py", "--model", str(file), "--prompts", tiny[1], "--check", "--max-new-tokens", "8")
    assert "Q5_0: 2 of 2 matrices" in shown
    assert "Q8_0: 14 of 14 matrices" in shown


def test_a_gguf_file_is_written_anew_in_another_type(run: Run, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    run("requantised.py", str(tmp_path / "new.gguf"), "--source", str(file), "--type", "Q8_0")
    before, after = (GGUFReader(path) for path in (file, tmp_path / "new.gguf"))
    assert {name: field.contents() for name, field in after.fields.items() if not name.startswith("GGUF")} == {
        name: field.contents() for name, field in before.fields.items() if not name.startswith("GGUF")
    }
    assert {tensor.tensor_type.name for tensor in after.tensors} == {"F32", "Q8_0"}
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]


def test_another_order_of_dimensions_is_the_same_model(run: Run, tmp_path: Path) -> None:
    file = write_family(tmp_path / "tiny.gguf", "qwen2", "qwen2", lambda _: "Q8_0", splitting="smollm", head_dim=None)
    options = ["--source", str(tmp_path / "tiny.gguf"), "--type", "F16"]
    run("requantised.py", str(tmp_path / "same.gguf"), *options)
    run("requantised.py", str(tmp_path / "other.gguf"), *options, "--shuffled")
    same, other = (load_model(tmp_path / f"{name}.gguf", dtype="float32").model for name in ("same", "other"))
    ids = torch.arange(3, 83)[None]
    torch.testing.assert_close(other(ids).logits, same(ids).logits, rtol=1e-2, atol=1e-2)
    changed = {name for name, weight in same.state_dict().items() if not torch.equal(weight, other.state_dict()[name])}
    assert {name for name, weight in file.state_dict().items() if weight.dim() > 1} <= changed


def test_agreement_is_printed_by_share_of_skipped_sublayers(run: Run, tiny: tuple[str, str]) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--shares", "0.25", "0.75", "--thresholds", "0", "0.9"]
    head, *found = rows(run("skipping.py", *options, "--max-new-tokens", "8"))
    assert len(head) == 4
    assert [row[0] for row in found] == ["1 of 4", "3 of 4"]
    assert float(found[0][1]) >= float(found[1][1])


@pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
def test_agreement_is_printed_by_rounding(run: Run, tiny: tuple[str, str], tmp_path: Path) -> None:
    wide = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32)
    wide.save_pretrained(tmp_path)
    tiny_tokenizer(chat=True).save_pretrained(tmp_path)
    options = ["--prompts", tiny[1], "--limit", "2", "--max-new-tokens", "8", "--fitting", "2", "--ranges"]
    head, *found = rows(run("rounding.py", "--model", str(tmp_path), *options, "--by-domain"))
    assert head == ["rounding", "seconds", "agreement", "divergence", "letters", "signs"]
    assert [row[0] for row in found][-3:] == ["fitted to all domains", "fitted to letters", "fitted to signs"]
    assert len(found) == 1 + 5 + 3
    assert all(0 <= float(row[2]) <= 1 and float(row[3]) >= 0 for row in found)


@pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
def test_agreement_of_the_upper_bits_of_a_file_is_printed(run: Run, tiny: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_family(file, "llama", "llama", lambda _: "Q8_0", splitting="smollm", head_dim=32)
    options = ["--prompts", tiny[1], "--limit", "2", "--max-new-tokens", "8", "--fitting", "2", "--upper-bits"]
    _, *found = rows(run("rounding.py", "--model", str(file), *options))
    own = {name: float(divergence) for name, _, _, divergence, *_ in found}
    assert list(own) == ["first start", "upper bits", "upper bits, blocks fitted", "fitted to all domains"]
    assert all(0 < divergence < 3 for divergence in own.values())


def test_foreign_prompts_and_an_atlas_that_does_not_fit_are_measured(
    run: Run, tiny: tuple[str, str], tmp_path: Path
) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--max-new-tokens", "8", "--limit", "1"]
    shown = run("foreign.py", *options, "--out", str(tmp_path), "--known", "letters", "--minutes", "0.005",
                "--methods", "plain", "auto")  # fmt: skip
    assert "different from plain: []" in shown
    assert ["signs, foreign", "1"] in [row[:2] for row in rows(shown)]
    assert (tmp_path / "run" / "report.html").is_file()
    shown = run("never_slower.py", *options, "--atlas", str(tmp_path / "atlas"), "--least", "0")
    head, *found = rows(shown)
    assert head == ["method", "letters", "signs", "all"]
    assert [row[0] for row in found][3:] == ["atlas atlas", "method", "atlas atlas"]
    assert found[4] == head
    first, second = shown.split("over default settings without an atlas")
    for part, own in ((first, found[:4]), (second, found[5:])):
        assert f"smallest: {min(float(cell) for row in own for cell in row[1:]):.3f}" in part
    run("never_slower.py", *options, "--least", "1000", code=1)


@pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
def test_a_model_of_a_large_one_s_shape_is_started_and_measured(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    options = ["--out", str(folder), "--layers", "2", "--hidden", "128", "--vocabulary", "512", "--repeats", "1"]
    shown = run("scale.py", *options)
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]
    figures = {line[0]: line[1:] for line in lines}
    assert {"weights", "loading", "4-bit copies", "peak memory", "plain step", "17 rows"} <= set(figures)
    assert figures["plain step"][0].endswith("ms")
    assert "second start" in figures["loading"][1]
    assert load_model(folder).model.config.intermediate_size == 384
    run("scale.py", "--out", str(folder), "--layers", "3", "--hidden", "128", code=2)


def test_the_costs_of_an_answer_store_are_printed(run: Run) -> None:
    options = ["--dimensions", "32", "--prompt-tokens", "30", "--answer-tokens", "20"]
    head, *found = rows(run("answers.py", "--requests", "50", "200", *options))
    assert len(head) == 9
    assert [row[0] for row in found] == ["50", "200"]
    assert all(float(row[5]) == pytest.approx(sum(map(float, row[1:5])), abs=0.03) for row in found)


def test_arms_of_earlier_answers_are_compared(run: Run, tiny: tuple[str, str], tmp_path: Path) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--out", str(tmp_path / "run"), "--max-new-tokens", "12"]
    shown = run("recurring.py", *options)
    assert "the same as plain decoding: 48 of 48" in shown  # 8 prompts, 5 arms and plain decoding
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    copied = {record["method"] for record in records if record["drafted"].get("retrieval")}
    assert "nearest" in copied
    assert not copied & {"plain", "auto"}
    assert "Along the stream" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_outputs_are_compared_batched_and_alone(
    run: Run, tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--limit", "4", "--clients", "3", "--max-new-tokens", "12"]
    shown = run("identity.py", *options)
    assert "all            8 of 8 outputs the same" in shown
    assert "plain decoding alone: 1 of 1 the same as batched" in shown
    right = Engine.stream

    def wrong(engine: Engine, prompt: PromptLike, **asked: Any) -> Stream:
        return right(engine, prompt, **{**asked, "max_new_tokens": 12 if asked.get("plain") else 11})

    monkeypatch.setattr(Engine, "stream", wrong)
    assert "all            8 of 8" not in run("identity.py", *options, code=1)


@pytest.mark.parametrize(("growth_mib", "changed", "code"), [(0, False, 0), (100, False, 1), (0, True, 1)])
def test_a_server_whose_memory_grows_or_whose_answers_change_fails_the_soak(
    run: Run,
    tiny: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    growth_mib: int,
    changed: bool,
    code: int,
) -> None:
    """The server, its answers and their number are real, its memory is not: a few seconds do not fill a cache."""
    model, prompts = tiny
    minutes, started = 0.06, time.monotonic()

    def memory(_process: psutil.Process) -> SimpleNamespace:
        return SimpleNamespace(rss=(500 + growth_mib * (time.monotonic() - started) / (60 * minutes)) * 2**20)

    monkeypatch.setattr(psutil.Process, "memory_info", memory)
    if changed:
        monkeypatch.setattr(httpx.Response, "json", lambda _: {"choices": [{"message": {"content": "something else"}}]})
    options = ["--model", model, "--prompts", prompts, "--minutes", str(minutes), "--clients", "3"]
    picture = tmp_path / "soak.svg"
    shown = run("soak.py", *options, "--max-new-tokens", "8", "--out", str(picture), code=code)
    assert "The memory is not level." in shown if growth_mib else "The memory is level." in shown
    assert ("fault: prompt" in shown) == changed
    assert re.search(r"memory: \d+\.\d MiB at the start, \d+\.\d after a quarter, \d+\.\d at the end", shown)
    assert "<svg" in picture.read_text("utf-8")
    if not changed:
        assert all(way in shown for way in ("whole", "streamed", "sampled", "left", "bad"))


@pytest.mark.parametrize(("last", "level"), [(99, True), (116, True), (117, False)])
def test_memory_is_level_if_the_last_quarter_is_hardly_above_the_second(last: float, level: bool) -> None:
    soak = runpy.run_path(str(FOLDER / "soak.py"))
    samples = [soak["Sample"](minute, [20, 100, 300, last][minute // 10]) for minute in range(40)]
    assert soak["quarters"](samples) == [20, 100, 300, last]
    assert soak["is_level"](100, last) == level
    assert soak["is_level"](1000, 1029)
    assert not soak["is_level"](1000, 1031)


def test_speeds_are_printed_by_temperature_and_method(run: Run, tiny: tuple[str, str], tmp_path: Path) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--limit", "1", "--max-new-tokens", "6"]
    options += ["--temperatures", "0", "1", "--methods", "plain", "auto", "--out", str(tmp_path)]
    head, *found = rows(run("sampling.py", *options))
    assert head[:3] == ["temperature", "method", "accepted"]
    assert [row[:2] for row in found] == [[t, f"`{name}`"] for t in ("0", "1") for name in ("plain", "auto")]
    assert found[1][-1] == "1.00", "greedy output is that of plain decoding"
    asked = [json.loads((tmp_path / f"temperature-{t}" / "run.json").read_text())["temperature"] for t in (0, 1)]
    assert asked == [0, 1]


def test_speeds_are_printed_by_length_and_one_beyond_the_context_is_left_out(
    run: Run, tiny: tuple[str, str], tmp_path: Path
) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--limit", "1", "--max-new-tokens", "6", "--out", str(tmp_path)]
    shown = run("lengths.py", *options, "--lengths", "60", "4096", "--methods", "plain", "lookup")
    assert "4096 tokens are left out: with the answer it is over the model's context of 256" in shown
    _, *found = rows(shown)
    expected = [[length, f"`{name}`"] for length in ("as they are", "60") for name in ("plain", "lookup")]
    assert [row[:2] for row in found] == expected
    assert all(row[-1] == "1.00" for row in found), "the answers are the same with any drafter"


def test_conversations_are_the_same_with_any_drafts_and_with_a_prefix_cache(run: Run, tiny: tuple[str, str]) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--limit", "1", "--max-new-tokens", "6", "--turns", "2"]
    _, *found = rows(run("chats.py", *options))
    ways = ["plain", "auto", "plain, cache", "auto, cache"]
    assert [row[:2] for row in found] == [[turn, way] for turn in ("1", "2", "all") for way in ways]
    assert {row[-1] for row in found} == {"0"}
    if (
        native_obstacle(tiny_model("llama", num_hidden_layers=2)) is None
    ):  # the native backend, which has a prefix cache
        assert all(float(row[2]) > 0.3 for row in found if row[0] == "2" and "cache" in row[1])


def test_forced_drafts_are_compared_with_none_and_with_plain_decoding(run: Run, tiny: tuple[str, str]) -> None:
    shown = run("structured.py", "--model", tiny[0], "--repeats", "1", "--limit", "1")
    assert "all outputs the same: yes" in shown
    assert [line.split("  ")[0] for line in shown.splitlines()[2:5]] == ["forced drafts", "without", "plain"]
    assert shown.count("forced drafts are ") == 2


def test_grammar_libraries_are_judged_by_valid_and_invalid_instances(
    run: Run, tiny: tuple[str, str], tmp_path: Path
) -> None:
    groups = [
        {"schema": {"type": "string", "maxLength": 2}, "tests": [("ab", True), ("abc", False), (1, False)]},
        {"schema": {"type": "string"}, "tests": [("ab", False)]},
        {"schema": {"type": "string"}, "tests": [(1, True)]},
        {"schema": {"uniqueItems": True}, "tests": [([1], True)]},
        {"schema": {"$ref": "http://localhost/other"}, "tests": [(1, True)]},
    ]
    for group in groups:
        group["tests"] = [{"data": data, "valid": valid} for data, valid in group["tests"]]  # type: ignore[misc]
    files = {"suite/tests/draft2020-12/type.json": groups, "store/jsondata/a.json": {"items": {"enum": [1, 2]}}}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps(content))
    options = ["--model", tiny[0], "--libraries", "llguidance"]
    shown = run("grammars.py", "--suite", str(tmp_path / "suite"), "--store", str(tmp_path / "store"), *options)
    assert "4 schemas: accepts an invalid 1, not compiled 1, refuses a valid 1, right 1" in shown
    assert "SchemaStore, llguidance: 1 schemas: compiled 1" in shown


def test_planted_redundancy_is_measured_in_streams(run: Run, tmp_path: Path) -> None:
    """The methods skip what the search found, whatever judging would come to."""
    options = ["--out", str(tmp_path), "--limit", "1", "--calibrating", "2", "--trials", "4", "--max-new-tokens", "8"]
    shown = run("planted.py", *options, "--ratios", "0", "1")
    assert shown.count("3 prompts, different from plain: []") == 2
    head, *found = rows(shown)
    assert head[1:] == ["ratio 0, 95 %", "accepted", "ratio 1, 95 %", "accepted"]
    assert [row[0] for row in found] == ["`plain`", "`self-sd-fix`", "`self-sd-mix`", "`knn-ssd`"]
    assert (tmp_path / "ratio-1" / "report.html").is_file()


@pytest.mark.parametrize(("drafted_ms", "least", "code"), [(4.0, "0.9", 0), (16.0, "0.9", 1), (4.0, "1.1", 1)])
def test_a_busy_machine_fails_the_promise_if_a_share_or_a_gain_is_too_small(
    run: Run, tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch, drafted_ms: float, least: str, code: int
) -> None:
    """The conditions and outputs are real, the durations are not: here nobody knows what a busy machine comes to."""
    real = Engine.generate

    def timed(engine: Engine, prompt: PromptLike, **asked: Any) -> Generation:
        result = real(engine, prompt, **asked)
        seconds = (8.0 if asked.get("plain") else drafted_ms) * (len(result.token_ids) - 1) / 1e3
        return replace(result, stats=replace(result.stats, decode_sec=seconds))

    monkeypatch.setattr(Engine, "generate", timed)
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--limit", "1", "--repeats", "1", "--max-new-tokens", "8"]
    _, *found = rows(run("busy.py", *options, "--least", least, code=code))
    expected = ["8.00", "1.00", f"{drafted_ms:.2f}", f"{8 / drafted_ms:.2f}"]
    assert found == [[each, *expected] for each in ("quiet", "busy, same session", "busy, other session")]


def can_limit() -> bool:
    """Whether a control group can be made here that limits CPU time."""
    version_1 = Path("/sys/fs/cgroup/cpu")
    group = (version_1 if version_1.is_dir() else version_1.parent) / f"knn-ssd-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return False
    limits = (group / "cpu.cfs_quota_us").is_file() or (group / "cpu.max").is_file()
    group.rmdir()
    return limits


@pytest.mark.skipif(not can_limit(), reason="no control group with a CPU quota can be made here")
def test_a_quota_holds_for_the_length_of_its_block() -> None:
    code = f"""
import json, runpy, time
from knn_ssd.kernels.binding import num_threads, set_threads
from knn_ssd.kernels.threads import thread_count
busy = runpy.run_path({str(FOLDER / "busy.py")!r})
set_threads(3)
for condition in busy["QUOTA_CONDITIONS"]:
    with busy["limited"](0.5, condition):
        inside, end, used = [thread_count().threads, num_threads()], time.monotonic() + 0.5, time.process_time()
        while time.monotonic() < end:
            pass
        used = time.process_time() - used
    print(json.dumps([condition, inside, [thread_count().threads, num_threads()], used]))
"""
    environment = {name: value for name, value in os.environ.items() if name != THREADS_VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    quiet, quota, ignorant = map(json.loads, done.stdout.splitlines())
    free = [thread_count(environment=environment).threads, 3]
    assert quiet[:3] == ["quiet", free, free]
    assert quota[:3] == ["quota", [1, 1], free]
    assert ignorant[:3] == ["quota, a thread for every CPU", [1, usable_cpus()], free]
    assert max(quota[3], ignorant[3]) < 0.4, "half a CPU for half a second, and at most a period's share more"


@pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
def test_keys_and_values_in_bfloat16_are_compared_with_float32(run: Run, tiny: tuple[str, str], tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=128, intermediate_size=192, head_dim=32, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--prompts", tiny[1], "--tokens", "40", "150", "--scored", "16"]
    options += ["--repeats", "2", "--steps", "6", "--rows", "3", "--threads", "1"]
    head, *found = rows(run("long_context.py", *options, "--out", str(tmp_path / "rows.json")))
    assert [row[:2] for row in found] == [[n, dtype] for n in ("40", "150") for dtype in ("float32", "bfloat16")]
    assert head.count("over float32") == 2
    written = json.loads((tmp_path / "rows.json").read_text())["rows"]
    for wide, narrow in zip(written[::2], written[1::2], strict=True):
        assert (wide["agreement"], wide["divergence"]) == (1.0, 0.0)
        assert 0 < narrow["divergence"] < 0.01
        assert wide["exact_bytes"] == 2 * narrow["exact_bytes"]
        assert wide["token_bytes"] - wide["exact_bytes"] == narrow["token_bytes"] - narrow["exact_bytes"] > 0
        assert len(narrow["step_ms"]) == len(narrow["pass_ms"]) == 2
    run("long_context.py", *options[:-6], "--scored", "40", code=2)
    run("long_context.py", "--model", str(tmp_path / "model"), "--tokens", "250", "--scored", "16", code=2)


def test_an_accelerator_is_measured_or_its_absence_told(run: Run, tmp_path: Path) -> None:
    sizes = ["--width", "64", "--layers", "3", "--new-tokens", "16"]
    models = ["--models", "random:llama", "random:gpt_neox"]
    shown = run("accelerator.py", "--device", "cpu", *models, *sizes, "--out", str(tmp_path / "rows.json"))
    assert "bfloat16" in shown
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * 2 * 5
    assert {row["way"] for row in rows} == {"generate", "plain", "skip", "lookup", "default"}
    for row in rows:
        assert row["equal"] == row["outputs"] or row["dtype"] == "bfloat16"
        assert (row["drafted"] > 0) == (row["way"] not in ("generate", "plain")) or row["way"] == "default"
        assert row["tokens_per_sec"] > 0
        assert row["memory_mb"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_script_says_so(run: Run) -> None:
    assert "There is no CUDA device here" in run("accelerator.py", code=2)
