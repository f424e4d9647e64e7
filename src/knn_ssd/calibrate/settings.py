"""What a calibration does: the knobs, their published values and how much is tried by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from knn_ssd.backends.base import Pooling
from knn_ssd.calibrate.search import Strategy
from knn_ssd.errors import UsageError
from knn_ssd.plan import Policy

MIXTURE = "mixture"  # the name of the search whose winner is the fallback plan


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """What a calibration does. The published values (arXiv 2505.16162 and its released code) are given beside the
    defaults.

    Args:
        search: how plans are searched for; the paper's is `paper`.
        trials: plans tried per domain; None is as many as the strategy makes good use of. Published: 1000.
        minutes: for all searches together, instead of trials.
        search_prompts: prompts per domain that plans are scored on. Published: 8.
        new_tokens: length of their continuations. Published: 32.
        vector_prompts: prompts per domain that anchors are made of, at most. Published: 1000.
        anchors: per domain. Published: 10.
        pooling: how prompt vectors are taken. The released code takes the mean.
        max_draft, threshold: the fixed policy of the search `paper`. Published: 12 and 0.8.
        chat: put prompts through the tokenizer's chat template if it has one.
        workers: processes that search side by side.
        storage: database URL of the trials; None is a file beside the atlas.
        seed: of clustering and search.
        low: let plans use low-bit weights, where the target has them.
        skip: let plans skip sublayers.
        lookup: let plans look up.

    Raises:
        UsageError: a value outside its range.
    """

    search: Strategy = Strategy.BAYES
    trials: int | None = None
    minutes: float | None = None
    search_prompts: int = 8
    new_tokens: int = 32
    vector_prompts: int = 1000
    anchors: int = 10
    pooling: Pooling = Pooling.MEAN
    max_draft: int = 12
    threshold: float = 0.8
    chat: bool = True
    workers: int = 1
    storage: str | None = None
    seed: int = 0
    low: bool = True
    skip: bool = True
    lookup: bool = True

    def __post_init__(self) -> None:
        for name in ("trials", "search_prompts", "vector_prompts", "anchors", "workers", "max_draft"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, got {value}")
        if self.minutes is not None and self.minutes <= 0:
            raise UsageError(f"minutes must be above 0, got {self.minutes}")
        if not (self.low or self.skip or self.lookup):
            raise UsageError("plans must be allowed something: low-bit weights, skipping or look-up")
        if self.new_tokens < 2:
            raise UsageError(f"new_tokens must be 2 or more, got {self.new_tokens}")
        Policy(self.max_draft, self.threshold)

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a calibration is resumed."""
        open_ended = ("trials", "minutes", "workers", "storage")
        return {name: getattr(self, name) for name in self.__slots__ if name not in open_ended}

    def num_trials(self, num_layers: int, low: bool, domain: str) -> int | None:
        """Trials of a domain's search; None where the minutes decide. Low-bit plans gain little by skipping, so that
        the mixture tries the single changes for all domains.
        """
        if self.trials is not None or self.minutes is not None:
            return self.trials
        if self.search is Strategy.PAPER:
            return 1000
        if low:
            return 2 * num_layers + 16 if domain == MIXTURE else 16
        return 6 * num_layers + 40
