"""Each field of a config means to our backends what it means to transformers, and a stray one means nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.obstacles import NATIVE_FAMILIES, native_obstacle
from knn_ssd.backends.select import select_backend
from knn_ssd.backends.structure import context_length
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.errors import UnsupportedModelError
from knn_ssd.kernels.binding import kernels_obstacle
from knn_ssd.plan import Plan
from knn_ssd.testing import tiny_model

SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
FACTORS = {"short_factor": [1 + i / 10 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **values}}


# Every value is one that changes the logits of some family, or that some family's configs have and others ignore.
FIELDS: dict[str, dict[str, Any]] = {
    "a window": {"sliding_window": 8},
    "no window": {"sliding_window": None},
    "a window of 0": {"sliding_window": 0},
    "a window in use": {"sliding_window": 8, "use_sliding_window": True},
    "a window not in use": {"sliding_window": 8, "use_sliding_window": False},
    "a window in the last layers": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
    "a window in every other layer": {"sliding_window": 8, "use_sliding_window": True, "layer_types": ALTERNATING},
    "a window in no layer": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": ["full_attention"] * 4,
    },
    "windows without a length": {"layer_types": ALTERNATING},
    "chunks": {"attention_chunk_size": 8},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "no head_dim": {"head_dim": None, "hidden_size": 128},
    "one key for all heads": {"num_key_value_heads": 1},
    "as many keys as heads": {"num_key_value_heads": 4},
    "hidden_act": {"hidden_act": "gelu"},
    "another name of silu": {"hidden_act": "swish"},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "another model's eps": {"layer_norm_eps": 0.5, "layer_norm_epsilon": 0.5},
    "rope_theta": {"rope_theta": 500.0},
    "linear": rope("linear", factor=2.0),
    "linear by its old name": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": rope("dynamic", factor=2.0),
    "dynamic beyond another length": rope("dynamic", factor=2.0, original_max_position_embeddings=64),
    "yarn": rope("yarn", factor=2.0, original_max_position_embeddings=64),
    "yarn with a factor": rope("yarn", factor=2.0, original_max_position_embeddings=64, attention_factor=1.7),
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "longrope": rope("longrope", factor=2.0, original_max_position_embeddings=64, **FACTORS),
    "half of each head": rope("default", partial_rotary_factor=0.5),
    "half of each head by its old name": {"partial_rotary_factor": 0.5},
    "half of each head, scaled": rope("linear", factor=2.0, partial_rotary_factor=0.5),
    "factors of logits": {"logit_scale": 3.0, "logits_scaling": 2.0, "final_logit_softcapping": 3.0},
    "factors of attention": {"attn_logit_softcapping": 3.0, "attention_multiplier": 2.0, "query_pre_attn_scalar": 3},
    "factors of states": {"residual_multiplier": 2.0, "embedding_multiplier": 3.0},
    "norms of queries": {"use_qk_norm": True, "qk_layernorm": True},
    "another model's biases": {"qkv_bias": True, "use_qkv_bias": True, "no_bias": True},
    "another order": {"use_parallel_residual": True, "parallel_attn": True},
    "experts": {"num_experts": 4, "num_local_experts": 4},
    "dropout": {"attention_dropout": 0.5},
    "pretraining_tp": {"pretraining_tp": 2},
    "pad_token_id": {"pad_token_id": 7},
    "one layer with a window": {"per_layer_config": {1: {"sliding_window": 8}}},
}
LEFT_TO_TRANSFORMERS = ("hidden_act", "another name of silu")  # whichever the family


def model_with(family: str, fields: dict[str, Any]) -> PreTrainedModel:
    """A model whose biases are not zero, as those of a new model are."""
    model = tiny_model(family, **{**SIZES, **fields})
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    return model


def tokens(count: int) -> list[int]:
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(0)).tolist()


needs_kernels = pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")


@needs_kernels
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_a_field_means_what_it_means_to_transformers(family: str, fields: dict[str, Any]) -> None:
    """What transformers itself cannot run is refused in a sentence."""
    try:
        model = model_with(family, fields)
    except ValueError:
        assert "per_layer_config" in fields  # of a field that the family does not have
        return
    text = tokens(min(200, context_length(model.config)))
    try:
        expected = model(torch.tensor([text]), use_cache=False).logits[0]
    except Exception:
        with pytest.raises(UnsupportedModelError):
            select_backend(model)
        return
    session = select_backend(model).open(len(text))
    session.prefill(text[:40])
    torch.testing.assert_close(session.forward(text[40:]), expected[40:], rtol=0, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_what_the_native_backend_can_is_not_left_to_the_slower_one(family: str) -> None:
    supported = ("a window", "yarn", "llama3", "longrope", "attention_bias", "mlp_bias", "head_dim", "tied", "experts")
    for name in supported:
        assert isinstance(select_backend(model_with(family, FIELDS[name])), NativeBackend), name
    for name in LEFT_TO_TRANSFORMERS:
        assert native_obstacle(model_with(family, FIELDS[name])) is not None, name


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_a_model_that_sees_what_follows_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="attends in both directions"):
        select_backend(model_with(family, {"is_causal": False}))


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_heads_that_cannot_share_their_keys_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError):
        select_backend(model_with(family, {"num_key_value_heads": 8}))


@pytest.mark.parametrize("fields", [FIELDS["a window in every other layer"], FIELDS["chunks"]])
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_teacher_forced_scoring_reads_the_fields_that_the_model_reads(family: str, fields: dict[str, Any]) -> None:
    backend, text = TransformersBackend(model_with(family, fields)), tokens(60)
    scored, drafting = backend.open(100), backend.open(100)
    plan = Plan.skipping(4, attention=[1], mlp=[2])
    scored.prefill(text[:40])
    scored.forward(text[40:])
    drafting.prefill(text[:40])
    logits = scored.teacher_forced_logits(text[40:], plan, 20)
    torch.testing.assert_close(logits, drafting.forward(text[40:], plan), rtol=0, atol=1e-3)
