"""Carries what a GGUF file states into transformers' config, or refuses what has no place there.

transformers' reader leaves such things out in silence, and the model then says something else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.errors import UnsupportedModelError
from knn_ssd.loading.gguf_file import GGUFFacts
from knn_ssd.loading.gguf_weights import USE_SAFETENSORS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LLAMA_LIKE = ("llama", "qwen2", "qwen3")
# Metadata by which llama.cpp computes otherwise, and which transformers' families do not have.
_FOREIGN = ("attention.scale", "logit_scale", "embedding_scale", "residual_scale", "attn_logit_softcapping")
_HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
# The models whose scale is not that of a head's size; llama.cpp knows them by these numbers of layers as well.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_KNOWN_SCALING = {"rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"}


def refuse_foreign(gguf: Path, facts: GGUFFacts) -> None:
    """Refuses metadata that changes the output of a Llama-like architecture and has no place in its config."""
    if facts.architecture not in _LLAMA_LIKE:
        return
    for name in _FOREIGN:
        if name in facts.numbers:
            raise _lost(gguf, f"{facts.architecture}.{name} = {facts.numbers[name]:g}")
    if facts.numbers.get("attention.causal", 1) == 0:
        raise _lost(gguf, f"{facts.architecture}.attention.causal = false")
    sizes = {facts.numbers[name] for name in _HEAD_SIZES if name in facts.numbers}
    if len(sizes) > 1:
        listed = ", ".join(f"{size:g}" for size in sorted(sizes))
        raise _lost(gguf, f"several sizes of a head ({listed})")


def complete_config(gguf: Path, config: Any, facts: GGUFFacts) -> None:
    """Adds the head size, the scale of queries and the position scaling to a config."""
    if facts.architecture in _LLAMA_LIKE:
        if "attention.key_length" in facts.numbers:
            config.head_dim = int(facts.numbers["attention.key_length"])
        if "attention.head_count_kv" not in facts.numbers:
            config.num_key_value_heads = config.num_attention_heads
        if config.model_type == "mistral":  # llama.cpp's llama has no window, and transformers' default is 4096
            config.sliding_window = None
    if _GEMMA_27B_LAYERS.get(facts.architecture) == config.num_hidden_layers:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    wanted = _rope(gguf, config, facts)
    own = getattr(config, "rope_parameters", None) or {}
    scaled = own.get("full_attention", own)  # Gemma 3 scales positions in the layers without a window alone
    if not wanted or scaled.get("rope_type", "default") == wanted["rope_type"]:
        return
    if scaled.get("rope_type", "default") != "default" or "rope_theta" not in scaled:
        raise _lost(gguf, f"the position scaling {wanted['rope_type']}")
    parameters = {**scaled, **wanted}
    config.rope_parameters = parameters if scaled is own else {**own, "full_attention": parameters}


def _rope(gguf: Path, config: Any, facts: GGUFFacts) -> dict[str, Any]:
    """transformers' parameters of the position scaling that a file states; empty if it states none."""
    scaling, factor = facts.scaling, facts.numbers.get("rope.scaling.factor")
    if scaling in (None, "none"):
        # Frequencies divided by one factor each, as in Llama 3.1; `longrope` with one set of factors is just that.
        if set(facts.rope_factors) <= {1.0}:
            return {}
        length, factors = config.max_position_embeddings, list(facts.rope_factors)
        sets = {"short_factor": factors, "long_factor": factors, "factor": 1.0, "attention_factor": 1.0}
        return {"rope_type": "longrope", "original_max_position_embeddings": length, **sets}
    others = {name for name in facts.numbers if name.startswith("rope.scaling.")} - _KNOWN_SCALING
    if facts.rope_factors or others or factor is None or scaling not in ("linear", "yarn"):
        details = ", ".join(sorted(others)) or f"the factor {factor}"
        raise _lost(gguf, f"the position scaling '{scaling}' with {details}")
    if scaling == "linear":
        return {"rope_type": "linear", "factor": factor}
    length = int(facts.numbers.get("rope.scaling.original_context_length", config.max_position_embeddings))
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}


def refuse_losses(gguf: Path, model: PreTrainedModel, facts: GGUFFacts) -> None:
    """Refuses a file some of whose values transformers leaves out, such as biases."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    stated = sum(count for name, count in facts.values.items() if not (tied and name == "output.weight"))
    left_out = stated - sum(parameter.numel() for parameter in model.parameters())
    if left_out > 0:
        raise _lost(gguf, f"{left_out} of {stated} values")


def _lost(gguf: Path, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"'{gguf}' has {what}, for which transformers' model has no place", USE_SAFETENSORS)
