"""Keys and values in bfloat16: rounded once, read exactly, half the memory, and as lossless as in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.engine import Engine
from knn_ssd.errors import UsageError
from knn_ssd.kernels import binding
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.testing import tiny_model

pytestmark = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")

TOKENS = torch.randint(3, 120, (90,), generator=torch.Generator().manual_seed(0)).tolist()
FAMILIES = ("llama", "qwen2", "qwen3")


def model_of(family: str) -> PreTrainedModel:
    """A tiny model with heads that the kernels take."""
    return tiny_model(family, hidden_size=128, intermediate_size=192, head_dim=32)


def backend_of(family: str, **options: Any) -> NativeBackend:
    return NativeBackend(model_of(family), **options)


def logits_of(backend: NativeBackend, sizes: list[int]) -> torch.Tensor:
    """Logits (n, V) of the tokens, run in blocks of these sizes, one after the other."""
    session = backend.open(len(TOKENS))
    parts, first = [], 0
    for size in sizes:
        parts.append(session.forward(TOKENS[first : first + size]))
        session.commit(size)
        first += size
    session.close()
    return torch.cat(parts)


def rounding_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
) -> Any:
    """transformers' own attention over keys and values that were rounded to bfloat16."""
    return sdpa_attention_forward(module, query, key.bfloat16().float(), value.bfloat16().float(), *rest, **options)


def reference_logits(model: PreTrainedModel, attention: str) -> torch.Tensor:
    AttentionInterface.register("rounding", rounding_attention)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_over_keys_and_values_in_the_dtype(family: str, dtype: torch.dtype) -> None:
    model = model_of(family)
    own = logits_of(NativeBackend(model, kv_dtype=dtype), [len(TOKENS)])
    exact, rounded = (reference_logits(model, name) for name in ("sdpa", "rounding"))
    expected, other = (exact, rounded) if dtype is torch.float32 else (rounded, exact)
    assert (own - expected).abs().mean() < 0.05 * (own - other).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_bits_in_any_block(family: str, dtype: torch.dtype) -> None:
    backend = backend_of(family, kv_dtype=dtype)
    alone = logits_of(backend, [1] * len(TOKENS))
    for sizes in ([len(TOKENS)], [7] * 12 + [6], [64, 1, 25]):
        assert torch.equal(logits_of(backend, sizes), alone)
    assert backend.exactness == "bitwise"


def test_stored_keys_and_values_are_the_rounded_ones() -> None:
    caches = []
    for dtype in (torch.float32, torch.bfloat16):
        session = backend_of("llama", kv_dtype=dtype).open(len(TOKENS))
        session.forward(TOKENS)
        caches.append(session.cache)
    wide, narrow = caches
    assert wide is not None
    assert narrow is not None
    for whole, half in zip(wide.tensors[:2], narrow.tensors[:2], strict=True):
        first = slice(0, 1), slice(None), slice(0, len(TOKENS))  # of the first layer, before which nothing is rounded
        assert half.dtype is torch.bfloat16
        assert torch.equal(half[first], whole[first].bfloat16())


def test_a_token_takes_half_the_memory_beside_the_8_bit_copies() -> None:
    wide, narrow = (backend_of("llama", kv_dtype=dtype).open(64).cache for dtype in (torch.float32, torch.bfloat16))
    assert wide is not None
    assert narrow is not None
    keys_and_values = 2 * wide.tensors[0].nbytes // wide.capacity
    assert wide.token_bytes[0] - narrow.token_bytes[0] == keys_and_values // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_any_drafts_give_the_output_of_plain_decoding(family: str) -> None:
    model = model_of(family)
    engine = Engine(model, backend=NativeBackend(model, kv_dtype=torch.bfloat16), answers=False)
    count = engine.backend.num_layers
    some = range(1, count)
    policy = Policy(max_draft=5, threshold=0.0, lookup=True)
    plans = {
        "low": Plan(tuple([Mode.LOW] * count), tuple([Mode.LOW] * count), Mode.KEEP, policy),
        "skip": Plan.skipping(count, some, some, policy),
    }
    for prompt in (TOKENS[:20], TOKENS[:5] * 6):
        expected = engine.generate(prompt, max_new_tokens=40, plain=True, ignore_eos=True)
        for plan in plans.values():
            result = engine.generate(prompt, max_new_tokens=40, plan=plan, ignore_eos=True)
            assert result.token_ids == expected.token_ids
            assert result.stats.drafted


def test_a_prefix_cache_and_growth_keep_the_bits() -> None:
    backend, kept = backend_of("llama", kv_dtype=torch.bfloat16), PrefixCache(2**24)
    outputs = []
    for _ in range(2):
        session = backend.open(200, kept)
        prefill = session.prefill(TOKENS)
        steps = [session.forward([token]) for token in (7,) * 3]
        outputs.append((prefill.reused, torch.cat([prefill.logits[None], *steps])))
        session.close()
    assert outputs[1][0] > 0 == outputs[0][0]
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_teacher_forced_scoring_is_that_of_drafting() -> None:
    backend = backend_of("llama", kv_dtype=torch.bfloat16)
    plan = Plan.skipping(backend.num_layers, [1], [1], Policy(max_draft=4, threshold=0.0))
    session = backend.open(len(TOKENS))
    session.forward(TOKENS[:40])
    session.commit(40)
    session.forward(TOKENS[40:44])
    scored = session.teacher_forced_logits(TOKENS[40:44], plan, 4)
    session.rewind(40)
    drafted = []
    for place, token in enumerate(TOKENS[40:44]):
        drafted.append(session.forward([token], plan))
        session.commit(1)
        assert session.length == 41 + place
    assert torch.equal(scored, torch.cat(drafted))


@pytest.mark.parametrize("wrong", [torch.float16, torch.int8], ids=str)
def test_another_dtype_is_refused(wrong: torch.dtype) -> None:
    with pytest.raises(UsageError, match="kv_dtype must be float32 or bfloat16, got torch"):
        backend_of("llama", kv_dtype=wrong)
