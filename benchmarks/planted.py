"""The paper's effect where skipping pays: a tiny model in which different sublayers are redundant in each domain.

    python benchmarks/planted.py --out FOLDER [--limit N] [--ratios 0 0.5 1] [--trials N]

In a random model, sublayers are made to do nothing on the tokens of one domain, different ones for each domain
(`knn_ssd.testing.planted_tiny_model`). `--calibrating` prompts of each domain are for calibration, with plans that only
skip; `--limit` others are measured, in streams of each mix ratio. `FOLDER` keeps the atlas, and records, summary and
report of every stream, and is continued if it exists. Prints end-to-end speed-ups and acceptance rates.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from _recipes import calibrated, measured, with_interval

from knn_ssd.bench.run import BenchSettings
from knn_ssd.bench.summary import formatted
from knn_ssd.bench.workload import limit_each, stream
from knn_ssd.calibrate.settings import CalibrationSettings
from knn_ssd.loading.resolve import LoadedModel
from knn_ssd.prompts import Prompt
from knn_ssd.testing import planted_tiny_model, tiny_tokenizer

REDUNDANT = {"red": (5, 6, 8, 9, 10, 14, 15), "green": (4, 5, 6, 7, 11, 13, 14), "blue": (3, 4, 6, 9, 10, 11, 15)}
METHODS = ("plain", "self-sd-fix", "self-sd-mix", "knn-ssd")
PROMPT_TOKENS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=8, help="prompts measured per domain")
    parser.add_argument("--calibrating", type=int, default=8, help="calibration prompts per domain")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--trials", type=int, default=50, help="plans tried per domain")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)  # with more, threads of so small a model mostly wait for each other
    planted = planted_tiny_model(REDUNDANT, seed=3)
    prompts = [
        Prompt(planted.prompt(name, PROMPT_TOKENS, seed), name, f"{name}-{seed}")
        for name in REDUNDANT
        for seed in range(args.calibrating + args.limit)
    ]
    own = limit_each(prompts, args.calibrating)
    others = [prompt for prompt in prompts if prompt not in own]
    loaded = LoadedModel(planted.model, tiny_tokenizer(), "planted", None)
    settings = CalibrationSettings(  # the methods use what the search found, whatever judging would come to
        trials=args.trials, search_prompts=4, judging_prompts=0, low=False, lookup=False
    )
    engine = calibrated(loaded, own, args.out / "atlas", settings)
    streams = {}
    for ratio in args.ratios:
        asked = BenchSettings(args.max_new_tokens, mix_ratio=ratio)
        out = args.out / f"ratio-{ratio:g}"
        summary = measured(engine, stream(others, ratio), METHODS, out, asked, loaded.name)
        streams[ratio] = summary["methods"]
        print(f"mix ratio {ratio:g}, {len(others)} prompts, different from plain: {json.dumps(summary['differing'])}")
    print("\n| method |" + "".join(f" ratio {ratio:g}, 95 % | accepted |" for ratio in streams))
    print("|---|" + "--:|--:|" * len(streams))
    for name in METHODS:
        cells = [
            f"{with_interval(methods[name])} | {formatted(methods[name]['acceptance_rate'], '{:.2f}')}"
            for methods in streams.values()
        ]
        print(f"| `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
