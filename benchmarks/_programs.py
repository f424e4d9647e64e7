"""The programs that scripts compare in turns, with the precision of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUN_PEER = Path(__file__).parent / "peers" / "run.sh"
OURS = "knn-ssd"


@dataclass(frozen=True, slots=True)
class Program:
    """A program, as `benchmarks/peers/run.sh` runs it.

    Args:
        weights, kv_cache: their precision; knn-ssd's is that of the native backend.
        peer: name of the program for `run.sh`; None is knn-ssd.
        options: of its script.
    """

    weights: str
    kv_cache: str
    peer: str | None
    options: tuple[str, ...] = ()


LLAMA_CPP = {
    "llama-cpp-16": Program("bfloat16", "float32", "llama_cpp", ("--bits", "16")),
    "llama-cpp-16-kv16": Program("bfloat16", "float16", "llama_cpp", ("--bits", "16", "--kv-bits", "16")),
    "llama-cpp-8": Program("Q8_0", "float16", "llama_cpp", ("--bits", "8")),
    "llama-cpp-4": Program("Q4_0", "float16", "llama_cpp", ("--bits", "4")),
}
PROGRAMS = {
    OURS: Program("as the checkpoint", "float32", None),
    **LLAMA_CPP,
    "openvino-genai-fp16": Program("float16", "8 bits", "openvino_genai", ("--weights", "fp16")),
    "openvino-genai-int8": Program("8 bits", "8 bits", "openvino_genai", ("--weights", "int8")),
    "openvino-genai-int4": Program("4 bits", "8 bits", "openvino_genai", ("--weights", "int4")),
}
SERVERS = {
    OURS: PROGRAMS[OURS],
    **LLAMA_CPP,
    "vllm-cpu": Program("as the checkpoint", "as the checkpoint", "vllm_cpu"),
}
