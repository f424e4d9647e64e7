"""Each prompt drafts under its nearest anchor's plan, in one batch with others; routes are those of our own engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from atlases import PLANS, Vectors, prompts_of
from in_vllm import Opener, counts_of, greedy, metrics_of, runner_of, tokens_of

from knn_ssd.atlas import Atlas
from knn_ssd.backends.base import Pooling


def mixed() -> list[list[int]]:
    """Twenty prompts of five domains, one after the other."""
    return [prompt for four in zip(*(prompts_of(domain, 4) for domain in PLANS), strict=True) for prompt in four]


def saved(atlas: Atlas, folder: Path) -> dict[str, Any]:
    return {"atlas": str(atlas.save(folder / "atlas"))}


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("radius", [2.0, 0.02])
def test_a_mixed_batch_says_the_same_and_routes_as_our_engine(
    opened: Opener, tiny: Path, tmp_path: Path, pooling: Pooling, radius: float
) -> None:
    vectors = Vectors(tiny, pooling)
    atlas = vectors.atlas(radius)
    asked = mixed()
    expected = vectors.routes(atlas, asked)
    assert len(expected) >= 3 if radius == 2.0 else expected["fallback"] > 3
    options = {"enable_prefix_caching": pooling is Pooling.LAST}
    plain = tokens_of(opened(tiny, **options), asked, greedy())
    llm = opened(tiny, {**saved(atlas, tmp_path), "adaptive": False}, **options)
    assert tokens_of(llm, asked, greedy()) == plain
    counts = counts_of(llm)
    assert {name: own["requests"] for name, own in counts.items()} == expected
    assert all(own["drafted"] > 0 for own in counts.values())


def test_chunks_and_preemption_leave_routes_as_they_are(opened: Opener, tiny: Path, tmp_path: Path) -> None:
    vectors = Vectors(tiny, Pooling.MEAN)
    atlas = vectors.atlas()
    asked = mixed()
    options = {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 40,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 18 * 4 * 2 * 32 * 2 * 32 * 4,
    }
    params = greedy(max_tokens=110)
    plain = tokens_of(opened(tiny, **options), asked, params)
    llm = opened(tiny, {**saved(atlas, tmp_path), "adaptive": False}, **options)
    assert tokens_of(llm, asked, params) == plain
    assert {name: own["requests"] for name, own in counts_of(llm).items()} == vectors.routes(atlas, asked)
    assert metrics_of(llm)["vllm:num_preemptions"] > 0


def test_by_expected_speed_the_output_is_the_same(opened: Opener, tiny: Path, tmp_path: Path) -> None:
    atlas = Vectors(tiny, Pooling.LAST).atlas()
    asked = mixed()
    plain = tokens_of(opened(tiny), asked, greedy(max_tokens=120))
    fixed = opened(tiny, {**saved(atlas, tmp_path), "adaptive": False})
    free = opened(tiny, {"atlas": str(tmp_path / "atlas")})
    drafted = []
    for llm in (fixed, free):
        assert tokens_of(llm, asked, greedy(max_tokens=120)) == plain
        drafted.append(sum(own["drafted"] for own in counts_of(llm).values()))
    assert drafted[1] < drafted[0] / 3  # skipping a random model's layers is hardly ever right, which it finds out


def test_requests_are_forgotten_when_they_end(opened: Opener, tiny: Path, tmp_path: Path) -> None:
    llm = opened(tiny, saved(Vectors(tiny, Pooling.LAST).atlas(), tmp_path))
    for _ in range(3):
        tokens_of(llm, mixed(), greedy(max_tokens=4))
    tokens_of(llm, mixed()[:1], greedy(max_tokens=4))
    assert len(runner_of(llm).drafter._requests) <= 1
