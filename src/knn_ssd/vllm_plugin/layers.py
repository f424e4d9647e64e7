"""Runs the sublayers of vLLM's own model one by one under a plan.

They run eagerly, outside the compiled model, on the same weights and the same KV cache. A skipped sublayer adds nothing
to the residual stream (arXiv 2309.08168, section 3).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from knn_ssd.errors import UnsupportedModelError
from knn_ssd.plan import Mode, Plan
from knn_ssd.vllm_plugin.low_bit import LinearCopies, find_low_bit_obstacle

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class DecoderStack:
    """The decoder layers of a loaded model, which can be run one by one.

    Args:
        model: a model of one of `FAMILIES`, as vLLM loaded it.

    Attributes:
        device: the model's device.
        low_bit_obstacle: the reason why `low` sublayers cannot run here; None if they can.

    Raises:
        UnsupportedModelError: a model of another family, or one whose layers lack an expected sublayer.
    """

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        if name not in FAMILIES:
            raise UnsupportedModelError(
                f"knn-ssd does not know the layers of vLLM's {name}", f"It knows {', '.join(FAMILIES)}."
            )
        layers = list(getattr(model.model, "layers", ()))
        missing = [part for layer in layers for part in _PARTS if not hasattr(layer, part)]
        if not layers or missing:
            raise UnsupportedModelError(
                f"the layers of vLLM's {name} have no {missing[0] if missing else 'list'}",
                "See which versions of vLLM knn-ssd supports.",
            )
        self._model = model
        self._layers = layers
        norm = model.model.norm.weight
        self.device: torch.device = norm.device
        self.low_bit_obstacle = find_low_bit_obstacle(norm.device)
        self._copies = LinearCopies(norm.device, norm.dtype)

    def logits(self, token_ids: torch.Tensor, positions: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Logits (n, V) after each of n tokens, whose attention metadata is in vLLM's forward context.

        Args:
            token_ids: (n,)
            positions: (n,)
            plan: the mode of each sublayer; none is `low` where there is a `low_bit_obstacle`.
        """
        with self._on_copies(plan):
            residual = self._model.model.embed_input_ids(token_ids)  # (n, D)
            added: torch.Tensor | None = None  # output of the last sublayer that ran, not in `residual` yet
            for layer, attention, mlp in zip(self._layers, plan.attention, plan.mlp, strict=True):
                if attention is not Mode.SKIP:
                    normed, residual = _normed(layer.input_layernorm, added, residual)
                    added = layer.self_attn(positions=positions, hidden_states=normed)
                if mlp is not Mode.SKIP:
                    normed, residual = _normed(layer.post_attention_layernorm, added, residual)
                    added = layer.mlp(normed)
            hidden, _ = _normed(self._model.model.norm, added, residual)
            logits: torch.Tensor = self._model.compute_logits(hidden)
        return logits

    def _on_copies(self, plan: Plan) -> AbstractContextManager[None]:
        """Runs the linears of `low` sublayers on 4-bit copies for the length of a `with` block."""
        if not plan.uses_low:
            return nullcontext()
        linears: list[Any] = []
        for layer, attention, mlp in zip(self._layers, plan.attention, plan.mlp, strict=True):
            if attention is Mode.LOW:
                linears += [layer.self_attn.qkv_proj, layer.self_attn.o_proj]
            if mlp is Mode.LOW:
                linears += [layer.mlp.gate_up_proj, layer.mlp.down_proj]
        if plan.head is Mode.LOW:
            linears.append(self._model.lm_head)
        return self._copies.replacing(linears)


def _normed(norm: Any, added: torch.Tensor | None, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised residual stream, and the stream itself after the addition."""
    if added is None:
        return norm(residual), residual
    normed, residual = norm(added, residual)
    return normed, residual
