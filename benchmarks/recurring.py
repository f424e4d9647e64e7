"""Drafts from earlier answers in recurring traffic: which earlier answers are worth copying from?

    python benchmarks/recurring.py --prompts FILE.jsonl… --out FOLDER [--model M] [--limit N] [--k K] [--radius R]

A stream of prompts in order of arrival, the files' domains interleaved. All arms decode the same prompts in turn, with
default settings, and differ in the earlier answers that a request may copy from: none (`auto`), the latest k, k at
random, the nearest k, and the k that share most 4-grams with the output, which only hindsight can know. Each arm has a
store of its own that starts empty, so the stream goes from cold to warm.

Prints, for each domain, tokens per round, decode speed over `auto` and over plain decoding, and the share of tokens
that were copied from earlier answers; then the same for the stream's second half, when stores are warm; and each
store's size and the time of a query. Each table is followed by the speed of the nearest k over each other arm, with an
interval. FOLDER gets the records, and a report with the speed along the stream.

With `--no-self-drafts` only what is copied drafts, from the request's own context and from earlier answers, as on a
backend without 4-bit weights. With `--again` the stream's second half is its first half once more: requests that were
answered before, as people retry them and evaluations repeat them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from knn_ssd import Engine, Plan
from knn_ssd.bench.methods import Method, Output, engine_method
from knn_ssd.bench.records import Record, read_records
from knn_ssd.bench.report import report
from knn_ssd.bench.run import BenchSettings, run_bench
from knn_ssd.bench.workload import limit_each, read_workloads, stream
from knn_ssd.io import write_whole
from knn_ssd.plan import Policy
from knn_ssd.progress import ProgressBars
from knn_ssd.routing.answers import NUM_NEIGHBOURS, RADIUS, Answer, AnswerStore, Neighbour

Neighbours = tuple[Neighbour, ...]
ARMS = ("auto", "latest", "random", "nearest", "hindsight")


class Nearest(AnswerStore):
    """The product's own choice, timed."""

    def __init__(self, k: int, radius: float) -> None:
        super().__init__()
        self.k, self.radius = k, radius
        self.query_sec: list[float] = []

    def nearest(self, vector: np.ndarray[Any, Any], _k: int, _radius: float) -> Neighbours:
        started = time.perf_counter()
        found = self.choose(vector)
        self.query_sec.append(time.perf_counter() - started)
        return found

    def choose(self, vector: np.ndarray[Any, Any]) -> Neighbours:
        return super().nearest(vector, self.k, self.radius)

    def everything(self, vector: np.ndarray[Any, Any]) -> Neighbours:
        """All earlier requests, in order of arrival."""
        return tuple(sorted(super().nearest(vector, max(len(self), 1), 2.0), key=lambda near: near.answer.id))


class Latest(Nearest):
    """The latest k, the latest first."""

    def choose(self, vector: np.ndarray[Any, Any]) -> Neighbours:
        return self.everything(vector)[::-1][: self.k]


class Random(Nearest):
    """K at random."""

    def __init__(self, k: int, radius: float) -> None:
        super().__init__(k, radius)
        self.chooser = random.Random(0)

    def choose(self, vector: np.ndarray[Any, Any]) -> Neighbours:
        known = self.everything(vector)
        return tuple(self.chooser.sample(known, min(self.k, len(known))))


class Hindsight(Nearest):
    """The k answers that share most 4-grams with the output, which is given before the request."""

    def __init__(self, k: int, radius: float) -> None:
        super().__init__(k, radius)
        self.output: Sequence[int] = ()

    def choose(self, vector: np.ndarray[Any, Any]) -> Neighbours:
        wanted = _four_grams(self.output)

        def shared(answer: Answer) -> int:
            return len(wanted & _four_grams(answer.token_ids.tolist()))

        ranked = sorted(self.everything(vector), key=lambda near: -shared(near.answer))
        return tuple(near for near in ranked[: self.k] if shared(near.answer))


def _four_grams(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)}


def in_hindsight(engine: Engine, store: Hindsight, options: dict[str, Any]) -> Method:
    """The arm that knows the output: it decodes twice, and the second time counts."""
    reference, own = engine_method(engine, None, {}), engine_method(engine, None, {}, store, **options)

    def run(prompt: list[int], max_new_tokens: int) -> Output:
        store.output = reference(prompt, max_new_tokens).token_ids
        return own(prompt, max_new_tokens)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, help="prompts per domain")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--k", type=int, default=NUM_NEIGHBOURS)
    parser.add_argument("--radius", type=float, default=RADIUS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--no-self-drafts", action="store_true", help="what is copied is all that drafts")
    parser.add_argument("--again", action="store_true", help="then send the whole stream once more")
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, device="cpu", answers=False)
    engine.prepare()
    prompts = stream(limit_each(read_workloads(args.prompts), args.limit), mix_ratio=1.0) * (2 if args.again else 1)
    stores = {name: kind(args.k, args.radius) for name, kind in _STORES.items() if name in args.arms}
    options: dict[str, Any] = {}
    if args.no_self_drafts:
        options = {"plan": Plan.skipping(engine.backend.num_layers, policy=Policy(lookup=True)), "adaptive": True}
    methods: dict[str, Method] = {"plain": engine_method(engine, None, {}, plain=True)}
    for arm in args.arms:
        store = stores.get(arm, False)
        methods[arm] = (
            in_hindsight(engine, store, options)
            if isinstance(store, Hindsight)
            else engine_method(engine, None, {}, store, **options)
        )
    settings = BenchSettings(max_new_tokens=args.max_new_tokens)
    with ProgressBars() as progress:
        summary = run_bench(engine, prompts, methods, args.out, settings, progress, args.model or "SmolLM2-135M")
    records = read_records(args.out / "records.jsonl")
    command = f"python benchmarks/recurring.py --limit {args.limit} --k {args.k} --radius {args.radius}"
    write_whole(args.out / "report.html", report(summary, records, command))
    print_tables(records, args.arms, stores)


_STORES: dict[str, type[Nearest]] = {"latest": Latest, "random": Random, "nearest": Nearest, "hindsight": Hindsight}


def print_tables(records: Sequence[Record], arms: Sequence[str], stores: dict[str, Nearest]) -> None:
    """One table over the stream, and one over its second half."""
    console = Console(width=150)
    middle = (1 + max(record.place for record in records)) // 2
    for title, least in (("the whole stream", 0), ("its second half", middle)):
        chosen = [record for record in records if record.place >= least]
        table = Table(title=f"Over {title}: tokens a round · over auto · over plain · copied from answers")
        for column in ("domain", *arms):
            table.add_column(column)
        domains = list(dict.fromkeys(record.domain or "none" for record in chosen))
        for domain in (*domains, None):
            own = [record for record in chosen if domain in (None, record.domain)]
            table.add_row(domain or "all", *(_cell(own, arm) for arm in arms))
        console.print(table)
        for other in arms if "nearest" in arms else ():
            if other != "nearest":
                console.print(f"nearest over {other}: {_speed_with_interval(chosen, other)}")
    plain = {record.place: record.token_ids for record in records if record.method == "plain"}
    same = sum(record.token_ids == plain[record.place] for record in records)
    console.print(f"the same as plain decoding: {same} of {len(records)}")
    for name, store in stores.items():
        query_ms = 1e3 * statistics.median(store.query_sec)
        console.print(f"{name}: {len(store)} requests, {store.bytes / 2**20:.1f} MiB; a query {query_ms:.2f} ms")


def _cell(records: Sequence[Record], arm: str) -> str:
    own = [record for record in records if record.method == arm]
    if not own:
        return "–"
    tokens = sum(len(record.token_ids) for record in own)
    copied = sum(record.accepted.get("retrieval", 0) for record in own) / tokens
    over = [_decode_speed(own) / _decode_speed([r for r in records if r.method == base]) for base in ("auto", "plain")]
    return f"{tokens / sum(r.rounds for r in own):.2f} · {over[0]:.2f} · {over[1]:.2f} · {copied:.0%}"


def _speed_with_interval(records: Sequence[Record], base: str) -> str:
    """Decode speed of the nearest over that of another arm, with a 95 % interval by a bootstrap over prompts."""
    by_place = {
        arm: {r.place: (len(r.token_ids) - 1, r.decode_sec or 0.0) for r in records if r.method == arm}
        for arm in ("nearest", base)
    }
    rows = np.array([[*own, *by_place[base][place]] for place, own in by_place["nearest"].items()])  # (P, 4)
    chosen = np.random.default_rng(0).integers(len(rows), size=(2000, len(rows)))

    def speed(sums: np.ndarray[Any, Any]) -> Any:
        return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])

    low, high = np.percentile(speed(rows[chosen].sum(axis=1)), (2.5, 97.5))
    return f"{speed(rows.sum(axis=0)):.3f} ({low:.3f} to {high:.3f})"


def _decode_speed(records: Sequence[Record]) -> float:
    return sum(len(r.token_ids) - 1 for r in records) / max(sum(r.decode_sec or 0.0 for r in records), 1e-9)


if __name__ == "__main__":
    main()
