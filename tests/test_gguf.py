"""What a GGUF file states reaches the model, or the file is refused: at the first run and at every later one."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf_files import tiny_model, write_family, write_gguf
from huggingface_hub import constants
from transformers import PreTrainedModel

from knn_ssd.errors import ModelError, UnsupportedModelError
from knn_ssd.loading.resolve import load_model

IDS = torch.arange(3, 83)[None]
YARN = {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("KNN_SSD_CACHE", str(tmp_path / "cache"))


def scaled(**parameters: Any) -> PreTrainedModel:
    """The tiny model with a position scaling, as transformers has it."""
    config = tiny_model().config
    config.rope_parameters = {"rope_theta": 10000.0, **parameters}
    model = type(tiny_model())(config).eval()
    model.load_state_dict(tiny_model().state_dict())
    return model


def says_the_same(file: Path, expected: PreTrainedModel) -> None:
    """At the first run and at the second, which finds the converted model."""
    for _ in range(2):
        logits = load_model(file, dtype="float32").model(IDS).logits
        torch.testing.assert_close(logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


def refused(file: Path, *words: str) -> None:
    """At the first run and at the second."""
    for _ in range(2):
        with pytest.raises(UnsupportedModelError) as caught:
            load_model(file)
        assert all(word in caught.value.message for word in (str(file), *words)), caught.value.message
        assert caught.value.hint is not None


def metadata(**values: Any) -> Callable[[GGUFWriter], None]:
    """Metadata of the architecture llama; `__` is a dot."""

    def more(writer: GGUFWriter) -> None:
        for name, value in values.items():
            key = f"llama.{name.replace('__', '.')}"
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_float32(key, value)

    return more


def with_tensor(name: str, values: np.ndarray) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_tensor(name, values.astype(np.float32))


def test_rope_factors_are_applied(tmp_path: Path) -> None:
    """As llama.cpp's converter writes them for Llama 3.1 and later."""
    expected = scaled(**LLAMA3)
    plain = 1 / 10000.0 ** (np.arange(0, 8, 2) / 8)
    factors = plain / expected.model.rotary_emb.inv_freq.numpy()
    assert factors.max() > 2
    file = write_gguf(tmp_path / "tiny.gguf", more=with_tensor("rope_freqs.weight", factors))
    says_the_same(file, expected)
    assert (load_model(file).model(IDS).logits - tiny_model()(IDS).logits).abs().max() > 0.1


def test_rope_factors_of_one_change_nothing(tmp_path: Path) -> None:
    says_the_same(write_gguf(tmp_path / "t.gguf", more=with_tensor("rope_freqs.weight", np.ones(4))), tiny_model())


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_position_scaling_is_applied(tmp_path: Path, kind: str) -> None:
    length = {} if kind == "linear" else {"rope__scaling__original_context_length": 32}
    more = metadata(rope__scaling__type=kind, rope__scaling__factor=4.0, **length)
    own = {} if kind == "linear" else {"original_max_position_embeddings": 32}
    says_the_same(write_gguf(tmp_path / "t.gguf", more=more), scaled(rope_type=kind, factor=4.0, **own))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"rope__scaling__type": "yarn"}, "yarn"),
        ({"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0}, "longrope"),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0, "rope__scaling__attn_factor": 2.0},
            "attn_factor",
        ),
        ({"attention__scale": 0.5}, "attention.scale"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"attention__causal": False}, "causal"),
        ({"attention__key_length": 8, "attention__value_length": 16}, "head"),
        ({"attention__key_length": 16}, "head"),
    ],
)
def test_metadata_without_a_place_in_the_model_is_refused(tmp_path: Path, values: dict[str, Any], word: str) -> None:
    refused(write_gguf(tmp_path / "t.gguf", more=metadata(**values)), word)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.1.ffn_gate_inp.weight", "rope_factors_long.weight"])
def test_a_tensor_without_a_place_in_the_model_is_refused(tmp_path: Path, name: str) -> None:
    refused(write_gguf(tmp_path / "t.gguf", more=with_tensor(name, np.ones(32))), name)


def test_scaling_metadata_that_scales_nothing_is_accepted(tmp_path: Path) -> None:
    says_the_same(write_gguf(tmp_path / "t.gguf", more=metadata(rope__scaling__type="none")), tiny_model())


def test_position_scaling_of_gemma_3_is_that_of_layers_without_a_window(tmp_path: Path) -> None:
    def more(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    write_family(tmp_path / "plain.gguf", "gemma3_text", "gemma3", num_hidden_layers=6, layer_types=None)
    write_family(tmp_path / "t.gguf", "gemma3_text", "gemma3", more=more, num_hidden_layers=6, layer_types=None)
    plain = load_model(tmp_path / "plain.gguf", dtype="float32").model
    config = copy.deepcopy(plain.config)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    config.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    expected = type(plain)(config).eval()
    expected.load_state_dict(plain.state_dict())
    says_the_same(tmp_path / "t.gguf", expected)
    assert (expected(IDS).logits - plain(IDS).logits).abs().max() > 0.01


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_queries_of_the_gemmas_of_27b_are_scaled_as_there(tmp_path: Path, family: str, layers: int) -> None:
    """As llama.cpp does, which knows these by the number of their layers; the file does not say it."""
    for count, scalar in ((layers, 8), (layers - 1, 256)):
        sizes = {"num_hidden_layers": count, "layer_types": None}
        write_family(tmp_path / f"{count}.gguf", family, family.removesuffix("_text"), **sizes)
        assert load_model(tmp_path / f"{count}.gguf").model.config.query_pre_attn_scalar == scalar


# Other architectures


@pytest.mark.parametrize(("family", "sizes"), [("qwen2", {"head_dim": None}), ("qwen3", {"head_dim": 8})])
@pytest.mark.parametrize("tied", [True, False])
def test_qwen_with_its_biases_and_norms(tmp_path: Path, family: str, sizes: dict[str, Any], tied: bool) -> None:
    expected = write_family(tmp_path / "t.gguf", family, family, splitting="smollm", tie_word_embeddings=tied, **sizes)
    says_the_same(tmp_path / "t.gguf", expected)


def test_what_transformers_would_leave_out_of_an_architecture_of_its_own_is_refused(tmp_path: Path) -> None:
    """Falcon goes by transformers' reader."""
    write_family(tmp_path / "t.gguf", "falcon", "falcon")
    assert load_model(tmp_path / "t.gguf").model.config.model_type == "falcon"
    write_family(tmp_path / "t.gguf", "falcon", "falcon", more=with_tensor("blk.0.attn_qkv.bias", np.ones(48)))
    refused(tmp_path / "t.gguf", "48 of")


def test_a_tensor_without_a_place_in_another_family_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32064, "head_dim": None}  # transformers' default for the padding token is 32000
    write_family(tmp_path / "t.gguf", "phi3", "phi3", **sizes)
    assert load_model(tmp_path / "t.gguf").model.config.model_type == "phi3"
    more = with_tensor("blk.0.attn_qkv.bias", np.ones(64))
    write_family(tmp_path / "t.gguf", "phi3", "phi3", more=more, **sizes)
    refused(tmp_path / "t.gguf", "blk.0.attn_qkv.bias")


# Split files


def split(directory: Path, count: int = 3, **options: Any) -> list[Path]:
    """The parts of a split file, as `llama-gguf-split` writes them: metadata in the first, tensors in all."""
    whole = write_gguf(directory / "whole.gguf", **options)
    parts = [directory / f"tiny-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    from gguf import GGUFReader

    tensors = GGUFReader(whole).tensors
    share = math.ceil(len(tensors) / count)
    for number, part in enumerate(parts):
        own = tensors[number * share : (number + 1) * share]
        if number == 0:
            write_gguf(part, only=[tensor.name for tensor in own], **options)
            continue
        writer = GGUFWriter(part, "llama")
        writer.add_uint16("split.no", number)
        for tensor in own:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    whole.unlink()
    return parts


@pytest.mark.parametrize("named", [0, 2])
@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0])
def test_the_parts_of_a_split_file_are_joined(tmp_path: Path, named: int, kind: GGMLQuantizationType) -> None:
    (tmp_path / "whole").mkdir()
    expected = load_model(write_gguf(tmp_path / "whole" / "tiny.gguf", kind=kind), dtype="float32").model
    loaded = load_model(split(tmp_path, kind=kind)[named], dtype="float32")
    assert torch.equal(loaded.model(IDS).logits, expected(IDS).logits)
    assert loaded.tokenizer is not None


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"tiny-00002-of-00003\.gguf is not beside it") as caught:
        load_model(parts[0])
    assert "all parts" in str(caught.value.hint)


def test_a_changed_part_is_converted_again(tmp_path: Path) -> None:
    parts = split(tmp_path)
    first = load_model(parts[0]).directory
    other = tiny_model()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    (tmp_path / "other").mkdir()
    for part in split(tmp_path / "other", model=other)[1:]:
        shutil.copy(part, tmp_path / part.name)
    assert load_model(parts[0]).directory != first
