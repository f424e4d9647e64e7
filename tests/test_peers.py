"""Other programs in a benchmark's tables: their files are merged and checked, and their scripts write real records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import endless, endless_tokenizer, imported_script

from knn_ssd.bench.peers import APART, read_peers, read_run
from knn_ssd.bench.records import Record, read_records
from knn_ssd.cli import main
from knn_ssd.engine import Engine
from knn_ssd.errors import BenchError
from knn_ssd.testing import tiny_model

FOLDER = Path(__file__).parents[1] / "benchmarks" / "peers"
SCRIPTS = sorted(path.name for path in FOLDER.glob("run_*.py"))
SERVERS = sorted(path.name for path in FOLDER.glob("serve_*.py"))
PROMPTS = [("s0", "story", "once upon a time"), ("m0", "math", "3 + 4 = ")]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(endless(tiny_model()), endless_tokenizer())


@pytest.fixture
def bench(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that measures into `tmp_path/run`, run once."""
    monkeypatch.setattr(Engine, "from_pretrained", lambda name, **options: engine)
    file = tmp_path / "prompts.jsonl"
    lines = [{"id": name, "domain": domain, "prompt": prompt} for name, domain, prompt in PROMPTS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["bench", "--model", "tiny", "--prompts", str(file), "--max-new-tokens", "12", "--methods", "plain"]
    command += ["--out", str(tmp_path / "run")]
    assert main(command) == 0
    return command


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the scripts share."""
    return imported_script(monkeypatch, FOLDER, "common")


def parrot(folder: Path) -> Any:
    """A program with the output of plain decoding, which goes on after its end."""
    said = {r.place: list(r.token_ids) for r in read_records(folder / "records.jsonl") if r.method == "plain"}
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    known = {tuple(line["token_ids"]): said[line["place"]] for line in lines}

    def generate(token_ids: list[int], count: int) -> tuple[list[int], dict[str, Any]]:
        return known.get(tuple(token_ids), [5] * count)[:count], {"prefill_sec": 1e-9, "drafted": {"lookup": 2}}

    return generate


def test_a_run_writes_its_prompts_for_other_programs(bench: list[str], engine: Engine, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [0, 1]
    for line in lines:
        assert (line["id"], line["domain"]) in [(name, domain) for name, domain, _ in PROMPTS]
        assert line["token_ids"] == engine.encode(next(p for name, _, p in PROMPTS if name == line["id"]))
    assert "eos_token_ids" in json.loads((tmp_path / "run" / "run.json").read_text())


def test_records_of_other_programs_are_shown_when_the_run_is_asked_for_again(
    bench: list[str], common: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    own = (out / "records.jsonl").read_text()
    page = (out / "report.html").read_text()
    assert APART not in page
    jobs = common.read_jobs(out)
    assert [job.count for job in jobs] == [12, 12]
    common.measure(out, "other", jobs, parrot(out))
    common.measure(out, "other-4", jobs, lambda token_ids, count: ([7] * count, {}), lossy=True)
    capsys.readouterr()
    assert main(bench) == 0, "the output of another program may differ"
    shown = capsys.readouterr()
    assert "other-4 (lossy)" in shown.out
    assert f"note: other, other-4: {APART}" in shown.err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["peers"] == ["other", "other-4"]
    assert summary["differing"] == []
    figures = summary["methods"]
    assert {name: own["lossy"] for name, own in figures.items()} == {"plain": False, "other": False, "other-4": True}
    assert figures["other"]["identical_to_plain"] == 1.0
    assert not figures["other"]["lossless"]
    assert figures["other-4"]["identical_to_plain"] == 0.0
    assert figures["other"]["speedup"] > 0
    page = (out / "report.html").read_text()
    assert "other-4 (lossy)" in page
    assert "other (lossy)" not in page
    assert page.count(APART) == 1
    assert (out / "records.jsonl").read_text() == own, "a run's own records stay its own"
    assert {record.method for record in read_run(out)} == {"plain", "other", "other-4"}


def test_a_script_writes_records_of_the_schema(bench: list[str], common: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    common.measure(out, "other", common.read_jobs(out), parrot(out), lossy=True)
    lines = [json.loads(line) for line in (out / "peers" / "other.jsonl").read_text().splitlines()]
    for line in lines:
        record = Record.from_json(line)
        assert json.loads(json.dumps(record.to_json())).items() >= line.items(), "no unknown field"
        assert record.lossy
        assert not record.lossless
        assert record.total_sec > 0
        assert record.drafted == {"lookup": 2}
    assert not list((out / "peers").glob("*.part"))


def test_what_comes_after_the_end_is_cut_off(bench: list[str], common: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**run, "eos_token_ids": [9]}))
    common.measure(out, "other", common.read_jobs(out), lambda token_ids, count: ([4, 9, *[5] * (count - 2)], {}))
    assert [record.token_ids for record in read_records(out / "peers" / "other.jsonl")] == [(4, 9), (4, 9)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "x"}, "made for other prompts: this run has no 'x' at place 0"),
        ({"place": 5}, "at place 5"),
        ({"domain": "poem"}, "made for other prompts"),
        ({"method": "plain"}, "has records of the method 'plain'"),
        ({"total_sec": 0}, "line 1 is not a record"),
    ],
)
def test_records_that_do_not_fit_are_refused(
    bench: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "run"
    own = read_records(out / "records.jsonl")
    first = next(record for record in own if record.place == 0)
    (out / "peers").mkdir()
    path = out / "peers" / "other.jsonl"
    path.write_text(json.dumps({**first.to_json(), "method": "other", **change}) + "\n")
    with pytest.raises(BenchError, match=message) as error:
        read_peers(out, own)
    assert str(path) in str(error.value)
    assert main(bench) == 2
    assert message in capsys.readouterr().err


def test_a_script_refuses_what_it_cannot_compare(
    bench: list[str], common: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def refused(message: str, *call: Any) -> None:
        with pytest.raises(SystemExit) as end:
            call[0](*call[1:])
        assert end.value.code == 2
        assert message in capsys.readouterr().err

    refused("not the folder of a finished benchmark", common.read_jobs, tmp_path / "none")
    refused("not the directory of a model", common.kept, tmp_path, "x", None)
    jobs = common.read_jobs(out)
    refused("gave 3 tokens", common.measure, out, "short", jobs, lambda token_ids, count: ([1, 2, 3], {}))
    assert not (out / "peers").exists(), "records are written whole or not at all"
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**run, "temperature": 0.7}))
    refused("sampled at temperature 0.7", common.read_jobs, out)
    (out / "run.json").write_text(json.dumps(run))
    (out / "records.jsonl").write_text("")
    refused("no output of plain decoding for", common.read_jobs, out)


def test_a_converted_model_is_made_once(common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"dtype": "bfloat16"}')
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("whole")

    first = common.kept(model, "x.gguf", make)
    assert common.kept(model, "x.gguf", make) == first
    assert first.read_text() == "whole"
    assert len(made) == 1
    (model / "model.safetensors").write_text("other weights")
    assert common.kept(model, "x.gguf", make) != first
    assert common.weights_dtype(model) == "bfloat16"


def test_a_conversion_that_fails_ends_the_script_with_its_last_line(
    common: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    common.convert([sys.executable, "-c", "pass"], "nothing")
    with pytest.raises(SystemExit) as end:
        common.convert([sys.executable, "-c", "raise SystemExit('first\\nlast')"], "it cannot be converted")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: it cannot be converted: last\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_its_usage_without_its_program(script: str) -> None:
    done = subprocess.run([sys.executable, str(FOLDER / script), "--help"], capture_output=True, text=True, check=True)
    assert "RUN_FOLDER" in done.stdout
    assert (FOLDER / "requirements" / script.replace("run_", "").replace(".py", ".txt")).is_file()


@pytest.mark.parametrize("script", SERVERS)
def test_a_server_prints_its_usage_without_its_program(script: str) -> None:
    done = subprocess.run([sys.executable, str(FOLDER / script), "--help"], capture_output=True, text=True, check=True)
    assert "--port" in done.stdout
    assert script.replace("serve_", "run_") in SCRIPTS, "the program has an environment"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["other", "runs/first"], "there is no program 'other': choose llama_cpp"),
        (["serve", "other"], "there is no program 'other': choose llama_cpp"),
        (["serve", "economize"], "there is no server of 'economize' here: choose llama_cpp or vllm_cpu"),
    ],
)
def test_an_unknown_program_is_refused(words: list[str], message: str) -> None:
    environment = {"PATH": os.environ["PATH"]}
    command = ["sh", str(FOLDER / "run.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert message in done.stderr


def test_llama_cpp_says_that_a_gguf_file_is_not_there(tmp_path: Path) -> None:
    script, missing = FOLDER / "run_llama_cpp.py", tmp_path / "nowhere.gguf"
    command = [sys.executable, script, tmp_path, "--model", tmp_path, "--gguf", missing]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"there is no file '{missing}'" in done.stderr
