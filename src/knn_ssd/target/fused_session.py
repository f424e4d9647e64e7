"""One request on the lean target: its keys and values, and the passes that it wants run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from knn_ssd.plan import Plan
from knn_ssd.target.contract import Prefill
from knn_ssd.target.native import Place, address
from knn_ssd.target.pointer import Pointed
from knn_ssd.target.prefixes import Prefix, Prefixes

if TYPE_CHECKING:
    from knn_ssd.target.fused import FusedTarget

CHUNK = 64  # rows of a prompt that go through the layers together

Passed = tuple[torch.Tensor, torch.Tensor]  # (n, D) hidden states after the final norm; (wanted, V) logits


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """Rows that a session wants run at its pointer, which stays where it is.

    Args:
        session: whose.
        token_ids: n of them.
        plan: the modes; None is the full model.
        wanted: how many of the last rows need logits.
        run_length: of a rehearsal's runs; 0 is none.
    """

    session: FusedSession
    token_ids: Sequence[int]
    plan: Plan | None
    wanted: int
    run_length: int = 0

    @property
    def is_prompt(self) -> bool:
        """Whether it is a part of a prompt, which answers do not wait for."""
        return self.wanted < len(self.token_ids)


class FusedSession(Pointed):
    """One request on a `FusedTarget`; see `contract.Session`."""

    def __init__(self, target: FusedTarget, capacity: int, prefixes: Prefixes | None = None) -> None:
        super().__init__(capacity)
        self._target = target
        self._prefixes = prefixes
        first = target.attentions[0]
        self._cache = _empty_cache(target.num_layers, first.kv_heads, capacity, first.head_dim)
        self._hidden = torch.empty(capacity, target.hidden_size)  # of what the full model ran
        self._token_ids: list[int] = []  # up to the end of the last pass

    def prefill(self, token_ids: list[int]) -> Prefill:
        assert self.length == 0, "prefill is for an empty session"
        started = time.perf_counter()
        self._pointer.check_room(len(token_ids))
        reused = self._reuse(token_ids[:-1])
        for start in range(reused, len(token_ids), CHUNK):
            chunk = token_ids[start : start + CHUNK]
            is_last = start + CHUNK >= len(token_ids)
            logits = self._run(Pass(self, chunk, None, wanted=1 if is_last else 0))
            self._pointer.ran(len(chunk), None)
            self._pointer.commit(len(chunk))
        hidden = self._hidden[: len(token_ids)]
        mean = hidden.mean(dim=0, dtype=torch.float64).float()  # in one go: the same bits whatever was reused
        return Prefill(logits[-1], mean, hidden[-1].clone(), time.perf_counter() - started, reused)

    def forward(self, token_ids: list[int], plan: Plan | None = None) -> torch.Tensor:
        self._pointer.check(plan)
        logits = self._run(Pass(self, token_ids, plan, wanted=len(token_ids)))
        self._pointer.ran(len(token_ids), plan)
        return logits

    def rehearse(self, token_ids: list[int], plan: Plan, run_length: int) -> torch.Tensor:
        self._pointer.check_room(len(token_ids))
        return self._target.run(Pass(self, token_ids, plan, len(token_ids), run_length))[1]

    def embed(self, token: int) -> torch.Tensor:
        """The state (1, D) of a token before the first layer."""
        return self._target.embedding[token][None].float()

    def run_layer(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """States (m, D) of the token at the pointer after one layer of the full model, each as if it stood there
        alone; nothing is written.
        """
        self._pointer.check_room(1)
        pointers = map(address, (*self._target.positions(self.length + 1), *(part[layer] for part in self._cache)))
        place = Place(*pointers, self.capacity, self.length, 1, 1)
        return self._target.run_layer(layer, states, [place] * len(states))

    def close(self) -> None:
        self._keep()
        self._cache, self._hidden = (), torch.empty(0)

    def place(self, count: int, run_length: int, positions: tuple[torch.Tensor, torch.Tensor]) -> Place:
        """Where `count` rows of a pass stand; positions (at least the pointer and `count`, rotary)."""
        return Place(*map(address, (*positions, *self._cache)), self.capacity, self.length, run_length, count)

    def _run(self, wanted: Pass) -> torch.Tensor:
        self._pointer.check_room(len(wanted.token_ids))
        hidden, logits = self._target.run(wanted)
        self._token_ids[self.length :] = wanted.token_ids
        if wanted.plan is None:
            self._hidden[self.length : self.length + len(hidden)] = hidden
        return logits

    def _reuse(self, token_ids: Sequence[int]) -> int:
        """Takes over what an earlier session computed for the first of these; of how many."""
        found = self._prefixes.find(token_ids) if self._prefixes is not None else None
        if found is None:
            return 0
        prefix, count = found
        for own, kept in zip(self._cache, prefix.cache, strict=True):
            own[:, :, :count] = kept[:, :, :count]
        self._hidden[:count] = prefix.hidden[:count]
        self._token_ids = list(token_ids[:count])
        self._pointer.ran(count, None)
        self._pointer.commit(count)
        return count

    def _keep(self) -> None:
        """Leaves what the full model ran to later sessions."""
        store, count = self._prefixes, self._pointer.verified
        if store is None or not self._cache:
            return
        token_ids = tuple(self._token_ids[:count])
        prefix = Prefix(token_ids, tuple(part[:, :, :count] for part in self._cache), self._hidden[:count])
        if store.wants(token_ids, prefix.bytes):
            store.add(prefix.copy())


def _empty_cache(num_layers: int, kv_heads: int, capacity: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Room for keys and values, in the order of `native.Place`: float32, the same in 8 bits, and the scales of these.

    The latter are what low-bit attentions read (after arXiv 2502.10424, with a scale for each vector): with long
    prompts, or many clients, a draft would else read as much of keys and values as of its weights.
    """
    vectors = (num_layers, kv_heads, capacity)
    shapes = ((*vectors, head_dim), torch.float32), ((*vectors, head_dim), torch.int8), (vectors, torch.float32)
    return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in shapes for _ in range(2))
