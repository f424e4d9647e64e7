"""The methods that a benchmark compares: each is a way to get the output for a prompt, on one and the same model.

The engine's own methods share one target, so they share weights, kernels and low-bit copies, and differ in nothing but
who drafts. Each has its own engine, so that none learns from what another drafted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.session import NativeSession
from knn_ssd.bench.clasp import ClaspDraft
from knn_ssd.bench.records import Record
from knn_ssd.bench.summary import BASELINE
from knn_ssd.bench.swift import LEAST_LAYERS, SwiftDraft, SwiftSearch
from knn_ssd.calibrate.settings import MIXTURE
from knn_ssd.engine import Engine
from knn_ssd.errors import BenchError, UsageError
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.request import Request, end_at
from knn_ssd.sampling import Sampler, SamplingParams
from knn_ssd.speculation.decode import Round
from knn_ssd.speculation.drafter import Drafter
from knn_ssd.tokenization import eos_token_ids
from knn_ssd.tools.memory import peak_bytes

HF, HF_LOOKUP = "hf", "hf-lookup"
DESCRIPTIONS = {
    BASELINE: "the engine without drafts: the baseline",
    HF: "transformers.generate in the same dtype",
    HF_LOOKUP: "transformers.generate with its prompt look-up",
    "self-sd-fix": "skips what is best for the stream's first domain, for all prompts",
    "self-sd-mix": "skips what is best for a mixture of domains, for all prompts",
    "knn-ssd": "skips what is best for the nearest anchor's domain: the paper",
    "swift": "skips what it finds to agree while it serves (arXiv 2410.06916, without its token tree)",
    "clasp": "skips the layers that the last token's states miss least (arXiv 2505.24196)",
    "lookup": "drafts by look-up alone",
    "low": "drafts with everything low-bit, without routing",
    "auto": "what `generate` does: everything, routed and controlled",
}
NEEDS_ATLAS = ("self-sd-fix", "self-sd-mix", "knn-ssd")
_LOOKUP_TOKENS = 10  # as in the documentation of transformers


@dataclass(frozen=True, slots=True)
class Output:
    """What a method made of a prompt.

    Args:
        token_ids: the end-of-sequence token included.
        total_sec: all of it.
        details: fields of `Record` that the method knows.
    """

    token_ids: tuple[int, ...]
    total_sec: float
    details: Mapping[str, Any]


Method = Callable[[list[int], int], Output]
"""From a prompt's token ids and the longest output in tokens to an output."""


def check_names(names: Sequence[str]) -> None:
    """Raises a `UsageError` if there is no such method."""
    unknown = [name for name in names if name not in DESCRIPTIONS]
    if unknown:
        raise UsageError(f"there is no method '{unknown[0]}'", f"Choose from {', '.join(DESCRIPTIONS)}.")


def make_methods(
    names: Sequence[str], engine: Engine, first_domain: str | None = None, temperature: float = 0.0, seed: int = 0
) -> dict[str, Method]:
    """The named methods on an engine's model.

    Args:
        names: of `DESCRIPTIONS`.
        engine: whose model, target and atlas they use.
        first_domain: of the stream.
        temperature: 0 is greedy.
        seed: of sampling.

    Raises:
        UsageError: an unknown name.
        BenchError: one that needs an atlas, or something that the atlas does not have.
    """
    sampling: dict[str, Any] = {"temperature": temperature, "seed": seed} if temperature else {}
    check_names(names)
    for name in names:
        if name in NEEDS_ATLAS and engine.atlas is None:
            raise BenchError(f"the method '{name}' needs an atlas", "Give one with --atlas, or choose other --methods.")
    return {name: _make(name, engine, first_domain, sampling) for name in names}


def _make(name: str, engine: Engine, first_domain: str | None, sampling: dict[str, Any]) -> Method:
    atlas = engine.atlas
    if name == BASELINE:
        return _own(engine, None, sampling, plain=True)
    if name in (HF, HF_LOOKUP):
        return transformers_method(engine, sampling, lookup=name == HF_LOOKUP)
    if name in ("lookup", "low"):
        return _own(engine, None, sampling, plan=_unrouted(name, engine), adaptive=True)
    if name == "auto":
        return _own(engine, atlas, sampling, adaptive=True)
    if name in _CHOOSING:
        return _CHOOSING[name](engine, sampling)
    assert atlas is not None
    return _as_published(name, engine, atlas, first_domain, sampling)


def _unrouted(name: str, engine: Engine) -> Plan:
    """The plan that a method has for all prompts."""
    layers = engine.backend.num_layers
    if name == "lookup":
        return Plan.skipping(layers, policy=Policy(lookup=True))
    if Mode.LOW not in engine.backend.modes:
        raise BenchError(
            "the method 'low' needs low-bit weights, and this model's target has none here",
            "See `knn-ssd doctor`, or choose other --methods.",
        )
    return Plan.low(layers, Policy(lookup=False))


def _swift(engine: Engine, sampling: dict[str, Any]) -> Method:
    layers = engine.backend.num_layers
    if layers < LEAST_LAYERS:
        raise BenchError(
            f"the method 'swift' needs {LEAST_LAYERS} layers, and this model has {layers}", "Choose other --methods."
        )
    search = SwiftSearch(layers, seed=sampling.get("seed", 0))

    def new_drafter(request: Request) -> Drafter:
        return SwiftDraft(search, request.session, request.sampler, request.num_prompt_tokens)

    return _with_drafter(engine, sampling, new_drafter)


def _clasp(engine: Engine, sampling: dict[str, Any]) -> Method:
    backend = engine.backend
    if not isinstance(backend, NativeBackend):
        raise BenchError(
            "the method 'clasp' runs layers one by one, which this model's target cannot",
            "See `knn-ssd doctor`, or choose other --methods.",
        )

    def new_drafter(request: Request) -> Drafter:
        assert isinstance(request.session, NativeSession)
        return ClaspDraft(backend, request.session, request.sampler)

    return _with_drafter(engine, sampling, new_drafter)


_CHOOSING = {"swift": _swift, "clasp": _clasp}  # what to skip, while they serve


def _as_published(
    name: str, engine: Engine, atlas: Atlas, first_domain: str | None, sampling: dict[str, Any]
) -> Method:
    """Drafts that skip, under a fixed policy, routed or not: the methods of arXiv 2505.16162, section 4."""
    if name == "knn-ssd":
        domains = {
            domain: DomainEntry(_skipping(atlas, domain), known.radius) for domain, known in atlas.domains.items()
        }
        skips = replace(atlas, domains=domains, fallback=_skipping(atlas, None))
        return _own(engine, skips, sampling, adaptive=False)
    domain = first_domain if name == "self-sd-fix" else None
    if name == "self-sd-fix" and domain not in atlas.domains:
        raise BenchError(
            f"'self-sd-fix' drafts as for the stream's first domain, '{domain}', and the atlas has "
            f"{', '.join(sorted(atlas.domains))}",
            "Give prompts of the atlas's domains, or choose other --methods.",
        )
    return _own(engine, None, sampling, plan=_skipping(atlas, domain), adaptive=False)


def _skipping(atlas: Atlas, domain: str | None) -> Plan:
    """What the best plan of a domain that skips anything skips, and nothing else, whatever the clock made of it."""
    found = atlas.evidence_of(domain).get("best_skipping")
    if not found:
        raise BenchError(
            f"the atlas knows no plan that skips for {domain or MIXTURE}",
            "Calibrate with --modes skip, or choose other --methods.",
        )
    plan = Plan.from_json(found["plan"])
    policy = replace(plan.policy, lookup=False)
    return Plan.skipping(plan.num_layers, plan.skipped_attention, plan.skipped_mlp, policy)


def _own(engine: Engine, atlas: Atlas | None, sampling: dict[str, Any], **options: Any) -> Method:
    own = Engine(engine.model, engine.tokenizer, atlas, backend=engine.backend)

    def run(prompt: list[int], max_new_tokens: int) -> Output:
        started = time.perf_counter()
        stream = own.stream(prompt, max_new_tokens=max_new_tokens, **sampling, **options)
        rounds = [chunk.round for chunk in stream]
        total_sec = time.perf_counter() - started
        result = stream.result
        details = {
            "prefill_sec": result.stats.prefill_sec + result.stats.route_sec,
            "route_sec": result.stats.route_sec,
            "routed": result.route is not None,
            "routed_domain": result.route.plan_domain if result.route is not None else None,
            **_told(rounds, sampling),
        }
        return Output(result.token_ids, total_sec, details)

    return run


def _with_drafter(engine: Engine, sampling: dict[str, Any], new_drafter: Callable[[Request], Drafter]) -> Method:
    """Rounds with a drafter of another kind, made for each request."""
    backend, ends = engine.backend, end_at(eos_token_ids(engine.model))
    params = SamplingParams(repetition_penalty=engine.repetition_penalty, **sampling)

    def run(prompt: list[int], max_new_tokens: int) -> Output:
        started = time.perf_counter()
        sampler = Sampler.from_params(params, backend.device)
        with Request(backend, prompt, max_new_tokens, sampler, ends) as request:
            request.drafter = new_drafter(request)
            rounds = list(request.rounds())
        total_sec = time.perf_counter() - started
        token_ids = tuple(token for each in rounds for token in each.tokens)
        return Output(token_ids, total_sec, {"prefill_sec": request.prefill.seconds, **_told(rounds, sampling)})

    return run


def transformers_method(engine: Engine, sampling: dict[str, Any], lookup: bool) -> Method:
    """`model.generate` as its documentation has it, on the very weights that the engine runs.

    It generates `max_new_tokens` tokens, so that it does the same work as the baseline, whose length that is.
    """
    model: Any = engine.model
    extra: dict[str, Any] = {"prompt_lookup_num_tokens": _LOOKUP_TOKENS} if lookup else {}
    extra["do_sample"] = bool(sampling)
    if sampling:
        extra |= {"temperature": sampling["temperature"], "top_k": 0, "top_p": 1.0}

    def run(prompt: list[int], max_new_tokens: int) -> Output:
        input_ids = torch.tensor([prompt], device=model.device)
        started = time.perf_counter()
        sequences = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            min_new_tokens=max_new_tokens,
            max_new_tokens=max_new_tokens,
            **extra,
        )
        total_sec = time.perf_counter() - started
        token_ids = tuple(sequences[0, len(prompt) :].tolist())
        return Output(token_ids, total_sec, {"lossless": False, "peak_memory_bytes": peak_bytes()})

    return run


def record_of(output: Output, **place: Any) -> Record:
    """The record of an output; `place` says of which prompt, method and repeat."""
    return Record(token_ids=output.token_ids, total_sec=output.total_sec, **{**output.details, **place})


def _told(rounds: list[Round], sampling: dict[str, Any]) -> dict[str, Any]:
    """What rounds tell to a record."""
    drafted, accepted = _by_source(rounds)
    return {
        "rounds": len(rounds),
        "lossless": not sampling,
        "drafted": drafted,
        "accepted": accepted,
        "draft_sec": sum(each.draft_sec for each in rounds),
        "verify_sec": sum(each.verify_sec for each in rounds),
        "by_length": _by_length(rounds[1:]),
        "peak_memory_bytes": peak_bytes(),
    }


def _by_length(rounds: list[Round]) -> dict[str, list[int]]:
    result: dict[str, list[int]] = {}
    for each in rounds:
        sums = result.setdefault(str(each.drafted), [0, 0])
        sums[0] += 1
        sums[1] += each.accepted
    return result


def _by_source(rounds: list[Round]) -> tuple[dict[str, int], dict[str, int]]:
    drafted: dict[str, int] = {}
    accepted: dict[str, int] = {}
    for each in rounds:
        for index, drafter in enumerate(each.drafters):
            drafted[drafter] = drafted.get(drafter, 0) + 1
            accepted[drafter] = accepted.get(drafter, 0) + (index < each.accepted)
    return drafted, accepted
