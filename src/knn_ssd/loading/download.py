"""Downloads from the Hub into its local cache what loading a model needs, and no more."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, errors, snapshot_download

from knn_ssd.errors import ModelError
from knn_ssd.loading.files import WEIGHTS, reason
from knn_ssd.loading.hub_name import HubName, gguf_files

_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_PROBE_SECONDS = 10


def download(model: HubName) -> Path:
    """Downloads what loading a model needs, and returns its directory, or GGUF file, in the local Hub cache.

    Raises:
        ModelError: the Hub cannot be reached, refuses, or has no such model.
        UsageError: the repository has several GGUF files, or none of the name that was given.
    """
    try:
        # One request without retries, so that a machine without network gets its error at once.
        info = HfApi().model_info(model.hub_id, timeout=_PROBE_SECONDS, **model.options)
    except Exception as error:
        raise _refusal(model, error) from error
    names = [sibling.rfilename for sibling in info.siblings or ()]
    needed = [] if model.variant else _needed(names)
    ggufs = [] if _has_weights(needed) else gguf_files(model, names)
    try:
        place = Path(snapshot_download(model.hub_id, allow_patterns=ggufs or needed, **model.options))
    except errors.GatedRepoError as error:  # the list of files is public, the files are not
        raise _refusal(model, error) from error
    except Exception as error:
        fact = f"the download of model '{model.hub_id}' broke off: {reason(error)}"
        raise ModelError(fact, "Run it again: what was fetched so far is kept.") from error
    return place / ggufs[0] if ggufs else place


def _has_weights(names: Iterable[str]) -> bool:
    return any(name.endswith((".safetensors", ".bin")) for name in names)


def _needed(names: list[str]) -> list[str]:
    """The files to download from a repository: configuration, vocabulary, and one form of the weights."""
    top = [name for name in names if "/" not in name]
    side = [name for name in top if name.endswith(_SIDE_FILES)]
    for single, index in WEIGHTS:
        stem, suffix = single.split(".")
        if single in top:
            return [*side, single]
        if index in top:
            return [*side, *(name for name in top if name.startswith(f"{stem}-") and name.endswith(suffix))]
    return side


def _refusal(model: HubName, error: Exception) -> ModelError:
    name = model.hub_id
    terms = "Accept its terms on its page on the Hub and log in with `hf auth login`."
    kinds = (  # from the special to the general
        (errors.HFValidationError, f"'{name}' is neither a path nor a Hub id", "A Hub id looks like 'owner/name'."),
        (errors.GatedRepoError, f"model '{name}' is gated", terms),
        (
            errors.RevisionNotFoundError,
            f"model '{name}' has no revision '{model.revision}'",
            "Name a branch, a tag or a commit of it.",
        ),
        (
            errors.RepositoryNotFoundError,
            f"there is no model '{name}' on the Hub, or it is private",
            "Check the spelling, or log in with `hf auth login`.",
        ),
        (errors.HfHubHTTPError, f"the Hub refused model '{name}': {reason(error)}", "Try again later."),
        (
            errors.OfflineModeIsEnabled,
            f"model '{name}' is not complete in the local Hub cache, and the Hub client is set offline",
            "Unset HF_HUB_OFFLINE to download it.",
        ),
    )
    for kind, fact, remedy in kinds:
        if isinstance(error, kind):
            return ModelError(fact, remedy)
    return ModelError(
        f"model '{name}' is not complete in the local Hub cache, and the Hub cannot be reached: {reason(error)}",
        "Connect to the network, or name a directory with --model.",
    )
