"""The engine: prompts of every kind in, text with route, plan and stats out; the rest is refused in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    NUM_LAYERS,
    PROMPT,
    endless,
    endless_tokenizer,
    keep_everything,
    plans,
    prompts,
    skip_something,
    transformers_output,
)
from hypothesis import given, settings

from knn_ssd import engine as engine_module
from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.base import Pooling
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.engine import Engine
from knn_ssd.errors import AtlasMismatchError, ModelError, PromptError, UsageError
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.outputs import Generation
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.speculation.decode import FinishReason
from knn_ssd.testing import tiny_model, tiny_tokenizer

DOMAINS = {"story": "once upon a time", "math": "3 + 4 * 12 = 51"}
PLANS = {"story": keep_everything(max_draft=3), "math": skip_something(max_draft=2)}
FALLBACK = Plan.skipping(NUM_LAYERS, mlp=[0], policy=Policy(1, 0.0))


@pytest.fixture(scope="module")
def engine() -> Engine:
    """With a tokenizer whose chat template is a line per message."""
    return Engine(endless(tiny_model()), endless_tokenizer())


def make_atlas(engine: Engine, pooling: Pooling = Pooling.MEAN, radius: float = 2.0) -> Atlas:
    """An anchor for each domain: the vector of its one prompt."""
    vectors = []
    for text in DOMAINS.values():
        token_ids = engine.encode(text)
        vectors.append(engine.backend.open(len(token_ids)).prefill(token_ids).vector(pooling).numpy())
    return Atlas(
        fingerprint=fingerprint(engine.model, engine.tokenizer),
        pooling=pooling,
        anchors=np.stack(vectors),
        anchor_domains=tuple(DOMAINS),
        domains={name: DomainEntry(PLANS[name], radius) for name in DOMAINS},
        fallback=FALLBACK,
        cost=CostProfile(1.0, 0.1, 0.1, (1.0,)),
    )


def with_atlas(engine: Engine, **options: Any) -> Engine:
    return Engine(engine.model, engine.tokenizer, make_atlas(engine, **options))


# --- Prompts


def test_a_string_is_a_users_message(engine: Engine) -> None:
    assert engine.tokenizer is not None
    assert engine.tokenizer.decode(engine.encode("hi")) == "user: hi\nassistant: "
    conversation = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert engine.tokenizer.decode(engine.encode(conversation)) == "system: be brief\nuser: hi\nassistant: "


def test_without_chat_or_a_chat_template_a_string_is_raw_text(engine: Engine) -> None:
    assert engine.encode("hi", chat=False) == [ord("h"), ord("i")]
    assert Engine(engine.model, tiny_tokenizer()).encode("hi") == [ord("h"), ord("i")]


def test_token_ids_are_taken_as_they_are(engine: Engine) -> None:
    assert engine.encode(PROMPT) == PROMPT
    as_text, as_ids = (engine.generate(prompt, chat=False, max_new_tokens=6) for prompt in ("hi", [*map(ord, "hi")]))
    assert as_text.token_ids == as_ids.token_ids


def test_without_a_tokenizer_tokens_are_all_there_is(engine: Engine) -> None:
    generation = Engine(engine.model).generate(PROMPT, max_new_tokens=5)
    assert generation.text == ""
    assert list(generation.token_ids) == transformers_output(engine.model, PROMPT, 5)


@pytest.mark.parametrize(
    ("prompt", "fact"),
    [
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ([], "empty"),
        ("x" * 300, r"has 3\d\d tokens, and the model's context is 256"),
        ([128], "128"),
        ([5, -1], "-1"),
        ("lone \ud800 surrogate", "prompt"),
        ([{"role": "user"}], "content"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(engine: Engine, prompt: Any, fact: str) -> None:
    with pytest.raises(PromptError, match=fact):
        engine.generate(prompt, max_new_tokens=2)


@pytest.mark.parametrize(("prompt", "fact"), [("hi", "without a tokenizer"), ([], "empty")])
def test_a_prompt_that_cannot_be_used_without_a_tokenizer_is_refused(engine: Engine, prompt: Any, fact: str) -> None:
    with pytest.raises(PromptError, match=fact):
        Engine(engine.model).generate(prompt)


def test_a_conversation_needs_a_chat_template(engine: Engine) -> None:
    with pytest.raises(PromptError, match="no chat template"):
        Engine(engine.model, tiny_tokenizer()).generate([{"role": "user", "content": "hi"}])


# --- Options


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"min_p": 2.0}, "min_p must be in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"stop": ""}, "at least one character"),
        ({"stop": ["a", ""]}, "at least one character"),
        ({"domain": "math"}, "got 'math' and no atlas"),
        ({"plan": Plan.skipping(3, [0])}, "a plan for 3 layers was given to a model of 4"),
        ({"plan": Plan((Mode.LOW,) * 4, (Mode.KEEP,) * 4)}, "no 4-bit weights"),
    ],
)
def test_an_option_out_of_its_range_is_refused_with_the_value(
    engine: Engine, options: dict[str, Any], fact: str
) -> None:
    on_transformers = Engine(engine.model, engine.tokenizer, backend=TransformersBackend(engine.model))
    with pytest.raises(UsageError, match=fact):
        on_transformers.generate("hi", **options)


def test_stop_strings_need_a_tokenizer(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"stop strings need a tokenizer, got \['a'\]"):
        Engine(engine.model).generate(PROMPT, stop="a")


def test_an_unknown_domain_is_refused_with_those_there_are(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"no domain 'sql'. It has math, story"):
        with_atlas(engine).generate("hi", domain="sql")


@pytest.mark.parametrize(
    "option",
    [{"temperature": 3.0}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.5}, {"repetition_penalty": 3.0}, {"seed": 2}],
)
def test_every_sampling_option_changes_something(engine: Engine, option: dict[str, Any]) -> None:
    common = {"temperature": 1.0, "seed": 1, "max_new_tokens": 20, "plan": skip_something()}
    assert engine.generate("hi", **common | option).token_ids != engine.generate("hi", **common).token_ids


def test_a_penalty_changes_greedy_output_too(engine: Engine) -> None:
    assert (
        engine.generate("hi", repetition_penalty=3.0, max_new_tokens=20).token_ids
        != engine.generate("hi", max_new_tokens=20).token_ids
    )


# --- Plans and routes


def test_without_an_atlas_the_default_plan_drafts(engine: Engine) -> None:
    on_transformers = Engine(engine.model, engine.tokenizer, backend=TransformersBackend(engine.model))
    for each, cheapens in ((engine, Mode.LOW in engine.backend.modes), (on_transformers, False)):
        generation = each.generate("hi", max_new_tokens=6)
        assert generation.route is None
        assert generation.plan.policy.lookup
        assert generation.plan.cheapens == cheapens
    length = 20 if Mode.LOW in engine.backend.modes else 100  # until something repeats, where only lookup drafts
    assert engine.generate("hi", max_new_tokens=length, adaptive=False).stats.drafted > 0


def test_a_seeded_output_depends_on_its_request_alone(engine: Engine) -> None:
    options: dict[str, Any] = {"temperature": 0.7, "seed": 4, "max_new_tokens": 40}
    fresh, used = (Engine(engine.model, engine.tokenizer) for _ in range(2))
    expected = fresh.generate("hello hello hello", **options)
    assert expected.stats.drafted > 0
    used.generate("hello hello hello", temperature=1.5, max_new_tokens=60)
    for _ in range(200):
        for rows in range(2, 17):
            used.cost_model.record_verification(rows, 1000.0)  # at such costs nothing is drafted
    found = used.generate("hello hello hello", **options)
    assert (found.token_ids, found.stats.drafted) == (expected.token_ids, expected.stats.drafted)
    clocked = used.generate("hello hello hello", adaptive=True, **options)
    assert clocked.stats.drafted < expected.stats.drafted


def test_plain_decoding_drafts_nothing(engine: Engine) -> None:
    generation = engine.generate("hi", max_new_tokens=6, plain=True)
    assert generation.plan.is_plain
    assert generation.stats.drafted == 0
    assert generation.stats.acceptance_rate is None
    assert generation.stats.rounds == 6


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("domain", DOMAINS)
def test_the_nearest_anchor_names_the_plan(engine: Engine, pooling: Pooling, domain: str) -> None:
    generation = with_atlas(engine, pooling=pooling).generate(DOMAINS[domain], max_new_tokens=6, adaptive=False)
    assert generation.route is not None
    assert generation.route.domain == domain
    assert generation.route.distance == pytest.approx(0, abs=1e-5)
    assert generation.plan == PLANS[domain]
    assert generation.stats.drafted > 0


def test_far_from_every_anchor_the_fallback_drafts(engine: Engine) -> None:
    generation = with_atlas(engine, radius=1e-4).generate("SELECT * FROM t", max_new_tokens=6)
    assert generation.route is not None
    assert generation.route.fallback
    assert generation.plan == FALLBACK


def test_a_given_domain_or_plan_overrides_the_route_and_plain_both(engine: Engine) -> None:
    routed = with_atlas(engine)

    def generate(**options: Any) -> Generation:
        generation = routed.generate(DOMAINS["story"], max_new_tokens=4, **options)
        assert generation.route is not None, "the route is reported even if it is overridden"
        assert generation.route.domain == "story"
        return generation

    assert generate(domain="math").plan == PLANS["math"]
    assert generate(plan=FALLBACK).plan == FALLBACK
    assert generate(domain="math", plan=FALLBACK).plan == FALLBACK
    plain = generate(domain="math", plan=FALLBACK, plain=True)
    assert plain.plan.is_plain
    assert plain.stats.drafted == 0


def test_more_neighbours_can_vote(engine: Engine) -> None:
    atlas = make_atlas(engine)
    routed = Engine(engine.model, engine.tokenizer, atlas, neighbours=2)
    assert routed.generate(DOMAINS["math"], max_new_tokens=2).plan == PLANS["math"]
    with pytest.raises(UsageError, match=r"k must be in \[1, 2\]"):
        Engine(engine.model, engine.tokenizer, atlas, neighbours=3)


def test_an_atlas_of_another_model_is_refused(engine: Engine) -> None:
    atlas = make_atlas(engine)
    with pytest.raises(AtlasMismatchError, match="weights hash"):
        Engine(tiny_model(seed=1), engine.tokenizer, atlas)
    with pytest.raises(AtlasMismatchError, match="tokenizer hash is none"):
        Engine(engine.model, None, atlas)


def test_an_atlas_calibrated_in_another_dtype_is_taken(engine: Engine) -> None:
    atlas = make_atlas(engine)
    other = replace(atlas, fingerprint=replace(atlas.fingerprint, dtype="bfloat16"))
    assert (
        Engine(engine.model, engine.tokenizer, other).generate(DOMAINS["math"], max_new_tokens=2).plan == PLANS["math"]
    )


def test_custom_generate_routes_as_the_engine_does(engine: Engine) -> None:
    routed = with_atlas(engine)
    token_ids = routed.encode(DOMAINS["story"])
    drafts: set[Plan] = set()
    prepare_later = routed.backend.prepare_later

    def noted(plan: Plan) -> bool:
        drafts.add(plan)
        return prepare_later(plan)

    routed.backend.prepare_later = noted
    output = transformers_output(engine.model, token_ids, 8, custom_generate=routed.custom_generate)
    assert output == transformers_output(engine.model, token_ids, 8)
    assert drafts == {PLANS["story"]}


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"inputs": torch.tensor([PROMPT, PROMPT])}, "one prompt at a time, got 2"),
        ({"attention_mask": torch.tensor([[0] + [1] * 7])}, "without padding"),
        ({"num_beams": 2}, "without beams, got num_beams=2"),
    ],
)
def test_what_custom_generate_cannot_do_is_refused(engine: Engine, change: dict[str, Any], fact: str) -> None:
    options = {"inputs": torch.tensor([PROMPT]), "max_new_tokens": 3, "pad_token_id": 0} | change
    with pytest.raises(UsageError, match=fact):
        engine.model.generate(custom_generate=engine.custom_generate, **options)


def test_custom_generate_is_for_the_engines_own_model(engine: Engine) -> None:
    with pytest.raises(UsageError, match="another model than the engine's own"):
        transformers_output(tiny_model(), PROMPT, 3, custom_generate=engine.custom_generate)


def test_custom_generate_gives_what_transformers_was_asked_for(engine: Engine) -> None:
    output = engine.model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=3,
        pad_token_id=0,
        custom_generate=engine.custom_generate,
        return_dict_in_generate=True,
    )
    assert output.sequences[0, len(PROMPT) :].tolist() == transformers_output(engine.model, PROMPT, 3)


# --- Streams and stats


def rounds_of(generation: Generation) -> tuple[int, int, int, int]:
    stats = generation.stats
    return stats.tokens, stats.rounds, stats.drafted, stats.accepted


@settings(max_examples=10)
@given(plan=plans(), prompt=prompts())
def test_a_stream_is_the_generation_in_pieces(engine: Engine, plan: Plan, prompt: list[int]) -> None:
    options: dict[str, Any] = {"plan": plan, "max_new_tokens": 16, "temperature": 0.8, "seed": 3}
    stream = engine.stream(prompt, **options)
    chunks = list(stream)
    generation = engine.generate(prompt, **options)
    assert "".join(chunk.text for chunk in chunks) == generation.text == stream.result.text
    assert tuple(token for chunk in chunks for token in chunk.round.tokens) == generation.token_ids
    assert rounds_of(stream.result) == rounds_of(generation)
    assert stream.result.finish_reason == generation.finish_reason == chunks[-1].round.finish_reason
    assert all(chunk.round.finish_reason is None for chunk in chunks[:-1])
    assert generation.text == engine.tokenizer.decode(generation.token_ids, skip_special_tokens=True)


@settings(max_examples=10)
@given(plan=plans(), prompt=prompts())
def test_stats_add_up(engine: Engine, plan: Plan, prompt: list[int]) -> None:
    stream = engine.stream(prompt, plan=plan, max_new_tokens=16)
    rounds = [chunk.round for chunk in stream]
    generation = stream.result
    stats = generation.stats
    assert stats.tokens == len(generation.token_ids) == sum(len(r.tokens) for r in rounds) == 16
    assert stats.rounds == len(rounds)
    assert stats.tokens == stats.rounds + stats.accepted, "each round adds one token of the target's own"
    assert stats.drafted == sum(r.drafted for r in rounds) >= stats.accepted == sum(r.accepted for r in rounds)
    assert all(r.drafted <= plan.policy.max_draft for r in rounds)
    assert stats.acceptance_rate == (stats.accepted / stats.drafted if stats.drafted else None)
    assert stats.tokens_per_round == 16 / len(rounds)
    assert stats.decode_sec == pytest.approx(sum(r.draft_sec + r.verify_sec for r in rounds))
    assert min(stats.prefill_sec, stats.decode_sec, stats.tokens_per_sec) > 0
    assert stats.exactness is engine.exactness


def test_a_route_and_a_plan_are_known_before_the_first_chunk(engine: Engine) -> None:
    stream = with_atlas(engine).stream(DOMAINS["math"], max_new_tokens=4)
    assert stream.route is not None
    assert stream.route.domain == "math"
    assert stream.plan == PLANS["math"]


def test_the_result_of_a_stream_runs_the_rest_of_it(engine: Engine) -> None:
    stream = engine.stream("hi", plan=skip_something(), max_new_tokens=8)
    next(stream)
    assert stream.result == stream.result
    assert stream.result.token_ids == engine.generate("hi", max_new_tokens=8).token_ids
    assert next(stream, None) is None


def test_a_stream_closed_early_has_no_result(engine: Engine) -> None:
    stream = engine.stream("hi", plan=skip_something(), max_new_tokens=8)
    next(stream)
    stream.close()
    assert list(stream) == []
    with pytest.raises(UsageError, match="closed before its end"):
        _ = stream.result


def test_a_stream_ends_for_the_reason_that_its_result_has() -> None:
    stream = Engine(endless(tiny_model(max_position_embeddings=16))).stream(PROMPT, max_new_tokens=None)
    chunks = list(stream)
    assert stream.result.finish_reason is FinishReason.CONTEXT
    assert chunks[-1].round.finish_reason is FinishReason.CONTEXT


def test_a_stop_string_may_come_without_a_list(engine: Engine) -> None:
    text = engine.generate("hi", max_new_tokens=12).text
    stop = text[3]
    assert engine.generate("hi", max_new_tokens=12, stop=stop).text == text[: text.index(stop)]


def test_a_model_in_a_folder_is_loaded_with_its_atlas(engine: Engine, tmp_path: Path) -> None:
    engine.model.save_pretrained(tmp_path / "model")
    engine.tokenizer.save_pretrained(tmp_path / "model")
    atlas = make_atlas(engine).save(tmp_path / "atlas")
    loaded = Engine.from_pretrained(tmp_path / "model", atlas=atlas, dtype="float32", device="cpu")
    expected = with_atlas(engine).generate(DOMAINS["math"], max_new_tokens=8)
    generation = loaded.generate(DOMAINS["math"], max_new_tokens=8)
    assert (generation.text, generation.token_ids) == (expected.text, expected.token_ids)
    assert generation.plan == expected.plan


def test_a_sequence_prompt_is_left_as_it_is(engine: Engine) -> None:
    prompt: Sequence[int] = list(PROMPT)
    engine.generate(prompt, max_new_tokens=4)
    assert prompt == PROMPT


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"plain": True}, {"plan": keep_everything()}, {"temperature": 1.0, "seed": 1}])
def test_logits_that_are_not_finite_are_an_error_and_accept_no_draft(value: float, options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(value)
    with pytest.raises(ModelError, match="not finite"):
        Engine(model).generate(PROMPT, max_new_tokens=8, **options)


def test_weights_are_packed_by_the_threads_that_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path)
    order: list[object] = []
    real = engine_module.select_backend
    monkeypatch.setattr(engine_module, "set_threads", order.append)
    monkeypatch.setattr(engine_module, "select_backend", lambda *args: (order.append("packing"), real(*args))[1])
    Engine.from_pretrained(tmp_path, device="cpu", threads=1)
    assert order[:2] == [1, "packing"]
