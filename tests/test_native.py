"""The native backend gives what the transformers backend gives: the same tokens, logits equal up to rounding."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from knn_ssd.backends.base import Exactness
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.obstacles import NATIVE_FAMILIES, native_obstacle
from knn_ssd.backends.select import select_backend
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.errors import UnsupportedModelError, UsageError
from knn_ssd.kernels import binding
from knn_ssd.kernels.binding import address
from knn_ssd.kernels.quantisation import low_matrix, quantise
from knn_ssd.kernels.weights import TensorKeeper, make_matrix
from knn_ssd.loading.pretrained import load_complete
from knn_ssd.plan import Mode, Plan
from knn_ssd.testing import tiny_model
from knn_ssd.tools.memory import release_file_pages

WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL_LOW = Plan((Mode.LOW,) * 4, (Mode.LOW,) * 4, Mode.LOW)

pytestmark = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")


def wide_model(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    return tiny_model(family, dtype=dtype, **{**WIDE, **overrides})


def random_plan(chooser: random.Random) -> Plan:
    modes = [tuple(chooser.choice(list(Mode)) for _ in range(4)) for _ in range(2)]
    return Plan(*modes, chooser.choice([Mode.KEEP, Mode.LOW]))


def tokens(count: int, seed: int = 0) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(3, 128) for _ in range(count)]


@pytest.fixture(params=["float32", "vectors", "tiles"])
def unit(request: pytest.FixtureRequest) -> Iterator[str]:
    """What multiplies bfloat16 weights: float32 instructions, those for bfloat16, or the tile unit."""
    tiles, rounding = binding.uses_tiles(), binding.rounds_inputs()
    binding.kernels().knn_ssd_enable_tiles(request.param == "tiles")
    binding.kernels().knn_ssd_enable_rounding(request.param == "vectors")
    try:
        if request.param == "tiles" and not binding.uses_tiles():
            pytest.skip("this processor has no tile unit")
        if request.param == "vectors" and not binding.rounds_inputs():
            pytest.skip("this processor does not multiply bfloat16")
        yield request.param
    finally:
        binding.kernels().knn_ssd_enable_tiles(tiles)
        binding.kernels().knn_ssd_enable_rounding(rounding)


def weights_of(copy: binding.Matrix, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The dequantised weights (rows, cols) of a 4-bit copy, whose levels and scales are among the tensors."""
    codes, scales = (next(t for t in tensors if t.data_ptr() == at) for at in (copy.data, copy.scales))
    lanes, groups = binding.kernels().knn_ssd_lanes(), -(-copy.cols // 64)
    codes = codes.view(-1, groups, 8, lanes, 4)  # each byte has columns i and i + 32 of its group
    levels = torch.stack([codes & 15, codes >> 4], dim=2).permute(0, 4, 1, 2, 3, 5).reshape(-1, lanes, groups, 64)
    pairs = scales.view(-1, groups, lanes, 2).float().transpose(1, 2)
    decoded = levels * pairs[..., :1] + pairs[..., 1:]  # (bundles, lanes, groups, 64)
    return decoded.reshape(-1, groups * 64)[: copy.rows, : copy.cols]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_it_gives_what_the_transformers_backend_gives_in_float64(family: str, dtype: torch.dtype, unit: str) -> None:
    kept_bits = {"vectors": 8, "tiles": 16}.get(unit, 24) if dtype is torch.bfloat16 else 24  # of an input
    native = NativeBackend(wide_model(family, dtype)).open(160)
    model = wide_model(family, dtype).double()
    if kept_bits == 8:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float().bfloat16().double(),))
    reference = TransformersBackend(model).open(160)

    def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        ours, theirs = ours.double(), theirs.double()
        if kept_bits == 8:  # where float32 and float64 differ, one may round up and the other down
            assert (ours - theirs).norm() <= 0.02 * theirs.norm()
            return
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3 if kept_bits == 16 else 2e-4)

    text = tokens(130)
    ours, theirs = native.prefill(text[:100]), reference.prefill(text[:100])
    for name in ("logits", "mean", "last"):
        same(getattr(ours, name), getattr(theirs, name))
    for plan in (None, Plan.skipping(4, attention=[0, 2], mlp=[1])):
        same(*(session.forward(text[100:], plan).clone() for session in (native, reference)))
    plan = Plan.skipping(4, attention=[3], mlp=[0, 1])
    for session in (native, reference):
        session.forward(text[100:])
    same(native.teacher_forced_logits(text[100:], plan, 8), reference.teacher_forced_logits(text[100:], plan, 8))


def test_biases_tied_heads_and_grouped_queries() -> None:
    sizes = {"attention_bias": True, "tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = wide_model("llama", **sizes)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    ours, theirs = (
        NativeBackend(model).open(40).prefill(tokens(40)),
        TransformersBackend(model).open(40).prefill(tokens(40)),
    )
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_row_has_the_same_bits_in_any_block(unit: str, family: str, dtype: torch.dtype, data: st.DataObject) -> None:
    backend = NativeBackend(wide_model(family, dtype, intermediate_size=608))  # wider than the kernels' KC
    text = tokens(90, data.draw(st.integers(0, 1000)))
    one_by_one, blocks = backend.open(90), backend.open(90)
    start = data.draw(st.integers(1, 60))
    one_by_one.prefill(text[:start])
    blocks.prefill(text[:start])
    expected = []
    for token in text[start:]:
        expected.append(one_by_one.forward([token])[0].clone())
        one_by_one.commit(1)
    at = start
    while at < 90:
        count = data.draw(st.integers(1, 30))
        kept = data.draw(st.integers(1, count))
        block = [*text[at : at + kept], *tokens(count - kept, at)][: 90 - at]
        logits = blocks.forward(block)
        kept = min(kept, len(block))
        for row in range(kept):
            assert torch.equal(logits[row], expected[at + row - start])
        blocks.commit(kept)
        at += kept


def test_the_number_of_threads_changes_no_bit(unit: str) -> None:
    backend, results = NativeBackend(wide_model("llama", torch.bfloat16)), []
    before = binding.num_threads()
    try:
        for threads in (1, 2, 3):
            binding.set_threads(threads)
            results.append(backend.open(80).prefill(tokens(80)).logits)
    finally:
        binding.set_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_drafts_leave_no_trace(dtype: torch.dtype) -> None:
    backend, chooser = NativeBackend(wide_model("qwen3", dtype)), random.Random(0)
    plain, drafting = backend.open(100), backend.open(100)
    plain.prefill(tokens(20))
    drafting.prefill(tokens(20))
    for token in tokens(60, seed=5):
        plan = chooser.choice([ALL_LOW, random_plan(chooser)])
        start = drafting.length
        for drafted in tokens(chooser.randrange(1, 6), seed=token):
            drafting.forward([drafted], plan)
            drafting.commit(1)
        drafting.rewind(start)
        assert torch.equal(plain.forward([token]), drafting.forward([token]))
        plain.commit(1)
        drafting.commit(1)


def test_low_bit_copies_are_near_small_and_made_once() -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "initializer_range": 0.1}
    model = wide_model("qwen3", torch.bfloat16, **sizes)
    backend = NativeBackend(model)
    assert backend.low.bytes == 0
    session = backend.open(60)
    session.prefill(tokens(30))
    full = session.forward(tokens(30, 1)).clone()
    low = session.forward(tokens(30, 1), ALL_LOW).clone()
    likeness = torch.cosine_similarity(full, low)
    assert 0.9 < likeness.mean() < 0.999  # the copies differ from the weights, but not by much
    weights = sum(w.numel() * 2 for name, w in model.named_parameters() if w.dim() == 2 and "embed" not in name)
    assert backend.low.bytes <= 0.3 * weights
    made = backend.low.bytes
    session.forward(tokens(30, 1), Plan((Mode.LOW,) * 4, (Mode.SKIP,) * 4, Mode.KEEP))
    backend.open(60).prefill(tokens(3))
    assert backend.low.bytes == made


@pytest.mark.parametrize("heads", [{}, {"head_dim": 64}, {"head_dim": 128}, {"sliding_window": 9}])
def test_low_attentions_see_keys_and_values_in_8_bits(heads: dict[str, int]) -> None:
    backend = NativeBackend(wide_model("mistral", torch.bfloat16, **heads))
    session = backend.open(60)
    session.prefill(tokens(45))
    tensors = session.cache.tensors
    exact, low, scales = tensors[:2], tensors[2:4], tensors[4:]  # of keys and values each
    for known, rounded, scale in zip(exact, low, scales, strict=True):
        step = scale[:, :, :45, None]
        assert (rounded[:, :, :45].abs().amax(dim=-1) == 127).all()
        assert ((known - rounded * scale[..., None])[:, :, :45].abs() <= 0.501 * step).all()
    drafted, full = session.forward([5], ALL_LOW), session.forward([5])
    for known in exact:
        known[:, :, :45] += 1.0
    assert torch.equal(session.forward([5], ALL_LOW), drafted)
    changed = session.forward([5])
    assert not torch.equal(changed, full)
    for known, rounded, scale in zip(exact, low, scales, strict=True):
        known[:, :, :45] -= 1.0
        rounded[:, :, :45] = rounded[:, :, :45] // 2
        scale[:, :, :45] *= 2.0
    coarser = session.forward([5], ALL_LOW)  # half a step is lost, which shows
    assert not torch.equal(coarser, drafted)
    assert torch.cosine_similarity(coarser, drafted).min() > 0.95


def test_teacher_forced_scoring_sees_what_drafts_see() -> None:
    backend = NativeBackend(wide_model("qwen3", torch.bfloat16))
    session, continuation = backend.open(40), tokens(8, seed=3)
    session.prefill(tokens(20))
    session.forward(continuation)
    session.commit(8)
    session.rewind(20)
    teacher_forced = session.teacher_forced_logits(continuation, ALL_LOW, 8)
    for i, token in enumerate(continuation):
        assert torch.equal(session.forward([token], ALL_LOW)[0], teacher_forced[i])
        session.commit(1)


def test_packed_weights_take_three_quarters_and_a_mapped_file_leaves_memory(tmp_path: Path) -> None:
    if binding.uses_tiles():
        pytest.skip("the tile unit reads the checkpoint's tensors")
    tiny_model("llama", hidden_size=512, intermediate_size=2048, head_dim=64).bfloat16().save_pretrained(tmp_path)
    model = load_complete(tmp_path, "tiny", "")
    size, before = sum(weight.nbytes for weight in model.parameters()), dict(model.state_dict())
    expected = {name: weight.clone() for name, weight in before.items()}  # so all of the file is in memory
    backend = NativeBackend(model)
    assert 0.74 * size < backend.weight_bytes < 0.79 * size
    if sys.platform == "linux":
        assert mapped_bytes(tmp_path / "model.safetensors") < size / 4
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name])


def mapped_bytes(file: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    total, here = 0, False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            here = values[-1:] == [str(file)]
        elif name == "Rss:" and here:
            total += 1024 * int(values[0])
    return total


def test_memory_that_was_written_to_is_not_released(tmp_path: Path) -> None:
    values = np.arange(100_000, dtype=np.float32)
    values.tofile(tmp_path / "values")
    mapped = np.memmap(tmp_path / "values", np.float32, mode="c")  # copied on writing
    release_file_pages([mapped.ctypes.data])
    assert np.array_equal(mapped, values)
    mapped[5] = -1
    release_file_pages([mapped.ctypes.data, values.ctypes.data])
    assert mapped[5] == -1
    assert mapped[6] == values[6] == 6


def test_one_low_sublayer_makes_one_copy() -> None:
    backend = NativeBackend(wide_model("llama"))
    session = backend.open(10)
    session.prefill(tokens(5))
    session.forward([4], Plan((Mode.LOW, *[Mode.KEEP] * 3), (Mode.KEEP,) * 4))
    attention = backend.attentions[0]
    weights = sum(m.rows * m.cols for m in (attention.q, attention.k, attention.v, attention.o))
    assert 0 < backend.low.bytes <= weights * (0.5 + 4 / 64) * 128 / 96  # 96 columns fill two groups of 64


def test_quantisation_is_as_good_as_a_fit_can_be() -> None:
    """On Gaussian weights, groups of 64 in 4 bits: plain rounding between the extremes errs by about 0.10."""
    torch.manual_seed(0)
    linear = nn.Linear(640, 64, bias=False)
    weight = nn.init.normal_(linear.weight).detach()
    keeper = TensorKeeper()
    matrix = make_matrix(linear.weight, None, keeper)
    tensors = quantise(matrix, torch.ones(640))
    low = low_matrix(matrix, *tensors)
    decoded = weights_of(low, tensors)
    assert (low.rows, low.cols) == (64, 640)
    assert ((decoded - weight).norm() / weight.norm()).item() < 0.095
    extremes = weight.view(64, 10, 64)
    least, most = extremes.amin(-1, keepdim=True), extremes.amax(-1, keepdim=True)
    step = (most - least) / 15
    rounded = ((extremes - least) / step).round() * step + least
    assert (decoded - weight).norm() < (rounded.view(64, 640) - weight).norm()


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(7, 32), (33, 96), (100, 2112)])
@pytest.mark.parametrize("count", [1, 2, 8, 9, 17, 40, 150])
def test_a_matrix_is_multiplied_to_the_bits_that_inputs_keep(
    unit: str, count: int, rows: int, cols: int, low: bool
) -> None:
    """The kernels keep 24 bits of an input, 16 in the tile unit, 8 if they multiply bfloat16 elsewhere, and with 4-bit
    weights 8 of its group's largest.
    """
    torch.manual_seed(0)
    keeper, linear = TensorKeeper(), nn.Linear(cols, rows, dtype=torch.bfloat16)
    matrix, norm = make_matrix(linear.weight, linear.bias, keeper), torch.ones(cols)
    weights = linear.weight.detach().double()
    if low:
        tensors = quantise(matrix, torch.ones(cols))
        matrix = low_matrix(matrix, *tensors)
        weights = weights_of(matrix, tensors).double()
    x, hidden, out = torch.randn(count, cols), torch.empty(count, cols), torch.empty(count, rows)
    arguments = address(x), count, (ctypes.c_int64 * count)(*range(count)), count, address(hidden), address(out)
    binding.kernels().knn_ssd_lm_head(ctypes.byref(matrix), address(norm), 1e-5, *arguments)
    exact = hidden.double() @ weights.T + linear.bias.detach().double()
    sizes = hidden.double().abs() @ weights.abs().T
    if low:
        largest = torch.nn.functional.pad(hidden.abs(), (0, -cols % 64)).view(count, -1, 64).amax(-1)
        bound = largest.repeat_interleave(64, dim=-1)[:, :cols].double() / 254 @ weights.abs().T
        bound = bound + 2**-8 * sizes  # a group's zero may be much larger than its weights
    else:
        bound = {"tiles": 2**-17, "vectors": 2**-9}.get(unit, 0) * sizes
    assert ((out - exact).abs() <= 1.01 * bound + 2**-18 * sizes).all()
    alone = torch.empty(1, rows)
    row = x[-1:].clone()
    arguments = address(row), 1, (ctypes.c_int64 * 1)(0), 1, address(hidden[-1:]), address(alone)
    binding.kernels().knn_ssd_lm_head(ctypes.byref(matrix), address(norm), 1e-5, *arguments)
    assert torch.equal(alone[0], out[-1])


def test_rotary_tables_grow_with_the_text_and_never_past_the_context() -> None:
    """Rotary embeddings of the type `dynamic` change for positions beyond the context length."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 3000}
    backend = NativeBackend(wide_model("llama", max_position_embeddings=3000, rope_parameters=rope))
    first = backend._rotary_tables(100)[0][:100].clone()
    cosines, sines = backend._rotary_tables(2900)
    assert len(cosines) == len(sines) == backend.context_length == 3000
    assert torch.equal(cosines[:100], first)


def test_it_is_selected_and_bitwise_by_probe() -> None:
    backend = select_backend(wide_model("llama", torch.bfloat16))
    assert isinstance(backend, NativeBackend)
    assert backend.exactness is Exactness.BITWISE


def changed(model: PreTrainedModel, how: str) -> PreTrainedModel:
    layer: Any = model.model.layers[1]
    if how == "wrapped":
        layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)
    elif how == "hooked":
        layer.self_attn.register_forward_hook(lambda *_: None)
    elif how == "replaced":
        layer.mlp.forward = lambda hidden: hidden
    elif how == "double":
        layer.mlp.up_proj.double()
    return model


@pytest.mark.parametrize(
    ("how", "reason"),
    [("wrapped", "Sequential"), ("hooked", "hooked"), ("replaced", "hooked"), ("double", "float64")],
)
def test_a_modified_model_runs_on_the_transformers_backend(how: str, reason: str) -> None:
    model = changed(wide_model("llama"), how)
    assert reason in (native_obstacle(model) or "")
    with pytest.raises(UnsupportedModelError, match=reason):
        NativeBackend(model)
    if how != "double":
        assert isinstance(select_backend(model), TransformersBackend)


def test_other_families_and_sizes_run_on_the_transformers_backend() -> None:
    assert "gpt2" in (native_obstacle(tiny_model("gpt2")) or "")
    assert "activation" in (native_obstacle(wide_model("llama", hidden_act="gelu")) or "")
    assert "multiple" in (native_obstacle(wide_model("llama", intermediate_size=90)) or "")


def test_a_head_with_more_rows_than_the_vocabulary_gives_all_its_logits() -> None:
    model = wide_model("llama")
    model.lm_head = nn.Linear(96, 4096 + 128, bias=False)
    assert model.config.vocab_size == 128
    backend = NativeBackend(model)
    assert backend.vocab_size == 4096 + 128
    native, reference = backend.open(20), TransformersBackend(model).open(20)
    torch.testing.assert_close(native.prefill(tokens(9)).logits, reference.prefill(tokens(9)).logits, rtol=0, atol=2e-4)
    ours, theirs = native.forward(tokens(8)), reference.forward(tokens(8))
    assert ours.shape == (8, 4096 + 128)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_a_plan_of_another_depth_and_a_full_session_are_refused() -> None:
    session = NativeBackend(wide_model("llama")).open(8)
    session.prefill(tokens(8))
    with pytest.raises(UsageError, match="8 tokens was given 9"):
        session.forward([3])
    session.rewind(4)
    with pytest.raises(UsageError, match="plan for 2 layers"):
        session.forward([3], Plan.skipping(2))


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"KNN_SSD_KERNELS": "off"}, "KNN_SSD_KERNELS=off"),
        ({"CC": "no-such-compiler"}, "no-such-compiler"),
        ({"CC": "false"}, "exit code 1"),
    ],
)
def test_without_kernels_the_transformers_backend_runs(
    variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KNN_SSD_CACHE", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    binding._found.cache_clear()
    try:
        assert reason in (binding.kernels_obstacle() or "")
        assert isinstance(select_backend(wide_model("llama")), TransformersBackend)
        assert not list(tmp_path.rglob("*.so"))
    finally:
        monkeypatch.undo()
        binding._found.cache_clear()


def test_columns_with_large_inputs_get_smaller_errors() -> None:
    """The norm before them makes the inputs of the first eight columns ten times as large; their errors are smaller."""
    model = wide_model("llama", hidden_size=256, initializer_range=0.05)
    layer = model.model.layers[2]
    with torch.no_grad():
        layer.post_attention_layernorm.weight[:8] *= 10
    backend = NativeBackend(model)
    backend.prepare(ALL_LOW)
    importance = backend.low._column_importance(2, "gate")
    assert importance[:8].min() > 10 * importance[8:].mean()
    assert importance.mean() == pytest.approx(1, rel=0.01)
    copy = backend.low.mlp(2).gate
    decoded = weights_of(copy, backend.low.maker.tensors.values())
    errors = (decoded - layer.mlp.gate_proj.weight).square().mean(dim=0)
    assert errors[:8].mean() < 0.7 * errors[8:64].mean()
