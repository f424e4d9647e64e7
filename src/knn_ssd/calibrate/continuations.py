"""Runs the target model on the calibration prompts: prompt vectors, and the target's own greedy continuations.

Plans are scored on these continuations alone: scored on other text, better plans rank below worse ones.
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
    """A calibration prompt with its prompt vector and the target's continuation.

    Args:
        domain: the prompt's domain.
        id: the prompt's id.
        prompt_ids: the prompt's tokens, as the engine encodes it.
        token_ids: the target's greedy continuation, or the beginning of it; empty where only the vector is needed.
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
    """Prefills a prompt and decodes `new_tokens` tokens after it: fewer where the output ends, none for 0."""
    limit = min(new_tokens, backend.context_length - len(prompt_ids))
    sampler = Sampler.from_params(SamplingParams(), backend.device)
    with Request(backend, prompt_ids, max(limit, 1), sampler, end_at(eos_token_ids)) as request:
        tokens = [token for current in request.rounds() for token in current.tokens] if limit > 0 else []
        vector = tuple(request.prefill.vector(pooling).tolist())
    return Observation(domain, prompt_id, tuple(prompt_ids), tuple(tokens), vector)


class ObservationFile:
    """A file of observations. Each is appended as soon as it is made, so that a killed run loses none.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def read(self) -> list[Observation]:
        """All observations in the file."""
        return [_from_json(data) for data in self._lines.read()]

    def append(self, observation: Observation) -> None:
        """Adds an observation."""
        self._lines.append([asdict(observation)])


def _from_json(data: dict[str, Any]) -> Observation:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Observation(**fields)
