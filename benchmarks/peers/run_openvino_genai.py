"""Runs OpenVINO GenAI on the prompts of a benchmark, plain or with its prompt lookup.

    benchmarks/peers/run.sh openvino_genai RUN_FOLDER --model DIR [--weights fp16|int8|int4] [--lookup]

The model is exported by optimum-intel. Weights are float16 at best, and the KV cache has 8 bits, OpenVINO's default on
CPUs. So its arithmetic is never the model's own, and its records are marked as lossy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import convert, kept, longest, measure, parser, read_jobs


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--weights", choices=("fp16", "int8", "int4"), default="fp16", help="default: fp16")
    options.add_argument("--lookup", action="store_true", help="draft by looking up n-grams of the prompt")
    args = options.parse_args()
    jobs = read_jobs(args.run)

    import numpy as np
    import openvino
    import openvino_genai

    folder = kept(args.model, f"openvino-{args.weights}", lambda path: export(args.model, path, args.weights))
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = longest(jobs)  # a prompt in one piece, as without a scheduler's config
    asked = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": args.threads, "scheduler_config": scheduler}
    model = openvino_genai.LLMPipeline(str(folder), "CPU", **asked, **({"prompt_lookup": True} if args.lookup else {}))

    def generate(token_ids: list[int], count: int) -> tuple[list[int], dict[str, Any]]:
        config = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        if args.lookup:  # as in OpenVINO's sample
            config.num_assistant_tokens, config.max_ngram_size = 5, 3
        answer = model.generate(openvino.Tensor(np.array([token_ids], dtype=np.int64)), config)
        return list(answer.tokens[0]), {"prefill_sec": answer.perf_metrics.get_ttft().mean / 1e3}

    name = f"openvino-genai-{args.weights}{'-lookup' if args.lookup else ''}"
    measure(args.run, name, jobs, generate, lossy=True, on_request=args.on_request)


def export(model: Path, path: Path, weights: str) -> None:
    """Converts with optimum-intel."""
    program = [sys.executable, "-m", "optimum.commands.optimum_cli"]
    task = ["--task", "text-generation-with-past", "--weight-format", weights]
    if weights == "int4":  # groups are of 128 columns, and widths need not be multiples of that
        task += ["--group-size-fallback", "adjust"]
    convert([*program, "export", "openvino", "--model", model, *task, path], f"optimum-intel cannot export '{model}'")


if __name__ == "__main__":
    main()
