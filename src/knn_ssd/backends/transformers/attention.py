"""Attention by the kernels, behind transformers' attention interface: the rows of several sessions in one forward pass.

A model asks its KV cache to store keys and values, and then the attention function that its configuration names to
compute. Here both are a `SharedPass`. Which keys a row sees is asked of the model's own mask functions, so sliding
windows and chunks are respected without knowing them. Every row is computed by itself, in an order that depends on its
position alone, so its bits do not depend on the other rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from knn_ssd.backends.base import ForwardRequest
from knn_ssd.backends.transformers.kv_cache import KernelCache
from knn_ssd.backends.transformers.replacement import Replacement
from knn_ssd.errors import UnsupportedModelError
from knn_ssd.kernels.binding import OuterAttention, OuterCache, address, kernels

_NAME = "knn_ssd"  # of the attention function
# What models pass beside queries, keys, values and mask: what is used, and what says nothing beyond the mask.
_UNDERSTOOD = {"softcap", "s_aux", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache"}

_running: ContextVar[SharedPass | None] = ContextVar("running pass", default=None)


def attention_replacements(model: PreTrainedModel) -> list[Replacement]:
    """What is replaced so that a model's attention runs by the kernels."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [Replacement(vars(each), "_attn_implementation_internal", _NAME) for each in configs.values()]


@dataclass(slots=True, eq=False)
class _SessionRows:
    """The rows of one session in a pass: from `start` to `end` - 1 of all."""

    request: ForwardRequest
    start: int
    end: int
    new: tuple[torch.Tensor, torch.Tensor] | None = None  # (1, H, n, head_dim), for teacher-forced scoring

    @property
    def total(self) -> int:
        """How many positions its last row sees at most."""
        return self.request.position + self.end - self.start


class SharedPass(Cache):
    """The KV cache and the attention of one forward pass, over the rows of one session or of several.

    Args:
        requests: what is run; their caches are `KernelCache`s.
    """

    def __init__(self, requests: Sequence[ForwardRequest]) -> None:
        ends = np.cumsum([len(request.token_ids) for request in requests]).tolist()
        self._sessions = [
            _SessionRows(each, start, end) for each, start, end in zip(requests, [0, *ends], ends, strict=False)
        ]
        self._masks: dict[int, torch.Tensor] = {}  # by their ids
        self._visible: dict[int, np.ndarray[Any, Any]] = {}  # the keys that rows see, by the id of a mask
        self._stored: tuple[int, torch.Tensor, torch.Tensor] | None = None
        caches: KernelCache = requests[0].cache
        super().__init__(layers=[_Layer(self, index) for index in range(caches.num_layers)])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Has the attention function use this pass for the length of a `with` block."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    @property
    def position(self) -> int:
        """Of the first row."""
        return self._sessions[0].request.position

    @property
    def longest(self) -> int:
        """The most positions that a row may see."""
        return max(each.total for each in self._sessions)

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the keys and values (1, H, n, D) of all rows to their sessions' caches; for teacher-forced scoring,
        keeps them apart.
        """
        for rows in self._sessions:
            cache: KernelCache = rows.request.cache
            ours = keys[:, :, rows.start : rows.end], values[:, :, rows.start : rows.end]
            if rows.request.run_length:
                rows.new = cache.padded(layer, *ours)
            else:
                cache.write(layer, rows.request.position, *ours)
        self._stored = layer, keys, values
        return keys, values

    def mask(self, is_visible: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The attention mask (1, 1, n, longest) by a mask function of transformers; True where a row sees a position.

        A row's positions are those of its own session.
        """
        n, zero = self._sessions[-1].end, torch.zeros(1, 1, 1, 1, dtype=torch.long)
        mask = torch.zeros(1, 1, n, self.longest, dtype=torch.bool)
        for rows in self._sessions:
            positions = torch.arange(rows.total)
            queries = positions[rows.request.position :, None]  # (n, 1)
            mask[0, 0, rows.start : rows.end, : rows.total] = is_visible(zero, zero, queries, positions)
        self._masks[id(mask)] = mask
        return mask

    def attend(self, query: torch.Tensor, key: torch.Tensor, mask: Any, attention: _Scoring) -> torch.Tensor:
        """The outputs (1, n, heads, D) of queries (1, heads, n, D) over the keys that were stored last."""
        if self._stored is None or key is not self._stored[1] or id(mask) not in self._masks:
            raise UnsupportedModelError("its attention does not use keys or masks as they were made")
        visible = self._visible_keys(mask)
        (layer, keys, values), self._stored = self._stored, None
        cache: KernelCache = self._sessions[0].request.cache
        head_dim, width = cache.head_dim(layer), query.shape[-1]
        heads, n = query.shape[1:3]
        rows = query[0].transpose(0, 1)  # (n, heads, D)
        rows = rows.contiguous() if width == head_dim else nn.functional.pad(rows, (0, head_dim - width))
        outputs = torch.empty(n, heads, head_dim)
        scale = width**-0.5 if attention.scale is None else attention.scale
        outer = OuterAttention(scale, attention.softcap, address(attention.sinks), heads, keys.shape[1], head_dim)
        caches = (OuterCache * len(self._sessions))(*[_outer_cache(each, layer) for each in self._sessions])
        kernels().knn_ssd_attend(
            *(ctypes.byref(outer), caches, len(caches), visible.ctypes.data, n, address(rows), address(outputs))
        )
        return outputs[None, :, :, : values.shape[-1]].contiguous()  # as some models view it in another shape

    def _visible_keys(self, mask: torch.Tensor) -> np.ndarray[Any, Any]:
        """`VisibleKeys` (n, 4) of each row under a mask that a layer uses. (Models make masks that none uses, too.)"""
        if id(mask) not in self._visible:
            self._visible[id(mask)] = self._find_visible(mask[0, 0].numpy())
        return self._visible[id(mask)]

    def _find_visible(self, mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Of each row: its session, its first position, the first new one, the end."""
        first = mask.argmax(axis=1)
        end = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
        if not np.array_equal(mask.sum(axis=1), end - first):
            raise UnsupportedModelError("its attention mask has gaps")
        session, split = np.zeros_like(end), end.copy()
        for index, rows in enumerate(self._sessions):
            session[rows.start : rows.end] = index
            if run_length := rows.request.run_length:
                run_starts = np.arange(rows.end - rows.start) // run_length * run_length
                split[rows.start : rows.end] = rows.request.position + run_starts
        split = split.clip(first, end)
        return np.ascontiguousarray(np.stack([session, first, split, end], axis=1), dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Scoring:
    """How a layer turns products of queries and keys into weights; see csrc/kernels.h."""

    scale: float | None
    softcap: float
    sinks: torch.Tensor | None = field(default=None)


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a pass, as transformers' models see it."""

    is_sliding = False

    def __init__(self, shared: SharedPass, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shared, self._index = shared, index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: the memory is the sessions'."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._shared.store(self._index, key_states, value_states)

    def get_seq_length(self) -> int:
        return self._shared.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._shared.longest, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in early versions of transformers 5


def _outer_cache(rows: _SessionRows, layer: int) -> OuterCache:
    cache: KernelCache = rows.request.cache
    new = (None, None) if rows.new is None else rows.new
    tensors = (*cache.layer(layer), *new)
    return OuterCache(*map(address, tensors), cache.capacity, rows.request.position, rows.end - rows.start)


def _current() -> SharedPass:
    shared = _running.get()
    if shared is None:
        raise UnsupportedModelError(f"the attention function {_NAME} runs only within a forward pass of knn-ssd")
    return shared


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers; the mask is a `SharedPass`'s own."""
    unknown = sorted(name for name, value in options.items() if _says_something(value) and name not in _UNDERSTOOD)
    if unknown:
        raise UnsupportedModelError(f"its attention has {unknown[0]}, which the kernels do not know")
    sinks = options.get("s_aux")
    scoring = _Scoring(
        None if scaling is None else float(scaling),
        float(options.get("softcap") or 0),
        None if sinks is None else sinks.detach().float().contiguous(),
    )
    return _current().attend(query, key, attention_mask, scoring), None


def _says_something(option: Any) -> bool:
    return option is not None and option is not False


def _mask(*_sizes: Any, mask_function: Callable[..., torch.Tensor], **_options: Any) -> torch.Tensor:
    """A mask function of transformers; sizes and offsets are known by the `SharedPass`."""
    return _current().mask(mask_function)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _mask)
