"""Checks a directory before its weights are loaded, and reads its tokenizer.

What people have instead of a whole model (an adapter, a classifier, half a download) is refused here in a sentence.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from knn_ssd.errors import ModelError, UnsupportedModelError
from knn_ssd.loading.files import WEIGHTS, has_vocabulary, how_to_restore, raised_as, read_json, reason, weight_files
from knn_ssd.loading.pretrained import check_causal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Vocabularies without a tokenizer.json, and the packages by which transformers may read them: what to import, and what
# to install.
_PACKAGES = {
    "*.model": {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf", "tiktoken": "tiktoken"},
    "*.tiktoken": {"tiktoken": "tiktoken"},
    "tekken.json": {"mistral_common": "mistral-common"},
}


def read_config(directory: Path) -> PreTrainedConfig:
    """The config of a decoder in a directory.

    Raises:
        ModelError: it cannot be read, or the model is none that can be loaded.
    """
    _refuse_adapter(directory)
    path = directory / "config.json"
    kind = read_json(path).get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know model_type {kind!r} of '{directory}'",
            "Looked for a decoder model built into transformers; code from a checkpoint is never run.",
        )
    with raised_as(ModelError, f"'{path}' is not a usable config", how_to_restore(directory)):
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        int(getattr(config.get_text_config(), "num_hidden_layers", 0))  # early versions of transformers 5 check nothing
    check_causal(config, str(directory))
    return config


def check_weights(directory: Path) -> None:
    """Raises a `ModelError` if weight files are missing or not complete."""
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


def _refuse_adapter(directory: Path) -> None:
    """Raises an `UnsupportedModelError` for a directory with an adapter such as LoRA's, even beside a whole model."""
    if not (directory / "adapter_config.json").is_file():
        return
    adapter = read_json(directory / "adapter_config.json")
    kind, base = adapter.get("peft_type", "adapter"), adapter.get("base_model_name_or_path", "another model")
    raise UnsupportedModelError(
        f"'{directory}' holds an adapter ({kind}) of '{base}', not a model of its own",
        "Merge it first: load both with peft's `AutoPeftModelForCausalLM.from_pretrained`, and save what "
        "`merge_and_unload()` returns.",
    )


def tokenizer_in(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a directory; None if it holds no vocabulary.

    Raises:
        ModelError: the tokenizer cannot be read, perhaps for want of a package, which is named.
    """
    if not has_vocabulary(directory):
        logger.info("no vocabulary in %s: the model takes token ids only", directory)
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        fact, remedy = f"the tokenizer in '{directory}' cannot be read", how_to_restore(directory)
        if absent := _absent_packages(directory):
            fact += f" without {' or '.join(absent)}"
            remedy = f"Run `pip install {' '.join(absent)}`, or save the tokenizer as a tokenizer.json elsewhere."
        raise ModelError(f"{fact}: {reason(error)}", remedy) from error
    return tokenizer


def _absent_packages(directory: Path) -> list[str]:
    """Packages that are not installed and that transformers may need for the vocabulary in a directory."""
    if (directory / "tokenizer.json").is_file():
        return []
    kinds = [packages for pattern, packages in _PACKAGES.items() if next(directory.glob(pattern), None)]
    return list(dict.fromkeys(package for kind in kinds for name, package in kind.items() if not _is_installed(name)))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
