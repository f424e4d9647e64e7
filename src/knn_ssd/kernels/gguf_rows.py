"""Weights as the rows that a GGUF file has, most of them of quantised blocks, and the layers that hold them.

The kernels put the blocks in another order and compute with the values that they stand for (`weights.py`). Without the
kernels these layers compute the same values with torch, which is slow: they are de-quantised for each forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from knn_ssd.kernels.binding import BFLOAT16, FLOAT16, Q4_0, Q4_K, Q5_0, Q6_K, Q8_0

KIND_OF = {
    **{"Q8_0": Q8_0, "Q6_K": Q6_K, "Q5_0": Q5_0, "Q4_K": Q4_K, "Q4_0": Q4_0},
    **{"F16": FLOAT16, "BF16": BFLOAT16},
}
"""The kinds of matrices by ggml's names of their types."""
# Columns and bytes of a block.
_BLOCKS = {
    **{"Q8_0": (32, 34), "Q6_K": (256, 210), "Q5_0": (32, 22), "Q4_K": (256, 144), "Q4_0": (32, 18)},
    **{"F16": (1, 2), "BF16": (1, 2)},
}

_MOST_VALUES = 2**22  # that are de-quantised at once


@dataclass(frozen=True, slots=True)
class GGUFRows:
    """A matrix of a GGUF file.

    Args:
        data: (rows, bytes of a row) uint8, contiguous.
        quantisation: ggml's name of its type, one of `KIND_OF`.
        cols: the number of its columns.
    """

    data: torch.Tensor
    quantisation: str
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return len(self.data), self.cols

    def dequantised(self) -> torch.Tensor:
        """The values (rows, cols) in float32."""
        from gguf import GGMLQuantizationType, dequantize

        return torch.from_numpy(dequantize(self.data.numpy(), GGMLQuantizationType[self.quantisation]))

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """The values at some places of the flattened matrix, in float32."""
        block_cols, block_bytes = _BLOCKS[self.quantisation]
        blocks = self.data.view(-1, block_bytes)[places // block_cols]
        values = GGUFRows(blocks, self.quantisation, block_cols).dequantised()
        return values[torch.arange(len(places)), places % block_cols]

    @classmethod
    def of(cls, data: torch.Tensor, quantisation: str) -> GGUFRows:
        """The matrix in the bytes of its rows."""
        block_cols, block_bytes = _BLOCKS[quantisation]
        return cls(data, quantisation, data.shape[1] // block_bytes * block_cols)


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is quantised.

    Args:
        linear: the layer in whose place it stands; its bias is taken over.
        quantisation: as in `GGUFRows`.
    """

    def __init__(self, linear: nn.Linear, quantisation: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = _no_rows(self.out_features, self.in_features, quantisation), linear.bias
        self.quantisation = quantisation

    @property
    def rows(self) -> GGUFRows:
        """The weight."""
        return GGUFRows(self.weight.detach(), self.quantisation, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Computes with some rows after the others, whose values are then never in memory as a whole."""
        rows = torch.split(self.weight.detach(), max(1, _MOST_VALUES // self.in_features))
        weights = (GGUFRows.of(each, self.quantisation).dequantised().to(input.dtype) for each in rows)
        parts = [nn.functional.linear(input, weight) for weight in weights]
        outputs = torch.cat(parts, dim=-1)
        return outputs if self.bias is None else outputs + self.bias.to(input.dtype)


class QuantisedEmbedding(nn.Embedding):
    """An embedding whose table is quantised; its rows are de-quantised as they are read.

    Args:
        embedding: the layer in whose place it stands; what that one multiplies its rows by (Gemma) is taken over.
        quantisation: as in `GGUFRows`.
    """

    embed_scale: torch.Tensor | None

    def __init__(self, embedding: nn.Embedding, quantisation: str) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        self.weight = _no_rows(self.num_embeddings, self.embedding_dim, quantisation)
        self.quantisation = quantisation
        self.register_buffer("embed_scale", getattr(embedding, "embed_scale", None), persistent=False)

    @property
    def rows(self) -> GGUFRows:
        """The table."""
        return GGUFRows(self.weight.detach(), self.quantisation, self.embedding_dim)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # by numpy: torch would use threads, which then spin for a while on the cores that the kernels' threads need
        rows = torch.from_numpy(self.weight.detach().numpy()[input.flatten().numpy()])
        return self.outputs(GGUFRows(rows, self.quantisation, self.embedding_dim).dequantised(), input)

    def outputs(self, rows: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """What is computed from the rows (n, D) of all tokens of the input (…)."""
        outputs = rows.view(*input.shape, -1)
        return outputs if self.embed_scale is None else outputs * self.embed_scale


_LAYERS = (QuantisedLinear, QuantisedEmbedding)


def weight_of(linear: nn.Linear) -> torch.Tensor | GGUFRows:
    """The weight of a linear layer."""
    return linear.rows if isinstance(linear, QuantisedLinear) else linear.weight.detach()


def float_weight(linear: nn.Linear) -> torch.Tensor:
    """The values of the weight of a linear layer; in float32 if it is quantised."""
    return linear.rows.dequantised() if isinstance(linear, QuantisedLinear) else linear.weight.detach()


def has_rows(model: nn.Module) -> bool:
    """Whether some layers of a model hold a GGUF file's rows."""
    return any(isinstance(module, _LAYERS) for module in model.modules())


def dtype_name(model: nn.Module) -> str:
    """The dtype of a model's weights, or the GGUF types of its matrices, such as "Q4_K, Q6_K"."""
    if types := {module.quantisation for module in model.modules() if isinstance(module, _LAYERS)}:
        return ", ".join(sorted(types))
    return str(next(weight.dtype for weight in model.parameters() if weight.is_floating_point())).removeprefix("torch.")


def weights_of(model: nn.Module) -> dict[str, torch.Tensor | GGUFRows]:
    """All weights of a model by their names."""
    layers = {name: each for name, each in model.named_modules() if isinstance(each, _LAYERS)}
    return {**model.state_dict(), **{f"{name}.weight": layer.rows for name, layer in layers.items()}}


def float_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by their names, without quantised ones."""
    layers = (module for module in model.modules() if isinstance(module, _LAYERS))
    quantised = {id(layer.weight) for layer in layers}
    return {name: weight for name, weight in model.named_parameters() if id(weight) not in quantised}


def _no_rows(rows: int, cols: int, quantisation: str) -> nn.Parameter:
    """What stands for a weight until it is loaded."""
    block_cols, block_bytes = _BLOCKS[quantisation]
    width = cols // block_cols * block_bytes
    return nn.Parameter(torch.empty(rows, width, dtype=torch.uint8, device="meta"), requires_grad=False)
