"""From logits to the distribution of the next token. Target and draft logits go through the same processors.

The processors are transformers' own where it has them, in its order, so that plain decoding equals its `generate`. Each
is a function of the tokens before a position and the logits there, so that a row of a verified block is processed as if
the draft tokens before it had been emitted. This module knows nothing of rounds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from knn_ssd.checks import fill_in_defaults, is_whole, require, require_kind, require_number, require_whole
from knn_ssd.errors import UsageError
from knn_ssd.grammar_state import GrammarMask, GrammarState

if TYPE_CHECKING:
    from transformers import GenerationConfig

_STATEFUL_PROCESSORS = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")

# Below this temperature only the most likely token has a probability above zero, and dividing by it would overflow.
_COLDEST = 1e-9

_PENALTIES = ("presence_penalty", "frequency_penalty")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; None stands for a value's default.

    `temperature` to `repetition_penalty` have the names and meanings of transformers' `GenerationConfig`; the values
    after `seed` have those of vLLM's `SamplingParams`, of which the penalties and biases are OpenAI's.

    Args:
        temperature: logits are divided by it; 0, or a value close to it, is greedy decoding.
        top_k: draws from the k most likely tokens only; 0 is no limit.
        top_p: draws from the smallest set of most likely tokens with at least this probability; 1 is no limit.
        min_p: draws from tokens at least this likely relative to the most likely one; 0 is no limit.
        repetition_penalty: above 1 it makes tokens of the prompt and the output so far less likely; 1 is none.
        seed: seeds the request's own random numbers; None draws a seed.
        presence_penalty: subtracted, in [-2, 2], from the logit of each token that the output so far has.
        frequency_penalty: the same for each time that the output has it. The prompt does not count for either.
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        min_tokens: until the output has as many tokens, no end-of-sequence token and no stop token can follow.

    Raises:
        UsageError: a value is of the wrong kind or outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0

    def __post_init__(self) -> None:
        fill_in_defaults(self)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", *_PENALTIES):
            require_number(name, getattr(self, name))
        for name in ("top_k", "min_tokens"):
            require_whole(name, getattr(self, name))
            require(getattr(self, name) >= 0, f"{name} must be 0 or more", getattr(self, name))
        require(self.temperature >= 0, "temperature must be 0 or more", self.temperature)
        require(0 < self.top_p <= 1, "top_p must be in (0, 1]", self.top_p)
        require(0 <= self.min_p <= 1, "min_p must be in [0, 1]", self.min_p)
        if self.seed is not None:
            require_whole("seed", self.seed)
            require(0 <= self.seed < 2**64, "seed must be in [0, 2**64)", self.seed)
        require(self.repetition_penalty > 0, "repetition_penalty must be above 0", self.repetition_penalty)
        require(math.isfinite(self.repetition_penalty), "repetition_penalty must be finite", self.repetition_penalty)
        for name in _PENALTIES:
            require(-2 <= getattr(self, name) <= 2, f"{name} must be in [-2, 2]", getattr(self, name))
        self._check_biases()

    def _check_biases(self) -> None:
        require_kind("logit_bias", self.logit_bias, Mapping, "a mapping from token ids to numbers")
        for token, bias in self.logit_bias.items():
            require(is_whole(token) and token >= 0, "logit_bias must have token ids as keys", token)
            require_number(f"logit_bias of token {token}", bias)
            require(-100 <= bias <= 100, f"logit_bias of token {token} must be in [-100, 100]", bias)

    @property
    def greedy(self) -> bool:
        return self.temperature < _COLDEST

    def processors(
        self, device: torch.device, prompt_length: int = 0, end_token_ids: Collection[int] = ()
    ) -> LogitsProcessorList:
        """The logits processors for these settings, in transformers' order.

        Args:
            device: where the logits are.
            prompt_length: how many of a context's tokens are the prompt's.
            end_token_ids: the tokens that `min_tokens` keeps out.
        """
        processors = LogitsProcessorList()
        if self.logit_bias:
            biases: list[Any] = [[[int(token)], float(bias)] for token, bias in self.logit_bias.items()]
            processors.append(SequenceBiasLogitsProcessor(biases))
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.presence_penalty or self.frequency_penalty:
            processors.append(OutputPenalties(prompt_length, self.presence_penalty, self.frequency_penalty))
        if self.min_tokens and end_token_ids:
            ends = torch.tensor(sorted(end_token_ids), device=device)
            processors.append(MinNewTokensLengthLogitsProcessor(prompt_length, int(self.min_tokens), ends))
        if self.greedy:
            return processors
        if self.temperature != 1:
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            processors.append(TopKLogitsWarper(int(self.top_k)))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p:
            processors.append(MinPLogitsWarper(float(self.min_p)))
        return processors


class OutputPenalties(LogitsProcessor):
    """OpenAI's presence and frequency penalties, as in vLLM: each token's logit less a penalty for its occurrences.

    Args:
        prompt_length: how many tokens of a context are the prompt's, which do not count.
        presence: subtracted once for a token that occurred.
        frequency: subtracted for each time that it occurred.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._prompt_length = prompt_length
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (1, V) after a context (1, T)."""
        counts = torch.bincount(input_ids[0, self._prompt_length :], minlength=scores.shape[-1])  # (V,)
        return scores - self._frequency * counts - self._presence * (counts > 0)


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
        grammar: whose mask is put before the processors; None is free text.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        greedy: bool,
        generator: torch.Generator | None = None,
        grammar: GrammarState | None = None,
    ) -> None:
        masks = [] if grammar is None else [GrammarMask(grammar)]
        self.processors = LogitsProcessorList([*masks, *processors])
        self._after_mask = processors
        self.greedy = greedy
        self.generator = generator
        self.grammar = grammar

    @classmethod
    def from_params(
        cls,
        params: SamplingParams,
        device: torch.device,
        prompt_length: int = 0,
        end_token_ids: Collection[int] = (),
        grammar: GrammarState | None = None,
    ) -> Sampler:
        """The sampler of a request; the arguments are those of `SamplingParams.processors` and of the class."""
        processors = params.processors(device, prompt_length, end_token_ids)
        if params.greedy:
            return cls(processors, greedy=True, grammar=grammar)
        generator = torch.Generator(device=device)
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(int(params.seed))
        return cls(processors, greedy=False, generator=generator, grammar=grammar)

    def masked(self, logits: torch.Tensor, context: Sequence[int]) -> torch.Tensor:
        """Logits (1, V) after a context: minus infinity for tokens that the grammar does not allow there."""
        return logits if self.grammar is None else self.grammar.mask(context, logits)

    def probs(
        self, logits: torch.Tensor, context: Sequence[int], tokens: Sequence[int] = (), *, is_masked: bool = False
    ) -> Probs:
        """The distributions of the next token, (n, V) float32; `Certain` in greedy decoding.

        Args:
            logits: (n, V); row i follows `context` and the first i tokens of `tokens`.
            context: the tokens that row 0 follows.
            tokens: at least n - 1 of them.
            is_masked: whether `masked` was applied to the logits.
        """
        processors = self._after_mask if is_masked else self.processors
        if self.greedy and not processors:
            return Certain(most_likely(logits))
        scores = _processed(processors, logits.to(torch.float32, copy=True), context, tokens)
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


def _processed(
    processors: LogitsProcessorList, scores: torch.Tensor, context: Sequence[int], tokens: Sequence[int]
) -> torch.Tensor:
    if not processors:
        return scores
    ids = torch.tensor([[*context, *tokens]], device=scores.device)  # (1, T)
    rows = [
        processors(ids[:, : len(context) + i], scores[i : i + 1])  # type: ignore[arg-type]
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
