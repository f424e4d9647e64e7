"""A real language model says with drafts what it says without, on prompts of five domains. In float32 that is what
`model.generate` says; in bfloat16 its own plain decoding, and so what float32 arithmetic makes of its weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from helpers import transformers_output

from knn_ssd.backends.base import Exactness
from knn_ssd.engine import Engine
from knn_ssd.kernels.binding import kernels_obstacle
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.prompts import BUILTIN_DOMAINS, builtin_prompts

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

DATA = Path(__file__).parents[2] / "shared" / "data"
MAX_NEW_TOKENS = 16


def plan_for(engine: Engine, index: int) -> Plan:
    """Another plan for every prompt: three MLPs and an attention of the later layers, or much more than is sensible."""
    layers = engine.backend.num_layers
    policy = Policy(max_draft=2 + index % 4, threshold=0.2 + 0.15 * (index % 5))
    if index % 5 == 4:
        return Plan.skipping(layers, range(0, layers, 2), range(1, layers, 3), policy)
    return Plan.skipping(layers, [layers - 4 - index % 3], {5 + index % 7, 12 + index % 5, layers - 6}, policy)


def assert_lossless(engine: Engine, prompts: list[str]) -> None:
    drafted = accepted = 0
    for index, prompt in enumerate(prompts):
        generation = engine.generate(prompt, plan=plan_for(engine, index), max_new_tokens=MAX_NEW_TOKENS)
        token_ids = engine.encode(prompt)
        expected = transformers_output(engine.model, token_ids, MAX_NEW_TOKENS)
        assert list(generation.token_ids) == expected, prompt
        assert engine.tokenizer is not None
        assert generation.text == engine.tokenizer.decode(expected, skip_special_tokens=True)
        drafted += generation.stats.drafted
        accepted += generation.stats.accepted
    assert 0 < accepted < drafted, "some drafts were right and some were not"


def test_on_built_in_prompts_it_says_what_transformers_says(embedded_engine: Engine) -> None:
    shortest = [min(builtin_prompts([domain]), key=lambda p: len(p.prompt)) for domain in BUILTIN_DOMAINS]
    assert_lossless(embedded_engine, [prompt.prompt for prompt in shortest])


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data, with real prompts, is not beside this checkout")
def test_on_real_prompts_it_says_what_transformers_says(embedded_engine: Engine) -> None:
    columns = [by_length(file) for file in sorted(DATA.glob("*.jsonl"))]
    short = [prompt for row in zip(*(column[:5] for column in columns), strict=True) for _, prompt in row]
    longest = max((column[-1][1] for column in columns), key=len)
    assert len(short) >= 25
    assert_lossless(embedded_engine, [*short, longest])


@pytest.fixture(scope="module")
def bfloat16_engine() -> Engine:
    return Engine.from_pretrained(dtype="bfloat16", device="cpu")


def real_prompts() -> list[tuple[str, str]]:
    """A few of every domain, with the domain."""
    if DATA.is_dir():
        return [each for file in sorted(DATA.glob("*.jsonl")) for each in by_length(file)[:2]]
    return [(domain, builtin_prompts([domain])[i].prompt) for domain in BUILTIN_DOMAINS for i in range(2)]


def by_length(file: Path) -> list[tuple[str, str]]:
    """Its first twenty prompts from the shortest to the longest, with their domain."""
    found = [json.loads(line) for line in file.read_text("utf-8").splitlines()[:20]]
    return sorted(((item["domain"], item["prompt"]) for item in found), key=lambda pair: len(pair[1]))


@pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")
def test_in_bfloat16_every_way_of_drafting_says_what_plain_decoding_says(bfloat16_engine: Engine) -> None:
    engine, drafted, looked_up = bfloat16_engine, 0, 0
    asked = {"max_new_tokens": 24, "logprobs": 0}
    layers = engine.backend.num_layers
    assert engine.exactness is Exactness.BITWISE
    for index, (_domain, prompt) in enumerate(real_prompts()):
        plain = engine.generate(prompt, plain=True, **asked)
        mixed = [Mode(("keep", "low", "low", "skip")[(index + i) % 4]) for i in range(2 * layers)]
        ways = [
            {},  # the general plan under the controller
            {"plan": Plan.low(layers, Policy(2 + index % 7, 0.1 * (index % 8), lookup=index % 2 == 0))},
            {"plan": Plan(tuple(mixed[::2]), tuple(mixed[1::2]), Mode.LOW, Policy(3, 0.2))},
            {"plan": plan_for(engine, index), "adaptive": True},
        ]
        for options in ways:
            generation = engine.generate(prompt, **asked, **options)
            assert generation.token_ids == plain.token_ids, (prompt, options)
            assert generation.logprobs == plain.logprobs, "to the last bit"
            drafted += generation.stats.drafted
            looked_up += generation.plan.policy.lookup
    assert drafted > 200
    assert looked_up > 5


@pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")
def test_bfloat16_weights_give_what_float32_arithmetic_makes_of_them(bfloat16_engine: Engine) -> None:
    reference = copy.deepcopy(bfloat16_engine.model).float()
    for _domain, prompt in real_prompts()[::4]:
        token_ids = bfloat16_engine.encode(prompt)
        said = bfloat16_engine.generate(token_ids, max_new_tokens=MAX_NEW_TOKENS).token_ids
        assert list(said) == transformers_output(reference, token_ids, MAX_NEW_TOKENS)
