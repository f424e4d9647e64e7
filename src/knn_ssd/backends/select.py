"""Selects the backend of a model: the native backend if it supports the model, else the transformers backend."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from knn_ssd.backends.base import Backend
from knn_ssd.backends.native.backend import NativeBackend, native_obstacle
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.backends.transformers.kernel_backend import KernelBackend, KernelLinearBackend, KernelsRefusedError

logger = logging.getLogger(__name__)


def select_backend(model: PreTrainedModel) -> Backend:
    """The backend that executes a model. One that cannot use the kernels is reported by a warning that says why.

    Raises:
        UnsupportedModelError: the model cannot draft for itself; the message says what was looked for.
    """
    obstacle = native_obstacle(model)
    if obstacle is None:
        return NativeBackend(model)
    reasons = [obstacle]
    for kind in (KernelBackend, KernelLinearBackend):
        try:
            return kind(model)
        except KernelsRefusedError as error:
            reasons.append(str(error))
    logger.warning(
        "%s runs on the transformers backend, slower and without 4-bit drafts: %s",
        type(model).__name__,
        "; ".join(dict.fromkeys(reasons)),
    )
    return TransformersBackend(model)
