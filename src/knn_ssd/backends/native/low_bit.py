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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from knn_ssd.backends.kept_copies import copies_cache_key, kept_copies
from knn_ssd.kernels.arena import Arena
from knn_ssd.kernels.binding import GROUP_SIZE, Attention, Matrix, Mlp, address, kernels
from knn_ssd.kernels.quantisation import low_matrix, quantise, relative_importance
from knn_ssd.plan import Mode, Plan
from knn_ssd.progress import Progress
from knn_ssd.weight_cache import WeightCache

_Made = TypeVar("_Made", Attention, Mlp, Matrix)
_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
# The first of the matrices that share their inputs.
FIRST_OF = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down", "head": "head"}


def names_of_copy(layer: int, name: str) -> tuple[str, str]:
    """The names of the levels and the scales of a matrix's copy; the LM head is `head` in layer 0."""
    return f"{layer}.{name}.levels", f"{layer}.{name}.scales"


@dataclass(frozen=True, slots=True)
class _Source:
    """A matrix of the checkpoint that has a 4-bit copy: its layer, and its name there."""

    matrix: Matrix
    layer: int
    name: str

    @property
    def names(self) -> tuple[str, str]:
        """The names of its copy's levels and scales."""
        return names_of_copy(self.layer, self.name)

    def is_low(self, plan: Plan) -> bool:
        """Whether its copy runs under a plan."""
        if self.name == "head":
            return plan.head is Mode.LOW
        return (plan.attention if self.name in _ATTENTION else plan.mlp)[self.layer] is Mode.LOW


class LowBitCopies:
    """The 4-bit copies of a model's sublayers and head, shared by all plans and sessions.

    Without a weight cache each is made at first use. With one, the first use takes all of them from there, or makes all
    of them and leaves them there for the next start.

    Args:
        attentions, mlps: the sublayers with the checkpoint's weights.
        head: the LM head with the checkpoint's weights.
        run: runs a sample of tokens through sublayers and a head with these weights.
        cache: where copies are kept; None keeps none.
    """

    def __init__(
        self,
        attentions: Sequence[Attention],
        mlps: Sequence[Mlp],
        head: Matrix,
        run: Callable[[Sequence[Attention], Sequence[Mlp], Matrix], None],
        cache: WeightCache | None = None,
    ) -> None:
        self._attentions, self._mlps, self._head, self._run = attentions, mlps, head, run
        self._cache = cache
        self._importance: dict[tuple[int, str], torch.Tensor] = {}
        self._arena = Arena()
        self._tensors: dict[str, torch.Tensor] = {}  # levels and scales, by `names_of_copy`
        self._made: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()

    @property
    def is_kept(self) -> bool:
        """Whether there is a weight cache."""
        return self._cache is not None

    @property
    def bytes(self) -> int:
        """Memory of all copies made or read so far."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def attention(self, layer: int) -> Attention:
        """The 4-bit copy of a layer's attention sublayer."""
        return self._once(("attention", layer), lambda: self._copy(self._attentions[layer], layer, _ATTENTION))

    def mlp(self, layer: int) -> Mlp:
        """The 4-bit copy of a layer's MLP sublayer."""
        return self._once(("mlp", layer), lambda: self._copy(self._mlps[layer], layer, _MLP))

    def head(self) -> Matrix:
        """The 4-bit copy of the LM head."""
        return self._once(("head", 0), lambda: self._low(_Source(self._head, 0, "head")))

    def prepare(self, plan: Plan, progress: Progress) -> None:
        """Makes the copies that a plan uses. With a weight cache, takes all copies from there, or makes and stores all.

        Args:
            plan: the plan.
            progress: receives a stage if copies are made, with a step for each matrix.
        """
        if not plan.uses_low:
            return
        with self._lock:
            matrices = list(self._matrices())
            if self._cache is not None and not self._tensors:
                self._tensors = self._kept(self._cache, matrices)
            wanted = [each for each in matrices if self._cache is not None or each.is_low(plan)]
            missing = [each for each in wanted if each.names[0] not in self._tensors]
            if not missing:
                return
            progress.stage("making 4-bit copies", len(missing))
            for each in missing:
                self._low(each)
                progress.advance()
            if self._cache is not None:
                self._cache.store(copies_cache_key(), self._tensors)

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Replaces all copies, and returns those of before.

        Args:
            tensors: levels and scales of every matrix, by `names_of_copy`.
        """
        with self._lock:
            before, self._tensors = self._tensors, dict(tensors)
            self._made.clear()
            return before

    def keep_fitted(self) -> None:
        """Stores the copies, which are fitted to text, in the weight cache, where later starts prefer them."""
        if self._cache is not None:
            self._cache.store(_fitted_cache_key(), self._tensors)

    def _kept(self, cache: WeightCache, matrices: Sequence[_Source]) -> dict[str, torch.Tensor]:
        """The best kept copies; empty if there are none."""
        named = {each.names: each.matrix for each in matrices}
        return kept_copies(cache, [_fitted_cache_key(), copies_cache_key()], named)

    def _once(self, key: tuple[str, int], make: Callable[[], _Made]) -> _Made:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            made: _Made = self._made[key]
            return made

    def _copy(self, sublayer: _Made, layer: int, names: Sequence[str]) -> _Made:
        copy = type(sublayer).from_buffer_copy(sublayer)
        for name in names:
            setattr(copy, name, self._low(_Source(getattr(sublayer, name), layer, name)))
        return copy

    def _matrices(self) -> Iterator[_Source]:
        """Every matrix that has a copy."""
        for layer, (attention, mlp) in enumerate(zip(self._attentions, self._mlps, strict=True)):
            yield from (_Source(getattr(attention, name), layer, name) for name in _ATTENTION)
            yield from (_Source(getattr(mlp, name), layer, name) for name in _MLP)
        yield _Source(self._head, 0, "head")

    def _low(self, source: _Source) -> Matrix:
        """The copy of a matrix, made unless it is there."""
        levels, scales = source.names
        if levels not in self._tensors:
            importance = self._column_importance(source.layer, FIRST_OF[source.name])
            self._tensors[levels], self._tensors[scales] = quantise(source.matrix, importance, self._arena)
        return low_matrix(source.matrix, self._tensors[levels], self._tensors[scales])

    def _column_importance(self, layer: int, name: str) -> torch.Tensor:
        """Importance (cols,) of a matrix's columns: their mean squared input, relative to the mean of all columns.

        That of all matrices is measured in one forward pass, at the first call.
        """
        if not self._importance:
            attentions = [self._with_input_squares(each, i, "qo") for i, each in enumerate(self._attentions)]
            mlps = [self._with_input_squares(each, i, ("gate", "down")) for i, each in enumerate(self._mlps)]
            head = Matrix.from_buffer_copy(self._head)
            head.input_squares = self._new_input_squares(0, "head", head)
            self._run(attentions, mlps, head)
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


def _fitted_cache_key() -> str:
    """The key of copies fitted to text by `error_feedback`. The text is no part of it: the latest fit is used."""
    return f"4-bit copies fitted to text, version 1, {kernels().knn_ssd_lanes()} lanes, groups of {GROUP_SIZE}"
