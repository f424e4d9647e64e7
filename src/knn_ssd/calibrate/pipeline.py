"""From prompts to an atlas: decode the prompts, measure costs, search for plans, judge the best of them, place anchors.

Every step's result is kept in the journal as it is made, so that an interrupted calibration resumes where it stopped.
Nothing is printed; `progress` receives how far it is.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.select import select_backend
from knn_ssd.calibrate.anchors import fit_anchors
from knn_ssd.calibrate.continuations import Observation, observe
from knn_ssd.calibrate.cost import measure_cost
from knn_ssd.calibrate.journal import Journal
from knn_ssd.calibrate.judging import judge
from knn_ssd.calibrate.low_bit_fit import fit_low_bit
from knn_ssd.calibrate.search import FinishedTrial, Strategy
from knn_ssd.calibrate.search_runs import SearchRuns, held_out_by_search, observations_by_search
from knn_ssd.calibrate.settings import MIXTURE, CalibrationSettings
from knn_ssd.errors import Interrupted, OutputError, UsageError
from knn_ssd.io import provenance
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.loading.resolve import LoadedModel
from knn_ssd.plan import Plan
from knn_ssd.progress import NoProgress, Progress
from knn_ssd.prompts import Prompt
from knn_ssd.routing.plan_choice import general_plan
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.tokenization import encode, end_token_ids

_NUM_FINALISTS = 2  # the plans of each search that are judged, at most


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
        prompts: the calibration prompts, each with its domain; at least two per domain.
        out: the folder that the atlas is written to; it must not exist yet.
        settings: what is searched for, and how long.
        resume: whether to resume an interrupted calibration with the same settings.
        progress: receives how far the calibration is.

    Raises:
        UsageError: a prompt has no domain, or a domain has too few prompts.
        CalibrationError: an interrupted calibration is in the way, or cannot be resumed.
        OutputError: the folder cannot be written.
        Interrupted: the user stopped the calibration; its results so far are kept.
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
    """Groups prompts by domain; each domain keeps its order.

    Raises:
        UsageError: a prompt has no domain, a domain has one prompt, or a domain is named like the mixture.
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
    """One run of the whole pipeline."""

    def __init__(
        self,
        loaded: LoadedModel,
        grouped: Mapping[str, Sequence[Prompt]],
        out: Path,
        settings: CalibrationSettings,
        progress: Progress,
    ) -> None:
        self.loaded = loaded
        self.backend = select_backend(loaded.model, loaded.directory)
        self.eos_token_ids = end_token_ids(loaded.model, loaded.tokenizer, settings.chat)
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
        prompts = self._encode()
        self.journal.begin(self.identity, resume)
        observations = self._observe(prompts)
        self._fit_low_bit(observations)
        runs = self._search_runs(observations, self._measure_cost())
        runs.run(self.loaded, self.fingerprint.dtype, self.progress, resume=resume)
        held_out = held_out_by_search(observations, self.settings, self.backend.context_length, self.eos_token_ids)
        entries = {domain: self._choose_plan(domain, runs, held_out[domain]) for domain in runs.observations}
        atlas = self._atlas(observations, runs.cost, entries)
        atlas.save(self.out)
        self.journal.remove()
        return atlas

    def _encode(self) -> list[tuple[str, int, Prompt, list[int]]]:
        """Encodes the prompts that are used; each with its domain, its index within the domain and its token ids."""
        count = max(self.settings.vector_prompts, self.settings.search_prompts)
        tokenizer, context = self.loaded.tokenizer, self.backend.context_length
        return [
            (domain, index, prompt, encode(tokenizer, prompt.prompt, context, self.settings.chat, name=prompt.id))
            for domain, prompts in self.grouped.items()
            for index, prompt in enumerate(prompts[:count])
        ]

    def _observe(self, wanted: Sequence[tuple[str, int, Prompt, list[int]]]) -> list[Observation]:
        """Decodes all prompts that an interrupted run has not already decoded."""
        settings = self.settings
        done = {(o.domain, o.id, o.prompt_ids): o for o in self.journal.observations.read()}
        self.progress.stage("reading prompts", len(wanted))
        observations = []
        for domain, index, prompt, prompt_ids in wanted:
            observation = done.get((domain, prompt.id, tuple(prompt_ids)))
            if observation is None:
                new_tokens = settings.continuation_length(index)
                observation = observe(
                    self.backend, domain, prompt.id, prompt_ids, new_tokens, settings.pooling, self.eos_token_ids
                )
                self.journal.observations.append(observation)
            observations.append(observation)
            self.progress.advance(domain)
        return observations

    def _fit_low_bit(self, observations: Sequence[Observation]) -> None:
        """Fits the 4-bit copies to the continuations that the searches see, where later starts find the copies."""
        backend = self.backend
        if isinstance(backend, NativeBackend) and backend.low.maker.is_kept and self.settings.uses_low_bit(backend):
            searched = observations_by_search(observations, self.settings)
            fit_low_bit(backend, [searched[domain] for domain in self.grouped], self.progress)

    def _measure_cost(self) -> CostProfile:
        cost = self.journal.read_cost()
        if cost is None:
            self.progress.stage("measuring costs", None)
            cost = measure_cost(self.backend, self.settings.uses_low_bit(self.backend))
            self.journal.write_cost(cost)
        return cost

    def _search_runs(self, observations: Sequence[Observation], cost: CostProfile) -> SearchRuns:
        asked = {name: value for name, value in self.identity.items() if name != "seed"}  # each worker has its own
        return SearchRuns(
            self.backend,
            self.eos_token_ids,
            self.settings,
            self.journal,
            _digest(asked),
            cost,
            observations_by_search(observations, self.settings),
        )

    def _choose_plan(self, domain: str, runs: SearchRuns, held_out: Sequence[Observation]) -> DomainEntry:
        """Judges the best plans of a search; the search `paper` takes the best one as it is."""
        finished = runs.open(domain).finished()
        ranked = sorted(finished, key=lambda f: f.speedup, reverse=True)
        skipping = [f for f in ranked if f.plan.num_skipped]
        published = self.settings.search is Strategy.PAPER
        if published:
            plan, judged = ranked[0].plan if ranked else Plan.plain(self.backend.num_layers), None
        else:
            plan, judged = self._judge(domain, ranked, held_out, runs.cost)
        evidence = {
            "trials": len(finished),
            "search_prompts": len(runs.observations[domain]),
            "best_score": ranked[0].speedup if ranked else None,
            "agreement": None if published else _agreement(ranked, plan),
            "judging": judged,
            "best_skipping": _trial_json(skipping[0]) if skipping else None,
        }
        return DomainEntry(plan, 2.0, evidence)

    def _judge(
        self, domain: str, ranked: Sequence[FinishedTrial], held_out: Sequence[Observation], cost: CostProfile
    ) -> tuple[Plan, dict[str, Any]]:
        """The plan that a domain gets, and the evidence for it."""
        settings = self.settings
        general = general_plan(self.backend, low=settings.low, lookup=settings.lookup)
        plans = [general, *self._finalists(ranked, general)]
        self.progress.stage(f"judging {domain}", None)
        judgement = judge(
            self.backend,
            plans,
            [_agreement(ranked, plan) for plan in plans],
            held_out,
            settings.new_tokens,
            settings.judging_prompts,
            self.eos_token_ids,
            cost,
        )
        return judgement.plan, judgement.to_json()

    def _finalists(self, ranked: Sequence[FinishedTrial], general: Plan) -> list[Plan]:
        """The plans to judge: those with the highest scores, if the search predicts them to beat the general plan.

        Predictions leave out lookup, which the general plan and the finalists have alike.
        """
        own = [f.speedup for f in ranked if general.cheapens and _same_drafts(f.plan, general)]
        to_beat = max(own, default=1.0)  # without self-drafts, the general plan is predicted to be plain decoding
        found = [f.plan for f in ranked if f.plan.cheapens and f.speedup > to_beat]
        lookup = self.settings.lookup
        return [plan.with_policy(replace(plan.policy, lookup=lookup)) for plan in found[:_NUM_FINALISTS]]

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
            "routing": {
                "held_out": anchors.held_out,
                "accuracy": anchors.accuracy,
                "beyond_radius": anchors.beyond_radius,
            },
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


def _agreement(finished: Sequence[FinishedTrial], plan: Plan) -> float | None:
    """Share of positions at which the drafts of a plan agreed in the search; None if it was not tried."""
    return next((f.agreement for f in finished if _same_drafts(f.plan, plan)), None)


def _same_drafts(a: Plan, b: Plan) -> bool:
    """Whether two plans run the same sublayers in the same modes."""
    return (a.modes, a.head) == (b.modes, b.head)


def _trial_json(finished: FinishedTrial) -> dict[str, Any]:
    return {"plan": finished.plan.to_json(), "score": finished.speedup, "agreement": finished.agreement}


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
