"""Searches for plans, over the modes of all sublayers and of the LM head: `ask` for a plan, `tell` its score.

A candidate is a set of changes to a base plan. Where the backend has 4-bit weights, the base plan uses them everywhere,
and a change skips or keeps a sublayer, or keeps the head; elsewhere the base plan keeps everything, and a change skips.

All strategies store their trials in an Optuna study, which may lie in a file or a database and be shared by processes:

- `paper`: Bayesian optimisation with a Gaussian process over 2L variables in [0, 1], rounded (arXiv 2309.08168,
  section 3.2, which arXiv 2505.16162 follows).
- `greedy`: each sublayer skipped alone, then the least harmful ones at once in growing numbers, then one change at a
  time to the best plan.
- `bayes`: as greedy, but every second of the single changes is a proposal of a tree-structured Parzen estimator.
- `evolve`: as greedy up to the growing numbers, then a genetic algorithm.

The next plan depends on the finished trials alone, so a killed search resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from knn_ssd.calibrate.objective import Score
from knn_ssd.plan import Mode, Plan
from knn_ssd.speculation.cost_model import CostProfile

# A change is a number. Below 2L it skips the sublayer at that place in Plan.modes (2i is the attention of layer i,
# 2i + 1 its MLP); from 2L it keeps the sublayer at that place less 2L; 4L keeps the head.
Changes = frozenset[int]

_POPULATION = 20
_CHANGES, _AGREEMENT, _PLAN = "changes", "agreement", "plan"


class Strategy(StrEnum):
    PAPER = "paper"
    GREEDY = "greedy"
    BAYES = "bayes"
    EVOLVE = "evolve"


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan to score. Its draft policy is chosen by the scoring."""

    number: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class FinishedTrial:
    """A trial with its score.

    Args:
        changes: the changes to the base plan.
        speedup: the score; the search `paper` scores tokens per second.
        agreement: share of positions at which the draft agreed.
        plan: the plan, with its best draft policy.
    """

    changes: Changes
    speedup: float
    agreement: float
    plan: Plan


def create_study(storage: optuna.storages.BaseStorage | str, name: str) -> optuna.Study:
    """Opens the study of that name, or creates it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)


class Search:
    """The search for the best plan of one domain.

    Args:
        study: stores the trials.
        strategy: chooses the next plan.
        cost: the cost profile of this machine, with what skipping a sublayer saves.
        num_layers: number of layers of the target model, L.
        seed: seed of Optuna's sampler.
        low: whether the base plan uses 4-bit weights.
        skip: whether sublayers may be skipped; otherwise the only changes are those that keep something.
        shared: trials of another search, each with a single change, that replace this search's own trials of single
            changes; for a search with too few trials to make them.
    """

    def __init__(
        self,
        study: optuna.Study,
        strategy: Strategy,
        cost: CostProfile,
        *,
        num_layers: int,
        seed: int = 0,
        low: bool = False,
        skip: bool = True,
        shared: Sequence[FinishedTrial] = (),
    ) -> None:
        self._study = study
        self._strategy = strategy
        self._cost = cost
        self._num_layers = num_layers
        self._low = low and strategy is not Strategy.PAPER
        self._skippable = range(2 * num_layers) if skip else range(0)
        self._shared = shared
        self._asked: dict[int, optuna.trial.Trial] = {}
        self._sampler = _ProposalSampler(_sampler(strategy, seed + len(self.finished())))

    def ask(self) -> Trial | None:
        """The next plan to score; None when the strategy has no plan left."""
        proposal = self._propose()
        if proposal is None and self._strategy is Strategy.GREEDY:
            return None
        self._sampler.proposal = None if proposal is None else self._params(proposal)
        self._study.sampler = self._sampler
        trial = self._study.ask(self._distributions())
        changes = self._read(trial.params)
        trial.set_user_attr(_CHANGES, sorted(changes))
        self._asked[trial.number] = trial
        return Trial(trial.number, self._plan(changes))

    def tell(self, trial: Trial, score: Score) -> None:
        """Records the score of a trial."""
        asked = self._asked.pop(trial.number)
        asked.set_user_attr(_AGREEMENT, score.agreement)
        asked.set_user_attr(_PLAN, score.plan.to_json())
        self._study.tell(asked, score.speedup)

    def finished(self) -> list[FinishedTrial]:
        """All finished trials, those of other processes included."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [
            FinishedTrial(
                frozenset(trial.user_attrs[_CHANGES]),
                trial.value or 0.0,
                trial.user_attrs[_AGREEMENT],
                Plan.from_json(trial.user_attrs[_PLAN]),
            )
            for trial in trials
        ]

    def known(self, trial: Trial) -> Score | None:
        """The score of an earlier trial of the same plan, if there is one."""
        for finished in self.finished():
            if finished.changes == self._changes(trial.plan):
                return Score(finished.plan, finished.speedup, finished.agreement, 0)
        return None

    def num_begun(self) -> int:
        """Number of trials finished or running, those of other processes included."""
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        return len(self._study.get_trials(deepcopy=False, states=states))

    def abandon_running(self) -> None:
        """Marks running trials as failed; valid only after a kill, while no other process works on the study."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _propose(self) -> Changes | None:
        if self._strategy is Strategy.PAPER:
            return None
        finished = self.finished()
        trials = self._study.get_trials(deepcopy=False)
        begun = {
            frozenset(t.user_attrs[_CHANGES])
            for t in trials
            if t.state is not TrialState.FAIL and _CHANGES in t.user_attrs
        }
        # The last layers first: if time is short, they are the likeliest to be redundant.
        singles: list[Changes] = [] if self._shared else [frozenset({i}) for i in reversed(self._skippable)]
        for first in (Changes(), *singles):
            if first not in begun:
                return first
        ranked = self._ranked([*self._shared, *finished])
        growing = next_growing_set(ranked, finished, begun)
        if growing is not None or self._strategy is Strategy.EVOLVE:
            return growing
        if self._strategy is Strategy.BAYES and len(finished) % 2:
            return None
        return next_change(ranked, finished, begun, self._keepable())

    def _ranked(self, finished: Sequence[FinishedTrial]) -> list[int]:
        """Sublayers by the agreement lost per second saved when they are skipped, the least harmful first."""
        singles = {min(f.changes): f for f in finished if len(f.changes) == 1}
        loss = {i: 1 - f.agreement for i, f in singles.items() if i < 2 * self._num_layers}
        saved = [max(sec, 1e-9) for sec in (self._cost.attention_sec, self._cost.mlp_sec)]
        return sorted(loss, key=lambda i: (loss[i] / saved[i % 2], -saved[i % 2]))

    def _keepable(self) -> list[int]:
        """Changes that keep something: the head first, then the layers in order, since the first ones matter most."""
        places = 2 * self._num_layers
        return [2 * places, *range(places, 2 * places)] if self._low else []

    def _params(self, changes: Changes) -> dict[str, Any]:
        if not self._low:
            return {_name(i): i in changes for i in range(2 * self._num_layers)}
        plan = self._plan(changes)
        return {**{_name(i): mode.value for i, mode in enumerate(plan.modes)}, "head": plan.head.value}

    def _distributions(self) -> dict[str, Any]:
        names = [_name(i) for i in range(2 * self._num_layers)]
        if self._low:
            skip = (Mode.SKIP.value,) * bool(self._skippable)
            modes = CategoricalDistribution((Mode.LOW.value, Mode.KEEP.value, *skip))
            return {**dict.fromkeys(names, modes), "head": CategoricalDistribution((Mode.LOW.value, Mode.KEEP.value))}
        paper = self._strategy is Strategy.PAPER
        return dict.fromkeys(names, FloatDistribution(0.0, 1.0) if paper else CategoricalDistribution((False, True)))

    def _read(self, params: Mapping[str, Any]) -> Changes:
        """The changes that a trial's parameters stand for: the inverse of `_params`."""
        values = [params[_name(i)] for i in range(2 * self._num_layers)]
        if not self._low:
            return frozenset(i for i, value in enumerate(values) if round(float(value)))
        modes = tuple(map(Mode, values))
        return self._changes(Plan(modes[::2], modes[1::2], Mode(params["head"])))

    def _plan(self, changes: Changes) -> Plan:
        places = 2 * self._num_layers
        if not self._low:
            attention = [i // 2 for i in changes if i % 2 == 0]
            return Plan.skipping(self._num_layers, attention, [i // 2 for i in changes if i % 2])
        kept = tuple(Mode.KEEP if places + i in changes else Mode.LOW for i in range(places + 1))
        modes = tuple(Mode.SKIP if i in changes else mode for i, mode in enumerate(kept[:-1]))
        return Plan(modes[::2], modes[1::2], kept[-1])

    def _changes(self, plan: Plan) -> Changes:
        """The changes that make a plan: the inverse of `_plan`."""
        places = 2 * self._num_layers
        skipped = {i for i, mode in enumerate(plan.modes) if mode is Mode.SKIP}
        kept = {places + i for i, mode in enumerate((*plan.modes, plan.head)) if mode is Mode.KEEP}
        return frozenset(skipped | kept) if self._low else frozenset(skipped)


def next_growing_set(ranked: Sequence[int], finished: Sequence[FinishedTrial], begun: set[Changes]) -> Changes | None:
    """The least harmful sublayers skipped at once: 1, 2, 3, 4, 6, 8, … of them, then sizes ever nearer to the best one.

    None where no size is left.
    """
    sizes = [size for size in _growing_sizes(len(ranked)) if frozenset(ranked[:size]) not in begun]
    if sizes:
        return frozenset(ranked[: sizes[0]])
    score = {f.changes: f.speedup for f in finished}
    tried = [n for n in range(1, len(ranked) + 1) if frozenset(ranked[:n]) in score]
    if not tried:
        return None
    at = max(range(len(tried)), key=lambda i: score[frozenset(ranked[: tried[i]])])
    for low, high in zip(tried[max(0, at - 1) : at + 1], tried[at : at + 2], strict=False):
        between = frozenset(ranked[: (low + high) // 2])
        if between not in begun:
            return between
    return None


def next_change(
    ranked: Sequence[int], finished: Sequence[FinishedTrial], begun: set[Changes], keepable: Sequence[int] = ()
) -> Changes | None:
    """The best set of changes with one difference that was not tried yet; None if all were.

    The differences alternate: skip one more sublayer (the least harmful first), undo one change (the most harmful
    first), keep one more thing.
    """
    best = max(finished, key=lambda f: f.speedup).changes
    places = len(keepable) - 1  # each but the head's has a change that skips the same sublayer
    more = [best - {i + places} | {i} if keepable else best | {i} for i in ranked if i not in best]
    fewer = [best - {i} for i in reversed([*ranked, *keepable]) if i in best]
    kept = [best - {i - places} | {i} for i in keepable if i not in best]
    width = max(len(more), len(fewer), len(kept))
    options = [group[i] for i in range(width) for group in (more, fewer, kept) if i < len(group)]
    return next((changes for changes in options if changes not in begun), None)


def _growing_sizes(limit: int) -> list[int]:
    sizes = [1, 2, 3, 4]
    while sizes[-1] < limit:
        sizes.append(sizes[-1] + max(1, sizes[-1] // 2))
    return [size for size in sizes if size < limit] + [limit] * (limit > 0)


def _sampler(strategy: Strategy, seed: int) -> optuna.samplers.BaseSampler:
    if strategy is Strategy.PAPER:
        return optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)
    if strategy is Strategy.EVOLVE:
        return optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


class _ProposalSampler(optuna.samplers.BaseSampler):
    """Wraps a sampler, and samples the values of a proposal instead where there is one.

    Optuna's queue of trials is no substitute: two processes may take the same trial from it, since reading a trial and
    claiming it is not one transaction in SQLite.
    """

    def __init__(self, base: optuna.samplers.BaseSampler) -> None:
        self._base = base
        self.proposal: Mapping[str, Any] | None = None

    def reseed_rng(self) -> None:
        self._base.reseed_rng()

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._base.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampled = self._base.sample_relative(study, trial, search_space)  # also called for what it stores in the trial
        return sampled if self.proposal is None else {}

    def sample_independent(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        if self.proposal is not None:
            return self.proposal[name]
        return self._base.sample_independent(study, trial, name, distribution)

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        self._base.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._base.after_trial(study, trial, state, values)


def _name(sublayer: int) -> str:
    return f"{'mlp' if sublayer % 2 else 'attention'}_{sublayer // 2}"
