"""The proposer that vLLM loads by its method `custom_class`: which requests draft, and how far, in each step.

The first rank of the tensor-parallel group decides and broadcasts what to run. Ranks that decided by their own clocks
and rounding could run different forward passes, and would wait for each other for ever.
"""

from __future__ import annotations

import logging
import operator
import time
from collections import defaultdict
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
from knn_ssd.speculation.controller import SelfDraftChoice
from knn_ssd.speculation.cost_model import CostModel, PlainTiming, typical_profile
from knn_ssd.speculation.drafter import Draft
from knn_ssd.speculation.self_draft import top_probability
from knn_ssd.vllm_plugin import hooks
from knn_ssd.vllm_plugin.draft_groups import DraftGroup, group_drafts
from knn_ssd.vllm_plugin.forward import DraftForward
from knn_ssd.vllm_plugin.layers import DecoderStack
from knn_ssd.vllm_plugin.patches import patch_cpu_sampler
from knn_ssd.vllm_plugin.routing import PromptVector, check_model
from knn_ssd.vllm_plugin.settings import read_settings, refuse_unsuitable

_log = logging.getLogger("vllm.knn_ssd")
_LOG_SEC = 10.0
_FIRST_PLAIN = 3  # plain steps that are timed for a batch size before its first draft
_PLAIN_EVERY = 128  # steps between two plain ones after that


@dataclass
class RequestState:
    """The state of one request.

    Args:
        vector: collects the prompt vector during prefill; None once the request is routed, or without an atlas.
        domain: its plan drafts for the request; None is the fallback plan, or the one plan of a server without an
            atlas.
        draft_token_ids: the last draft.
        confidences: the draft's own top-1 probability of each of these tokens.
    """

    vector: PromptVector | None
    domain: str | None = None
    draft_token_ids: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks run in a step.

    Args:
        groups: rows that draft together.
        limits: the longest draft of each row.
    """

    groups: tuple[DraftGroup, ...] = ()
    limits: dict[int, int] = field(default_factory=dict)


class Proposer:
    """Drafts with the target's own layers, under the plan of each prompt's nearest anchor (arXiv 2505.16162).

    Args:
        config: vLLM's `VllmConfig`.

    Attributes:
        counts: for each domain, the number of routed requests and of drafted and accepted tokens.

    Raises:
        UsageError: settings that cannot be used, an unsupported version of vLLM, or a feature of it that is unsafe
            with these drafts.
        AtlasError: the atlas cannot be read, or belongs to another model.
    """

    def __init__(self, config: Any) -> None:
        hooks.check()
        self._settings = read_settings(config.additional_config)
        refuse_unsuitable(config, self._settings)
        patch_cpu_sampler()
        self._config = config
        self._max_draft = int(config.num_speculative_tokens)
        self._plans = self._settings.plans
        atlas = self._settings.atlas
        layers = self._plans[None].num_layers
        self._cost_model = CostModel(atlas.cost if atlas is not None else typical_profile(layers))
        self._acceptance: dict[str | None, AcceptanceStats] = {
            domain: initial_acceptance(plan, atlas.evidence_of(domain).get("agreement") if atlas is not None else None)
            for domain, plan in self._plans.items()
        }
        self._requests: dict[str, RequestState] = {}
        self._finished_at: float | None = None  # when the last step's drafting ended
        self._decoding: set[str] = set()  # requests that got tokens in the last step
        self._plain_timing: defaultdict[int, PlainTiming] = defaultdict(lambda: PlainTiming(_plain_interval))
        self._logged_at = time.perf_counter()
        self.counts: dict[str, dict[str, int]] = {}

    def load_model(self, model: Any) -> None:
        """Takes the loaded target model, whose layers will draft."""
        from vllm.distributed import get_tp_group

        self._stack = DecoderStack(model)
        if self._stack.low_bit_obstacle is not None and any(plan.uses_low for plan in self._plans.values()):
            _log.warning("%s: sublayers of mode low run in full precision", self._stack.low_bit_obstacle)
            self._plans = {domain: _without_low(plan) for domain, plan in self._plans.items()}
        self._ranks = get_tp_group()
        atlas = self._settings.atlas
        self._router: Router | None = None
        self._forward: DraftForward | None = None
        if atlas is not None:
            check_model(atlas, self._config.model_config)
            self._router = Router.of(atlas, self._settings.neighbours, self._stack.device)

    def propose(self, *_args: Any, **_kwargs: Any) -> list[list[int]]:
        """Raises a `UsageError`: vLLM calls this only without the plugin's hook, which `hooks.check` has refused."""
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
        """Draft token ids for each row of the batch; the arguments are those of vLLM's `propose_draft_token_ids`.

        Args:
            runner: vLLM's model runner.
            scheduler_output: this step's `SchedulerOutput`.
            sampled_token_ids: the tokens that this step added to each row; none in the middle of a prompt.
            hidden_states: (n, D) after the final norm, of all scheduled tokens.
        """
        started = time.perf_counter()
        self._forward = self._forward or DraftForward(runner, self._stack)
        self._route_requests(runner, scheduler_output, hidden_states)
        decision = Decision()
        if self._is_first_rank:
            self._learn(runner, scheduler_output, sampled_token_ids, started)
            decision = self._decide(runner, sampled_token_ids)
        decision = self._broadcast(decision)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for each in decision.groups:
            self._draft(runner, each, decision.limits, drafts)
        self._finished_at = time.perf_counter()
        sampled = zip(runner.input_batch.req_ids, sampled_token_ids, strict=False)
        self._decoding = {req_id for req_id, token_ids in sampled if token_ids}
        self._log()
        return drafts

    @property
    def _is_first_rank(self) -> bool:
        return bool(self._ranks.rank_in_group == 0)

    def _broadcast(self, value: Any) -> Any:
        """The first rank's value, on all ranks."""
        return self._ranks.broadcast_object(value, src=0) if self._ranks.world_size > 1 else value

    def _route_requests(self, runner: Any, scheduler_output: Any, hidden_states: torch.Tensor) -> None:
        """Routes the requests whose prefill ends in this step, and forgets the finished ones."""
        for req_id in scheduler_output.finished_req_ids:
            self._requests.pop(req_id, None)
        batch, first = runner.input_batch, 0
        for row, req_id in enumerate(batch.req_ids):
            count = scheduler_output.num_scheduled_tokens[req_id]
            request = self._requests.get(req_id)
            if request is None:
                request = self._requests[req_id] = RequestState(self._new_vector(int(batch.num_prompt_tokens[row])))
                if request.vector is None:
                    self._count(None, "requests", 1)
            if request.vector is not None:
                assert self._router is not None
                start = int(batch.num_computed_tokens_cpu[row])
                pooled = request.vector.add(hidden_states[first : first + count], start)
                if pooled is not None:
                    domain = self._router.predict(pooled).plan_domain if self._is_first_rank else None
                    request.domain = self._broadcast(domain)
                    request.vector = None
                    self._count(request.domain, "requests", 1)
            first += count

    def _new_vector(self, prompt_length: int) -> PromptVector | None:
        atlas = self._settings.atlas
        return PromptVector(atlas.pooling, prompt_length) if atlas is not None else None

    def _learn(self, runner: Any, scheduler_output: Any, sampled_token_ids: list[list[int]], started: float) -> None:
        """Records what was accepted of the last drafts, and how long their verification took."""
        req_ids = runner.input_batch.req_ids
        for req_id, sampled in zip(req_ids, sampled_token_ids, strict=False):
            request = self._requests[req_id]
            scheduled = scheduler_output.scheduled_spec_decode_tokens.get(req_id, ())
            verified = tuple(token for token in scheduled if token >= 0)
            if sampled and verified and verified == request.draft_token_ids[: len(verified)]:
                accepted = len(sampled) - 1
                draft = Draft(verified, confidences=request.confidences[: len(verified)])
                self._acceptance[request.domain].record(draft, accepted)
                self._count(request.domain, "drafted", len(verified))
                self._count(request.domain, "accepted", accepted)
            request.draft_token_ids, request.confidences = (), ()
        rows = int(scheduler_output.total_num_scheduled_tokens)
        only_decode = all(sampled_token_ids) and self._decoding.issuperset(req_ids)
        if only_decode and self._finished_at is not None:
            self._cost_model.record_verification(rows, started - self._finished_at)
            if rows == len(req_ids):
                self._plain_timing[rows.bit_length()].record_plain()

    def _decide(self, runner: Any, sampled_token_ids: list[list[int]]) -> Decision:
        """Groups rows for drafting, and says how far each may draft."""
        req_ids = runner.input_batch.req_ids
        if self._settings.adaptive and self._needs_plain_step(len(req_ids)):
            return Decision()
        room = {
            row: self._room(runner, row, req_id)
            for row, (req_id, sampled) in enumerate(zip(req_ids, sampled_token_ids, strict=False))
            if sampled and self._requests[req_id].vector is None
        }
        by_domain: dict[str | None, list[int]] = {}
        for row in room:
            by_domain.setdefault(self._requests[req_ids[row]].domain, []).append(row)
        self._cost_model.observe_batch(max(len(room), 1))
        limits: dict[int, int] = {}
        for domain, rows in by_domain.items():
            length = self._allowed_length(domain, len(rows))
            limits |= {row: min(length, room[row]) for row in rows}
        wanted = [(row, self._plans[self._requests[req_ids[row]].domain], limit) for row, limit in limits.items()]
        return Decision(tuple(group_drafts(wanted, self._cost_model)), limits)

    def _needs_plain_step(self, batch_size: int) -> bool:
        """Whether this step must not draft, so that plain decoding is timed at such batch sizes."""
        timing = self._plain_timing[batch_size.bit_length()]
        if timing.is_due:
            return True
        timing.count_step()
        return False

    def _room(self, runner: Any, row: int, req_id: str) -> int:
        """How many draft tokens a request could use, and has slots for."""
        assert self._forward is not None
        length = int(runner.input_batch.num_tokens_no_spec[row])
        max_tokens = getattr(runner.requests[req_id].sampling_params, "max_tokens", None)
        left = self._max_draft
        if max_tokens is not None:
            left = max_tokens - (length - int(runner.input_batch.num_prompt_tokens[row])) - 1
        return max(min(self._max_draft, left, self._forward.num_slots(row) - length), 0)

    def _allowed_length(self, domain: str | None, num_requests: int) -> int:
        """How far requests of a domain may draft in this step, if `num_requests` of them draft together."""
        plan = self._plans[domain]
        longest = min(plan.policy.max_draft, self._max_draft)
        if not self._settings.adaptive or not longest:
            return longest
        if not plan.cheapens:
            return 0
        step_sec = self._cost_model.draft_step_sec(plan, num_requests)
        return SelfDraftChoice(self._cost_model, self._acceptance[domain], longest, step_sec).allowed_length()

    def _stop_rules(self, runner: Any, group: DraftGroup) -> dict[int, Callable[[float], bool]]:
        """For each row, a function that takes the newest token's confidence and says whether to draft another one."""
        domains = {row: self._requests[runner.input_batch.req_ids[row]].domain for row in group.rows}
        if not self._settings.adaptive:
            return {row: partial(operator.le, self._plans[each].policy.threshold) for row, each in domains.items()}
        step_sec = self._cost_model.draft_step_sec(group.plan, len(group.rows))
        return {
            row: SelfDraftChoice(self._cost_model, self._acceptance[each], self._max_draft, step_sec).stop_rule()
            for row, each in domains.items()
        }

    def _draft(self, runner: Any, group: DraftGroup, limits: dict[int, int], drafts: list[list[int]]) -> None:
        """Drafts for the rows of a group, into `drafts`."""
        started, passes = time.perf_counter(), 0
        batch = runner.input_batch
        stop_rules = self._stop_rules(runner, group) if self._is_first_rank else {}
        confidences: dict[int, list[float]] = {row: [] for row in group.rows}
        active = [row for row in group.rows if limits[row]]
        while active:
            logits = self._draft_logits(batch, active, group.plan, drafts)
            passes += 1
            chosen: list[tuple[int, bool]] = []
            if self._is_first_rank:
                tops = top_probability(logits).tolist()
                tokens = most_likely(logits)
                chosen = [(token, stop_rules[row](top)) for row, token, top in zip(active, tokens, tops, strict=True)]
                for row, top in zip(active, tops, strict=True):
                    confidences[row].append(top)
            chosen = self._broadcast(chosen)
            for row, (token, _) in zip(active, chosen, strict=True):
                drafts[row].append(token)
            going_on = (row for row, (_, goes_on) in zip(active, chosen, strict=True) if goes_on)
            active = [row for row in going_on if len(drafts[row]) < limits[row]]
        for row in group.rows:
            request = self._requests[batch.req_ids[row]]
            request.draft_token_ids, request.confidences = tuple(drafts[row]), tuple(confidences[row])
        if passes:
            seconds = time.perf_counter() - started
            self._cost_model.record_draft_steps(group.plan, passes, seconds, len(group.rows))

    def _draft_logits(self, batch: Any, rows: Sequence[int], plan: Plan, drafts: list[list[int]]) -> torch.Tensor:
        """Logits (n, V) after the newest token, drafted or sampled, of each of n rows."""
        assert self._forward is not None
        last = {row: int(batch.num_tokens_no_spec[row]) - 1 for row in rows}  # position of the last sampled token
        tokens = [drafts[row][-1] if drafts[row] else int(batch.token_ids_cpu[row, last[row]]) for row in rows]
        positions = [last[row] + len(drafts[row]) for row in rows]
        return self._forward.logits(rows, tokens, positions, plan)

    def _count(self, domain: str | None, what: str, number: int) -> None:
        name = domain or ("fallback" if self._settings.atlas is not None else "plan")
        counts = self.counts.setdefault(name, {"requests": 0, "drafted": 0, "accepted": 0})
        counts[what] += number

    def _log(self) -> None:
        now = time.perf_counter()
        if not self._is_first_rank or now - self._logged_at < _LOG_SEC:
            return
        self._logged_at = now
        parts = (f"{name} {c['accepted']}/{c['drafted']} in {c['requests']}" for name, c in sorted(self.counts.items()))
        _log.info("Accepted of drafted tokens by plan, and requests: %s", ", ".join(parts))


def _plain_interval(timed: int) -> int:
    return _PLAIN_EVERY if timed >= _FIRST_PLAIN else 0


def _without_low(plan: Plan) -> Plan:
    return Plan.skipping(plan.num_layers, plan.skipped_attention, plan.skipped_mlp, plan.policy)
