"""Finds the sublayers of a transformers decoder by its structure, and refuses models that cannot draft for themselves.

It knows names and shapes of modules, not what they compute. The transformers backend runs them to check that a skipped
sublayer really contributes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from knn_ssd.errors import UnsupportedModelError

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")

# Rotary embeddings that change with the longest position seen cannot be rewound across their switching point.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

_LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")

_RECURRENT_LAYER_TYPES = ("linear_attention", "mamba", "recurrent", "conv", "ssm")
_RECURRENT_CLASS = re.compile(r"Mamba|Recurrent|R[Ww][Kk][Vv]|GatedDelta|SSM|R[Gg]L[Rr][Uu]|ShortConv")
_HINT = "Decoders whose layers have one attention and one MLP module each can be used."


@dataclass(frozen=True, slots=True)
class Structure:
    """The decoder stack of a model.

    Args:
        layers: the L decoder layers.
        attention: each layer's attention module.
        mlp: each layer's MLP (or mixture-of-experts) module.
    """

    layers: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    mlp: tuple[nn.Module, ...]


def find_structure(model: PreTrainedModel) -> Structure:
    """Finds the sublayers of a decoder.

    Raises:
        UnsupportedModelError: the model is an encoder-decoder, has recurrent or hybrid state, shares keys and values
            between layers, or has an unknown structure; the message says what was looked for and what was found.
    """
    config = model.config.get_text_config()
    _refuse_unsuitable(model, config)
    layers = _find_layers(model, int(config.num_hidden_layers))
    attention = tuple(_child(model, i, layer, _ATTENTION_NAMES, "attention") for i, layer in enumerate(layers))
    mlp = tuple(_child(model, i, layer, _MLP_NAMES, "MLP") for i, layer in enumerate(layers))
    return Structure(tuple(layers), attention, mlp)


def _refuse_unsuitable(model: PreTrainedModel, config: Any) -> None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; a decoder-only model was looked for", _HINT)
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{name} attends in both directions (is_causal is false in its config), and only what comes before a token "
            "may decide it",
            _HINT,
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    recurrent = sorted(t for t in layer_types if any(word in t for word in _RECURRENT_LAYER_TYPES))
    found = recurrent or sorted({type(m).__name__ for m in model.modules() if _is_recurrent(m)})
    if found:
        raise UnsupportedModelError(
            f"{name} has recurrent state ({', '.join(found)}), which cannot be rewound after a draft; "
            "attention in every layer was looked for",
            _HINT,
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{name} shares keys and values between layers (num_kv_shared_layers={config.num_kv_shared_layers}), "
            "so its attentions cannot be skipped one by one",
            _HINT,
        )
    if not hasattr(config, "num_hidden_layers"):
        raise UnsupportedModelError(f"{name}'s configuration has no num_hidden_layers", _HINT)


def _is_recurrent(module: nn.Module) -> bool:
    return _RECURRENT_CLASS.search(type(module).__name__) is not None


def _find_layers(model: PreTrainedModel, num_layers: int) -> nn.ModuleList:
    """The decoder layers: the module list of length `num_layers` whose members have children."""
    for module in model.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == num_layers
            and all(len(list(layer.children())) > 1 for layer in module)
        ):
            return module
    raise UnsupportedModelError(
        f"no decoder layers were found in {type(model).__name__}; "
        f"a ModuleList of num_hidden_layers={num_layers} layers was looked for",
        _HINT,
    )


def _child(model: PreTrainedModel, index: int, layer: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    children = dict(layer.named_children())
    for name in names:
        if name in children:
            return children[name]
    raise UnsupportedModelError(
        f"no {what} was found in layer {index} ({type(layer).__name__}) of {type(model).__name__}; "
        f"a child named {' or '.join(names)} was looked for, and there are {', '.join(children) or 'none'}",
        _HINT,
    )


def declared(config: Any, name: str) -> Any:
    """A field of a config; None if its class does not declare it, as then the model's code ignores what a file says."""
    return getattr(config, name, None) if hasattr(type(config)(), name) else None


def context_length(config: Any) -> int:
    """The model's context length, or less: as far as its rotary embedding does not change with the length.

    Raises:
        UnsupportedModelError: the config has none.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE and original:
        return int(original)
    length = next((value for name in _LENGTHS if (value := getattr(config, name, None))), None)
    if length is None:
        raise UnsupportedModelError(
            f"the config of this {config.model_type} has no context length; {' or '.join(_LENGTHS)} was looked for",
            "Add max_position_embeddings to its config.json, with the length that it was trained for.",
        )
    return int(length)
