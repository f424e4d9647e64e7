"""The methods that a benchmark compares. Each is a way to decode the output for a prompt, all with the same model.

The methods of the engine share one backend, thus weights, kernels and 4-bit copies, and differ only in how they draft.
Each has an engine of its own, so that none learns from the drafts of another.
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
from knn_ssd.bench.swift import MIN_LAYERS, SwiftDraft, SwiftSearch
from knn_ssd.calibrate.settings import MIXTURE
from knn_ssd.engine import Engine
from knn_ssd.errors import BenchError, UsageError
from knn_ssd.kernels.gguf_rows import has_rows
from knn_ssd.outputs import count_by_drafter
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.request import Request, end_at
from knn_ssd.routing.answers import AnswerStore
from knn_ssd.sampling import Sampler, SamplingParams
from knn_ssd.speculation.decode import Round
from knn_ssd.speculation.drafter import Drafter
from knn_ssd.tokenization import eos_token_ids
from knn_ssd.tools.memory import peak_bytes

HF, HF_LOOKUP, NEIGHBOURS = "hf", "hf-lookup", "neighbours"
DESCRIPTIONS = {
    BASELINE: "the engine without drafts: the baseline",
    HF: "transformers.generate in the same dtype",
    HF_LOOKUP: "transformers.generate with its prompt lookup",
    "self-sd-fix": "drafts under the best skipping plan for the stream's first domain, for all prompts",
    "self-sd-mix": "drafts under the best skipping plan for a mixture of domains, for all prompts",
    "knn-ssd": "drafts under the best skipping plan for the nearest anchor's domain: the paper",
    "swift": "searches for a skipping plan while decoding (arXiv 2410.06916, without its token tree)",
    "clasp": "skips the layers that change the last token's hidden states least (arXiv 2505.24196)",
    "lookup": "drafts by lookup alone",
    "low": "drafts with all weights in 4 bits, without routing",
    "auto": "routing, all drafters but retrieval, and the controller",
    NEIGHBOURS: "the default of `generate`: `auto`, and drafts from the answers of the nearest earlier prompts",
}
NEEDS_ATLAS = ("self-sd-fix", "self-sd-mix", "knn-ssd")
_SEE_DOCTOR = "See `knn-ssd doctor`, or choose other --methods."
_LOOKUP_TOKENS = 10  # as in the documentation of transformers


@dataclass(frozen=True, slots=True)
class Output:
    """The output of a method for a prompt.

    Args:
        token_ids: the output, with the end-of-sequence token.
        total_sec: seconds from the prompt's token ids to the last output token.
        details: further fields of the `Record`, as far as the method knows them.
    """

    token_ids: tuple[int, ...]
    total_sec: float
    details: Mapping[str, Any]


Method = Callable[[list[int], int], Output]
"""Decodes an output, given a prompt's token ids and the longest output in tokens."""


def check_names(names: Sequence[str]) -> None:
    """Checks that methods exist.

    Raises:
        UsageError: there is no method of such a name.
    """
    unknown = [name for name in names if name not in DESCRIPTIONS]
    if unknown:
        raise UsageError(f"there is no method '{unknown[0]}'", f"Choose from {', '.join(DESCRIPTIONS)}.")


def make_methods(
    names: Sequence[str], engine: Engine, first_domain: str | None = None, temperature: float = 0.0, seed: int = 0
) -> dict[str, Method]:
    """Makes methods that use an engine's model, backend and atlas.

    Args:
        names: the methods' names, of those in `DESCRIPTIONS`.
        engine: the engine.
        first_domain: the domain of the stream's first prompt.
        temperature: sampling temperature; 0 is greedy.
        seed: seed of sampling.

    Raises:
        UsageError: there is no method of such a name.
        BenchError: a method needs an atlas, or something that the atlas or the backend lacks.
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
        return engine_method(engine, None, sampling, plain=True)
    if name in (HF, HF_LOOKUP):
        if has_rows(engine.model):
            raise BenchError(
                f"the method '{name}' would unpack the quantised weights in every forward pass, which is no baseline",
                "Choose other --methods, or give a --dtype, in which the file is unpacked once.",
            )
        return transformers_method(engine, sampling, lookup=name == HF_LOOKUP)
    if name in ("lookup", "low"):
        return engine_method(engine, None, sampling, plan=_unrouted(name, engine), adaptive=True)
    if name in ("auto", NEIGHBOURS):
        return engine_method(engine, atlas, sampling, name == NEIGHBOURS, adaptive=True)
    if name in _ONLINE:
        return _ONLINE[name](engine, sampling)
    assert atlas is not None
    return _as_published(name, engine, atlas, first_domain, sampling)


def _unrouted(name: str, engine: Engine) -> Plan:
    """The plan of a method that uses one for all prompts."""
    layers = engine.backend.num_layers
    if name == "lookup":
        return Plan.skipping(layers, policy=Policy(lookup=True))
    if Mode.LOW not in engine.backend.modes:
        raise BenchError("the method 'low' needs 4-bit weights, and this model's backend has none", _SEE_DOCTOR)
    return Plan.low(layers, Policy(lookup=False))


def _swift(engine: Engine, sampling: dict[str, Any]) -> Method:
    layers = engine.backend.num_layers
    if layers < MIN_LAYERS:
        raise BenchError(
            f"the method 'swift' needs {MIN_LAYERS} layers, and this model has {layers}", "Choose other --methods."
        )
    search = SwiftSearch(layers, seed=sampling.get("seed", 0))

    def new_drafter(request: Request) -> Drafter:
        return SwiftDraft(search, request.session, request.sampler, request.num_prompt_tokens)

    return _with_drafter(engine, sampling, new_drafter)


def _clasp(engine: Engine, sampling: dict[str, Any]) -> Method:
    backend = engine.backend
    if not isinstance(backend, NativeBackend):
        raise BenchError("the method 'clasp' runs layers one by one, which only the native backend can", _SEE_DOCTOR)

    def new_drafter(request: Request) -> Drafter:
        assert isinstance(request.session, NativeSession)
        return ClaspDraft(backend, request.session, request.sampler)

    return _with_drafter(engine, sampling, new_drafter)


_ONLINE = {"swift": _swift, "clasp": _clasp}  # they choose what to skip while decoding


def _as_published(
    name: str, engine: Engine, atlas: Atlas, first_domain: str | None, sampling: dict[str, Any]
) -> Method:
    """The methods of arXiv 2505.16162, section 4: skipping drafts under a fixed policy, routed or not."""
    if name == "knn-ssd":
        domains = {name: DomainEntry(_skipping(atlas, name), known.radius) for name, known in atlas.domains.items()}
        skips = replace(atlas, domains=domains, fallback=_skipping(atlas, None))
        return engine_method(engine, skips, sampling, adaptive=False)
    domain = first_domain if name == "self-sd-fix" else None
    if name == "self-sd-fix" and domain not in atlas.domains:
        raise BenchError(
            f"'self-sd-fix' drafts as for the stream's first domain, '{domain}', and the atlas has only "
            f"{', '.join(sorted(atlas.domains))}",
            "Give prompts of the atlas's domains, or choose other --methods.",
        )
    return engine_method(engine, None, sampling, plan=_skipping(atlas, domain), adaptive=False)


def _skipping(atlas: Atlas, domain: str | None) -> Plan:
    """The skips of a domain's best skipping plan, even if timing did not choose it; None is the mixture."""
    found = atlas.evidence_of(domain).get("best_skipping")
    if not found:
        raise BenchError(
            f"the atlas has no plan that skips for {domain or MIXTURE}",
            "Calibrate with --modes skip, or choose other --methods.",
        )
    plan = Plan.from_json(found["plan"])
    policy = replace(plan.policy, lookup=False)
    return Plan.skipping(plan.num_layers, plan.skipped_attention, plan.skipped_mlp, policy)


def engine_method(
    engine: Engine,
    atlas: Atlas | None,
    sampling: dict[str, Any],
    answers: AnswerStore | bool = False,
    **options: Any,
) -> Method:
    """A method of the engine's own.

    Args:
        engine: whose model and backend are used.
        atlas: which plan to use for which prompts.
        sampling: options of sampling.
        answers: the answer store that the method's prompts fill; True is a new one, False none.
        options: further options of `Engine.stream`.
    """
    runner = Engine(engine.model, engine.tokenizer, atlas, answers=answers, backend=engine.backend)

    def run(prompt: list[int], max_new_tokens: int) -> Output:
        if not options.get("plain"):
            runner.prepare()  # at the warm-up: a prompt is timed with all drafters
        started = time.perf_counter()
        stream = runner.stream(prompt, max_new_tokens=max_new_tokens, **sampling, **options)
        rounds = [chunk.round for chunk in stream]
        total_sec = time.perf_counter() - started
        result = stream.result
        details = {
            "prefill_sec": result.stats.prefill_sec + result.stats.route_sec,
            "route_sec": result.stats.route_sec,
            "routed": result.route is not None,
            "routed_domain": result.route.plan_domain if result.route is not None else None,
            **_round_details(rounds, sampling),
        }
        return Output(result.token_ids, total_sec, details)

    return run


def _with_drafter(engine: Engine, sampling: dict[str, Any], new_drafter: Callable[[Request], Drafter]) -> Method:
    """A method that decodes each request with a new drafter."""
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
        return Output(
            token_ids, total_sec, {"prefill_sec": request.prefill.seconds, **_round_details(rounds, sampling)}
        )

    return run


def transformers_method(engine: Engine, sampling: dict[str, Any], lookup: bool) -> Method:
    """`model.generate` as in the documentation of transformers, with the same weights as the engine.

    Its output ends at an end-of-sequence token or after `max_new_tokens` tokens, as the engine's does.
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
            max_new_tokens=max_new_tokens,
            **extra,
        )
        total_sec = time.perf_counter() - started
        token_ids = tuple(sequences[0, len(prompt) :].tolist())
        return Output(token_ids, total_sec, {"lossless": False, "peak_memory_bytes": peak_bytes()})

    return run


def record_of(output: Output, **place: Any) -> Record:
    """The record of an output; `place` holds the fields that identify prompt, method and repeat."""
    return Record(token_ids=output.token_ids, total_sec=output.total_sec, **{**output.details, **place})


def _round_details(rounds: list[Round], sampling: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record that follow from the rounds."""
    counts = count_by_drafter(rounds)
    return {
        "rounds": len(rounds),
        "lossless": not sampling,
        "drafted": {drafter: count.drafted for drafter, count in counts.items()},
        "accepted": {drafter: count.accepted for drafter, count in counts.items()},
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
