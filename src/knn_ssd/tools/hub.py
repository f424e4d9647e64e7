"""Atlases on the Hugging Face Hub: pushed with a card that explains them, pulled atomically.

This module knows the Hub's client and the names of an atlas's files; their contents are `Atlas`'s. It knows nothing of
models. An atlas is checked before it is uploaded and before it is installed. Any error of the client becomes one
sentence: an OutputError in a push, an AtlasError in a pull.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from knn_ssd.atlas import ANCHORS, MANIFEST, Atlas
from knn_ssd.errors import AtlasError, KnnSsdError, OutputError, UsageError
from knn_ssd.io import atomic_directory
from knn_ssd.plan import Plan

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

FILES = (MANIFEST, ANCHORS)
CARD = "README.md"

_TAGS = ("knn-ssd", "speculative-decoding", "self-speculative-decoding", "layer-skipping")
_PROBE_SECONDS = 10.0  # for one request without retries, so that a machine without network gets its error at once
_COMES_WITH_A_NEW_REPO = {CARD, ".gitattributes", "LICENSE"}
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."

_CARD = """---
{metadata}
---

# Atlas of {name}

Draft plans for lossless self-speculative decoding of this model, chosen per prompt. The atlas has {num_anchors} anchors
in the space of the model's prompt vectors for {num_domains} domains. A prompt is routed to the domain of its nearest
anchor, whose plan says which sublayers the model skips or runs in 4 bits while it drafts. The full model verifies every
token, so that its output stays the same. Made with knn-ssd, after [KNN-SSD](https://arxiv.org/abs/2505.16162).

| domain | plan | sublayers skipped |
|---|---|--:|
{rows}

| model | |
|---|---|
| architecture | {model.architecture} |
| layers | {model.num_layers} |
| hidden size | {model.hidden_size} |
| vocabulary | {model.vocab_size} |
| hash of the weights | `{model.weights_hash}` |
| calibrated in | {model.dtype} |
| prompt vectors | {pooling}-pooled |

```
knn-ssd atlas pull {repo} --out ATLAS
knn-ssd generate --model MODEL --atlas ATLAS --prompt TEXT
```

It fits the model with these weights and no other; `knn-ssd atlas verify ATLAS --model MODEL` checks that.
"""


def push(atlas_dir: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads an atlas and a card that describes it in one commit; creates the repository and the branch if need be.

    Args:
        atlas_dir: the folder of the atlas.
        repo: `owner/name`.
        private: whether to make the repository private if it is new.
        revision: the branch; None is `main`.

    Returns:
        The address of the atlas on the Hub.

    Raises:
        AtlasError: `atlas_dir` is no atlas, or is damaged.
        UsageError: `repo` is no id of a repository, holds something else, or is public although `private` is set.
        OutputError: the Hub cannot be reached or refuses.
    """
    atlas = Atlas.load(atlas_dir)
    _check_id(repo)
    api = _api(token=True)
    with _one_sentence(repo, revision, OutputError):
        _check_target(repo, _info_if_any(api, repo), private=private)
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            _ensure_branch(api, repo, revision)
        _commit(api, atlas_dir, repo, card(atlas, repo), revision)
    return f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def pull(repo: str, out: Path, *, revision: str | None = None) -> Path:
    """Downloads an atlas, checks it, and installs it at `out` atomically.

    Args:
        repo: `owner/name`.
        out: the folder to make; it must not exist yet.
        revision: a branch, tag or commit; None is `main`.

    Raises:
        UsageError: `repo` is no id of a repository.
        AtlasError: there is no such atlas on the Hub, it is damaged, or the Hub cannot be reached or refuses.
        OutputError: `out` exists already or cannot be written.
    """
    _check_id(repo)
    api = _api()
    with atomic_directory(out) as folder:
        _download(api, repo, revision, folder)
        _check(folder, repo)
    return out


def card(atlas: Atlas, repo: str) -> str:
    """The README that explains an atlas on the Hub."""
    from huggingface_hub import ModelCardData

    architecture = atlas.fingerprint.architecture
    plans = [(name, domain.plan) for name, domain in atlas.domains.items()] + [("*fallback*", atlas.fallback)]
    return _CARD.format(
        metadata=ModelCardData(tags=[*_TAGS, architecture], library_name="knn-ssd").to_yaml(),
        name=_model_name(atlas),
        num_anchors=len(atlas.anchors),
        num_domains=len(atlas.domains),
        rows="\n".join(_card_row(name, plan) for name, plan in plans),
        model=atlas.fingerprint,
        pooling=atlas.pooling.value,
        repo=repo,
    )


def _card_row(name: str, plan: Plan) -> str:
    share = plan.num_skipped / len(plan.modes)
    return f"| {_in_table(name)} | {plan.describe()} | {100 * share:.0f} % |"


def _in_table(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _model_name(atlas: Atlas) -> str:
    name = str(atlas.evidence.get("model") or "")
    # A local path means nothing to others and may be private.
    is_public = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "\\" not in name
    return name if name and is_public else atlas.fingerprint.architecture


# ---- Requests


def _api(token: bool | None = None) -> HfApi:
    """The client; with `token=True`, a missing token is an error before any request is made."""
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    return HfApi(endpoint=endpoint, token=token, library_name="knn-ssd")


def _info_if_any(api: HfApi, repo: str) -> ModelInfo | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo, timeout=_PROBE_SECONDS)
    except RepositoryNotFoundError:
        return None


def _check_target(repo: str, info: ModelInfo | None, *, private: bool) -> None:
    """Raises a UsageError for a public repository of a private atlas, and for one that holds something else."""
    if info is None:
        return
    if private and info.private is False:
        raise UsageError(
            f"'{repo}' is there already and public, and the atlas was to be private",
            "Choose another name, or make that repository private on the Hub first.",
        )
    names = _file_names(info)
    if MANIFEST not in names and names - _COMES_WITH_A_NEW_REPO:
        raise UsageError(
            f"'{repo}' holds something other than an atlas ({', '.join(sorted(names - _COMES_WITH_A_NEW_REPO)[:3])})",
            "Choose another name: an atlas has a repository of its own.",
        )


def _file_names(info: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}


def _ensure_branch(api: HfApi, repo: str, revision: str) -> None:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        api.model_info(repo, revision=revision, timeout=_PROBE_SECONDS)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=revision, exist_ok=True)


def _commit(api: HfApi, atlas_dir: Path, repo: str, readme: str, revision: str | None) -> None:
    from huggingface_hub import CommitOperationAdd

    contents = {name: (atlas_dir / name).read_bytes() for name in FILES} | {CARD: readme.encode()}
    api.create_commit(
        repo,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()],
        commit_message="Upload an atlas with knn-ssd",
        revision=revision,
    )


def _download(api: HfApi, repo: str, revision: str | None, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch, _one_sentence(repo, revision, AtlasError):
        info = api.model_info(repo, revision=revision, timeout=_PROBE_SECONDS)
        missing = [name for name in FILES if name not in _file_names(info)]
        if missing:
            raise AtlasError(f"'{repo}' on the Hub is not an atlas: it has no {missing[0]}", "Check the name.")
        for name in FILES:  # both from the same commit, whatever is pushed meanwhile
            os.replace(api.hf_hub_download(repo, name, revision=info.sha, local_dir=scratch), folder / name)


def _check(folder: Path, repo: str) -> None:
    try:
        Atlas.load(folder)
    except AtlasError as error:
        # The folder is gone by the time the user reads this.
        raise AtlasError(error.message.replace(str(folder), f"{repo} on the Hub"), error.hint) from error


# ---- Errors


def _check_id(repo: str) -> None:
    if repo.count("/") != 1:
        raise _not_an_id(repo)


def _not_an_id(repo: str) -> UsageError:
    return UsageError(
        f"'{repo}' is not the id of a repository on the Hub", "Give owner/name, as in 'ada/smollm2-atlas'."
    )


@contextmanager
def _one_sentence(repo: str, revision: str | None, kind: type[AtlasError] | type[OutputError]) -> Iterator[None]:
    """Turns any error of the Hub's client within the block into one sentence, raised as `kind`.

    Every exception is caught, as the client passes on those of its HTTP library, of hf_xet, and of its own threads.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except KnnSsdError:
        raise
    except HFValidationError as error:
        raise _not_an_id(repo) from error
    except Exception as error:
        origin = _origin(error)
        if _is_local(origin):
            raise OutputError(
                f"a local file cannot be read or written: {origin}", "Choose a place with room that you may write to."
            ) from error
        raise kind(*_sentence(origin, repo, revision)) from error


def _origin(error: BaseException) -> BaseException:
    """The Hub's answer if it is among the causes, else the root cause."""
    from huggingface_hub.errors import HfHubHTTPError

    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _is_local(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, OSError) or isinstance(error, HfHubHTTPError):
        return False
    return error.filename is not None or error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _sentence(error: BaseException, repo: str, revision: str | None) -> tuple[str, str]:
    """The fact and the remedy."""
    from huggingface_hub import errors

    known = {
        errors.LocalTokenNotFoundError: ("there is no token for the Hub on this machine", _LOG_IN),
        errors.OfflineModeIsEnabled: ("the Hub client is offline: HF_HUB_OFFLINE is set", "Unset it."),
        errors.RevisionNotFoundError: (
            f"'{repo}' on the Hub has no revision '{revision}'",
            "Check --revision: a branch, tag or commit.",
        ),
        errors.GatedRepoError: (
            f"'{repo}' is gated",
            "Accept its terms on its page on the Hub and log in with `hf auth login`.",
        ),
        errors.RepositoryNotFoundError: (
            f"there is no '{repo}' on the Hub, or it is private",
            f"Check the spelling. {_LOG_IN}",
        ),
    }
    for kind, sentence in known.items():
        if isinstance(error, kind):
            return sentence
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error.response.status_code, repo, _reason(error))
    return f"the Hub cannot be reached for '{repo}', or broke off: {_reason(error)}", "Check the network and try again."


def _refusal(status: int, repo: str, reason: str) -> tuple[str, str]:
    if status == 401:
        return f"the Hub does not accept the token for '{repo}': {reason}", "Log in again with `hf auth login`."
    if status == 403:
        return f"the Hub forbids that on '{repo}': {reason}", "Log in with an account that may, with `hf auth login`."
    if status == 429:
        return f"the Hub has had too many requests from here: {reason}", "Try again in some minutes."
    return f"the Hub refused '{repo}' with status {status}: {reason}", "Try again later."


def _reason(error: BaseException) -> str:
    """The server's message, or else the error's, on one line."""
    words = getattr(error, "server_message", None) or str(error)
    lines = [line.strip() for line in str(words).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
