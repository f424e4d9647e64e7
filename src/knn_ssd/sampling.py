"""From logits to the distribution the next token is drawn from. Target and draft go through the same processors.

The processors are transformers' own, in its order, so that plain decoding here is what `generate` does there. This
module knows nothing of rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from knn_ssd.errors import UsageError

_STATEFUL_PROCESSORS = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")

# Below it, float32 logits that differ at all leave the most likely token alone, and divided by it they would overflow.
_COLDEST = 1e-9


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; the names and meanings are those of transformers' `GenerationConfig`.

    Args:
        temperature: 0, or next to nothing, is greedy; otherwise logits are divided by it.
        top_k: only the k most likely tokens; 0 is all.
        top_p: only the smallest set of most likely tokens with this much probability; 1 is all.
        min_p: only tokens at least this likely relative to the most likely one; 0 is all.
        repetition_penalty: tokens of prompt and output so far get this much less likely; 1 is none.
        seed: of the request's own random numbers; None draws one.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "temperature must be 0 or more", self.temperature)
        _require(self.top_k >= 0, "top_k must be 0 or more", self.top_k)
        _require(0 < self.top_p <= 1, "top_p must be in (0, 1]", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p must be in [0, 1]", self.min_p)
        _require(self.seed is None or 0 <= self.seed < 2**64, "seed must be in [0, 2**64)", self.seed or 0)
        _require(self.repetition_penalty > 0, "repetition_penalty must be above 0", self.repetition_penalty)

    @property
    def greedy(self) -> bool:
        return self.temperature < _COLDEST

    def processors(self) -> LogitsProcessorList:
        """The processors that these settings ask for, in transformers' order."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.greedy:
            return processors
        if self.temperature != 1:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            processors.append(MinPLogitsWarper(self.min_p))
        return processors


@dataclass(frozen=True, slots=True)
class Certain:
    """Distributions with one possible token each, as greedy decoding has them; indexed like probabilities (n, V)."""

    tokens: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> CertainRow:
        return CertainRow(self.tokens[index])


@dataclass(frozen=True, slots=True)
class CertainRow:
    """One of them; indexed like probabilities (V,)."""

    token: int

    def __getitem__(self, token: int) -> float:
        return float(token == self.token)


Probs = torch.Tensor | Certain  # (n, V)
Row = torch.Tensor | CertainRow  # (V,)


class Sampler:
    """One request's way of choosing tokens, with its own random numbers.

    Args:
        processors: applied to the logits of target and draft alike; each a function of context and logits alone.
        greedy: choose the most likely token instead of drawing one.
        generator: the random numbers; None takes torch's global ones.
    """

    def __init__(self, processors: LogitsProcessorList, greedy: bool, generator: torch.Generator | None = None) -> None:
        self.processors = processors
        self.greedy = greedy
        self.generator = generator

    @classmethod
    def from_params(cls, params: SamplingParams, device: torch.device) -> Sampler:
        if params.greedy:
            return cls(params.processors(), greedy=True)
        generator = torch.Generator(device=device)
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed)
        return cls(params.processors(), greedy=False, generator=generator)

    def probs(self, logits: torch.Tensor, context: Sequence[int], tokens: Sequence[int] = ()) -> Probs:
        """What the next token is drawn from, (n, V) float32; greedy decoding draws from the most likely token alone.

        Args:
            logits: (n, V); row i follows `context` and the first i of `tokens`.
            context: the tokens that row 0 follows.
            tokens: at least n - 1 of them.
        """
        if self.greedy and not self.processors:
            return Certain(most_likely(logits))
        scores = self._process(logits.to(torch.float32, copy=True), context, tokens)
        return Certain(most_likely(scores)) if self.greedy else scores.softmax(dim=-1)

    def pick(self, probs: Row) -> int:
        """A token drawn from probs (V,), which need not sum to one."""
        if isinstance(probs, CertainRow):
            return probs.token
        if self.greedy:
            return int(probs.argmax())
        return int(torch.multinomial(probs, 1, generator=self.generator))

    def uniform(self, count: int) -> list[float]:
        """Random numbers in [0, 1); greedy decoding needs none and uses none up."""
        if self.greedy:
            return [0.0] * count
        device = self.generator.device if self.generator is not None else None
        return torch.rand(count, generator=self.generator, device=device).tolist()

    def _process(self, scores: torch.Tensor, context: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        if not self.processors:
            return scores
        ids = torch.tensor([[*context, *tokens]], device=scores.device)  # (1, T)
        rows = [
            self.processors(ids[:, : len(context) + i], scores[i : i + 1])  # type: ignore[arg-type]
            for i in range(len(scores))
        ]
        return torch.cat(rows)


def most_likely(scores: torch.Tensor) -> tuple[int, ...]:
    """The first of the highest of each row's scores (n, V)."""
    if scores.dtype is torch.float32 and scores.device.type == "cpu":  # where numpy is ten times as fast
        return tuple(scores.detach().numpy().argmax(axis=-1).tolist())
    return tuple(scores.argmax(dim=-1).tolist())


def refuse_stateful(processors: LogitsProcessorList) -> None:
    """Raises a `UsageError` for a processor that keeps state between calls, in which rejected drafts leave traces."""
    stateful = [name for processor in processors if (name := type(processor).__name__) in _STATEFUL_PROCESSORS]
    if stateful:
        raise UsageError(f"{stateful[0]} keeps state between calls and cannot be used with drafts")


def _require(condition: bool, rule: str, value: float) -> None:
    if not condition:
        raise UsageError(f"{rule}, got {value}")
