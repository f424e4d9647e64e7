"""The experts of a mixture, run by the kernels: with the checkpoint's weights, or in 4 bits.

transformers keeps the experts of a layer in one module with three-dimensional weights, and calls it with the rows, the
experts that the router has chosen for each, and their weights. (Its experts interface, `integrations/moe.py`, says how
such a module is laid out.) Here each chosen expert runs once in a pass, over all rows that have chosen it, and a row's
results are added up in the order of its choices: so a row's bits do not depend on the other rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from knn_ssd.backends.transformers.linears import ELSEWHERE, KernelModule, is_modified, multiplied_by
from knn_ssd.backends.transformers.row_wise import row_by_row
from knn_ssd.kernels.binding import Matrix, kernels

# What transformers says of an experts module beside `is_transposed`, and what it must be if it is said.
_EXPECTED = {"has_gate": True, "has_post_expert_norm": False, "_is_expert_parallel": False}


def experts_obstacle(model: nn.Module) -> str | None:
    """None if the kernels can run all weights of a model that are no matrices, else the reason."""
    for name, module in model.named_modules():
        stacked = [each for each, weight in module.named_parameters(recurse=False) if weight.dim() > 2]
        if stacked and (reason := _obstacle(module)):
            return f"it has weights outside linear layers ({name}.{stacked[0]}, as in a mixture of experts): {reason}"
    return None


def find_experts(model: PreTrainedModel, places: Mapping[nn.Module, int]) -> Iterator[KernelModule]:
    """The experts of a model, which has no `experts_obstacle`.

    Args:
        model: the model.
        places: of the modules within sublayers; see `KernelModule`.
    """
    for name, module in model.named_modules():
        if _is_experts(module):
            weights = (*_matrices(module, "gate_up_proj"), *_matrices(module, "down_proj"))
            count = len(weights) // 2
            inputs = (*[0] * count, *range(1, count + 1))  # all experts read the rows; each has its own activations
            place = places.get(module, ELSEWHERE)
            yield KernelModule(module, name, place, weights, inputs, partial(_forward, module))


def mixtures(model: nn.Module, sublayers: Sequence[nn.Module]) -> list[nn.Module]:
    """Those of a model's sublayers that have experts."""
    return [each for each in sublayers if any(_is_experts(module) for module in each.modules())]


def _is_experts(module: nn.Module) -> bool:
    weights = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)


def _obstacle(module: Any) -> str | None:
    """Why the kernels cannot run a module with three-dimensional weights; None if they can."""
    if not _is_experts(module) or not hasattr(module, "is_transposed") or not hasattr(module, "_apply_gate"):
        return f"{type(module).__name__} is not laid out as transformers' experts interface says"
    if is_modified(module):
        return f"{type(module).__name__} is hooked"
    for name, expected in _EXPECTED.items():
        if getattr(module, name, expected) is not expected:
            return f"{type(module).__name__} has {name}={getattr(module, name)}"
    unit = 2 * kernels().knn_ssd_lanes()
    widths = (getattr(module, name).shape[1 if module.is_transposed else 2] for name in ("gate_up_proj", "down_proj"))
    if odd := [width for width in widths if width % unit]:
        return f"an expert has {odd[0]} inputs, which is not a multiple of {unit}"
    return None


def _matrices(module: Any, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The weight (rows, cols) and the bias (rows,) of each expert."""
    stacked: torch.Tensor = getattr(module, name).detach()
    biases = getattr(module, f"{name}_bias").detach() if getattr(module, "has_bias", False) else [None] * len(stacked)
    for weight, bias in zip(stacked, biases, strict=True):
        yield (weight.T if module.is_transposed else weight), bias


def _forward(module: Any, matrices: Sequence[Matrix]) -> Callable[..., torch.Tensor]:
    """A `forward` of an experts module that applies these matrices."""
    multiply = [multiplied_by(matrix) for matrix in matrices]
    count, gate = len(matrices) // 2, row_by_row(module._apply_gate)

    def forward(hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.float()  # (n, D)
        num_choices = chosen.shape[1]  # (n, choices)
        outputs = rows.new_empty(len(rows) * num_choices, rows.shape[1])
        for expert, places in _places(chosen).items():
            inputs = rows[torch.tensor([place // num_choices for place in places])]
            outputs[torch.tensor(places)] = multiply[count + expert](gate(multiply[expert](inputs)))
        weighted = outputs.view(len(rows), num_choices, -1) * weights.float()[..., None]
        total = weighted[:, 0]
        for choice in range(1, num_choices):
            total = total + weighted[:, choice]
        return total

    return forward


def _places(chosen: torch.Tensor) -> dict[int, list[int]]:
    """For each expert that was chosen, where in the flat choices (n * choices)."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, expert in enumerate(chosen.flatten().tolist()):
        places[expert].append(place)
    return places
