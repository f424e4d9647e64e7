"""The native backend: Llama, Mistral, Qwen2, Qwen3 and kin on the CPU, a whole forward pass in one call of C code.

Weights have the checkpoint's values, in the formats of `kernels/weights.py`; activations are float32, and so are keys
and values, unless bfloat16 is asked for. By construction, a row's logits have the same bits in whatever block of rows
it is computed. So speculative output equals plain decoding's bit for bit, and with keys and values in float32, bfloat16
weights give what the same weights give in float32.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from knn_ssd.backends.admission import MemoryAdmission, low_bit_waste
from knn_ssd.backends.base import (
    Exactness,
    Forward,
    ForwardOutput,
    ForwardRequest,
    PlanModes,
    modes_of,
    run_by_modes,
)
from knn_ssd.backends.cursor import Cursor
from knn_ssd.backends.exactness import probe
from knn_ssd.backends.native.kv_cache import KV_DTYPES, KVCache
from knn_ssd.backends.native.low_bit import LowBitCopies
from knn_ssd.backends.native.obstacles import native_obstacle, sliding_window
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.backends.native.resolved_plan import ResolvedPlan, sublayer_addresses
from knn_ssd.backends.native.session import NativeSession
from knn_ssd.backends.packed import PackedWeights
from knn_ssd.backends.structure import context_length, find_structure
from knn_ssd.checks import require
from knn_ssd.errors import MemoryLimitError, UnsupportedModelError, UsageError
from knn_ssd.kernels.binding import Attention, BatchEntry, Matrix, Mlp, address, float32_inputs, kernels
from knn_ssd.kernels.gguf_rows import QuantisedEmbedding, weight_of
from knn_ssd.kernels.quantisation import sample_tokens
from knn_ssd.kernels.weights import is_in_blocks, read_rows, release_unpacked
from knn_ssd.plan import Mode, Plan
from knn_ssd.progress import NoProgress, Progress
from knn_ssd.weight_cache import WeightCache

logger = logging.getLogger(__name__)

_FIRST_POSITIONS = 2048  # in the rotary tables at first
_RELEASED_BYTES = 2**28  # of weights, after which those that they were made from are released


class NativeBackend:
    """Executes a Llama-like target model with the C kernels; see `base.Backend`.

    Args:
        model: a model on the CPU, in float32, float16 or bfloat16, or with a GGUF file's quantised weights; it is not
            changed.
        weight_cache: where packed weights and 4-bit copies are kept; None keeps none.
        kv_dtype: of keys and values, float32 or bfloat16, which takes half the memory and rounds.

    Raises:
        UnsupportedModelError: the model is of another kind, or there are no kernels; the message says why.
        UsageError: another dtype of keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weight_cache: WeightCache | None = None,
        *,
        kv_dtype: torch.dtype = torch.float32,
    ) -> None:
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
        require(kv_dtype in KV_DTYPES, "kv_dtype must be float32 or bfloat16", kv_dtype)
        self.kv_dtype = kv_dtype
        self._packed = PackedWeights(weight_cache)
        self.attentions: list[Attention] = []
        self.mlps: list[Mlp] = []
        released = 0
        for index, layer in enumerate(self.structure.layers):
            self.attentions.append(self._attention(index, layer))
            self.mlps.append(self._mlp(index, layer))
            if self._packed.keeper.bytes > released + _RELEASED_BYTES:
                released = self._packed.keeper.bytes
                release_unpacked(model.parameters())
        base: Any = model.base_model
        self.embedding: torch.Tensor = base.embed_tokens.weight.detach()
        self._quantised = base.embed_tokens if isinstance(base.embed_tokens, QuantisedEmbedding) else None
        self.norm, self.epsilon = self._float(base.norm.weight), float(base.norm.variance_epsilon)
        output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.head = self._matrix("head", output)
        self._is_tied = output.weight is base.embed_tokens.weight and is_in_blocks(self.head)
        self.vocab_size = int(self.head.rows)  # it may be padded beyond config.vocab_size
        self._packed.finish()
        release_unpacked(model.parameters())
        self._rotary, self._rotary_lock = base.rotary_emb, threading.Lock()
        self._positions = self._positions_up_to(min(_FIRST_POSITIONS, self.context_length))
        self._resolved: dict[PlanModes, ResolvedPlan] = {}
        self._exactness: Exactness | None = None
        token_bytes, copy_bytes = self._kv_cache(1).token_bytes
        self._admission = MemoryAdmission(self.weight_bytes, token_bytes + 4 * self.hidden_size, copy_bytes)
        sublayers = self.attentions, self.mlps, self.head
        self.low = LowBitCopies(*sublayers, self._run_sample, weight_cache, self._admission.is_busy)
        self._admission.copies = self.low.maker

    @property
    def exactness(self) -> Exactness:
        if self._exactness is None:
            self._exactness = probe(self)
        return self._exactness

    @functools.cached_property
    def modes(self) -> frozenset[Mode]:
        """All modes, but without 4-bit copies where they are hardly smaller than the weights, or where there is no
        memory for them; a warning says so.
        """
        self._low_bit_obstacle = low_bit_waste(self._packed.num_weights, self._packed.keeper.bytes)
        if self._low_bit_obstacle is None and self.exactness:  # weights were read
            self._low_bit_obstacle = self._admission.low_bit_shortage()
        if self._low_bit_obstacle is None:
            return frozenset(Mode)
        logger.warning("%s drafts without 4-bit weights: %s", type(self.model).__name__, self._low_bit_obstacle)
        return frozenset({Mode.KEEP, Mode.SKIP})

    @property
    def weight_bytes(self) -> int:
        return self._packed.keeper.bytes + (0 if self._is_tied else self.embedding.nbytes)

    @property
    def low_bit_bytes(self) -> int:
        return self.low.bytes

    @property
    def is_preparing(self) -> bool:
        return self.low.maker.is_making

    def prepare(self, plan: Plan, progress: Progress | None = None) -> None:
        """Makes the 4-bit copies that a plan uses, or all of them if they are kept in a weight cache."""
        self._resolve(plan, progress)

    def prepare_later(self, plan: Plan, progress: Progress | None = None) -> bool:
        if modes_of(plan) not in self._resolved:
            self._check_plan(plan)
            if not self.low.prepare_later(plan, progress or NoProgress()):
                return False
            self._resolve(plan)
        return True

    def replace_low_bit(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Replaces all 4-bit copies, and returns those of before. No forward pass may be running."""
        self._resolved.clear()
        return self.low.replace(tensors)

    def open(
        self, capacity: int, prefix_cache: PrefixCache | None = None, forward: Forward | None = None
    ) -> NativeSession:
        cursor = Cursor(capacity, self._admission)
        cache = self._kv_cache(cursor.reserved)
        return NativeSession(cursor, cache, self.hidden_size, forward or self.forward, prefix_cache)

    def most_tokens(self) -> int:
        return self._admission.most_tokens(self.context_length)

    def forward(self, request: ForwardRequest) -> ForwardOutput:
        return self.forward_batch([request])[0]

    def forward_batch(self, requests: Sequence[ForwardRequest]) -> list[ForwardOutput]:
        """Runs the rows of several sessions; rows under the same modes read the weights once.

        Args:
            requests: one for each session of this backend.

        Returns:
            The outputs in the same order; each has the bits that it would have alone.
        """
        return run_by_modes(requests, lambda group: self._run_rows(group, self._resolve(group[0].plan)))

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
        entry = cache.layer_entry(layer, position, self._rotary_tables(position + 1))
        entries = (BatchEntry * len(states))(*[entry] * len(states))
        self.kernels.knn_ssd_forward(attention, mlp, 1, entries, len(states), address(x))
        return x

    def _embed(self, tokens: Sequence[int]) -> torch.Tensor:
        """The embeddings (n, D) of tokens in float32. By numpy: torch would use threads, which then spin for a while on
        the cores that the kernels' threads need.
        """
        if self._is_tied:
            return read_rows(self.head, list(tokens))
        if self._quantised is not None:
            return self._quantised(torch.tensor(tokens))  # type: ignore[no-any-return]
        if self.embedding.dtype is not torch.bfloat16:
            return torch.from_numpy(self.embedding.numpy()[tokens].astype(np.float32, copy=False))
        halves = self.embedding.view(torch.int16).numpy()[tokens]  # the upper halves of float32 values
        return torch.from_numpy((halves.astype(np.int32) << 16).view(np.float32))

    def _rotary_tables(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (at least `count`, rotary) in float32."""
        with self._rotary_lock:
            known = len(self._positions[0])
            if known < count:  # never beyond the context length, where some rotary embeddings change
                self._positions = self._positions_up_to(max(count, min(2 * known, self.context_length)))
            return self._positions

    def _resolve(self, plan: Plan | None, progress: Progress | None = None) -> ResolvedPlan:
        """The sublayers that run under a plan; None is the full model."""
        key = modes_of(plan)
        resolved = self._resolved.get(key)
        return resolved or self._resolved.setdefault(key, self._make_resolved(plan, progress))  # one for all threads

    def _make_resolved(self, plan: Plan | None, progress: Progress | None) -> ResolvedPlan:
        plan = plan or Plan.plain(self.num_layers)
        self._check_plan(plan)
        self.low.prepare(plan, progress or NoProgress())
        head = self.low.head() if plan.head is Mode.LOW else self.head
        attentions = sublayer_addresses(plan.attention, self.attentions, self.low.attention)
        return ResolvedPlan(attentions, sublayer_addresses(plan.mlp, self.mlps, self.low.mlp), head)

    def _check_plan(self, plan: Plan) -> None:
        if plan.num_layers != self.num_layers:
            raise UsageError(f"a plan for {plan.num_layers} layers was given to a model of {self.num_layers}")
        if plan.uses_low and Mode.LOW not in self.modes:
            raise MemoryLimitError(
                self._low_bit_obstacle or "", "Decode plainly, or under a plan without the mode low."
            )

    def _run_sample(self, attentions: Sequence[Attention], mlps: Sequence[Mlp], head: Matrix) -> None:
        """Runs tokens spread over the vocabulary through the model's sublayers and head, or copies of them."""
        tokens = sample_tokens(self.vocab_size, self.context_length)
        session = self.open(len(tokens))
        kept = (Mode.KEEP,) * self.num_layers
        sampled = ResolvedPlan(
            sublayer_addresses(kept, attentions, attentions.__getitem__),
            sublayer_addresses(kept, mlps, mlps.__getitem__),
            head,
        )
        with float32_inputs():
            self._run_rows([ForwardRequest(tokens, 0, session.cache, None, num_logits=len(tokens))], sampled)
        session.close()

    def _run_rows(self, requests: Sequence[ForwardRequest], plan: ResolvedPlan) -> list[ForwardOutput]:
        counts = [len(request.token_ids) for request in requests]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        total = ends[-1]
        rows = [row for end, r in zip(ends, requests, strict=True) for row in range(end - r.num_logits, end)]
        tables = self._rotary_tables(max(r.position + n for r, n in zip(requests, counts, strict=True)))
        entries = (BatchEntry * len(requests))(*[request.cache.batch_entry(request, tables) for request in requests])
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

    def _kv_cache(self, capacity: int) -> KVCache:
        first = self.attentions[0]
        return KVCache(self.num_layers, first.kv_heads, capacity, first.head_dim, self.kv_dtype)

    def _attention(self, index: int, layer: Any) -> Attention:
        module = layer.self_attn
        config = module.config
        q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        return Attention(
            *(self._matrix(f"{index}.{name}", getattr(module, f"{name}_proj")) for name in "qkvo"),
            address(self._float(layer.input_layernorm.weight)),
            None if q_norm is None else address(self._float(q_norm.weight)),
            None if k_norm is None else address(self._float(k_norm.weight)),
            float(layer.input_layernorm.variance_epsilon),
            float(module.scaling),
            config.num_attention_heads,
            config.num_key_value_heads,
            module.head_dim,
            module.head_dim,
            sliding_window(module) or 0,
        )

    def _mlp(self, index: int, layer: Any) -> Mlp:
        return Mlp(
            *(self._matrix(f"{index}.{name}", getattr(layer.mlp, f"{name}_proj")) for name in ("gate", "up", "down")),
            address(self._float(layer.post_attention_layernorm.weight)),
            float(layer.post_attention_layernorm.variance_epsilon),
        )

    def _matrix(self, name: str, linear: Any) -> Matrix:
        return self._packed.matrix(name, weight_of(linear), linear.bias)

    def _float(self, weight: torch.Tensor) -> torch.Tensor:
        result = weight.detach().float().contiguous()
        self._packed.keeper.keep(result)
        return result

    def _positions_up_to(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            cosines, sines = self._rotary(torch.zeros(1), torch.arange(count)[None])
        return cosines[0].contiguous(), sines[0].contiguous()
