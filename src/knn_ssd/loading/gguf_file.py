"""Reads GGUF files: the parts of a split one, its metadata, and a hash of its content.

This module knows the file format's words. It knows nothing of transformers' models or of the cache's layout.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader

from knn_ssd.errors import ModelError, OutputError
from knn_ssd.io import write_whole
from knn_ssd.loading.files import raised_as

COPY_AGAIN = "Download or copy the file again."

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class GGUFFacts:
    """What a GGUF file states, and transformers does not carry over in full.

    Args:
        architecture: llama.cpp's name of it.
        dtype: the dtype of the converted weights; quantised blocks become bfloat16.
        splitting: the name of the pre-tokenizer.
        end_ids: ids that end a reply: end of sequence, of turn, of message.
        context_length: in tokens.
        has_vocabulary: whether there is a tokenizer.
        numbers: the numbers of the architecture, by the names after its own, such as `attention.key_length`.
        scaling: the kind of position scaling, if any.
        rope_factors: what each rotary frequency is divided by, if the file says so by a tensor.
        types: the GGUF types of its matrices.
        values: the number of values in all tensors, by tensor, without `rope_factors`.
    """

    architecture: str
    dtype: torch.dtype
    splitting: str | None
    end_ids: tuple[int, ...]
    context_length: int | None
    has_vocabulary: bool
    numbers: dict[str, float]
    scaling: str | None
    rope_factors: tuple[float, ...]
    types: set[str]
    values: dict[str, int]


class Reader(GGUFReader):
    """A reader that is twice as fast with large vocabularies: slices of a `memmap` are slow to make."""

    def _get(self, *args: Any, **options: Any) -> Any:
        self.data: Any = np.asarray(self.data)
        return super()._get(*args, **options)


def parts_of(gguf: Path) -> list[Path]:
    """The files of a model of which one is named: all parts of a split one, in order, else the file itself.

    Raises:
        ModelError: a part is missing.
    """
    if not (match := _PART.fullmatch(gguf.name)):
        return [gguf]
    count = int(match["count"])
    names = [f"{match['stem']}-{number:05}-of-{count:05}{gguf.suffix}" for number in range(1, count + 1)]
    parts = [gguf.with_name(name) for name in names]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(
            f"'{gguf}' is one of {count} parts of a model, and {', '.join(missing)} is not beside it",
            "Download or copy all parts into one directory, and name any of them.",
        )
    return parts


def stem_of(gguf: Path) -> str:
    """The name of a GGUF file without its number and suffix."""
    match = _PART.fullmatch(gguf.name)
    return match["stem"] if match else gguf.stem


def open_parts(parts: Sequence[Path]) -> list[Reader]:
    """Reads the metadata of all parts.

    Raises:
        ModelError: a file is no GGUF file, or not a whole one.
    """
    readers = []
    for part in parts:
        with raised_as(ModelError, f"'{part}' cannot be read as GGUF", COPY_AGAIN):
            readers.append(Reader(part))
    return readers


def read_facts(readers: Sequence[Reader], name: str) -> GGUFFacts:
    """What the metadata of a file's parts states; that of a split file is in its first part."""
    with raised_as(ModelError, f"'{name}' cannot be read as GGUF", COPY_AGAIN):
        first, tensors = readers[0], [tensor for reader in readers for tensor in reader.tensors]
        architecture = _text(first, "general.architecture") or ""
        ends = [_number(first, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        length = _number(first, f"{architecture}.context_length")
        factors = next((tensor.data for tensor in tensors if tensor.name == _ROPE_FACTORS), ())
        types = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
        return GGUFFacts(
            architecture=architecture,
            dtype=stored_dtype(types),
            splitting=_text(first, "tokenizer.ggml.pre"),
            end_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
            context_length=None if length is None else int(length),
            has_vocabulary="tokenizer.ggml.tokens" in first.fields,
            numbers=_numbers(first, f"{architecture}."),
            scaling=_text(first, f"{architecture}.rope.scaling.type"),
            rope_factors=tuple(float(factor) for factor in factors),
            types=types,
            values={tensor.name: int(tensor.n_elements) for tensor in tensors if tensor.name != _ROPE_FACTORS},
        )


def stored_dtype(types: set[str]) -> torch.dtype:
    """The dtype that holds values of these GGUF types; bfloat16 for blocks."""
    if types == {"F32"}:
        return torch.float32
    return torch.float16 if types <= {"F32", "F16"} else torch.bfloat16


def _text(reader: Reader, key: str) -> str | None:
    field = reader.fields.get(key)
    return None if field is None else bytes(field.parts[field.data[0]]).decode("utf-8")


def _number(reader: Reader, key: str) -> float | None:
    field = reader.fields.get(key)
    return None if field is None else float(field.parts[field.data[0]][0])


def _numbers(reader: Reader, prefix: str) -> dict[str, float]:
    """All metadata below a prefix that is one number."""
    return {
        name.removeprefix(prefix): float(field.parts[field.data[0]][0])
        for name, field in reader.fields.items()
        if name.startswith(prefix) and field.types[0].name not in ("STRING", "ARRAY")
    }


def content_hash(parts: Sequence[Path], cache: Path) -> str:
    """A hash of the content of files.

    It is computed once for each file and kept in the cache beside the file's size, times and inode.

    Raises:
        ModelError: a file cannot be read.
    """
    known_file, known = cache / "gguf-hashes.json", {}
    with suppress(OSError, ValueError):
        known = dict(json.loads(known_file.read_text("utf-8")))
    hashes, before = [], len(known)
    for part in parts:
        with raised_as(ModelError, f"'{part}' cannot be read as GGUF", COPY_AGAIN):
            status = part.stat()
            times = f"{status.st_mtime_ns}:{status.st_ctime_ns}"
            key = f"{part.resolve()}:{status.st_size}:{times}:{status.st_dev}:{status.st_ino}"
            if key not in known:
                with part.open("rb") as file:
                    known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            hashes.append(known[key])
    if len(known) > before:
        with suppress(OutputError):  # then it is computed again
            write_whole(known_file, json.dumps(known))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
