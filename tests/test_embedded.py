"""A real language model in float32 says with drafts what `model.generate` says, on prompts of five domains."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path

import pytest
from helpers import transformers_output

from knn_ssd.engine import Engine
from knn_ssd.plan import Plan, Policy
from knn_ssd.prompts import BUILTIN_DOMAINS, builtin_prompts

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

DATA = Path(__file__).parents[2] / "shared" / "data"
MAX_NEW_TOKENS = 24


def plan_for(engine: Engine, index: int) -> Plan:
    """Another plan for every prompt: three MLPs and an attention of the later layers, or much more than is sensible."""
    layers = engine.target.num_layers
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
    files = sorted(DATA.glob("*.jsonl"))
    columns = [[json.loads(line)["prompt"] for line in file.read_text("utf-8").split("\n", 5)[:5]] for file in files]
    prompts = [prompt for row in zip_longest(*columns) for prompt in row if prompt]
    assert len(prompts) >= 25
    assert_lossless(embedded_engine, prompts)
