"""The benchmark: figures worked out by hand, cheats that are caught, runs that resume after a kill, streams, report."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import endless, endless_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.base import Pooling
from knn_ssd.bench import run as harness
from knn_ssd.bench.methods import DESCRIPTIONS, Method, Output, _skipping, make_methods
from knn_ssd.bench.pictures import Axes, bars, lines
from knn_ssd.bench.records import Record, RecordFile, read_records
from knn_ssd.bench.report import report
from knn_ssd.bench.run import BenchSettings, run_bench, run_prompt
from knn_ssd.bench.summary import differing, running_speedup, summarize
from knn_ssd.bench.workload import limit_each, read_workloads, stream
from knn_ssd.cli import main
from knn_ssd.engine import Engine
from knn_ssd.errors import BenchError, OutputError, PromptError, UsageError
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.prompts import Prompt
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.testing import tiny_model, tiny_tokenizer

PROMPTS = [Prompt("once upon a time", "story", "s0"), Prompt("3 + 4 = ", "math", "m0"), Prompt("a fox", "story", "s1")]


class Silent:
    """Progress that shows nothing, and may raise KeyboardInterrupt at some record."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.left = fail_at

    def stage(self, name: str, total: int | None) -> None:
        self.measuring = name == "measuring"

    def advance(self, note: str = "") -> None:
        if self.left is not None and self.measuring:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(endless(tiny_model()), endless_tokenizer())


def record(method: str, place: int, tokens: Sequence[int], total: float, **more: Any) -> Record:
    domain = "ab"[place % 2]
    return Record(f"p{place}", domain, method, more.pop("repeat", 0), place, tuple(tokens), total, **more)


# --- Figures


def test_figures_are_those_worked_out_by_hand() -> None:
    records = [
        record("plain", 0, range(10), 5.0, prefill_sec=0.5),
        record("plain", 1, range(20), 9.0, prefill_sec=1.0),
        record("fast", 0, range(10), 2.0, prefill_sec=0.5, rounds=4, drafted={"self": 9}, accepted={"self": 6},
               routed=True, routed_domain="a", route_sec=0.1, draft_sec=0.25, verify_sec=1.0,
               by_length={"0": [1, 0], "3": [3, 6]}),
        record("fast", 1, range(20), 5.0, prefill_sec=1.0, rounds=6, drafted={"self": 3, "lookup": 8},
               accepted={"self": 2, "lookup": 6}, routed=True, routed_domain="a", route_sec=0.3, peak_memory_bytes=7,
               draft_sec=0.75, verify_sec=3.0, by_length={"3": [1, 2], "8": [1, 6]}),
    ]  # fmt: skip
    fast = summarize(records)["fast"]
    assert fast["tokens_per_sec"] == pytest.approx(30 / 7)
    assert fast["speedup"] == pytest.approx(14 / 7)
    assert fast["decode_tokens_per_sec"] == pytest.approx(28 / 5.5)
    assert fast["decode_speedup"] == pytest.approx(12.5 / 5.5)
    assert fast["acceptance_rate"] == pytest.approx(14 / 20)
    assert fast["tokens_per_round"] == pytest.approx(3.0)
    assert fast["drafted"] == {"lookup": 8, "self": 12}
    assert fast["identical_to_plain"] == 1.0
    assert fast["routing_accuracy"] == 0.5
    assert fast["route_sec_mean"] == pytest.approx(0.2)
    assert fast["first_token_sec_mean"] == pytest.approx(0.75)
    assert fast["peak_memory_bytes"] == 7
    assert fast["seconds"] == pytest.approx({"prompt": 1.5, "drafting": 1.0, "verifying": 4.0, "rest": 0.5})
    assert fast["accepted_by_length"] == {
        "0": {"rounds": 1, "accepted": 0.0},
        "3": {"rounds": 4, "accepted": 2.0},
        "8": {"rounds": 1, "accepted": 6.0},
    }
    low, high = fast["speedup_ci95"]
    assert (low, high) == (pytest.approx(9 / 5), pytest.approx(5 / 2)), "two prompts: either of them, or both"
    assert fast["per_domain"]["a"]["speedup"] == pytest.approx(2.5)
    assert fast["per_domain"]["b"]["speedup_ci95"] is None
    assert running_speedup(records, "fast") == [pytest.approx(2.5), pytest.approx(2.0)]


def test_other_lengths_are_weighed_by_tokens_and_unknown_times_stay_unknown() -> None:
    records = [record("plain", 0, range(10), 5.0, prefill_sec=1.0), record("hf", 0, range(5), 5.0, lossless=False)]
    hf = summarize(records)["hf"]
    assert hf["speedup"] == pytest.approx(0.5)
    assert hf["identical_to_plain"] == 0.0
    assert hf["decode_speedup"] is hf["decode_tokens_per_sec"] is hf["first_token_sec_mean"] is None
    assert hf["seconds"] is None
    assert hf["acceptance_rate"] is hf["tokens_per_round"] is hf["routing_accuracy"] is None
    assert differing(records) == [], "it does not claim to be lossless"
    assert differing([records[0], replace(records[1], lossless=True)])


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 9), st.floats(0.1, 9)), min_size=2, max_size=8))
def test_an_interval_holds_its_figure(rows: list[tuple[int, float, float]]) -> None:
    records = [
        record(method, place, range(count), seconds)
        for place, (count, plain, own) in enumerate(rows)
        for method, seconds in (("plain", plain), ("own", own))
    ]
    figures = summarize(records)
    low, high = figures["own"]["speedup_ci95"]
    ratios = [plain / own for _, plain, own in rows]
    assert min(ratios) * 0.999 <= low <= high <= max(ratios) * 1.001
    assert figures["plain"]["speedup"] == pytest.approx(1.0)


# --- Cheats


def fixed(tokens: Sequence[int], seconds: float = 0.0) -> Method:
    """A method with a fixed output."""

    def method(prompt: list[int], max_new_tokens: int) -> Output:
        time.sleep(seconds)
        return Output(tuple(tokens[:max_new_tokens]), max(seconds, 1e-6), {"prefill_sec": 1e-7, "rounds": 1})

    return method


def bench(engine: Engine, out: Path, methods: dict[str, Method], **more: Any) -> dict[str, Any]:
    settings = BenchSettings(max_new_tokens=12, **more.pop("settings", {}))
    return run_bench(engine, more.pop("prompts", PROMPTS), methods, out, settings, more.pop("watch", Silent()), "tiny")


def test_a_method_with_one_different_token_is_caught(engine: Engine, tmp_path: Path) -> None:
    real = make_methods(["plain"], engine)["plain"]

    def wrong(prompt: list[int], max_new_tokens: int) -> Output:
        output = real(prompt, max_new_tokens)
        return replace(output, token_ids=(*output.token_ids[:-1], output.token_ids[-1] ^ 1))

    summary = bench(engine, tmp_path / "run", {"plain": real, "honest": real, "wrong": wrong})
    assert {each["method"] for each in summary["differing"]} == {"wrong"}
    assert summary["methods"]["honest"]["identical_to_plain"] == 1.0
    assert summary["methods"]["wrong"]["identical_to_plain"] == 0.0
    page = report(summary, read_records(tmp_path / "run" / "records.jsonl"), "knn-ssd bench")
    assert "the output of wrong differs from plain decoding on m0, s0, s1" in page


def test_text_after_the_end_is_not_counted(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "eos_token_ids", lambda model: frozenset({9}))
    methods = {"plain": fixed([1, 2, 9]), "talker": fixed([1, 2, 9, 4, 4, 4, 4, 4, 4])}
    summary = bench(engine, tmp_path / "run", methods)
    assert summary["methods"]["talker"]["tokens"] == summary["methods"]["plain"]["tokens"] == 3 * len(PROMPTS)


def test_a_baseline_that_is_slowed_down_is_reported(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "measure_step", lambda backend: 0.001)
    slow = {"plain": fixed(range(10), 0.1), "auto": fixed(range(10), 0.01)}
    summary = bench(engine, tmp_path / "slow", slow)
    assert summary["baseline_slowed"]
    assert "do not trust these speed-ups" in report(summary, [], "knn-ssd bench")
    monkeypatch.setattr(harness, "measure_step", lambda backend: 0.012)
    assert not bench(engine, tmp_path / "fair", slow)["baseline_slowed"]


def test_methods_take_turns_and_the_first_of_ours_sets_the_length() -> None:
    asked: list[tuple[str, int]] = []

    def method(name: str) -> Method:
        def run(prompt: list[int], max_new_tokens: int) -> Output:
            asked.append((name, max_new_tokens))
            return Output(tuple(range(min(7, max_new_tokens))), 1.0, {})

        return run

    methods = {name: method(name) for name in ("plain", "hf", "auto")}
    for turn in range(3):
        assert list(run_prompt(methods, [1], 20, turn)) == list(methods)
    firsts = [asked[0], asked[3], asked[6]]
    assert [name for name, _ in firsts] == ["plain", "auto", "auto"], (
        "never transformers, whose output may be another one by rounding"
    )
    assert all(length == 20 for _, length in firsts)
    assert all(length == 7 for i, (_, length) in enumerate(asked) if i % 3)


# --- Runs


def test_a_killed_run_goes_on_to_the_same_summary(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "run"
    methods = {"plain": fixed([1, 2, 3], 0.001), "auto": fixed([1, 2, 3], 0.002)}
    repeated = {"repeats": 2}
    with pytest.raises(KeyboardInterrupt):
        bench(engine, out, methods, watch=Silent(fail_at=4), settings=repeated)
    lines = (out / "records.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert not (out / "summary.json").exists()
    with (out / "records.jsonl").open("a") as file:
        file.write(lines[0][:40])  # as a kill in the middle of a line leaves it
    summary = bench(engine, out, methods, settings=repeated)
    records = read_records(out / "records.jsonl")
    assert Counter(r.method for r in records) == {"plain": 6, "auto": 6}
    assert len({r.key for r in records}) == 12
    assert json.loads((out / "summary.json").read_text()) == summary
    assert bench(engine, out, methods, settings=repeated)["methods"] == summary["methods"], "nothing was left to do"
    with pytest.raises(BenchError, match="other seed"):
        bench(engine, out, methods, settings={"repeats": 2, "seed": 1})


def test_answers_are_not_copied_from_an_earlier_repeat(engine: Engine, tmp_path: Path) -> None:
    methods = {"plain": fixed([1]), "neighbours": fixed([1])}
    with pytest.raises(BenchError, match="copy its own answers"):
        bench(engine, tmp_path / "run", methods, settings={"repeats": 2})
    assert bench(engine, tmp_path / "run", methods)["methods"]["neighbours"]["identical_to_plain"] == 1.0


def test_only_the_method_neighbours_copies_from_earlier_answers(engine: Engine, tmp_path: Path) -> None:
    prompts = [Prompt([5, 6, 7, 8, 9], "same", f"p{i}") for i in range(3)]
    summary = bench(engine, tmp_path / "run", make_methods(["plain", "auto", "neighbours"], engine), prompts=prompts)
    assert summary["methods"]["neighbours"]["accepted"].get("retrieval", 0) > 0
    assert "retrieval" not in summary["methods"]["auto"]["drafted"]
    assert not summary["differing"]


def test_records_of_something_else_are_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BenchError, match="not empty"):
        bench(engine, tmp_path, {"plain": fixed([1])})
    with pytest.raises(BenchError, match="nothing to compare"):
        bench(engine, tmp_path / "a", {"auto": fixed([1])})
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 1}\n')
    with pytest.raises(BenchError, match="line 1 is not a record"):
        read_records(bad)
    with pytest.raises(OutputError):
        RecordFile(tmp_path / "no" / "such" / "records.jsonl").append([record("plain", 0, [1], 1.0)])


def test_all_methods_run_and_the_lossless_ones_have_the_output_of_plain_decoding(
    engine: Engine, tmp_path: Path
) -> None:
    names = ["plain", "hf", "hf-lookup", "lookup", "auto"]
    if "low" in {mode.value for mode in engine.backend.modes}:
        names.append("low")
    summary = bench(engine, tmp_path / "run", make_methods(names, engine))
    assert summary["differing"] == []
    assert set(summary["methods"]) == set(names)
    for name, figures in summary["methods"].items():
        assert figures["tokens"] == 12 * len(PROMPTS)
        assert figures["lossless"] == (not name.startswith("hf"))
        assert figures["identical_to_plain"] == 1.0, "in float32 the output of transformers is the same, too"
        assert set(figures["per_domain"]) == {"math", "story"}
    with pytest.raises(BenchError, match="needs an atlas"):
        make_methods(["plain", "knn-ssd"], engine)
    with pytest.raises(UsageError, match="no method 'fast'"):
        make_methods(["fast"], engine)


@pytest.mark.parametrize("name", ["hf", "hf-lookup"])
def test_the_output_of_transformers_ends_where_ours_does_and_is_the_same_in_float32(name: str, tmp_path: Path) -> None:
    model = endless(tiny_model("llama"))
    prompt = Engine(model, tiny_tokenizer()).encode(PROMPTS[0].prompt)
    whole = Engine(model, tiny_tokenizer()).generate(prompt, max_new_tokens=12).token_ids
    end = next(token for i, token in enumerate(whole) if i >= 4 and token not in whole[:i])
    model.generation_config.eos_token_id = end
    model.config.eos_token_id = end
    engine = Engine(model, tiny_tokenizer())
    methods = make_methods(["plain", name], engine)
    output = methods[name](prompt, 12)
    assert output.token_ids == methods["plain"](prompt, 12).token_ids == whole[: whole.index(end) + 1]
    summary = bench(engine, tmp_path / "run", methods, prompts=PROMPTS[:1])
    own = summary["methods"][name]
    assert own["identical_to_plain"] == 1.0
    assert own["tokens"] == len(output.token_ids) < 12, "none after the end"


# --- Streams


domains = st.lists(st.sampled_from("abc"), max_size=30)


@given(domains, st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 5))
def test_a_stream_has_every_prompt_once_and_keeps_each_domain_s_order(names: str, ratio: float, seed: int) -> None:
    prompts = [Prompt(f"p{i}", name, str(i)) for i, name in enumerate(names)]
    ordered = stream(prompts, ratio, seed)
    assert sorted(p.id for p in ordered) == sorted(p.id for p in prompts)
    for name in set(names):
        assert [p.id for p in ordered if p.domain == name] == [p.id for p in prompts if p.domain == name]
    changes = sum(a.domain != b.domain for a, b in itertools.pairwise(ordered))
    if ratio == 0:
        assert changes == max(len(set(names)) - 1, 0)


def test_a_stream_that_always_changes_does() -> None:
    prompts = [Prompt("x", name, str(i)) for i, name in enumerate("aaaabbbbcccc")]
    ordered = stream(prompts, 1.0, seed=1)
    assert all(a.domain != b.domain for a, b in itertools.pairwise(ordered))
    with pytest.raises(UsageError, match=r"got 1\.5"):
        stream(prompts, 1.5)
    assert [p.id for p in limit_each(prompts, 2)] == ["0", "1", "4", "5", "8", "9"]


def test_spec_bench_questions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "question.jsonl"
    lines = [{"question_id": 81 + i, "category": "math", "turns": [f"what is {i}?", "and then?"]} for i in range(2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_workloads([file]) == [Prompt("what is 0?", "math", "81"), Prompt("what is 1?", "math", "82")]
    file.write_text(json.dumps(lines[0]) + "\n" + json.dumps({"question_id": 1, "category": "x", "turns": []}) + "\n")
    with pytest.raises(PromptError, match="line 2 is not a question"):
        read_workloads([file])
    file.write_text('{"prompt": "hello"}\n')
    assert read_workloads([file])[0].prompt == "hello"
    with pytest.raises(PromptError, match="cannot be read"):
        read_workloads([tmp_path / "none.jsonl"])


# --- The command and its report


class Tags(HTMLParser):
    """The tags and links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_no_line_is_drawn_across_text() -> None:
    drawn = bars([("plain", 1.0, None, "red"), ("slow", 0.9, (0.8, 0.95), "blue")])
    assert drawn.index("<text") > max(drawn.rindex(f"<{shape}") for shape in ("line", "rect", "path"))


def test_the_command_measures_and_writes(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda name, **options: engine)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p.prompt, "domain": p.domain, "id": p.id}) + "\n" for p in PROMPTS))
    out = tmp_path / "run"
    arguments = ["bench", "--model", "tiny", "--prompts", str(file), "--max-new-tokens", "12", "--out", str(out)]
    assert main([*arguments, "--methods", "plain,lookup,auto"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == str(out / "summary.json")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == 1
    assert list(summary["methods"]) == ["plain", "lookup", "auto"]
    page = Tags()
    page.feed((out / "report.html").read_text())
    assert page.links == [], "nothing is loaded from elsewhere"
    assert page.seen["svg"] >= 3
    assert main([*arguments, "--methods", "plain,fast"]) == 2
    assert "there is no method 'fast'. Choose from plain" in capsys.readouterr().err
    assert main([*arguments, "--methods", "plain,auto"]) == 2
    assert "other methods" in capsys.readouterr().err
    monkeypatch.setattr(
        "knn_ssd.bench.methods.make_methods", lambda *_: {"plain": fixed([1, 2]), "auto": fixed([1, 3])}
    )
    assert main([*arguments[:-1], str(tmp_path / "other"), "--methods", "plain,auto"]) == 1
    assert "DIFFERENT: the output of auto is not that of plain decoding" in capsys.readouterr().err


@pytest.mark.parametrize("top", [0.01, 3.0, 1e6])
def test_a_grid_has_few_lines_however_high_a_curve_goes(top: float) -> None:
    drawn = lines({"a": [(1, top), (2, top)]}, {"a": "red"}, Axes("prompts"))
    assert 1 <= drawn.count("<line") <= 9


def test_every_method_is_described_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in DESCRIPTIONS)


def atlas_with_skips(engine: Engine) -> Atlas:
    """An atlas with an anchor for each domain of `PROMPTS`: timing chose plain decoding, the searches found skips."""
    vectors = []
    for prompt in PROMPTS[:2]:
        token_ids = engine.encode(prompt.prompt)
        vectors.append(engine.backend.open(len(token_ids)).prefill(token_ids).vector(Pooling.MEAN).numpy())
    layers = engine.backend.num_layers
    low = (Mode.LOW,) * layers
    skips = {
        name: Plan(low, (*low[:i], Mode.SKIP, *low[i + 1 :]), Mode.LOW, Policy(3, 0.0, lookup=True))
        for i, name in enumerate(("story", "math"))
    }
    evidence = {name: {"best_skipping": {"plan": plan.to_json()}} for name, plan in skips.items()}
    return Atlas(
        fingerprint=fingerprint(engine.model, engine.tokenizer),
        pooling=Pooling.MEAN,
        anchors=np.stack(vectors),
        anchor_domains=("story", "math"),
        domains={name: DomainEntry(Plan.plain(layers), 2.0, evidence[name]) for name in skips},
        fallback=Plan.plain(layers),
        cost=CostProfile(1.0, 0.1, 0.1, (1.0,)),
        fallback_evidence=evidence["math"],
    )


def test_the_methods_of_the_paper_skip_what_the_search_found(engine: Engine, tmp_path: Path) -> None:
    routed = Engine(engine.model, engine.tokenizer, atlas_with_skips(engine), backend=engine.backend)
    names = ["plain", "self-sd-fix", "self-sd-mix", "knn-ssd", "auto"]
    methods = make_methods(names, routed, "story")
    summary = bench(routed, tmp_path / "run", methods, prompts=PROMPTS[:2])
    assert summary["differing"] == []
    assert _skipping(atlas_with_skips(engine), "story") == Plan.skipping(
        engine.backend.num_layers, mlp=[0], policy=Policy(3, 0.0)
    ), "the paper's drafts have no 4-bit weights and no lookup"
    for name in names[1:4]:
        assert summary["methods"][name]["drafted"]["self"] > 0, "a fixed policy drafts, even where it does not pay"
    assert summary["methods"]["auto"]["drafted"] == {}, "timing chose plain decoding"
    assert summary["methods"]["knn-ssd"]["routing_accuracy"] == 1.0
    assert summary["methods"]["knn-ssd"]["route_sec_mean"] > 0
    assert summary["methods"]["self-sd-mix"]["routing_accuracy"] is None
    with pytest.raises(BenchError, match="'self-sd-fix' drafts as for the stream's first domain, 'poem'"):
        make_methods(["self-sd-fix"], routed, "poem")
    bare = replace(atlas_with_skips(engine), fallback_evidence={})
    with pytest.raises(BenchError, match="no plan that skips for"):
        make_methods(["self-sd-mix"], Engine(engine.model, engine.tokenizer, bare, backend=engine.backend))
