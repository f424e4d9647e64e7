"""CLaSp (arXiv 2505.24196): the layers to skip are chosen anew at intervals, from the last token's hidden states.

By dynamic programming: among all paths through the first i layers that skip j of them, the one is kept whose hidden
state has the greatest cosine similarity with that of the full model after layer i. All kept states then run through
layer i + 1 at once, or skip it. A fixed number of whole layers is skipped.

Implemented from the paper's description, section 3, with this package's rounds. The full model's states are computed
with each choice, as the path that skips nothing, instead of taken from the verification before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.session import NativeSession
from knn_ssd.plan import Plan, Policy
from knn_ssd.sampling import Sampler
from knn_ssd.speculation.drafter import Draft, Outcome
from knn_ssd.speculation.self_draft import SelfDraft


@dataclass(frozen=True, slots=True)
class ClaspSettings:
    """Settings of the choice of layers. The defaults are this package's own.

    Args:
        share: share of the layers that is skipped.
        interval: number of tokens from one choice to the next.
        policy: the draft policy.
    """

    share: float = 0.5
    interval: int = 128
    policy: Policy = field(default_factory=lambda: Policy(12, 0.7))


def choose_layers(backend: NativeBackend, session: NativeSession, token: int, count: int) -> list[int]:
    """Chooses `count` of the L layers to skip, given the token at the session's cursor; in ascending order."""
    assert session.cache is not None
    states = backend.embed(token)  # (j + 1, D), row j with j layers skipped
    skips: list[list[int]] = [[]]
    for layer in range(backend.num_layers):
        ran = backend.run_layer(layer, states, session.cache, session.length)
        full = ran[:1]
        scores = torch.nn.functional.cosine_similarity(ran, full)
        skipped = torch.nn.functional.cosine_similarity(states, full)
        longest = min(len(states), count)
        rows, sets = [], []
        for j in range(longest + 1):
            if j < len(states) and (j == 0 or scores[j] >= skipped[j - 1]):
                rows.append(ran[j])
                sets.append(skips[j])
            else:
                rows.append(states[j - 1])
                sets.append([*skips[j - 1], layer])
        states, skips = torch.stack(rows), sets
    return skips[count]


class ClaspDraft:
    """The CLaSp drafter of one request.

    Args:
        backend: executes the target model.
        session: the request's session.
        sampler: the request's sampler.
        settings: how layers are chosen.
    """

    def __init__(
        self, backend: NativeBackend, session: NativeSession, sampler: Sampler, settings: ClaspSettings | None = None
    ) -> None:
        self._backend = backend
        self._session = session
        self._sampler = sampler
        self._settings = settings or ClaspSettings()
        self._chosen_at: int | None = None  # length of the context at the last choice
        self.plan = Plan.plain(backend.num_layers)

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        settings = self._settings
        if len(context) > 1 and (self._chosen_at is None or len(context) - self._chosen_at >= settings.interval):
            with self._session.rewound(1):
                count = round(settings.share * self._backend.num_layers)
                layers = choose_layers(self._backend, self._session, context[-2], count)
            self.plan = Plan.skipping(self._backend.num_layers, layers, layers, settings.policy)
            self._chosen_at = len(context)
        if self._chosen_at is None:
            return Draft()
        return SelfDraft(self._session, self.plan, self._sampler).propose(context, limit)

    def learn(self, outcome: Outcome) -> None:
        """Does nothing: the choice depends on hidden states, not on acceptance."""
