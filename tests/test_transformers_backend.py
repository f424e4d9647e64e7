"""The transformers backend: drafts leave no trace, sessions are isolated, and a model that cannot draft is refused."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    NUM_LAYERS,
    PROMPT,
    endless,
    keep_everything,
    plans,
    skip_everything,
    skip_something,
    tiny_engine,
    transformers_backend,
    transformers_output,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from knn_ssd.backends.base import Exactness
from knn_ssd.backends.structure import context_length
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.engine import Engine
from knn_ssd.errors import UnsupportedModelError, UsageError
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.plan import Mode, Plan
from knn_ssd.testing import FAMILIES, tiny_model, tiny_tokenizer

every_family = pytest.mark.parametrize("family", FAMILIES)
LONG = [3 + 11 * i % 120 for i in range(30)]


def logits_of(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """(n, V) logits of transformers' own forward pass."""
    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0]


def leftovers(model: nn.Module) -> list[str]:
    """Modules with a `forward`, or hooks, of their own."""
    return [
        name
        for name, module in model.named_modules()
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    ]


# --- Forward passes


def test_the_kv_cache_is_given_under_the_name_that_the_model_takes() -> None:
    original, reference = tiny_model(), tiny_model()
    own = "cache" if "cache" in inspect.signature(original.forward).parameters else "past_key_values"
    forward = original.forward

    def newer(input_ids: Any, cache: Any = None, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        return forward(input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep, **{own: cache})

    def older(input_ids: Any, past_key_values: Any = None, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        return newer(input_ids, past_key_values, use_cache, logits_to_keep)

    for signature in (newer, older):
        original.forward = signature
        session = TransformersBackend(original).open(20)
        session.prefill(PROMPT[:3])
        torch.testing.assert_close(session.forward(PROMPT[3:]), logits_of(reference, PROMPT)[3:])


@every_family
def test_a_session_computes_what_the_model_computes(family: str) -> None:
    backend = transformers_backend(family)
    session = backend.open(len(LONG))
    prefill = session.prefill(LONG[:20])
    rows = [prefill.logits, *session.forward(LONG[20:])]
    torch.testing.assert_close(torch.stack(rows), logits_of(backend.model, LONG)[19:], rtol=1e-4, atol=1e-4)


@every_family
def test_prompt_vectors_are_the_last_hidden_states_after_the_final_norm(family: str) -> None:
    backend = transformers_backend(family)
    prefill = backend.open(len(LONG)).prefill(LONG)
    with torch.no_grad():
        output = backend.model(torch.tensor([LONG]), output_hidden_states=True, use_cache=False)
    hidden = output.hidden_states[-1][0]
    torch.testing.assert_close(prefill.mean, hidden.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prefill.last, hidden[-1], rtol=1e-4, atol=1e-5)
    assert prefill.mean.shape == (backend.hidden_size,)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2"])
def test_with_everything_skipped_only_embedding_norm_and_head_are_left(family: str) -> None:
    backend = transformers_backend(family)
    session = backend.open(len(LONG))
    session.prefill(LONG[:4])
    drafted = session.forward(LONG[4:], skip_everything())
    decoder = backend.model.model
    expected = backend.model.lm_head(decoder.norm(decoder.embed_tokens(torch.tensor([LONG[4:]]))))[0]
    torch.testing.assert_close(drafted, expected, rtol=1e-5, atol=1e-5)


@every_family
def test_every_sublayer_counts_by_itself(family: str) -> None:
    backend = transformers_backend(family)
    session = backend.open(16)
    session.prefill(PROMPT)
    one_each = [Plan.skipping(NUM_LAYERS, [i], []) for i in range(NUM_LAYERS)]
    one_each += [Plan.skipping(NUM_LAYERS, [], [i]) for i in range(NUM_LAYERS)]
    seen = [session.forward([7], plan) for plan in [keep_everything(), *one_each]]
    for i, first in enumerate(seen):
        for second in seen[:i]:
            assert not torch.allclose(first, second)


def test_a_plan_that_keeps_everything_is_the_model_bit_for_bit() -> None:
    session = transformers_backend().open(16)
    session.prefill(PROMPT)
    assert torch.equal(session.forward([7, 8], keep_everything()), session.forward([7, 8]))


def test_exactness_is_one_of_the_two_promises() -> None:
    assert tiny_engine().exactness in Exactness


# --- The KV cache and its cursor


@every_family
@settings(max_examples=3)
@given(plan=plans(), drafted=st.integers(1, 6), accepted=st.integers(0, 6))
def test_after_a_draft_a_rewind_and_a_verification_the_cache_is_that_of_a_fresh_prefill(
    family: str, plan: Plan, drafted: int, accepted: int
) -> None:
    accepted = min(accepted, drafted)
    backend = transformers_backend(family)
    session = backend.open(40)
    session.prefill(LONG[:18])
    for token in LONG[18 : 18 + drafted]:
        session.forward([token], plan)
        session.commit(1)
    session.rewind(18)
    session.forward(LONG[18 : 18 + drafted])
    session.commit(accepted)

    fresh = backend.open(40)
    fresh.prefill(LONG[: 18 + accepted])
    assert session.length == fresh.length == 18 + accepted
    for ours, expected in zip(session._cache.layers, fresh._cache.layers, strict=True):
        for name in ("keys", "values"):
            used = getattr(ours, name)[:, :, : session.length]
            torch.testing.assert_close(used, getattr(expected, name)[:, :, : fresh.length], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(session.forward([9, 4]), fresh.forward([9, 4]), rtol=1e-4, atol=1e-5)


def test_a_forward_that_is_not_committed_leaves_no_trace() -> None:
    session = transformers_backend().open(40)
    session.prefill(PROMPT)
    expected = session.forward([9, 4])
    session.forward([100, 101, 102, 103], skip_something())
    session.forward([50] * 6)
    assert session.length == len(PROMPT)
    assert torch.equal(session.forward([9, 4]), expected)


def test_a_session_is_full_at_its_capacity_and_not_before() -> None:
    session = transformers_backend().open(len(PROMPT) + 2)
    session.prefill(PROMPT)
    session.forward([5, 6])
    session.commit(1)
    with pytest.raises(UsageError, match="opened for 10 tokens was given 11"):
        session.forward([7, 8])
    assert session.forward([7]).shape == (1, 128), "it can be used after the error"
    with pytest.raises(UsageError, match="opened for 3 tokens was given 8"):
        transformers_backend().open(3).prefill(PROMPT)


def test_only_what_was_run_can_be_committed() -> None:
    session = transformers_backend().open(20)
    session.prefill(PROMPT)
    session.forward([5, 6])
    session.commit(1)
    with pytest.raises(AssertionError, match="2 tokens to commit, 1 run"):
        session.commit(2)
    with pytest.raises(AssertionError, match="cannot rewind from 9 to 10"):
        session.rewind(10)
    session.rewind(8)
    with pytest.raises(AssertionError, match="1 tokens to commit, 0 run"):
        session.commit(1)


@pytest.mark.parametrize("second", [None, skip_everything(), keep_everything()])
def test_another_plan_within_a_drafting_run_is_refused(second: Plan | None) -> None:
    session = transformers_backend().open(20)
    session.prefill(PROMPT)
    session.forward([5], skip_something())
    session.commit(1)
    with pytest.raises(AssertionError, match="one drafting run has one plan"):
        session.forward([6], second)
    session.rewind(len(PROMPT))
    session.forward([6], second)


def test_a_prompt_goes_into_an_empty_session() -> None:
    session = transformers_backend().open(20)
    session.prefill(PROMPT)
    with pytest.raises(AssertionError, match="empty session"):
        session.prefill(PROMPT)


def test_a_closed_session_gives_its_memory_back() -> None:
    session = transformers_backend().open(20)
    session.prefill(PROMPT)
    keys = weakref.ref(session._cache.layers[0].keys)
    session.close()
    assert keys() is None


@pytest.mark.parametrize(
    ("plan", "fact"),
    [
        (Plan.skipping(3, [1]), "a plan for 3 layers was given to a model of 4"),
        (Plan((Mode.LOW,) * 4, (Mode.KEEP,) * 4), "no 4-bit weights"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(plan: Plan, fact: str) -> None:
    session = transformers_backend().open(20)
    session.prefill(PROMPT)
    with pytest.raises(UsageError, match=fact):
        session.forward([5], plan)


# --- Teacher-forced scoring


def drafted_in_runs(backend: TransformersBackend, start: int, plan: Plan, run_length: int) -> torch.Tensor:
    """Logits (n, V) of drafting LONG[start:] in runs, each from where the full model is."""
    session = backend.open(len(LONG))
    session.prefill(LONG[:start])
    rows = []
    for begin in range(start, len(LONG), run_length):
        run = LONG[begin : begin + run_length]
        for token in run:
            rows.append(session.forward([token], plan)[0])
            session.commit(1)
        session.rewind(begin)
        session.forward(run)
        session.commit(len(run))
    return torch.stack(rows)


def teacher_forced(backend: TransformersBackend, start: int, plan: Plan, run_length: int) -> torch.Tensor:
    session = backend.open(len(LONG))
    session.prefill(LONG[:start])
    expected = session.forward(LONG[start:])
    keys = [layer.keys.clone() for layer in session._cache.layers]
    rows = session.teacher_forced_logits(LONG[start:], plan, run_length)
    assert session.length == start
    for layer, before in zip(session._cache.layers, keys, strict=True):
        assert torch.equal(layer.keys, before), "teacher-forced scoring writes nothing"
    assert torch.equal(session.forward(LONG[start:]), expected)
    return rows


@every_family
@pytest.mark.parametrize("run_length", [1, 4, 50])
def test_teacher_forced_scoring_gives_what_drafting_in_runs_gives(family: str, run_length: int) -> None:
    backend = transformers_backend(family)
    expected = drafted_in_runs(backend, 14, skip_something(), run_length)
    torch.testing.assert_close(
        teacher_forced(backend, 14, skip_something(), run_length), expected, rtol=1e-4, atol=1e-4
    )


@settings(max_examples=6)
@given(plan=plans(), run_length=st.integers(1, 8), start=st.integers(1, 25))
def test_teacher_forced_scoring_gives_what_drafting_gives_under_any_plan(
    plan: Plan, run_length: int, start: int
) -> None:
    backend = transformers_backend("gemma2")
    expected = drafted_in_runs(backend, start, plan, run_length)
    torch.testing.assert_close(teacher_forced(backend, start, plan, run_length), expected, rtol=1e-4, atol=1e-4)


def test_teacher_forced_scoring_respects_chunked_attention_or_is_refused() -> None:
    backend = TransformersBackend(tiny_model("llama4_text", attention_chunk_size=8))
    expected = drafted_in_runs(backend, 14, skip_something(), 4)
    try:
        rows = teacher_forced(backend, 14, skip_something(), 4)
    except UnsupportedModelError:
        return
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


# --- What is left after something went wrong


@pytest.mark.parametrize("failing_call", [1, 2, 4, 5])  # the fifth pass is the verification
def test_after_an_exception_the_model_gives_bit_for_bit_what_it_gave(failing_call: int) -> None:
    model = tiny_model()
    before = logits_of(model, LONG)
    engine = Engine(model, backend=TransformersBackend(model))
    mlp = model.model.layers[3].mlp  # which the plan keeps
    stream = engine.stream(PROMPT, plan=skip_something(), max_new_tokens=20)
    calls = count(1)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if next(calls) == failing_call:
            raise KeyboardInterrupt
        return type(mlp).forward(mlp, hidden)

    mlp.forward = forward
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    del mlp.forward
    assert leftovers(model) == []
    assert torch.equal(logits_of(model, LONG), before)
    expected = transformers_output(model, PROMPT, 12)
    assert list(engine.generate(PROMPT, plan=skip_something(), max_new_tokens=12).token_ids) == expected


@pytest.mark.parametrize("chunks", [0, 1, 3])
@pytest.mark.parametrize("leave", ["close", "del"])
def test_after_an_abandoned_stream_the_model_gives_bit_for_bit_what_it_gave(chunks: int, leave: str) -> None:
    model = tiny_model()
    before = logits_of(model, LONG)
    engine = Engine(model, backend=TransformersBackend(model))
    stream = engine.stream(PROMPT, plan=skip_something(), max_new_tokens=20)
    for _ in range(chunks):
        next(stream)
    session = weakref.ref(stream._steps.gi_frame.f_locals["self"].session)
    if leave == "close":
        stream.close()
        assert session() is None or session()._cache.layers == []
    del stream
    gc.collect()
    assert session() is None
    assert leftovers(model) == []
    assert torch.equal(logits_of(model, LONG), before)


def test_making_a_backend_leaves_the_model_as_it_is() -> None:
    model = tiny_model()
    before = logits_of(model, LONG)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    Engine(model, backend=TransformersBackend(model)).generate(PROMPT, plan=skip_something(), max_new_tokens=6)
    assert leftovers(model) == []
    assert torch.equal(logits_of(model, LONG), before)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_a_foreign_forward_on_a_module_is_kept() -> None:
    model = tiny_model()
    mlp = model.model.layers[1].mlp

    def halved(hidden: torch.Tensor) -> torch.Tensor:
        return type(mlp).forward(mlp, hidden) / 2

    mlp.forward = halved
    before = logits_of(model, LONG)
    Engine(model).generate(PROMPT, plan=skip_something(), max_new_tokens=6)
    assert mlp.forward is halved
    assert torch.equal(logits_of(model, LONG), before)


# --- Several sessions of one model


def test_interleaved_sessions_give_what_each_gives_alone() -> None:
    engine = tiny_engine("gemma3_text")
    requests = [
        {"prompt": PROMPT, "plan": skip_something()},
        {"prompt": LONG, "plan": skip_everything()},
        {"prompt": LONG[::-1], "plan": keep_everything(), "temperature": 1.0, "seed": 4},
        {"prompt": PROMPT[::-1], "plain": True},
    ]
    alone = [engine.generate(**request, max_new_tokens=20) for request in requests]
    streams = [engine.stream(**request, max_new_tokens=20) for request in requests]
    going = list(streams)
    while going:
        going = [stream for stream in going if next(stream, None) is not None]
    for stream, expected in zip(streams, alone, strict=True):
        assert stream.result.token_ids == expected.token_ids
        assert stream.result.stats.drafted == expected.stats.drafted
        assert stream.result.stats.accepted == expected.stats.accepted


def test_threads_of_one_engine_give_what_each_gives_alone() -> None:
    engine = tiny_engine()
    chosen = [skip_something(), skip_everything(), keep_everything()]
    expected = engine.generate(PROMPT, plain=True, max_new_tokens=40).token_ids
    outputs: dict[int, tuple[int, ...]] = {}

    def run(index: int) -> None:
        outputs[index] = engine.generate(PROMPT, plan=chosen[index], max_new_tokens=40).token_ids

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(chosen))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == dict.fromkeys(range(len(chosen)), expected)


def _pass_beside_a_draft(drafting: TransformersBackend, other: TransformersBackend) -> torch.Tensor:
    """What `other` computes in a second thread while `drafting` is in the middle of a draft pass."""
    inside, done = threading.Event(), threading.Event()

    def draft() -> None:
        with drafting.skipping(skip_everything()):
            inside.set()
            done.wait(timeout=0.5)  # a backend that waits for the end of the draft is right, and this times out

    thread = threading.Thread(target=draft)
    session = other.open(20)
    thread.start()
    inside.wait()
    logits = session.prefill(PROMPT).logits
    done.set()
    thread.join()
    return logits


def test_a_forward_pass_of_another_thread_does_not_see_a_draft() -> None:
    backend = TransformersBackend(tiny_model())
    expected = backend.open(20).prefill(PROMPT).logits
    assert torch.equal(_pass_beside_a_draft(backend, backend), expected)


def test_a_forward_pass_of_another_backend_of_the_same_model_does_not_see_a_draft() -> None:
    model = tiny_model()
    expected = TransformersBackend(model).open(20).prefill(PROMPT).logits
    assert torch.equal(_pass_beside_a_draft(TransformersBackend(model), TransformersBackend(model)), expected)


# --- Structures beyond the families, and what is refused


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MIXED_WINDOWS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "use_sliding_window": True,
}
LATENT_ATTENTION = {  # keys and values differ in size
    "head_dim": None,
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("cohere2", {"sliding_window": 8}),  # parallel residual, two kinds of layers
        ("llama4_text", {"attention_chunk_size": 8}),
        ("qwen3", MIXED_WINDOWS),
        ("deepseek_v3", LATENT_ATTENTION),
        ("seed_oss", {}),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": PLAIN_ROPE}),
    ],
    ids=["cohere2", "llama4_text", "qwen3", "deepseek_v3", "seed_oss", "gpt_oss"],
)
def test_any_decoder_with_attention_and_mlp_modules_can_draft(family: str, sizes: dict[str, Any]) -> None:
    model = endless(tiny_model(family, **sizes))
    engine = Engine(model)
    for plan in (skip_something(), skip_everything()):
        generation = engine.generate(LONG, plan=plan, max_new_tokens=12)
        assert list(generation.token_ids) == transformers_output(model, LONG, 12)


def tiny_t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))


MPT: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64} | dict.fromkeys(
    ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), None
)


def test_a_context_length_has_several_names_and_without_one_a_model_is_refused() -> None:
    assert context_length(SimpleNamespace(max_seq_len=64)) == 64
    assert context_length(SimpleNamespace(max_position_embeddings=32, max_seq_len=64)) == 32
    with pytest.raises(UnsupportedModelError, match="the config of this bloom has no context length"):
        context_length(SimpleNamespace(model_type="bloom"))


def headless() -> PreTrainedModel:
    return AutoModel.from_config(tiny_model().config)


@pytest.mark.parametrize(
    ("make", "looked_for"),
    [
        (lambda: tiny_model("mamba"), "recurrent state .*; attention in every layer was looked for"),
        (lambda: tiny_model("jamba"), "recurrent state .*; attention in every layer was looked for"),
        (lambda: tiny_model("qwen3_next"), "recurrent state .*; attention in every layer was looked for"),
        (
            lambda: tiny_model("lfm2", layer_types=["conv", "full_attention"] * 2),
            "recurrent state .*; attention in every layer was looked for",
        ),
        (lambda: tiny_model("bloom"), "layers that only add both to a residual stream were looked for"),
        (
            lambda: tiny_model("bloom", max_position_embeddings=None),
            "layers that only add both to a residual stream were looked for",
        ),
        (lambda: tiny_model("mpt", **MPT), "layers that only add both to a residual stream were looked for"),
        (
            lambda: tiny_model("opt"),
            "no MLP was found in layer 0 .* a child named mlp or .* was looked for, and there are",
        ),
        (lambda: tiny_model("ctrl"), "no attention was found in layer 0 .* was looked for, and there are"),
        (tiny_t5, "encoder-decoder; a decoder-only model was looked for"),
        (headless, "LlamaModel .*logits"),
    ],
)
def test_what_cannot_draft_for_itself_is_refused_with_what_was_looked_for(make: Any, looked_for: str) -> None:
    model = make()
    with pytest.raises(UnsupportedModelError, match=looked_for) as refusal:
        Engine(model)
    assert type(model).__name__ in str(refusal.value)
    assert leftovers(model) == []


# --- Fingerprints


def test_a_fingerprint_distinguishes_models_and_recognises_one() -> None:
    known = fingerprint(tiny_model(), tiny_tokenizer())
    assert fingerprint(tiny_model(), tiny_tokenizer()) == known
    assert known.differences(fingerprint(tiny_model(seed=1), tiny_tokenizer()))
    assert known.differences(fingerprint(tiny_model(), None))
    changed = tiny_model()
    changed.model.layers[2].mlp.up_proj.weight += 1e-3
    assert known.differences(fingerprint(changed, tiny_tokenizer()))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
def test_the_dtype_a_model_is_loaded_in_does_not_make_it_another(stored: torch.dtype, loaded: torch.dtype) -> None:
    known = fingerprint(tiny_model(dtype=stored), None)
    assert known.differences(fingerprint(tiny_model(dtype=stored).to(loaded), None)) == ()
