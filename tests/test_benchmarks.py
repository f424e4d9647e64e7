"""The scripts under benchmarks/ go with the code that they measure."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from knn_ssd.target import native
from knn_ssd.testing import tiny_model, tiny_tokenizer

FOLDER = Path(__file__).parents[1] / "benchmarks"


class Run:
    """Runs scripts in this process, which saves their imports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.syspath_prepend(str(FOLDER))

    def __call__(self, script: str, *options: str, code: int = 0) -> str:
        """What a script printed, which ended with this code."""
        self._monkeypatch.setattr(sys, "argv", [script, *options])
        ended = 0
        try:
            runpy.run_path(str(FOLDER / script), run_name="__main__")
        except SystemExit as end:
            ended = int(end.code or 0)
        assert ended == code
        return self._capsys.readouterr().out


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("[!_]*.py")))
def test_a_script_says_how_it_is_run(run: Run, script: str) -> None:
    assert "usage:" in run(script, "--help")


@pytest.mark.skipif(native.why_unavailable() is not None, reason="no kernels here")
def test_kernels_are_called_as_they_are_now(run: Run) -> None:
    shown = run("kernels.py", "--rows", "64", "--cols", "128")
    assert "lean, bfloat16" in shown
    assert "lean, 4 bits" in shown


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The folder of a tiny model, and a file of prompts of two domains."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
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


def test_budgets_are_told_for_each_strategy(run: Run, tiny: tuple[str, str]) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--domain", "letters", "--trials", "16", "--limit", "1"]
    head, *found = rows(run("budget.py", *options, "--strategies", "greedy", "bayes", "--max-new-tokens", "8"))
    assert head == ["strategy", "8 plans", "16 plans"]
    assert [row[0] for row in found] == ["`greedy`", "`bayes`"]
    assert all(float(row[1]) <= float(row[2]) for row in found)


def test_shares_and_thresholds_are_told(run: Run, tiny: tuple[str, str]) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--shares", "0.25", "0.75", "--thresholds", "0", "0.9"]
    head, *found = rows(run("skipping.py", *options, "--max-new-tokens", "8"))
    assert len(head) == 4
    assert [row[0] for row in found] == ["1 of 4", "3 of 4"]
    assert float(found[0][1]) >= float(found[1][1])


def test_foreign_prompts_and_ways_that_do_not_fit_are_told(run: Run, tiny: tuple[str, str], tmp_path: Path) -> None:
    model, prompts = tiny
    options = ["--model", model, "--prompts", prompts, "--max-new-tokens", "8", "--limit", "1"]
    shown = run("foreign.py", *options, "--out", str(tmp_path), "--known", "letters", "--minutes", "0.02",
                "--methods", "plain", "auto")  # fmt: skip
    assert "different from plain: []" in shown
    assert ["signs, foreign", "1"] in [row[:2] for row in rows(shown)]
    assert (tmp_path / "run" / "report.html").is_file()
    head, *found = rows(run("never_slower.py", *options, "--atlas", str(tmp_path / "atlas"), "--least", "0"))
    assert head == ["way", "letters", "signs", "all"]
    assert [row[0] for row in found][2:] == ["atlas atlas"]
    run("never_slower.py", *options, "--least", "1000", code=1)
