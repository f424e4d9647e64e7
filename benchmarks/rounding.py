"""Agreement of 4-bit drafts with the model by how weights are rounded, on prompts to which nothing was fitted.

    python benchmarks/rounding.py --prompts FILE.jsonl… [--model M] [--limit N] [--max-new-tokens N]
                                  [--fitting N] [--fitting-tokens N] [--by-domain] [--ranges] [--upper-bits]

Agreement is the share of positions of the model's own outputs at which a draft, in runs of 8 tokens, would choose the
token that the model chose; divergence is the Kullback-Leibler divergence of the draft's distribution, in nats.

`--upper-bits` compares, for a file of Q8_0, drafts that read the upper four bits of the file's own codes instead of a
copy. They are measured with inputs and keys in float32, which favours them: drafts from copies round both to 8 bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from _recipes import observed

from knn_ssd import Engine
from knn_ssd.backends.base import ForwardRequest
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.error_feedback import fitted_copies
from knn_ssd.backends.native.low_bit import FIRST_OF, LowBitCopies
from knn_ssd.calibrate.continuations import Observation
from knn_ssd.calibrate.low_bit_fit import texts_in_turn
from knn_ssd.kernels import quantisation
from knn_ssd.kernels.gguf_rows import GGUFRows, weights_of
from knn_ssd.plan import Plan
from knn_ssd.progress import NoProgress
from knn_ssd.prompts import Prompt, read_prompts


def measure(
    backend: NativeBackend, outputs: Sequence[Observation], drafter: NativeBackend | None = None
) -> tuple[float, float]:
    """Agreement and divergence of drafts with all weights in 4 bits: those of the copies, or of another such model."""
    plan, forward = (Plan.low(backend.num_layers), backend.forward) if drafter is None else (None, drafter.forward)
    agreed = divergence = count = 0.0
    for each in outputs:
        session = backend.open(len(each.prompt_ids) + len(each.token_ids))
        session.prefill(list(each.prompt_ids))
        full = session.forward(list(each.token_ids)).log_softmax(-1)
        rows = ForwardRequest(each.token_ids, session.length, session.cache, plan, len(each.token_ids), run_length=8)
        draft = forward(rows).logits.log_softmax(-1)
        agreed += float((full.argmax(-1) == draft.argmax(-1)).sum())
        divergence += float((full.exp() * (full - draft)).sum())
        count += len(each.token_ids)
        session.close()
    return agreed / count, divergence / count


def show(
    name: str,
    backend: NativeBackend,
    held_out: Mapping[str, Sequence[Observation]],
    make: Callable[[], NativeBackend | None],
) -> None:
    """Makes copies, or a model that drafts, and prints a row of the table: seconds, and agreement and divergence in all
    and by domain.
    """
    started = time.perf_counter()
    drafter = make()
    taken = time.perf_counter() - started
    own = {domain: measure(backend, outputs, drafter) for domain, outputs in held_out.items()}
    agreement, divergence = (sum(values) / len(own) for values in zip(*own.values(), strict=True))
    by_domain = " | ".join(f"{each:.3f}" for each, _ in own.values())
    print(f"| {name} | {taken:.1f} | {agreement:.4f} | {divergence:.4f} | {by_domain} |", flush=True)


def fit(backend: NativeBackend, texts: Sequence[Sequence[int]]) -> None:
    """Has the backend use copies fitted to texts."""
    backend.replace_low_bit(fitted_copies(backend.model, texts, NoProgress()))


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


def upper_values(rows: GGUFRows, importance: torch.Tensor | None) -> torch.Tensor:
    """What the upper four bits of the codes of a Q8_0 matrix stand for, in float16.

    Args:
        rows: the matrix.
        importance: (cols,) of its columns, by which a scale and a zero of each block of 32 are fitted to the weights;
            with None they are the block's own scale and the middle of the codes that share their upper bits.
    """
    blocks = rows.data.view(len(rows.data), -1, 34)
    scales, codes = blocks[..., :2].contiguous().view(torch.float16).float(), blocks[..., 2:].view(torch.int8)
    levels = (codes >> 4).float()
    if importance is None:
        return ((16 * levels + 7.5) * scales).half().flatten(1)
    weights, of_column = codes * scales, importance.view(-1, 32)
    total = of_column.sum(-1)
    middle, mean = ((each * of_column).sum(-1, keepdim=True) / total[:, None] for each in (levels, weights))
    spread, shared = (
        ((levels - middle) * each * of_column).sum(-1, keepdim=True) for each in (levels - middle, weights - mean)
    )
    slope = torch.where(spread > 0, shared / spread.clamp_min(1e-30), 16 * scales)
    return ((levels - middle) * slope + mean).half().flatten(1)


def reading_upper_bits(backend: NativeBackend, is_fitted: bool) -> NativeBackend:
    """The same model with `upper_values` for weights; its embedding stays as it is."""
    importance = {"lm_head": backend.low._column_importance(0, "head")}
    for layer in range(backend.num_layers):
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in names:
                importance[f"model.layers.{layer}.{part}.{name}_proj"] = backend.low._column_importance(
                    layer, FIRST_OF[name]
                )

    def values(name: str, weight: torch.Tensor | GGUFRows) -> torch.Tensor:
        if not isinstance(weight, GGUFRows):
            return weight
        assert weight.quantisation == "Q8_0", "the upper bits of Q8_0 files are measured"
        if "embed_tokens" in name:
            return weight.dequantised().half()
        return upper_values(weight, importance[name.removesuffix(".weight")] if is_fitted else None)

    with torch.device("meta"):
        model = type(backend.model)(backend.model.config)
    tensors = {name: values(name, weight) for name, weight in weights_of(backend.model).items()}
    model.load_state_dict(tensors, assign=True)
    base: Any = model.base_model
    base.rotary_emb = cast(Any, backend.model.base_model).rotary_emb
    return NativeBackend(model.eval().requires_grad_(False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=12, help="prompts per domain that are measured")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--fitting", type=int, default=8, help="further prompts per domain, to fit to; 0 fits none")
    parser.add_argument("--fitting-tokens", type=int, default=32, help="tokens of each continuation of those")
    parser.add_argument("--by-domain", action="store_true", help="copies fitted to one domain's text as well")
    parser.add_argument("--ranges", action="store_true", help="other settings of the first start's rounding as well")
    parser.add_argument("--upper-bits", action="store_true", help="the upper four bits of a Q8_0 file as well")
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
    if args.upper_bits:
        show("upper bits", backend, held_out, lambda: reading_upper_bits(backend, False))
        show("upper bits, blocks fitted", backend, held_out, lambda: reading_upper_bits(backend, True))
    chosen = {"all domains": list(fitting.values())} if args.fitting else {}
    if args.by_domain:
        chosen |= {domain: [own] for domain, own in fitting.items()}
    for name, domains in chosen.items():
        texts = [(*each.prompt_ids, *each.token_ids) for each in texts_in_turn(domains)]
        show(f"fitted to {name}", backend, held_out, partial(fit, backend, texts))


if __name__ == "__main__":
    main()
