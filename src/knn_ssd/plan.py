"""Plans: how the target is cheapened while it drafts. Plain values that know nothing of torch or of models."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from knn_ssd.errors import UsageError


class Mode(StrEnum):
    """What a sublayer does while drafting; when verifying, every sublayer runs as it is."""

    KEEP = "keep"
    SKIP = "skip"  # contributes zero to the residual stream
    LOW = "low"  # runs on low-bit weights


@dataclass(frozen=True, slots=True)
class Policy:
    """How long to draft.

    Args:
        max_draft: the longest draft in tokens; 0 is plain decoding.
        threshold: drafting stops after a token whose draft's own top probability is under this, in [0, 1]. A controller
            finds its own.
        lookup: draft from the longest earlier occurrence of the context's suffix too, where there is one.

    Raises:
        UsageError: a value outside its range.
    """

    max_draft: int = 12
    threshold: float = 0.8
    lookup: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.max_draft, int) or self.max_draft < 0:
            raise UsageError(f"max_draft must be 0 or more, got {self.max_draft}")
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"threshold must be in [0, 1], got {self.threshold}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The modes of all 2L sublayers and of the LM head while drafting, and the draft policy.

    Args:
        attention: the mode of each layer's attention, L of them.
        mlp: the mode of each layer's MLP, L of them.
        head: the mode of the LM head, `keep` or `low`.
        policy: how long to draft.

    Raises:
        UsageError: different numbers of attentions and MLPs, none at all, or a skipped head.
    """

    attention: tuple[Mode, ...]
    mlp: tuple[Mode, ...]
    head: Mode = Mode.KEEP
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.mlp) or not self.attention:
            raise UsageError(
                f"a plan needs as many attention modes as MLP modes and at least one, "
                f"got {len(self.attention)} and {len(self.mlp)}"
            )
        if self.head is Mode.SKIP:
            raise UsageError("the LM head cannot be skipped: its mode must be keep or low, got skip")

    @classmethod
    def skipping(
        cls,
        num_layers: int,
        attention: Iterable[int] = (),
        mlp: Iterable[int] = (),
        policy: Policy | None = None,
    ) -> Plan:
        """A plan that skips the given layers' attention and MLP sublayers and keeps the rest."""
        return cls(
            _modes(num_layers, "attention", {Mode.SKIP: attention}),
            _modes(num_layers, "mlp", {Mode.SKIP: mlp}),
            policy=policy or Policy(),
        )

    @classmethod
    def low(cls, num_layers: int, policy: Policy | None = None) -> Plan:
        """The plan that runs everything, the head too, on low-bit weights."""
        every = (Mode.LOW,) * num_layers
        return cls(every, every, Mode.LOW, policy or Policy())

    @classmethod
    def plain(cls, num_layers: int) -> Plan:
        """The plan that never drafts."""
        return cls.skipping(num_layers, policy=Policy(max_draft=0))

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """All 2L modes, layer by layer: attention 0, MLP 0, attention 1, …"""
        return _in_turn(self.attention, self.mlp)

    @property
    def skipped_attention(self) -> tuple[int, ...]:
        return _where(self.attention, Mode.SKIP)

    @property
    def skipped_mlp(self) -> tuple[int, ...]:
        return _where(self.mlp, Mode.SKIP)

    @property
    def num_skipped(self) -> int:
        return len(self.skipped_attention) + len(self.skipped_mlp)

    @property
    def is_plain(self) -> bool:
        """Whether this plan never drafts."""
        return self.policy.max_draft == 0

    @property
    def cheapens(self) -> bool:
        """Whether its passes cost less than the full model's."""
        return self.num_skipped > 0 or self.uses_low

    @property
    def uses_low(self) -> bool:
        return Mode.LOW in self.attention or Mode.LOW in self.mlp or self.head is Mode.LOW

    def with_policy(self, policy: Policy) -> Plan:
        return replace(self, policy=policy)

    def describe(self) -> str:
        """One line for a person: `skip attention 3 5, MLP 7; draft up to 8 while p >= 0.60`."""
        if self.is_plain:
            return "plain decoding"
        parts = [
            f"{mode.value} {name} {' '.join(map(str, layers))}"
            for mode in (Mode.SKIP, Mode.LOW)
            for name, modes in (("attention", self.attention), ("MLP", self.mlp))
            if (layers := _where(modes, mode))
        ]
        if self.head is Mode.LOW:
            parts.append("low head")
        if self == Plan.low(self.num_layers, self.policy):
            parts = ["all low"]
        sublayers = ", ".join(parts) or "skip nothing"
        lookup = ", look-up" if self.policy.lookup else ""
        return f"{sublayers}; draft up to {self.policy.max_draft} while p >= {self.policy.threshold:.2f}{lookup}"

    def to_json(self) -> dict[str, Any]:
        """A readable JSON object; `from_json` is its inverse."""
        return {
            "num_layers": self.num_layers,
            **{
                mode.value: {
                    "attention": list(_where(self.attention, mode)),
                    "mlp": list(_where(self.mlp, mode)),
                }
                for mode in (Mode.SKIP, Mode.LOW)
            },
            "head": self.head.value,
            "policy": {
                "max_draft": self.policy.max_draft,
                "threshold": self.policy.threshold,
                "lookup": self.policy.lookup,
            },
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Reads what `to_json` wrote.

        Raises:
            UsageError: a layer out of range or given two modes, or a policy out of range.
            KeyError, TypeError: not such an object at all.
        """
        num_layers = data["num_layers"]
        attention, mlp = (
            _modes(num_layers, name, {mode: data[mode.value][name] for mode in (Mode.SKIP, Mode.LOW)})
            for name in ("attention", "mlp")
        )
        return cls(attention, mlp, Mode(data["head"]), Policy(**data["policy"]))


@functools.lru_cache
def _in_turn(attention: tuple[Mode, ...], mlp: tuple[Mode, ...]) -> tuple[Mode, ...]:
    return tuple(mode for pair in zip(attention, mlp, strict=True) for mode in pair)


def _where(modes: tuple[Mode, ...], wanted: Mode) -> tuple[int, ...]:
    return tuple(index for index, mode in enumerate(modes) if mode is wanted)


def _modes(num_layers: int, name: str, given: dict[Mode, Iterable[int]]) -> tuple[Mode, ...]:
    modes = [Mode.KEEP] * num_layers
    for mode, layers in given.items():
        for layer in layers:
            if not 0 <= layer < num_layers:
                raise UsageError(f"{name} layer must be in [0, {num_layers}), got {layer}")
            if modes[layer] is not Mode.KEEP:
                raise UsageError(f"{name} layer {layer} is given twice")
            modes[layer] = mode
    return tuple(modes)
