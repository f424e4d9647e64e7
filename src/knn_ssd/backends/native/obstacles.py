"""Which models the native backend executes, and how their configs are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from knn_ssd.kernels.binding import kernels, kernels_obstacle
from knn_ssd.kernels.gguf_rows import QuantisedEmbedding, QuantisedLinear, float_parameters
from knn_ssd.kernels.weights import KINDS

_KNOWN = (nn.Linear, nn.Embedding, nn.ModuleList, QuantisedLinear, QuantisedEmbedding)
NATIVE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def native_obstacle(model: PreTrainedModel) -> str | None:
    """None if the model can run on the native backend on this machine, else the reason."""
    return next(_obstacles(model), None)


def _obstacles(model: PreTrainedModel) -> Iterator[str]:
    """The reasons why a model cannot run, in order; each check relies on those before it."""
    config = model.config
    if config.model_type not in NATIVE_FAMILIES:
        yield f"the architecture {config.model_type} is not among {', '.join(NATIVE_FAMILIES)}"
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        yield "it has no LM head"
    if any(weight.device.type != "cpu" for weight in model.parameters()):
        yield "its weights are not on the CPU"
    if modification := _modification(model):
        yield f"it was modified: {modification}"
    if config.hidden_act != "silu":
        yield f"its activation function is {config.hidden_act}"
    if getattr(config, "is_heterogeneous", False):
        yield "its layers are not all alike (per_layer_config)"
    yield from _attention_obstacles(model)
    if unavailable := kernels_obstacle():
        yield unavailable
    lanes = kernels().knn_ssd_lanes()
    layers: Any = model.base_model.layers
    widths = {module.in_features for module in model.modules() if isinstance(module, nn.Linear)}
    if odd := sorted(width for width in widths if width % (2 * lanes)):
        yield f"a linear layer has {odd[0]} inputs, which is not a multiple of {2 * lanes}"
    if layers[0].self_attn.head_dim % lanes:
        yield f"its head size is {layers[0].self_attn.head_dim}, which is not a multiple of {lanes}"


def _attention_obstacles(model: PreTrainedModel) -> Iterator[str]:
    """Values of the config with which attention is another than the kernels', or none at all."""
    base: Any = model.base_model
    config: Any = model.config
    if config.num_attention_heads % config.num_key_value_heads:
        yield f"{config.num_attention_heads} heads cannot share {config.num_key_value_heads} keys and values"
    head_dim, rotary = base.layers[0].self_attn.head_dim, 2 * len(base.rotary_emb.inv_freq)
    if rotary != head_dim:
        yield f"its rotary embedding turns {rotary} of a head's {head_dim} values"
    for layer in base.layers:
        window = sliding_window(layer.self_attn)
        slides = window is not None or getattr(layer.self_attn, "layer_type", None) == "sliding_attention"
        if slides and not window:
            yield f"its sliding window is {window}"


def sliding_window(attention: Any) -> int | None:
    """How many keys a row of an attention module sees; None is no limit. Each family reads its config in its own way:
    Llama ignores a `sliding_window`, Mistral has one for all layers, Qwen's modules have their own.
    """
    config = attention.config
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    return None if window is None else int(window)


def _modification(model: PreTrainedModel) -> str | None:
    """The first difference from the family's own code: a wrapped or hooked module, another dtype, a strided weight."""
    for name, module in model.named_modules():
        own = (
            type(module).__module__
            == f"transformers.models.{model.config.model_type}.modeling_{model.config.model_type}"
        )
        known = own or type(module) in _KNOWN or "activations" in type(module).__module__
        if not known:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"{name or 'the model'} is hooked"
    for name, weight in float_parameters(model).items():
        if weight.dtype not in KINDS or not weight.is_contiguous():
            return f"{name} is {str(weight.dtype).removeprefix('torch.')}"
    return None
