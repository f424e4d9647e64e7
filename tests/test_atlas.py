"""The atlas on disk: what was saved is what is loaded, it is there whole or not at all, and damage is a clear error."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import plans
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_ssd import atlas as atlas_module
from knn_ssd.atlas import ANCHORS, MANIFEST, SCHEMA, Atlas, DomainEntry
from knn_ssd.backends.base import Pooling
from knn_ssd.errors import AtlasError, AtlasMismatchError, OutputError, UsageError
from knn_ssd.loading.fingerprint import Fingerprint
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.speculation.cost_model import CostProfile

GOLDEN = Path(__file__).parent / "golden" / "atlas-v1"
FINGERPRINT = Fingerprint("LlamaForCausalLM", 4, 3, 128, "5eed", "70ce", "float32")


def example_atlas(**changes: Any) -> Atlas:
    """The one that lies in golden/atlas-v1."""
    parts: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "pooling": Pooling.LAST,
        "anchors": np.array([[1, 0, 0], [0.5, 0.5, 0], [0, -2, 0.25]], dtype=np.float32),
        "anchor_domains": ("math", "story", "math"),
        "domains": {
            "math": DomainEntry(
                Plan.skipping(4, attention=[1, 3], mlp=[2], policy=Policy(6, 0.5)), 0.125, {"trials": 40}
            ),
            "story": DomainEntry(Plan.plain(4), 0.25, {"größte": ["ü", None, 1.5]}),
        },
        "fallback": Plan((Mode.LOW,) * 4, (Mode.KEEP,) * 4, head=Mode.LOW, policy=Policy(3, 0.9, lookup=True)),
        "fallback_evidence": {"score": 17.5},
        "cost": CostProfile(0.04, 0.003, 0.005, (0.04, 0.042, 0.047)),
        "evidence": {"seed": 7, "versions": {"knn-ssd": "0.1.0"}},
        "vectors": np.arange(6, dtype=np.float32).reshape(2, 3),
        "vector_domains": ("story", "math"),
    }
    return Atlas(**parts | changes)


def assert_same(one: Atlas, other: Atlas) -> None:
    for name in ("anchors", "vectors"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)
            assert theirs.dtype == np.float32
    values = [
        (a.fingerprint, a.pooling, a.anchor_domains, dict(a.domains), a.fallback, a.cost, a.vector_domains)
        for a in (one, other)
    ]
    assert values[0] == values[1]
    assert one.evidence == other.evidence
    assert one.fallback_evidence == other.fallback_evidence


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An atlas to damage."""
    return example_atlas().save(tmp_path / "atlas")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


# --- Round trips


@settings(max_examples=30)
@given(math=plans(), story=plans(), fallback=plans(), radius=st.floats(0, 2), with_vectors=st.booleans())
def test_what_was_saved_is_what_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, math: Plan, story: Plan, fallback: Plan, radius: float, with_vectors: bool
) -> None:
    vectors = {} if with_vectors else {"vectors": None, "vector_domains": ()}
    saved = example_atlas(
        domains={"math": DomainEntry(math, radius), "story": DomainEntry(story, 2.0)}, fallback=fallback, **vectors
    )
    assert_same(saved, Atlas.load(saved.save(tmp_path_factory.mktemp("round") / "atlas")))


def test_the_golden_atlas_of_schema_1_loads() -> None:
    assert_same(example_atlas(), Atlas.load(GOLDEN))


def test_the_golden_atlas_is_what_is_written_today(tmp_path: Path) -> None:
    assert SCHEMA == 1, "a new schema needs a new golden atlas beside this one"
    written = example_atlas().save(tmp_path / "atlas")
    assert {file.name for file in written.iterdir()} == {MANIFEST, ANCHORS}
    ours, golden = (
        [line for line in (folder / MANIFEST).read_text("utf-8").splitlines() if "anchors_sha256" not in line]
        for folder in (written, GOLDEN)
    )
    assert ours == golden


def test_the_manifest_is_strict_json_for_people() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (GOLDEN / MANIFEST).read_text("utf-8")
    manifest = json.loads(text, parse_constant=refuse)
    assert manifest["domains"]["math"]["plan"]["skip"] == {"attention": [1, 3], "mlp": [2]}
    assert "größte" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_strict_json_cannot_say_is_not_written(tmp_path: Path, value: float) -> None:
    with pytest.raises((AtlasError, OutputError, ValueError)):
        example_atlas(evidence={"score": value}).save(tmp_path / "atlas")
    assert list(tmp_path.iterdir()) == []


def test_loading_an_atlas_does_not_import_torch() -> None:
    script = (
        "import sys; from knn_ssd.atlas import Atlas; "
        f"Atlas.load({str(GOLDEN)!r}); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# --- Whole or not at all


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(atlas_module.json, "dumps", fail)  # the anchors lie there already
    with pytest.raises(KeyboardInterrupt):
        example_atlas().save(tmp_path / "atlas")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        example_atlas().save(tmp_path / "atlas")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_lies_there_already_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    place = tmp_path / "atlas"
    make(place)
    with pytest.raises(OutputError, match=r"already something at .* Choose another place"):
        example_atlas().save(place)
    assert list(tmp_path.iterdir()) == [place]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert_same(example_atlas(), Atlas.load(example_atlas().save(tmp_path / "some" / "where" / "atlas")))


@pytest.mark.parametrize("name", ["file/atlas", "n" * 300])
def test_a_place_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        example_atlas().save(tmp_path / name)


# --- Damage


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "is not an atlas: it has no atlas.json"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "is not JSON"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "has no schema number"),
        (lambda folder: (folder / ANCHORS).unlink(), "anchors.safetensors' is missing or damaged"),
        (lambda folder: (folder / ANCHORS).write_bytes(b""), "anchors.safetensors' is missing or damaged"),
        (lambda folder: edit(folder, lambda m: m.pop("schema")), "has no schema number"),
        (lambda folder: edit(folder, lambda m: m.update(schema=SCHEMA + 1)), "has atlas schema 2, .* reads up to 1"),
        (lambda folder: edit(folder, lambda m: m.pop("pooling")), "is damaged: pooling: Field required"),
        (lambda folder: edit(folder, lambda m: m.update(pooling="max")), "is damaged: pooling: .* got 'max'"),
        (lambda folder: edit(folder, lambda m: m["fingerprint"].pop("dtype")), "is damaged"),
        (lambda folder: edit(folder, lambda m: m["anchor_domains"].pop()), "3 anchors have 2 domains"),
        (lambda folder: edit(folder, lambda m: m["domains"].pop("story")), "not name the same domains: story"),
        (lambda folder: edit(folder, lambda m: m["fallback"]["plan"].update(num_layers=5)), "a plan for 5 layers"),
        (lambda folder: edit(folder, lambda m: m["fingerprint"].update(hidden_size=9)), "3 dimensions .* of 9"),
    ],
)
def test_damage_is_a_clear_error(folder: Path, damage: Callable[[Path], None], fact: str) -> None:
    damage(folder)
    with pytest.raises(AtlasError, match=fact) as refusal:
        Atlas.load(folder)
    assert refusal.value.hint


def test_a_missing_atlas_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"there is no atlas at .* Make one with `knn-ssd calibrate"):
        Atlas.load(tmp_path / "nowhere")


def test_files_of_two_atlases_do_not_mix(folder: Path, tmp_path: Path) -> None:
    other = example_atlas(anchors=np.ones((3, 3), dtype=np.float32)).save(tmp_path / "other")
    (folder / ANCHORS).write_bytes((other / ANCHORS).read_bytes())
    with pytest.raises(AtlasError, match=r"does not belong to the atlas\.json beside it"):
        Atlas.load(folder)


def test_anchors_cut_short_anywhere_are_refused(folder: Path) -> None:
    content = (folder / ANCHORS).read_bytes()
    for length in range(0, len(content), 7):
        (folder / ANCHORS).write_bytes(content[:length])
        with pytest.raises(AtlasError, match="missing or damaged"):
            Atlas.load(folder)


def test_a_byte_changed_anywhere_in_the_anchors_is_refused(folder: Path) -> None:
    content = (folder / ANCHORS).read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x15
        (folder / ANCHORS).write_bytes(changed)
        with pytest.raises(AtlasError):
            Atlas.load(folder)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _places(item, (*place, key))


@pytest.mark.parametrize("value", [None, "x", -1, 1.5, [], {}, [1], True])
def test_whatever_the_manifest_says_it_is_an_atlas_or_an_atlas_error(folder: Path, value: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    for *way, last in filter(None, _places(manifest)):
        changed = json.loads(json.dumps(manifest))
        inner = changed
        for key in way:
            inner = inner[key]
        inner[last] = value
        (folder / MANIFEST).write_text(json.dumps(changed), "utf-8")
        with suppress(AtlasError):
            Atlas.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["cost"].update(step_sec="fast"),
        lambda m: m["cost"].update(attention_sec=None),
        lambda m: m["cost"].update(verify_sec=[]),
        lambda m: m["cost"].update(verify_sec=["slow"]),
        lambda m: m["fallback"]["plan"]["policy"].update(max_draft=1.5),
        lambda m: m["domains"]["math"].update(radius=float("nan")),
    ],
)
def test_a_value_of_the_wrong_kind_is_damage(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(folder, change)
    with pytest.raises(AtlasError, match=r"damaged|fit together"):
        Atlas.load(folder)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "layers beyond memory": lambda m: [
        m["fingerprint"].update(num_layers=10**12),
        m["fallback"]["plan"].update(num_layers=10**12),
        *(each["plan"].update(num_layers=10**12) for each in m["domains"].values()),
    ],
    "a plan for layers beyond memory": lambda m: m["fallback"]["plan"].update(num_layers=10**12),
    "no layers": lambda m: m["fallback"]["plan"].update(num_layers=0),
    "layers as a text": lambda m: m["fallback"]["plan"].update(num_layers="4"),
    "verification for nothing": lambda m: m["cost"].update(verify_sec=[0]),
    "a verification before it began": lambda m: m["cost"].update(verify_sec=[0.1, -0.1]),
    "steps for nothing": lambda m: m["cost"].update(step_sec=0),
    "steps of no time that counts": lambda m: m["cost"].update(step_sec=1e-300),
    "steps that never end": lambda m: m["cost"].update(step_sec=1e300),
    "savings beyond measure": lambda m: m["cost"].update(mlp_sec=-1e300),
    "an acceptance rate in words": lambda m: m["domains"]["math"]["evidence"].update(agreement="high"),
    "an acceptance rate above 1": lambda m: m["fallback"]["evidence"].update(agreement=17),
    "judged in words": lambda m: m["domains"]["math"]["evidence"].update(judging={"speedup_over_plain": "fast"}),
    "judged by a list": lambda m: m["domains"]["math"]["evidence"].update(judging=[1]),
    "lookup in words": lambda m: m["fallback"]["plan"]["policy"].update(lookup="false"),
    "a truth as a number": lambda m: m["fallback"]["plan"]["policy"].update(max_draft=True),
    "a confidence in words": lambda m: m["fallback"]["plan"]["policy"].update(threshold="0.5"),
    "half a character as a domain": lambda m: [
        m["domains"].update({"\ud800": m["domains"].pop("math")}),
        m.update(anchor_domains=[{"math": "\ud800"}.get(each, each) for each in m["anchor_domains"]]),
    ],
    "a radius beyond floats": lambda m: m["domains"]["math"].update(radius=10**400),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_value_is_damage(folder: Path, name: str) -> None:
    edit(folder, HOSTILE[name])
    with pytest.raises(AtlasError, match=r"damaged|fit together"):
        Atlas.load(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"schema": 1, "evidence": ' + '{"a":' * 100_000, "9" * 10_000])
def test_a_manifest_beyond_all_depth_is_damage(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    with pytest.raises(AtlasError, match="is not JSON"):
        Atlas.load(folder)


@pytest.mark.parametrize("depth", [100, 400, 900])
def test_deep_evidence_is_an_atlas_or_an_atlas_error(folder: Path, depth: int) -> None:
    text = (folder / MANIFEST).read_text("utf-8")
    nested = '{"a":' * depth + "1" + "}" * depth
    (folder / MANIFEST).write_text(text.replace('"trials": 40', f'"trials": {nested}'), "utf-8")
    with suppress(AtlasError):
        Atlas.load(folder)


@pytest.mark.parametrize(
    "anchors",
    [
        np.full((3, 3), np.nan, np.float32),
        np.full((3, 3), np.inf, np.float32),
        np.full((3, 3), 3e38, np.float32),
        np.ones((3, 3), np.int64),
        np.ones((3, 3, 1), np.float32),
        np.ones(3, np.float32),
    ],
)
def test_anchors_that_are_no_vectors_are_refused(folder: Path, tmp_path: Path, anchors: Any) -> None:
    from safetensors.numpy import save

    content = save({"anchors": anchors})
    (folder / ANCHORS).write_bytes(content)
    edit(folder, lambda m: m.update(anchors_sha256=hashlib.sha256(content).hexdigest(), vector_domains=[]))
    with pytest.raises(AtlasError, match="anchors are not rows of finite numbers"):
        Atlas.load(folder)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"anchor_domains": ("math", "story")}, "3 anchors have 2 domains"),
        ({"anchor_domains": ("math", "story", "sql")}, "do not name the same domains: sql"),
        ({"vector_domains": ("story",)}, "2 vectors have 1 domains"),
        ({"fallback": Plan.plain(3)}, "a plan for 3 layers, and the model has 4"),
        ({"fingerprint": replace(FINGERPRINT, hidden_size=8)}, "3 dimensions for a model of 8"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes: dict[str, Any], fact: str) -> None:
    with pytest.raises(AtlasError, match=fact):
        example_atlas(**changes)


# --- The model it belongs to


def test_the_same_model_in_another_dtype_is_the_same_model() -> None:
    example_atlas().check(replace(FINGERPRINT, dtype="bfloat16"))


@pytest.mark.parametrize("name", [name for name in asdict(FINGERPRINT) if name != "dtype"])
def test_another_model_is_refused_with_the_difference(name: str) -> None:
    value = 999 if isinstance(getattr(FINGERPRINT, name), int) else "other"
    with pytest.raises(AtlasMismatchError) as refusal:
        example_atlas().check(replace(FINGERPRINT, **{name: value}))
    [difference] = refusal.value.differences
    for fact in (name.replace("_", " "), str(value), str(getattr(FINGERPRINT, name))):
        assert fact in difference
    assert difference in str(refusal.value)


def test_all_differences_are_listed() -> None:
    other = replace(FINGERPRINT, num_layers=5, weights_hash="f00d", tokenizer_hash="", dtype="float16")
    with pytest.raises(AtlasMismatchError) as refusal:
        example_atlas().check(other)
    assert [d.split(" is ")[0] for d in refusal.value.differences] == ["num layers", "weights hash", "tokenizer hash"]
    assert "tokenizer hash is none" in str(refusal.value)


# --- Plans and costs


def test_a_domain_has_a_plan_and_no_domain_gets_the_fallback_plan() -> None:
    atlas = example_atlas()
    assert atlas.plan_for("math").skipped_attention == (1, 3)
    assert atlas.plan_for(None) is atlas.fallback
    with pytest.raises(UsageError, match=r"no domain 'sql'. It has math, story"):
        atlas.plan_for("sql")


def test_a_draft_step_costs_what_is_left() -> None:
    cost = CostProfile(step_sec=1.0, attention_sec=0.1, mlp_sec=0.2, verify_sec=(1.0,))
    assert cost.draft_step_sec(Plan.skipping(4)) == 1.0
    assert cost.draft_step_sec(Plan.skipping(4, attention=[0, 1], mlp=[3])) == pytest.approx(0.6)
    assert cost.draft_step_sec(Plan.skipping(9, attention=range(9), mlp=range(9))) == 0.0


def test_verifications_beyond_what_was_measured_cost_as_the_last_rows_did() -> None:
    cost = CostProfile(1.0, 0.1, 0.2, verify_sec=(1.0, 1.5, 2.0))
    assert [cost.verification_sec(rows) for rows in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.0, 2.5, 3.5]
    assert CostProfile(1.0, 0.1, 0.2, verify_sec=(1.0,)).verification_sec(5) == 1.0
    assert CostProfile(1.0, 0.1, 0.2, verify_sec=(1.0, 0.9)).verification_sec(5) == 0.9, "noise is no gain"
