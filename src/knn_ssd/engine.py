"""The engine: a model, its tokenizer and an atlas; prompts in, text out, with the route and the rounds behind it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from knn_ssd.atlas import Atlas
from knn_ssd.backends.base import Backend
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.backends.select import select_backend
from knn_ssd.batching import ContinuousBatcher
from knn_ssd.checks import require, require_kind, require_whole
from knn_ssd.errors import PromptError, UsageError
from knn_ssd.grammar_state import GrammarCompiler
from knn_ssd.kernels.binding import set_threads
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.outputs import Generation, Stream
from knn_ssd.owner import Owner, open_answers
from knn_ssd.progress import Progress
from knn_ssd.request import Batcher, EndRule, Request, end_at
from knn_ssd.request_factory import RequestFactory
from knn_ssd.request_options import BatchRequest, RequestOptions
from knn_ssd.routing.answers import AnswerStore
from knn_ssd.routing.plan_choice import PlanChooser, PlanRequest
from knn_ssd.sampling import Sampler, refuse_beams_and_batches, refuse_stateful
from knn_ssd.speculation.cost_model import CostModel, CostProfile, typical_profile
from knn_ssd.speculation.decode import FinishReason
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

CONCURRENCY = 8  # requests that share forward passes by default


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
        set_threads(threads)
        require_whole("neighbours", neighbours)
        require_whole("prefix_cache", prefix_cache)
        require(prefix_cache >= 0, "prefix_cache must be 0 or more bytes", prefix_cache)
        self.model = model
        self.tokenizer = tokenizer
        self._end_of_turn = end_of_turn_ids(model, tokenizer)
        self.atlas = atlas
        self.backend: Backend = backend or select_backend(model)
        self.exactness = self.backend.exactness
        store = open_answers(answers, model, tokenizer, self.backend.vocab_size)
        self.owner = Owner(store, PrefixCache(prefix_cache) if prefix_cache else None)
        if atlas is not None:
            atlas.check(fingerprint(model, tokenizer))
        self._grammars = GrammarCompiler(tokenizer, self.backend.vocab_size)
        self._plans = PlanChooser(self.backend, atlas, neighbours)
        profile = atlas.cost if atlas is not None else typical_profile(self.backend.num_layers)
        self._requests = RequestFactory(self.backend, self._plans, profile)

    def with_batcher(self, batcher: Batcher) -> Engine:
        """An engine on the same model, backend, atlas and owner whose requests run in a batcher."""
        engine = copy.copy(self)
        engine._requests = RequestFactory(self.backend, self._plans, self.cost_profile, batcher)
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
            dtype: "auto" is the checkpoint's own where the device, or the kernels, compute it natively, else float32.
            device: None takes an accelerator if there is one.
            neighbours, answers, prefix_cache, threads: see the class.
            weight_cache: keep packed weights and 4-bit copies in the cache directory, and take them from there.
            revision: a branch, tag or commit of a model on the Hub; None is its main branch.

        Raises:
            ModelError, AtlasError, AnswerStoreError: what cannot be found, read or used together.
        """
        from knn_ssd.loading.resolve import load_model

        set_threads(threads)  # before weights are packed
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
        return self._requests.profile

    @property
    def cost_model(self) -> CostModel:
        """What forward passes cost, as far as this engine's requests have seen."""
        return self._requests.cost_model

    def prepare(self, progress: Progress | None = None) -> None:
        """Makes the 4-bit copies that plans use, and waits for them."""
        for plan in self._plans.plans:
            self.backend.prepare(plan, progress)

    def prepare_later(self, progress: Progress | None = None) -> bool:
        """Whether plans' 4-bit copies are there; if not, they are made in the background, as by the first request."""
        return all(self.backend.prepare_later(plan, progress) for plan in self._plans.plans)

    def use_chat_template(self, template: str) -> None:
        """Replaces the tokenizer's chat template (Jinja), and with it the tokens that end a reply."""
        if self.tokenizer is None:
            raise UsageError("a chat template needs a tokenizer, and the model came without one")
        self.tokenizer.chat_template = template
        self._end_of_turn = end_of_turn_ids(self.model, self.tokenizer)

    def encode(
        self, prompt: PromptLike, chat: bool = True, template: TemplateOptions | None = None, *, name: str = ""
    ) -> list[int]:
        """The token ids of a prompt; see `tokenization.encode`. Ids that the model lacks are a `PromptError`."""
        token_ids = encode(self.tokenizer, prompt, self.backend.context_length, chat, name=name, template=template)
        size = self.backend.vocab_size
        if unknown := [token for token in token_ids if not 0 <= token < size]:
            the_prompt = f"prompt '{name}'" if name else "the prompt"
            message = f"{the_prompt} has the token id {unknown[0]}, and the model's vocabulary is {size}"
            raise PromptError(message, "Use the tokenizer that belongs to the model.")
        return token_ids

    def generate(self, prompt: PromptLike, **options: Any) -> Generation:
        """The whole output for a prompt; arguments and errors as in `stream`."""
        return self.stream(prompt, **options).result

    def stream(self, prompt: PromptLike, **options: Any) -> Stream:
        """Runs the prompt, routes it, and gives the output round by round.

        Args:
            prompt: a user's message, a conversation of role/content messages, or token ids.
            options: see `RequestOptions`.

        Raises:
            PromptError: a prompt that cannot be used.
            UsageError: an option that cannot be used.
            MemoryLimitError: prompt and longest output do not fit into memory, or an output finds none to go on.
        """
        wanted = self.check_options(options)
        token_ids = self.encode(prompt, wanted.chat)
        limit = self._limit(len(token_ids), wanted.max_new_tokens)
        eos = eos_token_ids(self.model) | (self._end_of_turn if isinstance(token_ids, ChatIds) else frozenset())
        ends = end_at(() if wanted.ignore_eos else eos, wanted.stop_token_ids)
        grammar = self._grammars.start(wanted.grammar, len(token_ids), eos) if wanted.grammar is not None else None
        request = self._open(
            token_ids,
            limit,
            Sampler.from_params(wanted, self.backend.device, len(token_ids), {*eos, *wanted.stop_token_ids}, grammar),
            ends,
            wanted.plan_request,
            owner=wanted.owner,
            detokenizer=self._detokenizer(wanted),
            store=wanted.store,
            limit_reason=FinishReason.LENGTH if limit == wanted.max_new_tokens else FinishReason.CONTEXT,
            logprobs=wanted.logprobs,
        )
        return request.stream()

    def generate_batch(
        self, prompts: Iterable[PromptLike], *, concurrency: int = CONCURRENCY, **options: Any
    ) -> list[Generation]:
        """The outputs for several prompts, in their order, each the same as `generate` gives for its prompt alone.

        Args:
            prompts: each as in `stream`.
            concurrency: how many requests run at the same time. They share forward passes where the backend can.
            options: of every request; see `RequestOptions`.

        Raises:
            PromptError, UsageError: as in `stream`, before any prompt is run.
        """
        if isinstance(prompts, str):
            raise PromptError("the prompts are one text, and a list of prompts is wanted", "Use `generate` for one.")
        require_kind("prompts", prompts, Iterable, "a list of prompts")
        requests = [BatchRequest(prompt, options, str(place)) for place, prompt in enumerate(prompts)]
        outputs = dict(self.stream_batch(requests, concurrency))
        return [outputs[place] for place in range(len(outputs))]

    def stream_batch(
        self, requests: Sequence[BatchRequest], concurrency: int = CONCURRENCY
    ) -> Iterator[tuple[int, Generation]]:
        """The index and output of each request as it ends. Closing the iterator ends the others where they stand.

        Raises:
            PromptError, UsageError: as in `stream`, before any prompt is run.
        """
        for request in requests:
            require_kind("a request of a batch", request, BatchRequest, "a BatchRequest")
        require_whole("concurrency", concurrency)
        require(concurrency >= 1, "concurrency must be 1 or more", concurrency)
        encoded = [self.encode(each.prompt, self.check_options(each.options).chat, name=each.name) for each in requests]
        batcher = ContinuousBatcher(self.backend, self.cost_profile)
        generate = self.with_batcher(batcher).generate
        works = [partial(generate, ids, **each.options) for ids, each in zip(encoded, requests, strict=True)]
        return batcher.run_all(works, concurrency)

    def check_options(self, options: Mapping[str, Any]) -> RequestOptions:
        """The options of a request, checked against this model and atlas.

        Raises:
            UsageError: an option that cannot be used.
        """
        given = options.get("repetition_penalty")
        penalty = self.repetition_penalty if given is None else given
        wanted = RequestOptions.of({**options, "repetition_penalty": penalty})
        wanted.check_tokens(self.backend.vocab_size, self.tokenizer is not None)
        if wanted.grammar is not None:
            self._grammars.compile(wanted.grammar)
        self._plans.check(wanted.plan_request)
        return wanted

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

        wanted = PlanRequest(reproducible=not sampler.greedy)
        request = self._open(token_ids, limit, sampler, ends, wanted)
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
        owner: Owner | None = None,
        **options: Any,
    ) -> Request:
        return self._requests.open(token_ids, limit, sampler, ends, wanted, owner or self.owner, **options)

    def _limit(self, prompt_length: int, max_new_tokens: int | None) -> int:
        if max_new_tokens is None:
            return max(1, self.backend.most_tokens() - prompt_length)
        return min(self.backend.context_length - prompt_length, max_new_tokens)

    def _detokenizer(self, wanted: RequestOptions) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer, wanted.stop_strings, wanted.min_tokens)
