"""The transformers backend with the kernels: any decoder drafts in 4 bits, and says what it says plainly."""

from __future__ import annotations

import ctypes
import random
from functools import cache, partial
from pathlib import Path
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
    skip_something,
    transformers_output,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from knn_ssd.backends.base import Exactness, ForwardRequest, SharesPasses
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.backends.select import select_backend
from knn_ssd.backends.transformers import experts, kernel_backend
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.backends.transformers.kernel_backend import KernelBackend, KernelLinearBackend, KernelsRefusedError
from knn_ssd.backends.transformers.linears import find_linears, places_of
from knn_ssd.backends.transformers.row_wise import row_by_row, row_wise_replacements
from knn_ssd.engine import Engine
from knn_ssd.kernels import binding
from knn_ssd.kernels.weights import TensorKeeper, make_matrix
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.testing import FAMILIES, tiny_model

pytestmark = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")

MIXTURES = ("mixtral", "qwen2_moe", "gpt_oss")
ROUND_EMBEDDINGS = ("gemma2", "gemma3_text")  # scaled in the model's dtype, before they become float32
DENSE = [family for family in FAMILIES if family not in MIXTURES]
MIXED = ["sliding_attention", "full_attention"] * 2
DTYPES = (torch.float32, torch.bfloat16)
LONG = [3 + 7 * i % 120 for i in range(40)]
ALL_LOW = Plan.low(NUM_LAYERS, Policy(max_draft=4, threshold=0.0))
every_family = pytest.mark.parametrize("family", FAMILIES)
every_bitwise_family = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "falcon"])


@cache
def backend_of(family: str, dtype: torch.dtype) -> KernelLinearBackend:
    """The transformers backend with as much of the kernels as it can, also for families of the native backend."""
    model = endless(tiny_model(family, dtype=dtype))
    try:
        return KernelBackend(model)
    except KernelsRefusedError:
        return KernelLinearBackend(model)


def tokens(count: int, seed: int = 0) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(3, 128) for _ in range(count)]


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
    keeper = TensorKeeper()
    matrix = make_matrix(weight, bias, keeper)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = torch.full((len(x), rows), torch.nan)
        binding.kernels().knn_ssd_linear(ctypes.byref(matrix), binding.address(x), len(x), binding.address(y))
        return y

    together = run(x)
    inputs = x.bfloat16().float() if dtype is torch.bfloat16 and binding.rounds_inputs() else x
    torch.testing.assert_close(together, nn.functional.linear(inputs, weight.float(), bias), rtol=1e-2, atol=1e-2)
    for i in range(n):
        assert torch.equal(run(x[i : i + 1].clone())[0], together[i])


def test_a_linear_layer_that_would_corrupt_memory_is_refused() -> None:
    weight, x = torch.zeros(16, 24), torch.zeros(2, 24)
    matrix = binding.Matrix(binding.address(weight), None, None, 4, 24, binding.FLOAT32_BLOCKS)
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
    return {each.module for each in find_linears(model, places_of(TransformersBackend(model).structure))}


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


# --- Mixtures of experts


def test_each_chosen_expert_runs_once_over_the_rows_that_chose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of("mixtral", torch.float32)
    runs: list[int] = []
    real = experts.multiplied_by

    def counted(matrix: binding.Matrix) -> Any:
        multiply = real(matrix)
        return lambda inputs: (runs.append(len(inputs)), multiply(inputs))[1]

    monkeypatch.setattr(experts, "multiplied_by", counted)
    (module,) = [each for each in backend._linears._modules if each.name == "model.layers.0.mlp.experts"]
    matrices = [
        make_matrix(weight.contiguous(), bias, backend._linears._packed.keeper) for weight, bias in module.weights
    ]
    gated: list[int] = []
    gate = module.module._apply_gate
    monkeypatch.setattr(module.module, "_apply_gate", lambda x: (gated.append(len(x)), gate(x))[1], raising=False)
    rows, chosen = torch.randn(3, 32), torch.tensor([[2, 0], [0, 2], [0, 1]])
    weights = torch.rand(3, 2)
    found = module.forward(matrices)(rows, chosen, weights)
    monkeypatch.undo()
    torch.testing.assert_close(found, module.module(rows, chosen, weights), rtol=1e-4, atol=1e-4)
    assert sorted(runs) == [1, 1, 2, 2, 3, 3]  # both matrices of experts 1, 2 and 0
    assert gated == [1] * 6  # a row alone


class OtherExperts(nn.Module):
    """Experts in a layout of their own."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.ups, self.gates = (nn.Parameter(each) for each in experts.gate_up_proj.chunk(2, dim=1))
        self.experts = experts

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.experts(*args)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda mlp: setattr(mlp, "experts", OtherExperts(mlp.experts)), "OtherExperts is not laid out as"),
        (lambda mlp: setattr(mlp.experts, "has_gate", "no"), "MixtralExperts has has_gate=no"),
        (lambda mlp: setattr(mlp.experts, "forward", mlp.experts.forward), "MixtralExperts is hooked"),
    ],
)
def test_experts_that_are_not_understood_stay_torchs(change: Any, reason: str) -> None:
    model = endless(tiny_model("mixtral"))
    change(model.model.layers[1].mlp)
    backend = select_backend(model)
    assert type(backend) is TransformersBackend
    assert "outside linear layers (model.layers.1.mlp.experts" in (backend.refused or "")
    assert reason in (backend.refused or "")
    generation = Engine(model, backend=backend).generate(PROMPT, max_new_tokens=12)
    assert list(generation.token_ids) == transformers_output(model, PROMPT, 12)


def test_experts_that_are_called_in_another_way_stay_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = endless(tiny_model("mixtral"))
    gate = type(model.model.layers[0].mlp.gate)
    own = gate.forward

    def with_weights_of_all_experts(self: Any, hidden_states: torch.Tensor) -> Any:
        logits, weights, chosen = own(self, hidden_states)
        return logits, torch.zeros(len(chosen), 4, dtype=weights.dtype).scatter(1, chosen, weights), chosen

    monkeypatch.setattr(gate, "forward", with_weights_of_all_experts)
    model.config._experts_implementation = "eager"
    backend = select_backend(model)
    assert type(backend) is TransformersBackend
    assert "with the kernels, it does not run (RuntimeError" in (backend.refused or "")


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_of_a_width_that_the_kernels_do_not_take_stay_torchs_and_the_output_is_right(family: str) -> None:
    width = "moe_intermediate_size" if family == "qwen2_moe" else "intermediate_size"
    model = endless(tiny_model(family, **{width: 72}))
    backend = select_backend(model)
    assert type(backend) is TransformersBackend
    assert "an expert has 72 inputs, which is not a multiple of" in (backend.refused or "")
    generation = Engine(model, backend=backend).generate(PROMPT, max_new_tokens=12)
    assert list(generation.token_ids) == transformers_output(model, PROMPT, 12)


@pytest.mark.parametrize("function", [torch.sigmoid, partial(torch.softmax, dim=-1), partial(torch.topk, k=2)])
def test_a_function_of_a_router_gives_a_row_the_same_bits_in_any_block(function: Any) -> None:
    x = torch.randn(17, 5, generator=torch.Generator().manual_seed(0))
    together = row_by_row(function)(x)
    torch.testing.assert_close(together, function(x))
    for i in range(17):
        alone = row_by_row(function)(x[i : i + 1])
        pairs = (each if isinstance(each, tuple) else (each,) for each in (alone, together))
        for part, whole in zip(*pairs, strict=True):
            assert torch.equal(part[0], whole[i])


# --- Attention


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    blocks=st.integers(1, 3),
    softcap=st.sampled_from([0.0, 0.5, 5.0]),
    has_sinks=st.booleans(),
    window=st.integers(1, 50),
)
def test_attention_is_that_of_the_formula_and_gives_a_row_the_same_bits_in_any_block(
    seed: int, groups: int, kv_heads: int, blocks: int, softcap: float, has_sinks: bool, window: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    size, heads, capacity = blocks * binding.kernels().knn_ssd_lanes(), groups * kv_heads, 40
    position, n = int(torch.randint(0, 25, (), generator=random)), int(torch.randint(1, 15, (), generator=random))
    queries = torch.randn(n, heads, size, generator=random)
    keys, values = (torch.randn(kv_heads, capacity, size, generator=random) for _ in range(2))
    keys[:, position + n :] = values[:, position + n :] = torch.nan
    sinks = torch.randn(heads, generator=random) if has_sinks else None
    attention = binding.OuterAttention(0.3, softcap, binding.address(sinks), heads, kv_heads, size)
    cache = binding.OuterCache(binding.address(keys), binding.address(values), None, None, capacity, position, 0)
    visible = [(0, max(0, position + r + 1 - window), position + r + 1, position + r + 1) for r in range(n)]

    def run(rows: slice) -> torch.Tensor:
        own, seen = queries[rows].clone(), (binding.VisibleKeys * n)(*[binding.VisibleKeys(*v) for v in visible[rows]])
        outputs = torch.full_like(own, torch.nan)
        binding.kernels().knn_ssd_attend(
            *(ctypes.byref(attention), ctypes.byref(cache), 1, seen, len(own)),
            *(binding.address(own), binding.address(outputs)),
        )
        return outputs

    together = run(slice(None))
    for r, (_, first, _, end) in enumerate(visible):
        assert torch.equal(run(slice(r, r + 1))[0], together[r])
        for head in range(heads):
            scores = keys[head // groups, first:end].double() @ queries[r, head].double() * 0.3
            scores = scores if not softcap else (scores / softcap).tanh() * softcap
            weights = torch.cat([scores, sinks[head, None].double() if has_sinks else scores[:0]]).softmax(0)
            expected = weights[: end - first] @ values[head // groups, first:end].double()
            torch.testing.assert_close(together[r, head].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({"head_dim": 12}, (0, 0, 3, 3)),
        ({"heads": 3}, (0, 0, 3, 3)),
        ({"kv_heads": 0}, (0, 0, 3, 3)),
        ({}, (1, 0, 3, 3)),
        ({}, (-1, 0, 3, 3)),
        ({}, (0, -1, 3, 3)),
        ({}, (0, 2, 2, 2)),
        ({}, (0, 0, 9, 9)),
        ({}, (0, 0, 3, 4)),
    ],
)
def test_attention_that_would_corrupt_memory_is_refused(change: dict[str, int], rows: tuple[int, ...]) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, **change}
    tensor = torch.zeros(4, 8, 16)
    pointer = binding.address(tensor)
    attention = binding.OuterAttention(1.0, 0.0, None, *sizes.values())
    cache = binding.OuterCache(pointer, pointer, None, None, 8, 0, 0)
    with pytest.raises(ValueError, match="knn_ssd_attend was called with sizes that would corrupt memory"):
        binding.kernels().knn_ssd_attend(
            *(ctypes.byref(attention), ctypes.byref(cache), 1, ctypes.byref(binding.VisibleKeys(*rows)), 1),
            *(pointer, pointer),
        )


# --- Rows do not depend on other rows


@every_bitwise_family
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_is_bitwise_that_of_plain_decoding(family: str, dtype: torch.dtype) -> None:
    backend = backend_of(family, dtype)
    assert type(backend) is KernelBackend
    assert backend.exactness is Exactness.BITWISE


@every_bitwise_family
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=3)
@given(seed=st.integers(0, 10_000), plan=st.one_of(st.none(), any_plans()))
def test_a_row_has_the_same_bits_in_a_block_as_alone(family: str, dtype: torch.dtype, seed: int, plan: Plan) -> None:
    chooser = random.Random(seed)
    backend = backend_of(family, dtype)
    session = backend.open(80)
    session.prefill(tokens(chooser.randint(1, 60), seed))
    start, block = session.length, tokens(chooser.randint(2, 18), seed + 1)
    together = session.forward(block, plan)
    session.rewind(start)
    for i, token in enumerate(block):
        assert torch.equal(session.forward([token], plan)[0], together[i])
        session.commit(1)


@every_bitwise_family
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=3)
@given(seed=st.integers(0, 10_000))
def test_sessions_that_share_a_pass_get_the_bits_that_each_gets_alone(
    family: str, dtype: torch.dtype, seed: int
) -> None:
    chooser = random.Random(seed)
    backend = backend_of(family, dtype)
    shapes = [
        (chooser.randint(1, 60), chooser.randint(1, 12), chooser.choice([None, None, ALL_LOW, skip_something()]))
        for _ in range(chooser.randint(1, 5))
    ]
    scored = chooser.random() < 0.3  # teacher-forced scoring in the same pass

    def requests() -> list[ForwardRequest]:
        opened = [backend.open(80) for _ in shapes]
        for index, (session, (prompt, _, _)) in enumerate(zip(opened, shapes, strict=True)):
            session.prefill(tokens(prompt, seed + index))
            session.forward(tokens(shapes[index][1], seed + 50 + index))  # teacher-forced scoring reads these keys
        return [
            ForwardRequest(
                tokens(count, seed + 50 + i), session.length, session.cache, plan, count, 3 if scored and i else 0
            )
            for i, (session, (_, count, plan)) in enumerate(zip(opened, shapes, strict=True))
        ]

    alone = [backend.forward(one) for one in requests()]
    for output, own in zip(backend.forward_batch(requests()), alone, strict=True):
        assert torch.equal(output.hidden, own.hidden)
        assert torch.equal(output.logits, own.logits)


@every_bitwise_family
@settings(max_examples=2)
@given(seed=st.integers(0, 10_000))
def test_a_prompt_that_begins_as_an_earlier_one_is_the_same_bits(family: str, seed: int) -> None:
    chooser = random.Random(seed)
    backend, store, text = backend_of(family, torch.bfloat16), PrefixCache(2**30), tokens(150, seed)
    earlier = backend.open(150, store)
    earlier.prefill(text[: chooser.randint(20, 100)])
    kept = earlier.length
    earlier.close()
    own = text[: chooser.randint(20, 140)]
    one, other = backend.open(150, store), backend.open(150)
    reused, whole = one.prefill(own), other.prefill(own)
    assert reused.reused == min(kept, len(own) - 1)
    for name in ("logits", "mean", "last"):
        assert torch.equal(getattr(reused, name), getattr(whole, name))
    for plan in (ALL_LOW, None):
        assert torch.equal(one.forward(tokens(5, seed), plan), other.forward(tokens(5, seed), plan))


@every_bitwise_family
@pytest.mark.parametrize("plan", [ALL_LOW, skip_something()])
@pytest.mark.parametrize("run_length", [1, 4, 50])
def test_teacher_forced_scoring_gives_the_bits_of_drafting_in_runs(family: str, plan: Plan, run_length: int) -> None:
    backend, start = backend_of(family, torch.float32), 14
    drafting, scoring = backend.open(60), backend.open(60)
    for session in (drafting, scoring):
        session.prefill(LONG[:start])
    expected = []
    for begin in range(start, len(LONG), run_length):
        run = LONG[begin : begin + run_length]
        for token in run:
            expected.append(drafting.forward([token], plan)[0])
            drafting.commit(1)
        drafting.rewind(begin)
        drafting.forward(run)
        drafting.commit(len(run))
    full = scoring.forward(LONG[start:])
    before = [part.clone() for part in scoring.cache.tensors]
    assert torch.equal(scoring.teacher_forced_logits(LONG[start:], plan, run_length), torch.stack(expected))
    assert all(
        torch.equal(part[:, :, : len(LONG)], old[:, :, : len(LONG)])
        for part, old in zip(scoring.cache.tensors, before, strict=True)
    )
    assert torch.equal(scoring.forward(LONG[start:]), full)


def test_attention_that_asks_for_what_the_kernels_do_not_know_stays_torchs() -> None:
    model = endless(tiny_model("olmo2"))
    attention = model.model.layers[1].self_attn
    attention.forward = lambda *args, **kwargs: type(attention).forward(attention, *args, temperature=2.0, **kwargs)
    with pytest.raises(KernelsRefusedError, match="its attention has temperature, which the kernels do not know"):
        KernelBackend(model)
    backend = select_backend(model)
    assert type(backend) is KernelLinearBackend
    generation = Engine(model, backend=backend).generate(PROMPT, plan=ALL_LOW, max_new_tokens=20)
    assert list(generation.token_ids) == transformers_output(model, PROMPT, 20)


def test_what_is_refused_is_known_before_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[object] = []
    real = kernel_backend.KernelLinears
    monkeypatch.setattr(
        kernel_backend, "KernelLinears", lambda *arguments: (packed.append(arguments), real(*arguments))[1]
    )
    assert type(select_backend(tiny_model("falcon", dtype=torch.bfloat16))) is KernelLinearBackend
    assert len(packed) == 1
    assert type(select_backend(tiny_model("mixtral", intermediate_size=72))) is TransformersBackend
    assert len(packed) == 1


def test_attention_outside_of_transformers_interface_stays_torchs() -> None:
    with pytest.raises(KernelsRefusedError, match="does not run through transformers' attention interface"):
        KernelBackend(tiny_model("falcon"))
    assert backend_of("falcon", torch.float32).exactness is Exactness.NUMERICAL


# --- Lossless


@every_family
@settings(max_examples=2)
@given(plan=any_plans(), prompt=prompts(), max_new_tokens=st.integers(1, 12))
@example(plan=ALL_LOW, prompt=LONG, max_new_tokens=12)
@example(plan=skip_everything(), prompt=LONG, max_new_tokens=12)
def test_greedy_output_is_that_of_transformers_for_drafts_of_every_mode(
    family: str, plan: Plan, prompt: list[int], max_new_tokens: int
) -> None:
    backend = backend_of(family, torch.float32)
    generation = Engine(backend.model, backend=backend).generate(prompt, plan=plan, max_new_tokens=max_new_tokens)
    assert list(generation.token_ids) == transformers_output(backend.model, prompt, max_new_tokens)


@every_family
@settings(max_examples=2)
@given(plan=any_plans(), prompt=prompts())
@example(plan=ALL_LOW, prompt=LONG)
def test_in_bfloat16_output_is_that_of_plain_decoding(family: str, plan: Plan, prompt: list[int]) -> None:
    backend = backend_of(family, torch.bfloat16)
    engine = Engine(backend.model, backend=backend)
    drafted, plain = (
        engine.generate(prompt, max_new_tokens=16, logprobs=1, **options)
        for options in ({"plan": plan}, {"plain": True})
    )
    assert drafted.token_ids == plain.token_ids
    if backend.exactness is Exactness.BITWISE:
        assert drafted.logprobs == plain.logprobs


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ROUND_EMBEDDINGS])
def test_bfloat16_weights_give_what_they_give_in_float32(family: str) -> None:
    rounded = tiny_model(family, dtype=torch.bfloat16)
    expected = transformers_output(tiny_model(family, dtype=torch.bfloat16).float(), PROMPT, 8)
    with binding.float32_inputs():
        generation = Engine(rounded, backend=backend_of(family, torch.bfloat16)).generate(PROMPT, max_new_tokens=8)
    assert list(generation.token_ids) == expected


@every_family
def test_4_bit_drafts_agree_with_the_model_far_more_often_than_by_chance(family: str) -> None:
    backend = backend_of(family, torch.float32)
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
    Engine(model, backend=KernelBackend(model)).generate(PROMPT, plan=ALL_LOW, max_new_tokens=8)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.dtype is dtype for weight in model.parameters())
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([LONG])).logits, expected)


# --- Which backend a model gets


def test_the_native_backend_is_taken_first_and_the_kernels_wherever_they_can_be() -> None:
    assert type(select_backend(tiny_model("qwen3", hidden_size=96, head_dim=32))) is NativeBackend
    assert type(select_backend(tiny_model("olmo2"))) is KernelBackend
    assert type(select_backend(tiny_model("falcon"))) is KernelLinearBackend
    assert type(select_backend(tiny_model("mixtral"))) is KernelBackend
    assert type(select_backend(tiny_model("mixtral", intermediate_size=72))) is TransformersBackend


def test_only_a_model_that_does_not_get_everything_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    select_backend(tiny_model("gemma3_text"))
    assert not caplog.records
    for family, intermediate_size, lacks in (
        ("falcon", 64, "drafts may change its output by rounding"),
        ("mixtral", 72, "no 4-bit drafts"),
    ):
        select_backend(tiny_model(family, intermediate_size=intermediate_size))
        assert lacks in caplog.records[-1].getMessage()
        assert f"the architecture {family} is not among" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2


TWO = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
OTHERS: dict[str, dict[str, Any]] = {
    **{key: {} for key in ("apertus", "arcee", "bitnet", "ernie4_5", "gemma", "glm", "helium", "hunyuan_v1_dense")},
    **{key: {} for key in ("ministral3", "nemotron", "olmo", "seed_oss")},
    **{key: {"head_dim": None} for key in ("cohere", "gpt_bigcode", "persimmon", "phi")},
    **{key: {"sliding_window": 16, "layer_types": MIXED} for key in ("exaone4", "ministral")},
    "starcoder2": {"sliding_window": 16, "head_dim": None},
    **{key: {**TWO, "num_experts": 4} for key in ("flex_olmo", "olmoe", "qwen3_moe")},
    **{key: {**TWO, "num_local_experts": 4} for key in ("granitemoe", "minimax_m2", "phimoe")},
    **{key: {**TWO, **SHARED} for key in ("dots1", "glm4_moe")},
    "ernie4_5_moe": {**TWO, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "afmoe": {**TWO, "num_experts": 4, "num_dense_layers": 1},
    "granitemoeshared": {**TWO, "num_local_experts": 4, "shared_intermediate_size": 32},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_get_the_same(family: str) -> None:
    model = endless(tiny_model(family, **OTHERS[family]))
    backend = select_backend(model)
    assert type(backend) is KernelBackend
    assert backend.exactness is Exactness.BITWISE
    generation = Engine(model, backend=backend).generate(LONG, plan=ALL_LOW, max_new_tokens=12)
    assert list(generation.token_ids) == transformers_output(model, LONG, 12)


def test_weights_in_another_dtype_are_refused() -> None:
    with pytest.raises(KernelsRefusedError, match="weights in float64"):
        KernelLinearBackend(tiny_model("olmo2", dtype=torch.float64))


# --- The README's table of models

ROWS: list[tuple[str, dict[str, Any], torch.dtype, str, str]] = [
    ("Llama, Mistral", {"head_dim": 32, "hidden_size": 64}, torch.float32, "llama", "native"),
    (
        "other dense decoders",
        {},
        torch.bfloat16,
        "gemma2",
        "transformers, with the kernels' linear layers and attention",
    ),
    (
        *("mixtures of experts on the CPU", {}, torch.bfloat16, "mixtral"),
        "transformers, with the kernels' linear layers, experts and attention",
    ),
    ("where attention does not", {}, torch.float32, "falcon", "transformers, with the kernels' linear layers"),
    ("mixtures whose experts", {"intermediate_size": 72}, torch.float32, "mixtral", "transformers"),
]
NAMES = {
    **{"Gemma": "gemma", "Gemma 2": "gemma2", "Gemma 3": "gemma3_text", "Phi-2": "phi", "Phi-3": "phi3"},
    **{"Phi-4": "phi3", "Granite": "granite", "OLMo to OLMo 3": "olmo3", "StableLM": "stablelm"},
    **{"Command R (Cohere": "cohere", "Cohere 2)": "cohere2", "GLM-4": "glm4", "SmolLM3": "smollm3"},
    **{"StarCoder 2": "starcoder2", "Nemotron": "nemotron", "EXAONE 4": "exaone4", "Seed-OSS": "seed_oss"},
    **{"Ministral": "ministral", "ERNIE 4.5": "ernie4_5", "Apertus": "apertus", "GPT-2": "gpt2"},
    **{"GPT-NeoX and others": "gpt_neox", "Mixtral": "mixtral", "Qwen2-MoE": "qwen2_moe", "Qwen3-MoE": "qwen3_moe"},
    **{"gpt-oss": "gpt_oss", "OLMoE": "olmoe", "FlexOlmo": "flex_olmo", "Granite-MoE": "granitemoe"},
    **{"Phi-3.5-MoE": "phimoe", "GLM-4-MoE": "glm4_moe", "dots.llm1": "dots1", "MiniMax-M2": "minimax_m2"},
    **{"ERNIE 4.5 MoE": "ernie4_5_moe", "Hunyuan-MoE and others": "hunyuan_v1_moe", "Falcon": "falcon"},
}


def table_of_models() -> list[list[str]]:
    """The cells of each row of the README's table of models."""
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    lines = text.partition("## Which models get what\n\n")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


@pytest.mark.parametrize(("begins", "overrides", "dtype", "family", "backend_cell"), ROWS)
def test_the_readmes_table_says_what_backends_say(
    begins: str, overrides: dict[str, Any], dtype: torch.dtype, family: str, backend_cell: str
) -> None:
    (row,) = [each for each in table_of_models() if each[0].startswith(begins)]
    backend = select_backend(tiny_model(family, dtype=dtype, **overrides))
    drafts = "4-bit, skipping, copies" if Mode.LOW in backend.modes else "skipping, copies"
    shares = "yes" if isinstance(backend, SharesPasses) else "no"
    is_native = isinstance(backend, NativeBackend)
    assert row[1:] == [backend_cell, drafts, backend.exactness.value, shares]
    assert backend_cell.startswith("native" if is_native else "transformers")
    if not is_native:
        expected = {"nothing": "transformers"}.get(backend.kernels_run, f"the kernels' {backend.kernels_run}")
        assert backend_cell.replace("layers, experts", "layers").endswith(expected)


def test_the_readmes_table_names_only_models_whose_row_is_tested() -> None:
    dense, mixture, falcon = (table_of_models()[index][0] for index in (1, 2, 3))
    for cell in (dense, mixture, falcon):
        for name in cell.partition(": ")[2].split(", "):
            assert NAMES[name] in {*FAMILIES, *OTHERS}, name
    assert len(table_of_models()) == len({row[0] for row in ROWS})
