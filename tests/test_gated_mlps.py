"""Gated MLPs of transformers' models, run by the kernels in one call, and leaves that are called directly."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from knn_ssd.backends.packed import PackedWeights
from knn_ssd.backends.select import select_backend
from knn_ssd.backends.transformers.gated_mlps import GatedMLP, find_gated_mlps
from knn_ssd.backends.transformers.kernel_backend import KernelBackend, KernelLinearBackend, KernelsRefusedError
from knn_ssd.backends.transformers.replacement import DirectCalls, Replacement, forward_of, replaced
from knn_ssd.backends.transformers.row_wise import row_by_row
from knn_ssd.kernels import binding
from knn_ssd.kernels.binding import GELU_TANH, SILU, Matrix, Mlp
from knn_ssd.plan import Plan, Policy
from knn_ssd.testing import FAMILIES, tiny_model

pytestmark = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")

NAMES = ("gate_proj", "up_proj", "down_proj")
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def backend_of(family: str, **settings: Any) -> KernelLinearBackend:
    model = tiny_model(family, **settings)
    try:
        return KernelBackend(model)
    except KernelsRefusedError:  # Falcon's attention; StableLM's of transformers 5.0
        return KernelLinearBackend(model)


def found_in(backend: KernelLinearBackend, modules: tuple[nn.Module, ...]) -> Iterator[GatedMLP]:
    linears = backend._linears
    assert linears is not None
    forwards = dict(zip(linears.modules, linears.forwards(None), strict=True))
    with replaced(backend._row_wise):
        yield from find_gated_mlps(modules, linears.matrices(None), forwards)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gated_mlp_of_a_family_runs_in_one_call(family: str) -> None:
    backend = backend_of(family)
    expected = [mlp for mlp in backend.structure.mlp if all(hasattr(mlp, name) for name in NAMES)]
    assert [each.module for each in backend._gated_mlps] == expected
    if family in ("gemma2", "gemma3_text", "olmo2", "olmo3", "granite", "stablelm", "cohere2", "smollm3"):
        assert len(expected) == 4
    for each in backend._gated_mlps:
        assert each.activation == (GELU_TANH if family.startswith("gemma") else SILU)


@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_what_the_module_gives_and_a_row_the_same_bits_in_any_block(family: str, dtype: torch.dtype) -> None:
    backend = backend_of(family, dtype=dtype, **SIZES)
    x = 3 * torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    x[1] *= 1e-3
    with replaced(backend._replacements(None)), binding.float32_inputs():
        outputs = [each.module(x) for each in backend._gated_mlps]
        alone = [each.module(x[4:5, 1:]) for each in backend._gated_mlps]
    for each, y, row in zip(backend._gated_mlps, outputs, alone, strict=True):
        torch.testing.assert_close(y, each.module.float()(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(row[0, 0], y[4, 1])


@pytest.mark.parametrize(("activation", "own"), [(SILU, nn.SiLU()), (GELU_TANH, nn.GELU(approximate="tanh"))])
def test_activations_are_torchs_from_very_small_to_very_large_inputs(activation: int, own: nn.Module) -> None:
    size = 1024
    gate = torch.cat([-torch.logspace(-6, 4, size // 2), torch.logspace(-6, 4, size // 2)])
    lanes = 2 * binding.kernels().knn_ssd_lanes()
    linear, kept = nn.Linear(lanes, size), []
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[:, 0] = gate
    packed = PackedWeights(None, "test")
    up = nn.Linear(lanes, size)
    down = nn.Linear(size, lanes, bias=False)
    with torch.no_grad():
        up.weight.zero_()
        up.bias.fill_(1)
        linear.bias.zero_()
    x = torch.zeros(1, lanes)
    x[0, 0] = 1
    for index in range(0, size, lanes):  # a few gates at a time
        with torch.no_grad():
            down.weight.zero_()
            down.weight[range(lanes), range(index, index + lanes)] = 1
        matrices = [
            packed.matrix(
                f"{index}.{name}", each.weight.detach().clone(), None if each.bias is None else each.bias.detach()
            )
            for name, each in zip(NAMES, (linear, up, down), strict=True)
        ]
        kept.append(matrices)
        y = torch.empty(1, lanes)
        mlp = Mlp(*matrices, activation=activation)
        binding.kernels().knn_ssd_mlp(ctypes.byref(mlp), x.data_ptr(), 1, y.data_ptr())
        expected = own(gate[index : index + lanes].double())  # in float32, torch rounds small ones to zero
        torch.testing.assert_close(y[0].double(), expected, rtol=1e-5, atol=1e-9)


class Like(nn.Module):
    """An MLP with the layers of another one and an activation of its own."""

    def __init__(self, own: Any, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj
        self.act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Clamped(nn.SiLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(max=20))


class Sparse(Like):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.relu(self.gate_proj(x) - 0.1)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))  # type: ignore[no-any-return]


class Scaled(Like):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * super().forward(x)


class Bounded(Like):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(x)).clamp(max=7)
        return self.down_proj(gate * self.up_proj(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "activation", "is_found"),
    [
        (Like, nn.SiLU(), True),
        (Like, nn.GELU(approximate="tanh"), True),
        (Like, nn.GELU(), False),
        (Like, nn.ReLU(), False),
        (Like, Clamped(), False),
        (Like, nn.Linear(3, 3), False),
        (Sparse, nn.SiLU(), False),
        (Scaled, nn.SiLU(), False),
        (Bounded, nn.SiLU(), False),
    ],
)
def test_a_module_is_recognised_by_what_it_computes(kind: type[Like], activation: nn.Module, is_found: bool) -> None:
    backend = backend_of("granite", **SIZES)
    activation.forward = row_by_row(activation.forward)  # type: ignore[method-assign]
    assert bool(list(found_in(backend, (kind(backend.structure.mlp[0], activation),)))) == is_found


def test_a_module_with_hooks_stays_as_it_is() -> None:
    backend = backend_of("granite")
    with backend.structure.mlp[0].register_forward_hook(lambda *_: None):
        assert not list(found_in(backend, backend.structure.mlp[:1]))


def test_sizes_and_activations_that_the_kernel_does_not_take_are_refused() -> None:
    backend = backend_of("granite", **SIZES)
    gate, up, down = (backend._linears.matrices(None)[each] for each in backend._gated_mlps[0].linears)  # type: ignore[union-attr]
    x = torch.zeros(2, 128)
    wrong: list[tuple[tuple[Matrix, ...], int, int]] = [((gate, up, up), SILU, 2), ((gate, down, down), SILU, 2)]
    for matrices, activation, rows in [*wrong, ((gate, up, down), 2, 2), ((gate, up, down), SILU, -1)]:
        mlp = Mlp(*matrices, activation=activation)
        with pytest.raises(ValueError, match="sizes"):
            binding.kernels().knn_ssd_mlp(ctypes.byref(mlp), x.data_ptr(), rows, x.data_ptr())


def test_a_drafts_mlp_reads_the_copies() -> None:
    backend = backend_of("granite", dtype=torch.bfloat16, **SIZES)
    session = backend.open(8)
    session.forward([1, 2, 3])
    session.commit(3)
    low = Plan.low(backend.num_layers, Policy(4, 0.0))
    backend.prepare(low)
    one_by_one = session.forward([5], low)
    backend._gated_mlps, before = [], backend._gated_mlps
    backend._resolved.clear()
    assert before
    torch.testing.assert_close(session.forward([5], low), one_by_one, rtol=0.05, atol=0.05)
    assert not torch.allclose(session.forward([5]), one_by_one, rtol=1e-4, atol=1e-4)


# --- Leaves that are called directly


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj", "mlp.act_fn", "input_layernorm"])
def test_hooks_that_are_added_later_run_and_nothing_stays_behind(name: str) -> None:
    model = tiny_model("gemma3_text")
    before = [dict(vars(module)) for module in model.modules()]
    backend = select_backend(model)
    session, seen = backend.open(8), []
    plain = session.forward([1, 2, 3])
    with model.model.layers[1].get_submodule(name).register_forward_hook(lambda *_: seen.append(1)):
        torch.testing.assert_close(session.forward([1, 2, 3]), plain, rtol=1e-3, atol=1e-4)
    assert set(seen) == {1}
    seen.clear()
    assert torch.equal(session.forward([1, 2, 3]), plain)
    assert not seen
    assert [dict(vars(module)).keys() for module in model.modules()] == [each.keys() for each in before]


def test_what_a_pass_leaves_can_be_changed_in_place() -> None:
    session = select_backend(tiny_model("gemma3_text")).open(8)
    prefill = session.prefill([1, 2, 3])
    logits = session.forward([1, 2])
    for tensor in (logits, prefill.logits, prefill.mean, prefill.last):
        tensor.add_(1)
        assert not tensor.is_inference()


class Reading(nn.Module):
    """Reads an attribute of a leaf, has a leaf twice, and one in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.others = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.others(self.second(self.first(x.to(self.first.weight.dtype))))  # type: ignore[no-any-return]


def test_a_leaf_keeps_its_attributes_and_is_replaced_wherever_it_is() -> None:
    module = Reading()
    x = torch.randn(1, 4)
    replacements: list[Replacement] = [
        forward_of(module.first, lambda x: x + 1),
        forward_of(module.others[0], lambda x: 2 * x),
    ]
    calls = DirectCalls(module)
    with replaced(calls.of(replacements)):
        assert torch.equal(module(x), 2 * (x + 2))
        assert module.first.weight is module._modules["first"].weight  # type: ignore[union-attr]
        with pytest.raises(AttributeError, match="nothing"):
            _ = module.first.nothing
    assert type(module.first) is nn.Linear
    assert calls.are_possible
    module.others = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert calls.are_possible, "the leaves that were found are where they were"
    module.second = nn.Linear(4, 4)
    assert not calls.are_possible
