"""Plans: what the target model skips or reads in 4 bits while it drafts. Plain values that need neither torch nor a
model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from knn_ssd.errors import UsageError

_MOST_LAYERS = 10_000  # far more than any model has; a damaged file may ask for as many as memory cannot hold


class Mode(StrEnum):
    """What a sublayer does while drafting. Verification always runs the full model."""

    KEEP = "keep"  # runs as in the full model
    SKIP = "skip"  # adds nothing to the residual stream
    LOW = "low"  # runs on 4-bit copies of its weights


@dataclass(frozen=True, slots=True)
class Policy:
    """The draft policy: how many tokens to draft at a time, and when to stop earlier.

    Args:
        max_draft: the longest draft, in tokens; 0 is plain decoding.
        threshold: drafting stops after a token whose confidence (the draft's own top-1 probability) is below this
            value, in [0, 1]. A controller replaces it by a threshold of its own.
        lookup: also draft by copying what followed the longest earlier occurrence of the context's suffix.

    Raises:
        UsageError: a value is outside its range.
    """

    max_draft: int = 12
    threshold: float = 0.8
    lookup: bool = False

    def __post_init__(self) -> None:
        if type(self.max_draft) is not int or self.max_draft < 0:
            raise UsageError(f"max_draft must be 0 or more, got {self.max_draft}")
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"threshold must be in [0, 1], got {self.threshold}")
        if not isinstance(self.lookup, bool):
            raise UsageError(f"lookup must be true or false, got {self.lookup!r}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The modes of all 2L sublayers and of the LM head while drafting, and the draft policy.

    Args:
        attention: the mode of the attention sublayer in each of the L layers.
        mlp: the mode of the MLP sublayer in each of the L layers.
        head: the mode of the LM head, `keep` or `low`.
        policy: how many tokens to draft at a time.

    Raises:
        UsageError: `attention` and `mlp` differ in length or are empty, or the LM head is skipped.
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
        cls, num_layers: int, attention: Iterable[int] = (), mlp: Iterable[int] = (), policy: Policy | None = None
    ) -> Plan:
        """A plan that skips the given layers' attention and MLP sublayers and keeps the rest."""
        return cls(
            _modes(num_layers, "attention", {Mode.SKIP: attention}),
            _modes(num_layers, "mlp", {Mode.SKIP: mlp}),
            policy=policy or Policy(),
        )

    @classmethod
    def low(cls, num_layers: int, policy: Policy | None = None) -> Plan:
        """The plan that runs every sublayer and the LM head on 4-bit weights."""
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
        return _interleaved(self.attention, self.mlp)

    @property
    def skipped_attention(self) -> tuple[int, ...]:
        return _layers_in(self.attention, Mode.SKIP)

    @property
    def skipped_mlp(self) -> tuple[int, ...]:
        return _layers_in(self.mlp, Mode.SKIP)

    @property
    def num_skipped(self) -> int:
        return len(self.skipped_attention) + len(self.skipped_mlp)

    @property
    def is_plain(self) -> bool:
        """Whether this plan never drafts."""
        return self.policy.max_draft == 0

    @property
    def cheapens(self) -> bool:
        """Whether a forward pass under this plan costs less than one of the full model."""
        return self.num_skipped > 0 or self.uses_low

    @property
    def uses_low(self) -> bool:
        """Whether anything runs on 4-bit weights."""
        return Mode.LOW in self.attention or Mode.LOW in self.mlp or self.head is Mode.LOW

    def with_policy(self, policy: Policy) -> Plan:
        return replace(self, policy=policy)

    def describe(self) -> str:
        """One line for a person: `4-bit, but skip MLP 13 and 27; drafts up to 12 while confidence >= 0.4; lookup`."""
        return self.describe_policy() if self.is_plain else f"{self.describe_modes()}; {self.describe_policy()}"

    def describe_modes(self) -> str:
        """The modes by their exceptions from the full model or from 4-bit weights, whichever is more frequent."""
        modes = (*self.modes, self.head)
        is_low = modes.count(Mode.LOW) > modes.count(Mode.KEEP)
        skipped, others = self._names(Mode.SKIP), self._names(Mode.KEEP if is_low else Mode.LOW)
        exceptions = [f"skip {skipped}"] if skipped else []
        if others:
            exceptions.append(f"{others} in full" if is_low else f"{others} in 4 bits")
        text = ", with ".join(exceptions)
        if skipped and not is_low:
            return text
        return ", but ".join(filter(None, ("4-bit" if is_low else "full model", text)))

    def describe_policy(self) -> str:
        """The draft policy in a few words: `drafts up to 12 while confidence >= 0.4; lookup`."""
        max_draft, threshold, lookup = self.policy.max_draft, self.policy.threshold, self.policy.lookup
        if self.is_plain:
            return "plain decoding"
        if lookup and not self.cheapens:  # the full model does not draft for itself where lookup may
            return f"drafts up to {max_draft} by lookup"
        stop = f" while confidence >= {threshold:.3g}" if threshold else ""
        return f"drafts up to {max_draft}{stop}{'; lookup' if lookup else ''}"

    def _names(self, mode: Mode) -> str:
        """What runs in a mode: `attention 3-9, 12, MLP 7 and LM head`."""
        names = [*_named("attention", self.attention, mode), *_named("MLP", self.mlp, mode)]
        if self.head is mode:
            names.append("LM head")
        return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that people can read; `from_json` is its inverse."""
        layers = {
            mode.value: {"attention": [*_layers_in(self.attention, mode)], "mlp": [*_layers_in(self.mlp, mode)]}
            for mode in (Mode.SKIP, Mode.LOW)
        }
        return {"num_layers": self.num_layers, **layers, "head": self.head.value, "policy": asdict(self.policy)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            UsageError: a layer is out of range or has two modes, or the policy is out of range.
            KeyError, TypeError: `data` is not such an object.
        """
        num_layers = data["num_layers"]
        attention, mlp = (
            _modes(num_layers, name, {mode: data[mode.value][name] for mode in (Mode.SKIP, Mode.LOW)})
            for name in ("attention", "mlp")
        )
        return cls(attention, mlp, Mode(data["head"]), Policy(**data["policy"]))


@functools.lru_cache
def _interleaved(attention: tuple[Mode, ...], mlp: tuple[Mode, ...]) -> tuple[Mode, ...]:
    return tuple(mode for pair in zip(attention, mlp, strict=True) for mode in pair)


def _named(sublayer: str, modes: tuple[Mode, ...], mode: Mode) -> list[str]:
    """The layers in which a sublayer has a mode, three or more in a row as a range: `attention 3-9`, `12`."""
    runs: list[list[int]] = []
    for layer in _layers_in(modes, mode):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts = [text for run in runs for text in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return [f"{sublayer} {text}" if index == 0 else text for index, text in enumerate(texts)]


def _layers_in(modes: tuple[Mode, ...], wanted: Mode) -> tuple[int, ...]:
    return tuple(index for index, mode in enumerate(modes) if mode is wanted)


def _modes(num_layers: int, name: str, given: dict[Mode, Iterable[int]]) -> tuple[Mode, ...]:
    if type(num_layers) is not int or not 1 <= num_layers <= _MOST_LAYERS:
        raise UsageError(f"a plan is for 1 to {_MOST_LAYERS} layers, got {num_layers!r}")
    modes = [Mode.KEEP] * num_layers
    for mode, layers in given.items():
        for layer in layers:
            if not 0 <= layer < num_layers:
                raise UsageError(f"{name} layer must be in [0, {num_layers}), got {layer}")
            if modes[layer] is not Mode.KEEP:
                raise UsageError(f"{name} layer {layer} is given twice")
            modes[layer] = mode
    return tuple(modes)
