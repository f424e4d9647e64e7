"""What a name such as `owner/name:Q4_K_M` means on the Hub, and whether it is in the local Hub cache. No network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import errors, snapshot_download

from knn_ssd.errors import ModelError, UsageError
from knn_ssd.loading.files import has_vocabulary, weight_files
from knn_ssd.loading.gguf_file import parts_of, stem_of

_NO_MODELS = ("mmproj", "imatrix")  # in the names of GGUF files
_QUANTISATION = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|BF16|F16|F32|MXFP4\w*))$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the Hub.

    Args:
        hub_id: `owner/name`.
        variant: which of the repository's GGUF files, such as `Q4_K_M`; None is its safetensors, or its only GGUF file.
        revision: a branch, tag or commit; None is the main branch.
    """

    hub_id: str
    variant: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, name: str, revision: str | None) -> HubName:
        """The model of a name such as `owner/name` or `owner/name:Q4_K_M`."""
        hub_id, _, variant = name.partition(":")
        return cls(hub_id, variant or None, revision)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the Hub client's functions."""
        return {} if self.revision is None else {"revision": self.revision}


def cached(model: HubName) -> Path | None:
    """The directory, or GGUF file, of a model in the local Hub cache if it is complete. Never uses the network."""
    try:
        snapshot = Path(snapshot_download(model.hub_id, local_files_only=True, **model.options))
        files = [] if model.variant else weight_files(snapshot)
    except (errors.HFValidationError, errors.LocalEntryNotFoundError, ModelError):
        return None
    if files:
        complete = (snapshot / "config.json").is_file() and all(file.is_file() for file in files)
        return snapshot if complete and has_vocabulary(snapshot) else None
    try:
        chosen = gguf_files(model, [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*.gguf")])
        return parts_of(snapshot / chosen[0])[0] if chosen else None
    except (UsageError, ModelError):
        return None


def gguf_files(model: HubName, names: Iterable[str]) -> list[str]:
    """The GGUF file that a name means among a repository's files, or its parts in order; empty if there is none at all.

    Raises:
        UsageError: there are several of them, or none of the name that was given.
    """
    files: dict[str, list[str]] = {}
    for name in sorted(name for name in names if name.lower().endswith(".gguf")):
        if not any(word in name.lower() for word in _NO_MODELS):
            files.setdefault(PurePosixPath(name).with_name(stem_of(Path(name))).as_posix(), []).append(name)
    fitting = files
    if model.variant:
        end = re.compile(rf"(^|[-._/]){re.escape(model.variant.removesuffix('.gguf'))}$", re.IGNORECASE)
        fitting = {stem: parts for stem, parts in files.items() if end.search(stem)}
    if len(fitting) == 1 or (not files and not model.variant):
        return next(iter(fitting.values()), [])
    listed = ", ".join(f"'{model.hub_id}:{_variant(stem)}'" for stem in fitting or files)
    if not model.variant:
        fact = f"model '{model.hub_id}' has {len(files)} GGUF files and no safetensors"
    else:
        fact = f"model '{model.hub_id}' has {len(fitting) or 'no'} GGUF files of the name '{model.variant}'"
    raise UsageError(fact, f"Name one of {listed}." if files else "Leave out what follows the colon.")


def _variant(stem: str) -> str:
    """The part of a GGUF file's name that says how it is quantised, or the whole name."""
    match = _QUANTISATION.search(stem)
    return match[1] if match else stem
