"""What vLLM says with the plugin is what it says without it, token for token in float32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from in_vllm import LAYERS, Opener, counts_of, greedy, metrics_of, runner_of, save_tiny_model, tokens_of

from knn_ssd.loading.resolve import load_model
from knn_ssd.plan import Plan, Policy

FAR = Policy(max_draft=4, threshold=0.0)
NOTHING = Plan.skipping(LAYERS, policy=FAR)
SOME = Plan.skipping(LAYERS, [2], [1, 3], FAR)
LOW = Plan.low(LAYERS, FAR)


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(33, 127) for _ in range(chance.randrange(3, longest))] for _ in range(count)]


def both(
    opened: Opener, model: Path, plan: Plan, asked: list[Any], params: Any, **options: Any
) -> tuple[Any, list[list[int]], list[list[int]]]:
    """The plugin's model, its outputs, and those of vLLM without it."""
    plain = tokens_of(opened(model, **options), asked, params)
    llm = opened(model, {"plan": plan.to_json(), "adaptive": False}, **options)
    return llm, tokens_of(llm, asked, params), plain


@pytest.mark.parametrize("plan", [NOTHING, SOME, LOW], ids=["nothing skipped", "some skipped", "low"])
@pytest.mark.parametrize("count", [1, 20])
def test_greedy_output_is_the_same(opened: Opener, tiny: Path, plan: Plan, count: int) -> None:
    llm, drafted, plain = both(opened, tiny, plan, prompts(count), greedy())
    assert drafted == plain
    counts = counts_of(llm)["plan"]
    assert counts["drafted"] > 10 * count
    if plan is NOTHING:
        assert counts["accepted"] >= 0.99 * counts["drafted"]
    if plan is LOW:  # which changes a random model's predictions
        assert 0 < counts["accepted"] < counts["drafted"]


def test_low_bit_weights_are_those_of_the_model_rounded(opened: Opener, tiny: Path) -> None:
    from knn_ssd.vllm_plugin.low_bit import LinearCopies

    llm = opened(tiny)
    linear = runner_of(llm).model.model.layers[1].mlp.gate_up_proj
    low = LinearCopies(torch.device("cpu"), torch.float32)
    weight = low._weight(linear, 64)  # (rows, 64)
    original = load_model(str(tiny), device="cpu", dtype="float32").model.model.layers[1].mlp
    torch.testing.assert_close(weight, torch.cat([original.gate_proj.weight, original.up_proj.weight]))
    before = linear.quant_method
    units = torch.eye(64)
    with low.replacing([linear]):
        rounded = linear(units)[0].T
    assert linear.quant_method is before
    step = (weight.amax(dim=1) - weight.amin(dim=1)) / 15
    wrong = (rounded - weight).abs() / step[:, None]
    assert 0.1 < wrong.max() <= 0.5 + 1e-3


def test_a_plan_that_skips_nothing_shortens_the_work(opened: Opener, tiny: Path) -> None:
    llm, drafted, plain = both(opened, tiny, NOTHING, prompts(1), greedy(max_tokens=50))
    assert drafted == plain
    drafts = metrics_of(llm)
    assert drafts["vllm:spec_decode_num_drafts"] <= 12  # 1 + 50 / 5 steps, and one for the rest
    assert drafts["vllm:spec_decode_num_accepted_tokens"] == counts_of(llm)["plan"]["accepted"]


def test_prompts_may_come_in_chunks(opened: Opener, tiny: Path) -> None:
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 8, "enable_chunked_prefill": True}
    asked = [*prompts(6, longest=30), *prompts(6, longest=150, seed=1)]
    llm, drafted, plain = both(opened, tiny, SOME, asked, greedy(), **options)
    assert drafted == plain
    assert counts_of(llm)["plan"]["drafted"] > 100


def test_prefixes_may_come_from_the_cache(opened: Opener, tiny: Path) -> None:
    start = [33 + index * index % 90 for index in range(100)]
    asked = [[*start, *more] for more in prompts(6, seed=4)]
    options = {"enable_prefix_caching": True}
    plain = tokens_of(opened(tiny, **options), asked, greedy())
    llm = opened(tiny, {"plan": SOME.to_json(), "adaptive": False}, **options)
    for each, expected in zip(asked, plain, strict=True):  # one after the other, so that later ones hit the cache
        (result,) = llm.generate([{"prompt_token_ids": each}], greedy(), use_tqdm=False)
        assert list(result.outputs[0].token_ids) == expected
    assert result.num_cached_tokens >= 96
    assert tokens_of(llm, asked, greedy()) == plain


def test_requests_may_be_preempted(opened: Opener, tiny: Path) -> None:
    per_block = LAYERS * 2 * 32 * 2 * 32 * 4  # layers, KV heads, slots, keys and values, width, bytes
    options = {"kv_cache_memory_bytes": 18 * per_block, "max_num_seqs": 8, "enable_prefix_caching": False}
    params = greedy(max_tokens=120)
    asked = prompts(8, longest=30)
    llm, drafted, plain = both(opened, tiny, SOME, asked, params, **options)
    assert drafted == plain
    assert metrics_of(llm)["vllm:num_preemptions"] > 0


@pytest.mark.parametrize("longest", [1, 3, 7])
def test_drafts_may_cross_blocks(opened: Opener, tiny: Path, longest: int) -> None:
    plan = NOTHING.with_policy(Policy(max_draft=longest, threshold=0.0))
    asked = [[*range(40, 40 + length)] for length in range(25, 36)]
    plain = tokens_of(opened(tiny), asked, greedy(max_tokens=70))
    llm = opened(tiny, {"plan": plan.to_json(), "adaptive": False}, longest=longest)
    assert tokens_of(llm, asked, greedy(max_tokens=70)) == plain
    counts = counts_of(llm)["plan"]
    assert counts["accepted"] >= 0.99 * counts["drafted"]


def test_output_may_end_where_the_model_ends(opened: Opener, tiny: Path) -> None:
    options = {"max_model_len": 64}
    asked = [[*range(40, 40 + length)] for length in (1, 30, 57, 60, 62, 63)]
    _, drafted, plain = both(opened, tiny, SOME, asked, greedy(max_tokens=None), **options)
    assert drafted == plain
    assert [len(tokens) for tokens in drafted] == [64 - len(prompt) for prompt in asked]


def test_stop_strings_end_the_text_in_the_same_place(opened: Opener, tiny: Path) -> None:
    asked = prompts(6)
    plain = opened(tiny)
    texts = [done.outputs[0].text for done in plain.generate(
        [{"prompt_token_ids": each} for each in asked], greedy(), use_tqdm=False
    )]  # fmt: skip
    stops = sorted({text[20:22] for text in texts} | {text[11:12] for text in texts[:2]})
    llm = opened(tiny, {"plan": NOTHING.to_json(), "adaptive": False})
    outputs = [
        [(done.outputs[0].text, done.outputs[0].finish_reason) for done in each.generate(
            [{"prompt_token_ids": ids} for ids in asked], greedy(stop=stops), use_tqdm=False
        )]
        for each in (plain, llm)
    ]  # fmt: skip
    assert outputs[0] == outputs[1]
    assert {"stop"} <= {reason for _, reason in outputs[0]}


def cached(llm: Any, prompt: list[int], count: int) -> list[torch.Tensor]:
    """Each layer's keys and values in the blocks that are verified to their end, after so many output tokens.

    How a block is laid out is the kernels' own matter, so blocks are compared as they are.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    engine.add_request("audited", {"prompt_token_ids": prompt}, params)
    made = 0
    while made < count:
        made = len(engine.step()[0].outputs[0].token_ids)
    runner = runner_of(llm)
    (request,) = runner.requests.values()
    verified = len(prompt) + made - 1  # the last token is known, and was not run yet
    blocks = torch.tensor(request.block_ids[0])[: verified // 32]
    layers = [cache[blocks].clone() for cache in runner.kv_caches]
    engine.abort_request(["audited"])
    return layers


@pytest.mark.parametrize("plan", [NOTHING, SOME], ids=["nothing skipped", "some skipped"])
def test_after_a_verification_the_cache_holds_what_it_would_hold(opened: Opener, tiny: Path, plan: Plan) -> None:
    prompt = prompts(1, seed=7)[0]
    for count in (60, 90, 130):
        plain = cached(opened(tiny), prompt, count)
        drafted = cached(opened(tiny, {"plan": plan.to_json(), "adaptive": False}), prompt, count)
        assert len(plain) == LAYERS
        for ours, theirs in zip(drafted, plain, strict=True):
            same = min(len(ours), len(theirs))
            assert same >= (len(prompt) + count - 1) // 32 >= 2
            assert theirs.abs().max() > 0.1
            torch.testing.assert_close(ours[:same], theirs[:same], rtol=1e-4, atol=1e-5)


def test_the_audit_can_fail(opened: Opener, tiny: Path) -> None:
    prompt = prompts(1, seed=7)[0]
    llm = opened(tiny)
    first = cached(llm, prompt, 60)
    second = cached(llm, [*prompt[:-1], prompt[-1] - 1], 60)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(first[0], second[0], rtol=1e-4, atol=1e-5)


def test_sampling_keeps_the_distribution(opened: Opener, tmp_path: Path) -> None:
    from vllm import SamplingParams

    model = save_tiny_model(tmp_path / "small", seed=5, vocab_size=128)
    asked = [[50, 60, 70]]
    few = SamplingParams(temperature=0.8, top_k=4, max_tokens=3, ignore_eos=True, n=1500, seed=None)
    options = {"max_num_seqs": 64}
    tallies = []
    for settings in (None, {"plan": SOME.to_json(), "adaptive": False}):
        llm = opened(model, settings, **options)
        (done,) = llm.generate([{"prompt_token_ids": asked[0]}], few, use_tqdm=False)
        tally: dict[tuple[int, ...], int] = {}
        for output in done.outputs:
            key = tuple(output.token_ids)
            tally[key] = tally.get(key, 0) + 1
        tallies.append(tally)
    assert counts_of(llm)["plan"]["drafted"] > 1000
    keys = [key for key in set(tallies[0]) | set(tallies[1]) if sum(t.get(key, 0) for t in tallies) >= 10]
    assert len(keys) > 8
    from scipy.stats import chi2_contingency

    result = chi2_contingency([[tally.get(key, 0) for key in keys] for tally in tallies])
    assert result.pvalue > 1e-4
