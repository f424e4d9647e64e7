"""`knn-ssd generate`: answers prompts, one after the other."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import options, output, results
from knn_ssd.cli.options import option, whole_number
from knn_ssd.errors import PromptError, UsageError
from knn_ssd.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from knn_ssd.engine import Engine
    from knn_ssd.outputs import Generation

_EXAMPLES = """\
examples:
  knn-ssd generate --prompt "What is the capital of France?"
  knn-ssd generate --atlas atlas/ --prompts questions.jsonl --json > answers.jsonl
  git diff | knn-ssd generate --no-chat -
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "generate",
        description="Answers prompts. Answers are streamed to stdout; a line of statistics for each goes to stderr.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prompts = parser.add_argument_group("prompts (one of these)").add_mutually_exclusive_group(required=True)
    option(prompts, "--prompt", "TEXT", "one prompt")
    option(prompts, "--prompts", "FILE.jsonl", "a file of JSON lines with 'prompt' and optionally 'id'")
    prompts.add_argument("stdin", metavar="-", nargs="?", help="a minus sign: one prompt, read from stdin")
    option(parser, "--limit", "N", "only the first N prompts of the file", whole_number(1))
    parser.add_argument("--no-chat", action="store_true", help="do not apply the model's chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt instead of text")
    options.add_model_options(parser)
    options.add_answers_options(options.add_atlas_options(parser, plain=True))
    options.add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Answers the prompts, or none of them if one cannot be used."""
    prompts = _prompts(args)
    for prompt in prompts:
        options.check_text(prompt.prompt, _name(prompt, args))
    atlas = options.read_atlas(args)
    options.check_answers(args)
    stream_options = {**options.sampling(args), "plain": args.plain, "domain": args.domain}
    engine = options.load_engine(args, atlas)
    encoded = [_encode(engine, prompt, args) for prompt in prompts]
    if not args.plain:
        options.prepare(engine)
    shows_summary = not args.json or (output.stderr_is_terminal() and not output.stdout_is_terminal())
    for prompt, token_ids in zip(prompts, encoded, strict=True):
        if len(prompts) > 1 and not args.json:
            output.note(f"── {prompt.id} ──")
        generation = _answer(engine, token_ids, stream_options, shows_text=not args.json)
        if args.json:
            output.write_json(results.generation_json(prompt.id, generation))
        if shows_summary:
            output.note(results.summary(generation, args.domain))
    return 0


def _answer(engine: Engine, token_ids: list[int], stream_options: dict[str, Any], shows_text: bool) -> Generation:
    with closing(engine.stream(token_ids, **stream_options)) as stream:
        if shows_text:
            for chunk in stream:
                output.write(chunk.text)
            if not stream.result.text.endswith("\n"):
                output.write("\n")
        return stream.result


def _encode(engine: Engine, prompt: Prompt, args: argparse.Namespace) -> list[int]:
    from knn_ssd.tokenization import encode

    name = _name(prompt, args)
    return encode(engine.tokenizer, prompt.prompt, engine.backend.context_length, not args.no_chat, name=name)


def _name(prompt: Prompt, args: argparse.Namespace) -> str:
    """The name of a prompt in error messages; empty for a single prompt."""
    return prompt.id if args.prompts is not None else ""


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    if args.stdin not in (None, "-"):
        raise UsageError(f"there is no option before '{args.stdin}'", f"Write --prompt '{args.stdin}'.")
    if args.prompts is not None:
        return read_prompts(args.prompts)[: args.limit]
    if args.limit is not None:
        raise UsageError("--limit is for a file of prompts, and there is none", "Give one with --prompts.")
    if args.prompt is not None:
        return [Prompt(args.prompt, id="prompt")]
    return [Prompt(_read_stdin(), id="stdin")]


def _read_stdin() -> str:
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt on stdin is not UTF-8 text ({error})", "Give text.") from error
