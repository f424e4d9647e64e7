"""`knn-ssd generate`: answers a prompt, or those of a file."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import options, output, results
from knn_ssd.cli.options import option, whole_number
from knn_ssd.errors import PromptError, UsageError

if TYPE_CHECKING:
    from knn_ssd.engine import Engine
    from knn_ssd.outputs import Generation

_EXAMPLES = """\
examples:
  knn-ssd generate --prompt "What is the capital of France?"
  knn-ssd generate --atlas atlas/ --prompts questions.jsonl --out answers.jsonl
  git diff | knn-ssd generate --no-chat -

The prompts of a file share forward passes. With --out, the same command resumes an interrupted run.

The first use of a large model answers a single prompt at once and then, before it ends, makes the rest of the 4-bit
copies of its weights, with which later starts are faster; Ctrl-C leaves that out. A file of prompts waits for them.
"""

_ONLY_FOR_FILES = ("limit", "out", "concurrency")


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "generate",
        description="Answers prompts. Answers go to stdout, that to a single prompt as it is generated; a line of\n"
        "statistics for each goes to stderr.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prompts = parser.add_argument_group("prompts (one of these)").add_mutually_exclusive_group(required=True)
    option(prompts, "--prompt", "TEXT", "one prompt")
    text = (
        "JSON lines with 'prompt' or 'messages' and optionally 'id'; conversations of ShareGPT; questions of MT-bench; "
        "or requests of OpenAI's batch API, which are answered in its format"
    )
    option(prompts, "--prompts", "FILE.jsonl", text)
    prompts.add_argument("stdin", metavar="-", nargs="?", help="a minus sign: one prompt, read from stdin")
    option(parser, "--limit", "N", "only the first N prompts of the file", whole_number(1))
    text = "write the answers to a file, as JSON lines in the order of the prompts; what it has already is kept"
    option(parser, "--out", "FILE.jsonl", text, options.filled)
    text = "number of prompts of the file that run at the same time (default: 8)"
    option(parser, "--concurrency", "N", text, whole_number(1))
    parser.add_argument("--no-chat", action="store_true", help="do not apply the model's chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt instead of text")
    options.add_model_options(parser)
    options.add_answers_options(options.add_atlas_options(parser, plain=True))
    options.add_sampling_options(parser, every=True)


def run(args: argparse.Namespace) -> int:
    """Answers the prompts, or none of them if one cannot be used."""
    if args.stdin not in (None, "-"):
        raise UsageError(f"there is no option before '{args.stdin}'", f"Write --prompt '{args.stdin}'.")
    if args.prompts is not None:
        from knn_ssd.cli import prompt_file

        return prompt_file.run(args)
    for name in _ONLY_FOR_FILES:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} is for a file of prompts, and there is none", "Give one with --prompts.")
    name, prompt = ("prompt", args.prompt) if args.prompt is not None else ("stdin", _read_stdin())
    options.check_text(prompt)
    atlas = options.read_atlas(args)
    options.check_answers(args)
    chosen = {**options.sampling(args), "plain": args.plain, "domain": args.domain}
    engine = options.load_engine(args, atlas)
    token_ids = engine.encode(prompt, not args.no_chat)
    if not args.plain:
        options.prepare_later(engine)
    generation = _answer(engine, token_ids, chosen, shows_text=not args.json)
    if args.json:
        output.write_json(results.generation_json(name, generation))
    if not args.json or (output.stderr_is_terminal() and not output.stdout_is_terminal()):
        output.note(results.summary(generation, args.domain))
    options.finish_copies(engine)
    return 0


def _answer(engine: Engine, token_ids: list[int], chosen: dict[str, Any], shows_text: bool) -> Generation:
    with closing(engine.stream(token_ids, **chosen)) as stream:
        if shows_text:
            for chunk in stream:
                output.write(chunk.text)
            if not stream.result.text.endswith("\n"):
                output.write("\n")
        return stream.result


def _read_stdin() -> str:
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt on stdin is not UTF-8 text ({error})", "Give text.") from error
