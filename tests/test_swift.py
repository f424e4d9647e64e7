"""SWIFT: the search scores candidates on the model's own output, keeps what agrees, ends, and is lossless."""

from __future__ import annotations

import pytest
import torch
from helpers import endless

from knn_ssd.bench.methods import make_methods
from knn_ssd.bench.swift import SwiftSearch, SwiftSettings
from knn_ssd.engine import Engine
from knn_ssd.errors import BenchError
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.testing import planted_tiny_model, tiny_model, tiny_tokenizer

REDUNDANT = {"red": (2, 3, 5, 6, 8, 9, 10, 13), "green": (2, 3, 5, 6, 8, 9, 10, 13)}
SETTINGS = SwiftSettings(share=0.25, window=12, optimiser_every=5, good_enough=1.0, policy=Policy(4, 0.0))


def search_on(text: str, engine: Engine, settings: SwiftSettings, steps: int) -> SwiftSearch:
    search = SwiftSearch(engine.backend.num_layers, settings)
    context = [*engine.encode(text), *engine.generate(text, max_new_tokens=20, plain=True).token_ids]
    session = engine.backend.open(len(context))
    session.prefill(context[:-1])
    for _ in range(steps):
        if not search.done:
            search.step(session, context)
    assert session.length == len(context) - 1
    logits = session.forward(context[-1:])
    fresh = engine.backend.open(len(context))
    assert torch.allclose(logits[0], fresh.prefill(context).logits, atol=1e-4), "scoring leaves the KV cache unchanged"
    return search


def test_the_search_ends_with_a_set_that_agrees_if_there_is_one() -> None:
    planted = planted_tiny_model(REDUNDANT, seed=3)
    search = search_on(planted.prompt("red", 12, 1), Engine(planted.model, tiny_tokenizer()), SETTINGS, 400)
    assert search.agreement == 1.0
    assert search.done
    skipped = {i for i, mode in enumerate(search.plan.modes) if mode is Mode.SKIP}
    assert len(skipped) == 3
    assert skipped <= set(REDUNDANT["red"]), "skipping any other sublayer changes the output"


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (SwiftSettings(window=12, max_steps=7), 7),
        (SwiftSettings(window=12, good_enough=0.0), 1),
        (SwiftSettings(window=12, share=0.0), 0),
    ],
)
def test_a_search_ends(settings: SwiftSettings, steps: int) -> None:
    engine = Engine(endless(tiny_model(num_hidden_layers=6)), tiny_tokenizer())
    search = search_on("a fox ran to the", engine, settings, 30)
    assert search.done
    assert search.steps == steps
    assert all(search.plan.modes[i] is Mode.KEEP for i in (0, 1, 10, 11)), "the first and the last layer stay"


def test_a_search_without_improvement_ends() -> None:
    engine = Engine(endless(tiny_model(num_hidden_layers=6)), tiny_tokenizer())
    search = search_on("a fox ran to the", engine, SwiftSettings(window=12, patience=10, good_enough=2.0), 500)
    assert search.done
    assert 10 <= search.steps < 500


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_output_is_that_of_plain_decoding_during_the_search(temperature: float) -> None:
    engine = Engine(endless(tiny_model(num_hidden_layers=6)), tiny_tokenizer())
    methods = make_methods(["plain", "swift"], engine, temperature=temperature, seed=5)
    drafted = 0
    for text in ("once upon a time", "3 + 4 = ", "a fox"):
        prompt = engine.encode(text)
        plain, swift = (method(prompt, 90) for method in methods.values())
        assert len(swift.token_ids) == 90
        if temperature == 0:
            assert swift.token_ids == plain.token_ids
        drafted += swift.details["drafted"]["self"]
    assert drafted > 0


def test_a_model_with_too_few_layers_is_refused() -> None:
    engine = Engine(tiny_model(num_hidden_layers=2), tiny_tokenizer())
    with pytest.raises(BenchError, match="needs 3 layers, and this model has 2"):
        make_methods(["swift"], engine)


def test_the_first_set_is_one_of_the_right_size() -> None:
    plan = SwiftSearch(10).plan
    assert sum(mode is Mode.SKIP for mode in plan.modes) == round(0.45 * 16)
    assert plan != Plan.plain(10)
