"""Tells one model from another by samples of all its weights and by its vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from knn_ssd.atlas import Fingerprint
from knn_ssd.errors import ModelError

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NOT_LOADED = ".rotary_emb.inv_freq"  # stored by old checkpoints, and computed by their models
_SAMPLES = 1024  # of each weight: fine-tuning changes all of them, so a few tell


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Fingerprint:
    """The fingerprint of a loaded model."""
    config = model.config.get_text_config()
    return Fingerprint(
        architecture=type(model).__name__,
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        weights_hash=_weights_hash(model),
        tokenizer_hash=_tokenizer_hash(tokenizer),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def fingerprint_of_checkpoint(
    directory: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Fingerprint:
    """The fingerprint of the model that transformers would load from a directory, for those who load it otherwise.

    Args:
        directory: with its weights as safetensors.
        config: the checkpoint's.
        tokenizer: the checkpoint's.

    Raises:
        ModelError: no such weights, or in a dtype that no fingerprint is made of.
    """
    text = config.get_text_config()
    return Fingerprint(
        architecture=(config.architectures or [""])[0],
        num_layers=int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        weights_hash=_hash_of(_stored(directory, bool(getattr(text, "tie_word_embeddings", False)))),
        tokenizer_hash=_tokenizer_hash(tokenizer),
        dtype=str(config.dtype).removeprefix("torch."),
    )


def _weights_hash(model: PreTrainedModel) -> str:
    return _hash_of(model.state_dict())


def _hash_of(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLES)].to("cpu", torch.bfloat16)  # the same from float32 and bfloat16
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _stored(directory: Path, tied: bool) -> dict[str, torch.Tensor]:
    """The weights in a directory, mapped and not read: of each only what is looked at comes from the disk."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        mapped = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
        for name, entry in header.items():
            if name == "__metadata__" or name.endswith(_NOT_LOADED):
                continue
            if entry["dtype"] not in _DTYPES:
                raise ModelError(f"'{file}' has weights in {entry['dtype']}, and {', '.join(_DTYPES)} are known")
            first, last = (8 + size + offset for offset in entry["data_offsets"])
            own = mapped[first:last]
            if first % 8:  # a view of another dtype needs it
                own = own.clone()
            weights[name] = own.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    if not weights:
        raise ModelError(f"'{directory}' has no weights as safetensors", "Convert them, or give another directory.")
    embeddings = weights.get("model.embed_tokens.weight")
    return weights | {"lm_head.weight": embeddings} if tied and embeddings is not None else weights


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return ""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:32]
