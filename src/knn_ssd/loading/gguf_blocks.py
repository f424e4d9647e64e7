"""Loads a converted GGUF file whose weights are still the file's quantised blocks.

Its directory has a `gguf_blocks.json`, which names the type of each matrix that is stored as the bytes of its rows; all
other weights are float32. transformers would not know such weights, so the model is built here without weights, and
those of the file are put into it, memory-mapped. Buffers, such as rotary frequencies, are those of the model's code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from knn_ssd.errors import ModelError
from knn_ssd.io import write_whole
from knn_ssd.kernels.gguf_rows import KIND_OF, QuantisedEmbedding, QuantisedLinear
from knn_ssd.loading.files import TYPES_FILE, block_types, raised_as

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_WEIGHTS_FILE = "model.safetensors"
_FLOATS = {"F32", "F16", "BF16"}


def can_stay(types: set[str]) -> bool:
    """Whether the kernels compute from matrices of these GGUF types as they are, and some are quantised."""
    return types <= {*KIND_OF, "F32"} and not types <= _FLOATS


def write_types(directory: Path, types: dict[str, str]) -> None:
    """Writes the GGUF type of each weight that is stored as the bytes of its rows, by its name in the model."""
    write_whole(directory / TYPES_FILE, json.dumps(types, indent=0))


def load_blocks(directory: Path, config: PreTrainedConfig, remedy: str) -> PreTrainedModel:
    """Loads such a model in eval mode and without gradients.

    Args:
        directory: the directory of the converted file.
        config: its config.
        remedy: the remedy for damaged files in error messages.

    Raises:
        ModelError: the files are not those that a conversion writes.
    """
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with raised_as(ModelError, f"the weights in '{directory}' cannot be loaded", remedy):
        for name, quantisation in block_types(directory).items():
            _replace(model, name.removesuffix(".weight"), quantisation)
        _put_in(model, load_file(directory / _WEIGHTS_FILE))
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def _replace(model: PreTrainedModel, name: str, quantisation: str) -> None:
    """Puts a layer for a GGUF file's rows in the place of another."""
    layer: Any = model.get_submodule(name)
    kind: Any = QuantisedEmbedding if isinstance(layer, nn.Embedding) else QuantisedLinear
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, kind(layer, quantisation))


def _put_in(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Puts all weights into a model; a head without one has that of the embedding."""
    embedding: Any = model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    head = names[model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    is_tied = f"{head}.weight" not in tensors
    if is_tied and isinstance(embedding, QuantisedEmbedding):
        _replace(model, head, embedding.quantisation)
    if is_tied:
        tensors[f"{head}.weight"] = tensors[f"{names[embedding]}.weight"]
    model.load_state_dict(tensors, assign=True)
    if is_tied:
        model.get_submodule(head).weight = embedding.weight
