"""Who drafts how far in each step of vLLM: the proposer that it loads by its method `custom_class`.

One rank decides and tells the others what to run: ranks that decided by their own clocks and roundings could run
different passes, and wait for each other for ever.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from knn_ssd.errors import UsageError
from knn_ssd.plan import Plan
from knn_ssd.routing.router import Router
from knn_ssd.sampling import most_likely
from knn_ssd.speculation.acceptance import AcceptanceStats, initial_acceptance
from knn_ssd.speculation.controller import DraftStopRule, best_draft_length, is_faster_than_plain
from knn_ssd.speculation.cost_model import CostModel, typical_profile
from knn_ssd.speculation.drafter import Draft
from knn_ssd.speculation.self_draft import top_probability
from knn_ssd.vllm_plugin import hooks
from knn_ssd.vllm_plugin.draft_groups import Group, group
from knn_ssd.vllm_plugin.forward import Passes
from knn_ssd.vllm_plugin.layers import Stack
from knn_ssd.vllm_plugin.patches import mend
from knn_ssd.vllm_plugin.routing import PromptVector, check_model
from knn_ssd.vllm_plugin.settings import read_settings, refuse_unsuitable

_log = logging.getLogger("vllm.knn_ssd")
_LOG_SEC = 10.0
_PLAIN_STEPS = 3  # without drafts, that are timed before any draft, and then one
_PLAIN_EVERY = 128  # steps


@dataclass
class RequestState:
    """What is known of a request.

    Args:
        vector: of its prompt, as far as that was read; None once it has its domain, or where all have one plan.
        domain: whose plan drafts for it; None is the fallback, or the plan for all.
        drafted: its last draft.
        sure: how likely the draft held each of these tokens to be right.
    """

    vector: PromptVector | None
    domain: str | None = None
    drafted: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks run in a step.

    Args:
        groups: of rows that draft together.
        limits: the longest draft of each row.
    """

    groups: tuple[Group, ...] = ()
    limits: dict[int, int] = field(default_factory=dict)


class Proposer:
    """Drafts with the target's own layers, under the plan of each prompt's nearest anchor (arXiv 2505.16162).

    Args:
        config: vLLM's `VllmConfig`.

    Attributes:
        counts: by domain, how many requests were routed there, and tokens drafted and accepted.

    Raises:
        UsageError: settings that cannot be used, a vLLM that is not known, or a feature of it that drafts would damage.
        AtlasError: the atlas cannot be read, or is of another model.
    """

    def __init__(self, config: Any) -> None:
        hooks.check()
        self._settings = read_settings(config.additional_config)
        refuse_unsuitable(config, self._settings)
        mend()
        self._config = config
        self._longest = int(config.num_speculative_tokens)
        self._plans = self._settings.plans
        atlas = self._settings.atlas
        layers = self._plans[None].num_layers
        self._cost_model = CostModel(atlas.cost if atlas is not None else typical_profile(layers))
        self._acceptance: dict[str | None, AcceptanceStats] = {
            domain: initial_acceptance(plan, atlas.evidence_of(domain).get("agreement") if atlas is not None else None)
            for domain, plan in self._plans.items()
        }
        self._requests: dict[str, RequestState] = {}
        self._finished_at: float | None = None  # the last step's drafting
        self._last_rows: set[str] = set()
        self._until_plain: dict[int, int] = {}  # by the batch's size, in powers of two: steps that may still draft
        self._plain_steps: dict[int, int] = {}  # and how many without drafts were timed
        self._logged_at = time.perf_counter()
        self.counts: dict[str, dict[str, int]] = {}

    def load_model(self, model: Any) -> None:
        """Takes the loaded target, whose layers will draft."""
        from vllm.distributed import get_tp_group

        self._stack = Stack(model)
        if self._stack.why_no_low is not None and any(plan.uses_low for plan in self._plans.values()):
            _log.warning("%s: sublayers that plans have low run as they are", self._stack.why_no_low)
            self._plans = {domain: _without_low(plan) for domain, plan in self._plans.items()}
        self._ranks = get_tp_group()
        atlas = self._settings.atlas
        self._router: Router | None = None
        self._passes: Passes | None = None
        if atlas is not None:
            check_model(atlas, self._config.model_config)
            self._router = Router.of(atlas, self._settings.neighbours, self._stack.device)

    def propose(self, *_args: Any, **_kwargs: Any) -> list[list[int]]:
        """What vLLM calls where the hook is not in place, which `hooks.check` has refused already."""
        raise UsageError("vLLM called knn-ssd's proposer without the plugin's hook", "Load the plugin 'knn_ssd'.")

    @torch.inference_mode()
    def propose_in_runner(
        self,
        runner: Any,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        _sampling_metadata: Any,
        hidden_states: torch.Tensor,
        *_others: Any,
        **_named: Any,
    ) -> list[list[int]]:
        """Drafts for each row of the batch; the arguments are those of vLLM's own method.

        Args:
            runner: vLLM's model runner.
            scheduler_output: of this step.
            sampled_token_ids: what this step added to each row; nothing in mid-prompt.
            hidden_states: (n, D) after the final norm, of all tokens of the step.
        """
        started = time.perf_counter()
        self._passes = self._passes or Passes(runner, self._stack)
        self._read_prompts(runner, scheduler_output, hidden_states)
        decision = Decision()
        if self._leads:
            self._learn(runner, scheduler_output, sampled_token_ids, started)
            decision = self._decide(runner, sampled_token_ids)
        decision = self._told(decision)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for each in decision.groups:
            self._draft(runner, each, decision.limits, drafts)
        self._finished_at = time.perf_counter()
        self._last_rows = {
            name for name, new in zip(runner.input_batch.req_ids, sampled_token_ids, strict=False) if new
        }
        self._log()
        return drafts

    @property
    def _leads(self) -> bool:
        return bool(self._ranks.rank_in_group == 0)

    def _told(self, value: Any) -> Any:
        """The leading rank's value, on all ranks."""
        return self._ranks.broadcast_object(value, src=0) if self._ranks.world_size > 1 else value

    def _read_prompts(self, runner: Any, scheduler_output: Any, hidden_states: torch.Tensor) -> None:
        """Routes the requests whose prompts end in this step."""
        for name in scheduler_output.finished_req_ids:
            self._requests.pop(name, None)
        batch, first = runner.input_batch, 0
        for row, name in enumerate(batch.req_ids):
            count = scheduler_output.num_scheduled_tokens[name]
            request = self._requests.get(name)
            if request is None:
                request = self._requests[name] = RequestState(self._new_vector(int(batch.num_prompt_tokens[row])))
                if request.vector is None:
                    self._count(None, "requests", 1)
            if request.vector is not None:
                assert self._router is not None
                start = int(batch.num_computed_tokens_cpu[row])
                pooled = request.vector.add(hidden_states[first : first + count], start)
                if pooled is not None:
                    request.domain = self._told(self._router.predict(pooled).plan_domain if self._leads else None)
                    request.vector = None
                    self._count(request.domain, "requests", 1)
            first += count

    def _new_vector(self, prompt_length: int) -> PromptVector | None:
        atlas = self._settings.atlas
        return PromptVector(atlas.pooling, prompt_length) if atlas is not None else None

    def _learn(self, runner: Any, scheduler_output: Any, sampled_token_ids: list[list[int]], started: float) -> None:
        """What became of the last drafts, and what their verification took."""
        names = runner.input_batch.req_ids
        for name, new in zip(names, sampled_token_ids, strict=False):
            request = self._requests[name]
            verified = [t for t in scheduler_output.scheduled_spec_decode_tokens.get(name, ()) if t >= 0]
            if new and verified and tuple(verified) == request.drafted[: len(verified)]:
                accepted = len(new) - 1
                acceptance = self._acceptance[request.domain]
                acceptance.record(Draft(tuple(verified), confidences=request.confidences[: len(verified)]), accepted)
                self._count(request.domain, "drafted", len(verified))
                self._count(request.domain, "accepted", accepted)
            request.drafted, request.confidences = (), ()
        rows = int(scheduler_output.total_num_scheduled_tokens)
        decoding = all(new for new in sampled_token_ids) and self._last_rows.issuperset(names)
        if decoding and self._finished_at is not None:
            self._cost_model.record_verification(rows, started - self._finished_at)
            if rows == len(names):
                size = rows.bit_length()
                self._plain_steps[size] = self._plain_steps.get(size, 0) + 1
                if self._plain_steps[size] >= _PLAIN_STEPS:
                    self._until_plain[size] = _PLAIN_EVERY

    def _decide(self, runner: Any, sampled_token_ids: list[list[int]]) -> Decision:
        """Groups of rows, and how far each may draft."""
        names = runner.input_batch.req_ids
        if self._settings.adaptive and not self._knows_plain(len(names)):
            return Decision()
        room = {
            row: self._room(runner, row, name)
            for row, (name, new) in enumerate(zip(names, sampled_token_ids, strict=False))
            if new and self._requests[name].vector is None
        }
        by_domain: dict[str | None, list[int]] = {}
        for row in room:
            by_domain.setdefault(self._requests[names[row]].domain, []).append(row)
        self._cost_model.observe_batch(max(len(room), 1))
        limits: dict[int, int] = {}
        for domain, rows in by_domain.items():
            length = self._length(domain, len(rows))
            limits |= {row: min(length, room[row]) for row in rows}
        wanted = [(row, self._plans[self._requests[names[row]].domain], limit) for row, limit in limits.items()]
        return Decision(tuple(group(wanted, self._cost_model)), limits)

    def _knows_plain(self, rows: int) -> bool:
        """Whether it was timed, not long ago, what steps of such batches take without drafts.

        They are what drafting must be faster than, and while every step drafts, nothing tells of them.
        """
        size = rows.bit_length()
        self._until_plain[size] = self._until_plain.get(size, 0) - 1
        return self._until_plain[size] >= 0

    def _room(self, runner: Any, row: int, name: str) -> int:
        """How many drafted tokens a request could use, and has slots for."""
        assert self._passes is not None
        known = int(runner.input_batch.num_tokens_no_spec[row])
        params = runner.requests[name].sampling_params
        most = getattr(params, "max_tokens", None)
        left = self._longest if most is None else most - (known - int(runner.input_batch.num_prompt_tokens[row])) - 1
        return max(min(self._longest, left, self._passes.room(row) - known), 0)

    def _length(self, domain: str | None, rows: int) -> int:
        """How far requests of a domain may draft, so many of them in the batch."""
        plan = self._plans[domain]
        longest = min(plan.policy.max_draft, self._longest)
        if not self._settings.adaptive or not longest:
            return longest
        if not plan.cheapens:
            return 0
        acceptance, step = self._acceptance[domain], self._step(plan, rows)
        option = best_draft_length(self._cost_model, acceptance.self_draft.mean, longest, step)
        if is_faster_than_plain(self._cost_model, option):
            return longest
        return int(acceptance.self_draft_retry.is_due())

    def _step(self, plan: Plan, rows: int) -> float:
        """What one row bears of a pass that drafts a token for so many."""
        return self._cost_model.draft_pass_sec(plan, rows) / max(rows, 1)

    def _stops(self, runner: Any, rows: Sequence[int], plan: Plan) -> dict[int, Callable[[float], bool]]:
        """For each row, whether it goes on after a token of so much top probability."""
        requests = {row: self._requests[runner.input_batch.req_ids[row]] for row in rows}
        if not self._settings.adaptive:
            thresholds = {row: self._plans[request.domain].policy.threshold for row, request in requests.items()}
            return {row: partial(operator.le, least) for row, least in thresholds.items()}
        step = self._step(plan, len(rows))
        going: dict[int, Callable[[float], bool]] = {}
        for row, request in requests.items():
            acceptance = self._acceptance[request.domain]
            option = best_draft_length(self._cost_model, acceptance.self_draft.mean, self._longest, step)
            going[row] = DraftStopRule(self._cost_model, acceptance, step, option.sec_per_token)
        return going

    def _draft(self, runner: Any, own: Group, limits: dict[int, int], drafts: list[list[int]]) -> None:
        """Drafts for the rows of a group, into `drafts`."""
        assert self._passes is not None
        started, passes = time.perf_counter(), 0
        batch = runner.input_batch
        known = {row: int(batch.num_tokens_no_spec[row]) for row in own.rows}
        stops = self._stops(runner, own.rows, own.plan) if self._leads else {}
        confidences: dict[int, list[float]] = {row: [] for row in own.rows}
        active = [row for row in own.rows if limits[row]]
        while active:
            tokens = [
                drafts[row][-1] if drafts[row] else int(batch.token_ids_cpu[row, known[row] - 1]) for row in active
            ]
            positions = [known[row] - 1 + len(drafts[row]) for row in active]
            logits = self._passes.logits(active, tokens, positions, own.plan)
            passes += 1
            chosen: list[tuple[int, bool]] = []
            if self._leads:
                tops = top_probability(logits).tolist()
                chosen = [
                    (token, stops[row](top)) for row, token, top in zip(active, most_likely(logits), tops, strict=True)
                ]
                for row, top in zip(active, tops, strict=True):
                    confidences[row].append(top)
            chosen = self._told(chosen)
            for row, (token, _) in zip(active, chosen, strict=True):
                drafts[row].append(token)
            active = [
                row
                for row, (_, goes_on) in zip(active, chosen, strict=True)
                if goes_on and len(drafts[row]) < limits[row]
            ]
        for row in own.rows:
            request = self._requests[batch.req_ids[row]]
            request.drafted, request.confidences = tuple(drafts[row]), tuple(confidences[row])
        if passes:
            self._cost_model.record_draft_steps(own.plan, passes, time.perf_counter() - started, len(own.rows))

    def _count(self, domain: str | None, what: str, number: int) -> None:
        name = domain or ("fallback" if self._settings.atlas is not None else "plan")
        counts = self.counts.setdefault(name, {"requests": 0, "drafted": 0, "accepted": 0})
        counts[what] += number

    def _log(self) -> None:
        now = time.perf_counter()
        if not self._leads or now - self._logged_at < _LOG_SEC:
            return
        self._logged_at = now
        told = (f"{name} {c['accepted']}/{c['drafted']} in {c['requests']}" for name, c in sorted(self.counts.items()))
        _log.info("Accepted of drafted tokens by plan, and requests: %s", ", ".join(told))


def _without_low(plan: Plan) -> Plan:
    return Plan.skipping(plan.num_layers, plan.skipped_attention, plan.skipped_mlp, plan.policy)
