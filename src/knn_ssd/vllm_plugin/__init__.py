"""Atlas, routing and self-drafts inside vLLM, which loads this package through the entry point `vllm.general_plugins`.

    settings.py      reads the settings, and refuses what is unsafe with these drafts
    hooks.py         the supported versions of vLLM, and the attributes of it that are wrapped
    patches.py       fixes two bugs of its rejection sampler on CPUs
    layers.py        runs the sublayers of vLLM's own model under a plan
    low_bit.py       4-bit copies of the weights that vLLM loaded
    forward.py       one draft pass over rows of a batch, into the target's own KV cache
    routing.py       prompt vectors from hidden states, chunk by chunk; checks that the atlas belongs to the model
    draft_groups.py  groups the requests of a batch that draft together
    proposer.py      chooses which requests draft, and how far, in each step

vLLM is imported only by functions that run inside it.
"""

from __future__ import annotations


def register() -> None:
    """Installs the hooks; vLLM calls this in each of its processes. They do nothing unless a server uses `Proposer`."""
    from knn_ssd.vllm_plugin.hooks import install

    install()
