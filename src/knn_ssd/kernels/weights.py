"""Weight matrices in the formats that the kernels multiply.

Where the processor has a tile unit, bfloat16 weights are read where the checkpoint's tensors lie. Everywhere else, a
matrix is stored anew, in blocks of twice as many rows as a vector has lanes; csrc/blocks.h describes the formats. A
bfloat16 matrix is packed without loss into 12 bits a weight, plus 8 bytes for each of the few weights whose upper byte
has no code. (On GPUs, DFloat11, arXiv 2504.11651, packs bfloat16 without loss as well.) Float16 weights stay 16 bits,
and the quantised blocks of a GGUF file keep their codes and scales. The values that are multiplied, and so the bits of
every result, are those of the checkpoint's weights in any format.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from knn_ssd.kernels.arena import Arena
from knn_ssd.kernels.binding import (
    BFLOAT16,
    BFLOAT16_BLOCKS,
    BFLOAT16_PACKED,
    FLOAT16,
    FLOAT16_BLOCKS,
    FLOAT32,
    FLOAT32_BLOCKS,
    Q4_0,
    Q4_0_BLOCKS,
    Q4_K,
    Q4_K_BLOCKS,
    Q5_0,
    Q5_0_BLOCKS,
    Q6_K,
    Q6_K_BLOCKS,
    Q8_0,
    Q8_0_BLOCKS,
    Matrix,
    address,
    kernels,
    uses_tiles,
)
from knn_ssd.kernels.gguf_rows import KIND_OF, GGUFRows
from knn_ssd.tools.memory import release_file_pages

KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
_BLOCKS_OF = {
    FLOAT32: (FLOAT32_BLOCKS,),
    FLOAT16: (FLOAT16_BLOCKS,),
    BFLOAT16: (BFLOAT16_PACKED, BFLOAT16_BLOCKS),
    Q8_0: (Q8_0_BLOCKS,),
    Q6_K: (Q6_K_BLOCKS,),
    Q5_0: (Q5_0_BLOCKS,),
    Q4_K: (Q4_K_BLOCKS,),
    Q4_0: (Q4_0_BLOCKS,),
}
_DTYPES = {FLOAT32_BLOCKS: torch.float32, FLOAT16_BLOCKS: torch.float16, BFLOAT16_BLOCKS: torch.bfloat16}
# Of 32 columns of a row.
_UNIT_BYTES = {Q8_0_BLOCKS: 34, Q6_K_BLOCKS: 28, Q5_0_BLOCKS: 22, Q4_K_BLOCKS: 22, Q4_0_BLOCKS: 18}
_ESCAPE_BYTES = 8
_MAX_ESCAPES = 1 / 128  # of the weights; with more, a matrix stays in 16 bits


@dataclass
class TensorKeeper:
    """Keeps tensors alive whose addresses the kernels use."""

    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Memory of all kept tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def keep(self, tensor: torch.Tensor | None) -> int | None:
        """Keeps a tensor and returns its address."""
        if tensor is not None:
            self.tensors.append(tensor)
        return address(tensor)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix in blocks; see csrc/blocks.h.

    Attributes:
        kind: one of the kinds in blocks.
        rows, cols: its size.
        data: its units.
        upper_bytes, escape_starts, escapes: what else a packed matrix needs, else None.
    """

    kind: int
    rows: int
    cols: int
    data: torch.Tensor
    upper_bytes: torch.Tensor | None = None
    escape_starts: torch.Tensor | None = None
    escapes: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor | GGUFRows, tensors: Mapping[str, torch.Tensor]) -> Blocks | None:
        """The blocks of a weight from tensors by the names of the attributes; None if they have other shapes or dtypes.

        Args:
            weight: as in `make_matrix`.
            tensors: what `tensors` returned for an equal weight.
        """
        (rows, cols), data = weight.shape, tensors["data"]
        kind = next((each for each in _BLOCKS_OF[kind_of(weight)] if _row_form(each, cols)[0] is data.dtype), None)
        if kind is None:
            return None
        blocks = -(-rows // _block_rows())
        expected: dict[str, tuple[int, ...]] = {"data": (blocks * _block_rows(), _row_form(kind, cols)[1])}
        if kind == BFLOAT16_PACKED:
            escapes = int(tensors["escape_starts"][-1]) if "escape_starts" in tensors else 0
            expected |= {"upper_bytes": (16,), "escape_starts": (blocks + 1,)}
            expected["escapes"] = (max(escapes, 1), _ESCAPE_BYTES)
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
            return None
        return cls(kind, rows, cols, **tensors)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of the attributes."""
        named = {name: getattr(self, name) for name in ("data", "upper_bytes", "escape_starts", "escapes")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def num_escapes(self) -> int:
        """How many weights have no code."""
        return 0 if self.escape_starts is None else int(self.escape_starts[-1])

    def matrix(self, keeper: TensorKeeper) -> Matrix:
        """The matrix for the kernels; the keeper keeps its tensors."""
        parts = map(keeper.keep, (self.upper_bytes, self.escape_starts, self.escapes))
        return Matrix(keeper.keep(self.data), None, None, self.rows, self.cols, self.kind, None, *parts)


def kind_of(weight: torch.Tensor | GGUFRows) -> int:
    """The kind of a weight as the checkpoint has it."""
    return KIND_OF[weight.quantisation] if isinstance(weight, GGUFRows) else KINDS[weight.dtype]


def is_read_in_place(weight: torch.Tensor | GGUFRows) -> bool:
    """Whether the kernels multiply a weight where it lies, in the tile unit."""
    return not isinstance(weight, GGUFRows) and weight.dtype is torch.bfloat16 and uses_tiles()


def make_matrix(
    weight: torch.Tensor | GGUFRows, bias: torch.Tensor | None, keeper: TensorKeeper, blocks: Blocks | None = None
) -> Matrix:
    """A matrix that the kernels can multiply.

    Args:
        weight: (rows, cols), contiguous, of one of `KINDS` or a GGUF file's; cols is a multiple of twice the number of
            lanes.
        bias: (rows,) or None; it becomes float32.
        keeper: keeps what the matrix refers to.
        blocks: the weight in blocks if they were made before.
    """
    if not isinstance(weight, GGUFRows) and is_read_in_place(weight):
        made = Matrix(keeper.keep(weight.detach()), None, None, *weight.shape, BFLOAT16)
    else:
        made = (blocks or best_blocks(weight)).matrix(keeper)
    made.bias = keeper.keep(None if bias is None else bias.detach().float().contiguous())
    return made


def best_blocks(weight: torch.Tensor | GGUFRows, arena: Arena | None = None) -> Blocks:
    """A weight in the blocks that take the fewest bytes; see `make_matrix`.

    Args:
        weight: as there.
        arena: gives the memory; None is one of its own.
    """
    smallest, *others = _BLOCKS_OF[kind_of(weight)]
    packed = pack(weight, smallest, arena=arena)
    has_many = packed.num_escapes > _MAX_ESCAPES * packed.rows * packed.cols
    return pack(weight, others[0], arena=arena) if has_many else packed


def pack(
    weight: torch.Tensor | GGUFRows, kind: int, library: ctypes.CDLL | None = None, arena: Arena | None = None
) -> Blocks:
    """Stores a matrix in blocks.

    Args:
        weight: as in `make_matrix`.
        kind: see `Blocks`; it fits the kind of the weight.
        library: the kernels that will multiply it; those of this process if it is None.
        arena: gives the memory; None is one of its own.

    Raises:
        ValueError: the kernels have no such format for this matrix.
    """
    library = library or kernels()
    (rows, cols), held = weight.shape, weight.data if isinstance(weight, GGUFRows) else weight.detach()
    height = 2 * library.knn_ssd_lanes()
    blocks = -(-rows // height)
    source = ctypes.byref(Matrix(address(held), None, None, rows, cols, kind_of(weight)))
    is_packed = kind == BFLOAT16_PACKED
    dtype, width = _row_form(kind, cols)
    data = (arena or Arena()).empty((blocks * height, width), dtype)
    upper_bytes, counts = torch.empty(16, dtype=torch.uint8), torch.empty(blocks, dtype=torch.int64)
    if is_packed:
        library.knn_ssd_upper_bytes(source, address(upper_bytes))
    library.knn_ssd_pack(source, kind, address(upper_bytes), address(data), address(counts))
    if not is_packed:
        return Blocks(kind, rows, cols, data)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    escapes = torch.empty(max(int(starts[-1]), 1), _ESCAPE_BYTES, dtype=torch.uint8)  # an empty one has no address
    library.knn_ssd_list_escapes(source, address(upper_bytes), address(starts), address(escapes))
    return Blocks(kind, rows, cols, data, upper_bytes, starts, escapes)


def _row_form(kind: int, cols: int) -> tuple[torch.dtype, int]:
    """In which dtype a row of a matrix in blocks is stored, and how many of it."""
    if kind in _UNIT_BYTES:
        return torch.uint8, cols // 32 * _UNIT_BYTES[kind]
    return (torch.uint8, cols * 3 // 2) if kind == BFLOAT16_PACKED else (_DTYPES[kind], cols)


def _block_rows() -> int:
    lanes: int = kernels().knn_ssd_lanes()
    return 2 * lanes


def release_unpacked(weights: Iterable[torch.Tensor]) -> None:
    """Frees the memory of weights that were read from a mapped file and are now stored in blocks."""
    release_file_pages([weight.data_ptr() for weight in weights if not is_read_in_place(weight)])


def is_in_blocks(matrix: Matrix) -> bool:
    """Whether `read_rows` can read a matrix."""
    return any(matrix.kind in kinds for kinds in _BLOCKS_OF.values())


def read_rows(matrix: Matrix, rows: list[int]) -> torch.Tensor:
    """Rows (n, cols) of a matrix in blocks, in float32.

    Args:
        matrix: a result of `make_matrix` without a tile unit.
        rows: indices of the rows.

    Raises:
        ValueError: a row is beyond the last one, or the matrix is not in blocks.
    """
    values = torch.empty(len(rows), matrix.cols)
    indices = (ctypes.c_int64 * len(rows))(*rows)
    kernels().knn_ssd_read_rows(ctypes.byref(matrix), indices, len(rows), address(values))
    return values
