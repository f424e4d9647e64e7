"""Options that several commands share, and the values made from them.

What can be checked without the model is checked before it is loaded. This module knows nothing of what commands do.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import output
from knn_ssd.errors import PromptError, UsageError

if TYPE_CHECKING:
    from knn_ssd.atlas import Atlas
    from knn_ssd.engine import Engine
    from knn_ssd.grammar import Grammar

DTYPES = ("auto", "float32", "bfloat16", "float16")

# Options that have no effect in greedy decoding, each with the value that turns it off.
_SAMPLING_ONLY = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}

_OUTPUT_OPTIONS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "min_tokens", "stop_token_ids", "ignore_eos", "seed",
)  # fmt: skip


def whole_number(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of an option that takes whole numbers in [least, most]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of {least} or more, got '{text}'")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be {most} or less, got {value}")
        return value

    return parse


def number(text: str) -> float:
    """The type of an option that takes finite numbers; their range is checked elsewhere."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got '{text}'")
    return value


def filled(text: str) -> str:
    """The type of an option that takes text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must have at least one character, got an empty text")
    return text


def option(
    group: Any,
    name: str,
    metavar: str | None,
    text: str,
    kind: Callable[[str], Any] = str,
    default: Any = None,
    **more: Any,
) -> None:
    """Adds an option that takes a value; `kind` converts the user's text into that value.

    Its help is `text`, followed by the default value unless that is None or `text` has the word "default" itself.
    """
    if default is not None and "default" not in text:
        text += f" (default: {f'{default:g}' if isinstance(default, float) else default})"
    group.add_argument(name, metavar=metavar, type=kind, default=default, help=text, **more)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --revision, --dtype, --threads, --device and --no-weight-cache."""
    group = parser.add_argument_group("model")
    text = (
        "a Hub id, a directory or a .gguf file; owner/name:Q4_K_M is a GGUF file on the Hub (default: the embedded "
        "SmolLM2-135M-Instruct)"
    )
    option(group, "--model", "M", text, filled)
    option(group, "--revision", "R", "branch, tag or commit of a model on the Hub", filled)
    text = "precision (default: auto: that of the checkpoint if the device supports it, else float32)"
    option(group, "--dtype", None, text, default="auto", choices=DTYPES)
    text = "threads that compute (default: as many CPUs as the process may use, its CPU quota included)"
    option(group, "--threads", "N", text, whole_number(1))
    option(group, "--device", "D", "cpu, cuda, cuda:1 or mps (default: an accelerator if there is one)")
    text = "make 4-bit copies of the weights anew, and keep none in the cache directory for the next start"
    group.add_argument("--no-weight-cache", action="store_true", help=text)


def add_atlas_options(parser: argparse.ArgumentParser, *, plain: bool = False) -> Any:
    """Adds --atlas, --neighbours and, if wanted, --plain and --domain; returns their group."""
    group = parser.add_argument_group("drafts")
    sources = group.add_mutually_exclusive_group() if plain else group
    option(sources, "--atlas", "A", "draft with the plans of this atlas, a folder that calibrate wrote")
    if plain:
        sources.add_argument("--plain", action="store_true", help="decode without drafts")
        option(group, "--domain", "NAME", "use the plan of this domain for every prompt, whatever its route")
    text = "number of nearest anchors that vote on the domain of a prompt (default: 1)"
    option(group, "--neighbours", "K", text, whole_number(1))
    return group


def add_answers_options(group: Any) -> None:
    """Adds --answers and --no-answers."""
    sources = group.add_mutually_exclusive_group()
    text = (
        "folder that keeps requests, whose answers draft for near requests (default: in memory until the command ends)"
    )
    option(sources, "--answers", "DIR", text, filled)
    sources.add_argument("--no-answers", action="store_true", help="keep no requests, and draft from none")


def add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int = 256, every: bool = False) -> None:
    """Adds --max-new-tokens, --stop, and the options of sampling; `every` adds those for programs, too."""
    group = parser.add_argument_group("output")
    option(group, "--max-new-tokens", "N", "maximum number of output tokens", whole_number(1), max_new_tokens)
    text = "end the output before this text; may be given several times"
    option(group, "--stop", "TEXT", text, filled, action="append")
    text = "0 is greedy decoding (the default); higher values give more varied output"
    option(group, "--temperature", "T", text, number, 0.0)
    option(group, "--top-k", "K", "sample from the K most likely tokens", whole_number(0))
    option(group, "--top-p", "P", "sample from the most likely tokens whose probabilities add up to P", number)
    option(group, "--min-p", "P", "sample from tokens at least P times as likely as the most likely one", number)
    text = "above 1 makes tokens of prompt and output less likely (default: that of the model's generation config)"
    option(group, "--repetition-penalty", "R", text, number)
    text = "subtract P from the logits of tokens that the output has, as in OpenAI's API; from -2 to 2"
    option(group, "--presence-penalty", "P", text, number)
    option(group, "--frequency-penalty", "P", "the same for each time that the output has the token", number)
    text = "seed of the random numbers; the same seed gives the same output"
    option(group, "--seed", "S", text, whole_number(0))
    if every:
        text = "add BIAS, from -100 to 100, to the logit of a token id; may be given several times"
        option(group, "--logit-bias", "ID=BIAS", text, _bias, action="append")
        option(group, "--stop-token-ids", "ID,…", "end the output with any of these token ids", _token_ids)
        group.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
        text = "no end-of-sequence token and no stop token or text ends the output before N tokens"
        option(group, "--min-tokens", "N", text, whole_number(0))
        text = "answer in JSON that is valid by the JSON schema in a file"
        option(group, "--json-schema", "FILE", text, filled)


def _bias(text: str) -> tuple[int, float]:
    """A token id and what is added to its logit."""
    token, separator, bias = text.partition("=")
    if not separator or not token.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a token id and a number, such as 42=-5, got '{text}'")
    return int(token), number(bias)


def _token_ids(text: str) -> list[int]:
    """Token ids with commas between them."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be token ids with commas between them, got '{text}'")
    return [int(part) for part in text.split(",")]


def check_text(text: str, name: str = "") -> None:
    """Checks that a prompt can be tokenised.

    Args:
        text: the prompt.
        name: the prompt's name in error messages.

    Raises:
        PromptError: the prompt is empty, or has lone surrogates, as from a command line that is not UTF-8.
    """
    the_prompt = f"prompt '{name}'" if name else "the prompt"
    if not text.strip():
        raise PromptError(f"{the_prompt} is empty", "Give at least one word.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{the_prompt} is not Unicode text: {error.reason}", "Save it as UTF-8.") from error


def read_atlas(args: argparse.Namespace) -> Atlas | None:
    """The atlas that the options name, checked against the other options; None without one."""
    domain = getattr(args, "domain", None)
    if args.atlas is None:
        for name, value in (("--domain", domain), ("--neighbours", args.neighbours)):
            if value is not None:
                raise UsageError(f"{name} chooses from an atlas, and there is none", "Give one with --atlas.")
        return None
    from knn_ssd.atlas import Atlas

    atlas = Atlas.load(args.atlas)
    if domain is not None:
        atlas.plan_for(domain)
    if args.neighbours is not None:
        from knn_ssd.routing.router import Router

        Router.of(atlas, args.neighbours)
    return atlas


def check_answers(args: argparse.Namespace) -> None:
    """Checks the folder of --answers, if it has an answer store already; the model is checked later.

    Raises:
        AnswerStoreError: it is no folder, or its answer store cannot be read.
    """
    if args.answers is not None and Path(args.answers).exists():
        from knn_ssd.routing.answer_file import FILE_NAME, AnswerFile

        if not Path(args.answers).is_dir() or (Path(args.answers) / FILE_NAME).exists():
            AnswerFile(args.answers).close()


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `Engine.stream` for the output, checked."""
    from knn_ssd.request_options import RequestOptions

    params = given(args, *_OUTPUT_OPTIONS)
    if "logit_bias" in params:
        params["logit_bias"] = dict(params["logit_bias"])
    wanted = {**params, "max_new_tokens": args.max_new_tokens, "stop": args.stop or ()}
    if getattr(args, "json_schema", None) is not None:
        wanted["grammar"] = _grammar(args.json_schema)
    RequestOptions.of(wanted)
    idle = [name for name, off in _SAMPLING_ONLY.items() if params.get(name, off) != off]
    if idle and args.temperature == 0:
        output.note(f"note: no effect at temperature 0, which is greedy decoding: {', '.join(map(_flag, idle))}")
    return wanted


def _grammar(path: str) -> Grammar:
    """The grammar of the JSON schema in a file."""
    from knn_ssd.grammar import Grammar

    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file of --json-schema cannot be read: {error}") from error
    return Grammar.json_schema(text)


def refuse_output_options(args: argparse.Namespace, reason: str) -> None:
    """Raises a `UsageError` with the reason if an option of the output was given."""
    names = [name for name in (*_OUTPUT_OPTIONS, "stop", "no_chat", "json_schema") if getattr(args, name)]
    if names:
        raise UsageError(f"{_flag(names[0])} has no effect: {reason}", "Leave it out.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The named options that the command has and that have a value."""
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def load_engine(args: argparse.Namespace, atlas: Atlas | None) -> Engine:
    """The engine for the options of the model and the atlas."""
    from knn_ssd.engine import Engine

    note_loading(args)
    return Engine.from_pretrained(
        args.model,
        atlas=atlas,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        neighbours=args.neighbours or 1,
        answers=getattr(args, "answers", None) or not getattr(args, "no_answers", False),
        prefix_cache=getattr(args, "prefix_cache", 0) * 2**20,
    )


def add_prefix_option(parser: Any) -> None:
    """Adds --prefix-cache."""
    text = "memory of the prefix cache, which keeps keys and values of earlier turns; 0 turns it off"
    option(parser, "--prefix-cache", "MIB", text, whole_number(0), 512)


def note_loading(args: argparse.Namespace) -> None:
    """Notes on a terminal that the model is being loaded, which takes a while."""
    if output.stderr_is_terminal():
        output.note(f"loading {args.model or 'the embedded model'} …")


def prepare(engine: Engine) -> None:
    """Makes the 4-bit copies that plans use, with a progress bar."""
    from knn_ssd.progress import ProgressBars

    with ProgressBars() as progress:
        engine.prepare(progress)


def prepare_later(engine: Engine) -> None:
    """Has the 4-bit copies made in the background where that takes long, and notes it."""
    from knn_ssd.progress import ProgressBars

    with ProgressBars() as progress:
        is_ready = engine.prepare_later(progress)
    if not is_ready:
        output.note("making 4-bit copies in the background; until they are there, drafts go without them")


def finish_copies(engine: Engine) -> None:
    """Before the process ends, has the copies made that are still being made, if later starts find them. Ctrl-C ends
    this at once.
    """
    from knn_ssd.weight_cache import limit_gib

    if engine.backend.is_preparing and limit_gib(os.environ):
        output.flush()
        output.note("making the rest of the 4-bit copies, which later starts find (Ctrl-C leaves it)")
        with suppress(KeyboardInterrupt):
            prepare(engine)


def use_no_weight_cache() -> None:
    """Has this process, and those that it starts, keep nothing in the weight cache."""
    os.environ["KNN_SSD_WEIGHT_CACHE"] = "0"


def use_threads(threads: int) -> None:
    """Has this process, and those that it starts, compute with so many threads."""
    os.environ["KNN_SSD_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)
    from knn_ssd.kernels.binding import set_threads

    set_threads(threads)
