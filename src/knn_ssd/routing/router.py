"""Routes a prompt vector to a domain by its nearest anchors (arXiv 2505.16162, section 4). Knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from knn_ssd.atlas import Atlas
from knn_ssd.errors import UsageError

_ROUNDING = 1e-6  # error of a cosine in float32


@dataclass(frozen=True, slots=True)
class Route:
    """The route of one prompt.

    Args:
        domain: the domain of the nearest anchors.
        distance: the cosine distance to the nearest anchor of that domain, in [0, 2].
        fallback: whether the distance is beyond the domain's radius, so that the fallback plan drafts.
        anchor: the index of that nearest anchor.
    """

    domain: str
    distance: float
    fallback: bool
    anchor: int

    @property
    def plan_domain(self) -> str | None:
        """The domain whose plan drafts; None stands for the fallback plan."""
        return None if self.fallback else self.domain

    @property
    def plan_name(self) -> str:
        """The domain whose plan drafts, or `fallback`."""
        return self.plan_domain or "fallback"


class Router:
    """Classifies by the k nearest anchors in cosine distance, after scikit-learn's conventions.

    Computes on the device of the anchors.

    Args:
        k: the number of anchors that vote, weighted by similarity; 1 as published.

    Attributes:
        anchors_: (A, D), each of length one.
        domains_: the domain of each of the A anchors.
        radii_: the radius of each domain; a domain that is missing here has no limit.
    """

    def __init__(self, k: int = 1) -> None:
        self.k = k

    @classmethod
    def of(cls, atlas: Atlas, k: int = 1, device: torch.device | str = "cpu") -> Router:
        """The router for an atlas's anchors and radii.

        Raises:
            UsageError: k is outside [1, A].
        """
        radii = {name: domain.radius for name, domain in atlas.domains.items()}
        return cls(k).fit(torch.from_numpy(atlas.anchors).to(device), atlas.anchor_domains, radii)

    def fit(self, anchors: torch.Tensor, domains: Sequence[str], radii: Mapping[str, float] | None = None) -> Router:
        """Stores anchors (A, D) and their domains, and returns the router itself.

        Raises:
            UsageError: there are no anchors, not as many domains as anchors, or k is outside [1, A].
        """
        if len(anchors) != len(domains) or not len(anchors):
            raise UsageError(
                f"as many anchors as domains are needed, and at least one, got {len(anchors)} and {len(domains)}"
            )
        if not 1 <= self.k <= len(anchors):
            raise UsageError(f"k must be in [1, {len(anchors)}], the number of anchors, got {self.k}")
        self.anchors_ = torch.nn.functional.normalize(anchors.float(), dim=-1)
        self.domains_ = tuple(domains)
        self.radii_ = dict(radii or {})
        return self

    def kneighbors(self, vector: torch.Tensor) -> tuple[list[float], list[int]]:
        """Cosine distances and indices of the k anchors nearest to a vector (D,), nearest first."""
        unit = torch.nn.functional.normalize(vector.to(self.anchors_), dim=-1)
        similarities, indices = (self.anchors_ @ unit).topk(self.k)
        return (1 - similarities).clamp(0, 2).tolist(), indices.tolist()

    def predict(self, vector: torch.Tensor) -> Route:
        """The route for a prompt vector (D,)."""
        distances, indices = self.kneighbors(vector)
        votes: dict[str, float] = {}
        nearest: dict[str, tuple[float, int]] = {}
        for distance, index in zip(distances, indices, strict=True):
            domain = self.domains_[index]
            votes[domain] = votes.get(domain, 0.0) + 2 - distance  # in [0, 2], larger is nearer
            nearest.setdefault(domain, (distance, index))
        domain = max(votes, key=lambda name: votes[name])
        distance, anchor = nearest[domain]
        return Route(domain, distance, distance > self.radii_.get(domain, float("inf")) + _ROUNDING, anchor)
