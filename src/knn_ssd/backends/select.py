"""Which target a model runs on: the lean one where it can, else the general one."""

from __future__ import annotations

from transformers import PreTrainedModel

from knn_ssd.backends.base import Backend
from knn_ssd.backends.native.backend import NativeBackend, native_obstacle
from knn_ssd.backends.transformers.backend import TransformersBackend


def select_backend(model: PreTrainedModel) -> Backend:
    """The target of a model.

    Raises:
        UnsupportedModelError: a model that cannot draft for itself; says what was looked for.
    """
    return NativeBackend(model) if native_obstacle(model) is None else TransformersBackend(model)
