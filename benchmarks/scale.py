"""A model of 7B parameters: loading, memory, plain steps against memory bandwidth, drafts, blocks of rows, prefill.

    python benchmarks/scale.py --out FOLDER [--layers 32] [--hidden 4096] [--vocabulary 32000] [--repeats 5]

The model has the shape of Llama 2 7B (arXiv 2307.09288) and random weights, in bfloat16: nothing is downloaded, and
time and memory do not hang on the values. FOLDER, which takes 13.5 GB, is written once and used again. The model is
started twice, each time in a process of its own; the first one measures the rest, in medians of interleaved runs.
Weights that were just written lie in memory, so the first start reads no disk either.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from knn_ssd import Engine, Plan
from knn_ssd.backends.base import Backend, Prefill
from knn_ssd.kernels.binding import num_threads
from knn_ssd.loading.resolve import load_model
from knn_ssd.tools.memory import peak_bytes

ROWS = (1, 2, 5, 9, 17)
PROMPT_TOKENS = 200
PREFILLS = 2
BUFFER_BYTES = 2**30
INITIAL_DEVIATION = 0.02  # of a weight, as in Llama's config

DRAFT, BUFFER, PREFILL = "draft step, all in 4 bits", "reading a buffer", f"prefill of {PROMPT_TOKENS} tokens"


@dataclass(frozen=True)
class Start:
    """One start in a process of its own.

    Args:
        load_sec: from the folder to the loaded model.
        probe_sec: making the engine, which probes its exactness.
        copy_sec: making the 4-bit copies.
        first_token_sec: a prompt of 16 tokens and one token.
        loaded_peak_bytes, peak_bytes: peak resident memory before and after the 4-bit copies.
        checkpoint_bytes, weight_bytes: size of the weights in bfloat16, and as the kernels read them.
        low_bit_bytes: memory of their 4-bit copies.
        read_bytes: what a decode step reads of the weights: all but the embedding.
        threads: how many compute.
        seconds: medians of what was measured; empty for the second start.
    """

    load_sec: float
    probe_sec: float
    copy_sec: float
    first_token_sec: float
    loaded_peak_bytes: int
    peak_bytes: int
    checkpoint_bytes: int
    weight_bytes: int
    low_bit_bytes: int
    read_bytes: int
    threads: int
    seconds: dict[str, float]


def config_of(layers: int, hidden: int, vocabulary: int) -> LlamaConfig:
    """The shape of Llama 2 7B, or a smaller one in proportion."""
    heads = hidden // 128
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=-(-11008 * hidden // 4096 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write_model(folder: Path, config: LlamaConfig, console: Console) -> None:
    """Writes random weights, a file for each layer, and the config last."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).state_dict().items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        words = name.split(".")
        parts.setdefault(f"layer-{words[2]}" if words[1] == "layers" else "rest", []).append(name)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for part, names in track(parts.items(), "writing weights", console=console):
        weights = {name: random_weight(shapes[name], generator) for name in names}
        save_file(weights, folder / f"{part}.safetensors", {"format": "pt"})
    places = {name: f"{part}.safetensors" for part, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(folder)


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A weight in bfloat16; those of norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(0, INITIAL_DEVIATION, generator=generator).bfloat16()


def start(folder: Path, repeats: int) -> Start:
    """Starts the model in this process; measures it where there are `repeats`."""
    began = time.perf_counter()
    model = load_model(folder, device="cpu").model
    loaded = time.perf_counter()
    engine = Engine(model, answers=False)
    probed, loaded_peak = time.perf_counter(), peak_bytes() or 0
    engine.prepare()
    copied = time.perf_counter()
    engine.generate(list(range(5, 21)), max_new_tokens=1)
    ended = time.perf_counter()
    memory, embedding = engine.memory, model.get_input_embeddings().weight
    read_bytes = memory.weights - embedding.nbytes
    return Start(
        loaded - began,
        probed - loaded,
        copied - probed,
        ended - copied,
        loaded_peak,
        memory.peak or 0,
        sum(weight.nbytes for weight in model.parameters()),
        memory.weights,
        memory.low_bit,
        read_bytes,
        num_threads(),
        measure(engine.backend, repeats, min(BUFFER_BYTES, read_bytes)) if repeats else {},
    )


def measure(backend: Backend, repeats: int, buffer_bytes: int) -> dict[str, float]:
    """Median seconds of each part; the parts take turns, so that a disturbance hits all of them."""
    session = backend.open(PROMPT_TOKENS + max(ROWS))
    session.prefill(prompt(backend))
    low, buffer = Plan.low(backend.num_layers), torch.ones(buffer_bytes // 4)
    parts: dict[str, Callable[[], object]] = {BUFFER: lambda: buffer.sum().item()}
    parts |= {str(rows): lambda rows=rows: session.forward([7] * rows) for rows in ROWS}
    parts[DRAFT] = lambda: session.forward([7], low)
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in track(range(repeats + 1), "measuring", console=Console(stderr=True)):
        for name, run in parts.items():
            began = time.perf_counter()
            run()
            if repeat:
                taken[name].append(time.perf_counter() - began)
    taken[PREFILL] = [prefill(backend).seconds for _ in range(PREFILLS)]
    return {name: statistics.median(times) for name, times in taken.items()}


def prefill(backend: Backend) -> Prefill:
    session = backend.open(PROMPT_TOKENS)
    try:
        return session.prefill(prompt(backend))
    finally:
        session.close()


def prompt(backend: Backend) -> list[int]:
    return [(7919 * i + 5) % backend.vocab_size for i in range(PROMPT_TOKENS)]


def started(folder: Path, repeats: int) -> Start:
    """A start in another process."""
    command = [sys.executable, __file__, "--out", str(folder), "--repeats", str(repeats), "--start"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, Any] = json.loads(done.stdout)
    return Start(**values)


def rows_of(first: Start, second: Start) -> list[tuple[str, str, str]]:
    """The lines of the table: what, how much, and against what."""
    seconds, plain = first.seconds, first.seconds["1"]
    bandwidth = min(BUFFER_BYTES, first.read_bytes) / seconds[BUFFER]
    floor = first.read_bytes / bandwidth

    def both(name: str) -> tuple[str, str, str]:
        return name, f"{getattr(first, name):.2f} s", f"second start: {getattr(second, name):.2f} s"

    return [
        ("weights", gigabytes(first.weight_bytes), f"in bfloat16: {gigabytes(first.checkpoint_bytes)}"),
        ("memory of 4-bit copies", gigabytes(first.low_bit_bytes), share(first.low_bit_bytes, first.weight_bytes)),
        *(
            (what, *both(name)[1:])
            for what, name in (
                ("loading", "load_sec"),
                ("probe of exactness", "probe_sec"),
                ("4-bit copies", "copy_sec"),
                ("first token after a prompt of 16", "first_token_sec"),
            )
        ),
        (
            "peak memory",
            gigabytes(first.peak_bytes),
            f"before the 4-bit copies: {gigabytes(first.loaded_peak_bytes)}",
        ),
        (BUFFER, f"{bandwidth / 1e9:.1f} GB/s", f"{first.threads} threads"),
        ("plain step", f"{1e3 * plain:.1f} ms", f"{plain / floor:.2f} of reading the weights at that bandwidth"),
        (DRAFT, f"{1e3 * seconds[DRAFT]:.1f} ms", f"{seconds[DRAFT] / plain:.2f} of a plain step"),
        *(
            (f"{rows} rows", f"{1e3 * seconds[str(rows)]:.1f} ms", f"{seconds[str(rows)] / plain:.2f} of a plain step")
            for rows in ROWS[1:]
        ),
        (PREFILL, f"{seconds[PREFILL]:.2f} s", f"{PROMPT_TOKENS / seconds[PREFILL]:.1f} tokens/s"),
    ]


def share(part: float, whole: float) -> str:
    return f"{part / whole:.2f} of the weights"


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(asdict(start(args.out, args.repeats))))
        return
    if not (args.out / "config.json").is_file():
        config = config_of(args.layers, args.hidden, args.vocabulary)
        write_model(args.out, config, Console(stderr=True))
    found = LlamaConfig.from_pretrained(args.out)
    if (found.num_hidden_layers, found.hidden_size) != (args.layers, args.hidden):
        parser.error(f"{args.out} holds {found.num_hidden_layers} layers of {found.hidden_size}; name another folder")
    table = Table(title="Llama 2 7B's shape" if args.layers == 32 and args.hidden == 4096 else "a smaller shape")
    for column in ("what", "how much", "against what"):
        table.add_column(column)
    for row in rows_of(started(args.out, args.repeats), started(args.out, 0)):
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
