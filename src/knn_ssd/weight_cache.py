"""Keeps on disk what is made of a model's weights and takes long to make, such as 4-bit copies.

What was made for one purpose is one safetensors file, which appears whole or not at all. It is read into large pages:
forward passes read weights faster from there, and reading takes less time than having the system map the file page by
page. This module does not know what the tensors mean: who loads them checks their names and shapes.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from knn_ssd.errors import UsageError
from knn_ssd.io import cache_directory, remove_stale
from knn_ssd.kernels.arena import Arena
from knn_ssd.loading.fingerprint import identify_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "KNN_SSD_WEIGHT_CACHE"
DEFAULT_LIMIT_GIB = 32.0
_SUFFIX = ".safetensors"
_KEY = "key"  # in a file's metadata
_UNREADABLE = (OSError, SafetensorError, RuntimeError, ValueError)


class WeightCache:
    """The kept tensors of one model.

    Nothing is raised for a cache that cannot be used: a warning says so in one sentence, and the caller makes the
    tensors as it does without a cache.

    Args:
        model: identifies the model's weights; other weights must have another text.
        folder: where all models' files lie; it need not exist.
        max_bytes: size of all files together; the least recently used ones are removed first.
    """

    def __init__(self, model: str, folder: Path, max_bytes: int) -> None:
        self._model, self._folder, self._max_bytes = model, folder, max_bytes
        self._has_warned = False

    @classmethod
    def of(cls, model: PreTrainedModel, directory: Path) -> WeightCache | None:
        """The cache of a loaded model in the cache directory, within the user's limit; None if that is 0.

        Args:
            model: the model as it was loaded.
            directory: the directory of its files.

        Raises:
            UsageError: $KNN_SSD_WEIGHT_CACHE is not a number of GiB.
        """
        max_bytes = int(limit_gib(os.environ) * 2**30)
        if not max_bytes:
            return None
        return cls(identify_weights(model, directory), cache_directory() / "weights", max_bytes)

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors stored under a key, in large pages; None if there are none.

        Args:
            key: what the tensors are, with everything beside the model's weights that decides their bytes.
        """
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get(_KEY) != self._full(key):
                    raise ValueError("it holds something else")
                tensors = _read(path, {name: file.get_tensor(name) for name in file.offset_keys()})
        except FileNotFoundError:
            return None
        except _UNREADABLE as error:
            logger.warning("'%s' is not used, and is made again: %s", path, _first_line(error))
            return None
        with suppress(OSError):
            os.utime(path)  # the order in which files are removed
        return tensors

    def store(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores tensors under a key, in the place of any that are there.

        Args:
            key: as in `load`.
            tensors: contiguous tensors on the CPU, by name.
        """
        from safetensors.torch import save_file

        path, size = self._path(key), sum(tensor.nbytes for tensor in tensors.values())
        try:
            if size > self._max_bytes:
                raise OSError(f"it takes {size / 2**30:.1f} GiB, and ${LIMIT_VARIABLE} allows less")
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".") as temporary:
                file = Path(temporary) / path.name
                save_file(dict(tensors), file, metadata={_KEY: self._full(key)})
                file.chmod(0o644)
                os.replace(file, path)
        except _UNREADABLE as error:
            logger.log(
                logging.DEBUG if self._has_warned else logging.WARNING,
                "What was made of the weights cannot be kept in '%s', and every start makes it again: %s",
                self._folder,
                _first_line(error),
            )
            self._has_warned = True

    def _make_room(self, size: int) -> None:
        """Removes what killed writes left behind, and the least recently used files until `size` bytes fit."""
        remove_stale(self._folder)
        kept = []
        for each in self._folder.glob(f"*{_SUFFIX}"):
            with suppress(OSError):
                status = each.stat()
                kept.append((status.st_mtime_ns, status.st_size, each))
        total = sum(kept_size for _, kept_size, _ in kept)
        for _, kept_size, each in sorted(kept):
            if total + size <= self._max_bytes:
                return
            with suppress(OSError):
                each.unlink()  # a process that has mapped it keeps it
                total -= kept_size

    def _full(self, key: str) -> str:
        return f"{self._model}\n{key}"

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(self._full(key).encode()).hexdigest()[:32]}{_SUFFIX}"


def _read(path: Path, mapped: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, which fill its end without gaps.

    Args:
        path: the file.
        mapped: its tensors in their order, memory-mapped, for their types and shapes.
    """
    arena = Arena()
    tensors = {}
    with path.open("rb", buffering=0) as file:
        file.seek(-sum(tensor.nbytes for tensor in mapped.values()), os.SEEK_END)
        for name, tensor in mapped.items():
            data = arena.empty((tensor.nbytes,), torch.uint8)
            unread = data.numpy().data
            while unread:
                if not (count := file.readinto(unread)):
                    raise ValueError("it ends early")
                unread = unread[count:]
            tensors[name] = data.view(tensor.dtype).view(tensor.shape)
    return tensors


def limit_gib(environment: Mapping[str, str]) -> float:
    """The size in GiB that all kept weights may take: $KNN_SSD_WEIGHT_CACHE, else 32.

    Raises:
        UsageError: the variable is not a number of 0 or more.
    """
    text = environment.get(LIMIT_VARIABLE) or str(DEFAULT_LIMIT_GIB)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise UsageError(f"{LIMIT_VARIABLE} must be a number of GiB, 0 or more, got '{text}'", "0 keeps none.")
    return limit


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(". ")
