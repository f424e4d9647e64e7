"""Atlas, routing and plans inside vLLM: loaded by vLLM itself through the entry point `vllm.general_plugins`.

    settings.py   what is asked for, and what is refused
    hooks.py      the versions of vLLM that are known, and the places where it is reached into
    mends.py      two faults of its sampler on CPUs
    stack.py      the sublayers of vLLM's own model, run as a plan has them
    lowbit.py     4-bit copies of what vLLM loaded
    passes.py     one drafting pass over rows of a batch, into the target's own cache
    routing.py    prompt vectors from hidden states, chunk by chunk; whether the atlas is of this model
    proposer.py   who drafts how far in each step

Imports vLLM only where it runs inside it.
"""

from __future__ import annotations


def register() -> None:
    """What vLLM calls in each of its processes. Does nothing until a server is told to draft with `Proposer`."""
    from knn_ssd.vllm_plugin.hooks import install

    install()
