"""Converts a GGUF file, once and atomically, to a directory that transformers loads.

transformers reads the metadata, and the tensors of the architectures that `gguf_weights.py` does not convert. This
module corrects what transformers gets wrong (the pre-tokenizer, the ids that end a reply), carries over what it leaves
out (position scaling), and refuses a file of which something would be lost. The directory is then loaded by
`resolve.py`.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from knn_ssd.errors import ModelError, OutputError, UnsupportedModelError
from knn_ssd.io import atomic_directory, remove_stale
from knn_ssd.kernels.gguf_rows import KIND_OF
from knn_ssd.loading.files import raised_as, reason
from knn_ssd.loading.gguf_blocks import can_stay, write_types
from knn_ssd.loading.gguf_config import complete_config, refuse_foreign, refuse_losses
from knn_ssd.loading.gguf_file import (
    COPY_AGAIN,
    GGUFFacts,
    Reader,
    content_hash,
    open_parts,
    parts_of,
    read_facts,
    stem_of,
)
from knn_ssd.loading.gguf_weights import DIRECT_ARCHITECTURES, USE_SAFETENSORS, write_weights
from knn_ssd.loading.pretrained import check_causal, load_complete, quiet_transformers
from knn_ssd.progress import ProgressBars
from knn_ssd.tools.memory import size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Increased whenever conversion gives another result than before, so that old results are not used again.
_CONVERSION_VERSION = 3
_BLOCKS = "-blocks"  # the end of a directory's name; it has nothing but this file if the blocks cannot stay:
_UNPACKED = "unpacked.txt"

# Values of `tokenizer.ggml.pre` by how they split text before byte-pair merging (llama.cpp, src/llama-vocab.cpp).
_DIGITS_FIRST = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_LIKE_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "mellum"})

_READING = threading.Lock()


class Stage(Protocol):
    """Receives what a conversion does now, and how many bytes of the file were read for it."""

    def __call__(self, note: str, num_bytes: int = 0, /) -> None: ...


def converted(gguf: Path, cache: Path, as_blocks: bool = False) -> Path:
    """The directory of a converted GGUF file in the cache, by its content. Converts the file the first time.

    Args:
        gguf: a GGUF file, or any part of a split one.
        cache: the cache directory.
        as_blocks: whether quantised blocks stay as they are, for `load_blocks`, where the kernels compute from them.
            A warning says so if they do not, and what that costs.

    Raises:
        ModelError: the file cannot be read, transformers does not know its model, or part of it would be lost.
        OutputError: the cache cannot be written.
    """
    parts = parts_of(gguf)
    key = f"v{_CONVERSION_VERSION}-{content_hash(parts, cache)[:12]}"
    target = cache / "converted" / f"{stem_of(gguf)}-{key}"
    if as_blocks:
        blocks = _convert(parts, target.with_name(target.name + _BLOCKS), as_blocks=True)
        if not (blocks / _UNPACKED).is_file():
            return blocks
    return _convert(parts, target, as_blocks=False)


def _convert(parts: Sequence[Path], target: Path, as_blocks: bool) -> Path:
    """Converts a file of some parts to a directory, unless it is there."""
    if os.path.isdir(target):
        return target
    remove_stale(target.parent)
    gguf = parts[0]
    try:
        with atomic_directory(target) as directory, ProgressBars(in_bytes=True) as progress:
            doing = "reading" if as_blocks else "converting"
            progress.stage(f"{doing} {gguf.name}", sum(map(_size, parts)))
            _write_checkpoint(gguf, directory, lambda note, num_bytes=0: progress.advance(note, num_bytes), as_blocks)
    except (OutputError, SafetensorError) as error:
        if os.path.isdir(target):  # another process has converted it meanwhile
            return target
        raise OutputError(
            f"the converted model cannot be written to '{target.parent}': {reason(error.__cause__ or error)}",
            "Set KNN_SSD_CACHE to a directory that can be written and has room for it.",
        ) from error
    return target


def _write_checkpoint(gguf: Path, directory: Path, stage: Stage, as_blocks: bool) -> None:
    stage("reading metadata")
    readers = open_parts(parts_of(gguf))
    facts = read_facts(readers, str(gguf))
    if as_blocks and not (can_stay(facts.types) and facts.architecture in DIRECT_ARCHITECTURES):
        (directory / _UNPACKED).write_text(_report_unpacking(gguf, facts, sum(map(_size, parts_of(gguf)))), "utf-8")
        return
    with quiet_transformers():
        with _shared_reader(readers[0]):
            config = _read_config(gguf)
            stage("reading the tokenizer")
            tokenizer = _read_tokenizer(gguf, facts) if facts.has_vocabulary else None
        refuse_foreign(gguf, facts)
        complete_config(gguf, config, facts)
        stage("converting weights")
        if facts.architecture in DIRECT_ARCHITECTURES:
            model = _write_directly(gguf, readers, directory, config, facts, stage, as_blocks)
        else:
            model = _read_model(gguf, readers, config, facts)
            refuse_losses(gguf, model, facts)
        _complete_generation_config(model, tokenizer, facts)
        _save(model, directory, facts)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    # safetensors makes its files readable for their owner alone, and a cache may be shared
    for file in directory.glob("*.safetensors"):
        shutil.copymode(directory / "config.json", file)


def _size(file: Path) -> int:
    return file.stat().st_size


def _report_unpacking(gguf: Path, facts: GGUFFacts, file_bytes: int) -> str:
    """Warns that the blocks of a file are unpacked, if it has some, and returns the warning."""
    quantised = sorted(facts.types - {"F32", "F16", "BF16"})
    if not quantised:
        return ""
    unpacked = size(sum(facts.values.values()) * facts.dtype.itemsize)
    name = str(facts.dtype).removeprefix("torch.")
    text = (
        f"'{gguf.name}' ({facts.architecture}, {', '.join(quantised)}) is unpacked to {name}, which also rounds its "
        f"weights: {size(file_bytes)} become {unpacked}. {', '.join(KIND_OF)} stay as they are in files of "
        f"{', '.join(DIRECT_ARCHITECTURES)}."
    )
    logger.warning("%s", text)
    return text


def _save(model: PreTrainedModel, directory: Path, facts: GGUFFacts) -> None:
    if facts.architecture not in DIRECT_ARCHITECTURES:
        model.save_pretrained(directory)
        return
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


# ---- Reading


@contextmanager
def _shared_reader(reader: Reader) -> Iterator[None]:
    """Gives transformers the reader at hand: it would read the metadata again for the config and the tokenizer, which
    is most of a small conversion's time.
    """
    package: Any = importlib.import_module("gguf")
    with _READING:
        original = package.GGUFReader
        package.GGUFReader = lambda *_, **__: reader
        try:
            yield
        finally:
            package.GGUFReader = original


def _read_config(gguf: Path) -> PreTrainedConfig:
    fact = f"transformers {transformers.__version__} cannot build the model in '{gguf}'"
    with raised_as(UnsupportedModelError, fact, USE_SAFETENSORS):
        config: PreTrainedConfig = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    check_causal(config, str(gguf))
    return config


def _read_tokenizer(gguf: Path, facts: GGUFFacts) -> PreTrainedTokenizerBase:
    with raised_as(ModelError, f"transformers cannot read the tokenizer in '{gguf}'", USE_SAFETENSORS):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _correct_splitting(tokenizer, facts.splitting)
    if facts.end_ids and tokenizer.eos_token_id != facts.end_ids[0]:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(facts.end_ids[0])
    if facts.context_length is not None:
        tokenizer.model_max_length = facts.context_length
    return tokenizer


def _write_directly(
    gguf: Path,
    readers: Sequence[Reader],
    directory: Path,
    config: PreTrainedConfig,
    facts: GGUFFacts,
    stage: Stage,
    as_blocks: bool,
) -> PreTrainedModel:
    """Writes the weights, and returns the model without them."""
    dtype = torch.float32 if as_blocks else facts.dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    types = write_weights(
        readers,
        facts.architecture,
        model,
        directory / "model.safetensors",
        str(gguf),
        lambda num_bytes: stage("converting weights", num_bytes),
        as_blocks,
    )
    if as_blocks:
        write_types(directory, types)
    return model


def _read_model(gguf: Path, readers: Sequence[Reader], config: PreTrainedConfig, facts: GGUFFacts) -> PreTrainedModel:
    if len(readers) > 1:
        raise UnsupportedModelError(
            f"'{gguf}' is one of {len(readers)} parts of an architecture whose parts are not joined "
            f"({facts.architecture})",
            "Join them with llama.cpp's `llama-gguf-split --merge`.",
        )
    options: dict[str, Any] = {"gguf_file": gguf.name, "config": config, "dtype": facts.dtype}
    # Without it, newer versions keep some architectures' weights quantised and compute from those.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet_reader(), _shared_reader(readers[0]):
        model = load_complete(gguf.parent, str(gguf), COPY_AGAIN, **options)
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, facts: GGUFFacts
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
