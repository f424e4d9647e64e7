"""Prompts of domains that an atlas does not have: how they are routed, and how fast the atlas's plans are on them.

    python benchmarks/foreign.py --out FOLDER [--prompts FILE.jsonl…] [--known math story …] [--limit N]

The first half of the known domains' prompts is for calibration, over the whole plan space; `--limit` prompts of the
second half of every domain, known or not, are measured. Prints the share of prompts that got the fallback plan, their
distance from the nearest anchor over its radius, and speed-ups over plain decoding.
"""

from __future__ import annotations

import statistics

from _recipes import calibrated, measured, print_table, stream_options

from knn_ssd.bench.run import BenchSettings
from knn_ssd.bench.workload import halves, limit_each, read_workloads, stream
from knn_ssd.calibrate.settings import CalibrationSettings
from knn_ssd.loading.resolve import load_model

METHODS = ("plain", "knn-ssd", "auto")


def main() -> None:
    parser = stream_options(__doc__, METHODS, limit=4)
    parser.add_argument("--known", nargs="+", default=["math", "story"], help="the atlas's domains")
    parser.add_argument("--calibrating", type=int, default=16, help="calibration prompts per domain, at most")
    parser.add_argument("--minutes", type=float, default=2.0, help="time limit of the searches")
    args = parser.parse_args()
    first, second = halves(read_workloads(args.prompts))
    loaded = load_model(args.model, device="cpu")
    own = [prompt for prompt in limit_each(first, args.calibrating) if prompt.domain in args.known]
    engine = calibrated(loaded, own, args.out / "atlas", CalibrationSettings(minutes=args.minutes))
    assert engine.atlas is not None
    ordered = stream(limit_each(second, args.limit), 1.0)
    print("\n| domain | prompts | fallback | distance over radius, median |\n|---|--:|--:|--:|")
    for domain in sorted({str(prompt.domain) for prompt in ordered}):
        routes = [engine.generate(p.prompt, max_new_tokens=1).route for p in ordered if p.domain == domain]
        far = [r.distance / engine.atlas.domains[r.domain].radius for r in routes if r is not None]
        fell = sum(r.fallback for r in routes if r is not None) / len(routes)
        known = "" if domain in args.known else ", foreign"
        print(f"| {domain}{known} | {len(routes)} | {fell:.2f} | {statistics.median(far):.2f} |")
    asked = BenchSettings(args.max_new_tokens, mix_ratio=1.0)
    print()
    print_table(measured(engine, ordered, args.methods, args.out / "run", asked, loaded.name, ("knn-ssd", "auto")))


if __name__ == "__main__":
    main()
