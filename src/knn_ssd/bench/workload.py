"""Workloads: readers of prompt files and data sets, prompts of a given length, and streams with a mix ratio.

A stream with mix ratio R starts at one domain; before each next prompt it changes to another domain with probability R
(arXiv 2505.16162, section 4: 0 is one domain after the other, 1 changes at every prompt).
"""

from __future__ import annotations

import random
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.errors import PromptError, UsageError
from knn_ssd.loading.files import raised_as
from knn_ssd.prompts import Prompt, builtin_prompts, read_prompts
from knn_ssd.tokenization import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATASET = "hf:"  # the prefix of a data set's name where a file is possible too


def stream(prompts: Sequence[Prompt], mix_ratio: float, seed: int = 0) -> list[Prompt]:
    """Orders prompts as a stream; each occurs once.

    Args:
        prompts: the prompts with their domains; those of one domain keep their order.
        mix_ratio: the probability that the next prompt is of another domain, in [0, 1]. Where only one domain has
            prompts left, the stream stays with it; where a domain has none left, the stream changes.
        seed: seed of the changes.

    Raises:
        UsageError: the mix ratio is outside its range.
    """
    if not 0.0 <= mix_ratio <= 1.0:
        raise UsageError(f"the mix ratio must be in [0, 1], got {mix_ratio}")
    queues: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        queues.setdefault(prompt.domain, []).append(prompt)
    for queue in queues.values():
        queue.reverse()
    chance = random.Random(seed)
    current = next(iter(queues), None)
    ordered: list[Prompt] = []
    while queues:
        others = [domain for domain in queues if domain != current]
        if current not in queues or (ordered and others and chance.random() < mix_ratio):
            current = chance.choice(others) if mix_ratio else others[0]
        ordered.append(queues[current].pop())
        if not queues[current]:
            del queues[current]
    return ordered


def limit_each(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of every domain; all of them for None."""
    seen: dict[str | None, int] = {}
    chosen = []
    for prompt in prompts:
        seen[prompt.domain] = seen.get(prompt.domain, 0) + 1
        if limit is None or seen[prompt.domain] <= limit:
            chosen.append(prompt)
    return chosen


def halves(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Splits every domain's prompts: the first half for calibration, the second for measurements."""
    domains: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        domains.setdefault(prompt.domain, []).append(prompt)
    first = [prompt for members in domains.values() for prompt in members[: len(members) // 2]]
    second = [prompt for members in domains.values() for prompt in members[len(members) // 2 :]]
    return first, second


def lengthened(
    prompts: Sequence[Prompt],
    pool: Sequence[Prompt],
    num_tokens: int,
    tokenizer: PreTrainedTokenizerBase | None,
    chat: bool = True,
) -> list[Prompt]:
    """Lengthens prompts to a number of tokens by putting other prompts before them.

    A prompt's own text comes last. Before it come the prompts of its domain that precede it in the pool, before those
    the ones that follow it, and before those, where needed, the prompts of other domains; each once, separated by blank
    lines. The text is cut at its start, and may be a token short where a character takes several.

    Args:
        prompts: the prompts to lengthen, all in the pool.
        pool: the prompts that are put before them.
        num_tokens: length of each result in tokens, with the chat template.
        tokenizer: the model's tokenizer.
        chat: whether prompts go through the tokenizer's chat template, if it has one.

    Raises:
        PromptError: the pool has fewer tokens or conversations, or the chat template leaves no room for text.
    """

    def count(text: str) -> int:
        return len(encode(tokenizer, text, sys.maxsize, chat))

    return [
        replace(each, prompt=_cut(_with_context(each, pool, num_tokens, count), num_tokens, count)) for each in prompts
    ]


def _with_context(prompt: Prompt, pool: Sequence[Prompt], num_tokens: int, count: Callable[[str], int]) -> str:
    """A prompt's text after as many other prompts as `num_tokens` takes, or a little more."""
    others = [each for each in pool if each.domain != prompt.domain]
    own = [each for each in pool if each.domain == prompt.domain]
    place = own.index(prompt)
    context = [*others, *own[place + 1 :], *own[:place]]
    text = _text_of(prompt)
    while (length := count(text)) < num_tokens:
        if not context:
            raise PromptError(
                f"all {len(pool)} prompts together have {length} tokens, and prompts of {num_tokens} are asked for",
                "Give more prompts, or ask for fewer tokens.",
            )
        text = f"{_text_of(context.pop())}\n\n{text}"
    return text


def _text_of(prompt: Prompt) -> str:
    if not isinstance(prompt.prompt, str):
        raise PromptError(f"prompt '{prompt.id}' is a conversation, and only texts can be lengthened", "Leave it out.")
    return prompt.prompt


def _cut(text: str, num_tokens: int, count: Callable[[str], int]) -> str:
    """The longest end of a text with at most `num_tokens` tokens."""
    places = range(len(text.rstrip()))
    start = bisect_left(places, True, key=lambda place: count(text[place:]) <= num_tokens)
    if start == len(places):
        raise PromptError(
            f"a prompt of {num_tokens} tokens has no room for a word besides the chat template", "Ask for more tokens."
        )
    return text[start:]


def read_workloads(paths: Sequence[str | Path]) -> list[Prompt]:
    """Reads the prompts of several files or data sets, or the built-in ones where none is given.

    Raises:
        PromptError, UsageError: a file or data set cannot be read, as in `read_prompts` and `read_dataset`.
    """
    prompts = []
    for path in paths:
        prompts += read_dataset(str(path)) if str(path).startswith(DATASET) else read_prompts(path)
    return prompts or builtin_prompts()


def read_dataset(name: str) -> list[Prompt]:
    """Reads the prompts of a Hugging Face data set: `hf:NAME[:[CONFIG/]SPLIT[:COLUMN]]`.

    NAME is a Hub id, or a folder of files that the library `datasets` reads. By default SPLIT is `train` and COLUMN is
    `prompt`. Where the column has lists of turns, the first turn is used. A column `domain` gives the domain of each
    prompt; without it, the domain is the last part of NAME.

    Raises:
        UsageError: the library is not installed.
        PromptError: the data set cannot be read, has no such column, or has a row without text in it.
    """
    path, _, rest = name.removeprefix(DATASET).partition(":")
    place, _, column = rest.partition(":")
    config, _, split = place.rpartition("/")
    column = column or "prompt"
    rows = _load_dataset(name, path, config or None, split or "train")
    if column not in rows.column_names:
        raise PromptError(
            f"'{name}' has no column '{column}'",
            f"Name one of {', '.join(rows.column_names)}, as in {DATASET}{path}:{place or 'train'}:COLUMN.",
        )
    short = Path(path).name
    prompts = []
    for number, row in enumerate(rows, start=1):
        text = row[column]
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"'{name}', row {number} has no text in '{column}'", "Choose another column.")
        domain = row.get("domain")
        prompts.append(Prompt(text, short if domain is None else str(domain), f"{short}-{number}"))
    return prompts


def _load_dataset(name: str, path: str, config: str | None, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f"'{name}' needs the package datasets, which cannot be imported ({error})",
            "Install it with `pip install knn-ssd[datasets]`.",
        ) from error
    remedy = "Check its name, its configuration and split, and the network."
    with raised_as(PromptError, f"'{name}' cannot be read", remedy):
        return load_dataset(path, config, split=split)
