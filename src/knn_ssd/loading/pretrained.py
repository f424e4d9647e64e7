"""Loads with transformers, quietly and strictly; shared by checkpoints and GGUF files.

This module knows what a decoder is and how transformers fails. It does not know where files lie. Code from a checkpoint
is never run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from knn_ssd.errors import ModelError, UnsupportedModelError
from knn_ssd.loading.files import reason
from knn_ssd.tools.memory import free_memory, size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_NOT_QUANTISED = "Name the model that is not quantised, or a GGUF file of it; or install what transformers asks for."
_SCALES = ("_scale", "_scale_inv", ".scales", ".qweight", ".qzeros", "_packed", "_zero_point", ".absmax")


_SMALLER = "Name a smaller model, a smaller dtype or another device."


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the warnings and progress bars of transformers and the Hub client."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()  # transformers switches them off together with its own
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if not hub_bars:
            disable_progress_bars()


def check_causal(config: PreTrainedConfig, name: str) -> None:
    """Raises an `UnsupportedModelError` for a model that is no decoder or has no language-model head."""
    looked_for = "Looked for a decoder-only language model (…ForCausalLM)."
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"'{name}' is an encoder-decoder ({config.model_type})", looked_for)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"'{name}' is no language model ({config.model_type})", looked_for)
    # BERT and similar models have a causal class as well, but attend in both directions by default.
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if masked and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(f"'{name}' is a bidirectional encoder ({config.model_type})", looked_for)
    heads = config.architectures or []
    known = getattr(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "__name__", "")
    if heads and not any(head == known or head.endswith(("ForCausalLM", "LMHeadModel")) for head in heads):
        raise UnsupportedModelError(f"'{name}' is a {', '.join(heads)}", looked_for)


def check_memory(files: Sequence[Path], name: str, dtype: torch.dtype | None, share: float) -> None:
    """Checks that weights fit into the memory that is free.

    Args:
        files: the weight files.
        name: the model's name in error messages.
        dtype: the dtype to load them in; None is that of the files.
        share: memory over their size in that dtype: less than 1 where they are packed, more where a copy stays.

    Raises:
        ModelError: they do not fit; the message has the arithmetic.
    """
    weights, free = sum(_size_in(dtype, file) for file in files), free_memory()
    if free is not None and share * weights > free.bytes:
        kind = "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"
        raise ModelError(
            f"'{name}' takes {size(share * weights)} of memory for {size(weights)} of weights{kind}; {free}", _SMALLER
        )


def _size_in(dtype: torch.dtype | None, file: Path) -> int:
    """Memory of the weights in a file."""
    if dtype is None or file.suffix != ".safetensors":
        return file.stat().st_size
    with safe_open(file, framework="pt") as opened:
        shapes: list[list[int]] = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    return dtype.itemsize * sum(math.prod(shape) for shape in shapes)


def load_complete(directory: Path, name: str, remedy: str, **options: Any) -> PreTrainedModel:
    """Loads a model in eval mode and without gradients.

    Args:
        directory: the directory to load from.
        name: the model's name in error messages.
        remedy: the remedy for damaged files in error messages.
        options: options of `from_pretrained`.

    Raises:
        ModelError: the weights cannot be read or are not complete; transformers would fill gaps with random weights.
    """
    _refuse_unknown_quantisation(options.get("config"), name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        if isinstance(error, ImportError):
            remedy = "Install the package it needs."
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            remedy = _SMALLER
        fact = f"the weights of '{name}' cannot be loaded"
        if method := _quantisation(options.get("config")):
            fact, remedy = f"{fact}, which are quantised by {method}", _NOT_QUANTISED
        raise ModelError(f"{fact}: {reason(error)}", remedy) from error
    model, report = loaded
    if absent := sorted(report["missing_keys"]):
        raise ModelError(f"the weights of '{name}' lack {first_of(absent)}", remedy)
    if misfits := sorted(key[0] for key in report["mismatched_keys"]):
        raise ModelError(f"the weights of '{name}' do not fit its config in {first_of(misfits)}", remedy)
    _report_unexpected(sorted(report["unexpected_keys"]), name)
    result: PreTrainedModel = model.eval().requires_grad_(False)
    return result


def _refuse_unknown_quantisation(config: PreTrainedConfig | None, name: str) -> None:
    """transformers would load such weights as if they were not quantised."""
    stated: Any = getattr(config, "quantization_config", None)
    method = _quantisation(config)
    if method and isinstance(stated, dict) and not AutoHfQuantizer.supports_quant_method(stated):  # type: ignore[no-untyped-call]
        raise UnsupportedModelError(
            f"the weights of '{name}' are quantised by {method}, which transformers does not know", _NOT_QUANTISED
        )


def _report_unexpected(names: list[str], name: str) -> None:
    """Refuses what only quantised weights have, and warns of other weights that the model's code has no place for."""
    if scales := [each for each in names if each.endswith(_SCALES)]:
        raise UnsupportedModelError(
            f"the weights of '{name}' are quantised ({first_of(scales)}), and its config does not say how",
            _NOT_QUANTISED,
        )
    if names:
        logger.warning("the weights of '%s' have %s, which the model does not use", name, first_of(names))


def _quantisation(config: PreTrainedConfig | None) -> str | None:
    """How a checkpoint's weights are quantised by its config, such as gptq, awq, bitsandbytes or fp8."""
    stated: Any = getattr(config, "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    return str(getattr(method, "value", method)) if method else None


def first_of(names: list[str]) -> str:
    """The first of some names, and how many more there are, for error messages."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
