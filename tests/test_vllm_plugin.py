"""The parts of the plugin for vLLM that know nothing of vLLM; those that do are tested by `make test-vllm`."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig

from knn_ssd.backends.base import Pooling
from knn_ssd.errors import ModelError, UsageError
from knn_ssd.loading.fingerprint import fingerprint, fingerprint_of_checkpoint
from knn_ssd.loading.resolve import load_model
from knn_ssd.plan import Plan
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.vllm_plugin.hooks import why_unsupported
from knn_ssd.vllm_plugin.low_bit import LowBitWeight
from knn_ssd.vllm_plugin.patches import expand_batch_to_tokens
from knn_ssd.vllm_plugin.routing import PromptVector
from knn_ssd.vllm_plugin.settings import read_settings

PLAN = Plan.skipping(4, [1])


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.31.9", False), ("0.32.0", True), ("0.32.1+cpu", True), ("0.33.2", True), ("0.34.0", False), ("1.0", False),
     ("dev", False)],
)  # fmt: skip
def test_the_window_of_versions(version: str, known: bool) -> None:
    reason = why_unsupported(version)
    assert (reason is None) is known
    assert known or version in str(reason)


def test_vllm_finds_the_plugin() -> None:
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "knn_ssd"]
    assert callable(found.load())


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 5), st.data())
def test_a_prompt_in_chunks_has_the_vector_of_the_whole(chunks: list[int], behind: int, data: st.DataObject) -> None:
    length = sum(chunks)
    hidden = torch.randn(length + behind, 5, generator=torch.Generator().manual_seed(length))
    again = data.draw(st.integers(0, len(chunks)), label="chunks read before a preemption")
    for pooling, expected in ((Pooling.MEAN, hidden[:length].mean(dim=0)), (Pooling.LAST, hidden[length - 1])):
        vector = PromptVector(pooling, length)
        start = 0
        for count in chunks[:again][: len(chunks) - 1]:
            assert vector.add(hidden[start : start + count], start) is None
            start += count
        start, found = 0, None
        for index, count in enumerate(chunks):
            last = index == len(chunks) - 1
            found = vector.add(hidden[start : start + count + (behind if last else 0)], start)
            assert (found is not None) is last
            start += count
        assert found is not None
        torch.testing.assert_close(found, expected)


def test_a_mean_with_a_hole_is_no_mean() -> None:
    hidden = torch.randn(10, 3)
    vector = PromptVector(Pooling.MEAN, 10)
    assert vector.add(hidden[4:], 4) is None  # the first tokens came from a cache
    assert PromptVector(Pooling.LAST, 10).add(hidden[4:], 4) is not None


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 0.8, 1.0]), st.integers(0, 4)), min_size=1, max_size=6))
def test_values_are_repeated_for_the_tokens_of_their_requests(rows: list[tuple[float, int]]) -> None:
    counts = torch.tensor([count for _, count in rows], dtype=torch.int32)
    values = torch.tensor([value for value, _ in rows])
    total = int(counts.sum())
    found = expand_batch_to_tokens(values, counts.cumsum(0), total, replace_from=0, replace_to=1)
    expected = [1.0 if value == 0 else value for value, count in rows for _ in range(count)]
    torch.testing.assert_close(found, torch.tensor(expected).reshape(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [16, 50])
def test_a_4_bit_matrix_is_the_matrix_rounded(dtype: torch.dtype, rows: int) -> None:
    weight = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.ones(rows, dtype=dtype)
    low = LowBitWeight(weight)
    given_back = low.apply(None, x, bias)
    assert given_back.shape == (3, rows)
    wanted = x.float() @ weight.float().T + 1
    wrong = (given_back.float() - wanted).norm() / wanted.norm()
    assert 0.02 < wrong < 0.2  # 0.1 is what 4 bits come to


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_has_the_fingerprint_of_its_model(tmp_path: Path, tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert tied or len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_model(str(tmp_path), device="cpu")
    config = AutoConfig.from_pretrained(tmp_path)
    found = fingerprint_of_checkpoint(tmp_path, config, loaded.tokenizer)
    assert found == fingerprint(loaded.model, loaded.tokenizer)
    save_file(
        {"layers.0.wq": torch.ones(2, 2)}, tmp_path / "consolidated.safetensors"
    )  # which transformers passes over
    assert fingerprint_of_checkpoint(tmp_path, config, loaded.tokenizer) == found
    other = tiny_model("llama", seed=1, tie_word_embeddings=tied)
    assert found.differences(fingerprint(other, loaded.tokenizer))


def test_a_folder_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights as safetensors"):
        fingerprint_of_checkpoint(tmp_path, tiny_model().config, None)


def test_settings_are_read() -> None:
    settings = read_settings({"knn_ssd": {"plan": PLAN.to_json(), "adaptive": False}})
    assert settings.plans == {None: PLAN}
    assert not settings.adaptive
    with pytest.raises(UsageError, match="neither an atlas nor a plan"):
        read_settings({})
