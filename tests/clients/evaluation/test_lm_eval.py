"""lm-evaluation-harness: a task of likelihoods and one of generation, on small data that the test makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from client_server import Server

CHOICES = [
    ("The capital of France is", [" Paris", " banana"]),
    ("One, two, three,", [" four", " window"]),
    ("Grass is", [" green", " loud"]),
    ("Water is", [" wet", " angry"]),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in CHOICES]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    likelihood = {
        "task": "own_choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    generation = {
        "task": "own_text",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (likelihood, generation):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**shared, **task}), "utf-8")
    return folder


def evaluate(server: Server, tasks: Path, kind: str, path: str, names: str, *more: str, **args: Any) -> list[Any]:
    """Runs the command; its samples."""
    given = {"model": server.model, "base_url": server.api + path, "max_retries": 1, **args}
    out = Path(tempfile.mkdtemp(dir=tasks))
    command = [sys.executable, "-m", "lm_eval", "--model", kind, "--tasks", names, "--include_path", str(tasks)]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in given.items())]
    command += ["--output_path", str(out), "--log_samples", *more]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "hub")}
    environment = {**os.environ, **offline, "OPENAI_API_KEY": server.key}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for file in out.rglob("samples_*.jsonl") for line in file.read_text("utf-8").splitlines()]
    return sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("tokenized", [True, False])
def test_likelihoods_are_the_server_s(server: Server, tasks: Path, tokenizer: Path, tokenized: bool) -> None:
    samples = evaluate(
        server,
        tasks,
        "local-completions",
        "/completions",
        "own_choices",
        "--batch_size",
        "4",
        tokenizer=tokenizer,
        tokenized_requests=tokenized,
        num_concurrent=2,
    )
    assert len(samples) == len(CHOICES)
    for sample, (question, choices) in zip(samples, CHOICES, strict=True):
        found = [float(each[0][0]) for each in sample["resps"]]
        assert found == pytest.approx([likelihood(server, question, choice) for choice in choices], abs=1e-3)


def likelihood(server: Server, question: str, choice: str) -> float:
    """The log-probability of a continuation, by our own request."""
    answer = server.post("/completions", prompt=question + choice, echo=True, logprobs=1, max_tokens=0).json()
    logprobs = answer["choices"][0]["logprobs"]
    pairs = zip(logprobs["text_offset"], logprobs["token_logprobs"], strict=True)
    return sum(logprob for offset, logprob in pairs if offset >= len(question))


def test_generated_texts_are_the_server_s(server: Server, tasks: Path, tokenizer: Path) -> None:
    samples = evaluate(server, tasks, "local-completions", "/completions", "own_text", tokenizer=tokenizer)
    expected = [server.complete(question, max_tokens=8, stop=["\n"]) for question, _ in CHOICES]
    assert [sample["resps"][0][0] for sample in samples] == expected


def test_chats_are_the_server_s(server: Server, tasks: Path) -> None:
    samples = evaluate(
        server,
        tasks,
        "local-chat-completions",
        "/chat/completions",
        "own_text",
        "--apply_chat_template",
        num_concurrent=2,
    )
    expected = [server.say(question, max_tokens=8, stop=["\n"]) for question, _ in CHOICES]
    assert [sample["resps"][0][0] for sample in samples] == expected
