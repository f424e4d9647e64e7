"""Keys and values in bfloat16 against float32: memory, speed and agreement with long contexts.

    python benchmarks/long_context.py [--model M] [--tokens 2000 8000] [--repeats 5] [--out ROWS.json]

One native backend with the same weights runs the same text in two sessions, one for each dtype of keys and values, and
goes back to the end of the context after each measurement, so that both alternate. With keys and values in float32, a
bfloat16 checkpoint gives what it gives in float32, so this session is the reference.

Prints, for each length: bytes of a token in the KV cache, and without the 8-bit copies that drafts read; the seconds
of the prefill, which is run once; the median milliseconds of a plain decoding step and of a verification pass over
`--rows` rows, and behind each the median of its ratio to float32's of the same repeat (below 1 is faster). Then, over
the last `--scored` tokens: the share of positions whose most probable token is the reference's, the mean
Kullback-Leibler divergence from the reference in nats, and the mean negative log-likelihood of the text.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _recipes import text_ids, write_rows
from torch.nn import functional

from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.session import NativeSession
from knn_ssd.bench.workload import read_workloads
from knn_ssd.kernels.binding import set_threads
from knn_ssd.kernels.threads import thread_count
from knn_ssd.loading.resolve import load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Row:
    """A dtype of keys and values at one length.

    Args:
        model, tokens, kv_dtype: which.
        token_bytes, exact_bytes: of a token in the KV cache, with and without the 8-bit copies.
        prefill_sec: duration of the prefill.
        step_ms, pass_ms: of a decoding step and of a verification pass, one for each repeat.
        agreement, divergence, loss: over the scored tokens, as the script's docstring says.
    """

    model: str
    tokens: int
    kv_dtype: str
    token_bytes: int
    exact_bytes: int
    prefill_sec: float
    step_ms: tuple[float, ...]
    pass_ms: tuple[float, ...]
    agreement: float
    divergence: float
    loss: float


@dataclass(slots=True)
class Arm:
    """A session under measurement."""

    session: NativeSession
    prefill_sec: float
    logits: torch.Tensor  # (scored, V) before the scored tokens
    step_ms: list[float]
    pass_ms: list[float]


def opened(backend: NativeBackend, dtype: torch.dtype, text: Sequence[int], scored: int, room: int) -> Arm:
    """A session that has run the text, with the logits that predict its last tokens."""
    backend.kv_dtype = dtype
    session = backend.open(len(text) + room)
    before = len(text) - scored
    prefill = session.prefill(list(text[:before]))
    started = time.perf_counter()
    logits = session.forward(list(text[before:]))
    session.commit(scored)
    seconds = prefill.seconds + time.perf_counter() - started
    return Arm(session, seconds, torch.cat([prefill.logits.reshape(1, -1), logits[:-1]]), [], [])


def timed_ms(session: NativeSession, blocks: Sequence[Sequence[int]]) -> float:
    """Mean milliseconds of forward passes over blocks of tokens after the session's own, which stay as they are."""
    length = session.length
    started = time.perf_counter()
    for block in blocks:
        session.forward(list(block))
        session.commit(len(block))
    elapsed = time.perf_counter() - started
    session.rewind(length)
    return elapsed / len(blocks) * 1e3


def measured(backend: NativeBackend, model: str, text: Sequence[int], args: argparse.Namespace) -> list[Row]:
    """Both dtypes on one text, in turns."""
    following = list(text[: args.steps])  # any tokens will do
    passes = [following[: args.rows]] * max(1, args.steps // args.rows)
    room = max(args.steps, len(passes) * args.rows)
    arms = {name: opened(backend, dtype, text, args.scored, room) for name, dtype in DTYPES.items()}
    for number in range(args.repeats + 1):
        for name in list(DTYPES)[:: 1 if number % 2 else -1]:
            arm = arms[name]
            step, verification = timed_ms(arm.session, [[t] for t in following]), timed_ms(arm.session, passes)
            if number:  # the first one warms up
                arm.step_ms.append(step)
                arm.pass_ms.append(verification)
    rows = [row_of(model, text, name, arm, arms["float32"].logits) for name, arm in arms.items()]
    for arm in arms.values():
        arm.session.close()
    return rows


def row_of(model: str, text: Sequence[int], name: str, arm: Arm, reference: torch.Tensor) -> Row:
    """What was measured of an arm, with its agreement with the reference's logits."""
    cache, (own, other) = arm.session.cache, (functional.log_softmax(x, -1) for x in (arm.logits, reference))
    assert cache is not None
    return Row(
        model,
        len(text),
        name,
        cache.token_bytes[0],
        sum(part.nbytes for part in cache.tensors[:2]) // cache.capacity,
        arm.prefill_sec,
        tuple(arm.step_ms),
        tuple(arm.pass_ms),
        (own.argmax(-1) == other.argmax(-1)).float().mean().item(),
        functional.kl_div(own, other, reduction="batchmean", log_target=True).item(),
        functional.nll_loss(own, torch.tensor(text[-len(own) :])).item(),
    )


def table(rows: Sequence[Row]) -> str:
    heads = ("tokens", "keys and values", "bytes per token", "without copies", "prefill, s", "step, ms", "over float32")
    heads += ("pass, ms", "over float32", "agreement", "divergence", "loss")
    lines = [f"| {' | '.join(heads)} |", f"|--:|---|{'--:|' * (len(heads) - 2)}"]
    wide = {row.tokens: row for row in rows if row.kv_dtype == "float32"}
    for row in rows:
        cells = [f"{row.tokens}", row.kv_dtype, f"{row.token_bytes}", f"{row.exact_bytes}", f"{row.prefill_sec:.2f}"]
        for own, other in ((row.step_ms, wide[row.tokens].step_ms), (row.pass_ms, wide[row.tokens].pass_ms)):
            ratio = statistics.median(a / b for a, b in zip(own, other, strict=True))
            cells += [f"{statistics.median(own):.2f}", f"{ratio:.3f}"]
        cells += [f"{row.agreement:.4f}", f"{row.divergence:.2e}", f"{row.loss:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--prompts", nargs="+", default=[], help="text of the contexts (default: the built-in prompts)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 8000], help="lengths (default: 2000 8000)")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps of a repeat (default: 32)")
    parser.add_argument("--rows", type=int, default=8, help="of a verification pass (default: 8)")
    parser.add_argument("--scored", type=int, default=256, help="last tokens on which both are compared (default: 256)")
    parser.add_argument("--threads", type=int, default=thread_count().threads)
    parser.add_argument("--out", type=Path, help="file for the rows, in JSON")
    args = parser.parse_args()
    if not 0 < args.scored < min(args.tokens):
        parser.error(f"--scored must be above 0 and below every length of --tokens, got {args.scored}")
    if min(args.repeats, args.steps, args.rows) < 1:
        parser.error("--repeats, --steps and --rows must be 1 or more")
    set_threads(args.threads)
    loaded = load_model(args.model, device="cpu")
    if loaded.tokenizer is None:
        parser.error(f"'{loaded.name}' has no tokenizer to make contexts with: name another model")
    backend = NativeBackend(loaded.model)
    if max(args.tokens) + args.steps + args.rows > backend.context_length:
        parser.error(
            f"{max(args.tokens)} tokens and the steps are over the model's context of {backend.context_length}"
        )
    ids = text_ids(loaded.tokenizer, read_workloads(args.prompts))
    rows: list[Row] = []
    for length in args.tokens:
        rows += measured(backend, loaded.name, list(itertools.islice(itertools.cycle(ids), length)), args)
        if args.out is not None:
            write_rows(args.out, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
