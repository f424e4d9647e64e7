"""Selects the backend of a model: the native backend if it supports the model, else the transformers backend."""

from __future__ import annotations

from transformers import PreTrainedModel

from knn_ssd.backends.base import Backend
from knn_ssd.backends.native.backend import NativeBackend, native_obstacle
from knn_ssd.backends.transformers.backend import TransformersBackend


def select_backend(model: PreTrainedModel) -> Backend:
    """The backend that executes a model.

    Raises:
        UnsupportedModelError: the model cannot draft for itself; the message says what was looked for.
    """
    return NativeBackend(model) if native_obstacle(model) is None else TransformersBackend(model)
