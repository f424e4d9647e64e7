"""Runs vLLM's CPU build on the prompts of a benchmark, one at a time, plain or with its n-gram lookup.

    benchmarks/peers/run.sh vllm_cpu RUN_FOLDER --model DIR [--lookup]

Weights and KV cache are in the dtype of the checkpoint. The model is compiled, the default of vLLM, before anything
is measured.
"""

from __future__ import annotations

import os
from typing import Any

from common import longest, measure, parser, read_jobs

LOOKUP = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}  # as in vLLM's documentation


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lookup", action="store_true", help="draft by looking up n-grams of the prompt")
    args = options.parse_args()
    jobs = read_jobs(args.run)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(args.threads)}

    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(args.model),
        dtype="auto",
        max_model_len=longest(jobs) + 8,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=LOOKUP if args.lookup else None,
    )

    def generate(token_ids: list[int], count: int) -> tuple[list[int], dict[str, Any]]:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        (answer,) = model.generate({"prompt_token_ids": token_ids}, params, use_tqdm=False)
        return list(answer.outputs[0].token_ids), {"prefill_sec": answer.metrics.first_token_latency}

    measure(args.run, "vllm-cpu-lookup" if args.lookup else "vllm-cpu", jobs, generate, on_request=args.on_request)


if __name__ == "__main__":
    main()
