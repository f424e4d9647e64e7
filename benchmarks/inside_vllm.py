"""Tokens per second of vLLM with the plugin over vLLM without it, by how many requests run at once.

    python benchmarks/inside_vllm.py [--prompts FILE.jsonl…] [--model M] [--atlas FOLDER] [--together 1 8] [--limit N]

Run it where vLLM is installed. Both are loaded in one process and take each batch in turn; without an atlas all
sublayers draft on 4-bit copies. Prints total tokens over total time, whose time includes the prompts', how many outputs
are the same, and what was drafted and accepted.
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
    parser.add_argument("--together", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--limit", type=int, default=2, help="prompts of each domain")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--longest", type=int, default=6, help="drafted tokens, at most")
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
        "max_num_seqs": max(args.together),
        "kv_cache_memory_bytes": 2 << 30,
        "enable_prefix_caching": False,
    }
    ways = {
        "plain": LLM(**settings),
        "ours": LLM(
            **settings,
            speculative_config={**proposer, "num_speculative_tokens": args.longest},
            additional_config={"knn_ssd": asked},
        ),
    }
    params = SamplingParams(temperature=0.0, max_tokens=args.max_new_tokens)
    for llm in ways.values():
        llm.generate(prompts[:2], params, use_tqdm=False)  # the warm-up, which makes the low-bit copies
    print("| together | ours over plain | same outputs |\n|--:|--:|--:|")
    for together in args.together:
        tokens, seconds = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
        said: dict[str, list[list[int]]] = {way: [] for way in ways}
        for turn, first in enumerate(range(0, len(prompts), together)):
            for way in ways if turn % 2 else reversed(ways):
                started = time.perf_counter()
                done = ways[way].generate(prompts[first : first + together], params, use_tqdm=False)
                seconds[way] += time.perf_counter() - started
                tokens[way] += sum(len(each.outputs[0].token_ids) for each in done)
                said[way] += [list(each.outputs[0].token_ids) for each in done]
        ratio = tokens["ours"] / seconds["ours"] / (tokens["plain"] / seconds["plain"])
        same = sum(ours == plain for ours, plain in zip(said["ours"], said["plain"], strict=True))
        print(f"| {together} | {ratio:.2f} | {same} of {len(prompts)} |", flush=True)
    print(ways["ours"].collective_rpc("knn_ssd_counts")[0])


if __name__ == "__main__":
    main()
