"""Downloads from the Hub into its local cache what loading a model needs, and no more."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, errors, snapshot_download

from knn_ssd.errors import ModelError
from knn_ssd.loading.files import WEIGHTS, reason

_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_PROBE_SECONDS = 10


def download(hub_id: str) -> Path:
    """Downloads what loading a model needs, and returns its directory in the local Hub cache.

    Raises:
        ModelError: the Hub cannot be reached, refuses, or has no such model.
    """
    try:
        # One request without retries, so that a machine without network gets its error at once.
        siblings = HfApi().model_info(hub_id, timeout=_PROBE_SECONDS).siblings or ()
    except Exception as error:
        raise _refusal(hub_id, error) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_needed([sibling.rfilename for sibling in siblings])))
    except errors.GatedRepoError as error:  # the list of files is public, the files are not
        raise _refusal(hub_id, error) from error
    except Exception as error:
        fact = f"the download of model '{hub_id}' broke off: {reason(error)}"
        raise ModelError(fact, "Run it again: what was fetched so far is kept.") from error


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


def _refusal(hub_id: str, error: Exception) -> ModelError:
    if isinstance(error, errors.HFValidationError):
        return ModelError(f"'{hub_id}' is neither a path nor a Hub id", "A Hub id looks like 'owner/name'.")
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"model '{hub_id}' is gated", "Accept its terms on its page on the Hub and log in with `hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"there is no model '{hub_id}' on the Hub, or it is private",
            "Check the spelling, or log in with `hf auth login`.",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return ModelError(f"the Hub refused model '{hub_id}': {reason(error)}", "Try again later.")
    missing = f"model '{hub_id}' is not complete in the local Hub cache"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ModelError(f"{missing}, and the Hub client is set offline", "Unset HF_HUB_OFFLINE to download it.")
    return ModelError(
        f"{missing}, and the Hub cannot be reached: {reason(error)}",
        "Connect to the network, or name a directory with --model.",
    )
