"""The lean target: Llama, Mistral, Qwen2, Qwen3 and kin on the processor, a whole pass in one call of `kernels.c`.

Weights stay where the checkpoint's tensors lie; activations, keys and values are float32. A row's logits are the same
bits whatever block it is computed in, by construction: so speculative output is plain decoding's, bit for bit, and in
bfloat16 it is what the same weights give in float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from knn_ssd.errors import UnsupportedModelError, UsageError
from knn_ssd.plan import Mode, Plan
from knn_ssd.target.contract import Exactness
from knn_ssd.target.exactness import probe
from knn_ssd.target.fused_session import FusedSession, Pass, Passed
from knn_ssd.target.linear import KINDS, Keeper, LowBit, matrix_of
from knn_ssd.target.native import Attention, Matrix, Mlp, Place, address, kernels, why_unavailable
from knn_ssd.target.prefixes import Prefixes
from knn_ssd.target.structure import context_length, find_structure

LEAN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_SAMPLE = 64  # tokens whose activations low-bit copies are fitted to
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
        self.gather: Callable[[Pass], Passed] | None = None
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

    def open(self, capacity: int, prefixes: Prefixes | None = None) -> FusedSession:
        return FusedSession(self, capacity, prefixes)

    def run(self, wanted: Pass) -> Passed:
        """A pass; whoever gathers passes may run it with others."""
        return self.gather(wanted) if self.gather is not None else self.run_together([wanted])[0]

    def run_together(self, passes: Sequence[Pass]) -> list[Passed]:
        """Passes of several sessions; those under the same modes read the weights once for all their rows."""
        groups: dict[int, list[Pass]] = {}
        for wanted in passes:
            groups.setdefault(id(self.way(wanted.plan)), []).append(wanted)
        done: dict[int, Passed] = {}
        for group in groups.values():
            for wanted, passed in zip(group, self._run_rows(group, self.way(group[0].plan)), strict=True):
                done[id(wanted)] = passed
        return [done[id(wanted)] for wanted in passes]

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

    def run_layer(self, layer: int, states: torch.Tensor, places: Sequence[Place]) -> torch.Tensor:
        """States (m, D) after one layer of the full model, each at its place in that layer's cache."""
        way = self.way(None)
        x = states.clone(memory_format=torch.contiguous_format)
        attention, mlp = ((ctypes.c_void_p * 1)(pointers[layer]) for pointers in (way.attentions, way.mlps))
        self.kernels.knn_ssd_pass(attention, mlp, 1, (Place * len(places))(*places), len(places), address(x))
        return x

    def _run_tokens(self, attentions: Sequence[Attention], mlps: Sequence[Mlp], head: Matrix) -> None:
        """Tokens from all over the vocabulary through sublayers and head like the model's own."""
        count = min(_SAMPLE, self.context_length)
        session = self.open(count)
        tokens = [i * self.vocab_size // count for i in range(count)]
        kept = (Mode.KEEP,) * self.num_layers
        way = _Way(_pointers(kept, attentions, attentions.__getitem__), _pointers(kept, mlps, mlps.__getitem__), head)
        self._run_rows([Pass(session, tokens, None, wanted=count)], way)
        session.close()

    def _run_rows(self, passes: Sequence[Pass], way: _Way) -> list[Passed]:
        counts = [len(wanted.token_ids) for wanted in passes]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        total = ends[-1]
        rows = [row for end, wanted in zip(ends, passes, strict=True) for row in range(end - wanted.wanted, end)]
        positions = self.positions(max(p.session.length + n for p, n in zip(passes, counts, strict=True)))
        places = [p.session.place(n, p.run_length, positions) for p, n in zip(passes, counts, strict=True)]
        tokens = [token for wanted in passes for token in wanted.token_ids]
        x = self.embedding[torch.tensor(tokens)].float()  # (n, D)
        hidden, logits = torch.empty_like(x), torch.empty(len(rows), self.vocab_size)
        call = self.kernels
        call.knn_ssd_pass(
            way.attentions, way.mlps, self.num_layers, (Place * len(places))(*places), len(places), address(x)
        )
        call.knn_ssd_head(
            way.head,
            address(self.norm),
            self.epsilon,
            address(x),
            total,
            (ctypes.c_int64 * len(rows))(*rows),
            len(rows),
            address(hidden),
            address(logits),
        )
        wanted_rows = torch.split(logits, [wanted.wanted for wanted in passes])
        return list(zip(torch.split(hidden, counts), wanted_rows, strict=True))

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
    """The sublayers of passes, as the kernels take them."""

    attentions: Any
    mlps: Any
    head: Matrix


def _pointers(modes: Sequence[Mode], kept: Sequence[Any], low: Callable[[int], Any]) -> Any:
    """Where each layer's sublayer lies in its mode; null where it is skipped."""
    made = {Mode.KEEP: kept.__getitem__, Mode.LOW: low}
    addresses = [None if mode is Mode.SKIP else ctypes.addressof(made[mode](i)) for i, mode in enumerate(modes)]
    return (ctypes.c_void_p * len(addresses))(*addresses)
