"""What the target itself makes of the calibration prompts: its prompt vectors, and its own greedy continuations.

Plans are scored on these continuations alone: on foreign text the order of plans comes out inverted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knn_ssd.atlas import Pooling
from knn_ssd.decode import FinishReason, decode
from knn_ssd.provenance import writing
from knn_ssd.sampling import Sampler, SamplingParams
from knn_ssd.target.contract import Target


@dataclass(frozen=True, slots=True)
class Observation:
    """One calibration prompt as the target sees it.

    Args:
        label: its domain.
        id: its name.
        prompt_ids: its tokens, as the engine would encode it.
        token_ids: the target's greedy continuation; empty where only the vector is wanted.
        vector: the prompt vector (D,).
    """

    label: str
    id: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    vector: tuple[float, ...]


def observe(
    target: Target,
    label: str,
    prompt_id: str,
    prompt_ids: Sequence[int],
    new_tokens: int,
    pooling: Pooling,
    eos_token_ids: frozenset[int],
) -> Observation:
    """Runs one prompt, and decodes `new_tokens` after it (fewer where the output ends; none for 0)."""
    limit = min(new_tokens, target.context_length - len(prompt_ids))
    session = target.open(len(prompt_ids) + max(limit, 1))
    try:
        prefill = session.prefill(list(prompt_ids))
        tokens: list[int] = []
        if limit > 0:
            sampler = Sampler.from_params(SamplingParams(), target.device)
            ends = ending(eos_token_ids)
            for current in decode(session, list(prompt_ids), prefill.logits, None, sampler, limit, ends):
                tokens += current.tokens
    finally:
        session.close()
    vector = tuple(prefill.vector(pooling).tolist())
    return Observation(label, prompt_id, tuple(prompt_ids), tuple(tokens), vector)


def ending(eos_token_ids: frozenset[int]) -> Callable[[int], FinishReason | None]:
    """Ends an output at an end-of-sequence token."""
    return lambda token: FinishReason.EOS if token in eos_token_ids else None


class ObservationFile:
    """Observations on disk, one JSON line each, appended as they are made, so that a killed run loses none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Observation]:
        """All whole lines; what a kill left of a last one is cut off."""
        if not self._path.exists():
            return []
        whole, _, rest = self._path.read_bytes().rpartition(b"\n")
        if rest:
            with writing(self._path):
                self._path.write_bytes(whole + b"\n" if whole else b"")
        return [_from_json(line) for line in whole.decode().splitlines()]

    def append(self, observation: Observation) -> None:
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(observation)) + "\n")


def _from_json(line: str) -> Observation:
    data: dict[str, Any] = json.loads(line)
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Observation(**fields)
