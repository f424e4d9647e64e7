"""Acceptance rate and speed at several sampling temperatures, on the same prompts.

    python benchmarks/sampling.py --out FOLDER [--prompts FILE.jsonl…] [--model M] [--atlas FOLDER] [--limit N]

At each temperature the methods alternate with plain decoding at that temperature, on `--limit` prompts of the second
half of every domain, since atlases are calibrated on the first. `FOLDER` keeps records, summary and report of each, and
is continued if it exists. Sampled outputs, and so their lengths, differ by method: speeds are tokens over seconds.
"""

from __future__ import annotations

from pathlib import Path

from _recipes import measured, stream_options, with_interval

from knn_ssd import Atlas, Engine
from knn_ssd.bench.run import BenchSettings
from knn_ssd.bench.summary import formatted
from knn_ssd.bench.workload import halves, limit_each, read_workloads, stream
from knn_ssd.loading.resolve import load_model

METHODS = ("plain", "lookup", "low", "auto")


def main() -> None:
    parser = stream_options(__doc__, METHODS, limit=4)
    parser.add_argument("--atlas", type=Path, help="for `auto`; without it, the general plan")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    loaded = load_model(args.model, device="cpu")
    engine = Engine(loaded.model, loaded.tokenizer, Atlas.load(args.atlas) if args.atlas else None, answers=False)
    ordered = stream(limit_each(halves(read_workloads(args.prompts))[1], args.limit), 1.0, args.seed)
    rows = []
    for temperature in args.temperatures:
        asked = BenchSettings(args.max_new_tokens, seed=args.seed, temperature=temperature)
        out = args.out / f"temperature-{temperature:g}"
        summary = measured(engine, ordered, args.methods, out, asked, loaded.name, ("auto",))
        for name, own in summary["methods"].items():
            figures = [
                formatted(own[key], "{:.2f}") for key in ("acceptance_rate", "tokens_per_round", "decode_speedup")
            ]
            same = formatted(own["identical_to_plain"], "{:.2f}")
            rows.append([f"{temperature:g}", f"`{name}`", *figures, with_interval(own), same])
    print("| temperature | method | accepted | tokens per round | decoding | end to end, 95 % | same as plain |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
