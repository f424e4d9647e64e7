"""Shared by the scripts: an atlas made once and kept, continuations, a stream measured and printed as a table."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from knn_ssd import Engine
from knn_ssd.atlas import Atlas
from knn_ssd.backends.base import Pooling
from knn_ssd.bench.methods import NEEDS_ATLAS, make_methods
from knn_ssd.bench.peers import read_run
from knn_ssd.bench.report import report
from knn_ssd.bench.run import BenchSettings, run_bench
from knn_ssd.bench.summary import formatted, formatted_interval
from knn_ssd.calibrate.continuations import Observation, observe
from knn_ssd.calibrate.pipeline import calibrate
from knn_ssd.calibrate.settings import CalibrationSettings
from knn_ssd.io import write_whole
from knn_ssd.loading.resolve import LoadedModel
from knn_ssd.plan import Mode
from knn_ssd.progress import ProgressBars
from knn_ssd.prompts import Prompt
from knn_ssd.tokenization import eos_token_ids


def stream_options(doc: str, methods: Sequence[str], limit: int) -> argparse.ArgumentParser:
    """The options of every script that measures a stream.

    Args:
        doc: the script's docstring.
        methods, limit: defaults of `--methods` and `--limit`.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=limit, help="prompts measured per domain")
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    return parser


def calibrated(loaded: LoadedModel, prompts: Sequence[Prompt], folder: Path, settings: CalibrationSettings) -> Engine:
    """An engine with the atlas in a folder, which is calibrated first if it does not exist."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with ProgressBars() as progress:
            calibrate(loaded, prompts, folder, settings, resume=True, progress=progress)
    return Engine(loaded.model, loaded.tokenizer, Atlas.load(folder), answers=False)


def measured(
    engine: Engine,
    ordered: Sequence[Prompt],
    names: Sequence[str],
    out: Path,
    asked: BenchSettings,
    name: str,
    with_atlas: Sequence[str] = NEEDS_ATLAS,
) -> dict[str, Any]:
    """Measures a stream under methods and returns the summary; the folder keeps records and report, and is continued.

    Only the methods in `with_atlas` use the engine's atlas; the others use the general plan.
    """
    first, temperature, seed = ordered[0].domain, asked.temperature, asked.seed
    bare = Engine(engine.model, engine.tokenizer, answers=False, backend=engine.backend)
    names = [method for method in names if method != "low" or Mode.LOW in engine.backend.modes]
    routed = make_methods([method for method in names if method in with_atlas], engine, first, temperature, seed)
    others = make_methods([method for method in names if method not in with_atlas], bare, first, temperature, seed)
    methods = {method: (routed | others)[method] for method in names}
    with ProgressBars() as progress:
        summary = run_bench(engine, list(ordered), methods, out, asked, progress, name)
    command = shlex.join(["python", *sys.argv])
    write_whole(out / "report.html", report(summary, read_run(out), command, engine.atlas))
    return summary


def observed(engine: Engine, prompts: Sequence[Prompt], new_tokens: int) -> list[Observation]:
    """Decodes the target's own continuations of prompts, on which plans are scored."""
    ends = eos_token_ids(engine.model)
    return [
        observe(engine.backend, p.domain or "none", p.id, engine.encode(p.prompt), new_tokens, Pooling.MEAN, ends)
        for p in prompts
    ]


def text_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[int]:
    """The token ids of the prompts' texts, one after the other, without special tokens."""
    texts = [f"{text}\n\n" for prompt in prompts for text in prompt.texts]
    return [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]


def write_rows(path: Path, rows: Sequence[Any], **more: Any) -> None:
    """Writes what a script measured so far as JSON: its command, a row for each measurement, which is a dataclass, and
    what else is given.
    """
    content = {"command": shlex.join(["python", *sys.argv]), "rows": list(map(asdict, rows)), **more}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def print_table(summary: dict[str, Any]) -> None:
    """Prints speed-ups by method and domain, in Markdown."""
    print(f"different from plain: {json.dumps(summary['differing'])}\n")
    domains = sorted(summary["methods"]["plain"]["per_domain"])
    print("| method | " + " | ".join(domains) + " | all | 95 % | accepted |")
    print("|---|" + "--:|" * (len(domains) + 3))
    for name, own in summary["methods"].items():
        cells = [formatted(own["per_domain"][domain]["speedup"], "{:.2f}") for domain in domains]
        accepted = formatted(own["acceptance_rate"], "{:.2f}")
        print(f"| `{name}` | {' | '.join(cells)} | {own['speedup']:.2f} | {formatted_interval(own)} | {accepted} |")


def with_interval(own: dict[str, Any]) -> str:
    """The end-to-end speed-up of a method, with its interval."""
    return f"{own['speedup']:.2f} ({formatted_interval(own)})"
