"""The settings of a calibration, their published values, and how many plans are tried by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from knn_ssd.backends.base import Backend, Pooling
from knn_ssd.calibrate.search import Strategy
from knn_ssd.errors import UsageError
from knn_ssd.plan import Mode, Policy

MIXTURE = "mixture"  # the name of the search that finds the fallback plan


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """The settings of a calibration. Published values are those of arXiv 2505.16162 and its released code.

    Args:
        search: the search strategy; the paper's is `paper`.
        trials: number of plans tried per domain; None is a default for the strategy. Published: 1000.
        minutes: time limit of all searches together, instead of `trials`.
        search_prompts: number of prompts per domain that plans are scored on. Published: 8.
        judging_prompts: number of further prompts per domain on which the best plans are judged against the general
            plan; where there are fewer, each is decoded more often. With none, every domain keeps the general plan.
            The search `paper` judges none.
        new_tokens: length of the continuations that plans are scored and judged on. Published: 32.
        vector_prompts: largest number of prompts per domain that anchors are made of, those of search and judging
            among them. Published: 1000.
        anchors: number of anchors per domain. Published: 10.
        pooling: how hidden states become a prompt vector. The released code takes the mean.
        max_draft, threshold: the fixed draft policy of the search `paper`. Published: 12 and 0.8.
        chat: whether prompts go through the tokenizer's chat template, if it has one.
        workers: number of processes that search in parallel.
        storage: database URL of the trials; None is a file beside the atlas.
        seed: seed of clustering and search.
        low: whether plans may use 4-bit weights, where the backend has them.
        skip: whether plans may skip sublayers.
        lookup: whether plans may draft by lookup.

    Raises:
        UsageError: a value is outside its range.
    """

    search: Strategy = Strategy.BAYES
    trials: int | None = None
    minutes: float | None = None
    search_prompts: int = 8
    judging_prompts: int = 24
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
        if self.judging_prompts < 0:
            raise UsageError(f"judging_prompts must be 0 or more, got {self.judging_prompts}")
        if self.minutes is not None and self.minutes <= 0:
            raise UsageError(f"minutes must be above 0, got {self.minutes}")
        if not (self.low or self.skip or self.lookup):
            raise UsageError("plans must be allowed something: 4-bit weights, skipping or lookup")
        if self.new_tokens < 2:
            raise UsageError(f"new_tokens must be 2 or more, got {self.new_tokens}")
        Policy(self.max_draft, self.threshold)

    def identity(self) -> dict[str, Any]:
        """The settings that must stay the same when a calibration is resumed."""
        open_ended = ("trials", "minutes", "workers", "storage")
        return {name: getattr(self, name) for name in self.__slots__ if name not in open_ended}

    def continuation_length(self, index: int) -> int:
        """Tokens that are decoded after a domain's prompt with this number, before any search.

        One for prompts of judging, which prefill gives: it shows whether the output ends at once.
        """
        if index < self.search_prompts:
            return self.new_tokens
        return int(index < self.search_prompts + self.judging_prompts)

    def uses_low_bit(self, backend: Backend) -> bool:
        """Whether plans may use 4-bit weights on this backend; those of the search `paper` never do."""
        return self.low and Mode.LOW in backend.modes and self.search is not Strategy.PAPER

    def num_trials(self, num_layers: int, low: bool, domain: str) -> int | None:
        """Number of trials of a domain's search; None where the time limit decides.

        4-bit plans gain little by skipping, so the mixture's search tries the single changes for all domains.
        """
        if self.trials is not None or self.minutes is not None:
            return self.trials
        if self.search is Strategy.PAPER:
            return 1000
        if low:
            return 2 * num_layers + 16 if domain == MIXTURE else 16
        return 6 * num_layers + 40
