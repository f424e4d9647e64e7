"""Rounds matrices to 4 bits with error feedback: what rounding a column spoils, the columns after it make up for.

This is GPTQ (arXiv 2210.17323) in groups of 64 columns, columns with large inputs first; then scales, zeros and levels
are refined in turn. It minimises the error of a matrix's outputs on text, which it knows from the products of the
inputs' columns. It takes minutes, where the rounding of `low_bit.py` takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from knn_ssd.backends.copy_maker import names_of_copy
from knn_ssd.backends.native.low_bit import FIRST_OF, matrix_name
from knn_ssd.kernels.binding import GROUP_SIZE, kernels
from knn_ssd.kernels.gguf_rows import float_weight
from knn_ssd.kernels.quantisation import MIN_IMPORTANCE
from knn_ssd.progress import Progress

_DAMPING = 0.01  # added to the products' diagonal, relative to its mean
_NUM_RANGES, _NUM_FITS = 3, 3  # tried for each group's scale and zero
_FIRST_ROWS = 4  # of a text, left out: attention sinks, whose huge activations drown all others (arXiv 2309.17453)
_PASSES = 2  # of refinement
_ROWS = 8192  # of a matrix, rounded at once, which bounds memory
_PRODUCT_BYTES = 2**31  # of the products that are held at once


@dataclass(slots=True)
class Rounding:
    """A matrix in 4 bits: weights are level * scale + zero.

    Args:
        levels: (rows, cols) whole numbers from 0 to 15, as floats.
        scales, zeros: (rows, groups) values that bfloat16 can hold.
    """

    levels: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def weights(self) -> torch.Tensor:
        """The dequantised weights (rows, cols)."""
        cols = self.levels.shape[1]
        scales, zeros = (each.repeat_interleave(GROUP_SIZE, dim=1)[:, :cols] for each in (self.scales, self.zeros))
        return self.levels * scales + zeros

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The levels and scales in the form and order of `low_bit.quantise`."""
        rows, cols = self.levels.shape
        lanes, groups = kernels().knn_ssd_lanes(), self.scales.shape[1]
        pad = -rows % lanes
        levels = nn.functional.pad(self.levels, (0, groups * GROUP_SIZE - cols, 0, pad)).to(torch.uint8)
        halves = levels.view(-1, lanes, groups, 2, GROUP_SIZE // 8, 4)
        data = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).permute(0, 2, 3, 1, 4)  # (…, groups, 8, lanes, 4)
        pairs = nn.functional.pad(torch.stack([self.scales, self.zeros], dim=-1), (0, 0, 0, 0, 0, pad))
        scales = pairs.to(torch.bfloat16).view(-1, lanes, groups, 2).transpose(1, 2)
        return (
            data.reshape(rows + pad, groups, GROUP_SIZE // 2).contiguous(),
            scales.reshape(rows + pad, groups, 2).contiguous(),
        )


@torch.no_grad()
def round_with_feedback(weight: torch.Tensor, products: torch.Tensor) -> Rounding:
    """Rounds a matrix so that the squared error of its outputs is small.

    Args:
        weight: (rows, cols) the matrix.
        products: (cols, cols) the inputs' products x^T x, summed over text.
    """
    hessian = _damped(products)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    feedback = torch.linalg.cholesky(inverse, upper=True)  # (cols, cols) in that order
    parts = [
        _refined(rows, hessian, _fed_back(rows, hessian.diagonal(), feedback, order))
        for rows in torch.split(weight.float(), _ROWS)
    ]
    return Rounding(*(torch.cat([getattr(part, name) for part in parts]) for name in ("levels", "scales", "zeros")))


def _damped(products: torch.Tensor) -> torch.Tensor:
    """The products, scaled and positive definite; the identity if nothing is known of the inputs."""
    mean = products.diagonal().mean()
    if not bool(torch.isfinite(products).all()) or float(mean) <= 0:
        return torch.eye(len(products))
    return products / mean + _DAMPING * torch.eye(len(products))


def _groups(cols: int) -> list[slice]:
    return [slice(start, min(start + GROUP_SIZE, cols)) for start in range(0, cols, GROUP_SIZE)]


def _fed_back(weight: torch.Tensor, importance: torch.Tensor, feedback: torch.Tensor, order: torch.Tensor) -> Rounding:
    """GPTQ: rounds column by column in an order; scales and zeros are those of the weights before."""
    groups = _groups(weight.shape[1])
    fits = [_fit(weight[:, group], importance[group].clamp_min(MIN_IMPORTANCE)) for group in groups]
    scales, zeros = (torch.stack(each, dim=1) for each in zip(*fits, strict=True))
    left = weight.T[order].contiguous()  # (cols, rows), with the errors so far fed back
    levels = torch.empty_like(left)
    for block in groups:
        errors = torch.empty_like(left[block])
        for i in range(block.start, block.stop):
            group = int(order[i]) // GROUP_SIZE
            levels[i] = _levels(left[i], scales[:, group], zeros[:, group])
            errors[i - block.start] = (left[i] - levels[i] * scales[:, group] - zeros[:, group]) / feedback[i, i]
            left[i + 1 : block.stop].addr_(feedback[i, i + 1 : block.stop], errors[i - block.start], alpha=-1)
        left[block.stop :].addmm_(feedback[block, block.stop :].T, errors, alpha=-1)
    unordered = torch.empty_like(levels)
    unordered[order] = levels
    return Rounding(unordered.T.contiguous(), scales, zeros)


def _fit(weight: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros (rows,) of a group, by weighted least squares; as `quantise_group` in quantise.c."""
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    middle, half = (low + high) / 2, (high - low) / 2
    best, chosen = torch.full_like(low, torch.inf), (torch.zeros_like(low), torch.zeros_like(low))
    for number in range(_NUM_RANGES):
        width = half * (1 - 0.05 * number)
        scale, zero = width / 7.5, middle - width
        levels = _levels(weight, scale[:, None], zero[:, None])
        for fit in range(_NUM_FITS):
            if fit:
                scale, zero = _least_squares(weight, importance, levels, scale, zero)
            pair = _to_bfloat16(scale), _to_bfloat16(zero)
            levels = _levels(weight, pair[0][:, None], pair[1][:, None])
            error = (levels * pair[0][:, None] + pair[1][:, None] - weight).square() @ importance
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, pair[0], chosen[0]), torch.where(better, pair[1], chosen[1])
    return chosen[0], chosen[1]


def _least_squares(
    weight: torch.Tensor, importance: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scales and zeros for these levels; those given where there is no best."""
    a, b, c = importance.sum(), levels @ importance, levels.square() @ importance
    d, e = weight @ importance, (levels * weight) @ importance
    determinant = a * c - b * b
    known = determinant > 1e-12 * a * c
    safe = torch.where(known, determinant, 1)
    return torch.where(known, (a * e - b * d) / safe, scale), torch.where(known, (c * d - b * e) / safe, zero)


def _refined(weight: torch.Tensor, hessian: torch.Tensor, rounding: Rounding) -> Rounding:
    """Refines each group's scale and zero, and then each column's levels, given all others; in place."""
    error = rounding.weights() - weight
    for _ in range(_PASSES):
        for number, group in enumerate(_groups(weight.shape[1])):
            own = hessian[group, group]
            slope = error @ hessian[:, group]  # (rows, columns of the group)
            change = _refit(rounding, number, group, slope, own)
            slope += change @ own
            error[:, group] += change + _move_levels(rounding, number, group, slope, own)
    return rounding


def _refit(rounding: Rounding, number: int, group: slice, slope: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Moves a group's scales and zeros to their optimum where bfloat16 lets that gain; returns the weights' change."""
    levels, scale, zero = rounding.levels[:, group], rounding.scales[:, number], rounding.zeros[:, number]
    weighted = levels @ own
    a, b, c = own.sum(), weighted.sum(dim=1), (weighted * levels).sum(dim=1)
    by_scale, by_zero = (slope * levels).sum(dim=1), slope.sum(dim=1)
    determinant = a * c - b * b
    known = determinant > 1e-6 * a * c
    safe = torch.where(known, determinant, 1)
    steps = (a * by_scale - b * by_zero) / safe, (c * by_zero - b * by_scale) / safe
    new = [_to_bfloat16(old - torch.where(known, step, 0)) for old, step in zip((scale, zero), steps, strict=True)]
    change = levels * (new[0] - scale)[:, None] + (new[1] - zero)[:, None]
    gains = 2 * (slope * change).sum(dim=1) + ((change @ own) * change).sum(dim=1) < 0
    rounding.scales[:, number] = torch.where(gains, new[0], scale)
    rounding.zeros[:, number] = torch.where(gains, new[1], zero)
    return change * gains[:, None]


def _move_levels(rounding: Rounding, number: int, group: slice, slope: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Moves a group's levels to their optimum, one column after the other; returns the weights' change."""
    scale = rounding.scales[:, number]
    step = torch.where(scale == 0, 1, scale)
    levels, slopes = rounding.levels[:, group].T.contiguous(), slope.T.contiguous()  # (columns, rows)
    before = levels.clone()
    for i in range(len(levels)):
        moved = (levels[i] - slopes[i] / own[i, i] / step).round_().clamp_(0, 15)
        slopes.addr_(own[i], (moved - levels[i]) * scale)
        levels[i] = moved
    rounding.levels[:, group] = levels.T
    return ((levels - before) * scale).T


def _levels(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return ((weight - zero) / torch.where(scale == 0, 1, scale)).round_().clamp_(0, 15)


def _to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).float()


# ---- A model's copies


def fitted_copies(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], progress: Progress
) -> dict[str, torch.Tensor]:
    """The levels and scales of a Llama-like model's 4-bit copies, by `names_of_copy`, fitted to text.

    Args:
        model: the model, on the CPU.
        texts: token ids of text like the model's own, some thousands together.
        progress: receives a stage with a step for each layer.
    """
    layers: Any = model.base_model.layers
    linears = [_linears(layer) for layer in layers]
    progress.stage("fitting 4-bit copies", len(layers) + 1)
    tensors: dict[str, torch.Tensor] = {}
    for chunk in _chunks(linears):
        products, head_products = _input_products(model, {i: linears[i] for i in chunk}, texts)
        for layer in chunk:
            for name, linear in linears[layer].items():
                rounding = round_with_feedback(float_weight(linear), products[layer, FIRST_OF[name]])
                tensors |= zip(names_of_copy(matrix_name(layer, name)), rounding.packed(), strict=True)
            progress.advance()
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tensors |= zip(
        names_of_copy(matrix_name(0, "head")),
        round_with_feedback(float_weight(head), head_products).packed(),
        strict=True,
    )
    progress.advance()
    return tensors


def _linears(layer: Any) -> dict[str, nn.Linear]:
    return {
        **{name: getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"},
        **{name: getattr(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")},
    }


def _chunks(linears: Sequence[Mapping[str, nn.Linear]]) -> list[range]:
    """Layers whose products fit in memory together."""
    layer_bytes = 4 * sum(linear.in_features**2 for name, linear in linears[0].items() if FIRST_OF[name] == name)
    size = max(1, _PRODUCT_BYTES // layer_bytes)
    return [range(start, min(start + size, len(linears))) for start in range(0, len(linears), size)]


def _input_products(
    model: PreTrainedModel, linears: Mapping[int, Mapping[str, nn.Linear]], texts: Sequence[Sequence[int]]
) -> tuple[dict[tuple[int, str], torch.Tensor], torch.Tensor]:
    """The products x^T x (cols, cols) of the linears' inputs by layer and first name, and of the head's inputs."""
    sums = {
        (layer, name): torch.zeros(linear.in_features, linear.in_features)
        for layer, named in linears.items()
        for name, linear in named.items()
        if FIRST_OF[name] == name
    }
    hidden_size = model.config.hidden_size
    head = torch.zeros(hidden_size, hidden_size)
    for text in texts:
        with torch.no_grad(), _adding_to(sums, linears):
            base: Any = model.base_model
            _add(head, base(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state)
    return sums, head


def _add(products: torch.Tensor, inputs: torch.Tensor) -> None:
    rows = inputs[0, _FIRST_ROWS:].float()
    products.addmm_(rows.T, rows)


@contextmanager
def _adding_to(
    sums: Mapping[tuple[int, str], torch.Tensor], linears: Mapping[int, Mapping[str, nn.Linear]]
) -> Iterator[None]:
    """Adds the products of the linears' inputs to `sums` while the model runs."""

    def hook(products: torch.Tensor) -> Any:
        return lambda _module, inputs: _add(products, inputs[0])

    handles = [linears[layer][name].register_forward_pre_hook(hook(each)) for (layer, name), each in sums.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
