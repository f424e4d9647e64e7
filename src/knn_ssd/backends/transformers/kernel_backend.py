"""The transformers backend with the kernels: a decoder on the CPU gets what the native backend's families have.

A model's linear layers, and the experts of a mixture, run by the kernels, in the mode that a plan gives to their
sublayer: so it drafts in 4 bits. Where its attention runs by the kernels as well, a row's bits do not depend on the
other rows of its forward pass: so output is that of plain decoding bit for bit, sessions can share passes, and the
prefix cache can be used. All other modules are the model's own; they compute in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from knn_ssd.backends.admission import low_bit_waste
from knn_ssd.backends.base import Forward, ForwardOutput, ForwardRequest, PlanModes, modes_of, run_by_modes
from knn_ssd.backends.cursor import Cursor
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.backends.native.session import NativeSession
from knn_ssd.backends.transformers.attention import SharedPass, attention_replacements
from knn_ssd.backends.transformers.backend import TransformersBackend, last_hidden_state
from knn_ssd.backends.transformers.experts import experts_obstacle, find_experts, mixtures
from knn_ssd.backends.transformers.gated_mlps import find_gated_mlps
from knn_ssd.backends.transformers.kv_cache import KernelCache, StaticCache
from knn_ssd.backends.transformers.linears import KernelLinears, KernelModule, find_linears, places_of
from knn_ssd.backends.transformers.replacement import DirectCalls, Replacement, forward_of, replaced
from knn_ssd.backends.transformers.row_wise import row_wise_replacements
from knn_ssd.errors import UnsupportedModelError
from knn_ssd.kernels.binding import float32_inputs, kernels, kernels_obstacle
from knn_ssd.kernels.gguf_rows import QuantisedEmbedding, float_parameters, has_rows
from knn_ssd.kernels.quantisation import sample_tokens
from knn_ssd.kernels.weights import KINDS, read_rows, release_unpacked
from knn_ssd.plan import Mode, Plan
from knn_ssd.progress import NoProgress, Progress
from knn_ssd.weight_cache import WeightCache

logger = logging.getLogger(__name__)

_TRIAL_TOKENS = 5
_TOLERANCE = {
    torch.float32: 1e-3,
    torch.float16: 0.05,
    torch.bfloat16: 0.2,
}  # relative difference of the logits of the trial


def linear_obstacle(model: PreTrainedModel) -> str | None:
    """None if the kernels can run a model's linear layers on this machine, else the reason."""
    return next(_obstacles(model), None)


def _obstacles(model: PreTrainedModel) -> Iterator[str]:
    weights = dict(model.named_parameters())
    if any(weight.device.type != "cpu" for weight in weights.values()):
        yield "its weights are not on the CPU"
    if odd := {weight.dtype for weight in float_parameters(model).values()} - set(KINDS):
        yield f"it has weights in {str(odd.pop()).removeprefix('torch.')}"
    if unavailable := kernels_obstacle():
        yield unavailable
    if reason := experts_obstacle(model):
        yield reason


class KernelsRefusedError(UnsupportedModelError):
    """The kernels cannot run the linear layers, or the attention, of a model that can draft for itself."""


class KernelLinearBackend(TransformersBackend):
    """Executes a decoder of transformers, with its linear layers run by the kernels; see `base.Backend`.

    Args:
        model: a causal language model on the CPU, in float32, float16 or bfloat16; it is left as it is.
        refused: as for `TransformersBackend`.
        weight_cache: where packed weights and 4-bit copies are kept; None keeps none.

    Raises:
        UnsupportedModelError: the model cannot draft for itself; the message says why.
        KernelsRefusedError: the kernels cannot run its linear layers; the message says why.
    """

    modes = frozenset({Mode.KEEP, Mode.SKIP, Mode.LOW})
    kernels_run = "linear layers"

    def __init__(
        self, model: PreTrainedModel, refused: str | None = None, weight_cache: WeightCache | None = None
    ) -> None:
        self._linears: KernelLinears | None = None  # until they are made
        super().__init__(model, refused)
        if reason := linear_obstacle(model):
            raise KernelsRefusedError(f"its linear layers stay torch's: {reason}")
        places, cache = places_of(self.structure), self._trial_cache()
        expected = self._trial_logits(cache)
        found = (*find_linears(model, places), *find_experts(model, places))
        if not found:
            raise KernelsRefusedError("no linear layer that the kernels can run was found")
        self._mixtures = mixtures(model, self.structure.mlp)
        self._row_wise = row_wise_replacements(model, self.structure, {each.module for each in found}, self._mixtures)
        self._activation_dtype = torch.float32
        self._check_before_packing(found, cache, expected)
        assert self._admission is not None, "weights are on the CPU"
        self._linears = KernelLinears(found, self._run_sample, weight_cache, self._admission.is_busy, self.lock)
        self._row_wise += self._tied_embedding()
        run = dict(zip(self._linears.modules, self._linears.forwards(None), strict=True))
        with self.lock, replaced(self._row_wise):
            self._gated_mlps = list(find_gated_mlps(self.structure.mlp, self._linears.matrices(None), run))
        self._admission.weight_bytes, self._admission.copies = self.weight_bytes, self._linears.copies
        release_unpacked(model.parameters())
        # By modes: each module called as its parent calls it, and gated MLPs and leaves called directly.
        self._resolved: dict[PlanModes, tuple[list[Replacement], list[Replacement]]] = {}
        self._calls = DirectCalls(model)
        self._check_logits(expected)
        waste = low_bit_waste(self._linears.num_weights, self._linears.weight_bytes)
        if obstacle := waste or self._admission.low_bit_shortage():
            self.modes -= {Mode.LOW}
            logger.warning("%s drafts without 4-bit weights: %s", type(model).__name__, obstacle)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights; those that the kernels store anew count once, whatever else refers to them."""
        if self._linears is None:
            return super().weight_bytes
        anew = {id(weight) for each in self._linears.modules for weight in each.parameters()}
        if not self._tied_embedding():
            anew -= {id(weight) for weight in self.model.get_input_embeddings().parameters()}
        others = [weight for weight in self.model.parameters() if id(weight) not in anew]
        return sum(weight.nbytes for weight in others) + self._linears.weight_bytes

    @property
    def low_bit_bytes(self) -> int:
        return self._linears.copies.bytes if self._linears is not None else 0

    def prepare(self, plan: Plan, progress: Progress | None = None) -> None:
        """Makes the 4-bit copies that a plan uses, or all of them if they are kept in a weight cache."""
        assert self._linears is not None
        self._check_plan(plan)
        self._linears.prepare(plan, progress or NoProgress())

    def prepare_later(self, plan: Plan, progress: Progress | None = None) -> bool:
        assert self._linears is not None
        self._check_plan(plan)
        return modes_of(plan) in self._resolved or self._linears.prepare_later(plan, progress or NoProgress())

    @property
    def is_preparing(self) -> bool:
        return self._linears is not None and self._linears.copies.is_making

    @contextmanager
    def skipping(self, plan: Plan | None) -> Iterator[None]:
        if plan is not None and modes_of(plan) not in self._resolved:
            self.prepare(plan)  # before the lock, for which copies that are being made may wait
        with super().skipping(plan):
            yield

    def _replacements(self, plan: Plan | None) -> list[Replacement]:
        key = modes_of(plan)
        if key not in self._resolved:
            skipped = super()._replacements(plan)
            assert self._linears is not None
            matrices = self._linears.matrices(plan)
            gated = [each.forward(matrices[linear] for linear in each.linears) for each in self._gated_mlps]
            own = [*self._row_wise, *self._linears.forwards(plan)]
            self._resolved[key] = [*own, *skipped], self._calls.of([*own, *gated, *skipped])
        return self._resolved[key][self._calls.are_possible]

    def _tied_embedding(self) -> list[Replacement]:
        """Has an embedding of quantised rows read those of the head, if both are one: so the kernels' copy of them is
        the only one in memory.
        """
        embedding: Any = self.model.get_input_embeddings()
        head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        matrix = self._linears.matrices(None).get(head) if self._linears is not None else None
        if matrix is None or not isinstance(embedding, QuantisedEmbedding) or head.weight is not embedding.weight:
            return []

        def forward(tokens: torch.Tensor) -> torch.Tensor:
            return embedding.outputs(read_rows(matrix, tokens.flatten().tolist()), tokens)

        return [forward_of(embedding, forward)]

    def _check_before_packing(self, found: Sequence[KernelModule], cache: StaticCache, expected: torch.Tensor) -> None:
        """Refuses what can be known before the weights are packed, which takes long.

        Args:
            found: what the kernels will run.
            cache: the KV cache of a trial with the model as it is.
            expected: its logits (n, V).
        """

    def _run_sample(self, forwards: Sequence[Replacement]) -> None:
        """Runs tokens spread over the vocabulary through the model with other forwards of its linear layers."""
        tokens = sample_tokens(self.vocab_size, self.context_length)
        with self.lock, float32_inputs(), replaced([*self._row_wise, *forwards]):
            self._run(tokens, StaticCache(self.num_layers, Cursor(len(tokens))), logits_to_keep=len(tokens))

    def _trial_logits(self, cache: StaticCache | None = None) -> torch.Tensor:
        """The logits (n, V) of the trial, with an empty KV cache that is given or a new one."""
        cache = self._trial_cache() if cache is None else cache
        return self._run(self._trial_tokens(), cache, logits_to_keep=_TRIAL_TOKENS).float()

    def _trial_tokens(self) -> list[int]:
        return [i * self.vocab_size // _TRIAL_TOKENS for i in range(_TRIAL_TOKENS)]

    def _trial_cache(self) -> StaticCache:
        return StaticCache(self.num_layers, Cursor(_TRIAL_TOKENS))

    def _check_logits(self, expected: torch.Tensor) -> None:
        """Checks that the logits with the kernels are those of the model's own modules, up to rounding."""
        try:
            with float32_inputs(), self.skipping(None):
                found = self._trial_logits()
        except Exception as error:
            raise KernelsRefusedError(f"with the kernels, it does not run ({type(error).__name__}: {error})") from error
        if not (difference := self._difference(found, expected)) <= _TOLERANCE[self.model.dtype]:
            raise KernelsRefusedError(f"with the kernels, its logits differ by {difference:.2g} of their size")

    def _difference(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        """The difference of logits (n, V), relative to their size. In a mixture, rounding can lead a row to other
        experts, so there it is the median over the rows.
        """
        if self._mixtures:
            return float((found - expected).norm(dim=-1).median() / expected.norm(dim=-1).mean())
        return float((found - expected).norm() / expected.norm())


class KernelBackend(KernelLinearBackend):
    """Executes a decoder of transformers, with its linear layers and its attention run by the kernels.

    Sessions can share forward passes; see `base.Backend` and `base.SharesPasses`.

    Args:
        model, refused, weight_cache: as for `KernelLinearBackend`.

    Raises:
        UnsupportedModelError: the model cannot draft for itself; the message says why.
        KernelsRefusedError: the kernels cannot run its linear layers or its attention; the message says why.
    """

    kernels_run = "linear layers and attention"

    def __init__(
        self, model: PreTrainedModel, refused: str | None = None, weight_cache: WeightCache | None = None
    ) -> None:
        self._attention: list[Replacement] = []  # torch's until its results are known
        super().__init__(model, refused, weight_cache)
        with float32_inputs(), self.skipping(None):
            expected = self._trial_logits()
        self._attention = attention_replacements(model)
        with float32_inputs(), self.skipping(None):
            self._check_attention(expected, _TOLERANCE[torch.float32])

    def open(
        self, capacity: int, prefix_cache: PrefixCache | None = None, forward: Forward | None = None
    ) -> NativeSession:
        cursor = Cursor(capacity, self._admission)
        cache = KernelCache(self._cache_shapes, cursor.reserved)
        return NativeSession(cursor, cache, self.hidden_size, forward or self.forward, prefix_cache)

    def forward(self, request: ForwardRequest) -> ForwardOutput:
        return self.forward_batch([request])[0]

    def forward_batch(self, requests: Sequence[ForwardRequest]) -> list[ForwardOutput]:
        """Runs the rows of several sessions; rows under the same modes read the weights once.

        Args:
            requests: one for each session of this backend.

        Returns:
            The outputs in the same order; each has the bits that it would have alone.
        """
        return run_by_modes(requests, self._run_rows)

    def _replacements(self, plan: Plan | None) -> list[Replacement]:
        return [*super()._replacements(plan), *self._attention]

    def _check_before_packing(self, found: Sequence[KernelModule], cache: StaticCache, expected: torch.Tensor) -> None:
        if "position_ids" not in self._options:
            raise KernelsRefusedError("its attention stays torch's: the model takes no position_ids")
        layers: Any = cache.layers
        self._cache_shapes = [_cache_shape(layer.keys, layer.values) for layer in layers]
        if has_rows(self.model):  # packing takes less long than a pass of layers that de-quantise
            return
        unpacked = [_with_float32_outputs(each.module, self.model.dtype) for each in found]
        with self.lock, replaced([*self._row_wise, *unpacked, *attention_replacements(self.model)]):
            self._check_attention(expected, _TOLERANCE[self.model.dtype])

    def _run_rows(self, requests: Sequence[ForwardRequest]) -> list[ForwardOutput]:
        with self.skipping(requests[0].plan):
            return self._run_replaced(requests)

    def _run_replaced(self, requests: Sequence[ForwardRequest]) -> list[ForwardOutput]:
        """Runs the rows of several sessions through the model with the replacements that are in place."""
        counts = [len(request.token_ids) for request in requests]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        rows = [row for end, r in zip(ends, requests, strict=True) for row in range(end - r.num_logits, end)]
        positions = [r.position + i for r, count in zip(requests, counts, strict=True) for i in range(count)]
        tokens, kept = [token for r in requests for token in r.token_ids], torch.tensor(rows, dtype=torch.long)
        shared = SharedPass(requests)
        with torch.inference_mode(), last_hidden_state(self.model) as captured, shared.running():
            logits = self._call(tokens, positions, shared, kept)
            if "logits_to_keep" not in self._options:
                logits = logits[kept]
        hidden, logits = captured[0][0].clone(), logits.clone()  # tensors that callers may change
        split = torch.split(hidden, counts), torch.split(logits, [r.num_logits for r in requests])
        return [ForwardOutput(*pair) for pair in zip(*split, strict=True)]

    def _check_attention(self, expected: torch.Tensor, tolerance: float) -> None:
        """Checks that the logits with the kernels' attention, which is in place, are those with torch's."""
        session = self.open(_TRIAL_TOKENS, forward=lambda request: self._run_replaced([request])[0])
        tokens = self._trial_tokens()
        try:
            first = session.forward(tokens[:2])
            session.commit(2)
            found = torch.cat([first, session.forward(tokens[2:])])
        except UnsupportedModelError as error:
            raise KernelsRefusedError(f"its attention stays torch's: {error}") from error
        except Exception as error:
            raise KernelsRefusedError(
                "its attention stays torch's: it does not run through transformers' attention interface "
                f"({type(error).__name__}: {error})"
            ) from error
        if not (difference := self._difference(found, expected)) <= tolerance:
            raise KernelsRefusedError(
                f"its attention stays torch's: with the kernels', logits differ by {difference:.2g}"
            )


def _with_float32_outputs(module: nn.Module, dtype: torch.dtype) -> Replacement:
    """A module's own forward in the dtype of its weights, between modules that compute in float32."""
    own = module.forward

    def forward(*args: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = own(*[each.to(dtype) if each.is_floating_point() else each for each in args])
        return outputs.float()

    return forward_of(module, forward)


def _cache_shape(keys: torch.Tensor, values: torch.Tensor) -> tuple[int, int]:
    """(H, D) of a layer in a `KernelCache`, from its keys and values (1, H, n, D)."""
    lanes = kernels().knn_ssd_lanes()
    return keys.shape[1], -(-max(keys.shape[-1], values.shape[-1]) // lanes) * lanes
