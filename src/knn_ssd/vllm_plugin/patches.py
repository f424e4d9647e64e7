"""Two faults of vLLM's rejection sampler on CPUs, mended where it drafts with us: with them, sampling is not lossless.

In vLLM 0.32 the CPU's stand-in for the kernel that repeats each request's temperature, top-k and top-p for its drafted
tokens writes into a converted copy and drops it, so that they are whatever was in memory, and temperatures would be cut
to whole numbers. And a step that verifies no drafted token ends the server where all requests are sampled with top-k
and without top-p. Both are so for every speculative method.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def mend() -> None:
    """Puts working functions in the place of the two, on CPUs alone, once in this process."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.ops import topk_topp_sampler

    if not current_platform.is_cpu():
        return
    original = topk_topp_sampler.apply_top_k_only

    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        mended: torch.Tensor = original(logits, k) if len(logits) else logits
        return mended

    topk_topp_sampler.apply_top_k_only = apply_top_k_only
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> torch.Tensor:
    """Each request's value (B,) repeated for each of its tokens, to (num_tokens,).

    Args:
        x: (B,)
        cu_num_tokens: (B,) how many tokens it and those before it have.
        num_tokens: of all.
        replace_from, replace_to: a value, and what stands for it.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced.repeat_interleave(counts, output_size=num_tokens)
