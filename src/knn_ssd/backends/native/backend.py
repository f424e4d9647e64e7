"""The native backend: Llama, Mistral, Qwen2, Qwen3 and kin on the CPU, a whole forward pass in one call of C code.

Weights are read where the checkpoint's tensors lie; activations, keys and values are float32. By construction, a row's
logits have the same bits in whatever block of rows it is computed. So speculative output equals plain decoding's bit
for bit, and bfloat16 weights give what the same weights give in float32.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from knn_ssd.backends.base import Exactness, Forward, ForwardOutput, ForwardRequest
from knn_ssd.backends.exactness import probe
from knn_ssd.backends.native.kv_cache import KVCache
from knn_ssd.backends.native.low_bit import KINDS, SAMPLE_TOKENS, LowBitCopies, TensorKeeper, matrix_of
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.backends.native.session import NativeSession
from knn_ssd.backends.structure import context_length, find_structure
from knn_ssd.errors import UnsupportedModelError, UsageError
from knn_ssd.kernels.binding import Attention, BatchEntry, Matrix, Mlp, address, kernels, kernels_obstacle
from knn_ssd.plan import Mode, Plan
from knn_ssd.progress import NoProgress, Progress
from knn_ssd.weight_cache import WeightCache

NATIVE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_FIRST_POSITIONS = 2048  # in the rotary tables at first


def native_obstacle(model: PreTrainedModel) -> str | None:
    """None if the model can run on the native backend on this machine, else the reason."""
    return next(_obstacles(model), None)


def _obstacles(model: PreTrainedModel) -> Iterator[str]:
    """The reasons why a model cannot run, in order; each check relies on those before it."""
    config = model.config
    if config.model_type not in NATIVE_FAMILIES:
        yield f"the architecture {config.model_type} is not among {', '.join(NATIVE_FAMILIES)}"
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        yield "it has no LM head"
    if any(weight.device.type != "cpu" for weight in model.parameters()):
        yield "its weights are not on the CPU"
    if modification := _modification(model):
        yield f"it was modified: {modification}"
    if config.hidden_act != "silu":
        yield f"its activation function is {config.hidden_act}"
    if unavailable := kernels_obstacle():
        yield unavailable
    lanes = kernels().knn_ssd_lanes()
    layers: Any = model.base_model.layers
    widths = {module.in_features for module in model.modules() if isinstance(module, nn.Linear)}
    if odd := sorted(width for width in widths if width % (2 * lanes)):
        yield f"a linear layer has {odd[0]} inputs, which is not a multiple of {2 * lanes}"
    if layers[0].self_attn.head_dim % lanes:
        yield f"its head size is {layers[0].self_attn.head_dim}, which is not a multiple of {lanes}"


def _modification(model: PreTrainedModel) -> str | None:
    """The first difference from the family's own code: a wrapped or hooked module, another dtype, a strided weight."""
    for name, module in model.named_modules():
        own = (
            type(module).__module__
            == f"transformers.models.{model.config.model_type}.modeling_{model.config.model_type}"
        )
        known = (
            own or type(module) in (nn.Linear, nn.Embedding, nn.ModuleList) or "activations" in type(module).__module__
        )
        if not known:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"{name or 'the model'} is hooked"
    for name, weight in model.named_parameters():
        if weight.dtype not in KINDS or not weight.is_contiguous():
            return f"{name} is {str(weight.dtype).removeprefix('torch.')}"
    return None


class NativeBackend:
    """Executes a Llama-like target model with the C kernels; see `base.Backend`.

    Args:
        model: a model on the CPU, in float32 or bfloat16; it is not changed.
        weight_cache: where 4-bit copies of its weights are kept; None keeps none.

    Raises:
        UnsupportedModelError: the model is of another kind, or there are no kernels; the message says why.
    """

    modes = frozenset({Mode.KEEP, Mode.SKIP, Mode.LOW})

    def __init__(self, model: PreTrainedModel, weight_cache: WeightCache | None = None) -> None:
        if reason := native_obstacle(model):
            raise UnsupportedModelError(f"{type(model).__name__} cannot run on the native backend: {reason}")
        self.structure = find_structure(model)
        self.model: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
        config = model.config
        self.num_layers = len(self.structure.layers)
        self.hidden_size = int(config.hidden_size)
        self.context_length = context_length(config)
        self.device = torch.device("cpu")
        self.kernels = kernels()
        self._keeper = TensorKeeper()
        self.attentions = [self._attention(layer) for layer in self.structure.layers]
        self.mlps = [self._mlp(layer) for layer in self.structure.layers]
        base: Any = model.base_model
        self.embedding: torch.Tensor = base.embed_tokens.weight.detach()
        self.norm, self.epsilon = self._float(base.norm.weight), float(base.norm.variance_epsilon)
        self.head = matrix_of(model.get_output_embeddings(), self._keeper)  # type: ignore[no-untyped-call]
        self.vocab_size = int(self.head.rows)  # it may be padded beyond config.vocab_size
        self.low = LowBitCopies(self.attentions, self.mlps, self.head, self._run_sample, weight_cache)
        self._rotary, self._rotary_lock = base.rotary_emb, threading.Lock()
        self._positions = self._positions_up_to(min(_FIRST_POSITIONS, self.context_length))
        self._resolved: dict[tuple[tuple[Mode, ...], Mode] | None, _ResolvedPlan] = {}
        self._exactness: Exactness | None = None

    @property
    def exactness(self) -> Exactness:
        if self._exactness is None:
            self._exactness = probe(self)
        return self._exactness

    @property
    def low_bit_bytes(self) -> int:
        return self.low.bytes

    def prepare(self, plan: Plan, progress: Progress | None = None) -> None:
        """Makes the 4-bit copies that a plan uses, or all of them if they are kept in a weight cache."""
        self._resolve(plan, progress)

    def replace_low_bit(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Replaces all 4-bit copies, and returns those of before. No forward pass may be running."""
        self._resolved.clear()
        return self.low.replace(tensors)

    def open(
        self, capacity: int, prefix_cache: PrefixCache | None = None, forward: Forward | None = None
    ) -> NativeSession:
        first = self.attentions[0]
        cache = KVCache(self.num_layers, first.kv_heads, capacity, first.head_dim)
        return NativeSession(cache, self.hidden_size, forward or self.forward, prefix_cache)

    def forward(self, request: ForwardRequest) -> ForwardOutput:
        return self.forward_batch([request])[0]

    def forward_batch(self, requests: Sequence[ForwardRequest]) -> list[ForwardOutput]:
        """Runs the rows of several sessions; rows under the same modes read the weights once.

        Args:
            requests: one for each session of this backend.

        Returns:
            The outputs in the same order; each has the bits that it would have alone.
        """
        groups: dict[int, list[ForwardRequest]] = {}
        for request in requests:
            groups.setdefault(id(self._resolve(request.plan)), []).append(request)
        outputs: dict[int, ForwardOutput] = {}
        for group in groups.values():
            for request, output in zip(group, self._run_rows(group, self._resolve(group[0].plan)), strict=True):
                outputs[id(request)] = output
        return [outputs[id(request)] for request in requests]

    def embed(self, token: int) -> torch.Tensor:
        """The hidden state (1, D) of a token before the first layer."""
        return self._embed([token])

    def run_layer(self, layer: int, states: torch.Tensor, cache: KVCache, position: int) -> torch.Tensor:
        """Hidden states (m, D) after one layer of the full model, each as if it were the only row at `position`.

        The KV cache is not written.

        Args:
            layer: index of the layer.
            states: hidden states (m, D) before the layer.
            cache: KV cache with the tokens before `position`.
            position: position of every row, in tokens.
        """
        plan = self._resolve(None)
        x = states.clone(memory_format=torch.contiguous_format)
        attention, mlp = ((ctypes.c_void_p * 1)(addresses[layer]) for addresses in (plan.attentions, plan.mlps))
        tensors = (*self._rotary_tables(position + 1), *(part[layer] for part in cache.tensors))
        entry = BatchEntry(*map(address, tensors), cache.capacity, position, 1, 1)
        entries = (BatchEntry * len(states))(*[entry] * len(states))
        self.kernels.knn_ssd_forward(attention, mlp, 1, entries, len(states), address(x))
        return x

    def _embed(self, tokens: Sequence[int]) -> torch.Tensor:
        """The embeddings (n, D) of tokens in float32. By numpy: torch would use threads, which then spin for a while on
        the cores that the kernels' threads need.
        """
        if self.embedding.dtype is torch.float32:
            return torch.from_numpy(self.embedding.numpy()[tokens])
        halves = self.embedding.view(torch.int16).numpy()[tokens]  # the upper halves of float32 values
        return torch.from_numpy((halves.astype(np.int32) << 16).view(np.float32))

    def _rotary_tables(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (at least `count`, rotary) in float32."""
        with self._rotary_lock:
            known = len(self._positions[0])
            if known < count:  # never beyond the context length, where some rotary embeddings change
                self._positions = self._positions_up_to(max(count, min(2 * known, self.context_length)))
            return self._positions

    def _resolve(self, plan: Plan | None, progress: Progress | None = None) -> _ResolvedPlan:
        """The sublayers that run under a plan; None is the full model."""
        key = None if plan is None else (plan.modes, plan.head)
        resolved = self._resolved.get(key)
        return resolved or self._resolved.setdefault(key, self._make_resolved(plan, progress))  # one for all threads

    def _make_resolved(self, plan: Plan | None, progress: Progress | None) -> _ResolvedPlan:
        if plan is None:
            plan = Plan.plain(self.num_layers)
        if plan.num_layers != self.num_layers:
            raise UsageError(f"a plan for {plan.num_layers} layers was given to a model of {self.num_layers}")
        self.low.prepare(plan, progress or NoProgress())
        head = self.low.head() if plan.head is Mode.LOW else self.head
        attentions = _addresses(plan.attention, self.attentions, self.low.attention)
        return _ResolvedPlan(attentions, _addresses(plan.mlp, self.mlps, self.low.mlp), head)

    def _run_sample(self, attentions: Sequence[Attention], mlps: Sequence[Mlp], head: Matrix) -> None:
        """Runs tokens spread over the vocabulary through the model's sublayers and head, or copies of them."""
        count = min(SAMPLE_TOKENS, self.context_length)
        session = self.open(count)
        tokens = [i * self.vocab_size // count for i in range(count)]
        kept = (Mode.KEEP,) * self.num_layers
        sampled = _ResolvedPlan(
            _addresses(kept, attentions, attentions.__getitem__), _addresses(kept, mlps, mlps.__getitem__), head
        )
        self._run_rows([ForwardRequest(tokens, 0, session.cache, None, num_logits=count)], sampled)
        session.close()

    def _run_rows(self, requests: Sequence[ForwardRequest], plan: _ResolvedPlan) -> list[ForwardOutput]:
        counts = [len(request.token_ids) for request in requests]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        total = ends[-1]
        rows = [row for end, r in zip(ends, requests, strict=True) for row in range(end - r.num_logits, end)]
        tables = self._rotary_tables(max(r.position + n for r, n in zip(requests, counts, strict=True)))
        entries = (BatchEntry * len(requests))(*[_batch_entry(request, tables) for request in requests])
        tokens = [token for request in requests for token in request.token_ids]
        x = self._embed(tokens)  # (n, D)
        hidden, logits = torch.empty_like(x), torch.empty(len(rows), self.vocab_size)
        self.kernels.knn_ssd_forward(plan.attentions, plan.mlps, self.num_layers, entries, len(requests), address(x))
        self.kernels.knn_ssd_lm_head(
            plan.head,
            address(self.norm),
            self.epsilon,
            address(x),
            total,
            (ctypes.c_int64 * len(rows))(*rows),
            len(rows),
            address(hidden),
            address(logits),
        )
        if len(requests) == 1:
            return [ForwardOutput(hidden, logits)]
        split_logits = torch.split(logits, [request.num_logits for request in requests])
        return [ForwardOutput(*pair) for pair in zip(torch.split(hidden, counts), split_logits, strict=True)]

    def _attention(self, layer: Any) -> Attention:
        module, keeper = layer.self_attn, self._keeper
        config = module.config
        q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        sliding = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        return Attention(
            *(matrix_of(getattr(module, f"{name}_proj"), keeper) for name in "qkvo"),
            address(self._float(layer.input_layernorm.weight)),
            None if q_norm is None else address(self._float(q_norm.weight)),
            None if k_norm is None else address(self._float(k_norm.weight)),
            float(layer.input_layernorm.variance_epsilon),
            float(module.scaling),
            config.num_attention_heads,
            config.num_key_value_heads,
            module.head_dim,
            module.head_dim,
            sliding or 0,
        )

    def _mlp(self, layer: Any) -> Mlp:
        return Mlp(
            *(matrix_of(getattr(layer.mlp, f"{name}_proj"), self._keeper) for name in ("gate", "up", "down")),
            address(self._float(layer.post_attention_layernorm.weight)),
            float(layer.post_attention_layernorm.variance_epsilon),
        )

    def _float(self, weight: torch.Tensor) -> torch.Tensor:
        result = weight.detach().float().contiguous()
        self._keeper.keep(result)
        return result

    def _positions_up_to(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            cosines, sines = self._rotary(torch.zeros(1), torch.arange(count)[None])
        return cosines[0].contiguous(), sines[0].contiguous()


@dataclass(frozen=True, slots=True)
class _ResolvedPlan:
    """The sublayers and the head under a plan, in the form that the kernels take."""

    attentions: Any
    mlps: Any
    head: Matrix


def _batch_entry(request: ForwardRequest, tables: tuple[torch.Tensor, torch.Tensor]) -> BatchEntry:
    cache: KVCache = request.cache
    tensors = map(address, (*tables, *cache.tensors))
    return BatchEntry(*tensors, cache.capacity, request.position, request.run_length, len(request.token_ids))


def _addresses(modes: Sequence[Mode], kept: Sequence[Any], low: Callable[[int], Any]) -> Any:
    """An array of the addresses of each layer's sublayer in its mode; null where it is skipped."""
    sublayer = {Mode.KEEP: kept.__getitem__, Mode.LOW: low}
    addresses = [None if mode is Mode.SKIP else ctypes.addressof(sublayer[mode](i)) for i, mode in enumerate(modes)]
    return (ctypes.c_void_p * len(addresses))(*addresses)
