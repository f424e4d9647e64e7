"""Shared by the scripts of other programs: reads the prompts of a run, times them. It needs only Python.

Either all prompts are run once and their records written into the run's folder, or, with `--on-request`, each line of
standard input asks for one prompt, which `benchmarks/prefill.py` does in turns with other programs.

The environment of a program need not have knn-ssd, so records are plain dicts here, with the field names of
`knn_ssd.bench.records.Record`; a test compares the two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

WARM_UP_PROMPT, WARM_UP_TOKENS = 16, 8  # as in the benchmark itself

Generate = Callable[[list[int], int], tuple[list[int], dict[str, Any]]]
"""Given token ids and a number of new tokens, returns that many, end tokens ignored, and other fields of the record."""


@dataclass(frozen=True)
class Job:
    """A prompt of a run, and the length of plain decoding's output for it."""

    place: int
    prompt: str
    domain: str | None
    token_ids: list[int]
    count: int


def fail(text: str) -> NoReturn:
    """Ends the script with an error message and exit code 2."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    options = _model_parser(doc)
    options.add_argument("run", type=Path, metavar="RUN_FOLDER", help="the --out of a finished `knn-ssd bench`")
    options.add_argument(
        "--on-request",
        action="store_true",
        help="write no records, but run the prompt whose place in the run a line of standard input gives, and answer "
        "with a line of JSON on standard output, until standard input ends",
    )
    return options


def serving_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has that serves a model over HTTP on 127.0.0.1."""
    options = _model_parser(doc)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--clients", type=int, default=8, help="that are served at the same time (default: 8)")
    text = "tokens of the longest prompt with its answer (default: 2048)"
    options.add_argument("--context", type=int, default=2048, help=text)
    return options


def _model_parser(doc: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=doc.splitlines()[0])
    text = "the model's folder: model_dir in `knn-ssd doctor --json`"
    options.add_argument("--model", type=Path, required=True, metavar="DIR", help=text)
    options.add_argument("--threads", type=int, default=physical_cores(), help="default: the physical cores")
    return options


def physical_cores() -> int:
    """Number of physical cores that this process may run on."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed]
    return len({path.read_text() for path in siblings if path.exists()}) or len(allowed)


def read_jobs(run: Path) -> list[Job]:
    """Reads the prompts of a run, each with the length of plain decoding's output."""
    try:
        temperature = json.loads((run / "run.json").read_text("utf-8"))["temperature"]
        prompts = [json.loads(line) for line in (run / "prompts.jsonl").read_text("utf-8").splitlines()]
        records = [json.loads(line) for line in (run / "records.jsonl").read_text("utf-8").splitlines()]
    except (OSError, ValueError, KeyError) as error:
        fail(f"'{run}' is not the folder of a finished benchmark ({error!r}): let `knn-ssd bench` run to its end")
    if temperature:
        fail(f"'{run}' was sampled at temperature {temperature}, and other programs decode greedily: use another run")
    counts = {r["place"]: len(r["token_ids"]) for r in records if r["method"] == "plain" and r["repeat"] == 0}
    missing = [prompt["id"] for prompt in prompts if prompt["place"] not in counts]
    if missing or not prompts:
        fail(f"'{run}' has no output of plain decoding for {missing or 'any prompt'}: let the benchmark run to its end")
    return [Job(p["place"], p["id"], p["domain"], p["token_ids"], counts[p["place"]]) for p in prompts]


def longest(jobs: list[Job]) -> int:
    """Number of tokens of the longest prompt with its output."""
    return max(len(job.token_ids) + max(job.count, WARM_UP_TOKENS) for job in jobs)


def measure(
    run: Path, method: str, jobs: list[Job], generate: Generate, *, lossy: bool = False, on_request: bool = False
) -> None:
    """Runs every prompt once, after a warm-up, and writes `peers/METHOD.jsonl` whole into the run's folder.

    Args:
        run: the run's folder.
        method: the method's name in the tables.
        jobs: the prompts of the run.
        generate: runs the program.
        lossy: whether its weights or KV cache are rounded to fewer bits than the model's own.
        on_request: run the prompts that are asked for instead, and write no records.
    """
    if on_request:
        answer_requests(method, jobs, generate)
        return
    ends = json.loads((run / "run.json").read_text("utf-8")).get("eos_token_ids")
    if ends is None:
        fail(f"'{run}/run.json' does not say which tokens end an output: an older version wrote it, make the run anew")
    generate(jobs[0].token_ids[:WARM_UP_PROMPT], WARM_UP_TOKENS)
    records = []
    for job in jobs:
        started = time.perf_counter()
        token_ids, details = generate(job.token_ids, job.count)
        total_sec = time.perf_counter() - started
        if len(token_ids) != job.count:
            fail(f"{method} gave {len(token_ids)} tokens for '{job.prompt}', and {job.count} were asked for")
        end = next((i for i, token in enumerate(token_ids, start=1) if token in ends), len(token_ids))
        place = {"prompt": job.prompt, "domain": job.domain, "method": method, "repeat": 0, "place": job.place}
        claims = {"lossless": False, "lossy": lossy, "peak_memory_bytes": peak_bytes()}
        records.append({**place, "token_ids": list(token_ids[:end]), "total_sec": total_sec, **claims, **details})
        print(f"{method}: {job.place + 1} of {len(jobs)}", file=sys.stderr)
    path = run / "peers" / f"{method}.jsonl"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    part.replace(path)
    print(
        f"{path} is written: repeat the `knn-ssd bench` command of the run, and its tables include it", file=sys.stderr
    )


def answer_requests(method: str, jobs: list[Job], generate: Generate) -> None:
    """After a warm-up, runs the prompt at the place that each line of standard input gives.

    Writes a line of JSON with the method's name once the program is ready, and one with `seconds` and `token_ids` for
    each prompt. What the program itself writes to standard output goes to standard error instead.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    generate(jobs[0].token_ids[:WARM_UP_PROMPT], WARM_UP_TOKENS)
    answers.write(json.dumps({"method": method}) + "\n")
    answers.flush()
    for line in sys.stdin:
        job = jobs[int(line)]
        started = time.perf_counter()
        token_ids, _ = generate(job.token_ids, job.count)
        seconds = time.perf_counter() - started
        answers.write(json.dumps({"seconds": seconds, "token_ids": list(token_ids)}) + "\n")
        answers.flush()


def peak_bytes() -> int:
    """Peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def kept(model: Path, name: str, make: Callable[[Path], None]) -> Path:
    """A converted model, kept in the program's environment and made once per state of the model's folder.

    Args:
        model: the model's folder.
        name: file name of the converted model.
        make: writes the converted model to a path.
    """
    if not (model / "config.json").is_file():
        fail(f"'{model}' is not the directory of a model, with config.json: see model_dir in `knn-ssd doctor --json`")
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(model.iterdir())]
    digest = hashlib.sha256(repr((str(model.resolve()), stats)).encode()).hexdigest()[:12]
    path = Path(sys.prefix) / "models" / digest / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"part-{name}")
        make(part)
        part.replace(path)
    return path


def convert(command: Sequence[str | Path], failure: str) -> None:
    """Runs a step of a conversion; if it fails, the script ends with the last line of its error output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{failure}: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")


def weights_dtype(model: Path) -> str | None:
    """The dtype of a checkpoint according to its config."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    return config.get("dtype") or config.get("torch_dtype")
