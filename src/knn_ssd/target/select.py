"""Which target a model runs on: the lean one where it can, else the general one."""

from __future__ import annotations

from transformers import PreTrainedModel

from knn_ssd.target.contract import Target
from knn_ssd.target.fused import FusedTarget, why_not
from knn_ssd.target.huggingface import HuggingFaceTarget


def target_of(model: PreTrainedModel) -> Target:
    """The target of a model.

    Raises:
        UnsupportedModelError: a model that cannot draft for itself; says what was looked for.
    """
    return FusedTarget(model) if why_not(model) is None else HuggingFaceTarget(model)
