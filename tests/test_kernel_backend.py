"""The transformers backend with the kernels: any dense decoder drafts in 4 bits, and says what it says plainly."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from helpers import (
    NUM_LAYERS,
    PROMPT,
    any_plans,
    endless,
    prompts,
    skip_everything,
    tiny_engine,
    transformers_output,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.select import select_backend
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.backends.transformers.kernel_backend import KernelLinearBackend
from knn_ssd.backends.transformers.linears import find_linears
from knn_ssd.backends.transformers.row_wise import row_wise_replacements
from knn_ssd.engine import Engine
from knn_ssd.errors import UnsupportedModelError
from knn_ssd.kernels import binding
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.testing import FAMILIES, tiny_model

pytestmark = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")

MIXTURES = ("mixtral", "qwen2_moe")
DENSE = [family for family in FAMILIES if family not in MIXTURES]
DTYPES = (torch.float32, torch.bfloat16)
LONG = [3 + 7 * i % 120 for i in range(40)]
ALL_LOW = Plan.low(NUM_LAYERS, Policy(max_draft=4, threshold=0.0))
every_dense_family = pytest.mark.parametrize("family", DENSE)


# --- One linear layer


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(rows=st.integers(1, 90), steps=st.integers(1, 9), n=st.integers(0, 20), has_bias=st.booleans())
def test_a_linear_layer_gives_each_row_the_same_bits_in_any_block(
    dtype: torch.dtype, rows: int, steps: int, n: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows + 100 * steps)
    cols = steps * 2 * binding.kernels().knn_ssd_lanes()
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator) if has_bias else None
    x = torch.randn(n, cols, generator=generator)
    pointers = binding.address(weight), None, binding.address(bias)
    matrix = binding.Matrix(*pointers, rows, cols, binding.BFLOAT16 if dtype is torch.bfloat16 else binding.FLOAT32)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = torch.full((len(x), rows), torch.nan)
        binding.kernels().knn_ssd_linear(ctypes.byref(matrix), binding.address(x), len(x), binding.address(y))
        return y

    together = run(x)
    torch.testing.assert_close(together, nn.functional.linear(x, weight.float(), bias), rtol=1e-2, atol=1e-2)
    for i in range(n):
        assert torch.equal(run(x[i : i + 1].clone())[0], together[i])


def test_a_linear_layer_that_would_corrupt_memory_is_refused() -> None:
    weight, x = torch.zeros(4, 24), torch.zeros(2, 24)
    matrix = binding.Matrix(binding.address(weight), None, None, 4, 24, binding.FLOAT32)
    with pytest.raises(ValueError, match="knn_ssd_linear was called with sizes that would corrupt memory"):
        binding.kernels().knn_ssd_linear(ctypes.byref(matrix), binding.address(x), 2, binding.address(x))


# --- Which linear layers are found


class Doubled(nn.Linear):
    """Computes something else than its base class."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


class Renamed(nn.Linear):
    """Computes the same in other words, as Falcon's linear layers do."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight.T if self.bias is None else inputs @ self.weight.T + self.bias


def found_in(model: Any) -> set[nn.Module]:
    return {each.module for each in find_linears(model, TransformersBackend(model).structure)}


def test_all_linear_layers_of_a_model_are_found() -> None:
    for family in DENSE:
        model = tiny_model(family)
        assert found_in(model) == {m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}


def test_a_subclass_is_found_if_it_computes_a_linear() -> None:
    model = tiny_model("olmo2")
    mlp = model.model.layers[1].mlp
    mlp.up_proj, mlp.gate_proj = Doubled(32, 64), Renamed(32, 64)
    found = found_in(model)
    assert mlp.gate_proj in found
    assert mlp.up_proj not in found


def test_layers_that_the_kernels_do_not_take_stay_as_they_are_and_the_output_is_right() -> None:
    model = endless(tiny_model("olmo2", intermediate_size=72))
    attention = model.model.layers[2].self_attn
    handle = attention.q_proj.register_forward_hook(lambda _module, _inputs, output: output * 2)
    attention.k_proj.forward = lambda x: type(attention.k_proj).forward(attention.k_proj, x) / 2
    backend = KernelLinearBackend(model)
    found = found_in(model)
    assert not {attention.q_proj, attention.k_proj, *(layer.mlp.down_proj for layer in model.model.layers)} & found
    generation = Engine(model, backend=backend).generate(PROMPT, plan=ALL_LOW, max_new_tokens=20)
    assert list(generation.token_ids) == transformers_output(model, PROMPT, 20)
    handle.remove()


# --- The other modules


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu", "relu2", "gelu_new"])
@pytest.mark.parametrize("width", [40, 64, 1000])
def test_an_activation_gives_a_row_the_same_bits_in_any_block(activation: str, width: int) -> None:
    model = tiny_model("olmo2", hidden_act=activation)
    function = model.model.layers[0].mlp.act_fn
    (replacement,) = [
        each
        for each in row_wise_replacements(model, TransformersBackend(model).structure, set())
        if each.attributes is function.__dict__
    ]
    x = torch.randn(1, 17, 2 * width, generator=torch.Generator().manual_seed(width))[..., :width]
    together = replacement.value(x)
    torch.testing.assert_close(together, function(x))
    for i in range(17):
        assert torch.equal(replacement.value(x[:, i : i + 1])[0, 0], together[0, i])


# --- Lossless


@every_dense_family
@settings(max_examples=4)
@given(plan=any_plans(), prompt=prompts(), max_new_tokens=st.integers(1, 12))
@example(plan=ALL_LOW, prompt=LONG, max_new_tokens=12)
@example(plan=skip_everything(), prompt=LONG, max_new_tokens=12)
def test_greedy_output_is_that_of_transformers_for_drafts_of_every_mode(
    family: str, plan: Plan, prompt: list[int], max_new_tokens: int
) -> None:
    engine = kernel_engine(family)
    generation = engine.generate(prompt, plan=plan, max_new_tokens=max_new_tokens)
    assert list(generation.token_ids) == transformers_output(engine.model, prompt, max_new_tokens)


@every_dense_family
def test_4_bit_drafts_agree_with_the_model_far_more_often_than_by_chance(family: str) -> None:
    backend = kernel_engine(family).backend
    session = backend.open(60)
    session.prefill(PROMPT)
    full, low = (session.forward(LONG, plan) for plan in (None, ALL_LOW))
    assert not torch.equal(full, low)
    assert (full.argmax(-1) == low.argmax(-1)).float().mean() > 0.2  # by chance: 1 of 128
    assert backend.low_bit_bytes > 0
    some = Plan((Mode.LOW, *(Mode.KEEP,) * 3), (Mode.KEEP,) * 4)
    assert not torch.equal(session.forward(LONG, some), low)


# --- What is left of it


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_is_left_as_it_is(dtype: torch.dtype) -> None:
    model = tiny_model("gemma3_text", dtype=dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        expected = model(torch.tensor([LONG])).logits
    Engine(model, backend=KernelLinearBackend(model)).generate(PROMPT, plan=ALL_LOW, max_new_tokens=8)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.dtype is dtype for weight in model.parameters())
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([LONG])).logits, expected)


# --- Which backend a model gets


def test_the_native_backend_is_taken_first_and_the_kernels_wherever_they_can_be() -> None:
    assert type(select_backend(tiny_model("qwen3", hidden_size=96, head_dim=32))) is NativeBackend
    assert isinstance(select_backend(tiny_model("olmo2")), KernelLinearBackend)
    assert type(select_backend(tiny_model("mixtral"))) is TransformersBackend


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_of_experts_is_refused_with_what_was_found(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"outside linear layers .*mlp.experts.*as in a mixture of experts"):
        KernelLinearBackend(tiny_model(family))


def test_weights_in_another_dtype_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="weights in float16"):
        KernelLinearBackend(tiny_model("olmo2", dtype=torch.float16))


def kernel_engine(family: str) -> Engine:
    engine = tiny_engine(family)
    if not isinstance(engine.backend, NativeBackend):
        return engine
    return Engine(engine.model, backend=KernelLinearBackend(engine.model))
