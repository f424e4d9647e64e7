"""The harness: every method runs every prompt in one process, prompt by prompt, in rotating order.

It guards against a baseline slowed by other load (methods alternate, and a bare step of the model is timed without the
engine too), outputs of different lengths (none may be longer than that of the first method to run a prompt), text after
the end-of-sequence token (it is cut off before tokens are counted), and a warm-up that counts (it is not recorded).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knn_ssd.bench.methods import NEIGHBOURS, Method, Output, record_of
from knn_ssd.bench.peers import read_peers, write_prompts
from knn_ssd.bench.records import Record, RecordFile
from knn_ssd.bench.summary import BASELINE, differing, summarize
from knn_ssd.engine import Engine
from knn_ssd.errors import BenchError
from knn_ssd.io import provenance, write_whole, writing
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.progress import Progress
from knn_ssd.prompts import Prompt
from knn_ssd.tokenization import eos_token_ids
from knn_ssd.tools.doctor import measure_bandwidth, read_bytes_per_token
from knn_ssd.tools.step_times import measure_step

SCHEMA = 1
_WARM_UP_PROMPT, _WARM_UP_TOKENS = 16, 8
_SLOWED = 1.3  # seconds per token of plain decoding over a bare step, above which something slows the baseline


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """The settings of a run, besides model, prompts and methods.

    Args:
        max_new_tokens: the longest output in tokens.
        repeats: how often every prompt is run.
        seed: seed of the stream, of sampling and of the confidence intervals.
        temperature: sampling temperature; 0 is greedy.
        mix_ratio: the mix ratio of the stream.
        chat: whether prompts go through the chat template.
    """

    max_new_tokens: int = 128
    repeats: int = 1
    seed: int = 0
    temperature: float = 0.0
    mix_ratio: float = 1.0
    chat: bool = True


def run_bench(
    engine: Engine,
    prompts: Sequence[Prompt],
    methods: Mapping[str, Method],
    out: Path,
    settings: BenchSettings,
    progress: Progress,
    model: str,
) -> dict[str, Any]:
    """Runs what is not in `out/records.jsonl` yet; writes and returns the summary, with the records of other programs.

    Args:
        engine: the engine that the methods are made from.
        prompts: the prompts in the order of the stream.
        methods: the methods by name, `plain` among them.
        out: the folder; records of the same run in it are kept and continued.
        settings: the settings of the run.
        progress: receives how far the run is.
        model: the model's name, for the report.

    Raises:
        BenchError: the baseline is missing, the folder has records of another run, or answers would be copied from
            an earlier repeat.
        PromptError: a prompt cannot be used.
        OutputError: the folder cannot be written.
    """
    if BASELINE not in methods:
        raise BenchError(
            f"there is nothing to compare with: '{BASELINE}' is not among the methods", f"Add {BASELINE} to --methods."
        )
    if settings.repeats > 1 and NEIGHBOURS in methods:
        raise BenchError(
            f"'{NEIGHBOURS}' would copy its own answers in a second run of the same prompts, got "
            f"repeats={settings.repeats}",
            "Run every prompt once, or choose other --methods.",
        )
    encoded = [engine.encode(prompt.prompt, settings.chat) for prompt in prompts]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    eos = eos_token_ids(engine.model)
    _check_identity(out, engine, encoded, list(methods), settings, eos)
    write_prompts(out, prompts, encoded)
    file = RecordFile(out / "records.jsonl")
    known = {record.key for record in file.records}
    todo = [
        (repeat, place)
        for repeat in range(settings.repeats)
        for place in range(len(prompts))
        if any((name, place, repeat) not in known for name in methods)
    ]
    if todo:
        progress.stage("warming up", len(methods))
        for name, method in methods.items():
            method(encoded[0][:_WARM_UP_PROMPT], _WARM_UP_TOKENS)
            progress.advance(name)
    steps = [measure_step(engine.backend)]
    progress.stage("measuring", len(todo))
    for repeat, place in todo:
        outputs = run_prompt(methods, encoded[place], settings.max_new_tokens, place + repeat)
        prompt = prompts[place]
        where = {"prompt": prompt.id, "domain": prompt.domain, "repeat": repeat, "place": place}
        cut = {name: _cut_at_eos(output, eos) for name, output in outputs.items()}
        records = [record_of(output, method=name, **where) for name, output in cut.items()]
        file.append(record for record in records if record.key not in known)
        progress.advance(prompt.id)
    steps.append(measure_step(engine.backend))
    summary = _summary(engine, file.records, read_peers(out, file.records), settings, model, max(steps))
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def run_prompt(methods: Mapping[str, Method], prompt: list[int], max_new_tokens: int, turn: int) -> dict[str, Output]:
    """Runs all methods on one prompt; in each turn another method is the first.

    The first method's output is the longest that the others may give. It is one of the engine's, since the output of
    transformers may be another one, by rounding.
    """
    names = list(methods)
    order = names[turn % len(names) :] + names[: turn % len(names)]
    first = next(name for name in order if not name.startswith("hf"))
    order.remove(first)
    outputs: dict[str, Output] = {}
    for name in (first, *order):
        outputs[name] = methods[name](prompt, max_new_tokens)
        max_new_tokens = len(outputs[first].token_ids)
    return {name: outputs[name] for name in names}


def _cut_at_eos(output: Output, eos: frozenset[int]) -> Output:
    """The output without the tokens after an end-of-sequence token. Its time stays as it was."""
    end = next((i for i, token in enumerate(output.token_ids, start=1) if token in eos), len(output.token_ids))
    return Output(output.token_ids[:end], output.total_sec, output.details)


def _summary(
    engine: Engine,
    records: Sequence[Record],
    peers: Sequence[Record],
    settings: BenchSettings,
    model: str,
    step_sec: float,
) -> dict[str, Any]:
    methods = summarize([*records, *peers], settings.seed)
    speed = methods[BASELINE]["decode_tokens_per_sec"]
    return {
        "schema": SCHEMA,
        "model": model,
        "machine": provenance(),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "exactness": engine.exactness.value,
        "settings": asdict(settings),
        "step_sec": step_sec,
        "floor_sec": read_bytes_per_token(engine.model) / measure_bandwidth(engine.backend.device),
        "baseline_slowed": speed is not None and 1 / speed > _SLOWED * step_sec,
        "differing": [{"method": r.method, "prompt": r.prompt, "repeat": r.repeat} for r in differing(records)],
        "peers": sorted({record.method for record in peers}),
        "methods": methods,
    }


def _check_identity(
    out: Path,
    engine: Engine,
    encoded: Sequence[Sequence[int]],
    methods: list[str],
    settings: BenchSettings,
    eos: frozenset[int],
) -> None:
    """Checks that the folder is new or of the same run; writes `run.json` for the former, which other programs read."""
    digest = hashlib.sha256(json.dumps(encoded).encode()).hexdigest()[:16]
    weights = fingerprint(engine.model, engine.tokenizer).weights_hash
    identity = {"prompts": digest, "weights": weights, "methods": sorted(methods), **asdict(settings)}
    path = out / "run.json"
    if path.exists():
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(f"'{path}' cannot be read: {error}", "Choose another --out.") from error
        changed = [name for name, value in identity.items() if found.get(name) != value]
        if changed:
            raise BenchError(
                f"'{out}' has records of a run with other {', '.join(changed)}",
                "Give the same options to continue it, or choose another --out.",
            )
        return
    if any(out.iterdir()):
        raise BenchError(f"'{out}' is not empty and has no benchmark in it", "Choose another --out.")
    write_whole(path, json.dumps({**identity, "eos_token_ids": sorted(eos)}, indent=1) + "\n")
