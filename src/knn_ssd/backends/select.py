"""Selects the backend of a model: the native backend if it supports the model, else the transformers backend."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel

from knn_ssd.backends.base import Backend
from knn_ssd.backends.native.backend import NativeBackend, native_obstacle
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.weight_cache import WeightCache

logger = logging.getLogger(__name__)


def select_backend(model: PreTrainedModel, directory: Path | None = None) -> Backend:
    """The backend that executes a model. One that cannot use the kernels is reported by a warning that says why.

    Args:
        model: the model.
        directory: the directory that it was loaded from, unchanged; the 4-bit copies of its weights are then kept in
            the weight cache. None keeps none.

    Raises:
        UnsupportedModelError: the model cannot draft for itself; the message says what was looked for.
        UsageError: $KNN_SSD_WEIGHT_CACHE is not a number of GiB.
    """
    obstacle = native_obstacle(model)
    if obstacle is None:
        return NativeBackend(model, WeightCache.of(model, directory) if directory is not None else None)
    backend = TransformersBackend(model)
    logger.warning(
        "%s runs on the transformers backend, slower and without 4-bit drafts: %s", type(model).__name__, obstacle
    )
    return backend
