"""Prompt vectors to anchors by k-means per domain, as in the released code of arXiv 2505.16162, and radii."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knn_ssd.routing.router import Router

_FOLDS = 4  # each vector is routed once by anchors fitted on the other three quarters of its domain
_RADIUS_SLACK = 1.5  # the radius over the farthest such vector of a domain: a little beyond what was seen


@dataclass(frozen=True, slots=True, eq=False)
class Anchors:
    """What the vectors of a calibration come to.

    Args:
        points: (A, D) float32.
        domains: A of them.
        radii: by domain, cosine distance.
        held_out: how many vectors were routed by anchors that they had no part in: all of them, fold by fold.
        accuracy: share of them routed to their own domain.
    """

    points: np.ndarray[Any, Any]
    domains: tuple[str, ...]
    radii: dict[str, float]
    held_out: int
    accuracy: float


def fit_anchors(vectors: np.ndarray[Any, Any], domains: Sequence[str], per_domain: int, seed: int) -> Anchors:
    """Clusters vectors (N, D) domain by domain into at most `per_label` anchors each; every domain has two or more."""
    names = list(dict.fromkeys(domains))
    own = np.array(domains)
    fold = np.array([_rank(domains, i) % _FOLDS for i in range(len(domains))])
    hits: list[bool] = []
    farthest = dict.fromkeys(names, 0.0)
    for held in (fold == number for number in range(_FOLDS)):
        points, point_domains = _cluster(vectors[~held], own[~held], names, per_domain, seed)
        router = Router().fit(torch.from_numpy(points), point_domains)
        for vector, domain in zip(vectors[held], own[held], strict=True):
            hits.append(router.predict(torch.from_numpy(vector)).domain == domain)
            farthest[domain] = max(farthest[domain], _distance(vector, points[np.array(point_domains) == domain]))
    points, point_domains = _cluster(vectors, own, names, per_domain, seed)
    radii = {name: min(2.0, _RADIUS_SLACK * distance) for name, distance in farthest.items()}
    return Anchors(points, tuple(point_domains), radii, len(hits), float(np.mean(hits)))


def _cluster(
    vectors: np.ndarray[Any, Any], domains: np.ndarray[Any, Any], names: list[str], per_domain: int, seed: int
) -> tuple[np.ndarray[Any, Any], list[str]]:
    from sklearn.cluster import KMeans

    points, point_domains = [], []
    for name in names:
        members = vectors[domains == name]
        clusters = min(per_domain, len(np.unique(members, axis=0)))
        fitted = KMeans(n_clusters=clusters, n_init=10, random_state=seed).fit(members)
        points.append(fitted.cluster_centers_.astype(np.float32))
        point_domains += [name] * clusters
    return np.concatenate(points), point_domains


def _distance(vector: np.ndarray[Any, Any], points: np.ndarray[Any, Any]) -> float:
    """Cosine distance to the nearest of some points."""
    return Router().fit(torch.from_numpy(points), ["own"] * len(points)).predict(torch.from_numpy(vector)).distance


def _rank(domains: Sequence[str], index: int) -> int:
    """How many earlier vectors have the same domain."""
    return sum(domain == domains[index] for domain in domains[:index])
