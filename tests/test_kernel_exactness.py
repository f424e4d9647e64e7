"""A row has the same bits in every block and batch, for any number of threads, compiler and processor.

The kernels are built by each compiler for several processors, without a warning. Each build runs random layers row by
row, and then in blocks, and every bit is compared. What this machine cannot execute is skipped.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from gguf_files import random_rows

from knn_ssd.kernels import build
from knn_ssd.kernels.binding import (
    BFLOAT16,
    BFLOAT16_BLOCKS,
    BFLOAT16_PACKED,
    FLOAT16_BLOCKS,
    FLOAT32,
    FLOAT32_BLOCKS,
    GROUP_SIZE,
    INT4,
    Q4_0_BLOCKS,
    Q4_K_BLOCKS,
    Q5_0_BLOCKS,
    Q6_K_BLOCKS,
    Q8_0_BLOCKS,
    Attention,
    BatchEntry,
    Matrix,
    Mlp,
    address,
    load,
)
from knn_ssd.kernels.gguf_rows import GGUFRows
from knn_ssd.kernels.weights import Blocks, TensorKeeper, pack

CAPACITY = 131  # positions of each session
WIDTHS = (*range(1, 18), 32, 64, 65)
AVX2 = {"avx2", "fma", "bmi2", "f16c", "movbe"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
PROCESSORS = {
    "haswell": AVX2,
    "znver3": AVX2 | {"sse4a", "sha_ni", "vaes", "vpclmulqdq"},
    "skylake-avx512": AVX512,
    "cooperlake": AVX512 | {"avx512_bf16", "avx512_vnni"},
    "sapphirerapids": AVX512 | {"avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"},
    "native": set(),
}


BUILDS = [
    pytest.param(name, marks=pytest.mark.xdist_group(name))  # the tests of a build together, for there are many
    for name in (f"{compiler} {processor}" for compiler in ("gcc", "clang") for processor in PROCESSORS)
]


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest, compiled_kernels: Callable[..., Path]) -> ctypes.CDLL:
    compiler, processor = request.param.split()
    if missing := PROCESSORS[processor] - build.processor_features():
        pytest.skip(f"this machine lacks {', '.join(sorted(missing))}")
    found = load(compiled_kernels(compiler, f"-march={processor}"))
    assert found.knn_ssd_lanes() in (8, 16)
    found.knn_ssd_enable_tiles(1)
    found.knn_ssd_enable_rounding(1)
    return found


@dataclass(frozen=True)
class Sizes:
    """The layers of a case."""

    head_dim: int
    heads: int
    kv_heads: int
    kind: int
    mlp_kind: int
    hidden: int = 96
    inner: int = 160
    window: int = 0
    bias: bool = False
    qk_norm: bool = False
    vocab: int = 101
    kv_kind: int = FLOAT32

    def __str__(self) -> str:
        window = f"-window{self.window}" if self.window else ""
        narrow = "-kv16" if self.kv_kind == BFLOAT16 else ""
        return (
            f"{self.heads}of{self.kv_heads}x{self.head_dim}-{NAMES[self.kind]}-{NAMES[self.mlp_kind]}{window}{narrow}"
        )


QUANTISED = {
    **{"Q8_0": Q8_0_BLOCKS, "Q6_K": Q6_K_BLOCKS, "Q5_0": Q5_0_BLOCKS, "Q4_K": Q4_K_BLOCKS, "Q4_0": Q4_0_BLOCKS},
}
NAMES = {
    **{BFLOAT16: "tiles", INT4: "int4", FLOAT32_BLOCKS: "float32", FLOAT16_BLOCKS: "float16"},
    **{BFLOAT16_BLOCKS: "bfloat16", BFLOAT16_PACKED: "packed"},
    **{kind: name for name, kind in QUANTISED.items()},
}


CASES = (
    Sizes(32, 1, 1, FLOAT32_BLOCKS, FLOAT32_BLOCKS, bias=True, vocab=33),
    Sizes(32, 6, 2, BFLOAT16_PACKED, BFLOAT16_BLOCKS, window=9),
    Sizes(64, 9, 3, BFLOAT16_PACKED, BFLOAT16_PACKED, hidden=608, bias=True),
    Sizes(64, 9, 3, BFLOAT16, BFLOAT16, hidden=608, bias=True),
    Sizes(64, 4, 1, INT4, INT4, window=40, qk_norm=True),
    Sizes(96, 4, 2, INT4, INT4, bias=True, vocab=7),
    Sizes(96, 5, 1, FLOAT32_BLOCKS, INT4, inner=608, qk_norm=True),
    Sizes(128, 8, 2, BFLOAT16_PACKED, INT4, window=33, qk_norm=True),
    Sizes(128, 8, 2, BFLOAT16, INT4, window=33, qk_norm=True),
    Sizes(128, 7, 1, INT4, BFLOAT16_BLOCKS, inner=608, vocab=129),
    Sizes(256, 2, 2, FLOAT32_BLOCKS, FLOAT32_BLOCKS, window=40, bias=True),
    Sizes(256, 4, 1, BFLOAT16_PACKED, BFLOAT16_PACKED, qk_norm=True),
    Sizes(256, 4, 1, BFLOAT16, BFLOAT16, qk_norm=True),
    Sizes(32, 6, 2, BFLOAT16_PACKED, BFLOAT16_BLOCKS, window=9, kv_kind=BFLOAT16),
    Sizes(64, 9, 3, FLOAT32_BLOCKS, FLOAT32_BLOCKS, bias=True, kv_kind=BFLOAT16),
    Sizes(96, 5, 1, BFLOAT16_PACKED, INT4, qk_norm=True, kv_kind=BFLOAT16),
    Sizes(128, 8, 2, BFLOAT16_PACKED, INT4, window=33, kv_kind=BFLOAT16),
    Sizes(128, 7, 1, INT4, BFLOAT16_BLOCKS, kv_kind=BFLOAT16),
    Sizes(256, 4, 1, BFLOAT16, BFLOAT16, kv_kind=BFLOAT16),
    Sizes(64, 9, 3, FLOAT16_BLOCKS, FLOAT16_BLOCKS, hidden=608, bias=True),
    Sizes(32, 6, 2, Q8_0_BLOCKS, Q4_0_BLOCKS, inner=608, window=9),
    Sizes(64, 4, 4, Q6_K_BLOCKS, Q4_K_BLOCKS, hidden=512, inner=768, vocab=33),
    Sizes(64, 4, 2, Q5_0_BLOCKS, Q5_0_BLOCKS, hidden=160, vocab=33),
    Sizes(64, 4, 1, Q4_K_BLOCKS, INT4, hidden=256, inner=160, bias=True),
)


class Layers:
    """Two random layers and a head, run by one build of the kernels."""

    def __init__(self, library: ctypes.CDLL, sizes: Sizes) -> None:
        self.library, self.sizes, self.lanes = library, sizes, library.knn_ssd_lanes()
        self._keeper = TensorKeeper()
        self._attentions, self._mlps = [self._attention() for _ in range(2)], [self._mlp() for _ in range(2)]
        self._head, self._norm = self._matrix(sizes.vocab, sizes.hidden, sizes.kind), self._weight(sizes.hidden)
        angles = torch.arange(CAPACITY)[:, None] * 0.9 ** torch.arange(sizes.head_dim // 2)
        self._rotary = [part.repeat(1, 2).contiguous() for part in (angles.cos(), angles.sin())]

    def cache(self) -> list[torch.Tensor]:
        sizes = self.sizes
        vectors = (2, sizes.kv_heads, CAPACITY)
        shapes = (
            ((*vectors, sizes.head_dim), torch.bfloat16 if sizes.kv_kind == BFLOAT16 else torch.float32),
            ((*vectors, sizes.head_dim), torch.int8),
            (vectors, torch.float32),
        )
        return [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes for _ in range(2)]

    def run(
        self, caches: Sequence[list[torch.Tensor]], starts: Sequence[int], rows: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Final states and logits, side by side, of rows (n, hidden) of each session from its start on."""
        x = torch.cat(list(rows)).contiguous()
        entries = [
            BatchEntry(*map(address, (*self._rotary, *cache)), CAPACITY, start, 0, len(own), self.sizes.kv_kind)
            for cache, start, own in zip(caches, starts, rows, strict=True)
        ]
        attentions, mlps = ((c_void_p * 2)(*map(ctypes.addressof, each)) for each in (self._attentions, self._mlps))
        self.library.knn_ssd_forward(
            attentions, mlps, 2, (BatchEntry * len(entries))(*entries), len(entries), address(x)
        )
        n = len(x)
        hidden, logits = torch.empty_like(x), torch.empty(n, self.sizes.vocab)
        outputs = (c_int64 * n)(*range(n)), n, address(hidden), address(logits)
        self.library.knn_ssd_lm_head(ctypes.byref(self._head), self._norm, 1e-5, address(x), n, *outputs)
        return torch.cat([x, hidden, logits], dim=1)

    def _weight(self, *shape: int) -> int | None:
        return self._keeper.keep(torch.rand(shape) + 0.5)

    def _matrix(self, rows: int, cols: int, kind: int) -> Matrix:
        bias = self._weight(rows) if self.sizes.bias else None
        matrix = random_matrix(self.library, rows, cols, kind, self._keeper)
        matrix.bias = bias
        return matrix

    def _attention(self) -> Attention:
        s = self.sizes
        q_size, kv_size = s.heads * s.head_dim, s.kv_heads * s.head_dim
        shapes = ((q_size, s.hidden), (kv_size, s.hidden), (kv_size, s.hidden), (s.hidden, q_size))
        norms = [self._weight(s.head_dim) if s.qk_norm else None for _ in range(2)]
        counts = (s.heads, s.kv_heads, s.head_dim, s.head_dim, s.window)
        matrices = [self._matrix(*shape, s.kind) for shape in shapes]
        return Attention(*matrices, self._weight(s.hidden), *norms, 1e-5, s.head_dim**-0.5, *counts)

    def _mlp(self) -> Mlp:
        shapes = ((self.sizes.inner, self.sizes.hidden),) * 2 + ((self.sizes.hidden, self.sizes.inner),)
        matrices = [self._matrix(*shape, self.sizes.mlp_kind) for shape in shapes]
        return Mlp(*matrices, self._weight(self.sizes.hidden), 1e-5)


def random_matrix(library: ctypes.CDLL, rows: int, cols: int, kind: int, keeper: TensorKeeper) -> Matrix:
    """A matrix of a kind; a few of its weights have upper bytes that are rare."""
    if kind in QUANTISED.values():
        return pack(random_rows(NAMES[kind], rows, cols), kind, library).matrix(keeper)
    weight = torch.randn(rows, cols) / cols**0.5
    weight[torch.rand(rows, cols) < 0.01] *= 1e-6
    if kind == FLOAT32_BLOCKS:
        return pack(weight, kind, library).matrix(keeper)
    if kind == FLOAT16_BLOCKS:
        return pack(weight.half(), kind, library).matrix(keeper)
    narrow = weight.bfloat16()
    if kind in (BFLOAT16_BLOCKS, BFLOAT16_PACKED):
        return pack(narrow, kind, library).matrix(keeper)
    source = Matrix(keeper.keep(narrow), None, None, rows, cols, BFLOAT16)
    if kind == BFLOAT16:
        return source
    lanes = library.knn_ssd_lanes()
    padded, groups = -(-rows // lanes) * lanes, -(-cols // GROUP_SIZE)
    data = torch.zeros(padded, groups, GROUP_SIZE // 2, dtype=torch.uint8)
    scales = torch.zeros(padded, groups, 2, dtype=torch.bfloat16)
    importance = torch.rand(cols) + 0.5
    library.knn_ssd_quantise(ctypes.byref(source), address(importance), 3, 0, rows, address(data), address(scales))
    return Matrix(keeper.keep(data), keeper.keep(scales), None, rows, cols, INT4)


@pytest.mark.parametrize("cols", [32, 96, 544, 1056])
@pytest.mark.parametrize("rows", [1, 16, 33, 100])
def test_the_formats_of_bfloat16_weights_give_the_same_bits(library: ctypes.CDLL, rows: int, cols: int) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(rows, cols) / cols**0.5).bfloat16()
    weight[torch.rand(rows, cols) < 0.01] *= 1e-6
    weight[0, 0], weight[-1, -1] = -0.0, float("inf")
    packed = pack(weight, BFLOAT16_PACKED, library)
    assert packed.num_escapes or rows == 1  # whose few weights have hardly more upper bytes than codes
    formats = [pack(weight, BFLOAT16_BLOCKS, library), packed]
    library.knn_ssd_keep_float32(1)
    try:
        equal_bits_of_float32(library, weight.float(), formats)
    finally:
        library.knn_ssd_keep_float32(0)
    for n in (*range(1, 14), 17, 65):
        x = torch.randn(n, cols)
        plain, same = (products(library, each, x) for each in formats)
        assert torch.equal(plain.view(torch.int32), same.view(torch.int32))
        if library.knn_ssd_rounds_inputs():
            rounded = x.bfloat16().float()
            assert torch.equal(plain.view(torch.int32), products(library, formats[0], rounded).view(torch.int32))
            x = rounded
        expected = (x.double() @ weight.double().T)[:, :-1]  # the last row has an infinite weight
        torch.testing.assert_close(plain[:, :-1].double(), expected, rtol=1e-4, atol=1e-5)


def test_inputs_of_bfloat16_weights_are_rounded_where_the_processor_multiplies_them(
    library: ctypes.CDLL, request: pytest.FixtureRequest
) -> None:
    rounds, processor = bool(library.knn_ssd_rounds_inputs()), request.node.callspec.params["library"].split()[1]
    assert processor == "native" or rounds == ("avx512_bf16" in PROCESSORS[processor])
    torch.manual_seed(0)
    weight, x = torch.rand(32, 64).bfloat16(), torch.full((1, 64), 1 + 2**-9)  # halfway to the next bfloat16
    blocks, sums = pack(weight, BFLOAT16_BLOCKS, library), weight.double().sum(dim=1)
    for factor in [1.0 if rounds else 1 + 2**-9, 1 + 2**-9]:
        torch.testing.assert_close(products(library, blocks, x)[0].double(), sums * factor, rtol=1e-5, atol=0)
        library.knn_ssd_keep_float32(1)
    library.knn_ssd_keep_float32(0)


@pytest.mark.parametrize("cols", [32, 96, 544, 1056])
@pytest.mark.parametrize("rows", [1, 33, 100])
def test_float16_weights_give_the_bits_of_float32_ones(library: ctypes.CDLL, rows: int, cols: int) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(rows, cols) / cols**0.5).half()
    weight[torch.rand(rows, cols) < 0.1] *= 2**-12  # most of which are subnormal then
    weight[0, 0], weight[0, 1], weight[0, 2] = -0.0, 65504, -(2**-24)
    weight[-1, -1] = float("inf")
    equal_bits_of_float32(library, weight.float(), [pack(weight, FLOAT16_BLOCKS, library)])


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (33, 768), (100, 1280), (33, 96), (100, 544)])
def test_quantised_weights_give_the_bits_of_those_that_gguf_unpacks(
    library: ctypes.CDLL, name: str, rows: int, cols: int
) -> None:
    if cols % 256 and name.endswith("K"):
        with pytest.raises(ValueError, match="sizes"):
            pack(GGUFRows(torch.zeros(rows, 1024, dtype=torch.uint8), name, cols), QUANTISED[name], library)
        return
    torch.manual_seed(0)
    weight = random_rows(name, rows, cols)
    equal_bits_of_float32(library, weight.dequantised(), [pack(weight, QUANTISED[name], library)])


def products(library: ctypes.CDLL, blocks: Blocks, x: torch.Tensor) -> torch.Tensor:
    """The products (n, rows) of a matrix with inputs (n, cols)."""
    keeper = TensorKeeper()
    matrix, y = blocks.matrix(keeper), torch.empty(len(x), blocks.rows)
    library.knn_ssd_linear(ctypes.byref(matrix), address(x), len(x), address(y))
    return y


def equal_bits_of_float32(library: ctypes.CDLL, weight: torch.Tensor, formats: Sequence[Blocks]) -> None:
    """The rows of a matrix (rows, cols), and its products for any number of inputs, have in all formats the bits that
    they have in float32.
    """
    (rows, cols), keeper = weight.shape, TensorKeeper()
    matrices = [each.matrix(keeper) for each in (pack(weight, FLOAT32_BLOCKS, library), *formats)]
    for matrix in matrices:
        values, chosen = torch.empty(rows, cols), (c_int64 * rows)(*range(rows))
        library.knn_ssd_read_rows(ctypes.byref(matrix), chosen, rows, address(values))
        assert torch.equal(values.view(torch.int32), weight.view(torch.int32))
    for n in (*range(1, 10), 16, 17, 64, 65, 130):
        x, norm = torch.randn(n, cols), torch.ones(cols)
        outputs = []
        for matrix in matrices:
            hidden, logits = torch.empty(n, cols), torch.empty(n, rows)
            places = address(x), n, (c_int64 * n)(*range(n)), n, address(hidden), address(logits)
            library.knn_ssd_lm_head(ctypes.byref(matrix), address(norm), 1e-5, *places)
            outputs.append(logits)
        assert torch.isfinite(outputs[0][:, :-1]).all()  # the last row may have an infinite weight
        for other in outputs[1:]:
            assert torch.equal(other.view(torch.int32), outputs[0].view(torch.int32))


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_a_row_has_the_same_bits_in_every_block(library: ctypes.CDLL, sizes: Sizes) -> None:
    torch.manual_seed(0)
    chooser = random.Random(0)
    if sizes.kind == BFLOAT16 and not library.knn_ssd_uses_tiles():
        pytest.skip("only the tile unit multiplies row-major weights")
    library.pool_set_threads(1)
    layers, rows = Layers(library, sizes), torch.randn(CAPACITY, sizes.hidden)
    cache = layers.cache()
    expected = torch.cat([layers.run([cache], [i], [rows[i : i + 1]]) for i in range(CAPACITY)])
    assert torch.isfinite(expected).all()
    compared = different = wrong_caches = 0
    for width in WIDTHS:
        starts = [0, CAPACITY - width, *(chooser.randrange(CAPACITY - width) for _ in range(2))]
        for i, start in enumerate(starts):
            library.pool_set_threads(1 + i % 4 if width in (1, 5, 8, 17, 65) else 1)
            batch = [start, chooser.randrange(CAPACITY - width)] if i % 2 else [start]  # of one session, or two
            caches = [rewound(cache, first) for first in batch]
            output = layers.run(caches, batch, [rows[first : first + width] for first in batch])
            wanted = torch.cat([expected[first : first + width] for first in batch])
            compared += len(wanted)
            different += int((output != wanted).any(dim=1).sum())
            for written, first in zip(caches, batch, strict=True):
                parts = zip(written, cache, strict=True)
                wrong_caches += any(
                    not torch.equal(own[:, :, : first + width], whole[:, :, : first + width]) for own, whole in parts
                )
    assert not different, f"{different} of {compared} rows differ from the same row alone"
    assert not wrong_caches


def rewound(cache: list[torch.Tensor], length: int) -> list[torch.Tensor]:
    """A copy of a cache that holds its first `length` positions only."""
    result = [part.clone() for part in cache]
    for part in result:
        part[:, :, length:] = 0
    return result
