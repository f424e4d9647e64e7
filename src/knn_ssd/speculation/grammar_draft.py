"""Forced drafts: tokens that the request's grammar leaves no choice about, such as the keys of a JSON schema.

They cost no forward pass. The target may still write the same bytes in other tokens, so they are verified like any
draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from knn_ssd.grammar_state import GrammarState
from knn_ssd.speculation.drafter import Draft, Outcome


class GrammarDraft:
    """Drafts what a grammar forces.

    Args:
        state: of the request's output.
    """

    def __init__(self, state: GrammarState) -> None:
        self._state = state

    def forced(self, context: Sequence[int], drafted: Sequence[int] = ()) -> list[int]:
        """The tokens that have to follow a context and another drafter's tokens after it."""
        return self._state.forced([*context[self._state.prompt_length :], *drafted])

    def copy(self, forced: Sequence[int], count: int) -> Draft:
        """At most `count` of the forced tokens."""
        return Draft(tuple(forced[: max(count, 0)]), drafter="grammar")

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        """At most `limit` tokens that have to follow a context."""
        return self.copy(self.forced(context), limit)

    def without_refused(self, context: Sequence[int], draft: Draft) -> Draft:
        """A draft up to the first of its copied tokens that the grammar refuses, which the target would reject."""
        refused = len(draft.tokens) - self._state.count_allowed(context[self._state.prompt_length :], draft.tokens)
        if not refused:
            return draft
        tokens = draft.tokens[: len(draft.tokens) - refused]
        return replace(draft, tokens=tokens, num_copied=max(0, draft.num_copied - refused))

    def learn(self, outcome: Outcome) -> None:
        """Does nothing: what a grammar forces does not change."""
