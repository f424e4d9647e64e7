"""What a request asks for, besides its prompt: checked before anything runs. Knows nothing of models."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from knn_ssd.checks import is_whole, require, require_kind, require_whole
from knn_ssd.errors import UsageError
from knn_ssd.grammar import Grammar
from knn_ssd.owner import Owner
from knn_ssd.plan import Plan
from knn_ssd.routing.plan_choice import PlanRequest
from knn_ssd.sampling import SamplingParams
from knn_ssd.tokenization import PromptLike


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions(SamplingParams):
    """The options of a request; None stands for an option's default.

    `stop_token_ids`, `ignore_eos` and `min_tokens` mean what they mean in vLLM.

    Args:
        temperature, top_k, top_p, min_p, seed: see `SamplingParams`.
        presence_penalty, frequency_penalty, logit_bias, min_tokens: see there, too. Stop strings that are complete
            within the first `min_tokens` tokens do not end the output either.
        repetition_penalty: see there; by default what the model's generation config says, as in transformers.
        max_new_tokens: the longest output; None is up to the model's context.
        stop: strings that end the output; they are not part of the text.
        stop_token_ids: tokens that end the output besides the model's end-of-sequence tokens. They are part of the
            token ids and not of the text.
        ignore_eos: go on after an end-of-sequence token.
        grammar: what the output must look like; it ends where that is complete. So neither `ignore_eos` nor
            `min_tokens` can be given with it.
        plain: decode without drafts.
        domain: use this domain's plan, whatever the route.
        plan: use this plan, whatever the route.
        adaptive: within the plan's policy, choose for each round which drafter drafts and how far, by expected tokens
            per second; otherwise follow the policy to the letter. None is adaptive unless a `plan` is given. Sampling
            with a `seed`, whose draws depend on what was drafted, adapts by the cost profile and by this request alone.
        chat: put text through the tokenizer's chat template if it has one.
        logprobs: report each token's log-probability and so many of the likeliest tokens; None reports neither.
        store: use the answer store: draft from near requests' answers, and keep this one's for later requests.
        owner: whose answer store and prefix cache are used; None is the engine's own.

    Raises:
        UsageError: an option is of the wrong kind or outside its range.
    """

    max_new_tokens: int | None = 256
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    plain: bool = False
    domain: str | None = None
    plan: Plan | None = None
    adaptive: bool | None = None
    chat: bool = True
    logprobs: int | None = None
    store: bool = True
    owner: Owner | None = None

    def __post_init__(self) -> None:
        limit = self.max_new_tokens  # None has a meaning of its own
        SamplingParams.__post_init__(self)  # `super()` knows no classes with slots
        object.__setattr__(self, "max_new_tokens", limit)
        if limit is not None:
            require_whole("max_new_tokens", limit)
            require(limit >= 1, "max_new_tokens must be 1 or more", limit)
            require(self.min_tokens <= limit, f"min_tokens must be at most max_new_tokens, {limit}", self.min_tokens)
        if self.logprobs is not None:
            require_whole("logprobs", self.logprobs)
            require(self.logprobs >= 0, "logprobs must be 0 or more", self.logprobs)
        for name in ("ignore_eos", "plain", "chat", "store"):
            require_kind(name, getattr(self, name), bool, "True or False")
        require_kind("adaptive", self.adaptive, (bool, type(None)), "True, False or None")
        require_kind("domain", self.domain, (str, type(None)), "the name of a domain")
        require_kind("plan", self.plan, (Plan, type(None)), "a Plan")
        require_kind("owner", self.owner, (Owner, type(None)), "an Owner")
        require_kind("grammar", self.grammar, (Grammar, type(None)), "a Grammar")
        for name in ("ignore_eos", "min_tokens"):
            if self.grammar is not None and getattr(self, name):
                raise UsageError(
                    f"{name} cannot be used with structured output, which decides where the output may end"
                )
        self._check_ends()

    def _check_ends(self) -> None:
        is_list = isinstance(self.stop, Sequence) and all(isinstance(each, str) for each in self.stop)
        require(is_list and not isinstance(self.stop, bytes), "stop must be text or a list of texts", self.stop)
        if not all(self.stop_strings):
            raise UsageError("a stop string must have at least one character, got an empty one")
        ids = self.stop_token_ids
        is_list = isinstance(ids, Sequence) and all(is_whole(each) and each >= 0 for each in ids)
        require(is_list and not isinstance(ids, str | bytes), "stop_token_ids must be a list of token ids", ids)

    def check_tokens(self, vocab_size: int, has_tokenizer: bool) -> None:
        """Raises a `UsageError` for tokens that a model lacks, and for stop strings without a tokenizer."""
        for name in ("logit_bias", "stop_token_ids"):
            if unknown := [token for token in getattr(self, name) if not 0 <= token < vocab_size]:
                raise UsageError(f"{name} has the token id {unknown[0]}, and the model's vocabulary is {vocab_size}")
        if self.stop_strings and not has_tokenizer:
            raise UsageError(f"stop strings need a tokenizer, got {list(self.stop_strings)} and a model without one")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> RequestOptions:
        """The options by name.

        Raises:
            UsageError: there is no option of such a name, or one cannot be used.
        """
        known = [each.name for each in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean '{near[0]}'?" if near else f"Choose from {', '.join(known)}."
                raise UsageError(f"there is no option '{name}'", hint)
        return cls(**options)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings of `stop`."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def plan_request(self) -> PlanRequest:
        """What these options demand of the plan."""
        adaptive = self.plan is None if self.adaptive is None else self.adaptive
        reproducible = self.adaptive is None and self.plan is None and not self.greedy and self.seed is not None
        return PlanRequest(self.plain, self.domain, self.plan, adaptive, reproducible)


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a batch.

    Args:
        prompt: its prompt, as for `Engine.stream`.
        options: its options by name, as in `RequestOptions`.
        name: the prompt's name in error messages.

    Raises:
        UsageError: the options are no mapping.
    """

    prompt: PromptLike
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        require_kind("options", self.options, Mapping, "a mapping from names to values")
