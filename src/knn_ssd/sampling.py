"""From logits to the distribution of the next token. Target and draft logits go through the same processors.

The processors are transformers' own, in its order, so that plain decoding equals its `generate`. This module knows
nothing of rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
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

if TYPE_CHECKING:
    from transformers import GenerationConfig

_STATEFUL_PROCESSORS = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")

# Below this temperature only the most likely token has a probability above zero, and dividing by it would overflow.
_COLDEST = 1e-9


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, with the names and meanings of transformers' `GenerationConfig`.

    Args:
        temperature: logits are divided by it; 0, or a value close to it, is greedy decoding.
        top_k: draws from the k most likely tokens only; 0 is no limit.
        top_p: draws from the smallest set of most likely tokens with at least this probability; 1 is no limit.
        min_p: draws from tokens at least this likely relative to the most likely one; 0 is no limit.
        repetition_penalty: above 1 it makes tokens of the prompt and the output so far less likely; 1 is none.
        seed: seeds the request's own random numbers; None draws a seed.

    Raises:
        UsageError: a value is outside its range.
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
        """The logits processors for these settings, in transformers' order."""
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
    """Distributions with one possible token each, as in greedy decoding; indexed like probabilities (n, V)."""

    tokens: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> CertainRow:
        return CertainRow(self.tokens[index])


@dataclass(frozen=True, slots=True)
class CertainRow:
    """A distribution with one possible token; indexed like probabilities (V,)."""

    token: int

    def __getitem__(self, token: int) -> float:
        return float(token == self.token)


Probs = torch.Tensor | Certain  # (n, V)
Row = torch.Tensor | CertainRow  # (V,)


class Sampler:
    """Chooses the tokens of one request, with random numbers of its own.

    Args:
        processors: logits processors for target and draft alike; each is a function of context and logits alone.
        greedy: whether to choose the most likely token instead of drawing one.
        generator: the source of random numbers; None takes torch's global one.
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
        """The distributions of the next token, (n, V) float32; `Certain` in greedy decoding.

        Args:
            logits: (n, V); row i follows `context` and the first i tokens of `tokens`.
            context: the tokens that row 0 follows.
            tokens: at least n - 1 of them.
        """
        if self.greedy and not self.processors:
            return Certain(most_likely(logits))
        scores = self._process(logits.to(torch.float32, copy=True), context, tokens)
        return Certain(most_likely(scores)) if self.greedy else scores.softmax(dim=-1)

    def pick(self, probs: Row) -> int:
        """Draws a token from `probs` (V,), which need not sum to one."""
        if isinstance(probs, CertainRow):
            return probs.token
        if self.greedy:
            return int(probs.argmax())
        return int(torch.multinomial(probs, 1, generator=self.generator))

    def uniform(self, count: int) -> list[float]:
        """Random numbers in [0, 1); zeros in greedy decoding, which draws none."""
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
    """The most likely token of each row of scores (n, V): the first one where several are equal."""
    return tuple(_fastest(scores).argmax(-1).tolist())


def are_finite(logits: torch.Tensor, probs: Probs) -> bool:
    """Whether each row of logits (n, V) has a finite highest value and no NaN.

    Where `probs` are certain, the value of their token is looked at, which is the first NaN if there is one.
    """
    values = _fastest(logits)
    if isinstance(probs, Certain):
        return all(math.isfinite(row[token]) for row, token in zip(values, probs.tokens, strict=True))
    return (
        bool(np.isfinite(values.max(-1)).all())
        if isinstance(values, np.ndarray)
        else bool(values.amax(-1).isfinite().all())
    )


def _fastest(scores: torch.Tensor) -> Any:
    """The scores as an array of numpy where that is possible, which is ten times as fast there."""
    is_plain = scores.dtype is torch.float32 and scores.device.type == "cpu"
    return scores.detach().numpy() if is_plain else scores


def refuse_stateful(processors: LogitsProcessorList) -> None:
    """Raises a `UsageError` for a processor that keeps state between calls, which rejected drafts would corrupt."""
    stateful = [name for processor in processors if (name := type(processor).__name__) in _STATEFUL_PROCESSORS]
    if stateful:
        raise UsageError(f"{stateful[0]} keeps state between calls and cannot be used with drafts")


def refuse_beams_and_batches(
    input_ids: torch.Tensor, config: GenerationConfig, attention_mask: torch.Tensor | None
) -> None:
    """Raises a `UsageError` for what `custom_generate` cannot decode: beams, several prompts (n, length), padding."""
    if config.num_beams not in (None, 1):
        raise UsageError(f"custom_generate decodes without beams, got num_beams={config.num_beams}")
    if input_ids.shape[0] != 1:
        raise UsageError(f"custom_generate decodes one prompt at a time, got {input_ids.shape[0]}")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UsageError("custom_generate takes a prompt without padding, got a mask with zeros in it")


def _require(condition: bool, rule: str, value: float) -> None:
    if not condition:
        raise UsageError(f"{rule}, got {value}")
