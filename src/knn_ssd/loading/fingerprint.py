"""Identifies a model by samples of all its weights and by its vocabulary."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from knn_ssd.errors import ModelError
from knn_ssd.loading.files import block_types, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from knn_ssd.kernels.gguf_rows import GGUFRows

_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")
_NOT_LOADED = ".rotary_emb.inv_freq"  # some old checkpoints store it, and transformers computes it instead
_SAMPLES = 1024  # of each weight; fine-tuning changes all values, so a few are enough


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identifies the model that an atlas or an answer store belongs to.

    Args:
        architecture: the name of the model's class.
        num_layers, hidden_size, vocab_size: the model's sizes.
        weights_hash: a hash of samples of every weight, taken in bfloat16 so that it is the same in any dtype.
        tokenizer_hash: a hash of the vocabulary; empty where there is no tokenizer.
        dtype: the dtype in which the model was loaded, or its GGUF types. It is not compared.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    weights_hash: str
    tokenizer_hash: str
    dtype: str

    def differences(self, other: Fingerprint, holder: str = "the atlas") -> tuple[str, ...]:
        """The differences to another fingerprint, as sentences; empty if both are of the same model.

        Args:
            other: the fingerprint of the model at hand.
            holder: what has this fingerprint, in the sentences.
        """
        names = [f.name for f in fields(self) if f.name != "dtype"]
        pairs = [(name.replace("_", " "), getattr(other, name), getattr(self, name)) for name in names]
        return tuple(f"{n} is {its or 'none'}, {holder} has {own or 'none'}" for n, its, own in pairs if its != own)


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Fingerprint:
    """The fingerprint of a loaded model."""
    from knn_ssd.kernels.gguf_rows import dtype_name, weights_of

    return _fingerprint(type(model).__name__, model.config, dtype_name(model), weights_of(model), tokenizer)


def fingerprint_of_checkpoint(
    directory: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Fingerprint:
    """The fingerprint of the model that transformers would load from a directory, without loading it.

    Args:
        directory: the directory of a checkpoint with safetensors files.
        config: the checkpoint's configuration.
        tokenizer: the checkpoint's tokenizer.

    Raises:
        ModelError: the directory has no safetensors weights, or weights in another dtype than those of a fingerprint.
    """
    weights = _mapped_weights(directory, bool(getattr(config.get_text_config(), "tie_word_embeddings", False)))
    return _fingerprint((config.architectures or [""])[0], config, config.dtype, weights, tokenizer)


def identify_weights(model: PreTrainedModel, directory: Path) -> str:
    """Identifies the weights of a model as it was loaded from a directory, for what this machine keeps of them.

    Whatever changes a weight or a setting changes the text: it has each file's size, times and place on the disk, and
    samples of the loaded weights. Two copies of one model differ, which costs a place in the cache and nothing else.

    Args:
        model: the model as loaded, in the dtype that it is used in.
        directory: the directory of its files.
    """
    from knn_ssd.kernels.gguf_rows import weights_of

    parts = [type(model).__name__, str(model.dtype), _weights_hash(weights_of(model))]
    for file in (directory / "config.json", *weight_files(directory)):
        status = file.stat()
        parts.append(f"{file.name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}")
    return "\n".join(parts)


def _fingerprint(
    architecture: str,
    config: PreTrainedConfig,
    dtype: torch.dtype | str | None,
    weights: Mapping[str, torch.Tensor | GGUFRows],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Fingerprint:
    sizes = config.get_text_config()
    return Fingerprint(
        architecture=architecture,
        num_layers=int(sizes.num_hidden_layers),
        hidden_size=int(sizes.hidden_size),
        vocab_size=int(sizes.vocab_size),
        weights_hash=_weights_hash(weights),
        tokenizer_hash=hash_of_vocabulary(tokenizer),
        dtype=str(dtype).removeprefix("torch."),
    )


def _weights_hash(weights: Mapping[str, torch.Tensor | GGUFRows]) -> str:
    import torch

    from knn_ssd.kernels.gguf_rows import GGUFRows

    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        size = math.prod(weight.shape)
        step = max(1, size // _SAMPLES)
        values = (
            weight.at(torch.arange(0, size, step))
            if isinstance(weight, GGUFRows)
            else weight.detach().flatten()[::step]
        )
        sample = values.to("cpu", torch.bfloat16)  # the same from float32 and bfloat16, and from quantised blocks
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _mapped_weights(directory: Path, tied: bool) -> dict[str, torch.Tensor | GGUFRows]:
    """The weights in a directory, memory-mapped: only the sampled parts are read from the disk."""
    from safetensors import safe_open

    from knn_ssd.kernels.gguf_rows import GGUFRows

    types = block_types(directory)
    weights: dict[str, torch.Tensor | GGUFRows] = {}
    for file in weight_files(directory):
        if file.suffix != ".safetensors":
            break
        with safe_open(file, framework="pt") as stored:
            names = [name for name in stored.keys() if not name.endswith(_NOT_LOADED)]  # noqa: SIM118 - no dictionary
            for name in names:
                tensor = stored.get_tensor(name)
                weights[name] = GGUFRows.of(tensor, types[name]) if name in types else tensor
    if not weights:
        raise ModelError(f"'{directory}' has no weights as safetensors", "Convert them, or give another directory.")
    floats = (weight for weight in weights.values() if not isinstance(weight, GGUFRows))
    unknown = [name for weight in floats if (name := str(weight.dtype)) not in _DTYPES]
    if unknown:
        raise ModelError(f"'{directory}' has weights in {unknown[0]}, and {', '.join(_DTYPES)} are known")
    embeddings = weights.get("model.embed_tokens.weight")
    return weights | {"lm_head.weight": embeddings} if tied and embeddings is not None else weights


def hash_of_vocabulary(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Identifies a tokenizer by its vocabulary; empty where there is none."""
    if tokenizer is None:
        return ""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:32]
