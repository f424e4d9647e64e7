"""The engine: a model, its tokenizer and an atlas; prompts in, text out, with the route and the rounds behind it."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from knn_ssd.atlas import Atlas
from knn_ssd.backends.base import Backend
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.backends.select import select_backend
from knn_ssd.errors import PromptError, UsageError
from knn_ssd.kernels.binding import set_threads
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.outputs import Generation, Stream
from knn_ssd.owner import Owner, open_answers
from knn_ssd.plan import Plan
from knn_ssd.progress import Progress
from knn_ssd.request import Batcher, EndRule, Request, Unbatched, end_at
from knn_ssd.routing.answers import AnswerStore
from knn_ssd.routing.plan_choice import PlanChooser, PlanRequest
from knn_ssd.sampling import Sampler, SamplingParams, refuse_beams_and_batches, refuse_stateful
from knn_ssd.speculation.cost_model import CostModel, CostProfile
from knn_ssd.speculation.decode import FinishReason
from knn_ssd.speculation.drafter_factory import DrafterFactory
from knn_ssd.tokenization import ChatIds, Detokenizer, PromptLike, encode, end_of_turn_ids, eos_token_ids
from knn_ssd.tools.memory import MemoryUse

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteriaList,
    )
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    from knn_ssd.tokenization import TemplateOptions


class Engine:
    """Decodes with a model that drafts for itself.

    Several threads may share an engine.

    Args:
        model: a decoder of transformers.
        tokenizer: its tokenizer; None if prompts come as token ids and output is wanted as such.
        atlas: which plan to use for which prompts; without one, all prompts use a general plan: everything in 4 bits
            where the backend can, and lookup.
        neighbours: how many anchors vote on a route.
        answers: where earlier requests are kept, whose answers draft for near ones: a store, a folder, True for memory,
            or False. Output stays the same. Requests that decode plainly, follow a plan of their own to the letter, or
            sample with a seed, unless they ask to be adaptive, neither add to it nor read it: so an output with a
            seed depends on its request alone.
        prefix_cache: how many bytes of KV cache to keep of earlier requests, so that a prompt with the same first
            tokens is only run from where it differs. Output stays the same.
        threads: how many threads compute in this process; None is as many CPUs as it may use, its CPU quota included,
            or KNN_SSD_THREADS if that is fewer.
        backend: executes the model; None takes the native backend where it can, else the transformers backend.

    Raises:
        UnsupportedModelError: a model that cannot draft for itself.
        AtlasMismatchError, AnswerStoreMismatchError: an atlas or an answer store of another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        atlas: Atlas | None = None,
        *,
        neighbours: int = 1,
        answers: AnswerStore | bool | str | Path = True,
        prefix_cache: int = 0,
        threads: int | None = None,
        backend: Backend | None = None,
    ) -> None:
        if threads is not None:
            set_threads(threads)
        if prefix_cache < 0:
            raise UsageError(f"prefix_cache must be 0 or more bytes, got {prefix_cache}")
        self.model = model
        self.tokenizer = tokenizer
        self._end_of_turn = end_of_turn_ids(model, tokenizer)
        self.atlas = atlas
        self.backend: Backend = backend or select_backend(model)
        self.exactness = self.backend.exactness
        store = open_answers(answers, model, tokenizer, self.backend.vocab_size)
        self.owner = Owner(store, PrefixCache(prefix_cache) if prefix_cache else None)
        profile = atlas.cost if atlas is not None else None
        self._drafters = DrafterFactory(self.backend, profile)
        self._batcher: Batcher = Unbatched(self.backend, self._drafters.cost_model)
        if atlas is not None:
            atlas.check(fingerprint(model, tokenizer))
        self._plans = PlanChooser(self.backend, atlas, neighbours)

    def with_batcher(self, batcher: Batcher) -> Engine:
        """An engine on the same model, backend, atlas and owner whose requests run in a batcher."""
        engine = copy.copy(self)
        engine._batcher = batcher
        engine._drafters = DrafterFactory(self.backend, self.cost_profile, batcher.cost_model)
        return engine

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        atlas: Atlas | str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        neighbours: int = 1,
        answers: AnswerStore | bool | str | Path = True,
        prefix_cache: int = 0,
        threads: int | None = None,
        weight_cache: bool = True,
        revision: str | None = None,
    ) -> Engine:
        """Loads a model by Hub id, directory or GGUF file; nothing is the embedded default.

        Args:
            name: which model.
            atlas: an atlas, or the folder of one.
            dtype: "auto" is the checkpoint's own where the device computes it natively, else float32.
            device: None takes an accelerator if there is one.
            neighbours, answers, prefix_cache, threads: see the class.
            weight_cache: keep 4-bit copies of the weights in the cache directory, and take them from there.
            revision: a branch, tag or commit of a model on the Hub; None is its main branch.

        Raises:
            ModelError, AtlasError, AnswerStoreError: what cannot be found, read or used together.
        """
        from knn_ssd.loading.resolve import load_model

        atlas = Atlas.load(atlas) if isinstance(atlas, str | Path) else atlas
        loaded = load_model(name, dtype=dtype, device=device, revision=revision)
        options: dict[str, Any] = {"answers": answers, "prefix_cache": prefix_cache, "threads": threads}
        options["backend"] = select_backend(loaded.model, loaded.directory if weight_cache else None)
        return cls(loaded.model, loaded.tokenizer, atlas, neighbours=neighbours, **options)

    @property
    def memory(self) -> MemoryUse:
        """What the engine and the process hold in memory now."""
        return MemoryUse.now(self.backend.weight_bytes, self.backend.low_bit_bytes)

    @property
    def repetition_penalty(self) -> float:
        """What the model's generation config says, as in transformers; 1 is none."""
        return getattr(self.model.generation_config, "repetition_penalty", None) or 1.0

    @property
    def cost_profile(self) -> CostProfile:
        """What forward passes cost before any ran: the atlas's profile, or a typical one."""
        return self._drafters.profile

    @property
    def cost_model(self) -> CostModel:
        """What forward passes cost, as far as this engine's requests have seen."""
        return self._batcher.cost_model

    def prepare(self, progress: Progress | None = None) -> None:
        """Makes now what the first request would otherwise wait for: the 4-bit copies that plans use."""
        for plan in self._plans.plans:
            self.backend.prepare(plan, progress)

    def encode(self, prompt: PromptLike, chat: bool = True, template: TemplateOptions | None = None) -> list[int]:
        """The token ids of a prompt; see `tokenization.encode`. Ids that the model lacks are a `PromptError`."""
        token_ids = encode(self.tokenizer, prompt, self.backend.context_length, chat, template=template)
        size = self.backend.vocab_size
        if unknown := [token for token in token_ids if not 0 <= token < size]:
            message = f"the prompt has the token id {unknown[0]}, and the model's vocabulary is {size}"
            raise PromptError(message, "Use the tokenizer that belongs to the model.")
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
        store: bool = True,
        owner: Owner | None = None,
    ) -> Stream:
        """Runs the prompt, routes it, and gives the output round by round.

        Args:
            prompt: a user's message, a conversation of role/content messages, or token ids.
            max_new_tokens: the longest output; None is up to the model's context, or to the memory if that is less.
            temperature, top_k, top_p, min_p, seed: see `SamplingParams`.
            repetition_penalty: see there; None is what the model's generation config says, as in transformers.
            stop: strings that end the output; they are not part of the text.
            plain: decode without drafts.
            domain: use this domain's plan, whatever the route.
            plan: use this plan, whatever the route.
            adaptive: within the plan's policy, choose for each round which drafter drafts and how far, by expected
                tokens per second; otherwise follow the policy to the letter. None is adaptive unless a `plan` is given.
                Sampling with a `seed`, whose draws depend on what was drafted, adapts by the cost profile and by this
                request alone.
            chat: put text through the tokenizer's chat template if it has one.
            logprobs: report each token's log-probability and so many of the likeliest tokens; None reports neither.
            store: use the answer store: draft from near requests' answers, and keep this one's for later requests.
            owner: whose answer store and prefix cache are used; None is the engine's own.

        Raises:
            PromptError: a prompt that cannot be used.
            UsageError: an option out of its range, or an unknown domain.
            MemoryLimitError: prompt and longest output do not fit into memory, or an output finds none to go on.
        """
        if repetition_penalty is None:
            repetition_penalty = self.repetition_penalty
        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        token_ids = self.encode(prompt, chat)
        limit = self._limit(len(token_ids), max_new_tokens)
        if logprobs is not None and logprobs < 0:
            raise UsageError(f"logprobs must be 0 or more, got {logprobs}")
        reproducible = adaptive is None and plan is None and not params.greedy and seed is not None
        wanted = PlanRequest(plain, domain, plan, plan is None if adaptive is None else adaptive, reproducible)
        request = self._open(
            token_ids,
            limit,
            Sampler.from_params(params, self.backend.device),
            end_at(eos_token_ids(self.model) | (self._end_of_turn if isinstance(token_ids, ChatIds) else frozenset())),
            wanted,
            detokenizer=self._detokenizer((stop,) if isinstance(stop, str) else tuple(stop)),
            owner=owner,
            store=store,
            limit_reason=FinishReason.LENGTH if limit == max_new_tokens else FinishReason.CONTEXT,
            logprobs=logprobs,
        )
        return request.stream()

    def custom_generate(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,  # transformers would give a mask twice to a callable that names it
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """For `model.generate(…, custom_generate=engine.custom_generate)`; transformers drops a `streamer` on the way.

        Raises:
            UsageError: another model, more than one prompt, padding, beams, or a processor that keeps state.
            PromptError: a prompt that fills the context.
        """
        if model is not self.model:
            raise UsageError("custom_generate was called by another model than the engine's own")
        refuse_beams_and_batches(input_ids, generation_config, model_kwargs.get("attention_mask"))
        refuse_stateful(logits_processor)
        token_ids = self.encode(input_ids[0].tolist())
        limit = min(int(generation_config.max_length), self.backend.context_length) - len(token_ids)
        sampler = Sampler(logits_processor, greedy=not generation_config.do_sample)

        def ends(_token: int) -> FinishReason | None:
            so_far = torch.tensor([request.context], device=input_ids.device)
            return FinishReason.STOP if bool(stopping_criteria(so_far, None).all()) else None

        request = self._open(token_ids, limit, sampler, ends, PlanRequest(reproducible=not sampler.greedy))
        with request:
            for _round in request.rounds():
                pass
        sequences = torch.tensor([request.context], dtype=input_ids.dtype, device=input_ids.device)
        if not generation_config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]

    def _open(
        self,
        token_ids: Sequence[int],
        limit: int,
        sampler: Sampler,
        ends: EndRule,
        wanted: PlanRequest,
        *,
        owner: Owner | None = None,
        store: bool = True,
        **options: Any,
    ) -> Request:
        """A prefilled request with its route, plan, neighbours and drafter."""
        owner = owner or self.owner
        options |= {"batcher": self._batcher, "prefix_cache": owner.prefix_cache}
        request = Request(self.backend, token_ids, limit, sampler, ends, **options)
        try:
            started = time.perf_counter()
            chosen = self._plans.choose(request.prefill, wanted)
            request.route, request.plan = chosen.route, chosen.plan
            if store and wanted.adaptive and not wanted.reproducible and not wanted.plain:
                request.answers = owner.answers
                if chosen.plan.policy.lookup:
                    request.neighbours = owner.neighbours(request.prefill, self.backend.vocab_size)
            request.route_sec = time.perf_counter() - started
            self.backend.prepare(chosen.plan)
            started = time.perf_counter()
            request.drafter = self._drafters.new_drafter(
                request.session,
                chosen.plan,
                sampler,
                domain=chosen.domain,
                agreement=chosen.agreement,
                neighbours=request.neighbours,
                adaptive=wanted.adaptive,
                reproducible=wanted.reproducible,
            )
            request.route_sec += time.perf_counter() - started
        except BaseException:
            request.close()
            raise
        return request

    def _detokenizer(self, stop: tuple[str, ...]) -> Detokenizer | None:
        if not all(stop):
            raise UsageError("a stop string must have at least one character, got an empty one")
        if stop and self.tokenizer is None:
            raise UsageError(f"stop strings need a tokenizer, got {list(stop)} and a model without one")
        return Detokenizer(self.tokenizer, stop) if self.tokenizer is not None else None

    def _limit(self, prompt_length: int, max_new_tokens: int | None) -> int:
        room = self.backend.context_length - prompt_length
        if max_new_tokens is None:
            return max(1, self.backend.most_tokens() - prompt_length)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        return min(room, max_new_tokens)
