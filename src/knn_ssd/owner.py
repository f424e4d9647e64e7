"""What is kept between the requests of one owner: a process, or an API key of a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from knn_ssd.backends.base import Prefill
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.routing.answers import NUM_NEIGHBOURS, RADIUS, AnswerStore, Neighbour

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Owner:
    """What the requests of one owner share, and those of others must not see.

    Args:
        answers: earlier requests, whose answers draft for near ones; None keeps none.
        prefix_cache: KV caches of earlier prompts; None keeps none.
    """

    answers: AnswerStore | None = None
    prefix_cache: PrefixCache | None = None

    def neighbours(self, prefill: Prefill, vocab_size: int) -> tuple[Neighbour, ...]:
        """The earlier requests nearest to a prompt, nearest first, without those that have tokens of no such model."""
        if self.answers is None:
            return ()
        near = self.answers.nearest(prefill.mean.cpu().numpy(), NUM_NEIGHBOURS, RADIUS)
        return tuple(each for each in near if each.answer.token_ids.max() < vocab_size)


def open_answers(
    answers: AnswerStore | bool | str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
) -> AnswerStore | None:
    """An answer store for a model.

    Args:
        answers: a store, the folder of one, True for a new one in memory, or False for none.
        model: the model.
        tokenizer: its tokenizer.
        vocab_size: how many token ids it has.

    Raises:
        AnswerStoreError: a folder that cannot be used, or a store of another model.
    """
    if isinstance(answers, str | Path):
        return AnswerStore.open(answers, fingerprint(model, tokenizer), vocab_size)
    if isinstance(answers, AnswerStore):
        answers.bind(fingerprint(model, tokenizer))
        return answers
    return AnswerStore() if answers else None
