"""The comparison of servers under many clients: the load, the servers' start and end, and the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import imported_script
from openai import OpenAIError

from knn_ssd.testing import tiny_model, tiny_tokenizer

FOLDER = Path(__file__).parents[1] / "benchmarks"

# knn-ssd's server stands for that of another program, with an answer store, and so with other drafts.
SERVER = """
import os, sys
sys.path.insert(0, {folder!r})
from common import serving_parser

args = serving_parser("A server.").parse_known_args()[0]
options = ["--model", str(args.model), "--port", str(args.port), "--running", str(args.clients)]
os.execv(sys.executable, [sys.executable, "-m", "knn_ssd", "serve", *options, "--threads", str(args.threads)])
"""


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported_script(monkeypatch, FOLDER, "many_clients")


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """A tiny model, a file of prompts and a small load."""
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    lines = [{"prompt": f"{number} times {number} is"} for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    load = ["--clients", "1", "3", "--limit", "5", "--max-new-tokens", "6", "--rounds", "1", "--threads", "1"]
    files = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "rows.json")]
    return ["--model", str(tmp_path / "model"), *files, *load]


def run(clients: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["many_clients.py", *options])
    clients.main()


def row(clients: ModuleType, server: str, number: int, speed: float, **fields: Any) -> Any:
    rest = {"prompt_tokens": 30, "first_text_sec": (0.1, 0.3), "same": 2, "requests": 2, **fields}
    return clients.Row(server, "w", "k", 2, 4, number, 1.0, round(speed), tokens_per_sec=speed, **rest)


def test_servers_get_the_same_load_and_end(
    clients: ModuleType,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "server.py").write_text(SERVER.format(folder=str(FOLDER / "peers")))
    (tmp_path / "run.sh").write_text(f'shift 2\nexec "{sys.executable}" "{tmp_path / "server.py"}" "$@"\n')
    monkeypatch.setattr(clients, "RUN_PEER", tmp_path / "run.sh")
    started: list[Any] = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **b: started.append(start(*a, **b)) or started[-1])
    run(clients, monkeypatch, *options, "--servers", "knn-ssd", "llama-cpp-4")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(each["server"], each["clients"]) for each in rows] == [
        (server, count) for server in ("knn-ssd", "llama-cpp-4") for count in (1, 3)
    ]
    assert len({each["prompt_tokens"] for each in rows}) == 1
    assert len({each["tokens"] for each in rows}) == 1, "the same answers, by the usage that the server tells"
    assert 5 <= rows[0]["tokens"] <= 5 * 6
    for each in rows:
        assert each["same"] == each["requests"] == len(each["first_text_sec"]) == 5
        assert each["tokens_per_sec"] == pytest.approx(each["tokens"] / each["seconds"])
        assert 0 < max(each["first_text_sec"]) <= each["seconds"]
    assert len(started) == 2
    assert all(process.poll() is not None for process in started), "no server is left"
    shown = capsys.readouterr().out
    assert "| knn-ssd | as the checkpoint | float32 | 3 |" in shown
    assert "note:" not in shown


def test_a_server_that_fails_is_left_out_with_its_last_lines(
    clients: ModuleType,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.sh").write_text("echo out of luck >&2\nexit 2\n")
    monkeypatch.setattr(clients, "RUN_PEER", tmp_path / "run.sh")
    with pytest.raises(SystemExit, match="Not measured to the end, for the reasons above: vllm-cpu"):
        run(clients, monkeypatch, *options, "--servers", "vllm-cpu", "knn-ssd", "--rounds", "2")
    shown = capsys.readouterr()
    assert shown.err.count("out of luck\nThe server 'vllm-cpu' failed: it ended before it answered.") == 1
    assert "| knn-ssd | as the checkpoint | float32 | 3 |" in shown.out, "the others are measured all the same"
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


def test_a_server_that_ends_under_load_is_left_out(
    clients: ModuleType, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def load(*_: Any) -> Any:
        raise OpenAIError("Connection error")

    monkeypatch.setattr(clients, "load", load)
    with pytest.raises(SystemExit, match="for the reasons above: knn-ssd"):
        run(clients, monkeypatch, *options, "--servers", "knn-ssd")
    assert "The server 'knn-ssd' failed: Connection error. Its last lines are above." in capsys.readouterr().err


def test_ratios_are_of_the_same_round_and_medians_are_shown(clients: ModuleType) -> None:
    ours = [row(clients, "knn-ssd", number, speed) for number, speed in enumerate((10.0, 20.0, 40.0))]
    others = [row(clients, "llama-cpp-4", number, speed, same=1) for number, speed in enumerate((5.0, 30.0, 10.0))]
    *_, own, other = clients.table([*ours, *others]).splitlines()
    assert own.endswith("| 4 | 20.0 | 1.00 | 0.20 (worst 0.30) | 6 of 6 |")
    assert other.endswith("| 4 | 10.0 | 0.50 | 0.20 (worst 0.30) | 3 of 6 |")
    assert "| 10.0 | – |" in clients.table(others)


def test_prompts_of_different_lengths_are_told(clients: ModuleType) -> None:
    rows = [row(clients, "knn-ssd", 0, 10.0), row(clients, "vllm-cpu", 0, 10.0)]
    assert clients.other_prompts(rows) is None
    rows.append(row(clients, "llama-cpp-4", 0, 10.0, prompt_tokens=31))
    assert "'llama-cpp-4': 31" in clients.other_prompts(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--clients", "8"], "5 prompts are too few for 8 clients"),
        (["--clients", "0"], "must be 1 or more"),
        (["--servers", "other"], "invalid choice: 'other'"),
    ],
)
def test_a_load_that_cannot_be_is_refused(
    clients: ModuleType,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        run(clients, monkeypatch, *options, *changes)
    assert message in capsys.readouterr().err
