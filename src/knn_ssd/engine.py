"""The engine: a model, its tokenizer and an atlas; prompts in, text out, with the route and the rounds behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from knn_ssd.atlas import Atlas
from knn_ssd.controller import Costs
from knn_ssd.decode import FinishReason, Round, decode
from knn_ssd.draft.contract import DraftSource
from knn_ssd.draft.lookup import LEAST_MEMORY
from knn_ssd.drafting import Drafting, general_plan
from knn_ssd.errors import PromptError, UsageError
from knn_ssd.generation import Chunk, Generation, Stats, Stream
from knn_ssd.memory import MemoryUse, peak_bytes, resident_bytes
from knn_ssd.plan import Plan
from knn_ssd.route import Route, Router
from knn_ssd.sampling import Sampler, SamplingParams
from knn_ssd.target.contract import Prefill, Session, Target
from knn_ssd.target.fingerprint import fingerprint
from knn_ssd.target.prefixes import Prefixes
from knn_ssd.target.select import target_of
from knn_ssd.text import TextStream
from knn_ssd.tokens import PromptLike, encode, eos_token_ids

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteriaList,
    )
    from transformers.generation.utils import GenerateDecoderOnlyOutput

# These keep state of their own between calls, so drafted tokens that are rejected would leave traces.
_STATEFUL_PROCESSORS = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
)


class Engine:
    """Decodes with a model that drafts for itself.

    Args:
        model: a decoder of transformers.
        tokenizer: its tokenizer; None if prompts come as token ids and output is wanted as such.
        atlas: which plan for which prompts; without one, all use a general plan: everything low-bit where the target
            can, and look-up.
        neighbours: how many anchors vote on a route.
        remember: how many tokens of earlier prompts and outputs look-up searches too, for each label of the atlas;
            0 is none. Output stays what it is; requests with plain decoding, a plan or a seed of their own neither
            add to it nor read it.
        prefix_cache: how many bytes of keys and values to keep of earlier requests, so that a prompt that begins as
            one of them did is run from where they part. Output stays what it is.
        target: what the model runs on; None takes the lean target where it can, else the general one.

    Raises:
        UnsupportedModelError: a model that cannot draft for itself.
        AtlasMismatchError: an atlas of another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        atlas: Atlas | None = None,
        *,
        neighbours: int = 1,
        remember: int = 0,
        prefix_cache: int = 0,
        target: Target | None = None,
    ) -> None:
        if remember != 0 and remember < LEAST_MEMORY:
            raise UsageError(f"remember must be 0 or at least {LEAST_MEMORY} tokens, got {remember}")
        if prefix_cache < 0:
            raise UsageError(f"prefix_cache must be 0 or more bytes, got {prefix_cache}")
        self.model = model
        self.tokenizer = tokenizer
        self.atlas = atlas
        self.target: Target = target or target_of(model)
        self.exactness = self.target.exactness
        self.clock: Callable[[], float] | None = None
        self._weight_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        self._drafting = Drafting(self.target, atlas.cost if atlas is not None else None, remember)
        self._prefixes = Prefixes(prefix_cache) if prefix_cache else None
        self._router: Router | None = None
        if atlas is not None:
            atlas.check(fingerprint(model, tokenizer))
            self._router = Router.of(atlas, neighbours, self.target.device)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        atlas: Atlas | str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        neighbours: int = 1,
        remember: int = 0,
        prefix_cache: int = 0,
    ) -> Engine:
        """Loads a model by Hub id, directory or GGUF file; nothing is the embedded default.

        Args:
            name: which model.
            atlas: an atlas, or the folder of one.
            dtype: "auto" is the checkpoint's own where the device computes it natively, else float32.
            device: None takes an accelerator if there is one.
            neighbours, remember, prefix_cache: see the class.

        Raises:
            ModelError, AtlasError: what cannot be found, read or used together.
        """
        from knn_ssd.target.resolve import load_model

        atlas = Atlas.load(atlas) if isinstance(atlas, str | Path) else atlas
        loaded = load_model(name, dtype=dtype, device=device)
        tokenizer = loaded.tokenizer
        return cls(loaded.model, tokenizer, atlas, neighbours=neighbours, remember=remember, prefix_cache=prefix_cache)

    @property
    def memory(self) -> MemoryUse:
        """What the engine and the process hold in memory now."""
        return MemoryUse(self._weight_bytes, self.target.low_bit_bytes, resident_bytes(), peak_bytes())

    @property
    def repetition_penalty(self) -> float:
        """What the model's generation config says, as in transformers; 1 is none."""
        return getattr(self.model.generation_config, "repetition_penalty", None) or 1.0

    @property
    def costs(self) -> Costs:
        """What passes of the model take, as far as this engine's requests have seen."""
        return self._drafting.costs

    def prepare(self) -> None:
        """Makes now what the first request would otherwise wait for: the low-bit copies that plans use."""
        atlas = self.atlas
        routed = [atlas.plan_for(label) for label in (*atlas.labels, None)] if atlas is not None else []
        for plan in routed or [general_plan(self.target)]:
            self.target.prepare(plan)

    def encode(self, prompt: PromptLike, chat: bool = True) -> list[int]:
        """The token ids of a prompt: a user's message, a conversation, or token ids as they are.

        Raises:
            PromptError: an empty prompt, one that fills the context, or text without a tokenizer.
        """
        token_ids = encode(self.tokenizer, prompt, self.target.context_length, chat)
        unknown = [token for token in token_ids if not 0 <= token < self.target.vocab_size]
        if unknown:
            raise PromptError(
                f"the prompt has the token id {unknown[0]}, and the model's vocabulary is {self.target.vocab_size}",
                "Use the tokenizer that belongs to the model.",
            )
        return token_ids

    def generate(self, prompt: PromptLike, **options: Any) -> Generation:
        """The whole output for a prompt; options as in `stream`."""
        return self.stream(prompt, **options).result

    def stream(
        self,
        prompt: PromptLike,
        *,
        max_new_tokens: int | None = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        plain: bool = False,
        domain: str | None = None,
        plan: Plan | None = None,
        adaptive: bool | None = None,
        chat: bool = True,
        logprobs: int | None = None,
    ) -> Stream:
        """Runs the prompt, routes it, and gives the output round by round.

        Args:
            prompt: a user's message, a conversation of role/content messages, or token ids.
            max_new_tokens: the longest output; None is up to the model's context.
            temperature, top_k, top_p, min_p, seed: see `SamplingParams`.
            repetition_penalty: see there; None is what the model's generation config says, as in transformers.
            stop: strings that end the output; they are not part of the text.
            plain: decode without drafts.
            domain: use this label's plan, whatever the route.
            plan: use this plan, whatever the route.
            adaptive: within the plan's policy, choose each round who drafts and how far by expected tokens per second;
                else follow the policy to the letter. None is adaptive unless a `plan` is given; for sampling with a
                `seed`, whose draws depend on what was drafted, by costs on paper and by this request alone.
            chat: put text through the tokenizer's chat template if it has one.
            logprobs: for each token, tell its logarithmic probability and those of so many likeliest; None is neither.

        Raises:
            PromptError: a prompt that cannot be used.
            UsageError: an option out of its range, or an unknown domain.
        """
        if repetition_penalty is None:
            repetition_penalty = self.repetition_penalty
        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        sampler = Sampler.from_params(params, self.target.device)
        token_ids = self.encode(prompt, chat)
        limit = self._limit(len(token_ids), max_new_tokens)
        text = self._text((stop,) if isinstance(stop, str) else tuple(stop))
        if logprobs is not None and logprobs < 0:
            raise UsageError(f"logprobs must be 0 or more, got {logprobs}")

        session = self.target.open(len(token_ids) + limit, self._prefixes)
        prefill = session.prefill(token_ids)
        started = time.perf_counter()
        route = self._route(prefill)
        chosen = self._choose_plan(route, plain, domain, plan)
        route_sec = time.perf_counter() - started
        reproducible = adaptive is None and plan is None and not params.greedy and seed is not None
        adaptive = plan is None if adaptive is None else adaptive
        label = domain or (route.plan_label if route is not None else None)
        source = self._source(session, chosen, sampler, label, adaptive, reproducible)
        at_limit = FinishReason.LENGTH if limit == max_new_tokens else FinishReason.CONTEXT
        pieces: list[str] = []
        ends = self._ending(text, pieces)
        rounds = decode(
            session, token_ids, prefill.logits, source, sampler, limit, ends, at_limit, self.clock, logprobs
        )
        if adaptive and not reproducible and not plain:
            rounds = self._remembering(rounds, label, token_ids)
        steps = self._steps(session, rounds, text, pieces, route, chosen, prefill, route_sec)
        return Stream(route, chosen, len(token_ids), steps)  # which grow from the first step on

    def custom_generate(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,  # transformers would give a mask twice to a callable that names it
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """For `model.generate(**inputs, custom_generate=engine.custom_generate)`; transformers drops a `streamer` on
        the way.

        Raises:
            UsageError: another model, more than one prompt, padding, beams, or a processor that keeps state.
            PromptError: a prompt that fills the context.
        """
        self._check_custom(model, input_ids, logits_processor, generation_config, model_kwargs.get("attention_mask"))
        token_ids = self.encode(input_ids[0].tolist())
        limit = min(int(generation_config.max_length), self.target.context_length) - len(token_ids)
        sampler = Sampler(logits_processor, greedy=not generation_config.do_sample)
        session = self.target.open(len(token_ids) + limit, self._prefixes)
        context = list(token_ids)

        def ends(token: int) -> FinishReason | None:
            so_far = torch.tensor([[*context]], device=input_ids.device)
            return FinishReason.STOP if bool(stopping_criteria(so_far, None).all()) else None

        try:
            prefill = session.prefill(token_ids)
            route = self._route(prefill)
            chosen = self._choose_plan(route, plain=False, domain=None, plan=None)
            label = route.plan_label if route is not None else None
            source = self._source(session, chosen, sampler, label, reproducible=not sampler.greedy)
            for _round in decode(session, context, prefill.logits, source, sampler, limit, ends):
                pass
        finally:
            session.close()
        sequences = torch.tensor([context], dtype=input_ids.dtype, device=input_ids.device)
        if not generation_config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]

    def _source(
        self,
        session: Session,
        plan: Plan,
        sampler: Sampler,
        label: str | None,
        adaptive: bool = True,
        reproducible: bool = False,
    ) -> DraftSource | None:
        self.target.prepare(plan)
        agreement = None
        if self.atlas is not None and plan == self.atlas.plan_for(label):
            agreement = self.atlas.evidence_of(label).get("agreement")
        return self._drafting.source(
            session,
            plan,
            sampler,
            label=label,
            agreement=agreement,
            adaptive=adaptive,
            reproducible=reproducible,
        )

    def _remembering(self, rounds: Iterator[Round], label: str | None, context: list[int]) -> Iterator[Round]:
        """The rounds; when they have ended, `context`, which they lengthen, is there for later look-ups."""
        yield from rounds
        self._drafting.remember(label, context)

    def _steps(
        self,
        session: Session,
        rounds: Iterator[Round],
        text: TextStream | None,
        pieces: list[str],
        route: Route | None,
        plan: Plan,
        prefill: Prefill,
        route_sec: float,
    ) -> Generator[Chunk, None, Generation]:
        seen: list[Round] = []
        try:
            for current in rounds:
                seen.append(current)
                if current.finish_reason is not None and text is not None:
                    pieces[-1] += text.finish()
                yield Chunk(tuple(pieces[-len(current.tokens) :]), current)
        finally:
            session.close()
        reason = seen[-1].finish_reason
        assert reason is not None
        stats = Stats(
            tokens=sum(len(r.tokens) for r in seen),
            rounds=len(seen),
            drafted=sum(r.drafted for r in seen),
            accepted=sum(r.accepted for r in seen),
            prefill_sec=prefill.seconds,
            route_sec=route_sec,
            decode_sec=sum(r.draft_sec + r.verify_sec for r in seen),
            exactness=self.exactness,
            memory=self.memory,
            reused=prefill.reused,
        )
        token_ids = tuple(token for r in seen for token in r.tokens)
        logprobs = tuple(each for r in seen for each in r.logprobs)
        return Generation("".join(pieces), token_ids, route, plan, stats, reason, logprobs)

    def _text(self, stops: tuple[str, ...]) -> TextStream | None:
        if not all(stops):
            raise UsageError("a stop string must have at least one character, got an empty one")
        if stops and self.tokenizer is None:
            raise UsageError(f"stop strings need a tokenizer, got {list(stops)} and a model without one")
        return TextStream(self.tokenizer, stops) if self.tokenizer is not None else None

    def _ending(self, text: TextStream | None, pieces: list[str]) -> Callable[[int], FinishReason | None]:
        """Adds to `pieces` the text that became certain with each token."""
        eos = eos_token_ids(self.model)

        def ends(token: int) -> FinishReason | None:
            stopped = text.push(token) if text is not None else False
            pieces.append(text.take() if text is not None else "")
            if token in eos:
                return FinishReason.EOS
            return FinishReason.STOP if stopped else None

        return ends

    def _limit(self, prompt_length: int, max_new_tokens: int | None) -> int:
        room = self.target.context_length - prompt_length
        if max_new_tokens is None:
            return room
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        return min(room, max_new_tokens)

    def _route(self, prefill: Prefill) -> Route | None:
        if self.atlas is None or self._router is None:
            return None
        return self._router.predict(prefill.vector(self.atlas.pooling))

    def _choose_plan(self, route: Route | None, plain: bool, domain: str | None, plan: Plan | None) -> Plan:
        if domain is not None and self.atlas is None:
            raise UsageError(f"a domain needs an atlas that knows it, got '{domain}' and no atlas")
        routed = domain if domain is not None else route.plan_label if route is not None else None
        from_atlas = self.atlas.plan_for(routed) if self.atlas is not None else None
        if plain:
            return Plan.plain(self.target.num_layers)
        return plan or from_atlas or general_plan(self.target)

    def _check_custom(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        config: GenerationConfig,
        attention_mask: torch.Tensor | None,
    ) -> None:
        if model is not self.model:
            raise UsageError("custom_generate was called by another model than the engine's own")
        if config.num_beams not in (None, 1):
            raise UsageError(f"custom_generate decodes without beams, got num_beams={config.num_beams}")
        if input_ids.shape[0] != 1:
            raise UsageError(f"custom_generate decodes one prompt at a time, got {input_ids.shape[0]}")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise UsageError("custom_generate takes a prompt without padding, got a mask with zeros in it")
        stateful = [name for p in processors if (name := type(p).__name__) in _STATEFUL_PROCESSORS]
        if stateful:
            raise UsageError(f"{stateful[0]} keeps state between calls and cannot be used with drafts")
