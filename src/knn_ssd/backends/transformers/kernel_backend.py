"""The transformers backend with the kernels: any dense decoder on the CPU gets 4-bit drafts.

A model's linear layers run by the kernels, in the mode that a plan gives to their sublayer. All other modules are the
model's own; they compute in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from knn_ssd.backends.cursor import Cursor
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.backends.transformers.kv_cache import StaticCache
from knn_ssd.backends.transformers.linears import KERNEL_DTYPES, KernelLinears, find_linears
from knn_ssd.backends.transformers.replacement import Replacement, replaced
from knn_ssd.backends.transformers.row_wise import row_wise_replacements
from knn_ssd.errors import UnsupportedModelError
from knn_ssd.kernels.binding import kernels_obstacle
from knn_ssd.plan import Mode, Plan

_SAMPLE_TOKENS = 64  # the 4-bit copies are fitted to their activations
_TRIAL_TOKENS = 5
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # relative difference of the logits of the trial


def linear_obstacle(model: PreTrainedModel) -> str | None:
    """None if the kernels can run a model's linear layers on this machine, else the reason."""
    return next(_obstacles(model), None)


def _obstacles(model: PreTrainedModel) -> Iterator[str]:
    weights = dict(model.named_parameters())
    if any(weight.device.type != "cpu" for weight in weights.values()):
        yield "its weights are not on the CPU"
    if odd := {weight.dtype for weight in weights.values()} - set(KERNEL_DTYPES):
        yield f"it has weights in {str(odd.pop()).removeprefix('torch.')}"
    if unavailable := kernels_obstacle():
        yield unavailable
    if stacked := [name for name, weight in weights.items() if weight.dim() > 2]:
        yield f"it has weights outside linear layers ({stacked[0]}, as in a mixture of experts)"


class KernelLinearBackend(TransformersBackend):
    """Executes a decoder of transformers, with its linear layers run by the kernels; see `base.Backend`.

    Args:
        model: a causal language model on the CPU, in float32 or bfloat16; it is left as it is.

    Raises:
        UnsupportedModelError: the model cannot draft for itself, or the kernels cannot run its linear layers; the
            message says why.
    """

    modes = frozenset({Mode.KEEP, Mode.SKIP, Mode.LOW})

    def __init__(self, model: PreTrainedModel) -> None:
        if reason := linear_obstacle(model):
            raise UnsupportedModelError(f"the linear layers of {type(model).__name__} stay torch's: {reason}")
        super().__init__(model)
        expected = self._trial_logits()
        found = find_linears(model, self.structure)
        if not found:
            raise UnsupportedModelError(f"no linear layer that the kernels can run was found in {type(model).__name__}")
        self._linears = KernelLinears(found, self._run_sample)
        self._row_wise = row_wise_replacements(model, self.structure, {each.module for each in found})
        self._resolved: dict[tuple[tuple[Mode, ...], Mode] | None, list[Replacement]] = {}
        self._activation_dtype = torch.float32
        self._check_logits(expected)

    @property
    def low_bit_bytes(self) -> int:
        return self._linears.bytes

    def prepare(self, plan: Plan) -> None:
        with self.lock:
            self._replacements(plan)

    def _replacements(self, plan: Plan | None) -> list[Replacement]:
        key = None if plan is None else (plan.modes, plan.head)
        if key not in self._resolved:
            skipped = super()._replacements(plan)
            self._resolved[key] = [*self._row_wise, *self._linears.forwards(plan), *skipped]
        return self._resolved[key]

    def _run_sample(self, forwards: Sequence[Replacement]) -> None:
        """Runs tokens spread over the vocabulary through the model with other forwards of its linear layers."""
        count = min(_SAMPLE_TOKENS, self.context_length)
        tokens = [i * self.vocab_size // count for i in range(count)]
        with self.lock, replaced([*self._row_wise, *forwards]):
            self._run(tokens, StaticCache(self.num_layers, Cursor(count)), logits_to_keep=count)

    def _trial_logits(self) -> torch.Tensor:
        tokens = [i * self.vocab_size // _TRIAL_TOKENS for i in range(_TRIAL_TOKENS)]
        cache = StaticCache(self.num_layers, Cursor(_TRIAL_TOKENS))
        return self._run(tokens, cache, logits_to_keep=_TRIAL_TOKENS).float()

    def _check_logits(self, expected: torch.Tensor) -> None:
        """Checks that the logits with the kernels are those of the model's own modules, up to rounding."""
        with self.skipping(None):
            found = self._trial_logits()
        difference = float((found - expected).norm() / expected.norm())
        if not difference <= _TOLERANCE[self.model.dtype]:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives other logits with the kernels: they differ by {difference:.2g} of "
                "their size"
            )
