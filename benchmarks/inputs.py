"""Inputs of matrix products rounded to bfloat16 against float32 ones, for bfloat16 weights: agreement and speed.

    python benchmarks/inputs.py [--model M] [--prompts FILE.jsonl…] [--tokens 512] [--repeats 7] [--out ROWS.json]

It needs a processor that multiplies bfloat16 (AVX512_BF16) and has no tile unit, or KNN_SSD_KERNELS=vectors. One native
backend runs the same texts, one of each domain, with both. The reference is float32 inputs. `transformers` is the same
checkpoint in torch's bfloat16, where all activations are rounded.

Prints, for each: the share of positions whose most probable token is the reference's, and the mean Kullback-Leibler
divergence from the reference in nats. And for both of ours, in medians of interleaved runs: the milliseconds of a
prefill, of a plain decoding step, and of verification passes, each with its ratio to float32's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from _recipes import text_ids, write_rows
from rich.progress import track
from torch.nn import functional

from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.session import NativeSession
from knn_ssd.bench.workload import read_workloads
from knn_ssd.kernels.binding import float32_inputs, rounds_inputs, uses_tiles
from knn_ssd.loading.resolve import load_model

TAKEN: dict[str, Callable[[], AbstractContextManager[None]]] = {"float32": float32_inputs, "bfloat16": nullcontext}
REFERENCE, TORCH = "float32", "transformers, bfloat16"
PASSES = (1, 5, 9)


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one way to take inputs.

    Args:
        model, inputs, positions: which, and how many positions were compared.
        agreement, divergence: as the script's docstring says.
        medians_ms: of a prefill and of passes over rows; empty for transformers.
    """

    model: str
    inputs: str
    positions: int
    agreement: float
    divergence: float
    medians_ms: dict[str, float]


def logits_of(backend: NativeBackend, text: list[int]) -> torch.Tensor:
    """The logits (n, V) after every token but the last."""
    session = backend.open(len(text))
    first = session.prefill(text[:1]).logits.reshape(1, -1)
    rest = session.forward(text[1:-1])
    session.close()
    return torch.cat([first, rest])


def timed_ms(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def measure(backend: NativeBackend, text: list[int], repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each part, by what the inputs are."""
    sessions: dict[str, NativeSession] = {}
    for name, taken in TAKEN.items():
        sessions[name] = backend.open(len(text) + max(PASSES))
        with taken():
            sessions[name].prefill(text)

    def prefill() -> None:
        session = backend.open(len(text))
        session.prefill(text)
        session.close()

    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in TAKEN}
    for repeat in track(range(repeats + 1), "timing", transient=True):
        for name in list(TAKEN)[:: 1 if repeat % 2 else -1]:
            parts: dict[str, Callable[[], object]] = {f"prefill of {len(text)}": prefill}
            parts |= {
                f"{rows} row{'s' * (rows > 1)}": lambda rows=rows, session=sessions[name]: session.forward(text[:rows])
                for rows in PASSES
            }
            for part, run in parts.items():
                with TAKEN[name]():
                    elapsed = timed_ms(run)
                if repeat:  # the first one warms up
                    times[name][part].append(elapsed)
    return {name: {part: statistics.median(each) for part, each in parts.items()} for name, parts in times.items()}


def compare(backend: NativeBackend, texts: list[list[int]]) -> dict[str, tuple[float, float, int]]:
    """Agreement with the reference, divergence from it, and the number of positions, by what the inputs are."""
    agreed: dict[str, list[torch.Tensor]] = defaultdict(list)
    divergences: dict[str, list[torch.Tensor]] = defaultdict(list)
    for text in track(texts, "comparing", transient=True):
        found: dict[str, torch.Tensor] = {}
        for name, taken in TAKEN.items():
            with taken():
                found[name] = logits_of(backend, text)
        with torch.no_grad():
            found[TORCH] = backend.model(input_ids=torch.tensor([text[:-1]])).logits[0].float()
        reference = functional.log_softmax(found[REFERENCE], -1)
        for name, logits in found.items():
            own = functional.log_softmax(logits, -1)
            agreed[name].append((own.argmax(-1) == reference.argmax(-1)).float())
            divergences[name].append((reference.exp() * (reference - own)).sum(-1))
    return {
        name: (torch.cat(each).mean().item(), torch.cat(divergences[name]).mean().item(), len(torch.cat(each)))
        for name, each in agreed.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--prompts", nargs="+", default=[], help="text to run (default: the built-in prompts)")
    parser.add_argument("--tokens", type=int, default=512, help="of a text (default: 512)")
    parser.add_argument("--repeats", type=int, default=7, help="default: 7")
    parser.add_argument("--out", type=Path, help="file for the rows, in JSON")
    args = parser.parse_args()
    if min(args.repeats, args.tokens - 2) < 1:
        parser.error("--repeats must be 1 or more, and --tokens 3 or more")
    if not rounds_inputs() or uses_tiles():
        parser.error("this needs a processor with AVX512_BF16, and KNN_SSD_KERNELS=vectors if it has a tile unit")
    loaded = load_model(args.model, device="cpu")
    if loaded.tokenizer is None:
        parser.error(f"'{loaded.name}' has no tokenizer to make texts with: name another model")
    by_domain = defaultdict(list)
    for prompt in read_workloads(args.prompts):
        by_domain[prompt.domain].append(prompt)
    texts = [text_ids(loaded.tokenizer, prompts)[: args.tokens] for prompts in by_domain.values()]
    backend = NativeBackend(loaded.model)
    found, medians = compare(backend, texts), measure(backend, texts[0], args.repeats)
    rows = [
        Row(loaded.name, name, count, agreement, divergence, medians.get(name, {}))
        for name, (agreement, divergence, count) in found.items()
    ]
    if args.out is not None:
        write_rows(args.out, rows)
    print(table(rows))


def table(rows: list[Row]) -> str:
    parts = list(rows[0].medians_ms)
    lines = [f"| inputs | positions | agreement | divergence | {' | '.join(f'{part}, ms' for part in parts)} |"]
    lines.append(f"|---|{'--:|' * (3 + len(parts))}")
    for row in rows:
        times = [
            f"{row.medians_ms[part]:.1f} ({row.medians_ms[part] / rows[0].medians_ms[part]:.2f})"
            if row.medians_ms
            else "–"
            for part in parts
        ]
        cells = [row.inputs, f"{row.positions}", f"{row.agreement:.4f}", f"{row.divergence:.1e}", *times]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
