"""SWIFT (arXiv 2410.06916): the sublayers to skip are searched for while decoding, on the model's own output so far.

In each round one candidate set of the same size is scored, teacher-forced, on the last tokens of the output; it
replaces the set in use if its draft agrees with them more often. Most candidates are random; at intervals one is the
proposal of a Bayesian optimiser. The search continues from prompt to prompt, and ends when the set is good enough or
has not improved for long.

Implemented from the paper's description, sections 4.1 and 4.2, with this package's rounds. Its tree of candidate tokens
is left out: a round here verifies one sequence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import optuna
from optuna.distributions import FloatDistribution

from knn_ssd.backends.base import Session
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.sampling import Sampler, most_likely
from knn_ssd.speculation.drafter import Draft, Outcome
from knn_ssd.speculation.self_draft import SelfDraft

MIN_LAYERS = 3  # the first and the last are never skipped


@dataclass(frozen=True, slots=True)
class SwiftSettings:
    """Settings of the search. The defaults are those of the released evaluation script, and for the policy of arXiv
    2505.16162.

    Args:
        share: share of the sublayers between the first and the last layer that is skipped.
        window: number of last output tokens that a candidate is scored on.
        optimiser_every: number of candidates of which one is proposed by the optimiser.
        max_steps: number of candidates in all.
        patience: number of candidates without an improvement after which the search ends.
        good_enough: agreement at which the search ends.
        policy: the draft policy.
    """

    share: float = 0.45
    window: int = 50
    optimiser_every: int = 25
    max_steps: int = 1000
    patience: int = 300
    good_enough: float = 0.93
    policy: Policy = field(default_factory=lambda: Policy(12, 0.8))


class SwiftSearch:
    """The set of skipped sublayers that all requests share, and the search for a better one.

    Args:
        num_layers: number of layers, L; at least `MIN_LAYERS`.
        settings: the settings of the search.
        seed: seed of the candidates.
    """

    def __init__(self, num_layers: int, settings: SwiftSettings | None = None, seed: int = 0) -> None:
        self.settings = settings or SwiftSettings()
        self._num_layers = num_layers
        self._places = range(2, 2 * num_layers - 2)  # in Plan.modes
        self._size = round(self.settings.share * len(self._places))
        self._random = random.Random(seed)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        self.steps = self._last_better = 0
        self.agreement = -1.0  # of the set in use; below 0 until it is scored
        self.plan = self._plan(self._random.sample(self._places, self._size))

    @property
    def done(self) -> bool:
        """Whether the search has ended."""
        settings = self.settings
        return (
            self._size == 0
            or self.agreement >= settings.good_enough
            or self.steps >= settings.max_steps
            or self.steps - self._last_better >= settings.patience
        )

    def step(self, session: Session, context: Sequence[int]) -> None:
        """Scores one candidate on the last tokens of a context, of which the session holds all but the last token."""
        weights, chosen = self._candidate()
        plan = self.plan if self.agreement < 0 else self._plan(chosen)
        window = self.settings.window
        with session.rewound(window):
            logits = session.teacher_forced_logits(list(context[-window - 1 : -1]), plan, window)  # (window, V)
        guesses = most_likely(logits)
        agreement = sum(guess == token for guess, token in zip(guesses, context[-window:], strict=True)) / window
        self.steps += 1
        if agreement > self.agreement:
            self.plan, self.agreement, self._last_better = plan, agreement, self.steps
        skipped = {i for i, mode in enumerate(plan.modes) if mode is Mode.SKIP}
        known = {str(i): (1 + weights[i]) / 2 if i in skipped else weights[i] / 2 for i in self._places}
        distributions = dict.fromkeys(known, FloatDistribution(0.0, 1.0))
        self._study.add_trial(optuna.create_trial(params=known, distributions=dict(distributions), value=agreement))

    def _candidate(self) -> tuple[dict[int, float], list[int]]:
        """A weight in [0, 1] for each sublayer, and the sublayers with the highest weights, which are skipped."""
        if (self.steps + 1) % self.settings.optimiser_every:
            weights = {i: self._random.random() for i in self._places}
        else:
            trial = self._study.ask({str(i): FloatDistribution(0.0, 1.0) for i in self._places})
            weights = {i: float(trial.params[str(i)]) for i in self._places}
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)  # `step` adds it with its score
        return weights, sorted(self._places, key=lambda i: weights[i])[len(self._places) - self._size :]

    def _plan(self, skipped: Sequence[int]) -> Plan:
        attention = [i // 2 for i in skipped if i % 2 == 0]
        return Plan.skipping(self._num_layers, attention, [i // 2 for i in skipped if i % 2], self.settings.policy)


class SwiftDraft:
    """The SWIFT drafter of one request. Each draft is preceded by a step of the shared search.

    Args:
        search: the search that all requests share.
        session: the request's session.
        sampler: the request's sampler.
        prompt_length: number of prompt tokens at the start of the context.
    """

    def __init__(self, search: SwiftSearch, session: Session, sampler: Sampler, prompt_length: int) -> None:
        self._search = search
        self._session = session
        self._sampler = sampler
        self._prompt_length = prompt_length

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        search = self._search
        if not search.done and len(context) - self._prompt_length >= search.settings.window:
            search.step(self._session, context)
        return SelfDraft(self._session, search.plan, self._sampler).propose(context, limit)

    def learn(self, outcome: Outcome) -> None:
        """Does nothing: the search learns from the output, not from acceptance."""
