"""vLLM in this process, on tiny random models: what the tests of the plugin share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from knn_ssd.vllm_plugin.hooks import PROPOSER

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

LAYERS = 4
Opener = Callable[..., Any]


def save_tiny_model(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random Llama of four layers with heads as wide as vLLM's kernels for CPUs want them, and its tokenizer."""
    from knn_ssd.testing import tiny_model, tiny_tokenizer

    sizes: dict[str, Any] = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96, "eos_token_id": None}
    model = tiny_model("llama", seed, num_hidden_layers=LAYERS, **{**sizes, **overrides})
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def open_model(folder: Path, asked: dict[str, Any] | None = None, longest: int = 4, **options: Any) -> Any:
    """A model in vLLM. `asked` are the plugin's settings; without them vLLM does not speculate."""
    from vllm import LLM

    ours: dict[str, Any] = {}
    if asked is not None:
        ours["speculative_config"] = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": longest}
        ours["additional_config"] = {"knn_ssd": asked}
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 32 << 20,
        "block_size": 32,
        "disable_log_stats": False,
    }
    return LLM(str(folder), **{**settings, **ours, **options})


def greedy(**options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": 48, "ignore_eos": True, **options})


def tokens_of(llm: Any, prompts: list[Any], params: Any) -> list[list[int]]:
    """The output's token ids of each prompt, text or token ids."""
    asked = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
    return [list(done.outputs[0].token_ids) for done in llm.generate(asked, params, use_tqdm=False)]


def runner_of(llm: Any) -> Any:
    """vLLM's model runner, which lives in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def metrics_of(llm: Any) -> dict[str, Any]:
    """vLLM's own counts by name."""
    return {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}


def counts_of(llm: Any) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = llm.collective_rpc("knn_ssd_counts")[0]
    return found
