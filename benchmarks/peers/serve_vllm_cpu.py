"""Serves a model with vLLM's own server, in its CPU build.

    benchmarks/peers/run.sh serve vllm_cpu --model DIR --port P [--clients N] [--context N]

Weights and KV cache are in the dtype of the checkpoint. The model is compiled, the default of vLLM, before the server
answers. Nothing of a prompt is kept for the next one.
"""

from __future__ import annotations

import os
import sys

from common import serving_parser


def main() -> None:
    args = serving_parser(__doc__).parse_args()
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model, "--dtype", "auto"]
    command += ["--host", "127.0.0.1", "--port", args.port, "--max-num-seqs", args.clients]
    command += ["--max-model-len", args.context, "--kv-cache-memory-bytes", 2 << 30, "--no-enable-prefix-caching"]
    os.execv(sys.executable, [str(word) for word in command])


if __name__ == "__main__":
    main()
