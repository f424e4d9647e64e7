"""Projects prompt vectors to two dimensions, as in the paper's figure. Knows nothing of how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from knn_ssd.atlas import Atlas

MAX_POINTS = 2000  # t-SNE of more takes minutes and shows no more
_MIN_POINTS = 3  # that t-SNE needs
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """The vectors of an atlas in two dimensions."""

    places: np.ndarray[Any, Any]  # (N + A, 2), prompts before anchors, each axis in [0, 1]
    domains: tuple[str, ...]  # of the N + A points
    num_prompts: int  # N
    names: tuple[str, ...]  # of the domains, in the atlas's order
    left_out: int  # number of prompt vectors that are not drawn
    kept: bool  # whether the atlas has its prompt vectors

    @classmethod
    def of(cls, atlas: Atlas) -> Points:
        vectors, domains = atlas.vectors, np.array(atlas.vector_domains, dtype=object)
        if vectors is None:
            vectors = np.empty((0, atlas.anchors.shape[1]), np.float32)
        total = len(vectors)
        if total > MAX_POINTS:
            chosen = np.linspace(0, total - 1, MAX_POINTS).round().astype(int)
            vectors, domains = vectors[chosen], domains[chosen]
        places = in_two_dimensions(np.concatenate([vectors, atlas.anchors]), len(atlas.domains))
        return cls(
            places=places,
            domains=(*domains, *atlas.anchor_domains),
            num_prompts=len(vectors),
            names=tuple(atlas.domains),
            left_out=total - len(vectors),
            kept=atlas.vectors is not None,
        )

    def where(self, name: str, *, anchors: bool) -> np.ndarray[Any, Any]:
        """The places (n, 2) of a domain's anchors or prompts."""
        indices = range(self.num_prompts, len(self.domains)) if anchors else range(self.num_prompts)
        chosen = [index for index in indices if self.domains[index] == name]
        places: np.ndarray[Any, Any] = self.places[chosen]
        return places

    @property
    def title(self) -> str:
        return "Prompts and anchors" if self.kept else "Anchors alone: the atlas does not have its prompt vectors"

    @property
    def caption(self) -> str:
        total = self.num_prompts + self.left_out
        prompts = f"{self.num_prompts} of {total} prompt vectors" if self.left_out else count(total, "prompt vector")
        anchors = count(len(self.domains) - self.num_prompts, "anchor") + " (outlined)"
        drawn = f"{prompts} (dots) and {anchors}" if self.kept else anchors
        return f"{drawn}, {how_projected(len(self.domains))}"


def in_two_dimensions(vectors: np.ndarray[Any, Any], num_groups: int) -> np.ndarray[Any, Any]:
    """t-SNE by cosine distance, (N, D) to (N, 2), each axis scaled to [0, 1]; fewer than three points on a line.

    Args:
        vectors: (N, D) prompt vectors; more than `MAX_POINTS` take minutes.
        num_groups: about how many groups there are.
    """
    if len(vectors) < _MIN_POINTS:
        places = np.column_stack([np.arange(len(vectors)), np.zeros(len(vectors))])
    else:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        perplexity = min(30.0, max(len(vectors) / (3 * num_groups), 2.0), (len(vectors) - 1) / 3)
        init = "pca" if np.count_nonzero(np.ptp(vectors, axis=0)) > 1 else "random"
        with threadpool_limits(1):  # more threads only wait for each other on so few points
            reduction = TSNE(metric="cosine", perplexity=perplexity, init=init, random_state=_SEED)
            places = reduction.fit_transform(vectors)
    low, high = places.min(axis=0), places.max(axis=0)
    return np.where(high > low, (places - low) / np.where(high > low, high - low, 1.0), 0.5)


def how_projected(num_points: int) -> str:
    """Says how `in_two_dimensions` places so many points."""
    how = "too few for t-SNE" if num_points < _MIN_POINTS else "by t-SNE on cosine distance"
    return f"{how}; the axes have no unit"


def count(number: int, what: str) -> str:
    """A number of things in words."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
