"""Log-probabilities of a prompt's own tokens, as `echo` with `logprobs` reports them in OpenAI's completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from knn_ssd.backends.base import Backend, Forward
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.speculation.decode import TokenLogprobs, token_logprobs

_CHUNK = 32  # tokens of a forward pass, whose logits (n, V) are in memory at once


def prompt_logprobs(
    backend: Backend,
    token_ids: Sequence[int],
    num_top: int = 0,
    *,
    forward: Forward | None = None,
    prefix_cache: PrefixCache | None = None,
    after_pass: Callable[[], None] | None = None,
) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of every token after the first, given those before it, under the full model.

    Args:
        backend: executes the model.
        token_ids: the prompt, at least one token.
        num_top: how many of the likeliest tokens to report at each position.
        forward: runs the forward passes; None is the backend's own `forward`.
        prefix_cache: where the KV cache is left for a request with the same prompt.
        after_pass: is called after each forward pass but the last.
    """
    session = backend.open(len(token_ids), prefix_cache, forward)
    found: list[TokenLogprobs] = []
    try:
        for start in range(0, len(token_ids), _CHUNK):
            chunk = list(token_ids[start : start + _CHUNK])
            logits = session.forward(chunk)  # (n, V)
            session.commit(len(chunk))
            following = token_ids[start + 1 : start + 1 + len(chunk)]
            found += token_logprobs(following, logits, num_top)
            if after_pass is not None and start + _CHUNK < len(token_ids):
                after_pass()
    finally:
        session.close()
    return tuple(found)
