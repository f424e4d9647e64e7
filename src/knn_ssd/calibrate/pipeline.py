"""Prompts to an atlas: observe, cluster, measure costs, search per domain and for the mixture, let the clock decide,
write.

Every step's result is kept in the journal as it is made, so an interrupted calibration goes on where it stopped.
Nothing is printed; `progress` receives how far it is.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.select import select_backend
from knn_ssd.calibrate.anchors import fit_anchors
from knn_ssd.calibrate.continuations import Observation, observe
from knn_ssd.calibrate.cost import measure_cost
from knn_ssd.calibrate.journal import Journal
from knn_ssd.calibrate.objective import WORTH_HAVING, Clock, Score, TeacherForcedScorer, Timing
from knn_ssd.calibrate.search import Finished, Search, Strategy, Trial, create_study
from knn_ssd.calibrate.settings import MIXTURE, CalibrationSettings
from knn_ssd.errors import Interrupted, OutputError, UsageError
from knn_ssd.io import provenance
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.loading.resolve import LoadedModel, load_model
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.progress import NoProgress, Progress
from knn_ssd.prompts import Prompt
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.tokenization import encode, eos_token_ids

_WORTH_TIMING = 0.95  # plans foretold to be slower than this are not timed
_FINALISTS = 2
_MOST_REPEATS = 50  # a search that suggests only what it knows, this often in a row, has converged


def calibrate(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    out: str | Path,
    settings: CalibrationSettings | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> Atlas:
    """Calibrates a model on prompts and writes the atlas.

    Args:
        loaded: the model and its tokenizer.
        prompts: each with its domain; at least two per domain.
        out: the folder that will be the atlas. Nothing may be there yet.
        settings: what to do.
        resume: go on with an interrupted calibration of the same settings.
        progress: receives how far it is.

    Raises:
        UsageError: prompts without domains, or too few of them.
        CalibrationError: an interrupted calibration is in the way, or cannot be gone on with.
        OutputError: the place cannot be written.
        Interrupted: stopped by the user; what was found is kept.
    """
    settings = settings or CalibrationSettings()
    out = Path(out)
    if out.exists():
        raise OutputError(f"there is already something at '{out}'", "Choose another --out, or remove it first.")
    run = _Calibration(loaded, by_domain(prompts), out, settings, progress or NoProgress())
    try:
        return run.run(resume)
    except KeyboardInterrupt:
        raise Interrupted(
            f"the calibration was interrupted; what it found so far is at '{run.journal.folder}'",
            "Go on with the same command and --resume.",
        ) from None


def by_domain(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Prompts under their domains, in order.

    Raises:
        UsageError: a prompt without a domain, a domain of one prompt, or one named as the mixture.
    """
    grouped: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if not prompt.domain:
            raise UsageError(f"prompt '{prompt.id}' has no domain", "Calibration needs a 'domain' in every line.")
        grouped.setdefault(prompt.domain, []).append(prompt)
    if not grouped:
        raise UsageError("calibration was given no prompts")
    small = [name for name, members in grouped.items() if len(members) < 2]
    if small:
        raise UsageError(f"domain '{small[0]}' has one prompt", "Give at least two of each domain.")
    if MIXTURE in grouped:
        raise UsageError(f"a domain cannot be called '{MIXTURE}': that is the name of the fallback's search")
    return grouped


class _Calibration:
    """One run of the pipeline."""

    def __init__(
        self,
        loaded: LoadedModel,
        grouped: Mapping[str, Sequence[Prompt]],
        out: Path,
        settings: CalibrationSettings,
        progress: Progress,
    ) -> None:
        self.loaded = loaded
        self.backend = select_backend(loaded.model)
        self.low = settings.low and Mode.LOW in self.backend.modes and settings.search is not Strategy.PAPER
        self.fingerprint = fingerprint(loaded.model, loaded.tokenizer)
        self.grouped = grouped
        self.out = out
        self.settings = settings
        self.progress = progress
        self.journal = Journal(out)
        self.started = time.perf_counter()
        self.identity: dict[str, Any] = {
            "fingerprint": self.fingerprint.weights_hash,
            "prompts": _digest([(p.id, p.domain, p.prompt) for prompts in grouped.values() for p in prompts]),
            **settings.identity(),
        }

    def run(self, resume: bool) -> Atlas:
        prompt_ids = self._encode()
        self.journal.begin(self.identity, resume)
        observations = self._observe(prompt_ids)
        cost = self._measure_cost()
        searches = search_sets(observations, self.settings)
        self._search(searches, cost, fresh=not resume)
        entries = {domain: self._decide(domain, chosen, cost) for domain, chosen in searches.items()}
        atlas = self._atlas(observations, cost, entries)
        atlas.save(self.out)
        self.journal.remove()
        return atlas

    def _encode(self) -> list[tuple[str, int, Prompt, list[int]]]:
        """Every prompt that is used, with its domain, its place in it and its token ids."""
        count = max(self.settings.vector_prompts, self.settings.search_prompts)
        tokenizer, context = self.loaded.tokenizer, self.backend.context_length
        return [
            (domain, index, prompt, encode(tokenizer, prompt.prompt, context, self.settings.chat, name=prompt.id))
            for domain, prompts in self.grouped.items()
            for index, prompt in enumerate(prompts[:count])
        ]

    def _observe(self, wanted: Sequence[tuple[str, int, Prompt, list[int]]]) -> list[Observation]:
        """The observations of all prompts, those of an interrupted run included."""
        settings = self.settings
        done = {(o.domain, o.id, o.prompt_ids): o for o in self.journal.observations.read()}
        self.progress.stage("reading prompts", len(wanted))
        observations = []
        for domain, index, prompt, prompt_ids in wanted:
            observation = done.get((domain, prompt.id, tuple(prompt_ids)))
            if observation is None:
                new_tokens = settings.new_tokens if index < settings.search_prompts else 0
                eos = eos_token_ids(self.loaded.model)
                observation = observe(self.backend, domain, prompt.id, prompt_ids, new_tokens, settings.pooling, eos)
                self.journal.observations.append(observation)
            observations.append(observation)
            self.progress.advance(domain)
        return observations

    def _measure_cost(self) -> CostProfile:
        cost = self.journal.read_cost()
        if cost is None:
            self.progress.stage("measuring costs", None)
            cost = measure_cost(self.backend, self.low)
            self.journal.write_cost(cost)
        return cost

    def _search(self, searches: Mapping[str, Sequence[Observation]], cost: CostProfile, fresh: bool) -> None:
        storage = self.journal.storage(self.settings.storage)
        for domain in searches:  # before any worker starts, so that none finds the storage half made
            create_study(storage, self._study_name(domain))
            if not fresh and self.settings.storage is None:
                self.open_search(domain, cost).abandon_running()
        workers = [_start_worker(self, index) for index in range(1, self.settings.workers)]
        try:
            search_all(self, searches, cost)
            for worker in workers:
                worker.join()
                if worker.exitcode:
                    warnings.warn(
                        f"a worker process failed with exit code {worker.exitcode}; its trials were done by the others",
                        stacklevel=2,
                    )
        finally:
            for worker in workers:
                worker.terminate()

    def _study_name(self, domain: str) -> str:
        """Calibrations that ask the same share their trials in one storage; others there do not mix with them."""
        asked = {name: value for name, value in self.identity.items() if name != "seed"}  # each worker has its own
        return f"{_digest(asked)}-{domain}"

    def open_search(self, domain: str, cost: CostProfile) -> Search:
        layers, settings = self.backend.num_layers, self.settings
        study = create_study(self.journal.storage(settings.storage), self._study_name(domain))
        trials = settings.num_trials(layers, self.low, domain)
        short = self.low and domain != MIXTURE and trials is not None and trials < 2 * layers
        shared = self.open_search(MIXTURE, cost).finished() if short else ()
        return Search(
            study,
            settings.search,
            cost,
            num_layers=layers,
            seed=settings.seed,
            low=self.low,
            skip=settings.skip,
            shared=[f for f in shared if len(f.changes) == 1],
        )

    def _decide(self, domain: str, observations: Sequence[Observation], cost: CostProfile) -> DomainEntry:
        """Lets the clock choose among the best few and plain decoding."""
        finished = self.open_search(domain, cost).finished()
        ranked = sorted(finished, key=lambda f: f.speedup, reverse=True)
        skipping = [f for f in ranked if f.plan.num_skipped]
        finalists = self._finalists(ranked)
        timed: list[Timing] = []
        if finalists:
            self.progress.stage(f"timing {domain}", None)
            agreements = [_agreement(ranked, plan) for plan in finalists]
            timed = self.clock(observations, cost).compare(finalists, agreements)
        winners = [i for i, t in enumerate(timed) if t.proven and t.speedup >= WORTH_HAVING]
        best = max(winners, key=lambda i: timed[i].speedup, default=None)
        plan = Plan.plain(self.backend.num_layers) if best is None else finalists[best]
        evidence = {
            "trials": len(finished),
            "prompts": len(observations),
            "best_score": ranked[0].speedup if ranked else None,
            "agreement": _agreement(ranked, plan),
            "timed": [
                {"plan": p.to_json(), "speedup": t.speedup, "pairs": len(t.gains), "proven": t.proven}
                for p, t in zip(finalists, timed, strict=True)
            ],
            "best_skipping": _told(skipping[0]) if skipping else None,
        }
        return DomainEntry(plan, 2.0, evidence)

    def _finalists(self, ranked: Sequence[Finished]) -> list[Plan]:
        """The plans that the clock tries: the best foretold, or look-up alone."""
        best = [f.plan for f in ranked[:_FINALISTS] if self._worth_timing(f) and f.plan.cheapens]
        if self.settings.search is Strategy.PAPER or not self.settings.lookup:
            return best
        alone = Plan.skipping(self.backend.num_layers, policy=Policy(lookup=True))
        plans = [plan.with_policy(replace(plan.policy, lookup=True)) for plan in best]
        return plans or [alone]

    def clock(self, observations: Sequence[Observation], cost: CostProfile) -> Clock:
        return Clock(self.backend, observations, eos_token_ids(self.loaded.model), cost)

    def _worth_timing(self, finished: Finished) -> bool:
        """Published scores are timings already, in tokens per second; foretold ones are speed-ups."""
        return self.settings.search is Strategy.PAPER or finished.speedup >= _WORTH_TIMING

    def _atlas(
        self, observations: Sequence[Observation], cost: CostProfile, entries: Mapping[str, DomainEntry]
    ) -> Atlas:
        self.progress.stage("placing anchors", None)
        vectors = np.array([o.vector for o in observations], dtype=np.float32)
        domains = [o.domain for o in observations]
        anchors = fit_anchors(vectors, domains, self.settings.anchors, self.settings.seed)
        name = Path(self.loaded.name).name if self.loaded.directory else self.loaded.name  # an atlas names no folders
        evidence = {
            **provenance(),
            "model": name,
            "settings": {**self.settings.identity(), "trials": self.settings.trials, "minutes": self.settings.minutes},
            "wall_sec": round(time.perf_counter() - self.started, 1),
            "routing": {"held_out": anchors.held_out, "accuracy": anchors.accuracy},
        }
        return Atlas(
            fingerprint=self.fingerprint,
            pooling=self.settings.pooling,
            anchors=anchors.points,
            anchor_domains=anchors.domains,
            domains={name: replace(entries[name], radius=anchors.radii[name]) for name in self.grouped},
            fallback=entries[MIXTURE].plan,
            cost=cost,
            fallback_evidence=entries[MIXTURE].evidence,
            evidence=evidence,
            vectors=vectors,
            vector_domains=tuple(domains),
        )


def _agreement(finished: Sequence[Finished], plan: Plan) -> float | None:
    """What the search measured of a plan's drafts."""
    return next((f.agreement for f in finished if f.plan.modes == plan.modes), None)


def _told(finished: Finished) -> dict[str, Any]:
    return {"plan": finished.plan.to_json(), "score": finished.speedup, "agreement": finished.agreement}


def search_all(run: _Calibration, searches: Mapping[str, Sequence[Observation]], cost: CostProfile) -> None:
    """All searches in turn; the minutes, where they are what is given, are shared out evenly."""
    seconds_left = 60 * run.settings.minutes if run.settings.minutes is not None else float("inf")
    ordered = sorted(searches.items(), key=lambda item: item[0] != MIXTURE)  # it first: others may share its trials
    for place, (domain, observations) in enumerate(ordered):
        run.progress.stage(f"searching {domain}", run.settings.num_trials(run.backend.num_layers, run.low, domain))
        search = run.open_search(domain, cost)
        with _scoring(run, observations, cost) as score:
            started = time.perf_counter()
            _search_domain(run, domain, search, score, started + seconds_left / (len(searches) - place))
            seconds_left -= time.perf_counter() - started


def _search_domain(
    run: _Calibration, domain: str, search: Search, score: Callable[[Trial, float], Score], deadline: float
) -> None:
    """Asks, scores and tells until the trials or the time are used up, or nothing new is left to try."""
    total = run.settings.num_trials(run.backend.num_layers, run.low, domain)
    for _ in range(search.num_begun()):
        run.progress.advance()
    repeats = 0
    while (total is None or search.num_begun() < total) and repeats < _MOST_REPEATS and time.perf_counter() < deadline:
        trial = search.ask()
        if trial is None:
            return
        known = search.known(trial)
        repeats = repeats + 1 if known else 0
        best = max((f.speedup for f in search.finished()), default=0.0)
        told = known or score(trial, best)
        search.tell(trial, told)
        run.progress.advance(f"best {max(best, told.speedup):.2f}")


@contextmanager
def _scoring(
    run: _Calibration, observations: Sequence[Observation], cost: CostProfile
) -> Iterator[Callable[[Trial, float], Score]]:
    """How a trial is scored: foretold from rehearsals, or timed as published."""
    settings = run.settings
    if settings.search is Strategy.PAPER:
        clock = run.clock(observations, cost)
        policy = Policy(settings.max_draft, settings.threshold)

        def timed(trial: Trial, _best: float) -> Score:
            plan = trial.plan.with_policy(policy)
            return Score(plan, clock.tokens_per_sec(plan), 0.0, 0)

        yield timed
        return
    with TeacherForcedScorer(run.backend, observations, cost) as scorer:
        yield lambda trial, best: scorer.score(trial.plan, best)


def search_sets(observations: Sequence[Observation], settings: CalibrationSettings) -> dict[str, list[Observation]]:
    """Which continuations each domain's plans are scored on, and the mixture's: some of every domain, in turn."""
    continued: dict[str, list[Observation]] = {}
    for observation in observations:
        members = continued.setdefault(observation.domain, [])
        if observation.token_ids and len(members) < settings.search_prompts:
            members.append(observation)
    turns = zip_longest(*continued.values())
    mixed = [observation for turn in turns for observation in turn if observation is not None]
    return {**continued, MIXTURE: mixed[: max(settings.search_prompts, len(continued))]}


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _start_worker(run: _Calibration, index: int) -> multiprocessing.process.BaseProcess:
    """Another process that loads the same model and works on the same studies."""
    context = multiprocessing.get_context("spawn")
    dtype = run.fingerprint.dtype
    arguments = (
        str(run.loaded.directory or run.loaded.name),
        dtype,
        run.grouped,
        run.out,
        replace(run.settings, seed=run.settings.seed + index),
    )
    worker = context.Process(target=_work, args=arguments, daemon=True)
    worker.start()
    return worker


def _work(
    name: str, dtype: str, grouped: Mapping[str, Sequence[Prompt]], out: Path, settings: CalibrationSettings
) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.workers))
    run = _Calibration(load_model(name, dtype=dtype), grouped, out, settings, NoProgress())
    cost = run.journal.read_cost()
    assert cost is not None, "the first process measures costs before it starts others"
    searches = search_sets(run.journal.observations.read(), settings)
    search_all(run, searches, cost)
