"""Routing: the nearest anchors by cosine, whatever the vectors' lengths; beyond a domain's radius the fallback."""

from __future__ import annotations

import math
import statistics
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from knn_ssd.errors import UsageError
from knn_ssd.routing.router import Route, Router


def direction(degrees: float) -> torch.Tensor:
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


def distance(degrees: float) -> float:
    return 1 - math.cos(math.radians(degrees))


def compass(k: int = 1, radii: dict[str, float] | None = None) -> Router:
    """Anchors in the plane: one north-east 'story', two 'math' to the north, one 'sql' opposite."""
    anchors = torch.stack([direction(45), direction(80) * 7, direction(100) * 0.1, direction(-135)])
    return Router(k).fit(anchors, ["story", "math", "math", "sql"], radii)


def random_case(seed: int, count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator), torch.randn(width, generator=generator)


cases = st.builds(random_case, seed=st.integers(0, 2**31), count=st.integers(1, 40), width=st.integers(2, 50))


@given(cases, st.integers(1, 8))
def test_neighbours_are_scikit_learns(case: tuple[torch.Tensor, torch.Tensor], k: int) -> None:
    anchors, vector = case
    k = min(k, len(anchors))
    router = Router(k).fit(anchors, [str(i) for i in range(len(anchors))])
    distances, indices = router.kneighbors(vector)
    reference = NearestNeighbors(metric="cosine").fit(anchors.numpy().astype(np.float64))
    expected, expected_indices = reference.kneighbors(vector.numpy()[None].astype(np.float64), n_neighbors=k)
    np.testing.assert_allclose(distances, expected[0], atol=1e-5)
    assert indices == expected_indices[0].tolist()


@given(cases, st.floats(1e-3, 1e3), st.integers(1, 3))
def test_lengths_of_vectors_do_not_count(case: tuple[torch.Tensor, torch.Tensor], scale: float, k: int) -> None:
    anchors, vector = case
    domains = [f"domain {i % 3}" for i in range(len(anchors))]
    scales = torch.linspace(scale, 2 * scale, len(anchors))[:, None]
    route = Router(min(k, len(anchors))).fit(anchors, domains).predict(vector)
    scaled = Router(min(k, len(anchors))).fit(anchors * scales, domains).predict(vector / scale)
    assert scaled.domain == route.domain
    assert scaled.distance == pytest.approx(route.distance, abs=1e-5)


@given(cases)
def test_distances_are_between_zero_and_two(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    anchors, vector = case
    router = Router(len(anchors)).fit(anchors, ["a"] * len(anchors))
    for prompt in (vector, anchors[0], -anchors[0], anchors[-1] * 100):
        distances, _ = router.kneighbors(prompt)
        assert all(0 <= d <= 2 for d in distances)
        assert 0 <= router.predict(prompt).distance <= 2


@given(cases)
def test_an_anchor_itself_is_within_any_radius(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    anchors, _ = case
    router = Router().fit(anchors, ["a"] * len(anchors), {"a": 0.0})
    assert not any(router.predict(anchor).fallback for anchor in anchors)


def test_the_nearest_anchor_names_the_domain() -> None:
    route = compass().predict(direction(60) * 30)
    assert route == Route("story", pytest.approx(distance(15), abs=1e-6), fallback=False, anchor=0)
    assert compass().predict(direction(65)).domain == "math"
    assert compass().predict(direction(-90)).domain == "sql"


def test_k_anchors_vote() -> None:
    vector = direction(60)  # 15 degrees from story, 20 and 40 from math, 165 from sql
    assert [compass(k).predict(vector).domain for k in (1, 2, 3, 4)] == ["story", "story", "math", "math"]


def test_the_distance_is_that_of_the_nearest_anchor_of_the_chosen_domain() -> None:
    assert compass(3).predict(direction(60)).distance == pytest.approx(distance(20), abs=1e-6)


def test_a_nearer_anchor_outvotes_a_farther_one() -> None:
    router = Router(2).fit(torch.stack([direction(0), direction(170)]), ["near", "far"])
    assert router.predict(direction(80)).domain == "near"
    assert router.predict(direction(90)).domain == "far"


@pytest.mark.parametrize(("degrees", "fallback"), [(45, False), (54, False), (56, True), (36, False), (34, True)])
def test_beyond_a_domains_radius_the_fallback_plan_drafts(degrees: float, fallback: bool) -> None:
    route = compass(radii={"story": distance(10)}).predict(direction(degrees))
    assert route.domain == "story"
    assert route.fallback == fallback
    assert route.plan_domain == (None if fallback else "story")


def test_a_domain_without_a_radius_has_no_limit() -> None:
    assert not compass(radii={"story": 0.0}).predict(direction(-90)).fallback


def test_fit_gives_the_router_itself_with_what_it_learned() -> None:
    router = Router(2)
    assert router.fit(torch.eye(3) * 5, ["a", "b", "c"], {"a": 0.5}) is router
    assert torch.equal(router.anchors_, torch.eye(3))
    assert router.domains_ == ("a", "b", "c")
    assert router.radii_ == {"a": 0.5}


def test_vectors_of_another_dtype_are_taken() -> None:
    assert compass().predict(direction(60).to(torch.bfloat16)).domain == "story"
    assert compass().predict(direction(60).double()).domain == "story"


@pytest.mark.parametrize(
    ("k", "count", "domains", "fact"),
    [
        (0, 2, 2, r"k must be in \[1, 2\], the number of anchors, got 0"),
        (3, 2, 2, r"k must be in \[1, 2\], the number of anchors, got 3"),
        (1, 2, 3, "got 2 and 3"),
        (1, 0, 0, "at least one, got 0 and 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_the_value(k: int, count: int, domains: int, fact: str) -> None:
    with pytest.raises(UsageError, match=fact):
        Router(k).fit(torch.ones(count, 4), ["a"] * domains)


def test_a_route_costs_little() -> None:
    anchors, vector = random_case(0, count=50, width=576)
    router = Router().fit(anchors, ["a"] * 50)
    seconds = []
    for _ in range(101):
        started = time.perf_counter()
        router.predict(vector)
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < 0.005
