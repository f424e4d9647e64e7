"""Prompt vectors to anchors by k-means per label, as in the released code of arXiv 2505.16162; how far labels reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knn_ssd.route import Router

_HELD_OUT = 4  # every fourth vector is held out to measure routing, before the anchors are fitted on all
_RADIUS_SLACK = 1.5  # the radius over the farthest held-out prompt of a label: a little beyond what was seen


@dataclass(frozen=True, slots=True, eq=False)
class Anchors:
    """What the vectors of a calibration come to.

    Args:
        points: (A, D) float32.
        labels: A of them.
        radii: by label, cosine distance.
        held_out: how many vectors were held out.
        accuracy: share of the held-out vectors routed to their own label; None if there were none.
    """

    points: np.ndarray[Any, Any]
    labels: tuple[str, ...]
    radii: dict[str, float]
    held_out: int
    accuracy: float | None


def fit_anchors(vectors: np.ndarray[Any, Any], labels: Sequence[str], per_label: int, seed: int) -> Anchors:
    """Clusters vectors (N, D) label by label into at most `per_label` anchors each."""
    held = np.array([_rank(labels, i) % _HELD_OUT == _HELD_OUT - 1 for i in range(len(labels))])
    names = list(dict.fromkeys(labels))
    own = np.array(labels)
    points, point_labels = _cluster(vectors[~held], own[~held], names, per_label, seed)
    router = Router().fit(torch.from_numpy(points), point_labels)
    routes = [router.predict(torch.from_numpy(vector)) for vector in vectors[held]]
    hits = [route.label == label for route, label in zip(routes, own[held], strict=True)]
    radii = {name: _radius(router, vectors[own == name], points, point_labels, name) for name in names}
    points, point_labels = _cluster(vectors, own, names, per_label, seed)
    return Anchors(points, tuple(point_labels), radii, len(hits), float(np.mean(hits)) if hits else None)


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


def _radius(
    router: Router, members: np.ndarray[Any, Any], points: np.ndarray[Any, Any], point_labels: list[str], name: str
) -> float:
    """The farthest that a prompt of the label lies from the label's anchors, with slack."""
    mine = [label == name for label in point_labels]
    own_router = Router().fit(torch.from_numpy(points[mine]), [name] * sum(mine))
    farthest = max(own_router.predict(torch.from_numpy(vector)).distance for vector in members)
    return min(2.0, _RADIUS_SLACK * farthest)


def _rank(labels: Sequence[str], index: int) -> int:
    """How many earlier vectors have the same label."""
    return sum(label == labels[index] for label in labels[:index])
