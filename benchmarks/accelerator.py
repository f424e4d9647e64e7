"""Checks and measures the transformers backend on an accelerator, or another device, in some minutes.

    python benchmarks/accelerator.py [--device cuda] [--models M…] [--out FILE.json]

For each model, in float32 and in bfloat16: whether plain decoding and every kind of draft gives what
`transformers.generate` gives, the exactness that the engine claims, tokens per second by `transformers.generate`, by
plain decoding and by default, what skipped and looked-up drafts come to, and the memory in use. A model is a name as
for `--model`, or `random:FAMILY`, which has random weights and `--width` and `--layers`; `default` is the embedded
model. Without `--models`, the embedded model and a random Qwen3 are measured.

Ends with exit code 1 if an output in float32 differs from that of `transformers.generate`, and with 2 where there is no
such device. In 16 bits, near-ties may fall either way, so outputs that differ are counted and no error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from knn_ssd import Engine, Plan
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.io import write_whole
from knn_ssd.loading.resolve import load_model
from knn_ssd.plan import Policy
from knn_ssd.testing import tiny_model
from knn_ssd.tools.memory import peak_bytes

DTYPES = ("float32", "bfloat16")
PROMPT_TOKENS = 96
VOCABULARY = 32_000  # of random models


@dataclass(frozen=True, slots=True)
class Row:
    """One way to decode, on one model in one dtype.

    Args:
        model, dtype, way: which.
        exactness: what the engine claims.
        equal, outputs: how many of the outputs equal those of `transformers.generate`.
        tokens_per_sec: new tokens per second, prefill included.
        drafted, accepted: draft tokens, and how many of them were accepted.
        memory_mb: the most memory of the device in use; of the process, for the CPU.
    """

    model: str
    dtype: str
    way: str
    exactness: str
    equal: int
    outputs: int
    tokens_per_sec: float
    drafted: int
    accepted: int
    memory_mb: float


def prompts(vocab_size: int) -> list[list[int]]:
    """One that repeats itself, which can be copied from, and one that does not."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    return [drawn[:12] * (PROMPT_TOKENS // 12), drawn]


def loaded(name: str, dtype: str, device: torch.device, width: int, layers: int) -> PreTrainedModel:
    kind, _, family = name.partition(":")
    if kind != "random":
        return load_model(name if name != "default" else None, dtype=dtype, device=device).model
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "head_dim": width // 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.05}
    longest = {"max_position_embeddings": 4096, "vocab_size": VOCABULARY}
    model = tiny_model(family, dtype=getattr(torch, dtype), **sizes, **heads, **longest)
    return model.to(device)  # type: ignore[arg-type]


def ways(engine: Engine) -> dict[str, dict[str, Any]]:
    """Options of `Engine.generate` by what they are called here."""
    count = engine.backend.num_layers
    some = range(count // 3, 2 * count // 3, 2)
    policy = Policy(max_draft=4, threshold=0.0)
    return {
        "plain": {"plain": True},
        "skip": {"plan": Plan.skipping(count, some, some, policy)},
        "lookup": {"plan": Plan.skipping(count, policy=Policy(max_draft=8, threshold=0.0, lookup=True))},
        "default": {},
    }


def generated(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    return output[0, len(prompt) :].tolist()


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    started = time.perf_counter()
    result = run()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return result, time.perf_counter() - started


def memory_mb(device: torch.device) -> float:
    most = getattr(torch.get_device_module(device), "max_memory_allocated", None) if device.type != "cpu" else None
    return most(device) / 1e6 if most is not None else (peak_bytes() or 0) / 1e6


def measure(name: str, dtype: str, args: argparse.Namespace) -> list[Row]:
    device = torch.device(args.device)
    model = loaded(name, dtype, device, args.width, args.layers)
    backend = TransformersBackend(model)
    engine = Engine(model, answers=False, backend=backend)
    asked = prompts(backend.vocab_size)
    generated(model, asked[0], 4)  # warm-up
    references = [timed(lambda p=p: generated(model, p, args.new_tokens), device) for p in asked]
    expected = [tokens for tokens, _ in references]
    made, seconds = sum(map(len, expected)), sum(spent for _, spent in references)
    rows = [Row(name, dtype, "generate", "", len(asked), len(asked), made / seconds, 0, 0, memory_mb(device))]
    for way, chosen in ways(engine).items():
        options = {"max_new_tokens": args.new_tokens, "repetition_penalty": 1.0, **chosen}
        engine.generate(asked[0], **{**options, "max_new_tokens": 8})  # warm-up
        results = [timed(lambda p=p, o=options: engine.generate(p, **o), device) for p in asked]
        outputs, seconds = [result for result, _ in results], sum(spent for _, spent in results)
        equal = sum(list(output.token_ids) == wanted for output, wanted in zip(outputs, expected, strict=True))
        drafted, accepted = (sum(getattr(o.stats, kind) for o in outputs) for kind in ("drafted", "accepted"))
        speed = sum(len(output.token_ids) for output in outputs) / seconds
        exactness = str(engine.exactness.value)
        rows.append(Row(name, dtype, way, exactness, equal, len(asked), speed, drafted, accepted, memory_mb(device)))
    return rows


def show(rows: Sequence[Row]) -> None:
    table = Table("model", "dtype", "decoding", "exactness", "equal", "tokens/s", "accepted", "memory, MB")
    for row in rows:
        equal, accepted = f"{row.equal} of {row.outputs}", f"{row.accepted} of {row.drafted}"
        numbers = (f"{row.tokens_per_sec:.1f}", accepted, f"{row.memory_mb:.0f}")
        table.add_row(row.model, row.dtype, row.way, row.exactness, equal, *numbers)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["default", "random:qwen3"])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=1024, help="hidden size of random models")
    parser.add_argument("--layers", type=int, default=24, help="layers of random models")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print(f"There is no CUDA device here, and --device is {args.device}. Name another, such as --device cpu.")
        sys.exit(2)
    rows = [row for name in args.models for dtype in DTYPES for row in measure(name, dtype, args)]
    show(rows)
    if args.out is not None:
        write_whole(args.out, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.exit(any(row.dtype == "float32" and row.equal < row.outputs for row in rows))


if __name__ == "__main__":
    main()
