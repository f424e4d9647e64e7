"""Weights run as the checkpoint has them: float16 in 16 bits, a GGUF file's quantised blocks as they are.

What they give has the bits of the same values in float32, whichever backend runs them.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_files import add_vocabulary, permuted, random_rows, write_family, write_gguf
from helpers import share_kernels
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from knn_ssd import Engine, testing
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.select import select_backend
from knn_ssd.backends.transformers.kernel_backend import KernelBackend
from knn_ssd.bench.methods import make_methods
from knn_ssd.errors import BenchError, ModelError, UsageError
from knn_ssd.kernels import binding, gguf_rows
from knn_ssd.kernels.gguf_rows import GGUFRows, QuantisedEmbedding, QuantisedLinear
from knn_ssd.loading.fingerprint import fingerprint, fingerprint_of_checkpoint
from knn_ssd.loading.resolve import load_model
from knn_ssd.plan import Mode

pytestmark = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")
IDS = list(range(3, 60))
SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 260},
}
HEADS = {"q_proj": 4, "k_proj": 2}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNN_SSD_CACHE", str(tmp_path / "cache"))


def logits(model: PreTrainedModel) -> torch.Tensor:
    """The logits (n, V) of all tokens, in several forward passes."""
    session = select_backend(model).open(len(IDS))
    rows = []
    for start, end in ((0, 30), (30, 31), (31, len(IDS))):
        rows.append(session.forward(IDS[start:end]))
        session.commit(end - start)
    session.close()
    return torch.cat(rows)


# ---- float16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "backend"), [("llama", NativeBackend), ("gemma2", KernelBackend)])
def test_float16_weights_give_the_bits_of_the_same_values_in_float32(family: str, backend: type, tied: bool) -> None:
    narrow = testing.tiny_model(family, **SIZES, tie_word_embeddings=tied).half()
    wide = testing.tiny_model(family, **SIZES, tie_word_embeddings=tied).half().float()
    running = select_backend(narrow)
    assert type(running) is backend
    assert running.weight_bytes < 0.6 * select_backend(wide).weight_bytes
    assert torch.equal(logits(narrow), logits(wide))


def test_a_float16_checkpoint_of_a_native_family_stays_in_float16(tmp_path: Path) -> None:
    testing.tiny_model(**SIZES).half().save_pretrained(tmp_path)
    assert load_model(tmp_path).model.dtype is torch.float16
    testing.tiny_model("gemma2", **SIZES).half().save_pretrained(tmp_path / "gemma2")
    assert load_model(tmp_path / "gemma2").model.dtype is torch.float32


PEAK = """
import resource, sys
from knn_ssd.backends.select import select_backend
from knn_ssd.loading.resolve import load_model
import transformers.models.llama.modeling_llama
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
select_backend(load_model(sys.argv[1]).model)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured in the units of Linux")
def test_no_float32_copy_of_a_float16_checkpoint_is_made(tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    testing.tiny_model(**sizes, dtype=torch.float16).save_pretrained(tmp_path)
    share_kernels(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    in_file = (tmp_path / "model.safetensors").stat().st_size
    assert in_file > 80e6
    assert int(done.stdout) < 2.9 * in_file  # the file's pages, the blocks, and what was allocated around them


# ---- GGUF files


def write_blocks(
    path: Path, chosen: Callable[[str], str], tied: bool = True, more: Callable[[GGUFWriter], None] = lambda _: None
) -> PreTrainedModel:
    """Writes a file of random blocks, and returns the model that the `gguf` package unpacks from it to float32.

    Args:
        path: the file.
        chosen: the type of each matrix, by its name in the model.
        tied: whether the head has no weight of its own.
        more: adds metadata or tensors.
    """
    model = testing.tiny_model(**SIZES, tie_word_embeddings=tied)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_block_count(2)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(260)
    add_vocabulary(writer, "smollm")
    more(writer)
    for name, weight in model.named_parameters():
        theirs = gguf_name(name)
        if weight.dim() < 2:
            weight.copy_(1 + torch.randn(len(weight)) / 10)
            writer.add_tensor(theirs, weight.numpy())
            continue
        kind, heads = chosen(name), next((count for part, count in HEADS.items() if part in name), None)
        if kind == "F16":
            weight.copy_(weight.half())
            writer.add_tensor(theirs, permuted(weight.half().numpy(), heads) if heads else weight.half().numpy())
            continue
        rows = random_rows(kind, *weight.shape)
        weight.copy_(rows.dequantised())
        data = rows.data.numpy()
        stored = permuted(data, heads) if heads else data
        writer.add_tensor(theirs, stored, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def gguf_name(name: str) -> str:
    from gguf import MODEL_ARCH, get_tensor_name_map

    stem, _, suffix = name.rpartition(".")
    return f"{get_tensor_name_map(MODEL_ARCH.LLAMA, 2).get_name(stem)}.{suffix}"


def a_mixture(name: str) -> str:
    """As in files of Q4_K_M, and an embedding in float16."""
    if "embed" in name:
        return "F16"
    return "Q6_K" if "v_proj" in name or "down_proj" in name else "Q4_K"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q4_0", "mixture"])
def test_a_quantised_file_gives_the_bits_of_its_unpacked_values(tmp_path: Path, kind: str, tied: bool) -> None:
    file = tmp_path / "t.gguf"
    expected = write_blocks(file, a_mixture if kind == "mixture" else lambda _: kind, tied)
    for _ in range(2):  # at the first run and at the second, which finds the converted model
        loaded = load_model(file)
        assert type(select_backend(loaded.model)) is NativeBackend
        assert torch.equal(logits(loaded.model), logits(expected))
        quantised = [module for module in loaded.model.modules() if isinstance(module, QuantisedLinear)]
        assert len(quantised) == 15
    # without the kernels the values are the same
    ids = torch.tensor([IDS])
    torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


OTHERS = {  # by transformers' name: llama.cpp's, and sizes
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3", {"layer_types": None}),
    "phi3": ("phi3", {"head_dim": None, "vocab_size": 32064}),
    "stablelm": ("stablelm", {"qk_layernorm": False}),
    "starcoder2": ("starcoder2", {"head_dim": None, "vocab_size": 49152}),  # transformers' default
    "nemotron": ("nemotron", {"head_dim": None}),
}


def another_mixture(name: str) -> str:
    """As in files of Q4_K_M whose matrices have no multiple of 256 columns."""
    return "Q8_0" if "embed" in name or "lm_head" in name or "v_proj" in name else "Q5_0"


def read_by_transformers(file: Path) -> PreTrainedModel:
    """The model in a file, its weights unpacked to float32 by transformers."""
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", OTHERS)
def test_a_quantised_file_of_another_family_gives_the_bits_of_its_unpacked_values(tmp_path: Path, family: str) -> None:
    file, (architecture, sizes) = tmp_path / "t.gguf", OTHERS[family]
    write_family(file, family, architecture, another_mixture, **sizes)
    expected = read_by_transformers(file)
    for _ in range(2):  # at the first run and at the second, which finds the converted model
        loaded = load_model(file).model
        backend = select_backend(loaded)
        assert type(backend) is KernelBackend
        assert torch.equal(logits(loaded), logits(expected))
    ids = torch.tensor([IDS])
    torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    quantised = [module for module in loaded.modules() if isinstance(module, QuantisedLinear | QuantisedEmbedding)]
    assert len(quantised) == len([each for each in expected.modules() if isinstance(each, nn.Linear | nn.Embedding)])
    assert backend.weight_bytes < 1.3 * file.stat().st_size  # an embedding that is the head as well is there once
    engine = Engine(loaded, answers=False, backend=backend)
    plain = engine.generate(IDS, max_new_tokens=30, plain=True)
    assert engine.generate(IDS, max_new_tokens=30).token_ids == plain.token_ids


@pytest.mark.parametrize("family", OTHERS)
def test_a_dtype_unpacks_the_blocks_of_another_family_as_transformers_does(tmp_path: Path, family: str) -> None:
    file, (architecture, sizes) = tmp_path / "t.gguf", OTHERS[family]
    write_family(file, family, architecture, another_mixture, **sizes)
    own, expected = load_model(file, dtype="bfloat16").model.state_dict(), read_by_transformers(file).state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], weight.bfloat16()) for name, weight in expected.items())


def test_the_transformers_backend_runs_the_blocks_as_well(tmp_path: Path) -> None:
    expected = write_blocks(tmp_path / "t.gguf", lambda _: "Q8_0")
    found = [KernelBackend(model) for model in (load_model(tmp_path / "t.gguf").model, expected)]
    sessions = [backend.open(len(IDS)) for backend in found]
    own, wanted = (session.forward(IDS) for session in sessions)
    assert torch.equal(own, wanted)
    assert found[0].weight_bytes < 0.4 * found[1].weight_bytes


@pytest.mark.parametrize(
    ("kind", "share"),
    [("Q8_0", 34 / 32), ("Q6_K", 28 / 32), ("Q5_0", 22 / 32), ("Q4_K", 22 / 32), ("Q4_0", 18 / 32)],
)
def test_memory_and_drafts_of_a_quantised_file(
    tmp_path: Path, kind: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A 4-bit copy that is about as large as the weights would draft no faster than the model itself."""
    expected = write_blocks(tmp_path / "t.gguf", lambda _: kind)
    engine = Engine(load_model(tmp_path / "t.gguf").model, answers=False)
    weights = sum(weight.numel() for weight in expected.parameters())
    assert engine.backend.weight_bytes == pytest.approx(share * weights, rel=0.1)
    assert (Mode.LOW in engine.backend.modes) == (kind in ("Q8_0", "Q6_K"))
    said = [record.getMessage() for record in caplog.records if "drafts without 4-bit weights" in record.getMessage()]
    assert len(said) == (kind in ("Q5_0", "Q4_K", "Q4_0"))
    result = engine.generate(IDS, max_new_tokens=30)
    assert result.token_ids == Engine(expected, answers=False).generate(IDS, max_new_tokens=30, plain=True).token_ids
    assert engine.generate(IDS, max_new_tokens=30, plain=True).token_ids == result.token_ids


def test_unpacking_in_every_forward_pass_is_no_baseline(tmp_path: Path) -> None:
    write_blocks(tmp_path / "t.gguf", lambda _: "Q8_0")
    with pytest.raises(BenchError, match="no baseline"):
        make_methods(["hf"], Engine(load_model(tmp_path / "t.gguf").model, answers=False))
    make_methods(["hf"], Engine(load_model(tmp_path / "t.gguf", dtype="float32").model, answers=False))


def test_a_dtype_unpacks_the_blocks(tmp_path: Path) -> None:
    expected = write_blocks(tmp_path / "t.gguf", lambda _: "Q8_0")
    loaded = load_model(tmp_path / "t.gguf", dtype="bfloat16").model
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    head: nn.Linear = expected.get_output_embeddings()
    assert torch.equal(loaded.get_output_embeddings().weight, head.weight.bfloat16())
    blocks = load_model(tmp_path / "t.gguf").directory
    assert blocks is not None
    assert load_model(blocks).directory == blocks
    with pytest.raises(UsageError, match="quantised blocks"):
        load_model(blocks, dtype="float32")


def test_a_type_that_the_kernels_do_not_know_is_unpacked_and_its_cost_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_gguf(tmp_path / "t.gguf", kind=GGMLQuantizationType.Q5_1)
    model = load_model(file).model
    assert not any(isinstance(module, QuantisedLinear | QuantisedEmbedding) for module in model.modules())
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("Q5_1" in each and "KiB become" in each and "rounds" in each for each in said)
    caplog.clear()
    load_model(file)  # once for a file
    assert not [record for record in caplog.records if "Q5_1" in record.getMessage()]


def test_the_fingerprint_is_that_of_the_files_and_of_the_unpacked_weights(tmp_path: Path) -> None:
    for tied in (True, False):
        write_blocks(tmp_path / f"{tied}.gguf", lambda _: "Q8_0", tied)
        loaded = load_model(tmp_path / f"{tied}.gguf")
        assert loaded.directory is not None
        config = AutoConfig.from_pretrained(loaded.directory)
        own = fingerprint(loaded.model, loaded.tokenizer)
        assert own.dtype == "Q8_0"
        assert own.differences(fingerprint_of_checkpoint(loaded.directory, config, loaded.tokenizer)) == ()
        unpacked = load_model(tmp_path / f"{tied}.gguf", dtype="bfloat16")
        assert own.differences(fingerprint(unpacked.model, unpacked.tokenizer)) == ()  # the same model
    other = write_blocks(tmp_path / "other.gguf", lambda _: "Q6_K", tied=False)
    assert own.differences(fingerprint(other, unpacked.tokenizer))


def test_a_damaged_conversion_is_an_error_in_words(tmp_path: Path) -> None:
    write_blocks(tmp_path / "t.gguf", lambda _: "Q8_0")
    directory = load_model(tmp_path / "t.gguf").directory
    assert directory is not None
    types = directory / "gguf_blocks.json"
    types.write_text(types.read_text("utf-8").replace("Q8_0", "Q4_0"), "utf-8")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model(tmp_path / "t.gguf")
    assert "converted again" in str(caught.value.hint)


def test_rows_of_an_embedding_are_unpacked_alone() -> None:
    table = nn.Embedding(40, 64)
    quantised = QuantisedEmbedding(table, "Q8_0")
    rows = random_rows("Q8_0", 40, 64)
    quantised.weight = nn.Parameter(rows.data, requires_grad=False)
    ids = torch.tensor([[3, 39], [0, 3]])
    assert torch.equal(quantised(ids), rows.dequantised()[ids])
    assert rows.shape == (40, 64)
    assert np.array_equal(GGUFRows(rows.data[3:4], "Q8_0", 64).dequantised().numpy(), rows.dequantised()[3:4].numpy())


@pytest.mark.parametrize("bias", [True, False])
def test_a_matrix_is_unpacked_in_parts(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[int] = []
    own = GGUFRows.dequantised

    def dequantised(rows: GGUFRows) -> torch.Tensor:
        unpacked.append(rows.shape[0])
        return own(rows)

    monkeypatch.setattr(GGUFRows, "dequantised", dequantised)
    monkeypatch.setattr(gguf_rows, "_MOST_VALUES", 64 * 17)
    linear, rows = nn.Linear(64, 40, bias=bias).requires_grad_(False), random_rows("Q8_0", 40, 64)
    quantised, inputs = QuantisedLinear(linear, "Q8_0"), torch.randn(2, 3, 64)
    quantised.weight = nn.Parameter(rows.data, requires_grad=False)
    expected = nn.functional.linear(inputs, own(rows), linear.bias)
    torch.testing.assert_close(quantised(inputs), expected)
    assert unpacked == [17, 17, 6]
