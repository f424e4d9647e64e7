"""In which order prompts come: streams with a share of changes between domains, and readers of question files.

A stream with mix ratio R starts at one domain; before each next prompt it changes to another domain with probability R
(arXiv 2505.16162, section 4: 0 is one domain after the other, 1 changes at every prompt).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knn_ssd.errors import PromptError, UsageError
from knn_ssd.prompts import Prompt, builtin_prompts, read_prompts


def stream(prompts: Sequence[Prompt], mix_ratio: float, seed: int = 0) -> list[Prompt]:
    """All prompts, each once, in the order of a stream.

    Args:
        prompts: with their domains; those of one domain keep their order.
        mix_ratio: the probability that the next prompt is of another domain, in [0, 1]. Where only one domain has
            prompts left, it goes on; where a domain has none left, the stream changes.
        seed: of the changes.

    Raises:
        UsageError: a ratio out of its range.
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
    """The first half of every domain's prompts, to calibrate with, and the second, to measure with."""
    domains: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        domains.setdefault(prompt.domain, []).append(prompt)
    first = [prompt for members in domains.values() for prompt in members[: len(members) // 2]]
    second = [prompt for members in domains.values() for prompt in members[len(members) // 2 :]]
    return first, second


def read_workloads(paths: Sequence[str | Path]) -> list[Prompt]:
    """The prompts of several files, or the built-in ones where none is given.

    Raises:
        PromptError: as `read_prompts`.
    """
    return [prompt for path in paths for prompt in read_workload(path)] or builtin_prompts()


def read_workload(path: str | Path) -> list[Prompt]:
    """The prompts of a JSON lines file, ours or in the format of Spec-Bench (`question_id, category, turns`).

    Of a conversation the first turn is taken: what later ones answer to depends on the model.

    Raises:
        PromptError: as `read_prompts`.
    """
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            first: Any = json.loads(next(file, "") or "null")
    except (OSError, ValueError):
        return read_prompts(path)  # which says what is wrong
    if not isinstance(first, dict) or "turns" not in first or "prompt" in first:
        return read_prompts(path)
    prompts = []
    for number, line in enumerate(Path(path).read_text("utf-8-sig").split("\n"), start=1):
        if line.strip():
            prompts.append(_question(line, f"{path}, line {number}"))
    return prompts


def _question(line: str, where: str) -> Prompt:
    try:
        data = json.loads(line)
        prompt = Prompt(str(data["turns"][0]), str(data["category"]), str(data["question_id"]))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise PromptError(f"{where} is not a question of Spec-Bench: {error!r}", "Mend or drop the line.") from error
    if not prompt.prompt.strip():
        raise PromptError(f"{where} has an empty turn", "Give at least one word.")
    return prompt
