"""Agreement of 4-bit drafts with the model by rounding method; and how many tokens a smaller LM head would miss.

    python benchmarks/rounding.py --prompts FILE.jsonl… [--model M] [--limit N] [--max-new-tokens N]

Agreement is the share of positions of the model's own outputs at which a draft, in runs of 8 tokens, would choose the
token that the model chose; divergence is the Kullback-Leibler divergence of the draft's distribution, in nats.
"""

from __future__ import annotations

import argparse
import time

import torch

from knn_ssd import Engine
from knn_ssd.backends.native import low_bit
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.low_bit import LowBitCopies
from knn_ssd.plan import Plan
from knn_ssd.prompts import read_prompts


def measure(backend: NativeBackend, outputs: list[tuple[list[int], list[int]]]) -> tuple[float, float]:
    """Agreement and divergence of drafts with all weights in 4 bits."""
    plan = Plan.low(backend.num_layers)
    agreed = divergence = count = 0.0
    for prompt, output in outputs:
        session = backend.open(len(prompt) + len(output))
        session.prefill(prompt)
        full = session.forward(output).log_softmax(-1)
        draft = session.teacher_forced_logits(output, plan, 8).log_softmax(-1)
        agreed += float((full.argmax(-1) == draft.argmax(-1)).sum())
        divergence += float((full.exp() * (full - draft)).sum())
        count += len(output)
        session.close()
    return agreed / count, divergence / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=4, help="prompts per file")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, device="cpu", answers=False)
    backend = engine.backend
    assert isinstance(backend, NativeBackend), "the rounding of the native backend is measured"
    outputs = []
    for path in args.prompts:
        for prompt in read_prompts(path)[: args.limit]:
            token_ids = engine.encode(prompt.prompt)
            output = engine.generate(token_ids, plain=True, max_new_tokens=args.max_new_tokens).token_ids
            outputs.append((token_ids, list(output)))
    emitted = [token for _, output in outputs for token in output]
    for share in (4, 2, 1.5):
        size = int(backend.vocab_size / share)
        covered = sum(token < size for token in emitted) / len(emitted)
        print(f"an LM head of the first {size} tokens has {covered:.3f} of all output tokens")
    weighted = LowBitCopies._important

    def uniform(self: LowBitCopies, layer: int, name: str) -> torch.Tensor:
        return torch.ones_like(weighted(self, layer, name))

    for tries, is_weighted in ((1, False), (3, False), (8, False), (1, True), (3, True), (8, True)):
        low_bit._TRIES = tries
        LowBitCopies._important = weighted if is_weighted else uniform  # type: ignore[method-assign]
        backend.low = LowBitCopies(backend.attentions, backend.mlps, backend.head, backend._run_tokens)
        backend._ways.clear()
        started = time.perf_counter()
        backend.prepare(Plan.low(backend.num_layers))
        taken = time.perf_counter() - started
        agreement, divergence = measure(backend, outputs)
        name = "weighted by inputs" if is_weighted else "uniform weights"
        print(
            f"{name}, {tries} ranges: {taken:6.2f} s, agreement {agreement:.4f}, divergence {divergence:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
