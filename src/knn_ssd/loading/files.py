"""Finds and reads the configuration and weights of a checkpoint in a directory, as transformers does, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knn_ssd.errors import KnnSsdError, ModelError
from knn_ssd.io import cache_directory

WEIGHTS = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""The forms of weights in the order in which transformers looks for them: a single file, or the index of several."""


_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model*",
    "vocab.*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "tokenizer.bin",
)


TYPES_FILE = "gguf_blocks.json"  # of a converted GGUF file whose matrices are stored as the bytes of their rows


def has_blocks(directory: Path) -> bool:
    """Whether a directory holds the quantised blocks of a GGUF file."""
    return (directory / TYPES_FILE).is_file()


def block_types(directory: Path) -> dict[str, str]:
    """The GGUF type of each weight that is stored as the bytes of its rows; empty for any other directory."""
    return read_json(directory / TYPES_FILE) if has_blocks(directory) else {}


def has_vocabulary(directory: Path) -> bool:
    """Whether a directory holds a tokenizer's vocabulary, of whatever kind."""
    return any(next(directory.glob(pattern), None) for pattern in _VOCABULARIES)


def weight_files(directory: Path) -> list[Path]:
    """The weight files that transformers would load; empty if there are none."""
    for single, index in WEIGHTS:
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            shards = read_json(directory / index).get("weight_map")
            if not isinstance(shards, dict):
                raise ModelError(f"'{directory / index}' has no weight_map", how_to_restore(directory))
            return [directory / shard for shard in sorted({str(shard) for shard in shards.values()})]
    return []


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        ModelError: there is no such file, or it holds no JSON object.
    """
    directory = path.parent
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        gguf = min(directory.glob("*.gguf"), default=None)
        hint = f"It holds a GGUF file: name '{gguf}' itself."
        raise ModelError(
            f"there is no {path.name} in '{directory}'",
            hint if gguf else "Name a directory written by `save_pretrained`.",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read as JSON: {reason(error)}", how_to_restore(directory)) from error
    if not isinstance(values, dict):
        raise ModelError(f"'{path}' holds no JSON object", how_to_restore(directory))
    return values


def how_to_restore(directory: Path) -> str:
    """The remedy for a damaged directory, for error messages."""
    if directory.is_relative_to(cache_directory()):
        return f"Delete '{directory}': it will be converted again."
    return "Download or copy the model again."


@contextmanager
def raised_as(kind: type[KnnSsdError], fact: str, remedy: str) -> Iterator[None]:
    """Raises every error within a `with` block, whichever library it comes from, as a `kind` that quotes its reason."""
    try:
        yield
    except Exception as error:
        raise kind(f"{fact}: {reason(error)}", remedy) from error


def reason(error: BaseException) -> str:
    """The first sentence of another library's error, to be quoted in an error message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0].split(". ")[0] if lines else type(error).__name__).rstrip(".: ")
