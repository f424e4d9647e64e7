"""Simon Willison's `llm`, the command, with the server in its list of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from client_server import Server

QUESTION = "Name three colours."


@pytest.fixture(scope="module")
def folder(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llm")
    shared = {"model_name": server.model, "api_base": server.api, "api_key_name": "knn"}
    models = [
        {"model_id": "own", "supports_schema": True, **shared},
        {"model_id": "own-text", "completion": True, **shared},
    ]
    (path / "extra-openai-models.yaml").write_text(yaml.safe_dump(models), "utf-8")
    (path / "keys.json").write_text(json.dumps({"knn": server.key}), "utf-8")
    return path


def llm(folder: Path, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLM_USER_PATH": str(folder)}
    command = [sys.executable, "-m", "llm", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize("way", [[], ["--no-stream"]])
def test_a_prompt_is_answered(server: Server, folder: Path, way: list[str]) -> None:
    done = llm(folder, "-m", "own", "-o", "temperature", "0", "-o", "max_tokens", "12", "-u", *way, QUESTION)
    assert done.stdout.strip() == server.say(QUESTION, max_tokens=12).strip()
    assert "12 output" in done.stderr


def test_a_conversation_goes_on_with_a_system_prompt_and_a_stop_string(server: Server, folder: Path) -> None:
    options = ["-m", "own", "-o", "temperature", "0", "-o", "max_tokens", "12"]
    assert llm(folder, *options, "-s", "Be brief.", QUESTION).stdout.strip()
    assert llm(folder, *options, "-c", "And another.").stdout.strip()
    said = server.say(QUESTION, max_tokens=12)
    stop = said.strip().split()[-1]
    stopped = llm(folder, *options, "-o", "stop", stop, "-o", "seed", "7", "-o", "top_p", "0.9", QUESTION)
    assert stopped.stdout.strip() == said[: said.index(stop)].strip()


def test_a_completion(server: Server, folder: Path) -> None:
    done = llm(folder, "-m", "own-text", "-o", "temperature", "0", "-o", "max_tokens", "12", "One, two,")
    assert done.stdout.strip() == server.complete("One, two,", max_tokens=12).strip()


def test_an_error_is_shown_with_the_server_s_sentence(folder: Path) -> None:
    done = llm(folder, "-m", "own", "--key", "wrong", QUESTION, code=1)
    assert "the API key is missing or wrong" in done.stderr


@pytest.mark.usefixtures("structured")
def test_an_answer_follows_a_schema(folder: Path) -> None:
    sizes = {"size": {"enum": ["small", "large"]}}
    schema = {"type": "object", "properties": sizes, "required": ["size"], "additionalProperties": False}
    options = ["-m", "own", "-o", "temperature", "0", "-o", "max_tokens", "200", "--schema", json.dumps(schema)]
    assert json.loads(llm(folder, *options, "Describe Paris.").stdout)["size"] in ("small", "large")
