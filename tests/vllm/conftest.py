"""The plugin for vLLM is tested in an environment of its own, by `make test-vllm`; elsewhere vLLM is missing."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from in_vllm import Opener

if importlib.util.find_spec("vllm.config") is None:  # this folder itself looks like a package named vllm
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from in_vllm import save_tiny_model  # within: it sets environment variables that only these tests shall have

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens models in vLLM; drops them after the test."""
    from in_vllm import open_model

    models: list[Any] = []

    def keep(*args: Any, **options: Any) -> Any:
        models.append(open_model(*args, **options))
        return models[-1]

    yield keep
    models.clear()
    gc.collect()
