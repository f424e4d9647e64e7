"""Tells one model from another by samples of all its weights and by its vocabulary."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from knn_ssd.atlas import Fingerprint

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


def _weights_hash(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLES)].to("cpu", torch.bfloat16)  # the same from float32 and bfloat16
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return ""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:32]
