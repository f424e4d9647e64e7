"""Real clients of the server, in environments of their own without knn-ssd, by `make test-clients`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_server import PYTHON, Server, serving

if not PYTHON:  # another environment than those of `make test-clients`
    collect_ignore_glob = ["*/test_*.py"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "serve.log") as own:
        yield own


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the embedded model, for clients that count tokens themselves."""
    code = "from knn_ssd.loading.resolve import model_dir; print(model_dir())"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def _needs(server: Server, **body: Any) -> None:
    """Skips a test if the server refuses some fields as not supported."""
    messages = [{"role": "user", "content": "Say yes."}]
    response = server.post("/chat/completions", messages=messages, max_tokens=4, **body)
    if response.status_code == 400 and response.json()["error"]["code"] == "unsupported_parameter":
        pytest.skip(response.json()["error"]["message"])


@pytest.fixture(scope="session")
def structured(server: Server) -> None:
    """For tests of answers that follow a JSON schema."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    _needs(server, response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})


@pytest.fixture(scope="session")
def tools(server: Server) -> None:
    """For tests of tools that the model calls."""
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    _needs(server, tools=[{"type": "function", "function": function}])
