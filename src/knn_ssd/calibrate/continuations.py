"""What the target itself makes of the calibration prompts: its prompt vectors, and its own greedy continuations.

Plans are scored on these continuations alone: on foreign text the order of plans comes out inverted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knn_ssd.backends.base import Backend, Pooling
from knn_ssd.io import JsonLines
from knn_ssd.request import Request, end_at
from knn_ssd.sampling import Sampler, SamplingParams


@dataclass(frozen=True, slots=True)
class Observation:
    """One calibration prompt as the target sees it.

    Args:
        domain: its domain.
        id: its name.
        prompt_ids: its tokens, as the engine would encode it.
        token_ids: the target's greedy continuation; empty where only the vector is wanted.
        vector: the prompt vector (D,).
    """

    domain: str
    id: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    vector: tuple[float, ...]


def observe(
    backend: Backend,
    domain: str,
    prompt_id: str,
    prompt_ids: Sequence[int],
    new_tokens: int,
    pooling: Pooling,
    eos_token_ids: frozenset[int],
) -> Observation:
    """Runs one prompt, and decodes `new_tokens` after it (fewer where the output ends; none for 0)."""
    limit = min(new_tokens, backend.context_length - len(prompt_ids))
    sampler = Sampler.from_params(SamplingParams(), backend.device)
    with Request(backend, prompt_ids, max(limit, 1), sampler, end_at(eos_token_ids)) as request:
        tokens = [token for current in request.rounds() for token in current.tokens] if limit > 0 else []
        vector = tuple(request.prefill.vector(pooling).tolist())
    return Observation(domain, prompt_id, tuple(prompt_ids), tuple(tokens), vector)


class ObservationFile:
    """Observations on disk, appended as they are made, so that a killed run loses none.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def read(self) -> list[Observation]:
        """All observations in the file."""
        return [_from_json(data) for data in self._lines.read()]

    def append(self, observation: Observation) -> None:
        self._lines.append([asdict(observation)])


def _from_json(data: dict[str, Any]) -> Observation:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Observation(**fields)
