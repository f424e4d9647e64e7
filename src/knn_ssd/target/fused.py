"""The lean target: Llama, Mistral, Qwen2, Qwen3 and kin on the processor, a whole pass in one call of `kernels.c`.

Weights stay where the checkpoint's tensors lie; activations, keys and values are float32. A row's logits are the same
bits whatever block it is computed in, by construction: so speculative output is plain decoding's, bit for bit, and in
bfloat16 it is what the same weights give in float32.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from knn_ssd.errors import UnsupportedModelError, UsageError
from knn_ssd.plan import Mode, Plan
from knn_ssd.target.contract import Exactness, Prefill
from knn_ssd.target.exactness import probe
from knn_ssd.target.linear import KINDS, Keeper, LowBit, matrix_of
from knn_ssd.target.native import Attention, Matrix, Mlp, Place, address, kernels, why_unavailable
from knn_ssd.target.pointer import Pointed
from knn_ssd.target.structure import context_length, find_structure

LEAN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_CHUNK = 64  # rows of a prompt that go through the layers together
_FIRST_POSITIONS = 2048


def why_not(model: PreTrainedModel) -> str | None:
    """None if the model can run on the lean target here, else the reason."""
    return next(_obstacles(model), None)


def _obstacles(model: PreTrainedModel) -> Iterator[str]:
    """Why a model cannot run here; each is looked for only where those before it are not in the way."""
    config = model.config
    if config.model_type not in LEAN_FAMILIES:
        yield f"the architecture {config.model_type} is not among {', '.join(LEAN_FAMILIES)}"
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        yield "it has no LM head"
    if any(weight.device.type != "cpu" for weight in model.parameters()):
        yield "it is not on the processor"
    if strange := _strange_modules(model):
        yield f"it has been changed: {strange}"
    if config.hidden_act != "silu":
        yield f"its activation is {config.hidden_act}"
    if unavailable := why_unavailable():
        yield unavailable
    lanes = kernels().knn_ssd_lanes()
    layers: Any = model.base_model.layers
    widths = {module.in_features for module in model.modules() if isinstance(module, nn.Linear)}
    if odd := sorted(width for width in widths if width % (2 * lanes)):
        yield f"a width of {odd[0]} is no multiple of {2 * lanes}"
    if layers[0].self_attn.head_dim % lanes:
        yield f"heads of {layers[0].self_attn.head_dim} are no multiple of {lanes}"


def _strange_modules(model: PreTrainedModel) -> str | None:
    """What is not as the family's own code has it: wrapped or hooked modules, other dtypes, strided weights."""
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


class FusedTarget:
    """A Llama-like decoder as a target.

    Args:
        model: on the processor, in float32 or bfloat16; left as it is.

    Raises:
        UnsupportedModelError: another kind of model, or no kernels here; says why.
    """

    modes = frozenset({Mode.KEEP, Mode.SKIP, Mode.LOW})

    def __init__(self, model: PreTrainedModel) -> None:
        if reason := why_not(model):
            raise UnsupportedModelError(f"{type(model).__name__} cannot run on the lean target: {reason}")
        self.structure = find_structure(model)
        self.model: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
        config = model.config
        self.num_layers = len(self.structure.layers)
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self.context_length = context_length(config)
        self.device = torch.device("cpu")
        self.kernels = kernels()
        self._keeper = Keeper()
        self.attentions = [self._attention(layer) for layer in self.structure.layers]
        self.mlps = [self._mlp(layer) for layer in self.structure.layers]
        base: Any = model.base_model
        self.embedding: torch.Tensor = base.embed_tokens.weight.detach()
        self.norm, self.epsilon = self._float(base.norm.weight), float(base.norm.variance_epsilon)
        self.head = matrix_of(model.get_output_embeddings(), self._keeper)  # type: ignore[no-untyped-call]
        self.low = LowBit(self.attentions, self.mlps, self.head, self._run_tokens)
        self._rotary = base.rotary_emb
        self._positions = self._positions_up_to(min(_FIRST_POSITIONS, self.context_length))
        self._ways: dict[tuple[tuple[Mode, ...], Mode] | None, _Way] = {}
        self._exactness: Exactness | None = None

    @property
    def exactness(self) -> Exactness:
        if self._exactness is None:
            self._exactness = probe(self)
        return self._exactness

    @property
    def low_bit_bytes(self) -> int:
        return self.low.bytes

    def prepare(self, plan: Plan) -> None:
        """Makes the low-bit copies that a plan uses."""
        self.way(plan)

    def open(self, capacity: int) -> FusedSession:
        return FusedSession(self, capacity)

    def positions(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (at least `count`, rotary), float32."""
        known = len(self._positions[0])
        if known < count:  # never beyond the context, where some rotary embeddings change
            self._positions = self._positions_up_to(max(count, min(2 * known, self.context_length)))
        return self._positions

    def way(self, plan: Plan | None) -> _Way:
        """How a plan runs; None is the full model."""
        key = None if plan is None else (plan.modes, plan.head)
        if key not in self._ways:
            self._ways[key] = self._make_way(plan)
        return self._ways[key]

    def _make_way(self, plan: Plan | None) -> _Way:
        if plan is None:
            plan = Plan.plain(self.num_layers)
        if plan.num_layers != self.num_layers:
            raise UsageError(f"a plan for {plan.num_layers} layers was given to a model of {self.num_layers}")
        head = self.low.head() if plan.head is Mode.LOW else self.head
        attentions = _pointers(plan.attention, self.attentions, self.low.attention)
        return _Way(attentions, _pointers(plan.mlp, self.mlps, self.low.mlp), head)

    def _run_tokens(self, attentions: Sequence[Attention], mlps: Sequence[Mlp], head: Matrix) -> None:
        """Tokens from all over the vocabulary through sublayers and head like the model's own."""
        count = min(_CHUNK, self.context_length)
        session = self.open(count)
        kept = (Mode.KEEP,) * self.num_layers
        way = _Way(_pointers(kept, attentions, attentions.__getitem__), _pointers(kept, mlps, mlps.__getitem__), head)
        session.run([i * self.vocab_size // count for i in range(count)], way, wanted=count)
        session.close()

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
class _Way:
    """The sublayers of a pass, as the kernels take them."""

    attentions: Any
    mlps: Any
    head: Matrix


def _pointers(modes: Sequence[Mode], kept: Sequence[Any], low: Callable[[int], Any]) -> Any:
    """Where each layer's sublayer lies in its mode; null where it is skipped."""
    made = {Mode.KEEP: kept.__getitem__, Mode.LOW: low}
    addresses = [None if mode is Mode.SKIP else ctypes.addressof(made[mode](i)) for i, mode in enumerate(modes)]
    return (ctypes.c_void_p * len(addresses))(*addresses)


class FusedSession(Pointed):
    """One request on a `FusedTarget`; see `contract.Session`."""

    def __init__(self, target: FusedTarget, capacity: int) -> None:
        super().__init__(capacity)
        self._target = target
        first = target.attentions[0]
        shape = (target.num_layers, first.kv_heads, capacity, first.head_dim)
        self._keys, self._values = torch.empty(shape), torch.empty(shape)

    def prefill(self, token_ids: list[int]) -> Prefill:
        assert self.length == 0, "prefill is for an empty session"
        started = time.perf_counter()
        total = torch.zeros(self._target.hidden_size, dtype=torch.float64)
        for start in range(0, len(token_ids), _CHUNK):
            chunk = token_ids[start : start + _CHUNK]
            is_last = start + _CHUNK >= len(token_ids)
            hidden, logits = self.run(chunk, self._target.way(None), wanted=1 if is_last else 0)
            self._pointer.ran(len(chunk), None)
            self._pointer.commit(len(chunk))
            total += hidden.sum(dim=0, dtype=torch.float64)
        mean = (total / len(token_ids)).float()
        return Prefill(logits[-1], mean, hidden[-1].clone(), time.perf_counter() - started)

    def forward(self, token_ids: list[int], plan: Plan | None = None) -> torch.Tensor:
        self._pointer.check(plan)
        _, logits = self.run(token_ids, self._target.way(plan), wanted=len(token_ids))
        self._pointer.ran(len(token_ids), plan)
        return logits

    def rehearse(self, token_ids: list[int], plan: Plan, run_length: int) -> torch.Tensor:
        _, logits = self.run(token_ids, self._target.way(plan), wanted=len(token_ids), rehearsed=run_length)
        return logits

    def close(self) -> None:
        self._keys = self._values = torch.empty(0)

    def run(
        self, token_ids: list[int], way: _Way, wanted: int, rehearsed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (n, D) after the final norm, and logits (wanted, V) of the last rows, at the pointer, which
        stays where it is; with a length of runs, as a rehearsal.
        """
        target, count = self._target, len(token_ids)
        self._pointer.check_room(count)
        cosines, sines = target.positions(self.length + count)
        place = Place(
            address(cosines),
            address(sines),
            address(self._keys),
            address(self._values),
            self.capacity,
            self.length,
            rehearsed,
        )
        x = target.embedding[torch.tensor(token_ids)].float()  # (n, D)
        hidden, logits = torch.empty_like(x), torch.empty(wanted, target.vocab_size)
        call = target.kernels
        call.knn_ssd_pass(way.attentions, way.mlps, target.num_layers, place, address(x), count)
        call.knn_ssd_head(
            way.head,
            address(target.norm),
            target.epsilon,
            address(x),
            count,
            count - wanted,
            address(hidden),
            address(logits),
        )
        return hidden, logits
