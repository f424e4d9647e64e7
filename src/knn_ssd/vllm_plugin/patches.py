"""Fixes two bugs of vLLM's rejection sampler on CPUs where this plugin drafts: with them, sampling is not lossless.

In vLLM 0.32, the CPU version of the kernel that repeats each request's temperature, top-k and top-p for its draft
tokens writes into a converted copy and drops it, so the values are uninitialised memory, and temperatures would be cut
to whole numbers. And a step that verifies no draft token crashes the server where all requests are sampled with top-k
and without top-p. Both affect every speculative method.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def patch_cpu_sampler() -> None:
    """Replaces both functions, on CPUs only, once in this process."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.ops import topk_topp_sampler

    if not current_platform.is_cpu():
        return
    original = topk_topp_sampler.apply_top_k_only

    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = original(logits, k) if len(logits) else logits
        return result

    topk_topp_sampler.apply_top_k_only = apply_top_k_only
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> torch.Tensor:
    """Repeats each request's value (B,) for each of its tokens, to (num_tokens,).

    Args:
        x: (B,) a value of each request.
        cu_num_tokens: (B,) cumulative number of the requests' tokens.
        num_tokens: tokens of all requests.
        replace_from: a value to replace.
        replace_to: its replacement.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced.repeat_interleave(counts, output_size=num_tokens)
