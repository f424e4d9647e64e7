"""Calibration: the paper's claim on a tiny model, searches that find redundant sublayers, runs that survive a kill."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metered import metered
from processes import afresh, ended, start

from knn_ssd import engine as engine_module
from knn_ssd.atlas import Atlas
from knn_ssd.backends.base import Pooling
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.calibrate import pipeline, search_runs
from knn_ssd.calibrate.anchors import fit_anchors
from knn_ssd.calibrate.continuations import Observation, ObservationFile, observe
from knn_ssd.calibrate.cost import measure_cost
from knn_ssd.calibrate.journal import Journal, uninterrupted
from knn_ssd.calibrate.judging import MIN_PROMPTS, Judgement, judge, time_in_turn
from knn_ssd.calibrate.objective import DraftTrace, Score, TeacherForcedScorer, predicted_speedup
from knn_ssd.calibrate.pipeline import by_domain, calibrate
from knn_ssd.calibrate.search import FinishedTrial, Search, Strategy, create_study, next_change, next_growing_set
from knn_ssd.calibrate.search_runs import held_out_by_search, observations_by_search
from knn_ssd.calibrate.settings import MIXTURE, CalibrationSettings
from knn_ssd.cli import main
from knn_ssd.engine import Engine
from knn_ssd.errors import CalibrationError, Interrupted, OutputError, PromptError, UsageError
from knn_ssd.loading.resolve import LoadedModel
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.prompts import Prompt
from knn_ssd.routing.plan_choice import general_plan
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.testing import PlantedModel, planted_tiny_model, tiny_model, tiny_tokenizer

REDUNDANT = {"red": (5, 6, 8, 9, 10, 14, 15), "green": (4, 5, 6, 7, 11, 13, 14), "blue": (3, 4, 6, 9, 10, 11, 15)}
BUDGET = 60  # trials per domain, over 2 ** 16 plans
COST = CostProfile(1.0, 0.05, 0.05, tuple(1.0 + 0.02 * i for i in range(17)))


@pytest.fixture(scope="module")
def planted() -> PlantedModel:
    return planted_tiny_model(REDUNDANT, seed=3)


def prompts_of(planted: PlantedModel, count: int = 8) -> list[Prompt]:
    return [Prompt(planted.prompt(name, 12, i), name, f"{name}-{i}") for name in planted.tokens for i in range(count)]


def loaded(planted: PlantedModel) -> LoadedModel:
    return LoadedModel(planted.model, tiny_tokenizer(), "planted", None)


@contextmanager
def simulated() -> Iterator[None]:
    """Forward passes take as long as `COST` says, on the backend whose drafts are cheap by skipping alone."""
    with metered(COST), pytest.MonkeyPatch.context() as patch:
        for module in (pipeline, search_runs, engine_module):
            patch.setattr(module, "select_backend", lambda model, _=None: TransformersBackend(model))
        yield


def skipped(plan: Plan) -> set[int]:
    return {2 * i for i in plan.skipped_attention} | {2 * i + 1 for i in plan.skipped_mlp}


def of_one_process(strategy: str) -> Any:
    """Groups the tests of a strategy in one process, since making the atlas takes longer than the tests."""
    return pytest.param(strategy, marks=pytest.mark.xdist_group(f"planted {strategy}"))


@pytest.fixture(scope="module", params=[of_one_process(name) for name in ("greedy", "bayes", "evolve")])
def planted_atlas(
    request: pytest.FixtureRequest, planted: PlantedModel, made_once: Callable[[str, Callable[[Path], object]], Path]
) -> Atlas:
    def make(folder: Path) -> None:
        sizes = {"trials": BUDGET, "search_prompts": 5, "judging_prompts": 6, "new_tokens": 16}
        settings = CalibrationSettings(search=Strategy(request.param), **sizes)
        with simulated():
            calibrate(loaded(planted), prompts_of(planted, 16), folder / "atlas", settings)

    return Atlas.load(made_once(f"planted-{request.param}", make) / "atlas")


def best_skipping(evidence: Mapping[str, Any]) -> Plan:
    """The plan with the highest predicted speed-up of those that skip."""
    return Plan.from_json(evidence["best_skipping"]["plan"])


def test_planted_redundancy_is_recovered_within_the_budget_and_nothing_harmful_with_it(planted_atlas: Atlas) -> None:
    recovered = 0
    for name, redundant in REDUNDANT.items():
        evidence = planted_atlas.domains[name].evidence
        assert evidence["trials"] <= BUDGET
        found = skipped(best_skipping(evidence))
        assert found <= set(redundant), f"harmful in {name}: {found - set(redundant)}"
        recovered += len(found)
    assert recovered >= 0.9 * sum(map(len, REDUNDANT.values()))


def test_measured_costs_are_those_of_the_profile(planted: PlantedModel) -> None:
    with simulated():
        measured = measure_cost(TransformersBackend(planted.model))
    assert measured.step_sec == pytest.approx(COST.step_sec)
    assert measured.attention_sec == pytest.approx(COST.attention_sec)
    assert measured.mlp_sec == pytest.approx(COST.mlp_sec)
    assert measured.verify_sec == pytest.approx(COST.verify_sec)


def test_chosen_plans_are_faster_in_use_than_the_best_single_plan_and_plain_decoding(
    planted: PlantedModel, planted_atlas: Atlas
) -> None:
    seconds = dict.fromkeys(("routed", "single", "plain"), 0.0)
    fallback = planted_atlas.fallback
    with simulated():
        engine = Engine(planted.model, tiny_tokenizer(), planted_atlas, answers=False)
        for name in REDUNDANT:
            prompt = planted.prompt(name, 12, 100)
            options: dict[str, dict[str, Any]] = {
                "routed": {},
                "single": {"plan": fallback, "adaptive": True},
                "plain": {"plain": True},
            }
            results = {way: engine.generate(prompt, max_new_tokens=60, **given) for way, given in options.items()}
            for way, result in results.items():
                assert result.token_ids == results["plain"].token_ids
                seconds[way] += result.stats.decode_sec
            assert results["routed"].route is not None
            assert results["routed"].route.domain == name
            assert results["routed"].stats.accepted > 0
    assert seconds["routed"] < 0.9 * seconds["single"]
    assert seconds["routed"] < 0.8 * seconds["plain"]


@pytest.mark.clock
def test_routed_plans_beat_the_best_single_plan_by_the_clock(planted: PlantedModel, planted_atlas: Atlas) -> None:
    """On the real clock: the fastest of many turns for each method and domain, as many as a busy machine needs."""
    engine = Engine(planted.model, tiny_tokenizer(), answers=False, backend=TransformersBackend(planted.model))
    single = best_skipping(planted_atlas.fallback_evidence)
    plain = Plan.plain(single.num_layers)
    fastest = {way: dict.fromkeys(REDUNDANT, float("inf")) for way in ("routed", "single", "plain")}
    seconds: dict[str, float] = {}
    for turn in range(40):
        for name in REDUNDANT:
            prompt = planted.prompt(name, 12, 100)
            plans = {"routed": best_skipping(planted_atlas.domains[name].evidence), "single": single, "plain": plain}
            for way, plan in plans.items():
                stats = engine.generate(prompt, max_new_tokens=60, plan=plan).stats
                fastest[way][name] = min(fastest[way][name], stats.decode_sec)
        seconds = {way: sum(by_name.values()) for way, by_name in fastest.items()}
        if turn >= 2 and seconds["routed"] < 0.9 * min(seconds["single"], seconds["plain"]):
            break
    assert seconds["routed"] < 0.9 * seconds["single"]
    assert seconds["routed"] < 0.9 * seconds["plain"]


def test_nearly_redundant_sublayers_are_found_too(tmp_path: Path) -> None:
    planted = planted_tiny_model(REDUNDANT, leftover=1e-3, seed=3)
    settings = CalibrationSettings(trials=BUDGET, search_prompts=4, judging_prompts=0, new_tokens=16)
    with simulated():
        atlas = calibrate(loaded(planted), prompts_of(planted, 5), tmp_path / "atlas", settings)
    found = {name: skipped(best_skipping(atlas.domains[name].evidence)) for name in REDUNDANT}
    assert all(found[name] <= set(redundant) for name, redundant in REDUNDANT.items())
    assert sum(map(len, found.values())) >= 0.9 * sum(map(len, REDUNDANT.values()))


def test_skipping_nothing_is_chosen_where_nothing_is_redundant(tmp_path: Path) -> None:
    needed = planted_tiny_model({"red": (), "green": ()}, seed=3)
    settings = CalibrationSettings(trials=40, search_prompts=4, judging_prompts=6, new_tokens=16)
    with simulated():
        atlas = calibrate(loaded(needed), prompts_of(needed, 10), tmp_path / "atlas", settings)
    without_skips = (general_plan(TransformersBackend(needed.model)), Plan.plain(8))
    assert all(domain.plan in without_skips for domain in atlas.domains.values())
    assert atlas.fallback in without_skips


def test_the_published_search_times_real_decoding(planted: PlantedModel, tmp_path: Path) -> None:
    settings = CalibrationSettings(
        search=Strategy.PAPER, trials=4, search_prompts=2, new_tokens=4, max_draft=3, threshold=0.5
    )
    atlas = calibrate(loaded(planted), prompts_of(planted, 3), tmp_path / "atlas", settings)
    domain = atlas.domains["red"]
    assert domain.evidence["trials"] == 4
    assert domain.evidence["judging"] is None
    assert domain.evidence["agreement"] is None, "the published search measures none"
    assert domain.plan.policy == Policy(3, 0.5), "the best plan as the search found it"
    assert Plan.from_json(domain.evidence["best_skipping"]["plan"]).policy == Policy(3, 0.5)
    assert domain.evidence["best_score"] > 1  # tokens per second, as published, not a ratio


def test_an_atlas_keeps_vectors_and_evidence(planted_atlas: Atlas) -> None:
    assert planted_atlas.vectors is not None
    assert len(planted_atlas.vectors) == len(planted_atlas.vector_domains) == 48
    assert planted_atlas.evidence["routing"]["accuracy"] == 1.0
    assert {"versions", "created", "settings", "wall_sec", "model"} <= set(planted_atlas.evidence)


class Stopping:
    """Progress that raises KeyboardInterrupt in the middle of a stage."""

    def __init__(self, stage: str, after: int) -> None:
        self.wanted, self.left, self.name = stage, after, ""

    def stage(self, name: str, total: int | None) -> None:
        self.name = name

    def advance(self, note: str = "") -> None:
        if self.wanted in self.name:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


class Counting:
    """Progress that counts the trials that are scored, known ones left out."""

    def __init__(self) -> None:
        self.trials = 0

    def stage(self, name: str, total: int | None) -> None:
        self.searching = name.startswith("searching")

    def advance(self, note: str = "") -> None:
        self.trials += self.searching and note != ""


@pytest.mark.parametrize(("stage", "after"), [("reading", 3), ("searching red", 7), ("searching mixture", 5)])
def test_an_interrupted_calibration_goes_on_without_repeating_a_trial(
    planted: PlantedModel, tmp_path: Path, stage: str, after: int
) -> None:
    out, prompts = tmp_path / "atlas", prompts_of(planted, 3)
    settings = CalibrationSettings(trials=20, search_prompts=2, new_tokens=8)
    with pytest.raises(Interrupted, match="--resume"):
        calibrate(loaded(planted), prompts, out, settings, progress=Stopping(stage, after))
    assert not out.exists()
    with pytest.raises(CalibrationError, match="--resume"):
        calibrate(loaded(planted), prompts, out, settings)
    with pytest.raises(CalibrationError, match="new_tokens was 8 and is 16"):
        calibrate(
            loaded(planted), prompts, out, CalibrationSettings(trials=20, search_prompts=2, new_tokens=16), resume=True
        )
    counting = Counting()
    atlas = calibrate(loaded(planted), prompts, out, settings, resume=True, progress=counting)
    assert [entry.name for entry in tmp_path.iterdir()] == ["atlas"]
    searches = [*REDUNDANT, MIXTURE]
    finished_before = {"reading": 0, "searching mixture": after, "searching red": 20 + after}[stage]
    assert counting.trials == 20 * len(searches) - finished_before
    assert all(domain.evidence["trials"] == 20 for domain in atlas.domains.values())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", num_hidden_layers=6).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"{word} {i}", "domain": word} for word in ("apple", "QUIZ?") for i in range(4)]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    options = f"--model {model_folder} --prompts {prompts} --out {tmp_path}/out/atlas --search-prompts 2 --new-tokens 8"
    return ["calibrate", *options.split()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_calibration_leaves_nothing_half_written_and_can_be_resumed(
    command: list[str], tmp_path: Path, how: signal.Signals
) -> None:
    journal = tmp_path / "out" / "atlas.calibration" / "trials.log"
    errors, output = tmp_path / "errors", tmp_path / "output"
    process = start(tmp_path / "unfinished", errors, [*command, "--trials", "24"])
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 60):
        assert process.is_alive(), errors.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid or 0, how)
    exit_code = ended(process, 60)
    assert not (tmp_path / "out" / "atlas").exists()
    if how is signal.SIGINT:
        assert exit_code == 2, errors.read_text()
        assert "--resume" in errors.read_text()
        assert "Traceback" not in errors.read_text()
    assert ended(start(output, errors, [*command, "--trials", "24", "--resume"])) == 0, errors.read_text()
    assert output.read_text().strip() == str(tmp_path / "out" / "atlas")
    atlas = Atlas.load(tmp_path / "out" / "atlas")
    assert [domain.evidence["trials"] for domain in atlas.domains.values()] == [24, 24]
    assert os.listdir(tmp_path / "out") == ["atlas"]


def test_ctrl_c_waits_until_a_trial_is_written() -> None:
    done = []

    @uninterrupted()
    def write() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert done
    with pytest.raises(KeyboardInterrupt):  # and interrupts again afterwards
        signal.raise_signal(signal.SIGINT)


def test_workers_and_a_database_share_the_trials(command: list[str], tmp_path: Path) -> None:
    more = ["--trials", "30", "--workers", "2", "--storage", f"sqlite:///{tmp_path}/trials.db"]
    errors = tmp_path / "errors"
    assert ended(start(tmp_path / "output", errors, [*command, *more], afresh), 240) == 0, errors.read_text()
    atlas = Atlas.load(tmp_path / "out" / "atlas")
    assert all(
        30 <= domain.evidence["trials"] <= 31 for domain in atlas.domains.values()
    )  # two may begin the last at once


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--trials", "0"], "--trials"),
        (["--minutes", "0"], "minutes must be above 0, got 0.0"),
        (["--domains", "apple,pear"], "no domain 'pear'"),
        (["--modes", "skip,warp"], "warp"),
        (["--threshold", "0.5"], "--search paper"),
        (["--search", "magic"], "magic"),
        (["--out", "/proc/nowhere/atlas"], "/proc/nowhere"),
    ],
)
def test_a_bad_option_is_reported_in_one_sentence_with_exit_code_2(
    command: list[str], options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *options]) == 2
    errors = capsys.readouterr().err
    assert sentence in errors
    assert "Traceback" not in errors


def test_a_full_disk_is_reported_in_one_sentence_and_results_so_far_are_kept(
    planted: PlantedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    settings = CalibrationSettings(trials=2, search_prompts=1, new_tokens=4)
    with pytest.raises(OutputError, match="No space left on device"):
        calibrate(loaded(planted), prompts_of(planted, 2), tmp_path / "atlas", settings)
    assert [entry.name for entry in tmp_path.iterdir()] == ["atlas.calibration"]


def test_an_existing_atlas_is_not_written_over(planted: PlantedModel, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="already something"):
        calibrate(loaded(planted), prompts_of(planted, 2), tmp_path)


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([], "no prompts"),
        ([Prompt("x", None, "a-1")], "'a-1' has no domain"),
        ([Prompt("x", "lonely")], "'lonely' has one prompt"),
        ([Prompt("x", MIXTURE), Prompt("y", MIXTURE)], "cannot be called"),
    ],
)
def test_prompts_that_cannot_be_calibrated_on_are_refused(prompts: list[Prompt], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        by_domain(prompts)


def test_a_prompt_beyond_the_context_is_refused_by_name(planted: PlantedModel, tmp_path: Path) -> None:
    prompts = [*prompts_of(planted, 2), Prompt("x" * 300, "red", "too-long")]
    with pytest.raises(PromptError, match="'too-long' has 300 tokens"):
        calibrate(loaded(planted), prompts, tmp_path / "atlas", CalibrationSettings(trials=2))


@pytest.mark.parametrize("name", ["trials", "search_prompts", "vector_prompts", "anchors", "workers", "max_draft"])
def test_settings_refuse_zero(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be 1 or more, got 0"):
        CalibrationSettings(**{name: 0})


# The predicted speed-up


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=40), st.integers(1, 12), st.floats(0, 1)
)
def test_a_predicted_speedup_is_between_all_rejected_and_all_accepted(
    positions: list[tuple[bool, float]], max_draft: int, threshold: float
) -> None:
    plan, policy = Plan.skipping(4, [1], [2]), Policy(max_draft, threshold)
    trace = DraftTrace(tuple(agrees for agrees, _ in positions), tuple(confidence for _, confidence in positions))

    def speedup(agrees: bool) -> float:
        return predicted_speedup([DraftTrace((agrees,) * len(positions), trace.confidences)], plan, policy, COST)

    assert speedup(False) - 1e-9 <= predicted_speedup([trace], plan, policy, COST) <= max_draft + 1


def test_a_predicted_speedup_counts_rounds_by_hand() -> None:
    plan = Plan.skipping(4, [0, 1], [0])  # a draft step costs 1 - 3 * 0.05 = 0.85
    trace = DraftTrace((True, True, False, True, True), (0.9, 0.9, 0.9, 0.1, 0.9))
    # Two drafted and accepted: 2 * 0.85 + 1.04 for 3 tokens; one, with low confidence, accepted: 0.85 + 1.02 for 2.
    seconds = (2 * 0.85 + 1.04) + (0.85 + 1.02)
    assert predicted_speedup([trace], plan, Policy(2, 0.5), COST) == pytest.approx(5 / seconds)


def test_predicted_rounds_are_the_rounds_of_real_decoding(planted: PlantedModel) -> None:
    """With drafts of one token, simulated rounds are exactly those of decoding: the same tokens in as many rounds."""
    backend = TransformersBackend(planted.model)
    ids = [ord(c) for c in planted.prompt("red", 12, 5)]
    seen = observe(backend, "red", "x", ids, 40, Pooling.MEAN, frozenset())
    plan = Plan.skipping(8, [2], [1], Policy(1, 0.0))
    with TeacherForcedScorer(backend, [seen], COST) as scorer:
        score = scorer.score(plan, policies=[plan.policy])
    stats = Engine(planted.model).generate(ids, max_new_tokens=40, plan=plan).stats
    rounds = stats.rounds - 1  # the prefill's token is not drafted
    assert score.speedup == pytest.approx(
        39 / (stats.drafted * 0.9 + stats.drafted * 1.02 + (rounds - stats.drafted)), rel=0.06
    )


# The search


@pytest.mark.parametrize("strategy", ["greedy", "bayes", "evolve"])
def test_a_search_tries_nothing_twice_and_begins_with_every_sublayer_alone(strategy: str) -> None:
    search = Search(create_study("sqlite://", "x"), Strategy(strategy), COST, num_layers=4)
    plans = []
    for _ in range(24):
        trial = search.ask()
        if trial is None:
            break
        plans.append(skipped(trial.plan))
        assert strategy != "greedy" or search.known(trial) is None
        harm = 0.2 * len(plans[-1] - {1, 2, 5})
        search.tell(trial, Score(trial.plan, 1 + 0.05 * len(plans[-1]) - harm, 1 - harm, 10))
    assert plans[:9] == [set(), *({i} for i in reversed(range(8)))]
    assert max(search.finished(), key=lambda f: f.speedup).changes == {1, 2, 5}


def test_a_greedy_search_ends_when_no_change_is_left() -> None:
    search = Search(create_study("sqlite://", "x"), Strategy.GREEDY, COST, num_layers=1)
    while (trial := search.ask()) is not None:
        search.tell(trial, Score(trial.plan, 1.0, 1.0, 1))
    assert {f.changes for f in search.finished()} == {frozenset(), frozenset({0}), frozenset({1}), frozenset({0, 1})}


def test_a_search_goes_on_from_another_process_s_trials() -> None:
    study = create_study("sqlite://", "x")
    first, second = (Search(study, Strategy.BAYES, COST, num_layers=2) for _ in range(2))
    one, two = first.ask(), second.ask()
    assert one is not None
    assert two is not None
    assert one.plan != two.plan
    first.tell(one, Score(one.plan, 1.0, 1.0, 1))
    assert [f.changes for f in second.finished()] == [frozenset()]
    assert second.num_begun() == 2


def test_processes_that_share_a_database_never_take_the_same_trial(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/trials.db"
    searches = [Search(create_study(storage, "x"), Strategy.BAYES, COST, num_layers=8, seed=i) for i in range(4)]

    def work(search: Search) -> list[int]:
        numbers = []
        for _ in range(12):
            trial = search.ask()
            assert trial is not None
            numbers.append(trial.number)
            search.tell(trial, Score(trial.plan, 1.0, 0.9, 0))
        return numbers

    with ThreadPoolExecutor(len(searches)) as pool:
        taken = [number for numbers in pool.map(work, searches) for number in numbers]
    assert sorted(taken) == list(range(48))


def test_growing_sets_close_in_on_the_best_size_and_then_single_changes_follow() -> None:
    ranked = list(range(12))
    finished, begun = [], set()
    while (tried := next_growing_set(ranked, finished, begun)) is not None:
        begun.add(tried)
        finished.append(FinishedTrial(tried, 1 - abs(len(tried) - 7) / 10, 1.0, Plan.plain(6)))
    assert frozenset(range(7)) in begun
    change = next_change(ranked, finished, begun)
    assert change is not None
    assert len(change ^ frozenset(range(7))) == 1


def test_running_trials_of_a_killed_process_fail_and_are_tried_again() -> None:
    study = create_study("sqlite://", "x")
    killed = Search(study, Strategy.GREEDY, COST, num_layers=2).ask()
    assert killed is not None
    search = Search(study, Strategy.GREEDY, COST, num_layers=2)
    search.abandon_running()
    assert search.num_begun() == 0
    again = search.ask()
    assert again is not None
    assert again.plan == killed.plan


# The working folder, observations and anchors


def test_a_line_torn_by_a_kill_is_cut_off(tmp_path: Path) -> None:
    file = ObservationFile(tmp_path / "observations.jsonl")
    whole = Observation("red", "a", (1, 2), (3,), (0.5, -1.0))
    file.append(whole)
    with (tmp_path / "observations.jsonl").open("a") as stream:
        stream.write('{"domain": "re')
    assert file.read() == [whole]
    file.append(whole)
    assert file.read() == [whole, whole]


def test_a_folder_without_a_calibration_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "atlas.calibration").mkdir()
    (tmp_path / "atlas.calibration" / "mine.txt").write_text("keep me")
    with pytest.raises(OutputError, match="in the way"):
        Journal(tmp_path / "atlas").begin({}, resume=False)


def test_continuations_are_the_target_s_own_and_end_at_eos() -> None:
    model = tiny_model("llama")
    plain = Engine(model).generate(list(range(5, 15)), max_new_tokens=12).token_ids
    seen = observe(TransformersBackend(model), "x", "x", range(5, 15), 12, Pooling.LAST, frozenset([plain[4]]))
    assert seen.token_ids == plain[: plain.index(plain[4]) + 1]
    assert len(seen.vector) == 32


def test_anchors_route_held_out_vectors_and_radii_fit_their_domain() -> None:
    generator = np.random.default_rng(0)
    centres = np.eye(3, 16) * 5
    domains = [f"l{i}" for i in range(3) for _ in range(20)]
    vectors = np.concatenate([c + generator.normal(0, 0.5, (20, 16)) for c in centres]).astype(np.float32)
    anchors = fit_anchors(vectors, domains, 4, seed=0)
    assert anchors.points.shape == (12, 16)
    assert anchors.accuracy == 1.0
    assert anchors.held_out == 60
    assert all(0 < radius < 0.5 for radius in anchors.radii.values())


def test_few_and_equal_vectors_make_fewer_anchors() -> None:
    vectors = np.ones((5, 4), dtype=np.float32)
    vectors[3:] = -1
    anchors = fit_anchors(vectors, ["a", "a", "a", "b", "b"], 10, seed=0)
    assert list(anchors.domains) == ["a", "b"]
    assert anchors.accuracy == 1.0
    assert anchors.radii == pytest.approx({"a": 0.0, "b": 0.0}, abs=1e-5)


def test_a_radius_is_not_that_of_the_farthest_prompt() -> None:
    generator = np.random.default_rng(0)
    centres = np.eye(2, 16) * 5
    vectors = np.concatenate([centre + generator.normal(0, 0.3, (200, 16)) for centre in centres]).astype(np.float32)
    domains = ["a"] * 200 + ["b"] * 200
    without = fit_anchors(vectors, domains, 4, seed=0)
    vectors[7] = -centres[0]
    outlier = fit_anchors(vectors, domains, 4, seed=0)
    assert outlier.radii["a"] < 1.5 * without.radii["a"]
    assert 1 / 400 <= outlier.beyond_radius <= 0.01


# Judging on prompts that the search has not seen


def judged(speeds: Sequence[float], num_prompts: int, seed: int) -> Judgement:
    """Judges simulated plans: the general plan, plain decoding, then others, by their speeds.

    The speed of each of the others differs from prompt to prompt by 0.1, and every decoding by 0.05.
    """
    generator = np.random.default_rng(seed)
    by_prompt = generator.normal(0, 0.1, (len(speeds), num_prompts))
    by_prompt[:2] = 0

    def seconds(plan: int, prompt: int) -> float:
        return float(np.exp(by_prompt[plan, prompt] + generator.normal(0, 0.05)) / speeds[plan])

    repeats = max(1, CalibrationSettings().judging_prompts // num_prompts)
    if num_prompts < MIN_PROMPTS:  # as `judge` does
        return Judgement(PLANS[: len(speeds)], [[] for _ in speeds], 0)
    timed = time_in_turn(seconds, len(speeds), num_prompts, repeats)
    return Judgement(PLANS[: len(speeds)], timed, repeats)


PLANS = [Plan.low(8), Plan.plain(8), Plan.skipping(8, mlp=[3]), Plan.skipping(8, mlp=[4])]


@pytest.mark.parametrize("num_prompts", [2, 4, 8, 24])
def test_a_plan_of_no_effect_is_hardly_ever_chosen(num_prompts: int) -> None:
    one = [judged([1.0, 0.6, 1.0], num_prompts, seed).chosen for seed in range(1000)]
    assert sum(plan > 1 for plan in one) <= 20
    two = [judged([1.0, 0.6, 1.0, 1.0], num_prompts, seed).chosen for seed in range(1000)]
    assert sum(plan > 1 for plan in two) <= 30


def test_a_faster_plan_is_mostly_found() -> None:
    found = [judged([1.0, 0.6, 1.15], 8, seed).chosen for seed in range(400)]
    assert found.count(2) >= 240
    found = [judged([1.0, 0.6, 1.15], 24, seed).chosen for seed in range(400)]
    assert found.count(2) >= 380


def test_plain_decoding_is_chosen_where_the_general_plan_is_slower_and_no_other_beats_plain() -> None:
    found = [judged([0.85, 1.0, 0.95, 0.9], 8, seed).chosen for seed in range(200)]
    assert found.count(1) >= 195
    found = [judged([0.85, 1.0, 1.3], 8, seed).chosen for seed in range(200)]
    assert found.count(2) >= 180


def test_a_plan_that_cannot_win_any_more_is_given_up() -> None:
    slow = judged([1.0, 0.6, 0.9], 24, 0)
    assert len(slow.timed[1]) == MIN_PROMPTS
    assert MIN_PROMPTS <= len(slow.timed[2]) < 12
    assert len(slow.timed[0]) == max(len(slow.timed[1]), len(slow.timed[2]))
    evidence = slow.to_json()
    assert evidence["chosen"] == "general plan"
    assert evidence["speedup_over_general"] == 1.0
    assert evidence["speedup_over_plain"] == pytest.approx(1 / 0.6, rel=0.1)
    assert [row["plan_from"] for row in evidence["comparisons"]] == ["plain decoding", "search"]
    assert {row["compared_with"] for row in evidence["comparisons"]} == {"general plan"}
    assert [row["prompts"] for row in evidence["comparisons"]] == [len(timed) for timed in slow.timed[1:]]


def test_plans_decode_the_prompts_in_turn_for_real(planted: PlantedModel) -> None:
    backend = TransformersBackend(planted.model)
    seen = [
        observe(backend, "red", str(i), [ord(c) for c in planted.prompt("red", 12, i)], 1, Pooling.MEAN, frozenset())
        for i in range(6)
    ]
    everything = Plan.skipping(8, range(8), range(8), Policy(8, 0.0))  # drafts that are never right
    redundant = REDUNDANT["red"]
    good = Plan.skipping(
        8, [i // 2 for i in redundant if i % 2 == 0], [i // 2 for i in redundant if i % 2], Policy(8, 0.0)
    )
    general = general_plan(backend)
    with simulated():
        found = judge(backend, [general, everything, good], [None, 0.0, 1.0], seen, 24, 12, frozenset(), COST)
    assert found.plan == good
    evidence = found.to_json()
    assert (evidence["chosen"], evidence["held_out_prompts"], evidence["decodings_per_prompt"]) == ("search", 6, 2)
    slow, fast = evidence["comparisons"][1:]
    assert not slow["faster_beyond_chance"]
    assert fast["faster_beyond_chance"]
    assert fast["speedup"] > 1.2


def test_without_enough_held_out_prompts_a_domain_keeps_the_general_plan(planted: PlantedModel, tmp_path: Path) -> None:
    settings = CalibrationSettings(trials=24, search_prompts=4, judging_prompts=6, new_tokens=16)
    with simulated():
        atlas = calibrate(loaded(planted), prompts_of(planted, 4 + MIN_PROMPTS - 1), tmp_path / "atlas", settings)
    general = general_plan(TransformersBackend(planted.model))
    assert {entry.plan for entry in atlas.domains.values()} == {general}
    assert all(best_skipping(entry.evidence).num_skipped for entry in atlas.domains.values())
    judging = atlas.domains["red"].evidence["judging"]
    assert (judging["chosen"], judging["held_out_prompts"]) == ("general plan", 0)
    assert judging["speedup_over_plain"] is None
    assert atlas.fallback_evidence["judging"]["held_out_prompts"] >= MIN_PROMPTS, "three of each domain"


def test_prompts_of_judging_are_none_of_the_search_s(planted: PlantedModel) -> None:
    settings = CalibrationSettings(search_prompts=3, judging_prompts=4)
    made = [
        Observation(name, f"{name}-{i}", (1, 2), (7,) if i != 4 else (0,), (0.0,))
        for name in ("red", "green")
        for i in range(9)
    ]
    searched = observations_by_search(made, settings)
    held_out = held_out_by_search(made, settings, 100, frozenset([0]))
    assert [o.id for o in held_out["red"]] == ["red-3", "red-5", "red-6"], "the output of red-4 ends at once"
    assert [o.id for o in held_out[MIXTURE]] == ["red-3", "green-3", "red-5", "green-5"]
    for name in ("red", "green", MIXTURE):
        assert not {o.id for o in searched[name]} & {o.id for o in held_out[name]}
    assert held_out_by_search(made, settings, 3, frozenset())["red"] == [], "no room for two tokens"


@pytest.mark.parametrize(
    ("low", "lookup", "expected"),
    [(True, True, "4-bit; drafts up to 12 while confidence >= 0.7; lookup"),
     (True, False, "4-bit; drafts up to 12 while confidence >= 0.7"),
     (False, True, "full model; drafts up to 12 by lookup"), (False, False, "plain decoding")],
)  # fmt: skip
def test_the_general_plan_is_made_of_what_plans_may_use(low: bool, lookup: bool, expected: str) -> None:
    backend: Any = SimpleNamespace(num_layers=4, modes=frozenset(Mode))
    assert general_plan(backend, low=low, lookup=lookup).describe() == expected
