"""Agreement of 4-bit drafts with the model by how weights are rounded, on prompts to which nothing was fitted.

    python benchmarks/rounding.py --prompts FILE.jsonl… [--model M] [--limit N] [--max-new-tokens N]
                                  [--fitting N] [--fitting-tokens N] [--by-domain] [--ranges]

Agreement is the share of positions of the model's own outputs at which a draft, in runs of 8 tokens, would choose the
token that the model chose; divergence is the Kullback-Leibler divergence of the draft's distribution, in nats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from _recipes import observed

from knn_ssd import Engine
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.low_bit import LowBitCopies
from knn_ssd.calibrate.continuations import Observation, fitting_texts
from knn_ssd.kernels import quantisation
from knn_ssd.plan import Plan
from knn_ssd.progress import NoProgress
from knn_ssd.prompts import Prompt, read_prompts


def measure(backend: NativeBackend, outputs: Sequence[Observation]) -> tuple[float, float]:
    """Agreement and divergence of drafts with all weights in 4 bits."""
    plan = Plan.low(backend.num_layers)
    agreed = divergence = count = 0.0
    for each in outputs:
        session = backend.open(len(each.prompt_ids) + len(each.token_ids))
        session.prefill(list(each.prompt_ids))
        full = session.forward(list(each.token_ids)).log_softmax(-1)
        draft = session.teacher_forced_logits(list(each.token_ids), plan, 8).log_softmax(-1)
        agreed += float((full.argmax(-1) == draft.argmax(-1)).sum())
        divergence += float((full.exp() * (full - draft)).sum())
        count += len(each.token_ids)
        session.close()
    return agreed / count, divergence / count


def show(
    name: str, backend: NativeBackend, held_out: Mapping[str, Sequence[Observation]], make: Callable[[], None]
) -> None:
    """Makes copies, and prints a row of the table: seconds, and agreement and divergence in all and by domain."""
    started = time.perf_counter()
    make()
    taken = time.perf_counter() - started
    own = {domain: measure(backend, outputs) for domain, outputs in held_out.items()}
    agreement, divergence = (sum(values) / len(own) for values in zip(*own.values(), strict=True))
    by_domain = " | ".join(f"{each:.3f}" for each, _ in own.values())
    print(f"| {name} | {taken:.1f} | {agreement:.4f} | {divergence:.4f} | {by_domain} |", flush=True)


def forget(backend: NativeBackend) -> None:
    """Has the backend make its copies anew."""
    backend.low = LowBitCopies(backend.attentions, backend.mlps, backend.head, backend._run_sample)
    backend._resolved.clear()


def show_ranges(backend: NativeBackend, held_out: Mapping[str, Sequence[Observation]]) -> None:
    """The rounding of the first start with other numbers of ranges, and without weighting columns by their inputs."""
    weighted, ranges = LowBitCopies._column_importance, quantisation.NUM_RANGES

    def uniform(self: LowBitCopies, layer: int, name: str) -> torch.Tensor:
        return torch.ones_like(weighted(self, layer, name))

    for tried, is_weighted in ((1, False), (3, False), (8, False), (1, True), (8, True)):
        quantisation.NUM_RANGES = tried
        LowBitCopies._column_importance = weighted if is_weighted else uniform  # type: ignore[method-assign]
        forget(backend)
        name = f"{tried} ranges, columns weighted {'by their inputs' if is_weighted else 'alike'}"
        show(name, backend, held_out, lambda: backend.prepare(Plan.low(backend.num_layers)))
    quantisation.NUM_RANGES, LowBitCopies._column_importance = ranges, weighted  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=12, help="prompts per domain that are measured")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--fitting", type=int, default=8, help="further prompts per domain, to fit to")
    parser.add_argument("--fitting-tokens", type=int, default=32, help="tokens of each continuation of those")
    parser.add_argument("--by-domain", action="store_true", help="copies fitted to one domain's text as well")
    parser.add_argument("--ranges", action="store_true", help="other settings of the first start's rounding as well")
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, device="cpu", answers=False, weight_cache=False)
    backend = engine.backend
    assert isinstance(backend, NativeBackend), "the rounding of the native backend is measured"
    fitting: dict[str, list[Observation]] = {}
    held_out: dict[str, list[Observation]] = {}
    grouped: dict[str, list[Prompt]] = {}
    for prompt in [prompt for path in args.prompts for prompt in read_prompts(path)]:
        grouped.setdefault(prompt.domain or "none", []).append(prompt)
    for domain, prompts in grouped.items():
        held_out[domain] = observed(engine, prompts[: args.limit], args.max_new_tokens)
        fitting[domain] = observed(engine, prompts[args.limit :][: args.fitting], args.fitting_tokens)
    print(
        f"| rounding | seconds | agreement | divergence | {' | '.join(held_out)} |\n|---{'|--:' * (3 + len(held_out))}|"
    )
    forget(backend)
    show("first start", backend, held_out, lambda: backend.prepare(Plan.low(backend.num_layers)))
    if args.ranges:
        show_ranges(backend, held_out)
    chosen = {"all domains": list(fitting.values())}
    if args.by_domain:
        chosen |= {domain: [own] for domain, own in fitting.items()}
    for name, domains in chosen.items():
        fit = partial(backend.fit_low_bit, fitting_texts(domains), NoProgress())
        show(f"fitted to {name}", backend, held_out, fit)


if __name__ == "__main__":
    main()
