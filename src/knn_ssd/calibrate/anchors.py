"""Anchors from prompt vectors, by k-means per domain as in the released code of arXiv 2505.16162, and radii.

Clusters of directions instead (spherical k-means, since prompts are routed by cosine) route held-out prompts no better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knn_ssd.routing.router import Router

_FOLDS = 4  # cross-validation: anchors fitted on three quarters of each domain route the vectors of the fourth
# The radius of a domain is this quantile of its held-out distances: the farthest of many vectors is an outlier, so a
# radius by the farthest grows with every prompt added, and takes in prompts of other domains. The slack is for domains
# of a few dozen prompts, whose quantile is uncertain.
_RADIUS_QUANTILE, _RADIUS_SLACK = 0.99, 1.1


@dataclass(frozen=True, slots=True, eq=False)
class Anchors:
    """The anchors of an atlas, with radii and the accuracy of routing by them.

    Args:
        points: the anchors (A, D), float32.
        domains: the domain of each anchor (A,).
        radii: the radius of each domain, as a cosine distance.
        held_out: number of vectors routed by anchors that were fitted without them: all vectors, fold by fold.
        accuracy: share of those vectors that were routed to their own domain.
        beyond_radius: share of those vectors that lie beyond the radius of their own domain; such prompts get the
            fallback plan.
    """

    points: np.ndarray[Any, Any]
    domains: tuple[str, ...]
    radii: dict[str, float]
    held_out: int
    accuracy: float
    beyond_radius: float


def fit_anchors(vectors: np.ndarray[Any, Any], domains: Sequence[str], per_domain: int, seed: int) -> Anchors:
    """Clusters vectors (N, D) into at most `per_domain` anchors for each domain, which has two vectors or more.

    Args:
        vectors: the prompt vectors.
        domains: the domain of each.
        per_domain: number of anchors per domain.
        seed: seed of clustering.
    """
    names = list(dict.fromkeys(domains))
    own = np.array(domains)
    fold = np.array([_rank(domains, i) % _FOLDS for i in range(len(domains))])
    hits: list[bool] = []
    distances: dict[str, list[float]] = {name: [] for name in names}
    for held_out in (fold == number for number in range(_FOLDS)):
        points, point_domains = _cluster(vectors[~held_out], own[~held_out], names, per_domain, seed)
        router = Router().fit(torch.from_numpy(points), point_domains)
        for vector, domain in zip(vectors[held_out], own[held_out], strict=True):
            hits.append(router.predict(torch.from_numpy(vector)).domain == domain)
            distances[domain].append(_distance(vector, points[np.array(point_domains) == domain]))
    points, point_domains = _cluster(vectors, own, names, per_domain, seed)
    radii = {
        name: min(2.0, _RADIUS_SLACK * float(np.quantile(found, _RADIUS_QUANTILE))) for name, found in distances.items()
    }
    beyond = [distance > radii[name] for name, found in distances.items() for distance in found]
    return Anchors(
        points,
        tuple(point_domains),
        radii,
        len(hits),
        float(np.mean(hits)),
        float(np.mean(beyond)),
    )


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
    """Cosine distance of a vector to the nearest point."""
    return Router().fit(torch.from_numpy(points), ["own"] * len(points)).predict(torch.from_numpy(vector)).distance


def _rank(domains: Sequence[str], index: int) -> int:
    """Number of earlier vectors of the same domain."""
    return sum(domain == domains[index] for domain in domains[:index])
