"""Writes the tensors of a GGUF file as safetensors, several at once and none longer in memory than it takes.

It does so for the architectures whose tensors differ from transformers' in name alone, in the order of their rows
(Llama), or by the 1 that llama.cpp adds to the weights of norms (Gemma). Quantised tensors are either unpacked, or
written as the bytes of their rows. Each tensor of the file must have its place in the model, and each weight of the
model its tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, ReaderTensor, dequantize, get_tensor_name_map
from transformers import PreTrainedModel

from knn_ssd.errors import ModelError, UnsupportedModelError
from knn_ssd.kernels.threads import usable_cpus
from knn_ssd.loading.gguf_file import COPY_AGAIN, Reader
from knn_ssd.loading.pretrained import first_of

USE_SAFETENSORS = "Use the model's safetensors form instead."
DIRECT_ARCHITECTURES = (*("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "stablelm", "starcoder2", "nemotron"),)
"""The architectures that this module converts; transformers converts the others."""

_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
_MOST_THREADS = 8  # each holds a tensor in float32
_ROTARY = re.compile(r"blk\.\d+\.attn_(q|k)\.")  # rows that llama.cpp orders in its own way for its rotary embedding
_NORMS_PLUS_ONE = ("gemma2", "gemma3", "nemotron")  # transformers' norms of these add the 1 themselves
_ROPE_FACTORS = re.compile(r"rope_freqs\.weight")  # these are in the config


def write_weights(
    readers: Sequence[Reader],
    architecture: str,
    model: PreTrainedModel,
    file: Path,
    name: str,
    advance: Callable[[int], None],
    as_blocks: bool,
) -> dict[str, str]:
    """Writes all weights of a model.

    Args:
        readers: the parts of the GGUF file.
        architecture: llama.cpp's name of it, one of `DIRECT_ARCHITECTURES`.
        model: the model without its weights, on the `meta` device; its dtype is that of the file.
        file: the safetensors file to write.
        name: the GGUF file's name in error messages.
        advance: receives the number of bytes read, after each tensor.
        as_blocks: whether every weight stays as it is in the file, also if it is quantised.

    Returns:
        The GGUF type of each weight that is written as the bytes of its rows.

    Raises:
        ModelError: a weight is missing or has another shape.
        UnsupportedModelError: the file has a tensor that the model has no place for.
    """
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    config: Any = model.config
    weights = _weights(model, architecture, tensors)
    _check_complete(weights, tensors, model, name)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads} if architecture == "llama" else {}
    dtypes = {ours: _dtype(tensors[theirs]) if as_blocks else model.dtype for ours, (theirs, _) in weights.items()}
    header, offsets = _layout(
        {ours: (dtypes[ours], _shape(tensors[weights[ours][0]], dtypes[ours])) for ours in sorted(weights)}
    )
    with file.open("wb") as output, ThreadPoolExecutor(min(_MOST_THREADS, usable_cpus())) as threads:
        output.write(header)
        one_at_a_time = Lock()

        def write(ours: str) -> int:
            tensor = tensors[weights[ours][0]]
            match = _ROTARY.match(tensor.name)
            added = 1.0 if architecture in _NORMS_PLUS_ONE and tensor.name.endswith("norm.weight") else 0.0
            values = _values(tensor, dtypes[ours], heads.get(match[1]) if match else None, added)
            with one_at_a_time:
                output.seek(len(header) + offsets[ours])
                output.write(values.reshape(-1).view(torch.uint8).numpy().tobytes())
            return int(tensor.n_bytes)

        largest_first = sorted(weights, key=lambda ours: -weights[ours][1].numel())
        for bytes_read in threads.map(write, largest_first):
            advance(bytes_read)
    types = {ours: tensors[theirs].tensor_type.name for ours, (theirs, _) in weights.items()}
    return {ours: types[ours] for ours in sorted(weights) if dtypes[ours] is torch.uint8}


def _weights(
    model: PreTrainedModel, architecture: str, tensors: Mapping[str, ReaderTensor]
) -> dict[str, tuple[str, torch.Tensor]]:
    """The GGUF name and the shape of each weight, by its name in the model; without a head that is the embedding."""
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    weights = {}
    for ours, weight in model.state_dict().items():
        stem, _, suffix = ours.rpartition(".")
        weights[ours] = (f"{names.get_name(stem)}.{suffix}", weight)
    if getattr(model.config, "tie_word_embeddings", False) and "output.weight" not in tensors:
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        del weights[next(f"{name}.weight" for name, module in model.named_modules() if module is head)]
    return weights


def _check_complete(
    weights: Mapping[str, tuple[str, torch.Tensor]],
    tensors: Mapping[str, ReaderTensor],
    model: PreTrainedModel,
    name: str,
) -> None:
    if absent := sorted(ours for ours, (theirs, _) in weights.items() if theirs not in tensors):
        raise ModelError(f"the weights of '{name}' lack {first_of(absent)}", COPY_AGAIN)
    known = {theirs for theirs, _ in weights.values()}
    if unknown := [each for each in tensors if each not in known and not _ROPE_FACTORS.fullmatch(each)]:
        raise UnsupportedModelError(
            f"'{name}' has the tensor {first_of(unknown)}, for which {type(model).__name__} has no place",
            USE_SAFETENSORS,
        )
    shapes = {ours: tuple(reversed(tensors[theirs].shape)) for ours, (theirs, _) in weights.items()}
    if misfits := sorted(ours for ours, (_, weight) in weights.items() if tuple(weight.shape) != shapes[ours]):
        raise ModelError(f"the weights of '{name}' do not fit its config in {first_of(misfits)}", COPY_AGAIN)


def _dtype(tensor: ReaderTensor) -> torch.dtype:
    """The dtype that holds a tensor as it is in the file: that of bytes for the rows of matrices, unless in float32."""
    return torch.float32 if len(tensor.shape) < 2 or tensor.tensor_type.name == "F32" else torch.uint8


def _shape(tensor: ReaderTensor, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of a tensor's values, or of the bytes of its rows."""
    shape = tensor.data.view(np.uint8).shape if dtype is torch.uint8 else reversed(tensor.shape)
    return tuple(int(size) for size in shape)


def _layout(weights: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where each weight begins after it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, (dtype, shape) in weights.items():
        offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
        place = [offsets[name], end]
        entries[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": place}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _values(tensor: ReaderTensor, dtype: torch.dtype, heads: int | None, added: float) -> torch.Tensor:
    """A tensor's values less what llama.cpp has added to them, or the bytes of its rows; with the rows in transformers'
    order if it has rotary `heads`.
    """
    if dtype is torch.uint8:
        values = torch.tensor(tensor.data.view(np.uint8))
    else:
        values = (torch.tensor(dequantize(tensor.data, tensor.tensor_type)) - added).to(dtype)
    if heads is not None:
        rows = values.shape[0]
        values = values.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(values.shape)
    return values.contiguous()
