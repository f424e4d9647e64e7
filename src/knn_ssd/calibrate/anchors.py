"""Prompt vectors to anchors by k-means per label, as in the released code of arXiv 2505.16162; how far labels reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knn_ssd.route import Router

_FOLDS = 4  # each vector is routed once by anchors fitted on the other three quarters of its label
_RADIUS_SLACK = 1.5  # the radius over the farthest such vector of a label: a little beyond what was seen


@dataclass(frozen=True, slots=True, eq=False)
class Anchors:
    """What the vectors of a calibration come to.

    Args:
        points: (A, D) float32.
        labels: A of them.
        radii: by label, cosine distance.
        held_out: how many vectors were routed by anchors that they had no part in: all of them, fold by fold.
        accuracy: share of them routed to their own label.
    """

    points: np.ndarray[Any, Any]
    labels: tuple[str, ...]
    radii: dict[str, float]
    held_out: int
    accuracy: float


def fit_anchors(vectors: np.ndarray[Any, Any], labels: Sequence[str], per_label: int, seed: int) -> Anchors:
    """Clusters vectors (N, D) label by label into at most `per_label` anchors each; every label has two or more."""
    names = list(dict.fromkeys(labels))
    own = np.array(labels)
    fold = np.array([_rank(labels, i) % _FOLDS for i in range(len(labels))])
    hits: list[bool] = []
    farthest = dict.fromkeys(names, 0.0)
    for held in (fold == number for number in range(_FOLDS)):
        points, point_labels = _cluster(vectors[~held], own[~held], names, per_label, seed)
        router = Router().fit(torch.from_numpy(points), point_labels)
        for vector, label in zip(vectors[held], own[held], strict=True):
            hits.append(router.predict(torch.from_numpy(vector)).label == label)
            farthest[label] = max(farthest[label], _distance(vector, points[np.array(point_labels) == label]))
    points, point_labels = _cluster(vectors, own, names, per_label, seed)
    radii = {name: min(2.0, _RADIUS_SLACK * distance) for name, distance in farthest.items()}
    return Anchors(points, tuple(point_labels), radii, len(hits), float(np.mean(hits)))


def _cluster(
    vectors: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], names: list[str], per_label: int, seed: int
) -> tuple[np.ndarray[Any, Any], list[str]]:
    from sklearn.cluster import KMeans

    points, point_labels = [], []
    for name in names:
        members = vectors[labels == name]
        clusters = min(per_label, len(np.unique(members, axis=0)))
        fitted = KMeans(n_clusters=clusters, n_init=10, random_state=seed).fit(members)
        points.append(fitted.cluster_centers_.astype(np.float32))
        point_labels += [name] * clusters
    return np.concatenate(points), point_labels


def _distance(vector: np.ndarray[Any, Any], points: np.ndarray[Any, Any]) -> float:
    """Cosine distance to the nearest of some points."""
    return Router().fit(torch.from_numpy(points), ["own"] * len(points)).predict(torch.from_numpy(vector)).distance


def _rank(labels: Sequence[str], index: int) -> int:
    """How many earlier vectors have the same label."""
    return sum(label == labels[index] for label in labels[:index])
