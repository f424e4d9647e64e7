"""The atlas of a model: anchors, domains and their plans, the model's fingerprint, a cost profile, and the evidence.

On disk it is a folder: `atlas.json`, which people can read, and `anchors.safetensors` with the vectors. The folder is
written atomically and holds no pickle. Reading it needs neither torch nor a model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.backends.base import Pooling
from knn_ssd.errors import AtlasError, AtlasMismatchError, UsageError
from knn_ssd.io import atomic_directory
from knn_ssd.loading.fingerprint import Fingerprint
from knn_ssd.plan import Plan
from knn_ssd.speculation.cost_model import CostProfile

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
MANIFEST = "atlas.json"
ANCHORS = "anchors.safetensors"
_RESTORE = "Calibrate again, or restore the file."


@dataclass(frozen=True, slots=True)
class DomainEntry:
    """One domain of an atlas.

    Args:
        plan: the plan that drafts for prompts of this domain.
        radius: the largest cosine distance to the nearest anchor at which a prompt counts as of this domain.
        evidence: what the search measured, as JSON values.
    """

    plan: Plan
    radius: float
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Atlas:
    """The result of calibrating a model.

    Args:
        fingerprint: identifies the model.
        pooling: how a prompt vector is pooled from the prompt's hidden states.
        anchors: (A, D) float32.
        anchor_domains: the domain of each of the A anchors.
        domains: the domains by name.
        fallback: the fallback plan, for prompts beyond the radius of every domain.
        fallback_evidence: what the search on prompts of all domains measured.
        cost: the cost profile, measured on the machine that calibrated.
        evidence: what holds for the whole atlas: versions, settings, held-out routing accuracy.
        vectors: (N, D) float32, the prompt vectors that were clustered into anchors; None where they were not kept.
        vector_domains: the domain of each of the N prompt vectors.

    Raises:
        AtlasError: the parts are inconsistent.
    """

    fingerprint: Fingerprint
    pooling: Pooling
    anchors: np.ndarray[Any, Any]
    anchor_domains: tuple[str, ...]
    domains: Mapping[str, DomainEntry]
    fallback: Plan
    cost: CostProfile
    fallback_evidence: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    vectors: np.ndarray[Any, Any] | None = None
    vector_domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, array in (("anchors", self.anchors), ("vectors", self.vectors)):
            _require(array is None or (array.ndim == 2 and array.dtype.kind == "f" and bool((abs(array) < 1e30).all())),
                     f"the {name} are not rows of finite numbers")  # fmt: skip
        num_anchors, width = self.anchors.shape
        num_vectors = 0 if self.vectors is None else len(self.vectors)
        _require(
            num_vectors == len(self.vector_domains), f"{num_vectors} vectors have {len(self.vector_domains)} domains"
        )
        _require(
            num_anchors == len(self.anchor_domains), f"{num_anchors} anchors have {len(self.anchor_domains)} domains"
        )
        _require(width == self.fingerprint.hidden_size, f"anchors of {width} dimensions for a model of "
                 f"{self.fingerprint.hidden_size}")  # fmt: skip
        unknown = sorted(set(self.anchor_domains) ^ set(self.domains))
        _require(not unknown, f"anchors and plans do not name the same domains: {', '.join(unknown)}")
        halves = [name for name in self.domains if name != name.encode("utf-8", "ignore").decode()]
        _require(not halves, f"a domain's name is not Unicode text: {halves!r}")
        plans = [domain.plan for domain in self.domains.values()] + [self.fallback]
        wrong = [plan.num_layers for plan in plans if plan.num_layers != self.fingerprint.num_layers]
        _require(not wrong, f"a plan for {wrong and wrong[0]} layers, and the model has {self.fingerprint.num_layers}")

    def plan_for(self, domain: str | None) -> Plan:
        """The plan of a domain; None stands for the fallback plan.

        Raises:
            UsageError: the atlas has no such domain.
        """
        if domain is None:
            return self.fallback
        if domain not in self.domains:
            raise UsageError(f"the atlas has no domain '{domain}'", f"It has {', '.join(sorted(self.domains))}.")
        return self.domains[domain].plan

    def evidence_of(self, domain: str | None) -> Mapping[str, Any]:
        """What the search for a domain's plan measured; None stands for the fallback plan."""
        return self.fallback_evidence if domain is None else self.domains[domain].evidence

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises AtlasMismatchError, with a list of the differences, if the atlas belongs to another model."""
        differences = self.fingerprint.differences(fingerprint)
        if differences:
            raise AtlasMismatchError(
                "the atlas was calibrated on another model",
                differences,
                "Calibrate this model, or give the one that the atlas belongs to.",
            )

    def save(self, path: str | Path) -> Path:
        """Writes the folder atomically.

        Raises:
            OutputError: `path` exists already or cannot be written.
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
            AtlasError: the folder is no atlas, has a newer schema, or is damaged.
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
                anchor_domains=content.anchor_domains,
                domains={name: entry.domain() for name, entry in content.domains.items()},
                fallback=Plan.from_json(content.fallback.plan),
                fallback_evidence=content.fallback.evidence.as_given(),
                cost=content.cost,
                evidence=content.evidence,
                vectors=arrays.get("vectors"),
                vector_domains=content.vector_domains,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise AtlasError(f"'{path / MANIFEST}' is damaged: {what}", _RESTORE) from error

    def _manifest(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "fingerprint": asdict(self.fingerprint),
            "pooling": self.pooling.value,
            "domains": {
                name: {"plan": domain.plan.to_json(), "radius": domain.radius, "evidence": dict(domain.evidence)}
                for name, domain in self.domains.items()
            },
            "fallback": {"plan": self.fallback.to_json(), "evidence": dict(self.fallback_evidence)},
            "cost": {name: value for name, value in asdict(self.cost).items() if value or not name.startswith("low_")},
            "anchor_domains": list(self.anchor_domains),
            "anchors_sha256": hashlib.sha256(self._arrays()).hexdigest(),
            "vector_domains": list(self.vector_domains),
            "evidence": dict(self.evidence),
        }

    def _arrays(self) -> bytes:
        from safetensors.numpy import save

        return save({"anchors": self.anchors} | ({} if self.vectors is None else {"vectors": self.vectors}))


def _validate(manifest: dict[str, Any]) -> Any:
    """Checks the type of every value in a manifest that is read later, and leaves other evidence as it is.

    Pydantic is imported here because only reading needs it.
    """
    from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
    from pydantic.dataclasses import dataclass as validated

    class Judging(BaseModel, extra="allow"):
        speedup_over_plain: float | None = None
        speedup_over_general: float | None = None

    class Evidence(BaseModel, extra="allow"):
        agreement: float | None = Field(None, ge=0, le=1)
        judging: Judging | None = None

        def as_given(self) -> dict[str, Any]:
            return self.model_dump(exclude_unset=True)

    @validated(config=ConfigDict(allow_inf_nan=False))
    class Entry:
        plan: dict[str, Any]
        evidence: Evidence
        radius: float = 2.0

        def domain(self) -> DomainEntry:
            return DomainEntry(Plan.from_json(self.plan), self.radius, self.evidence.as_given())

    @validated(config=ConfigDict(allow_inf_nan=False))
    class Content:
        fingerprint: Fingerprint
        pooling: Pooling
        domains: dict[str, Entry]
        fallback: Entry
        cost: CostProfile
        anchor_domains: tuple[str, ...]
        vector_domains: tuple[str, ...]
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
    except (ValueError, RecursionError) as error:
        raise AtlasError(f"'{manifest_path}' is not JSON: {error}", _RESTORE) from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int):
        raise AtlasError(f"'{manifest_path}' has no schema number", _RESTORE)
    if schema > SCHEMA:
        raise AtlasError(
            f"'{path}' has atlas schema {schema}, and this version of knn-ssd reads up to {SCHEMA}", "Update knn-ssd."
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
        raise AtlasError(f"'{file}' is missing or damaged ({error})", _RESTORE) from error
    if hashlib.sha256(content).hexdigest() != expected_hash:
        raise AtlasError(
            f"'{file}' does not belong to the {MANIFEST} beside it", "Calibrate again, or restore the files."
        )
    return arrays


def _readable_json(manifest: dict[str, Any]) -> str:
    """Indented JSON with each list of scalars on one line. JSON strings contain no line breaks, so none is changed."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda m: "[" + re.sub(r"\n\s+", " ", m[1]) + "]", text) + "\n"


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AtlasError(f"the atlas does not fit together: {otherwise}", "Calibrate again.")
