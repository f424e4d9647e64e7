"""Selects the backend of a model: the native backend if it supports the model, else the transformers backend."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel

from knn_ssd.backends.base import Backend
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.obstacles import native_obstacle
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.backends.transformers.kernel_backend import KernelBackend, KernelLinearBackend, KernelsRefusedError
from knn_ssd.kernels.binding import kernels_obstacle
from knn_ssd.weight_cache import WeightCache

logger = logging.getLogger(__name__)


# What users of the transformers backend should know, by what of the model the kernels run.
_LACKS = {
    "linear layers": "drafts may change its output by rounding",
    "nothing": "it is slower and has no 4-bit drafts",
}


def select_backend(model: PreTrainedModel, directory: Path | None = None) -> Backend:
    """The backend that executes a model. One that cannot use all of the kernels is reported by a warning that says why.

    Args:
        model: the model.
        directory: the directory that it was loaded from, unchanged; its packed weights and their 4-bit copies are then
            kept in the weight cache. None keeps none.

    Raises:
        UnsupportedModelError: the model cannot draft for itself; the message says what was looked for.
        UsageError: $KNN_SSD_WEIGHT_CACHE is not a number of GiB.
    """
    obstacle = native_obstacle(model)
    cache = WeightCache.of(model, directory) if directory is not None and kernels_obstacle() is None else None
    if obstacle is None:
        return NativeBackend(model, cache)
    backend = _transformers_backend(model, cache)
    if lacks := _LACKS.get(backend.kernels_run):
        refused = backend.refused or ""
        reasons = refused if obstacle in refused else f"{obstacle}; {refused}"
        logger.warning("%s runs on the transformers backend, where %s: %s", type(model).__name__, lacks, reasons)
    return backend


def _transformers_backend(model: PreTrainedModel, cache: WeightCache | None) -> TransformersBackend:
    """The transformers backend, with as much of the kernels as the model can use."""
    refused = None
    for kind in (KernelBackend, KernelLinearBackend):
        try:
            return kind(model, refused, cache)
        except KernelsRefusedError as error:
            refused = str(error)
    return TransformersBackend(model, refused)
