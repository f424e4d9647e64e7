"""guidellm, a benchmark of servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from client_server import Server


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_benchmark_runs_and_counts_what_the_server_said(
    server: Server, tokenizer: Path, tmp_path: Path, path: str
) -> None:
    rows = [{"prompt": f"Name {number} colours.", "output_tokens_count": 8} for number in range(2, 8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    target = {"target": server.url, "model": server.model, "api_key": server.key, "request_format": path}
    spec = {
        "backend": {"kind": "openai_http", **target},
        "profile": {"kind": "concurrent", "streams": [2]},
        "constraints": [{"kind": "max_requests", "count": 6}],
        "tokenizer": {"kind": "huggingface_auto", "model": str(tokenizer)},
        "data": [{"kind": "json_file", "path": str(tmp_path / "rows.jsonl")}],
        "outputs": [{"kind": "json", "path": str(tmp_path / "report.json")}],
    }
    (tmp_path / "config.json").write_text(json.dumps({"spec": spec}), "utf-8")
    command = [sys.executable, "-m", "guidellm", "run", "--config", str(tmp_path / "config.json"), "--disable-console"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (measured,) = json.loads((tmp_path / "report.json").read_text("utf-8"))["benchmarks"]
    totals = measured["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0)
    assert measured["metrics"]["output_token_count"]["successful"]["mean"] == 8
