"""Runs `economize` on the prompts of a benchmark: its lookup, or drafts that skip layers.

    benchmarks/peers/run.sh economize RUN_FOLDER --model DIR [--technique lookup|layer-skip] [--search greedy|uniform]

The model is loaded by `transformers` in the dtype of its checkpoint, so weights and KV cache are the model's own.
The skipped layers are found by economize's own greedy search, which takes minutes; it gets the first of the measured
prompts, which favours it. `--search uniform` skips layers at even distances, without a search. Its quantised drafts
need a trained drafter with weights of its own: with `layer_skip`, and with `draft_model` as well,
`draft_quant` ends with "found no quantizable linear maps".
"""

from __future__ import annotations

import itertools
from typing import Any

from common import measure, parser, read_jobs

SHARE = 10 / 24  # of the layers is skipped, as in what economize publishes
CALIBRATING = 64  # tokens: the search makes some hundred passes over them


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--technique", choices=("lookup", "layer-skip"), default="lookup")
    options.add_argument("--search", choices=("greedy", "uniform"), default="greedy", help="of layers to skip")
    options.add_argument("--cycle-length", type=int, default=4, help="tokens per round (default: economize's own, 4)")
    args = options.parse_args()
    jobs = read_jobs(args.run)

    import economize
    import torch
    from economize.techniques.layer_skip import LayerSkipConfig
    from economize.techniques.lookup import LookupConfig
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", local_files_only=True)
    decoding = economize.DecodeConfig(cycle_length=args.cycle_length)
    if args.technique == "lookup":
        model = economize.apply(base, LookupConfig(), decoding=decoding)
    else:
        joined = itertools.chain.from_iterable(job.token_ids for job in jobs)
        batch = torch.tensor([list(itertools.islice(joined, CALIBRATING))])
        config = LayerSkipConfig(num_skip=round(SHARE * base.config.num_hidden_layers), search=args.search)
        model = economize.apply(base, config, decoding=decoding, calibration=[batch])

    def generate(token_ids: list[int], count: int) -> tuple[list[int], dict[str, Any]]:
        result = model.decode(torch.tensor(token_ids), count)
        details = {
            "rounds": result.cost_summary()["exact_calls"],
            "drafted": {args.technique: sum(drafted for drafted, _ in result.acceptance)},
            "accepted": {args.technique: sum(accepted for _, accepted in result.acceptance)},
        }
        return result.tokens.tolist(), details

    measure(args.run, f"economize-{args.technique}", jobs, generate, on_request=args.on_request)


if __name__ == "__main__":
    main()
