"""Tokens per second of vLLM with the plugin over vLLM without it, by batch size.

    python benchmarks/inside_vllm.py [--prompts FILE.jsonl…] [--model M] [--atlas FOLDER] [--batch-sizes 1 8]

Run it where vLLM is installed. Both are loaded in one process and run each batch in turn; without an atlas, drafts use
4-bit copies of all sublayers. Prints total tokens over total time, prefill included, how many outputs are the same, and
how many tokens were drafted and accepted.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from knn_ssd import Engine, Plan
from knn_ssd.bench.workload import halves, limit_each, read_workloads
from knn_ssd.loading.resolve import load_model, model_dir
from knn_ssd.vllm_plugin.hooks import PROPOSER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--model")
    parser.add_argument("--atlas", type=Path, help="made with --pooling last")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--limit", type=int, default=2, help="prompts per domain")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--longest", type=int, default=6, help="draft tokens, at most")
    args = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams

    loaded = load_model(args.model, device="cpu")
    encode = Engine(loaded.model, loaded.tokenizer).encode
    chosen = limit_each(halves(read_workloads(args.prompts))[1], args.limit)
    prompts = [{"prompt_token_ids": encode(prompt.prompt)} for prompt in chosen]
    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts) + args.max_new_tokens
    layers = int(loaded.model.config.num_hidden_layers)
    del loaded
    asked = {"atlas": str(args.atlas)} if args.atlas else {"plan": Plan.low(layers).to_json()}
    proposer = {"method": "custom_class", "model": PROPOSER}
    settings: dict[str, Any] = {
        "model": str(model_dir(args.model)),
        "dtype": args.dtype,
        "enforce_eager": True,
        "max_model_len": longest + 8,
        "max_num_seqs": max(args.batch_sizes),
        "kv_cache_memory_bytes": 2 << 30,
        "enable_prefix_caching": False,
    }
    engines = {
        "plain": LLM(**settings),
        "ours": LLM(
            **settings,
            speculative_config={**proposer, "num_speculative_tokens": args.longest},
            additional_config={"knn_ssd": asked},
        ),
    }
    params = SamplingParams(temperature=0.0, max_tokens=args.max_new_tokens)
    for llm in engines.values():
        llm.generate(prompts[:2], params, use_tqdm=False)  # the warm-up, which makes the 4-bit copies
    print("| batch size | ours over plain | same outputs |\n|--:|--:|--:|")
    for batch_size in args.batch_sizes:
        tokens, seconds = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0.0)
        outputs: dict[str, list[list[int]]] = {name: [] for name in engines}
        for turn, first in enumerate(range(0, len(prompts), batch_size)):
            for name in engines if turn % 2 else reversed(engines):
                started = time.perf_counter()
                done = engines[name].generate(prompts[first : first + batch_size], params, use_tqdm=False)
                seconds[name] += time.perf_counter() - started
                tokens[name] += sum(len(each.outputs[0].token_ids) for each in done)
                outputs[name] += [list(each.outputs[0].token_ids) for each in done]
        ratio = tokens["ours"] / seconds["ours"] / (tokens["plain"] / seconds["plain"])
        same = sum(ours == plain for ours, plain in zip(outputs["ours"], outputs["plain"], strict=True))
        print(f"| {batch_size} | {ratio:.2f} | {same} of {len(prompts)} |", flush=True)
    print(engines["ours"].collective_rpc("knn_ssd_counts")[0])


if __name__ == "__main__":
    main()
