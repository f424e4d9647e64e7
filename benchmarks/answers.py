"""What an answer store costs: a query, keeping a request, drafting from neighbours, and loading the store at start.

    python benchmarks/answers.py [--requests N…] [--dimensions D] [--prompt-tokens N] [--answer-tokens N]

Fills a store on disk with made-up requests in clusters, and prints medians in milliseconds: the search for the nearest,
making the drafter from their answers, searching them in each round of an answer, keeping the request; then megabytes in
memory and on disk, and the seconds that loading takes. The last column but one is the sum for one request, whose rounds
are half as many as its tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from knn_ssd.loading.fingerprint import Fingerprint, fingerprint
from knn_ssd.routing.answers import NUM_NEIGHBOURS, AnswerStore
from knn_ssd.speculation.retrieval import RetrievalDraft
from knn_ssd.testing import tiny_model

_VOCABULARY = 49_152
_REPEATS = 30


def median_ms(run: Callable[[], object]) -> float:
    """The median time of a call."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def made_up(dimensions: int) -> Fingerprint:
    """The fingerprint of a model whose vectors have so many dimensions."""
    return fingerprint(tiny_model("llama", hidden_size=dimensions, num_attention_heads=1, num_hidden_layers=1), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dimensions", type=int, default=576)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--answer-tokens", type=int, default=100)
    args = parser.parse_args()
    print("| requests | query | drafter | rounds | keeping | one request, ms | in memory, MB | on disk | loading, s |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for requests in args.requests:
        with tempfile.TemporaryDirectory() as folder:
            print(row(Path(folder), requests, args), flush=True)


def row(folder: Path, requests: int, args: argparse.Namespace) -> str:
    """The table's line for so many requests."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((100, args.dimensions))
    most = 2 * requests * (args.prompt_tokens + args.answer_tokens)
    model = made_up(args.dimensions)

    def vector() -> np.ndarray:
        return (centres[random.integers(100)] + 0.2 * random.standard_normal(args.dimensions)).astype(np.float32)

    def add(store: AnswerStore) -> None:
        prompt, answer = (random.integers(0, _VOCABULARY, n) for n in (args.prompt_tokens, args.answer_tokens))
        store.add(vector(), prompt.tolist(), answer.tolist())

    store = AnswerStore.open(folder, model, _VOCABULARY, most)
    for _ in range(requests):
        add(store)
    store.close()
    started = time.perf_counter()
    store = AnswerStore.open(folder, model, _VOCABULARY, most)
    loading_sec = time.perf_counter() - started
    query = median_ms(lambda: store.nearest(vector(), NUM_NEIGHBOURS, 2.0))
    drafter = median_ms(lambda: RetrievalDraft(store.nearest(vector(), NUM_NEIGHBOURS, 2.0), 0)) - query
    near = store.nearest(vector(), NUM_NEIGHBOURS, 2.0)

    def rounds() -> None:
        source, context = RetrievalDraft(near, 0), near[0].answer.token_ids.tolist()
        for length in range(2, len(context), 2):
            source.matches(context[:length])
            source.matches(context[:length], drafted=context[length : length + 2])

    in_rounds, keeping = median_ms(rounds), median_ms(lambda: add(store))
    disk = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    whole = query + drafter + in_rounds + keeping
    figures = (query, drafter, in_rounds, keeping, whole)
    milliseconds = " | ".join(f"{each:.2f}" for each in figures)
    return f"| {requests} | {milliseconds} | {store.bytes / 1e6:.0f} | {disk:.0f} | {loading_sec:.1f} |"


if __name__ == "__main__":
    main()
