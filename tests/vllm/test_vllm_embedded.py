"""The embedded model: prompts of five domains under five plans in one batch say what vLLM says without drafts."""

from __future__ import annotations

from pathlib import Path

import pytest
from atlases import Vectors
from in_vllm import Opener, counts_of, greedy, tokens_of

from knn_ssd.backends.base import Pooling
from knn_ssd.engine import Engine
from knn_ssd.loading.resolve import load_model, model_dir
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.prompts import builtin_prompts

FAR = Policy(max_draft=4, threshold=0.5)
LAYERS = 30


def low(*attention: int) -> Plan:
    plan = Plan.low(LAYERS, FAR)
    modes = tuple(Mode.KEEP if layer in attention else mode for layer, mode in enumerate(plan.attention))
    return Plan(modes, plan.mlp, plan.head, FAR)


PLANS = {
    "math": Plan.skipping(LAYERS, [20], [], FAR),
    "story": low(),
    "summarization": Plan.skipping(LAYERS, [], [17], FAR),
    "text2sql": Plan.skipping(LAYERS, policy=FAR),
    "translation": low(0, 1),
}


@pytest.fixture(scope="module")
def folder() -> Path:
    load_model(None, device="cpu")  # which converts it once, where that was not done yet
    found = model_dir()
    assert found is not None
    return Path(found)


@pytest.mark.timeout(900)
def test_five_domains_in_one_batch(opened: Opener, folder: Path, tmp_path: Path) -> None:
    loaded = load_model(None, device="cpu")
    encode = Engine(loaded.model, loaded.tokenizer).encode
    by_domain: dict[str, list[list[int]]] = {domain: [] for domain in PLANS}
    for prompt in builtin_prompts():
        by_domain[str(prompt.domain)].append(encode(prompt.prompt))
    anchors = {domain: known[4:7] for domain, known in by_domain.items()}
    asked = [prompt for four in zip(*(known[:4] for known in by_domain.values()), strict=True) for prompt in four]
    assert len(asked) == 20
    vectors = Vectors(folder, Pooling.LAST)
    atlas = vectors.atlas(2.0, anchors, PLANS, Plan.plain(LAYERS))
    options = {"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 30}
    plain = tokens_of(opened(folder, **options), asked, greedy(max_tokens=32))
    asked_for = {"atlas": str(atlas.save(tmp_path / "atlas")), "adaptive": False}
    llm = opened(folder, asked_for, **options)
    assert tokens_of(llm, asked, greedy(max_tokens=32)) == plain
    counts = counts_of(llm)
    assert {name: own["requests"] for name, own in counts.items()} == vectors.routes(atlas, asked)
    assert len(counts) == len(PLANS)
    whole = counts["text2sql"]  # skips nothing
    assert whole["accepted"] >= 0.99 * whole["drafted"] > 0
    for name in ("story", "translation"):  # 4 bits
        assert 0.4 * counts[name]["drafted"] < counts[name]["accepted"] < counts[name]["drafted"]
