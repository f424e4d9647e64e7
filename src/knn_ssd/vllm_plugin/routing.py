"""Prompt vectors from hidden states that arrive chunk by chunk, and the check that the atlas belongs to the model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from knn_ssd.atlas import Atlas
from knn_ssd.backends.base import Pooling
from knn_ssd.errors import ModelError

_log = logging.getLogger("vllm.knn_ssd")


@dataclass
class PromptVector:
    """Collects the prompt vector of one request over a chunked prefill.

    Args:
        pooling: the atlas's pooling.
        length: length of the prompt in tokens.
    """

    pooling: Pooling
    length: int
    _sum: torch.Tensor | None = None  # (D,)
    _seen: int = 0

    def add(self, hidden: torch.Tensor, start: int) -> torch.Tensor | None:
        """Adds a chunk, and returns the prompt vector (D,) once the prompt is complete; None before.

        Args:
            hidden: (n, D) hidden states after the final norm, of consecutive tokens; some may follow the prompt.
            start: the position of the first of them. A preempted request starts again at 0.
        """
        own = hidden[: max(self.length - start, 0)].float()
        complete = start + len(own) == self.length and len(own) > 0
        if self.pooling is Pooling.LAST:
            return own[-1] if complete else None
        if start != self._seen:
            self._sum, self._seen = None, 0
        if start == self._seen and len(own):
            self._sum = own.sum(dim=0) + (0 if self._sum is None else self._sum)
            self._seen += len(own)
        return self._sum / self.length if complete and self._sum is not None and self._seen == self.length else None


def check_model(atlas: Atlas, model_config: Any) -> None:
    """Raises an `AtlasMismatchError` if the atlas belongs to another model than vLLM runs.

    Weights that are not on this machine's disk as safetensors cannot be compared; a warning is logged then.
    """
    from transformers import AutoTokenizer

    from knn_ssd.loading.fingerprint import fingerprint_of_checkpoint
    from knn_ssd.loading.resolve import model_dir

    directory = model_dir(model_config.model)
    try:
        if directory is None:
            raise ModelError(f"'{model_config.model}' is not on this machine's disk")
        tokenizer = AutoTokenizer.from_pretrained(model_config.tokenizer)
        found = fingerprint_of_checkpoint(Path(directory), model_config.hf_config, tokenizer)
    except (ModelError, OSError) as error:
        _log.warning("Whether the atlas belongs to this model was not checked: %s", error)
        return
    atlas.check(found)
