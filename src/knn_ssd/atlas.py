"""The atlas: anchors, labels, plans, the model they belong to, what things cost there, and the evidence.

On disk a folder that explains itself: `atlas.json` for people, `anchors.safetensors` for the vectors. Written
atomically; no pickle. Needs neither torch nor a model to be read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.errors import AtlasError, AtlasMismatchError, UsageError
from knn_ssd.plan import Mode, Plan
from knn_ssd.provenance import atomic_directory

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
MANIFEST = "atlas.json"
ANCHORS = "anchors.safetensors"


class Pooling(StrEnum):
    """How the prompt vector is taken from the hidden states of the prompt's tokens."""

    MEAN = "mean"  # as in the released code of arXiv 2505.16162
    LAST = "last"  # as in its text; the only one that prefix caching leaves available


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Which model an atlas belongs to.

    Args:
        architecture: name of the model's class.
        num_layers, hidden_size, vocab_size: its sizes.
        weights_hash: of samples of every weight, in bfloat16, so that the dtype it was loaded in does not matter.
        tokenizer_hash: of the vocabulary; empty where there was no tokenizer.
        dtype: in which it was calibrated. Not part of the model's identity.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    weights_hash: str
    tokenizer_hash: str
    dtype: str

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """What makes `other` another model, as sentences; empty if it is the same."""
        names = [f.name for f in fields(self) if f.name != "dtype"]
        pairs = [(name.replace("_", " "), getattr(other, name), getattr(self, name)) for name in names]
        return tuple(f"{n} is {its or 'none'}, the atlas has {own or 'none'}" for n, its, own in pairs if its != own)


@dataclass(frozen=True, slots=True)
class CostProfile:
    """What passes cost on the machine they were measured on, in seconds.

    Args:
        step_sec: one token through the whole model.
        attention_sec: saved by skipping one attention sublayer.
        mlp_sec: saved by skipping one MLP sublayer.
        verify_sec: a pass over 1, 2, 3, … tokens.
        low_attention_sec, low_mlp_sec, low_head_sec: saved by running one of them on low-bit weights; 0 where the
            target has none.
    """

    step_sec: float
    attention_sec: float
    mlp_sec: float
    verify_sec: tuple[float, ...]
    low_attention_sec: float = 0.0
    low_mlp_sec: float = 0.0
    low_head_sec: float = 0.0

    def __post_init__(self) -> None:
        if not self.verify_sec:
            raise UsageError("a cost profile needs the seconds of at least one verification, got none")

    def draft_step_sec(self, plan: Plan) -> float:
        """One token under a plan."""
        saved = len(plan.skipped_attention) * self.attention_sec + len(plan.skipped_mlp) * self.mlp_sec
        saved += plan.attention.count(Mode.LOW) * self.low_attention_sec + plan.mlp.count(Mode.LOW) * self.low_mlp_sec
        saved += self.low_head_sec if plan.head is Mode.LOW else 0.0
        return max(self.step_sec - saved, 0.0)

    def verification_sec(self, rows: int) -> float:
        """A pass over `rows` tokens, at least 1; beyond what was measured, in a straight line."""
        known = self.verify_sec
        if rows <= len(known):
            return known[rows - 1]
        return known[-1] + (rows - len(known)) * max(known[-1] - known[0], 0.0) / max(len(known) - 1, 1)


@dataclass(frozen=True, slots=True)
class Label:
    """What an atlas knows of one domain.

    Args:
        plan: how to draft for its prompts.
        radius: largest cosine distance of a prompt of this domain to its nearest anchor.
        evidence: what the search found; JSON values.
    """

    plan: Plan
    radius: float
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Atlas:
    """Everything that calibration learned of a model.

    Args:
        fingerprint: which model.
        pooling: how prompt vectors are taken.
        anchors: (A, D) float32.
        anchor_labels: the label that each anchor stands for, A of them.
        labels: by name.
        fallback: the plan for prompts far from every anchor.
        fallback_evidence: what the search on the mixture found.
        cost: measured where the atlas was made.
        evidence: of the whole: versions, settings, held-out routing accuracy.
        vectors: (N, D) float32, the prompt vectors that the anchors were made of; None where they were not kept.
        vector_labels: their labels, N of them.

    Raises:
        AtlasError: parts that do not fit together.
    """

    fingerprint: Fingerprint
    pooling: Pooling
    anchors: np.ndarray[Any, Any]
    anchor_labels: tuple[str, ...]
    labels: Mapping[str, Label]
    fallback: Plan
    cost: CostProfile
    fallback_evidence: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    vectors: np.ndarray[Any, Any] | None = None
    vector_labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        num_anchors, width = self.anchors.shape
        num_vectors = 0 if self.vectors is None else len(self.vectors)
        _require(num_vectors == len(self.vector_labels), f"{num_vectors} vectors have {len(self.vector_labels)} labels")
        _require(
            num_anchors == len(self.anchor_labels),
            f"{num_anchors} anchors have {len(self.anchor_labels)} labels",
        )
        _require(width == self.fingerprint.hidden_size, f"anchors of {width} dimensions for a model of "
                 f"{self.fingerprint.hidden_size}")  # fmt: skip
        unknown = sorted(set(self.anchor_labels) ^ set(self.labels))
        _require(not unknown, f"anchors and labels do not name the same domains: {', '.join(unknown)}")
        plans = [label.plan for label in self.labels.values()] + [self.fallback]
        wrong = [plan.num_layers for plan in plans if plan.num_layers != self.fingerprint.num_layers]
        _require(
            not wrong,
            f"a plan for {wrong and wrong[0]} layers, and the model has {self.fingerprint.num_layers}",
        )

    def plan_for(self, label: str | None) -> Plan:
        """The plan of a label; None is the fallback.

        Raises:
            UsageError: a label that the atlas does not know.
        """
        if label is None:
            return self.fallback
        if label not in self.labels:
            raise UsageError(f"the atlas has no domain '{label}'", f"It has {', '.join(sorted(self.labels))}.")
        return self.labels[label].plan

    def evidence_of(self, label: str | None) -> Mapping[str, Any]:
        """What the search for a label's plan found; None is the fallback's."""
        return self.fallback_evidence if label is None else self.labels[label].evidence

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises AtlasMismatchError, listing the differences, if the atlas belongs to another model."""
        differences = self.fingerprint.differences(fingerprint)
        if differences:
            raise AtlasMismatchError(
                "the atlas was calibrated on another model",
                differences,
                "Calibrate this model, or give the one that the atlas belongs to.",
            )

    def save(self, path: str | Path) -> Path:
        """Writes the folder, whole or not at all.

        Raises:
            OutputError: there is something at `path`, or it cannot be written.
        """
        path = Path(path)
        with atomic_directory(path) as folder:
            (folder / ANCHORS).write_bytes(self._arrays())
            (folder / MANIFEST).write_text(_readable_json(self._manifest()), "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Atlas:
        """Reads a folder that `save` wrote.

        Raises:
            AtlasError: not an atlas, of a newer schema, or damaged.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        arrays = _read_arrays(path, manifest.get("anchors_sha256"))
        try:
            content = _validate(manifest)
            return cls(
                fingerprint=content.fingerprint,
                pooling=content.pooling,
                anchors=arrays["anchors"],
                anchor_labels=content.anchor_labels,
                labels={name: entry.label() for name, entry in content.labels.items()},
                fallback=Plan.from_json(content.fallback.plan),
                fallback_evidence=content.fallback.evidence,
                cost=content.cost,
                evidence=content.evidence,
                vectors=arrays.get("vectors"),
                vector_labels=content.vector_labels,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise AtlasError(
                f"'{path / MANIFEST}' is damaged: {what}", "Calibrate again, or restore the file."
            ) from error

    def _manifest(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "fingerprint": asdict(self.fingerprint),
            "pooling": self.pooling.value,
            "labels": {
                name: {"plan": label.plan.to_json(), "radius": label.radius, "evidence": dict(label.evidence)}
                for name, label in self.labels.items()
            },
            "fallback": {"plan": self.fallback.to_json(), "evidence": dict(self.fallback_evidence)},
            "cost": {name: value for name, value in asdict(self.cost).items() if value or not name.startswith("low_")},
            "anchor_labels": list(self.anchor_labels),
            "anchors_sha256": hashlib.sha256(self._arrays()).hexdigest(),
            "vector_labels": list(self.vector_labels),
            "evidence": dict(self.evidence),
        }

    def _arrays(self) -> bytes:
        from safetensors.numpy import save

        return save({"anchors": self.anchors} | ({} if self.vectors is None else {"vectors": self.vectors}))


def _validate(manifest: dict[str, Any]) -> Any:
    """The manifest with every value of its kind. Pydantic is imported here: only reading needs it."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.dataclasses import dataclass as validated

    @validated(config=ConfigDict(allow_inf_nan=False))
    class Entry:
        plan: dict[str, Any]
        evidence: dict[str, Any]
        radius: float = 2.0

        def label(self) -> Label:
            return Label(Plan.from_json(self.plan), self.radius, self.evidence)

    @validated(config=ConfigDict(allow_inf_nan=False))
    class Content:
        fingerprint: Fingerprint
        pooling: Pooling
        labels: dict[str, Entry]
        fallback: Entry
        cost: CostProfile
        anchor_labels: tuple[str, ...]
        vector_labels: tuple[str, ...]
        evidence: dict[str, Any]

    try:
        return TypeAdapter(Content).validate_python(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}, got {str(first['input'])[:80]!r}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise AtlasError(f"there is no atlas at '{path}'", "Make one with `knn-ssd calibrate --out PATH`.")
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise AtlasError(f"'{path}' is not an atlas: it has no {MANIFEST}", "Give the folder that calibrate wrote.")
    try:
        manifest = json.loads(manifest_path.read_text("utf-8"))
    except ValueError as error:
        raise AtlasError(f"'{manifest_path}' is not JSON: {error}", "Calibrate again, or restore the file.") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int):
        raise AtlasError(f"'{manifest_path}' has no schema number", "Calibrate again, or restore the file.")
    if schema > SCHEMA:
        raise AtlasError(
            f"'{path}' has atlas schema {schema}, and this version of knn-ssd reads up to {SCHEMA}",
            "Update knn-ssd.",
        )
    return manifest  # type: ignore[no-any-return]


def _read_arrays(path: Path, expected_hash: str | None) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    file = path / ANCHORS
    try:
        content = file.read_bytes()
        arrays = load(content)
    except (OSError, SafetensorError) as error:
        raise AtlasError(
            f"'{file}' is missing or damaged ({error})", "Calibrate again, or restore the file."
        ) from error
    if hashlib.sha256(content).hexdigest() != expected_hash:
        raise AtlasError(
            f"'{file}' does not belong to the {MANIFEST} beside it", "Calibrate again, or restore the files."
        )
    return arrays


def _readable_json(manifest: dict[str, Any]) -> str:
    """Indented, with lists of plain values on one line each. JSON strings hold no line breaks: none is touched."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda m: "[" + re.sub(r"\n\s+", " ", m[1]) + "]", text) + "\n"


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AtlasError(f"the atlas does not fit together: {otherwise}", "Calibrate again.")
