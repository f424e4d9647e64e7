"""`knn-ssd generate --prompts`: answers a file of prompts, which share forward passes, and resumes where it was killed.

With --out, each answer is appended to a file as it is finished. A run with the same prompts and options finds there
what is done already; when all is done, the lines are put into the order of the prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import openai_batch, options, output, results
from knn_ssd.errors import OutputError, PromptError
from knn_ssd.io import JsonLines, write_whole, writing
from knn_ssd.progress import ProgressBars
from knn_ssd.prompts import Prompt, parse_prompts, read_lines

if TYPE_CHECKING:
    from knn_ssd.engine import Engine
    from knn_ssd.outputs import Generation, Stats

_UNCHANGING = ("plain", "domain", "plan", "adaptive", "chat", "store", "owner")  # options that change no output


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt to answer.

    Args:
        id: its name.
        token_ids: the prompt.
        options: options of `Engine.stream`.
        key: stands for all that its output depends on.
        to_json: gives the object that is written for its output.
    """

    id: str
    token_ids: list[int]
    options: Mapping[str, Any]
    key: str
    to_json: Callable[[Generation], dict[str, Any]]


def run(args: argparse.Namespace) -> int:
    """Answers the prompts of a file, or none of them if one cannot be used."""
    lines = read_lines(args.prompts)
    is_batch = openai_batch.is_batch(lines)
    atlas = options.read_atlas(args)
    options.check_answers(args)
    if is_batch:
        options.refuse_output_options(args, "every request of an OpenAI batch says itself how it is answered")
        requests = openai_batch.parse_requests(lines, args.prompts)[: args.limit]
        engine = options.load_engine(args, atlas)
        options.prepare(engine)
        model = _identity(engine)
        tasks = [_request_task(engine, model, request, args) for request in requests]
    else:
        prompts = parse_prompts(lines, args.prompts)[: args.limit]
        for prompt in prompts:
            for text in prompt.texts:
                options.check_text(text, prompt.id)
        chosen = {**options.sampling(args), "plain": args.plain, "domain": args.domain}
        engine = options.load_engine(args, atlas)
        options.prepare(engine)
        model = _identity(engine)
        tasks = [_prompt_task(engine, model, prompt, chosen, args) for prompt in prompts]
    if args.out is not None:
        _write_file(engine, tasks, args)
    else:
        _write_stdout(engine, tasks, args, as_json=args.json or is_batch)
    return 0


def _prompt_task(
    engine: Engine, model: str, prompt: Prompt, chosen: Mapping[str, Any], args: argparse.Namespace
) -> Task:
    token_ids = engine.encode(prompt.prompt, not args.no_chat, name=prompt.id)
    key = _key(model, prompt.id, token_ids, chosen)

    def to_json(generation: Generation) -> dict[str, Any]:
        extra = {"request": key} if args.out is not None else {}
        return {**results.generation_json(prompt.id, generation), **extra}

    return Task(prompt.id, token_ids, chosen, key, to_json)


def _request_task(engine: Engine, model: str, request: openai_batch.BatchLine, args: argparse.Namespace) -> Task:
    chosen = {**request.options, "domain": args.domain, "plain": args.plain or request.options["plain"]}
    is_chat, template = bool(chosen.pop("chat", True)), request.request.template
    token_ids = engine.encode(request.prompt, is_chat, template, name=request.custom_id)
    thinking = request.thinking(engine, token_ids)
    chosen |= {} if thinking is None else {"grammar": request.request.options(thinking)["grammar"]}
    key = _key(model, request.custom_id, token_ids, chosen)

    def to_json(generation: Generation) -> dict[str, Any]:
        return openai_batch.result_json(request, key, len(token_ids), generation, engine.tokenizer, thinking)

    return Task(request.custom_id, token_ids, chosen, key, to_json)


def _identity(engine: Engine) -> str:
    """Stands for the model in the keys of tasks."""
    from knn_ssd.loading.fingerprint import fingerprint

    model = fingerprint(engine.model, engine.tokenizer)
    return f"{model.weights_hash} {model.dtype} {engine.repetition_penalty}"


def _key(model: str, name: str, token_ids: list[int], chosen: Mapping[str, Any]) -> str:
    """A digest of all that an output depends on: the model, the prompt with its name, and the options."""
    wanted = {each: value for each, value in sorted(chosen.items()) if each not in _UNCHANGING and value is not None}
    return hashlib.sha256(json.dumps([model, name, token_ids, wanted], default=repr).encode()).hexdigest()[:24]


def _generations(engine: Engine, tasks: Sequence[Task], args: argparse.Namespace) -> Iterator[tuple[int, Generation]]:
    from knn_ssd.engine import CONCURRENCY
    from knn_ssd.request_options import BatchRequest

    requests = [BatchRequest(task.token_ids, task.options, task.id) for task in tasks]
    return engine.stream_batch(requests, args.concurrency or CONCURRENCY)


def _write_stdout(engine: Engine, tasks: Sequence[Task], args: argparse.Namespace, as_json: bool) -> None:
    """Writes the answers in order, each as soon as it and all before it are finished."""
    shows_summary = not as_json or (output.stderr_is_terminal() and not output.stdout_is_terminal())
    waiting: dict[int, Generation] = {}
    following = iter(range(len(tasks)))
    place = next(following, None)
    for finished, generation in _generations(engine, tasks, args):
        waiting[finished] = generation
        while place in waiting:
            _write(tasks[place], waiting.pop(place), args, as_json, len(tasks) > 1, shows_summary)
            place = next(following, None)


def _write(
    task: Task, generation: Generation, args: argparse.Namespace, as_json: bool, with_heading: bool, with_summary: bool
) -> None:
    if as_json:
        output.write_json(task.to_json(generation))
    else:
        if with_heading:
            output.note(f"── {task.id} ──")
        output.write(generation.text if generation.text.endswith("\n") else f"{generation.text}\n")
    if with_summary:
        output.note(results.summary(generation, args.domain))


def _write_file(engine: Engine, tasks: Sequence[Task], args: argparse.Namespace) -> None:
    """Appends each answer to the file as it is finished; then puts all into the order of the prompts."""
    path = Path(args.out)
    with writing(path):
        if path.exists() and path.samefile(args.prompts):
            raise OutputError(f"'{path}' is the file of prompts", "Choose another --out.")
    done = read_results(path, tasks)
    left = [task for task in tasks if task.key not in done]
    if done:
        output.note(f"{len(done)} of {len(tasks)} answers are in '{path}' already")
    file = JsonLines(path)
    finished: list[Stats] = []
    started = time.perf_counter()
    with ProgressBars() as progress:
        progress.stage("answering", len(left))
        for place, generation in _generations(engine, left, args):
            line = left[place].to_json(generation)
            file.append([line])
            done[left[place].key] = json.dumps(line)
            finished.append(generation.stats)
            progress.advance(left[place].id)
    write_whole(path, "".join(f"{done[task.key]}\n" for task in tasks))
    if finished:
        output.note(results.total(finished, time.perf_counter() - started))


def read_results(path: Path, tasks: Sequence[Task]) -> dict[str, str]:
    """The lines of an earlier run by the keys of their tasks. A last line that a kill cut short is removed.

    Raises:
        PromptError: several tasks have one name.
        OutputError: the file cannot be read, or has a line that answers none of these tasks. It is left as it is.
    """
    name, count = max(Counter(task.id for task in tasks).items(), key=itemgetter(1), default=("", 0))
    if count > 1:
        raise PromptError(f"{count} prompts have the id '{name}'", "Give each an id of its own to use --out.")
    if not path.exists():
        return {}
    if not path.is_file():
        raise OutputError(f"'{path}' cannot be written: it is not a regular file", "Choose another --out.")
    keys = {task.key for task in tasks}
    with writing(path):
        content = path.read_bytes()
    *whole, torn = content.decode("utf-8", "replace").split("\n")
    done = {_result_key(line, path, keys): line for line in whole if line.strip()}
    if torn:
        if not torn.startswith('{"id": '):
            raise _other(path, torn)
        try:
            done[_result_key(torn, path, keys)] = torn  # only its newline is missing
        except OutputError:
            if _parsed(torn) is not None:
                raise
        write_whole(path, "".join(f"{line}\n" for line in done.values()))
    return done


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _result_key(line: str, path: Path, keys: set[str]) -> str:
    data = _parsed(line) or {}
    key = str(data.get("request") or openai_batch.key_of(data))
    if key not in keys:
        raise _other(path, str(data.get("custom_id") or data.get("id") or line))
    return key


def _other(path: Path, name: str) -> OutputError:
    return OutputError(
        f"'{path}' has a line that answers none of these prompts under these options: {name:.60}",
        "Give the same prompts and options to resume, or choose another --out.",
    )
