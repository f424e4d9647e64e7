"""Tiny engines, a target model that is a table, and Hypothesis strategies for their inputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.engine import Engine
from knn_ssd.io import cache_directory
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.testing import VOCAB_SIZE, tiny_model, tiny_tokenizer

NUM_LAYERS = 4  # of the tiny models
PROMPT = [5, 17, 99, 42, 63, 8, 120, 31]
_KERNELS = cache_directory() / "kernels"  # before a test has a cache directory of its own


def share_kernels(cache: Path) -> None:
    """Puts the kernels that are compiled already into a test's own cache directory, for processes that it starts."""
    cache.mkdir(exist_ok=True)
    (cache / "kernels").symlink_to(_KERNELS)


def imported_script(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> ModuleType:
    """A script as a new module, with the folder that it lies in on the path."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return import_module(name)


@cache
def tiny_engine(family: str = "llama") -> Engine:
    """One per family for all tests: what a test changes on a model needs a model of its own."""
    return Engine(tiny_model(family))


@cache
def transformers_backend(family: str = "llama") -> TransformersBackend:
    """The transformers backend, also for families that would run on the native backend."""
    return TransformersBackend(tiny_model(family))


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """The model without an end token, so that an output's length is known beforehand."""
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def endless_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """The tiny tokenizer without an end token, at which chats would end."""
    tokenizer = tiny_tokenizer(chat=chat)
    tokenizer.eos_token = None
    return tokenizer


def transformers_output(model: PreTrainedModel, token_ids: list[int], max_new_tokens: int, **options: Any) -> list[int]:
    """What transformers' own greedy `generate` appends to a prompt."""
    prompt = torch.tensor([token_ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        **options,
    )
    return output[0, len(token_ids) :].tolist()


def keep_everything(max_draft: int = 8) -> Plan:
    """A plan whose drafts are always accepted."""
    return Plan.skipping(NUM_LAYERS, policy=Policy(max_draft, threshold=0.0))


def skip_something(max_draft: int = 4) -> Plan:
    """A plan whose drafts are sometimes accepted."""
    return Plan.skipping(NUM_LAYERS, attention=[2], mlp=[1], policy=Policy(max_draft, threshold=0.0))


def skip_everything(max_draft: int = 4) -> Plan:
    every = range(NUM_LAYERS)
    return Plan.skipping(NUM_LAYERS, every, every, Policy(max_draft, threshold=0.0))


def policies() -> st.SearchStrategy[Policy]:
    return st.builds(Policy, max_draft=st.integers(0, 8), threshold=st.floats(0, 1))


def plans(num_layers: int = NUM_LAYERS) -> st.SearchStrategy[Plan]:
    """Plans that skip any set of sublayers, under any policy."""
    some_layers = st.sets(st.integers(0, num_layers - 1))
    return st.builds(Plan.skipping, st.just(num_layers), some_layers, some_layers, policies())


def any_plans(num_layers: int = NUM_LAYERS) -> st.SearchStrategy[Plan]:
    """Plans with any mode for any sublayer, under any policy."""
    modes = st.tuples(*[st.sampled_from(Mode)] * num_layers)
    return st.builds(Plan, modes, modes, st.sampled_from([Mode.KEEP, Mode.LOW]), policies())


def prompts(max_length: int = 40) -> st.SearchStrategy[list[int]]:
    """Token ids; long ones, beyond the tiny models' sliding window of 16, as often as short ones."""
    token = st.integers(3, VOCAB_SIZE - 1)
    return st.integers(1, max_length).flatmap(lambda length: st.lists(token, min_size=length, max_size=length))


class TableSession:
    """A session of a target model that is a table: the next token's logits depend on the last token alone.

    Args:
        target: (V, V) logits of the full model by last token.
        draft: (V, V) those of every draft.
        length: how many tokens are committed.
    """

    def __init__(self, target: torch.Tensor, draft: torch.Tensor, length: int) -> None:
        self.target = target
        self.draft = draft
        self.length = length

    def forward(self, token_ids: Sequence[int], plan: Plan | None = None) -> torch.Tensor:
        return (self.target if plan is None else self.draft)[list(token_ids)]

    def commit(self, count: int) -> None:
        self.length += count

    def rewind(self, length: int) -> None:
        self.length = length
