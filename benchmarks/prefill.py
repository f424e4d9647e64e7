"""Time to the first token against llama.cpp and OpenVINO GenAI, by prompt length, on the same token ids.

    python benchmarks/prefill.py --out ROWS.json [--models default DIR…] [--tokens 50 500 2000] [--repeats 5]

Each program has loaded the model in a process of its own and runs a prompt when it is its turn: prompt by prompt, all
programs in turns, so that whatever slows the machine down slows all of them. The prompts are pieces of real text, no
two of which begin with the same token, and no program keeps anything of an earlier prompt. What is timed is a prompt
given as token ids until its first new token, greedily, without loading and converting the model; the first prompt of
each length warms up and is not counted. All programs get the same number of threads, and knn-ssd its default settings.

Prints medians over the prompts of a length; behind each, the median of its ratio to knn-ssd's on the same prompt, with
the smallest and the largest: 2.00 took twice as long as knn-ssd. Weights or a KV cache in fewer bits than the model's
own are lossy, which the columns before tell; "same" counts the prompts whose first token is knn-ssd's. ROWS.json gets a
row for each prompt, and the medians. Other programs are installed at first use, as docs/benchmarking.md says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _programs import OURS, PROGRAMS, RUN_PEER, Program
from _recipes import text_ids, write_rows

from knn_ssd import Engine
from knn_ssd.bench.workload import read_workloads
from knn_ssd.kernels.threads import thread_count
from knn_ssd.loading.resolve import load_tokenizer, model_dir

WARM_UP_PROMPT, WARM_UP_TOKENS = 16, 8  # as other programs have it


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt in one program.

    Args:
        model, program, weights, kv_cache, threads: what ran.
        tokens: length of the prompt.
        repeat: which of the prompts of this length.
        seconds: until its first new token.
        token_id: this token.
    """

    model: str
    program: str
    weights: str
    kv_cache: str
    threads: int
    tokens: int
    repeat: int
    seconds: float
    token_id: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A program on the prompts of one length: seconds, their ratio to knn-ssd's, and how many first tokens are its."""

    model: str
    program: str
    tokens: int
    prompts: int
    seconds: float
    ratio: float | None
    smallest_ratio: float | None
    largest_ratio: float | None
    same: int | None


FirstToken = Callable[[int], tuple[float, int]]
"""Given a prompt's place, returns the seconds until its first new token, and the token."""


def pieces(text: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` pieces of a text for each length, in this order, no two of which begin with the same token.

    A piece that reaches the end of the text goes on at its beginning.
    """
    first: dict[int, int] = {}
    for start, token in enumerate(text):
        first.setdefault(token, start)
    wanted = [length for length in lengths for _ in range(count)]
    if len(first) < len(wanted):
        sys.exit(
            f"The prompts have {len(first)} different tokens, and {len(wanted)} pieces that begin differently are "
            "needed: give more --prompts, or fewer --repeats."
        )
    starts = list(first.values())[:: len(first) // len(wanted)]
    return [
        [text[(start + i) % len(text)] for i in range(length)] for start, length in zip(starts, wanted, strict=False)
    ]


def write_run(folder: Path, prompts: Sequence[Sequence[int]]) -> None:
    """Writes prompts as a finished benchmark with outputs of one token, for the scripts of other programs to read."""
    given = [{"place": i, "id": f"{i}", "domain": None, "token_ids": ids} for i, ids in enumerate(prompts)]
    asked = [{"place": i, "method": "plain", "repeat": 0, "token_ids": [0]} for i in range(len(prompts))]
    (folder / "run.json").write_text(json.dumps({"temperature": 0, "eos_token_ids": []}))
    for name, lines in (("prompts", given), ("records", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def own_first_token(name: str | None, prompts: Sequence[list[int]], threads: int) -> FirstToken:
    """Loads and warms up knn-ssd in this process."""
    engine = Engine.from_pretrained(name, device="cpu", answers=False, threads=threads)
    longest = max(map(len, prompts)) + WARM_UP_TOKENS
    if longest > engine.backend.context_length:
        sys.exit(
            f"{longest} tokens are over the model's context of {engine.backend.context_length}: give smaller --tokens."
        )
    engine.prepare()
    engine.generate(prompts[0][:WARM_UP_PROMPT], max_new_tokens=WARM_UP_TOKENS, ignore_eos=True)

    def first_token(place: int) -> tuple[float, int]:
        started = time.perf_counter()
        output = engine.generate(prompts[place], max_new_tokens=1, ignore_eos=True, repetition_penalty=1.0)
        return time.perf_counter() - started, output.token_ids[0]

    return first_token


@contextmanager
def peer_first_token(name: str, program: Program, run: Path, model: Path, threads: int) -> Iterator[FirstToken]:
    """Starts another program, waits until it is ready, and ends it with the block."""
    command = ["sh", str(RUN_PEER), str(program.peer), str(run), "--model", str(model), "--threads", str(threads)]
    with subprocess.Popen(
        [*command, *program.options, "--on-request"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        asked, answers = process.stdin, process.stdout

        def answer_with(key: str) -> Any:
            for line in answers:
                if line.startswith(f'{{"{key}"'):
                    return json.loads(line)
            sys.exit(f"'{name}' ended with an error, told above: mend it, or leave it out of --programs.")

        def first_token(place: int) -> tuple[float, int]:
            print(place, file=asked, flush=True)
            answer = answer_with("seconds")
            return answer["seconds"], answer["token_ids"][0]

        try:
            answer_with("method")
            yield first_token
        finally:
            asked.close()


def measure(model: str, args: argparse.Namespace, text: Sequence[int]) -> Iterator[Row]:
    """Runs the prompts of all lengths in all programs, in turns."""
    name = None if model == "default" else model
    folder = model_dir(name)
    prompts = pieces(text, args.tokens, args.repeats + 1)
    with ExitStack() as stack:
        run = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_run(run, prompts)
        ready: dict[str, FirstToken] = {}
        for each in args.programs:
            print(f"{model}: {each} loads", file=sys.stderr)
            if (program := PROGRAMS[each]).peer is None:
                ready[each] = own_first_token(name, prompts, args.threads)
            else:
                assert folder is not None
                ready[each] = stack.enter_context(peer_first_token(each, program, run, folder, args.threads))
        for repeat in range(args.repeats + 1):
            first = repeat % len(args.programs)  # each one's turn to come first
            for number, length in enumerate(args.tokens):
                for each in args.programs[first:] + args.programs[:first]:
                    seconds, token = ready[each](number * (args.repeats + 1) + repeat)
                    kind = PROGRAMS[each]
                    if repeat:  # the first one warms up
                        yield Row(
                            model, each, kind.weights, kind.kv_cache, args.threads, length, repeat, seconds, token
                        )
            print(f"{model}: {repeat} of {args.repeats}", file=sys.stderr)


def cells(rows: Sequence[Row]) -> list[Cell]:
    """Medians over the prompts, by model, program and length."""
    by_place = {(row.model, row.program, row.tokens, row.repeat): row for row in rows}
    found = []
    for model, program, tokens in dict.fromkeys((row.model, row.program, row.tokens) for row in rows):
        own = [row for row in rows if (row.model, row.program, row.tokens) == (model, program, tokens)]
        pairs = [(row, ours) for row in own if (ours := by_place.get((model, OURS, tokens, row.repeat))) is not None]
        ratios = [row.seconds / ours.seconds for row, ours in pairs]
        compared = (statistics.median(ratios), min(ratios), max(ratios)) if ratios else (None, None, None)
        same = sum(row.token_id == ours.token_id for row, ours in pairs) if pairs else None
        median = statistics.median(row.seconds for row in own)
        found.append(Cell(model, program, tokens, len(own), median, *compared, same))
    return found


def table(found: Sequence[Cell], lengths: Sequence[int]) -> str:
    """The medians in Markdown: a row for each program, two columns for each length."""
    heads = [f"{length} tokens, ms | over {OURS}" for length in lengths]
    lines = [f"| model | program | weights | KV cache | {' | '.join(heads)} | same |", f"|{'---|' * 4}"]
    lines[1] += "--:|" * (2 * len(lengths) + 1)
    for model, program in dict.fromkeys((cell.model, cell.program) for cell in found):
        own = [cell for cell in found if (cell.model, cell.program) == (model, program)]
        texts = [f"{cell.seconds * 1e3:.1f} | {ratio_text(cell)}" for cell in own]
        same = "–" if own[0].same is None else f"{sum(c.same or 0 for c in own)} of {sum(c.prompts for c in own)}"
        kind = PROGRAMS[program]
        lines.append(f"| {model} | {program} | {kind.weights} | {kind.kv_cache} | {' | '.join(texts)} | {same} |")
    return "\n".join(lines)


def ratio_text(cell: Cell) -> str:
    if cell.ratio is None:
        return "–"
    return f"{cell.ratio:.2f} ({cell.smallest_ratio:.2f}–{cell.largest_ratio:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the rows, in JSON")
    text = "directories or names; default is the embedded model"
    parser.add_argument("--models", nargs="+", default=["default"], help=text)
    parser.add_argument(
        "--prompts", nargs="+", default=[], help="text to cut into prompts (default: the built-in ones)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[50, 500, 2000], help="lengths (default: 50 500 2000)")
    parser.add_argument("--repeats", type=int, default=5, help="prompts of each length (default: 5)")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="default: all")
    parser.add_argument("--threads", type=int, default=thread_count().threads, help="default: as knn-ssd has it")
    args = parser.parse_args()
    if min(args.tokens) < 1 or args.repeats < 1:
        parser.error("--tokens and --repeats must be 1 or more")
    rows: list[Row] = []
    for model in args.models:
        tokenizer = load_tokenizer(None if model == "default" else model)
        if tokenizer is None:
            sys.exit(f"'{model}' has no tokenizer to cut prompts with: name another model.")
        for row in measure(model, args, text_ids(tokenizer, read_workloads(args.prompts))):
            rows.append(row)
            found = cells(rows)
            write_rows(args.out, rows, medians=list(map(asdict, found)))
    print(table(cells(rows), args.tokens))


if __name__ == "__main__":
    main()
