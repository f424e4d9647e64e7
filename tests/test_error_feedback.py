"""Rounding with error feedback: smaller errors of outputs, in the same format, kept for later starts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from knn_ssd.atlas import Atlas
from knn_ssd.backends.native import error_feedback
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.error_feedback import fitted_copies, round_with_feedback
from knn_ssd.calibrate import low_bit_fit
from knn_ssd.calibrate.continuations import Observation
from knn_ssd.calibrate.low_bit_fit import divergence, fit_low_bit, texts_in_turn
from knn_ssd.calibrate.pipeline import calibrate
from knn_ssd.calibrate.settings import CalibrationSettings
from knn_ssd.engine import Engine
from knn_ssd.kernels.binding import GROUP_SIZE, kernels, kernels_obstacle
from knn_ssd.kernels.quantisation import low_matrix, quantise
from knn_ssd.kernels.weights import TensorKeeper, make_matrix
from knn_ssd.loading.resolve import load_model
from knn_ssd.plan import Plan
from knn_ssd.progress import NoProgress, Progress
from knn_ssd.prompts import Prompt
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.weight_cache import LIMIT_VARIABLE

pytestmark = pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")

TEXTS = [tuple(range(3 + i, 33 + i)) for i in range(12)]
SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}


def decoded(levels: torch.Tensor, scales: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The weights (rows, cols) of tensors that the kernels read."""
    lanes, groups = kernels().knn_ssd_lanes(), -(-cols // GROUP_SIZE)
    codes = levels.view(-1, groups, 8, lanes, 4)
    halves = torch.stack([codes & 15, codes >> 4], dim=2).permute(0, 4, 1, 2, 3, 5).reshape(-1, lanes, groups, 64)
    pairs = scales.view(-1, groups, lanes, 2).float().transpose(1, 2)
    weights = halves * pairs[..., :1] + pairs[..., 1:]
    return weights.reshape(-1, groups * GROUP_SIZE)[:rows, :cols]


def outputs_error(weight: torch.Tensor, copy: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (copy - weight).T).detach().square().mean())


@pytest.mark.parametrize(("rows", "cols"), [(7, 64), (33, 96), (100, 320)])
def test_outputs_err_less_than_with_the_other_rounding(rows: int, cols: int) -> None:
    """Inputs whose columns go together: what one column spoils, others can make up for. Also on inputs not seen."""
    torch.manual_seed(0)
    linear = nn.Linear(cols, rows, bias=False)
    inputs = torch.randn(4 * cols, cols // 4) @ torch.randn(cols // 4, cols) + 0.1 * torch.randn(4 * cols, cols)
    fitted, others = inputs.split(2 * cols)
    products = fitted.T @ fitted
    rounding = round_with_feedback(linear.weight, products)
    importance = products.diagonal() / products.diagonal().mean()
    keeper = TensorKeeper()
    usual = decoded(*quantise(make_matrix(linear.weight, linear.bias, keeper), importance), rows, cols)
    for seen, share in ((fitted, 0.5), (others, 0.7)):
        error = outputs_error(linear.weight, rounding.weights(), seen)
        assert error < share * outputs_error(linear.weight, usual, seen)


@pytest.mark.parametrize(("rows", "cols"), [(7, 64), (33, 96), (100, 320)])
def test_the_kernels_read_what_was_rounded(rows: int, cols: int) -> None:
    torch.manual_seed(0)
    linear, inputs = nn.Linear(cols, rows, bias=False), torch.randn(300, cols)
    rounding = round_with_feedback(linear.weight, inputs.T @ inputs)
    assert rounding.levels.min() >= 0
    assert rounding.levels.max() <= 15
    assert torch.equal(rounding.levels, rounding.levels.round())
    packed = rounding.packed()
    keeper = TensorKeeper()
    usual = quantise(make_matrix(linear.weight, linear.bias, keeper), torch.ones(cols))
    assert [(each.shape, each.dtype) for each in packed] == [(each.shape, each.dtype) for each in usual]
    assert torch.equal(decoded(*packed, rows, cols), rounding.weights())
    keeper = TensorKeeper()
    matrix = low_matrix(make_matrix(linear.weight, linear.bias, keeper), *packed)
    assert (matrix.rows, matrix.cols) == (rows, cols)


UNKNOWN = {
    "nothing": torch.zeros(96, 96),
    "not a number": torch.full((96, 96), torch.nan),
    "infinite": torch.eye(96) * torch.inf,
    "one token": torch.ones(96, 96),
    "some columns": torch.diag((torch.arange(96) % 3 == 0).float()),
}


@pytest.mark.parametrize("products", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("weight", ["random", "zero", "constant"])
def test_whatever_is_known_of_the_inputs_weights_stay_near(weight: str, products: torch.Tensor) -> None:
    torch.manual_seed(0)
    original = torch.randn(16, 96) * (weight == "random") + (weight == "constant")
    copy = round_with_feedback(original, products).weights()
    assert torch.isfinite(copy).all()
    assert (copy - original).norm() <= 0.5 * original.norm()


def test_products_are_those_of_all_rows_but_the_first() -> None:
    model = tiny_model("llama", **SIZES)
    linear = model.model.layers[2].mlp.down_proj
    seen: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    products, head = error_feedback._input_products(model, {2: {"down": linear}}, TEXTS)
    handle.remove()
    rows = torch.cat([each[4:] for each in seen])
    assert torch.allclose(products[2, "down"], rows.T @ rows, rtol=1e-4, atol=1e-2)  # sums of up to thousands
    hidden = [model.model(torch.tensor([text])).last_hidden_state[0, 4:] for text in TEXTS]
    assert torch.allclose(
        head, torch.cat(hidden).T @ torch.cat(hidden), rtol=1e-4, atol=1e-2
    )  # sums of up to thousands


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_copies_are_the_same_however_many_layers_fit_in_memory(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, **SIZES)
    whole = fitted_copies(model, TEXTS, NoProgress())
    monkeypatch.setattr(error_feedback, "_PRODUCT_BYTES", 1)
    parts = fitted_copies(model, TEXTS, NoProgress())
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    backend = NativeBackend(model)
    backend.prepare(Plan.low(4))
    assert {name: (each.shape, each.dtype) for name, each in whole.items()} == {
        name: (each.shape, each.dtype) for name, each in backend.low.maker.tensors.items()
    }


def test_fitted_copies_draft_nearer_to_the_model_and_change_no_output() -> None:
    model = tiny_model("llama", **SIZES, initializer_range=0.1)
    backend, fitted = NativeBackend(model), NativeBackend(model)
    fitted.prepare(Plan.low(4))
    fitted.replace_low_bit(fitted_copies(model, TEXTS, NoProgress()))
    errors = []
    for each in (backend, fitted):
        session = each.open(64)
        session.prefill([5, 9, 12])
        full = session.forward(list(range(10, 40))).clone()
        low = session.forward(list(range(10, 40)), Plan.low(4))
        errors.append(float((full - low).square().mean()))
    assert errors[1] < 0.9 * errors[0]
    engines = [Engine(model, backend=each) for each in (backend, fitted)]
    plain = engines[0].generate([5, 9, 12], max_new_tokens=30, plain=True).token_ids
    assert all(engine.generate([5, 9, 12], max_new_tokens=30).token_ids == plain for engine in engines)


# ---- In a calibration


def observation(domain: str, number: int, count: int) -> Observation:
    chooser = random.Random(f"{domain}{number}")
    tokens = tuple(chooser.randrange(3, 128) for _ in range(count))
    return Observation(domain, f"{domain}{number}", (1, 2, 3), tokens, ())


def test_text_is_taken_from_all_domains_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit_fit, "_MAX_TOKENS", 60)
    many = [observation("a", i, 10) for i in range(9)]
    texts = texts_in_turn([many, [observation("b", 0, 7), observation("b", 1, 0)]])
    assert [each.id for each in texts] == ["a0", "b0", "a1", "a2", "a3"]


@pytest.mark.parametrize("better", [True, False])
def test_copies_are_replaced_by_better_ones_only(better: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged on text to which they were not fitted."""
    model = tiny_model("llama", **SIZES, initializer_range=0.1)
    backend = NativeBackend(model)
    domains = [[observation(name, i, 24) for i in range(8)] for name in "ab"]
    held_out = texts_in_turn(domains)[12:]
    fitted_to: list[tuple[int, ...]] = []

    def copies(model: PreTrainedModel, texts: Sequence[tuple[int, ...]], progress: Progress) -> dict[str, torch.Tensor]:
        fitted_to.extend(texts)
        made = fitted_copies(model, texts, progress)
        return made if better else {name: torch.zeros_like(each) for name, each in made.items()}

    monkeypatch.setattr(low_bit_fit, "fitted_copies", copies)
    before = divergence(backend, held_out)
    usual = dict(backend.low.maker.tensors)
    assert fit_low_bit(backend, domains, NoProgress()) == better
    assert len(fitted_to) == 12
    assert not {(*each.prompt_ids, *each.token_ids) for each in held_out} & set(fitted_to)
    after = divergence(backend, held_out)
    assert after < 0.9 * before if better else after == before
    assert all(tensor is backend.low.maker.tensors[name] for name, tensor in usual.items()) != better


def test_too_little_text_changes_nothing() -> None:
    backend = NativeBackend(tiny_model("llama", **SIZES))
    assert not fit_low_bit(backend, [[observation("a", i, 9) for i in range(3)]], NoProgress())
    assert backend.low.bytes == 0


@pytest.mark.parametrize("keeps", [True, False])
def test_a_calibration_leaves_fitted_copies_for_later_starts(
    keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNN_SSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(LIMIT_VARIABLE, "1" if keeps else "0")
    tiny_model("llama", **SIZES, eos_token_id=None).save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    usual = Engine.from_pretrained(tmp_path / "model", device="cpu")
    usual.prepare()
    divergences = iter([2.0, 1.0])  # before and after
    monkeypatch.setattr(low_bit_fit, "divergence", lambda *_: next(divergences))
    prompts = [Prompt(id=f"{d}{i}", domain=d, prompt=f"{d} number {i}") for d in ("math", "story") for i in range(4)]
    settings = CalibrationSettings(trials=2, search_prompts=2, judging_prompts=2, anchors=1, new_tokens=24)
    atlas = calibrate(load_model(tmp_path / "model", device="cpu"), prompts, tmp_path / "atlas", settings)
    assert isinstance(atlas, Atlas)
    later = Engine.from_pretrained(tmp_path / "model", device="cpu")
    later.prepare()
    tensors = [engine.backend.low.maker.tensors for engine in (usual, later)]
    assert tensors[0].keys() == tensors[1].keys()
    assert any(not torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items()) == keeps
