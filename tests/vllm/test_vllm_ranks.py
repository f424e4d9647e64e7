"""With tensor parallelism all ranks run the same forward passes, whatever each would have decided alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_vllm_lossless import NOTHING, SOME


def run(model: Path, settings: dict[str, Any] | None, *options: str) -> dict[str, Any]:
    script = Path(__file__).with_name("ranks.py")
    command = [sys.executable, str(script), str(model), json.dumps(settings), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    said = [line for line in done.stdout.splitlines() if "SAID " in line]
    assert said, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(said[0].split("SAID ", 1)[1])
    return result


@pytest.fixture(scope="module")
def plain(tiny: Path) -> dict[str, Any]:
    return run(tiny, None)


def test_two_ranks_say_the_same_with_drafts(tiny: Path, plain: dict[str, Any]) -> None:
    drafted = run(tiny, {"plan": NOTHING.to_json(), "adaptive": False})
    assert drafted["tokens"] == plain["tokens"]
    counts = drafted["counts"][0]["plan"]
    assert counts["accepted"] >= 0.99 * counts["drafted"] > 50


def test_ranks_that_disagree_do_not_hang(tiny: Path, plain: dict[str, Any]) -> None:
    drafted = run(tiny, {"plan": SOME.to_json(), "adaptive": False}, "--noisy")
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["counts"][0]["plan"]["drafted"] > 50
