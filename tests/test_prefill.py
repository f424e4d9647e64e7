"""The comparison of times to the first token: the prompts, the talk with other programs, and the ratios."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import endless, endless_tokenizer, imported_script

from knn_ssd.testing import tiny_model

FOLDER = Path(__file__).parents[1] / "benchmarks"

# A program that answers with the same token for every prompt and says some lines of its own in between.
PEER = """
import sys
sys.path.insert(0, {folder!r})
from common import measure, parser, read_jobs

options = parser("A program.")
options.add_argument("--bits")
options.add_argument("--kv-bits")
args = options.parse_args()
print("{{loading}}")
jobs = read_jobs(args.run)
known = [job.token_ids for job in jobs]

def generate(token_ids, count):
    print("generating")
    if token_ids in known and known.index(token_ids) == {fails_at}:
        sys.exit("error: out of luck")
    return [len(token_ids) % 100] * count, {{}}

measure(args.run, "peer", jobs, generate, on_request=args.on_request)
"""


@pytest.fixture
def prefill(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported_script(monkeypatch, FOLDER, "prefill")


@pytest.fixture
def model(tmp_path: Path) -> str:
    endless(tiny_model("llama", num_hidden_layers=2)).save_pretrained(tmp_path / "model")
    endless_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def peer(prefill: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has a small program stand for every other one; it may fail at a prompt's place."""

    def stands(fails_at: int = -1) -> None:
        (tmp_path / "peer.py").write_text(PEER.format(folder=str(FOLDER / "peers"), fails_at=fails_at))
        (tmp_path / "run.sh").write_text(f'shift\nexec "{sys.executable}" "{tmp_path / "peer.py"}" "$@"\n')
        monkeypatch.setattr(prefill, "RUN_PEER", tmp_path / "run.sh")

    return stands


def run(prefill: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prefill.py", *options])
    prefill.main()


def test_programs_take_turns_on_the_same_prompts(
    prefill: ModuleType,
    peer: Any,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    peer()
    options = ["--models", model, "--out", str(tmp_path / "rows.json"), "--tokens", "5", "40", "--repeats", "3"]
    run(prefill, monkeypatch, *options, "--programs", "llama-cpp-4", "knn-ssd", "llama-cpp-16-kv16", "--threads", "1")
    written = json.loads((tmp_path / "rows.json").read_text())
    rows = written["rows"]
    assert len(rows) == 3 * 2 * 3, "each program ran each prompt once, the warm-up apart"
    orders = [[row["program"] for row in rows[i : i + 3]] for i in range(0, len(rows), 3)]
    assert len({order[0] for order in orders}) == 3, "each program comes first at times"
    assert all(row["seconds"] > 0 and row["threads"] == 1 for row in rows)
    answers = {row["token_id"] for row in rows if row["program"] == "llama-cpp-4"}
    assert answers == {5, 40}, "the answers are those of the prompts asked for"
    ours = {(m["tokens"], m["ratio"]) for m in written["medians"] if m["program"] == "knn-ssd"}
    assert ours == {(5, 1.0), (40, 1.0)}
    shown = capfd.readouterr().out
    assert "| Q4_0 | float16 |" in shown
    assert "6 of 6" in shown
    assert "generating" not in shown


def test_ratios_are_of_the_same_prompt_and_their_median_is_shown(prefill: ModuleType) -> None:
    seconds = {"knn-ssd": [1.0, 2.0, 4.0], "llama-cpp-4": [2.0, 3.0, 12.0]}
    rows = [
        prefill.Row("m", program, "w", "k", 2, 50, repeat, value, repeat % 2 if program == "knn-ssd" else 1)
        for program, values in seconds.items()
        for repeat, value in enumerate(values, start=1)
    ]
    ours, other = prefill.cells(rows)
    assert (ours.seconds, ours.ratio, ours.same) == (2.0, 1.0, 3)
    assert (other.seconds, other.ratio, other.smallest_ratio, other.largest_ratio) == (3.0, 2.0, 1.5, 3.0)
    assert other.same == 2
    (alone,) = prefill.cells(rows[3:])
    assert alone.ratio is None
    assert prefill.table([alone], [50]).splitlines()[-1].endswith("| 3000.0 | – | – |")


def test_no_two_prompts_begin_with_the_same_token(prefill: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    text = [1, 1, 2, 3, 2, 4, 1, 5, 6, 6]
    found = prefill.pieces(text, [2, 13], 3)
    assert [len(piece) for piece in found] == [2, 2, 2, 13, 13, 13]
    assert len({piece[0] for piece in found}) == 6
    twice = text * 3
    assert all(piece in [twice[i : i + len(piece)] for i in range(len(text))] for piece in found)
    with pytest.raises(SystemExit, match="6 different tokens, and 8 pieces"):
        prefill.pieces(text, [2, 13], 4)


def test_a_program_that_ends_is_told_and_what_was_measured_is_kept(
    prefill: ModuleType, peer: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer(fails_at=2)
    options = ["--models", model, "--out", str(tmp_path / "rows.json"), "--tokens", "5", "--repeats", "2"]
    with pytest.raises(SystemExit, match="'llama-cpp-8' ended with an error, told above"):
        run(prefill, monkeypatch, *options, "--programs", "knn-ssd", "llama-cpp-8")
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 3


def test_lengths_beyond_the_context_are_refused(
    prefill: ModuleType, peer: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--models", model, "--out", str(tmp_path / "rows.json"), "--programs", "knn-ssd", "--repeats", "1"]
    with pytest.raises(SystemExit, match="308 tokens are over the model's context of 256: give smaller --tokens"):
        run(prefill, monkeypatch, *options, "--tokens", "300")
    with pytest.raises(SystemExit):
        run(prefill, monkeypatch, *options, "--tokens", "0")
