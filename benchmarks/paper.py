"""The main table of arXiv 2505.16162: skipping methods by domain and mix ratio, beside the methods of this package.

    python benchmarks/paper.py --out FOLDER [--prompts FILE.jsonl…] [--model M] [--limit N] [--ratios 0 0.5 1]

`--calibrating` prompts of the first half of every domain are for calibration, with plans that only skip; `--limit` of
the second half are measured. `FOLDER` keeps the atlas, and records, summary and report of every stream, and is
continued if it exists. Methods that need no atlas, such as `low` and `auto`, use the general plan.
"""

from __future__ import annotations

from _recipes import calibrated, measured, print_table, stream_options

from knn_ssd.bench.run import BenchSettings
from knn_ssd.bench.workload import halves, limit_each, read_workloads, stream
from knn_ssd.calibrate.search import Strategy
from knn_ssd.calibrate.settings import CalibrationSettings
from knn_ssd.loading.resolve import load_model

METHODS = ("plain", "self-sd-fix", "self-sd-mix", "knn-ssd", "swift", "clasp", "lookup", "low", "auto")


def main() -> None:
    parser = stream_options(__doc__, METHODS, limit=4)
    parser.add_argument("--calibrating", type=int, default=16, help="calibration prompts per domain, at most")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--search", choices=[strategy.value for strategy in Strategy], default="bayes")
    parser.add_argument("--trials", type=int)
    args = parser.parse_args()
    first, second = halves(read_workloads(args.prompts))
    loaded = load_model(args.model, device="cpu")
    settings = CalibrationSettings(  # the methods use what the search found, whatever judging would come to
        search=Strategy(args.search), trials=args.trials, judging_prompts=0, low=False, lookup=False
    )
    engine = calibrated(loaded, limit_each(first, args.calibrating), args.out / "atlas", settings)
    for ratio in args.ratios:
        ordered = stream(limit_each(second, args.limit), ratio)
        asked = BenchSettings(args.max_new_tokens, mix_ratio=ratio)
        summary = measured(engine, ordered, args.methods, args.out / f"ratio-{ratio:g}", asked, loaded.name)
        print(f"\nmix ratio {ratio:g}, {len(ordered)} prompts")
        print_table(summary)


if __name__ == "__main__":
    main()
