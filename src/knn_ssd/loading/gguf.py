"""Converts a GGUF file, once and atomically, to a directory that transformers loads.

transformers reads the tensors and the metadata. This module turns quantised blocks into plain numbers, corrects what
transformers gets wrong (the pre-tokenizer, the ids that end a reply), and warns of what it leaves out. The directory is
then loaded by `resolve.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from gguf import GGUFReader
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoTokenizer

from knn_ssd.errors import ModelError, OutputError, UnsupportedModelError
from knn_ssd.io import atomic_directory, remove_stale
from knn_ssd.loading.files import raised_as, reason
from knn_ssd.loading.pretrained import check_causal, load_complete, quiet_transformers
from knn_ssd.progress import ProgressBars

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Increased whenever conversion gives another result than before, so that old results are not used again.
_CONVERSION_VERSION = 1

_COPY_AGAIN = "Download or copy the file again."
_USE_SAFETENSORS = "Use the model's safetensors form instead."

# Values of `tokenizer.ggml.pre` by how they split text before byte-pair merging (llama.cpp, src/llama-vocab.cpp).
_DIGITS_FIRST = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_LIKE_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "mellum"})


@dataclass(frozen=True, slots=True)
class _Facts:
    """The facts in a GGUF file that transformers does not carry over."""

    dtype: torch.dtype  # of the converted weights; quantised blocks become bfloat16
    splitting: str | None  # the name of the pre-tokenizer
    end_ids: tuple[int, ...]  # ids that end a reply: end of sequence, of turn, of message
    context_length: int | None
    has_vocabulary: bool
    values: int  # number of values in all tensors
    scaling: str | None  # the RoPE scaling, if any


def converted(gguf: Path, cache: Path) -> Path:
    """The directory of a converted GGUF file in the cache. Converts the file the first time.

    Raises:
        ModelError: the file cannot be read, or transformers does not know its model.
        OutputError: the cache cannot be written.
    """
    target = _target(gguf, cache)
    if os.path.isdir(target):
        return target
    remove_stale(target.parent)
    try:
        with atomic_directory(target) as directory, ProgressBars() as progress:
            _write_checkpoint(gguf, directory, lambda name: progress.stage(f"converting {gguf.name}: {name}", None))
    except (OutputError, SafetensorError) as error:
        if os.path.isdir(target):  # another process has converted it meanwhile
            return target
        raise OutputError(
            f"the converted model cannot be written to '{target.parent}': {reason(error.__cause__ or error)}",
            "Set KNN_SSD_CACHE to a directory that can be written and has room for it.",
        ) from error
    return target


def _target(gguf: Path, cache: Path) -> Path:
    status = gguf.stat()
    key = f"{_CONVERSION_VERSION}:{gguf.name}:{status.st_size}:{status.st_mtime_ns}"
    return cache / "converted" / f"{gguf.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _write_checkpoint(gguf: Path, directory: Path, stage: Callable[[str], None]) -> None:
    stage("reading metadata")
    facts = _read_facts(gguf)
    with quiet_transformers():
        config = _read_config(gguf)
        stage("reading the tokenizer")
        tokenizer = _read_tokenizer(gguf, facts) if facts.has_vocabulary else None
        stage("reading weights")
        model = _read_model(gguf, config, facts)
        _complete_generation_config(model, tokenizer, facts)
        _warn_of_losses(gguf, model, facts)
        stage("writing")
        model.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    # safetensors makes its files readable for their owner alone, and a cache may be shared
    for file in directory.glob("*.safetensors"):
        shutil.copymode(directory / "config.json", file)


# ---- Reading


def _read_facts(gguf: Path) -> _Facts:
    with raised_as(ModelError, f"'{gguf}' cannot be read as GGUF", _COPY_AGAIN):
        reader = GGUFReader(gguf)
        architecture = _text(reader, "general.architecture")
        ends = [_number(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        return _Facts(
            dtype=_stored_dtype({tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}),
            splitting=_text(reader, "tokenizer.ggml.pre"),
            end_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
            context_length=_number(reader, f"{architecture}.context_length"),
            has_vocabulary="tokenizer.ggml.tokens" in reader.fields,
            values=sum(int(tensor.n_elements) for tensor in reader.tensors),
            scaling=_text(reader, f"{architecture}.rope.scaling.type"),
        )


def _stored_dtype(types: set[str]) -> torch.dtype:
    if types == {"F32"}:
        return torch.float32
    return torch.float16 if types <= {"F32", "F16"} else torch.bfloat16


def _text(reader: GGUFReader, key: str) -> str | None:
    field = reader.fields.get(key)
    return None if field is None else bytes(field.parts[field.data[0]]).decode("utf-8")


def _number(reader: GGUFReader, key: str) -> int | None:
    field = reader.fields.get(key)
    return None if field is None else int(field.parts[field.data[0]][0])


def _read_config(gguf: Path) -> PreTrainedConfig:
    fact = f"transformers {transformers.__version__} cannot build the model in '{gguf}'"
    with raised_as(UnsupportedModelError, fact, _USE_SAFETENSORS):
        config: PreTrainedConfig = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    check_causal(config, str(gguf))
    return config


def _read_tokenizer(gguf: Path, facts: _Facts) -> PreTrainedTokenizerBase:
    with raised_as(ModelError, f"transformers cannot read the tokenizer in '{gguf}'", _USE_SAFETENSORS):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _correct_splitting(tokenizer, facts.splitting)
    if tokenizer.eos_token_id is None and facts.end_ids:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(facts.end_ids[0])
    if facts.context_length is not None:
        tokenizer.model_max_length = facts.context_length
    return tokenizer


def _read_model(gguf: Path, config: PreTrainedConfig, facts: _Facts) -> PreTrainedModel:
    options: dict[str, Any] = {"gguf_file": gguf.name, "config": config, "dtype": facts.dtype}
    # Without it, newer versions keep some architectures' weights quantised and compute from those.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet_reader():
        model = load_complete(gguf.parent, str(gguf), _COPY_AGAIN, **options)
    # What is left of the quantisation would make `save_pretrained` refuse.
    vars(model).update(hf_quantizer=None, is_quantized=False)
    vars(model.config).pop("quantization_config", None)
    return model


@contextmanager
def _quiet_reader() -> Iterator[None]:
    """Hides the progress bar of the tensor reader, which none of transformers' switches turns off."""
    try:
        reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        bar = reader.tqdm
    except (ImportError, AttributeError):
        yield
        return
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar


# ---- Correcting


def _correct_splitting(tokenizer: PreTrainedTokenizerBase, splitting: str | None) -> None:
    """Sets the pre-tokenizer that the vocabulary was trained with, where transformers falls back on GPT-2's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    if splitting in _DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    elif splitting is not None and splitting not in _LIKE_GPT2:
        logger.warning(
            "the GGUF file has the pre-tokenizer '%s', which is not known here: GPT-2's is used and some "
            "text will be tokenized otherwise than in training",
            splitting,
        )


def _complete_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, facts: _Facts
) -> None:
    """Adds all ids that end a reply, and the padding id, to the generation config."""
    generation = model.generation_config
    if generation is None:
        return
    stated = generation.eos_token_id
    ends = list(stated) if isinstance(stated, (list, tuple)) else [stated]
    ends += [*facts.end_ids, tokenizer.eos_token_id if tokenizer is not None else None]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    generation.eos_token_id = ends[0] if len(ends) == 1 else (ends or None)
    if generation.pad_token_id is None and tokenizer is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    # Otherwise `generate` may derive it from the model's config again and lose what was added here.
    generation._from_model_config = False


def _warn_of_losses(gguf: Path, model: PreTrainedModel, facts: _Facts) -> None:
    """Warns of what transformers leaves out in silence: biases, scaling factors of long contexts."""
    missing = facts.values - sum(parameter.numel() for parameter in model.parameters())
    if missing > 0:
        logger.warning("%d of %d values in %s were left out by transformers", missing, facts.values, gguf)
    rope = getattr(model.config, "rope_parameters", None) or {}
    if facts.scaling not in (None, "none") and rope.get("rope_type", "default") == "default":
        logger.warning("the position scaling '%s' of %s was left out by transformers", facts.scaling, gguf)
