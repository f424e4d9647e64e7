"""Runs the searches of a calibration, one per domain and one over the mixture, in one process or in several.

Processes share the trials of a search through Optuna's storage: each asks for the next plan, scores it and records the
score.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna

from knn_ssd.backends.base import Backend
from knn_ssd.backends.select import select_backend
from knn_ssd.calibrate.continuations import Observation
from knn_ssd.calibrate.journal import Journal
from knn_ssd.calibrate.objective import Score, TeacherForcedScorer, TimedDecoding, timed_tokens_per_sec
from knn_ssd.calibrate.search import Search, Strategy, Trial, create_study
from knn_ssd.calibrate.settings import MIXTURE, CalibrationSettings
from knn_ssd.kernels.binding import num_threads, set_threads
from knn_ssd.loading.resolve import LoadedModel, load_model
from knn_ssd.plan import Policy
from knn_ssd.progress import NoProgress, Progress
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.tokenization import end_token_ids

_MAX_REPEATS = 50  # a search that proposes only plans already tried, this often in a row, has converged


@dataclass(frozen=True, slots=True)
class SearchRuns:
    """The searches of one calibration.

    Args:
        backend: executes the target model.
        eos_token_ids: the tokens that end an output.
        settings: of the calibration.
        journal: keeps the trials.
        study_prefix: begins the name of each study; calibrations with the same prefix share their trials.
        cost: the cost profile of this machine.
        observations: the continuations that each search scores its plans on, by domain, the mixture among them.
    """

    backend: Backend
    eos_token_ids: frozenset[int]
    settings: CalibrationSettings
    journal: Journal
    study_prefix: str
    cost: CostProfile
    observations: Mapping[str, Sequence[Observation]]

    def open(self, domain: str) -> Search:
        """Opens the search of a domain, with the trials that it already has."""
        settings, layers, trials = self.settings, self.backend.num_layers, self.num_trials(domain)
        low = settings.uses_low_bit(self.backend)
        short = low and domain != MIXTURE and trials is not None and trials < 2 * layers
        shared = self.open(MIXTURE).finished() if short else ()
        return Search(
            self._study(domain),
            settings.search,
            self.cost,
            num_layers=layers,
            seed=settings.seed,
            low=low,
            skip=settings.skip,
            shared=[f for f in shared if len(f.changes) == 1],
        )

    def num_trials(self, domain: str) -> int | None:
        """Trials of a domain's search; None where the time limit decides."""
        return self.settings.num_trials(self.backend.num_layers, self.settings.uses_low_bit(self.backend), domain)

    def run(self, loaded: LoadedModel, dtype: str, progress: Progress, *, resume: bool) -> None:
        """Runs all searches to their end, with worker processes where the settings ask for them."""
        for domain in self.observations:  # before any worker starts, so that each finds the storage complete
            self._study(domain)
            if resume and self.settings.storage is None:
                self.open(domain).abandon_running()
        workers = [self._start_worker(loaded, dtype, index) for index in range(1, self.settings.workers)]
        try:
            self.run_alone(progress)
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

    def run_alone(self, progress: Progress) -> None:
        """Runs all searches in turn in this process; a time limit is divided evenly among them."""
        settings = self.settings
        seconds_left = 60 * settings.minutes if settings.minutes is not None else float("inf")
        ordered = sorted(self.observations, key=lambda domain: domain != MIXTURE)  # others may share its trials
        for place, domain in enumerate(ordered):
            progress.stage(f"searching {domain}", self.num_trials(domain))
            search = self.open(domain)
            with self._scoring(domain) as score:
                started = time.perf_counter()
                self._run_search(domain, search, score, started + seconds_left / (len(ordered) - place), progress)
                seconds_left -= time.perf_counter() - started

    def _study(self, domain: str) -> optuna.Study:
        return create_study(self.journal.storage(self.settings.storage), f"{self.study_prefix}-{domain}")

    def _run_search(
        self, domain: str, search: Search, score: Callable[[Trial, float], Score], deadline: float, progress: Progress
    ) -> None:
        """Asks for plans and scores them until the trials or the time are used up, or no new plan is left."""
        total = self.num_trials(domain)
        for _ in range(search.num_begun()):
            progress.advance()
        repeats = 0
        while (
            (total is None or search.num_begun() < total)
            and repeats < _MAX_REPEATS
            and time.perf_counter() < deadline
            and (trial := search.ask()) is not None
        ):
            known = search.known(trial)
            repeats = repeats + 1 if known else 0
            best = max((f.speedup for f in search.finished()), default=0.0)
            result = known or score(trial, best)
            search.tell(trial, result)
            progress.advance(f"best {max(best, result.speedup):.2f}")

    @contextmanager
    def _scoring(self, domain: str) -> Iterator[Callable[[Trial, float], Score]]:
        """The function that scores a trial: predicted by teacher-forced scoring, or timed as published."""
        settings = self.settings
        if settings.search is Strategy.PAPER:
            policy = Policy(settings.max_draft, settings.threshold)

            def timed(trial: Trial, _best: float) -> Score:
                plan = trial.plan.with_policy(policy)
                decoding = TimedDecoding(self.backend, plan, self.eos_token_ids, self.cost, adaptive=False)
                return Score(plan, timed_tokens_per_sec(decoding, self.observations[domain]), 0.0, 0)

            yield timed
            return
        with TeacherForcedScorer(self.backend, self.observations[domain], self.cost) as scorer:
            yield lambda trial, best: scorer.score(trial.plan, best)

    def _start_worker(self, loaded: LoadedModel, dtype: str, index: int) -> BaseProcess:
        """Starts another process that loads the same model and works on the same studies."""
        model, settings = str(loaded.directory or loaded.name), replace(self.settings, seed=self.settings.seed + index)
        worker = multiprocessing.get_context("spawn").Process(
            target=_work, args=(model, dtype, self.journal.out, settings, self.study_prefix), daemon=True
        )
        worker.start()
        return worker


def _work(model: str, dtype: str, out: Path, settings: CalibrationSettings, study_prefix: str) -> None:
    """Runs in a worker process."""
    set_threads(max(1, num_threads() // settings.workers))
    loaded, journal = load_model(model, dtype=dtype), Journal(out)
    cost = journal.read_cost()
    assert cost is not None, "the first process measures costs before it starts others"
    observations = observations_by_search(journal.observations.read(), settings)
    backend = select_backend(loaded.model, loaded.directory)
    ends = end_token_ids(loaded.model, loaded.tokenizer, settings.chat)
    SearchRuns(backend, ends, settings, journal, study_prefix, cost, observations).run_alone(NoProgress())


def observations_by_search(
    observations: Sequence[Observation], settings: CalibrationSettings
) -> dict[str, list[Observation]]:
    """The continuations that each search scores plans on: a domain's own, and for the mixture some of every domain."""
    searched = {
        domain: [o for o in members[: settings.search_prompts] if o.token_ids]
        for domain, members in _by_domain(observations).items()
    }
    return {**searched, MIXTURE: _mixed(searched, settings.search_prompts)}


def held_out_by_search(
    observations: Sequence[Observation], settings: CalibrationSettings, context_length: int, eos: frozenset[int]
) -> dict[str, list[Observation]]:
    """The prompts that each search's plans are judged on; no search sees them.

    Prompts whose output would end with its first token are left out, since nothing is drafted there.
    """
    first, last = settings.search_prompts, settings.search_prompts + settings.judging_prompts
    held_out = {
        domain: [
            o
            for o in members[first:last]
            if not eos.issuperset(o.token_ids) and context_length - len(o.prompt_ids) >= 2
        ]
        for domain, members in _by_domain(observations).items()
    }
    return {**held_out, MIXTURE: _mixed(held_out, settings.judging_prompts)}


def _by_domain(observations: Sequence[Observation]) -> dict[str, list[Observation]]:
    members: dict[str, list[Observation]] = {}
    for observation in observations:
        members.setdefault(observation.domain, []).append(observation)
    return members


def _mixed(by_domain: Mapping[str, Sequence[Observation]], count: int) -> list[Observation]:
    """As many of all domains in turn, at least one of each."""
    turns = zip_longest(*by_domain.values())
    mixed = [observation for turn in turns for observation in turn if observation is not None]
    return mixed[: max(count, len(by_domain))]
