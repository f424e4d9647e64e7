"""Sampling with drafts is sampling from the target: frequencies against exactly enumerated distributions.

Chi-square tests on fixed seeds; `test_the_released_rule_fails` shows that they can fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product

import pytest
import torch
from helpers import PROMPT, TableSession, endless, skip_something, tiny_engine
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from knn_ssd.engine import Engine
from knn_ssd.errors import UsageError
from knn_ssd.plan import Plan, Policy
from knn_ssd.sampling import Certain, Sampler, SamplingParams
from knn_ssd.speculation.decode import accept, decode
from knn_ssd.speculation.drafter import Draft
from knn_ssd.speculation.self_draft import SelfDraft
from knn_ssd.testing import tiny_model

CPU = torch.device("cpu")
SIGNIFICANCE = 1e-4

# Each setting by itself and all together, beside transformers' own processors for it.
SETTINGS: dict[str, tuple[SamplingParams, list[LogitsProcessor]]] = {
    "temperature": (SamplingParams(temperature=1.6), [TemperatureLogitsWarper(1.6)]),
    "top_k": (SamplingParams(temperature=1.0, top_k=3), [TopKLogitsWarper(3)]),
    "top_p": (SamplingParams(temperature=1.0, top_p=0.8), [TopPLogitsWarper(0.8)]),
    "min_p": (SamplingParams(temperature=1.0, min_p=0.15), [MinPLogitsWarper(0.15)]),
    "repetition_penalty": (
        SamplingParams(temperature=1.0, repetition_penalty=5.0),
        [RepetitionPenaltyLogitsProcessor(5.0)],
    ),
    "all": (
        SamplingParams(temperature=1.3, top_k=6, top_p=0.9, min_p=0.05, repetition_penalty=1.5),
        [
            RepetitionPenaltyLogitsProcessor(1.5),
            TemperatureLogitsWarper(1.3),
            TopKLogitsWarper(6),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ],
    ),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


def drawing(params: SamplingParams, seed: int) -> Sampler:
    sampler = Sampler.from_params(params, CPU)
    assert sampler.generator is not None
    sampler.generator.manual_seed(seed)
    return sampler


def p_value(outcomes: Iterable[object], expected: dict[object, float]) -> float:
    """Of a chi-square test; what is expected fewer than five times is counted as one, what cannot be is refused."""
    counts = Counter(outcomes)
    total = sum(counts.values())
    impossible = [outcome for outcome in counts if expected.get(outcome, 0.0) == 0.0]
    if impossible:
        return 0.0
    frequent = [outcome for outcome, p in expected.items() if p * total >= 5]
    assert len(frequent) >= 2, "too few outcomes to tell distributions apart"
    observed = [counts[outcome] for outcome in frequent]
    wanted = [expected[outcome] * total for outcome in frequent]
    if (rest := total - sum(wanted)) > 1:
        observed.append(total - sum(observed))
        wanted.append(rest)
    else:
        wanted = [w * sum(observed) / sum(wanted) for w in wanted]
    return float(chisquare(observed, wanted).pvalue)


# --- The rule by itself, with many draws


DRAWS = 10_000
TARGET_ROWS = torch.tensor([[0.05, 0.4, 0.3, 0.25, 0.0], [0.5, 0.1, 0.1, 0.0, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2]])
DRAFT_ROWS = torch.tensor([[0.2, 0.5, 0.1, 0.1, 0.1], [0.6, 0.1, 0.1, 0.1, 0.1]])


def drawn_draft(sampler: Sampler) -> Draft:
    return Draft(tuple(sampler.pick(row) for row in DRAFT_ROWS), DRAFT_ROWS)


def determined_draft(_sampler: Sampler) -> Draft:
    return Draft((2, 0))


def released_draft(_sampler: Sampler) -> Draft:
    """As in the released reference code: the draft's most likely tokens, with its softmax for their q."""
    return Draft(tuple(DRAFT_ROWS.argmax(dim=-1).tolist()), DRAFT_ROWS)


def rule_p_values(make_draft: Callable[[Sampler], Draft]) -> list[float]:
    """By position: of what is emitted there, where the tokens before it were accepted."""
    sampler = drawing(SamplingParams(temperature=1.0), seed=11)
    emitted: list[list[int]] = [[] for _ in TARGET_ROWS]
    for _ in range(DRAWS):
        draft = make_draft(sampler)
        verdict = accept(TARGET_ROWS, draft, sampler)
        for position, token in enumerate([*draft.tokens[: verdict.accepted], verdict.token]):
            emitted[position].append(token)
    assert all(len(tokens) > DRAWS / 20 for tokens in emitted), "every position was reached often"
    return [p_value(tokens, dict(enumerate(row.tolist()))) for tokens, row in zip(emitted, TARGET_ROWS, strict=True)]


@pytest.mark.parametrize("make_draft", [drawn_draft, determined_draft])
def test_what_is_emitted_is_distributed_as_the_target(make_draft: Callable[[Sampler], Draft]) -> None:
    assert min(rule_p_values(make_draft)) > SIGNIFICANCE


def test_the_released_rule_fails() -> None:
    assert max(rule_p_values(released_draft)[:2]) < SIGNIFICANCE


# --- Rounds on a target that is a table, with each processor


VOCABULARY = 7
TABLE_PROMPT = [4, 2]
LENGTH = 3


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of target and draft, which differ enough that about half of the drafts are rejected."""
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    return target, target + torch.randn(VOCABULARY, VOCABULARY, generator=generator)


def enumerated(
    logits: Callable[[tuple[int, ...]], torch.Tensor],
    prompt: list[int],
    processors: list[LogitsProcessor],
    length: int,
) -> dict[tuple[int, ...], float]:
    """Exact probabilities of all outputs of a length; `logits` gives those (V,) of the token after an output."""
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for output, probability in known.items():
            scores = logits(output)[None]  # (1, V)
            for processor in processors:
                scores = processor(torch.tensor([[*prompt, *output]]), scores)
            longer |= {(*output, token): probability * p for token, p in enumerate(scores[0].softmax(0).tolist()) if p}
        known = longer
    return known


def marginal(probabilities: dict[tuple[int, ...], float], position: int) -> dict[object, float]:
    """Of the token at one position."""
    sums: Counter[object] = Counter()
    for output, probability in probabilities.items():
        sums[output[position]] += probability
    return dict(sums)


def table_outputs(
    params: SamplingParams, count: int, draft: torch.Tensor, target: torch.Tensor
) -> list[tuple[int, ...]]:
    sampler = drawing(params, seed=3)
    plan = Plan.skipping(1, attention=[0], policy=Policy(max_draft=3, threshold=0.15))
    outputs, drafted, accepted = [], 0, 0
    for _ in range(count):
        context = list(TABLE_PROMPT)
        session = TableSession(target, draft, len(context))
        drafter = SelfDraft(session, plan, sampler)
        first = target[context[-1]]
        rounds = list(decode(session, context, first, drafter, sampler, LENGTH, lambda _token: None))
        outputs.append(tuple(context[len(TABLE_PROMPT) :]))
        drafted += sum(r.drafted for r in rounds)
        accepted += sum(r.accepted for r in rounds)
    assert 0.2 < accepted / drafted < 0.9, "both sides of the rule are tried"
    return outputs


@every_setting
def test_outputs_of_drafting_rounds_are_distributed_as_the_target(setting: str) -> None:
    params, processors = SETTINGS[setting]
    target, draft = tables()
    expected = enumerated(lambda output: target[[*TABLE_PROMPT, *output][-1]], TABLE_PROMPT, processors, LENGTH)
    assert sum(expected.values()) == pytest.approx(1)
    outputs = table_outputs(params, 700, draft, target)
    assert p_value(outputs, expected) > SIGNIFICANCE
    for position in range(LENGTH):  # fewer outcomes than whole outputs, so the test is sharper
        assert p_value([output[position] for output in outputs], marginal(expected, position)) > SIGNIFICANCE


def test_the_drafts_own_distribution_fails() -> None:
    params, processors = SETTINGS["temperature"]
    target, draft = tables()
    expected = enumerated(lambda output: draft[[*TABLE_PROMPT, *output][-1]], TABLE_PROMPT, processors, LENGTH)
    assert p_value(table_outputs(params, 700, draft, target), expected) < SIGNIFICANCE


# --- End to end on a tiny model


@pytest.fixture(scope="module")
def small() -> Engine:
    return Engine(endless(tiny_model(vocab_size=12, num_hidden_layers=2, hidden_size=16, pad_token_id=None)))


SMALL_PROMPT = [5, 7, 3]
SMALL_PLAN = Plan.skipping(2, attention=[1], mlp=[0], policy=Policy(max_draft=2, threshold=0.0))


@pytest.mark.parametrize("setting", ["temperature", "all"])
def test_outputs_of_a_model_are_distributed_as_plain_passes_say(small: Engine, setting: str) -> None:
    params, processors = SETTINGS[setting]
    known: dict[tuple[int, ...], torch.Tensor] = {}
    for length in (0, 1, 2):
        outputs_so_far = list(product(range(12), repeat=length))
        token_ids = torch.tensor([[*SMALL_PROMPT, *output] for output in outputs_so_far])
        known |= dict(zip(outputs_so_far, small.model(token_ids, use_cache=False).logits[:, -1], strict=True))
    expected = enumerated(lambda output: known[output], SMALL_PROMPT, processors, 3)
    session = small.backend.open(len(SMALL_PROMPT) + 3)
    prefill = session.prefill(SMALL_PROMPT)
    sampler = drawing(params, seed=8)
    outputs, drafted = [], 0
    for _ in range(200):
        context = list(SMALL_PROMPT)
        drafter = SelfDraft(session, SMALL_PLAN, sampler)
        for r in decode(session, context, prefill.logits, drafter, sampler, 3, lambda _token: None):
            drafted += r.drafted
        session.rewind(len(SMALL_PROMPT))
        outputs.append(tuple(context[len(SMALL_PROMPT) :]))
    assert drafted == 200
    for position in (1, 2):
        assert p_value([output[position] for output in outputs], marginal(expected, position)) > SIGNIFICANCE


# --- The distribution that one token is drawn from


@every_setting
def test_the_next_tokens_distribution_is_the_one_that_transformers_draws_from(setting: str) -> None:
    params, _ = SETTINGS[setting]
    engine = tiny_engine("qwen3")
    prompt = torch.tensor([PROMPT])
    output = engine.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p or None,
        repetition_penalty=params.repetition_penalty,
        max_new_tokens=1,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    prefill = engine.backend.open(len(PROMPT)).prefill(PROMPT)
    probs = Sampler.from_params(params, CPU).probs(prefill.logits[None], PROMPT)
    torch.testing.assert_close(probs, output.scores[0].softmax(dim=-1), rtol=1e-4, atol=1e-6)


def test_every_row_follows_the_tokens_before_it() -> None:
    sampler = Sampler.from_params(SamplingParams(temperature=1.0, repetition_penalty=3.0), CPU)
    logits = torch.ones(3, 4)
    probs = sampler.probs(logits, context=[0], tokens=[1, 2])
    penalised = [{i for i in range(4) if row[i] < row.max()} for row in probs]
    assert penalised == [{0}, {0, 1}, {0, 1, 2}]
    assert torch.equal(logits, torch.ones(3, 4)), "the logits are left as they are"


def test_greedy_draws_from_the_most_likely_token_alone() -> None:
    probs = Sampler.from_params(SamplingParams(), CPU).probs(torch.tensor([[0.1, 2.0, 1.0], [5.0, 1.0, 2.0]]), [0], [1])
    assert [[row[token] for token in range(3)] for row in (probs[0], probs[1])] == [[0, 1, 0], [1, 0, 0]]
    penalised = Sampler.from_params(SamplingParams(repetition_penalty=9.0), CPU)
    assert penalised.probs(torch.tensor([[0.1, 2.0, 1.0], [5.0, 1.0, 2.0]]), [1], [0]) == Certain((2, 2))


# --- Seeds


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_seed_reproduces_an_output_and_another_seed_gives_another(temperature: float) -> None:
    def run(seed: int | None) -> tuple[int, ...]:
        return (
            tiny_engine()
            .generate(PROMPT, plan=skip_something(), max_new_tokens=16, temperature=temperature, seed=seed)
            .token_ids
        )

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_a_request_leaves_torchs_own_random_numbers_alone() -> None:
    engine = tiny_engine()  # made here, for that takes random numbers
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    engine.generate(PROMPT, plan=skip_something(), max_new_tokens=6, temperature=1.0, seed=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_k": -1}, "top_k must be 0 or more, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p must be in"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
        ({"seed": 2**64}, "seed must be"),
    ],
)
def test_settings_out_of_their_range_are_refused_with_the_value(settings: dict[str, float], fact: str) -> None:
    with pytest.raises(UsageError, match=fact):
        SamplingParams(**settings)


@pytest.mark.parametrize("temperature", [1e-10, 1e-40, 5e-324])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    """Logits divided by it would be infinite, and their distribution not a number."""
    greedy, cold = (
        tiny_engine().generate(PROMPT, plan=skip_something(), max_new_tokens=16, temperature=each).token_ids
        for each in (0.0, temperature)
    )
    assert cold == greedy


@pytest.mark.parametrize("temperature", [1e-9, 1e-6, 1e30])
def test_the_coldest_and_the_hottest_distributions_are_distributions(temperature: float) -> None:
    sampler = drawing(SamplingParams(temperature=temperature), seed=11)
    probs = sampler.probs(torch.tensor([[-3e4, 0.0, 3e4, 2.9e4]]), PROMPT)
    assert isinstance(probs, torch.Tensor)
    assert float(probs.sum()) == pytest.approx(1.0)
