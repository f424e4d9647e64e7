"""The main table of arXiv 2505.16162: methods that skip, by domain and by mix ratio, beside what this package adds.

    python benchmarks/paper.py --out FOLDER [--prompts FILE.jsonl…] [--model M] [--limit N] [--ratios 0 0.5 1]

Of the first half of every domain's prompts `--calibrating` calibrate, skip only, the search as chosen; `--limit` of the
second half are measured. `FOLDER` keeps the atlas, and records, summary and page of every stream; what is there already
is not done again. Where the atlas says nothing of a method, as of `low` and `auto`, the method has the general plan.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from knn_ssd import Engine
from knn_ssd.atlas import Atlas
from knn_ssd.bench.methods import NEEDS_ATLAS, make_methods
from knn_ssd.bench.records import read_records
from knn_ssd.bench.report import report
from knn_ssd.bench.run import BenchSettings, run_bench
from knn_ssd.bench.summary import shown
from knn_ssd.bench.workload import halves, limit_each, read_workloads, stream
from knn_ssd.calibrate.pipeline import calibrate
from knn_ssd.calibrate.search import Strategy
from knn_ssd.calibrate.settings import Settings
from knn_ssd.cli.progress import ProgressReporter
from knn_ssd.plan import Mode
from knn_ssd.provenance import write_whole
from knn_ssd.target.resolve import load_model

METHODS = ("plain", "self-sd-fix", "self-sd-mix", "knn-ssd", "swift", "clasp", "lookup", "low", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=4, help="prompts of each domain that are measured")
    parser.add_argument("--calibrating", type=int, default=16, help="prompts of each domain that calibrate, at most")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--search", choices=[strategy.value for strategy in Strategy], default="bayes")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    calibrating, measured = halves(read_workloads(args.prompts))
    loaded = load_model(args.model, device="cpu")
    folder = args.out / "atlas"
    args.out.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        settings = Settings(search=Strategy(args.search), trials=args.trials, low=False, lookup=False)
        with ProgressReporter() as progress:
            calibrate(
                loaded, limit_each(calibrating, args.calibrating), folder, settings, resume=True, reporter=progress
            )
    engine = Engine(loaded.model, loaded.tokenizer, Atlas.load(folder))
    bare = Engine(loaded.model, loaded.tokenizer, target=engine.target)
    names = [name for name in args.methods if name != "low" or Mode.LOW in engine.target.modes]
    for ratio in args.ratios:
        ordered = stream(limit_each(measured, args.limit), ratio)
        routed = make_methods([name for name in names if name in NEEDS_ATLAS], engine, ordered[0].domain)
        methods = routed | make_methods([name for name in names if name not in NEEDS_ATLAS], bare)
        out = args.out / f"ratio-{ratio:g}"
        with ProgressReporter() as progress:
            asked = BenchSettings(args.max_new_tokens, mix_ratio=ratio)
            ways = {name: methods[name] for name in names}
            summary = run_bench(engine, ordered, ways, out, asked, progress, loaded.name)
        write_whole(
            out / "report.html",
            report(summary, read_records(out / "records.jsonl"), shlex.join(["python", *sys.argv]), engine.atlas),
        )
        print(
            f"\nmix ratio {ratio:g}, {len(ordered)} prompts; different from plain: {json.dumps(summary['differing'])}\n"
        )
        domains = sorted(summary["methods"]["plain"]["per_domain"])
        print("| method | " + " | ".join(domains) + " | all | 95 % | accepted |")
        print("|---|" + "--:|" * (len(domains) + 3))
        for name, own in summary["methods"].items():
            cells = [shown(own["per_domain"][domain]["speedup"], "{:.2f}") for domain in domains]
            bounds = own["speedup_ci95"]
            interval = f"{bounds[0]:.2f}–{bounds[1]:.2f}" if bounds else "–"
            accepted = shown(own["acceptance_rate"], "{:.2f}")
            print(f"| `{name}` | {' | '.join(cells)} | {own['speedup']:.2f} | {interval} | {accepted} |")


if __name__ == "__main__":
    main()
