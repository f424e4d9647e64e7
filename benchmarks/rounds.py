"""Where the time of a round goes: forward passes by rows, the draft step and its parts, sampling, lookup.

    python benchmarks/rounds.py [--model M] [--context N]

Medians of interleaved runs on the native backend, in milliseconds and as a share of one plain decode step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from knn_ssd import Engine, Mode, Plan, Policy
from knn_ssd.sampling import Sampler, SamplingParams
from knn_ssd.speculation.lookup import LookupDraft
from knn_ssd.speculation.self_draft import SelfDraft, top_probability

REPEATS = 15


def parts(engine: Engine, context: int) -> dict[str, Callable[[], object]]:
    """The parts that are timed, by name."""
    backend, layers = engine.backend, engine.backend.num_layers
    keep, low, skip = ((mode,) * layers for mode in (Mode.KEEP, Mode.LOW, Mode.SKIP))
    plans = {
        "draft step, all in 4 bits": Plan.low(layers, Policy(4, 0.0)),
        "its attention and head": Plan(low, skip, Mode.LOW),
        "its MLP and head": Plan(skip, low, Mode.LOW),
        "its head": Plan(skip, skip, Mode.LOW),
        "the full head alone": Plan(skip, skip, Mode.KEEP),
        "everything but attention": Plan(skip, keep, Mode.KEEP),
    }
    for plan in plans.values():
        backend.prepare(plan)
    session = backend.open(context + 64)
    session.prefill([5 + i % 100 for i in range(context)])
    sampler = Sampler.from_params(SamplingParams(), backend.device)
    logits = session.forward([7] * 5)
    tokens = [5 + i % 100 for i in range(context)]
    lookup, draft = LookupDraft(), SelfDraft(session, plans["draft step, all in 4 bits"], sampler)
    measured: dict[str, Callable[[], object]] = {
        f"full model, {rows} rows": lambda rows=rows: session.forward([7] * rows) for rows in (1, 2, 3, 5, 9, 17)
    }
    measured |= {name: lambda plan=plan: session.forward([7], plan) for name, plan in plans.items()}
    measured |= {
        "self-draft of 4 tokens": lambda: draft.propose(tokens, 4),
        "choosing 5 tokens, greedy": lambda: sampler.probs(logits, tokens, [7] * 4),
        "a draft's top probability": lambda: top_probability(logits[:1]),
        "lookup": lambda: lookup.propose(tokens, 8),
    }
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--context", type=int, default=200)
    args = parser.parse_args()
    measured = parts(Engine.from_pretrained(args.model, device="cpu"), args.context)
    taken: dict[str, list[float]] = {name: [] for name in measured}
    for repeat in range(REPEATS + 1):
        for name, run in measured.items():
            started = time.perf_counter()
            run()
            if repeat:
                taken[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    plain = medians["full model, 1 rows"]
    for name, median in medians.items():
        print(f"{name:30} {median:9.3f} ms  {median / plain:6.3f}")


if __name__ == "__main__":
    main()
