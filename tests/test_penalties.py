"""Penalties, biases and least lengths, exact under drafts: a position sees the draft tokens before it as emitted."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from helpers import NUM_LAYERS, PROMPT, TableSession, endless, prompts, skip_something, transformers_output
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import SIGNIFICANCE, TABLE_PROMPT, VOCABULARY, enumerated, marginal, p_value, tables
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from knn_ssd.engine import Engine
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.sampling import Certain, Sampler, SamplingParams
from knn_ssd.speculation.decode import decode
from knn_ssd.speculation.self_draft import SelfDraft
from knn_ssd.testing import tiny_model

CPU = torch.device("cpu")
LENGTH = 4


class Penalties(LogitsProcessor):
    """OpenAI's formula, token by token: mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting the output."""

    def __init__(self, prompt_length: int, presence: float = 0.0, frequency: float = 0.0) -> None:
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token, count in Counter(input_ids[0, self.prompt_length :].tolist()).items():
            scores[0, token] -= count * self.frequency + self.presence
        return scores


# --- A block's rows


def params() -> st.SearchStrategy[SamplingParams]:
    biases = st.dictionaries(st.integers(0, 11), st.floats(-100, 100), max_size=3)
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.6, 1.0, 2.5]),
        top_k=st.integers(0, 6),
        top_p=st.floats(0.2, 1),
        min_p=st.floats(0, 0.5),
        repetition_penalty=st.floats(0.5, 3),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=biases,
        min_tokens=st.integers(0, 8),
    )


tokens = st.lists(st.integers(0, 11), min_size=1, max_size=6)


@settings(max_examples=200)
@given(params=params(), prompt=tokens, output=tokens, draft=tokens, seed=st.integers(0, 99))
def test_the_rows_of_a_block_are_those_of_single_steps(
    params: SamplingParams, prompt: list[int], output: list[int], draft: list[int], seed: int
) -> None:
    logits = torch.randn(len(draft) + 1, 12, generator=torch.Generator().manual_seed(seed)) * 4
    sampler = Sampler.from_params(params, CPU, len(prompt), {2, 3})
    block = sampler.probs(logits, [*prompt, *output], draft)
    for row in range(len(logits)):
        alone = sampler.probs(logits[row : row + 1], [*prompt, *output, *draft[:row]])
        if isinstance(block, Certain):
            assert isinstance(alone, Certain)
            assert block.tokens[row] == alone.tokens[0]
        else:
            assert isinstance(alone, torch.Tensor)
            assert torch.equal(block[row], alone[0])


def test_penalties_count_the_output_and_its_draft_and_not_the_prompt() -> None:
    sampler = Sampler.from_params(SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=1.0), CPU, 2)
    probs = sampler.probs(torch.zeros(3, 5), context=[0, 1, 2], tokens=[2, 3])
    assert isinstance(probs, torch.Tensor)
    lost = [[-float(row[token].log() - row[0].log()) for token in range(5)] for row in probs]
    expected = [[0, 0, 1.5, 0, 0], [0, 0, 2.5, 0, 0], [0, 0, 2.5, 1.5, 0]]
    assert lost == [pytest.approx(row, abs=1e-5) for row in expected]


def test_min_tokens_keeps_end_tokens_out_of_the_first_rows_of_a_block_alone() -> None:
    sampler = Sampler.from_params(SamplingParams(temperature=1.0, min_tokens=3), CPU, 2, {4})
    probs = sampler.probs(torch.zeros(4, 5), context=[0, 1, 2], tokens=[2, 3, 3])
    assert isinstance(probs, torch.Tensor)
    assert [float(row[4]) > 0 for row in probs] == [False, False, True, True]


# --- Sampling, on a target that is a table


START = len(TABLE_PROMPT)
SETTINGS: dict[str, tuple[SamplingParams, list[LogitsProcessor]]] = {
    "presence_penalty": (SamplingParams(temperature=1.0, presence_penalty=1.5), [Penalties(START, presence=1.5)]),
    "frequency_penalty": (SamplingParams(temperature=1.0, frequency_penalty=-1.2), [Penalties(START, frequency=-1.2)]),
    "logit_bias": (
        SamplingParams(temperature=1.0, logit_bias={3: 1.5, 1: -100}),
        [SequenceBiasLogitsProcessor([[[3], 1.5], [[1], -100.0]])],
    ),
    "min_tokens": (
        SamplingParams(temperature=1.0, min_tokens=2),
        [MinNewTokensLengthLogitsProcessor(START, 2, torch.tensor([5]))],
    ),
    "all": (
        SamplingParams(
            temperature=1.3,
            top_k=5,
            repetition_penalty=1.5,
            presence_penalty=0.7,
            frequency_penalty=0.6,
            logit_bias={0: 1},
            min_tokens=2,
        ),
        [
            SequenceBiasLogitsProcessor([[[0], 1.0]]),
            RepetitionPenaltyLogitsProcessor(1.5),
            Penalties(START, 0.7, 0.6),
            MinNewTokensLengthLogitsProcessor(START, 2, torch.tensor([5])),
            TemperatureLogitsWarper(1.3),
            TopKLogitsWarper(5),
        ],
    ),
}


def table_outputs(params: SamplingParams, count: int) -> list[tuple[int, ...]]:
    target, draft = tables()
    sampler = Sampler.from_params(params, CPU, START, {5})
    assert sampler.generator is not None
    sampler.generator.manual_seed(3)
    plan = Plan.skipping(1, attention=[0], policy=Policy(max_draft=3, threshold=0.1))
    outputs, drafted, accepted = [], 0, 0
    for _ in range(count):
        context = list(TABLE_PROMPT)
        session: Any = TableSession(target, draft, len(context))
        drafter = SelfDraft(session, plan, sampler)
        rounds = list(decode(session, context, target[context[-1]], drafter, sampler, LENGTH, lambda _token: None))
        outputs.append(tuple(context[START:]))
        drafted += sum(r.drafted for r in rounds)
        accepted += sum(r.accepted for r in rounds)
    assert 0.2 < accepted / drafted < 0.95, "both sides of the rule are tried"
    return outputs


@pytest.mark.parametrize("setting", SETTINGS)
def test_outputs_of_drafting_rounds_are_distributed_as_the_target(setting: str) -> None:
    sampling_params, processors = SETTINGS[setting]
    target, _ = tables()
    expected = enumerated(lambda output: target[[*TABLE_PROMPT, *output][-1]], TABLE_PROMPT, processors, LENGTH)
    assert sum(expected.values()) == pytest.approx(1)
    outputs = table_outputs(sampling_params, 900)
    for position in range(LENGTH):
        assert p_value([output[position] for output in outputs], marginal(expected, position)) > SIGNIFICANCE
    pairs: Counter[object] = Counter()  # what follows what: penalties make positions depend on each other
    for output, probability in expected.items():
        pairs[output[1:3]] += probability
    assert p_value([output[1:3] for output in outputs], dict(pairs)) > SIGNIFICANCE


def test_the_distribution_without_the_penalty_fails() -> None:
    target, _ = tables()
    expected = enumerated(lambda output: target[[*TABLE_PROMPT, *output][-1]], TABLE_PROMPT, [], LENGTH)
    outputs = table_outputs(SETTINGS["presence_penalty"][0], 900)
    assert p_value([output[3] for output in outputs], marginal(expected, 3)) < SIGNIFICANCE
    assert max(max(output) for output in outputs) < VOCABULARY


# --- Greedy, beside transformers


LONG = [3 + 7 * i % 30 for i in range(40)]  # it repeats, so that lookup drafts


@cache
def model_with_an_end(family: str) -> PreTrainedModel:
    """A model whose output for LONG has its end token within the first tokens."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32} if family == "llama" else {}  # for 4 bits
    model = endless(tiny_model(family, **sizes))
    model.generation_config.eos_token_id = transformers_output(model, LONG, 3)[2]
    return model


DRAFTS: dict[str, dict[str, Any]] = {
    "plain": {"plain": True},
    "self": {"plan": skip_something()},
    "lookup": {"plan": Plan.skipping(NUM_LAYERS, policy=Policy(6, 0.0, lookup=True))},
    "low": {"plan": Plan.low(NUM_LAYERS, Policy(4, 0.0))},
    "adaptive": {},
    "retrieval": {},
}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, and transformers' own
    "repetition_penalty": ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    "min_tokens": ({"min_tokens": 12}, {"min_new_tokens": 12}),
    "logit_bias": ({"logit_bias": {7: 2, 40: -3.5}}, {"sequence_bias": {(7,): 2.0, (40,): -3.5}}),
    "all": (
        {"repetition_penalty": 0.8, "min_tokens": 7, "logit_bias": {7: -2}},
        {"repetition_penalty": 0.8, "min_new_tokens": 7, "sequence_bias": {(7,): -2.0}},
    ),
    "penalties": (
        {"presence_penalty": 0.9, "frequency_penalty": 0.4},
        {"logits_processor": LogitsProcessorList([Penalties(len(LONG), 0.9, 0.4)])},
    ),
    "negative penalties": (
        {"presence_penalty": -1.1, "frequency_penalty": -0.3},
        {"logits_processor": LogitsProcessorList([Penalties(len(LONG), -1.1, -0.3)])},
    ),
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_output_is_that_of_transformers(family: str, option: str, draft: str) -> None:
    model = model_with_an_end(family)
    engine = Engine(model)
    if draft == "low" and Mode.LOW not in engine.backend.modes:
        pytest.skip("no 4-bit weights here")
    ours, theirs = OPTIONS[option]
    runs = 2 if draft == "retrieval" else 1
    outputs = [engine.generate(LONG, max_new_tokens=24, **ours, **DRAFTS[draft]) for _ in range(runs)]
    assert list(outputs[-1].token_ids) == transformers_output(model, LONG, 24, **theirs)
    if draft == "retrieval":
        assert outputs[-1].neighbours, "the second time the first answer can draft"


@settings(max_examples=15)
@given(prompt=prompts(), penalty=st.floats(-2, 2), draft=st.sampled_from(["self", "lookup", "adaptive"]))
def test_plain_decoding_with_penalties_says_the_same(prompt: list[int], penalty: float, draft: str) -> None:
    engine = Engine(model_with_an_end("llama"))
    options = {"max_new_tokens": 16, "frequency_penalty": penalty, "presence_penalty": -penalty / 2, "min_tokens": 5}
    plain = engine.generate(prompt, plain=True, **options)
    drafted = engine.generate(prompt, **options, **DRAFTS[draft])
    assert (drafted.token_ids, drafted.finish_reason) == (plain.token_ids, plain.finish_reason)


def test_every_new_option_changes_something() -> None:
    engine = Engine(model_with_an_end("llama"), answers=False)
    plain = engine.generate(PROMPT, max_new_tokens=24).token_ids
    token = plain[0]
    for option in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"logit_bias": {token: -100}}):
        assert engine.generate(PROMPT, max_new_tokens=24, **option).token_ids != plain
    assert token not in engine.generate(PROMPT, max_new_tokens=24, logit_bias={token: -100}).token_ids


def test_a_draft_that_skips_nothing_is_always_accepted() -> None:
    engine = Engine(endless(tiny_model()), answers=False)
    plan = Plan.skipping(NUM_LAYERS, policy=Policy(5, 0.0))
    drawn = {"temperature": 1.2, "seed": 2}
    for options in ({}, drawn):
        stats = engine.generate(
            PROMPT,
            plan=plan,
            max_new_tokens=14,
            presence_penalty=0.5,
            frequency_penalty=0.7,
            logit_bias={7: 3},
            min_tokens=9,
            stop_token_ids=[9],
            **options,
        ).stats
        assert stats.drafted == stats.accepted > 0
