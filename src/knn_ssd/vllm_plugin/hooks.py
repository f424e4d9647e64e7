"""The supported versions of vLLM, and the attributes of it that this plugin wraps.

vLLM calls a proposer of its method `custom_class` with token ids alone, and reserves no lookahead slots for its drafts.
Two attributes are wrapped to give this plugin's proposer both, and one method is added to workers. Each wrapper calls
the original unless the proposer is this plugin's.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from knn_ssd.errors import UsageError

PROPOSER = "knn_ssd.vllm_plugin.proposer.Proposer"
OLDEST, NEWEST = (0, 32), (0, 33)  # minor versions whose source was checked; the tests run on 0.32
COUNTS = "knn_ssd_counts"
_MARK = "_knn_ssd_original"
_log = logging.getLogger("vllm.knn_ssd")


def why_unsupported(version: str) -> str | None:
    """The reason why a version of vLLM is not supported; None if it is."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return None
    oldest, newest = (".".join(map(str, known)) for known in (OLDEST, NEWEST))
    return f"knn-ssd supports vLLM {oldest} to {newest}, and this is vLLM {version}"


def install() -> None:
    """Installs the wrappers, once. An unsupported vLLM is left as it is, and `check` raises."""
    import vllm
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    reason = why_unsupported(vllm.__version__)
    if reason is not None:
        _log.warning("%s: the plugin does nothing here", reason)
        return
    if getattr(GPUModelRunner.propose_draft_token_ids, _MARK, None) is not None:
        return
    original_propose: Any = GPUModelRunner.propose_draft_token_ids
    original_lookahead: Any = VllmConfig.num_lookahead_tokens.fget

    def propose_draft_token_ids(runner: Any, *args: Any, **kwargs: Any) -> Any:
        in_runner = getattr(runner.drafter, "propose_in_runner", None)
        if in_runner is None:
            return original_propose(runner, *args, **kwargs)
        return in_runner(runner, *args, **kwargs)

    def num_lookahead_tokens(config: Any) -> int:
        speculative = config.speculative_config
        if speculative is not None and speculative.method == "custom_class" and speculative.model == PROPOSER:
            return int(config.num_speculative_tokens)
        return int(original_lookahead(config))

    def counts(worker: Any) -> dict[str, dict[str, int]]:
        """`Proposer.counts`; empty where the proposer is not this plugin's."""
        return getattr(getattr(worker.model_runner, "drafter", None), "counts", {})

    setattr(propose_draft_token_ids, _MARK, original_propose)
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
    VllmConfig.num_lookahead_tokens = property(num_lookahead_tokens)
    setattr(WorkerBase, COUNTS, counts)


def check() -> None:
    """Raises a `UsageError` if the wrappers are not installed."""
    import vllm
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    reason = why_unsupported(vllm.__version__)
    if reason is not None:
        raise UsageError(reason, "Install a version of vLLM in that range, or a newer knn-ssd.")
    if getattr(GPUModelRunner.propose_draft_token_ids, _MARK, None) is None:
        raise UsageError(
            "vLLM has not loaded the plugin 'knn_ssd'",
            "Name it in VLLM_PLUGINS if that is set; else install knn-ssd in the environment that vLLM runs in.",
        )
