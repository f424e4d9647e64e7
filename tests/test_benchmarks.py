"""The scripts under benchmarks/ go with the code that they measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from knn_ssd.target import native

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(FOLDER / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_a_script_says_how_it_is_run(script: str) -> None:
    assert "usage:" in run(script, "--help")


@pytest.mark.skipif(native.why_unavailable() is not None, reason="no kernels here")
def test_kernels_are_called_as_they_are_now() -> None:
    shown = run("kernels.py", "--rows", "64", "--cols", "128")
    assert "lean, bfloat16" in shown
    assert "lean, 4 bits" in shown
