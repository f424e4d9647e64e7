"""Run as a script: tensor parallelism of two on the CPU, without the plugin or with it; prints what was said as JSON.

    python ranks.py MODEL_FOLDER SETTINGS_JSON_OR_null [--noisy]

With `--noisy` the second rank's logits are disturbed, so that its own choices would differ from the first one's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_WORKER_MULTIPROCESSING_METHOD="fork")


def disturb() -> None:
    import torch
    from vllm.distributed import get_tp_group

    from knn_ssd.vllm_plugin.layers import DecoderStack

    original = DecoderStack.logits

    def logits(stack: DecoderStack, *args: Any) -> torch.Tensor:
        right = original(stack, *args)
        return right + 100 * torch.randn_like(right) if get_tp_group().rank_in_group == 1 else right

    DecoderStack.logits = logits  # type: ignore[method-assign]


def main() -> None:
    folder, settings, *noisy = sys.argv[1:]
    from in_vllm import greedy, open_model, tokens_of

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # which `in_vllm` sets for one rank
    from test_vllm_lossless import prompts

    if noisy:
        disturb()
    llm = open_model(Path(folder), json.loads(settings), tensor_parallel_size=2, distributed_executor_backend="mp")
    said = tokens_of(llm, prompts(6), greedy(max_tokens=32))
    print("SAID " + json.dumps({"tokens": said, "counts": llm.collective_rpc("knn_ssd_counts")}))


if __name__ == "__main__":
    main()
