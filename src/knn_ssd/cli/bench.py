"""`knn-ssd bench`: runs methods on the same prompts, and writes records, a summary and a report."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import options, output
from knn_ssd.cli.options import option, whole_number
from knn_ssd.errors import UsageError
from knn_ssd.progress import ProgressBars

if TYPE_CHECKING:
    from rich.table import Table

_EXAMPLES = """\
examples:
  knn-ssd bench --out runs/first
  knn-ssd bench --atlas atlas/ --prompts questions.jsonl --methods plain,knn-ssd,auto --limit 8 --out runs/second
  knn-ssd bench --prompts hf:openai/gsm8k:main/test:question --limit 8 --prompt-tokens 2048 --out runs/third

The same command resumes an interrupted run. The last line on stdout is the path of summary.json.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "bench",
        description="Measures decoding methods on the same prompts and compares them with plain decoding. Exits "
        "with 1 if a lossless method gave another output than plain decoding.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option(parser, "--out", "DIR", "folder for records, summary.json and report.html", options.filled, required=True)
    text = (
        "of plain, hf, hf-lookup, self-sd-fix, self-sd-mix, knn-ssd, swift, clasp, lookup, "
        "low, auto (default: plain, lookup, low, auto and, with an atlas, knn-ssd)"
    )
    option(parser, "--methods", "M,…", text)
    _add_prompt_options(parser)
    option(parser, "--max-new-tokens", "N", "maximum number of output tokens", whole_number(2), 128)
    option(parser, "--repeats", "N", "number of times that everything is run", whole_number(1), 1)
    option(parser, "--temperature", "T", "0 is greedy (the default)", options.number, 0.0)
    option(parser, "--seed", "S", "seed of the order of prompts and of sampling", whole_number(0), 0)
    options.add_model_options(parser)
    options.add_atlas_options(parser)


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    stream = parser.add_argument_group("prompts")
    text = (
        "JSON lines with 'prompt' and 'domain', Spec-Bench's questions, or a data set of the Hugging Face Hub as "
        "hf:NAME[:[CONFIG/]SPLIT[:COLUMN]], with `pip install knn-ssd[datasets]` (default: the built-in sets)"
    )
    option(stream, "--prompts", "FILE.jsonl", text, nargs="+", action="extend")
    option(stream, "--limit", "N", "only the first N prompts of each domain", whole_number(1))
    text = "lengthen each prompt to N tokens: other prompts, of its domain first, are put before it"
    option(stream, "--prompt-tokens", "N", text, whole_number(1))
    option(stream, "--mix-ratio", "R", "probability that the next prompt is of another domain", options.number, 1.0)
    stream.add_argument("--no-chat", action="store_true", help="do not apply the model's chat template")


def run(args: argparse.Namespace) -> int:
    """Runs the methods, writes the files, and shows the table."""
    from knn_ssd.bench.methods import check_names, make_methods
    from knn_ssd.bench.peers import APART, read_run
    from knn_ssd.bench.report import report
    from knn_ssd.bench.run import BenchSettings, run_bench
    from knn_ssd.bench.workload import lengthened, limit_each, read_workloads, stream
    from knn_ssd.io import write_whole
    from knn_ssd.plan import Mode

    names = [name.strip() for name in args.methods.split(",")] if args.methods is not None else None
    check_names(names or ())
    if args.temperature < 0:
        raise UsageError(f"--temperature must be 0 or more, got {args.temperature}")
    prompts = read_workloads(args.prompts or ())
    ordered = stream(limit_each(prompts, args.limit), args.mix_ratio, args.seed)
    atlas = options.read_atlas(args)
    engine = options.load_engine(args, atlas)
    if args.prompt_tokens is not None:
        ordered = lengthened(ordered, prompts, args.prompt_tokens, engine.tokenizer, not args.no_chat)
    if names is None:
        low = ["low"] if Mode.LOW in engine.backend.modes else []
        names = ["plain", "lookup", *low, *(["knn-ssd"] if atlas is not None else []), "auto"]
    methods = make_methods(names, engine, ordered[0].domain, args.temperature, args.seed)
    values = options.given(args, "max_new_tokens", "repeats", "seed", "temperature", "mix_ratio")
    settings = BenchSettings(chat=not args.no_chat, **values)
    out = Path(args.out)
    model = args.model or "SmolLM2-135M-Instruct"
    with ProgressBars() as progress:
        summary = run_bench(engine, ordered, methods, out, settings, progress, model)
    command = shlex.join(["knn-ssd", *sys.argv[1:]])
    write_whole(out / "report.html", report(summary, read_run(out), command, atlas))
    output.write_table(_table(summary["methods"]))
    if summary["peers"]:
        output.note(f"note: {', '.join(summary['peers'])}: {APART}")
    for each in summary["differing"]:
        output.note(f"DIFFERENT: the output of {each['method']} is not that of plain decoding on '{each['prompt']}'")
    if summary["baseline_slowed"]:
        output.note("note: plain decoding was much slower than a single decode step; do not trust these speed-ups")
    output.write_json(str(out / "summary.json"))
    return 1 if summary["differing"] else 0


def _table(methods: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    from knn_ssd.bench.summary import display_name, formatted_figures, formatted_interval

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in ("speed-up", "95 %", "decoding", "tokens/s", "accepted", "tokens/round", "as plain"):
        table.add_column(name, justify="right")
    for name, own in methods.items():
        speedup, *others, _first_token = formatted_figures(own).values()
        table.add_row(display_name(name, own), speedup, formatted_interval(own), *others)
    return table
