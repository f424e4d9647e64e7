"""4-bit copies of a model's weights, for drafting.

A copy has a scale and a zero in bfloat16 for each group of 64 columns: 4.5 bits a weight, 28 % of bfloat16.
Groups of 32 are never used: checkpoints that were published in 4-bit blocks of 32 would be copied almost exactly on
that grid, which shows nothing about other models.

Quantisation minimises the error of a matrix's outputs: the squared error of a column is weighted by its mean squared
input (as in AWQ, arXiv 2306.00978, but nothing is rescaled). Tokens spread over the vocabulary show these inputs as
well as text does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

from knn_ssd.backends.copy_maker import CopyMaker
from knn_ssd.backends.kept_copies import copies_cache_key
from knn_ssd.kernels.binding import GROUP_SIZE, Attention, Matrix, Mlp, address, kernels
from knn_ssd.kernels.quantisation import relative_importance
from knn_ssd.plan import Mode, Plan
from knn_ssd.progress import Progress
from knn_ssd.weight_cache import WeightCache

_Made = TypeVar("_Made", Attention, Mlp, Matrix)
_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
# The first of the matrices that share their inputs.
FIRST_OF = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down", "head": "head"}


def matrix_name(layer: int, name: str) -> str:
    """The name of a matrix among all of a model; the LM head is `head` in layer 0."""
    return f"{layer}.{name}"


class LowBitCopies:
    """The 4-bit copies of a model's sublayers and head, shared by all plans and sessions; see `CopyMaker`.

    Args:
        attentions, mlps: the sublayers with the checkpoint's weights.
        head: the LM head with the checkpoint's weights.
        run: runs a sample of tokens through sublayers and a head with these weights.
        cache: where copies are kept; None keeps none.
        is_busy: whether requests are running, with which making copies in the background takes turns.
    """

    def __init__(
        self,
        attentions: Sequence[Attention],
        mlps: Sequence[Mlp],
        head: Matrix,
        run: Callable[[Sequence[Attention], Sequence[Mlp], Matrix], None],
        cache: WeightCache | None = None,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._attentions, self._mlps, self._head, self._run = attentions, mlps, head, run
        self._importance: dict[tuple[int, str], torch.Tensor] = {}
        keys = [_fitted_cache_key(), copies_cache_key()]
        self.maker = CopyMaker(self._matrices(), self._importance_of, cache, keys, is_busy, nullcontext())
        self._made: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Memory of all copies made or read so far."""
        return self.maker.bytes

    def attention(self, layer: int) -> Attention:
        """The 4-bit copy of a layer's attention sublayer, whose matrices' copies were made."""
        return self._once(("attention", layer), lambda: self._copy(self._attentions[layer], layer, _ATTENTION))

    def mlp(self, layer: int) -> Mlp:
        """The 4-bit copy of a layer's MLP sublayer, whose matrices' copies were made."""
        return self._once(("mlp", layer), lambda: self._copy(self._mlps[layer], layer, _MLP))

    def head(self) -> Matrix:
        """The 4-bit copy of the LM head, which was made."""
        return self._once(("head", 0), lambda: self.maker.matrix(matrix_name(0, "head")))

    def prepare(self, plan: Plan, progress: Progress) -> None:
        """Makes the copies that a plan uses; see `CopyMaker.prepare`."""
        if plan.uses_low:
            self.maker.prepare(_names(plan), progress)

    def prepare_later(self, plan: Plan, progress: Progress) -> bool:
        """Whether the copies that a plan uses are there; see `CopyMaker.prepare_later`."""
        return not plan.uses_low or self.maker.prepare_later(_names(plan), progress)

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Replaces all copies, and returns those of before.

        Args:
            tensors: levels and scales of every matrix, by `names_of_copy`.
        """
        with self._lock:
            self._made.clear()
            return self.maker.replace(tensors)

    def keep_fitted(self) -> None:
        """Stores the copies, which are fitted to text, in the weight cache, where later starts prefer them."""
        self.maker.keep(_fitted_cache_key())

    def _once(self, key: tuple[str, int], make: Callable[[], _Made]) -> _Made:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            made: _Made = self._made[key]
            return made

    def _copy(self, sublayer: _Made, layer: int, names: Sequence[str]) -> _Made:
        copy = type(sublayer).from_buffer_copy(sublayer)
        for name in names:
            setattr(copy, name, self.maker.matrix(matrix_name(layer, name)))
        return copy

    def _matrices(self) -> dict[str, Matrix]:
        """Every matrix that has a copy."""
        matrices: dict[str, Matrix] = {}
        for layer, pair in enumerate(zip(self._attentions, self._mlps, strict=True)):
            for sublayer, names in zip(pair, (_ATTENTION, _MLP), strict=True):
                matrices |= {matrix_name(layer, name): getattr(sublayer, name) for name in names}
        return {**matrices, matrix_name(0, "head"): self._head}

    def _importance_of(self, name: str) -> torch.Tensor:
        layer, _, name = name.partition(".")
        return self._column_importance(int(layer), FIRST_OF[name])

    def _column_importance(self, layer: int, name: str) -> torch.Tensor:
        """Importance (cols,) of a matrix's columns: their mean squared input, relative to the mean of all columns.

        That of all matrices is measured in one forward pass, at the first call.
        """
        if not self._importance:
            attentions = [self._with_input_squares(each, i, "qo") for i, each in enumerate(self._attentions)]
            mlps = [self._with_input_squares(each, i, ("gate", "down")) for i, each in enumerate(self._mlps)]
            head = Matrix.from_buffer_copy(self._head)
            head.input_squares = self._new_input_squares(0, "head", head)
            try:
                self._run(attentions, mlps, head)
            except BaseException:
                self._importance.clear()  # nothing is known of the inputs yet
                raise
            for key, sums in self._importance.items():
                self._importance[key] = relative_importance(sums)
        return self._importance[layer, name]

    def _with_input_squares(self, sublayer: _Made, layer: int, names: Sequence[str]) -> _Made:
        """A copy of a sublayer whose matrices add up the squares of their inputs."""
        copy = type(sublayer).from_buffer_copy(sublayer)
        for name in names:
            getattr(copy, name).input_squares = self._new_input_squares(layer, name, getattr(copy, name))
        return copy

    def _new_input_squares(self, layer: int, name: str, matrix: Matrix) -> int | None:
        self._importance[layer, name] = torch.zeros(matrix.cols)
        return address(self._importance[layer, name])


def _names(plan: Plan) -> list[str]:
    """The matrices whose copies run under a plan."""
    names = []
    for modes, of_sublayer in ((plan.attention, _ATTENTION), (plan.mlp, _MLP)):
        low = [layer for layer, mode in enumerate(modes) if mode is Mode.LOW]
        names += [matrix_name(layer, name) for layer in low for name in of_sublayer]
    return [*names, *([matrix_name(0, "head")] if plan.head is Mode.LOW else [])]


def _fitted_cache_key() -> str:
    """The key of copies fitted to text by `error_feedback`. The text is no part of it: the latest fit is used."""
    return f"4-bit copies fitted to text, version 1, {kernels().knn_ssd_lanes()} lanes, groups of {GROUP_SIZE}"
