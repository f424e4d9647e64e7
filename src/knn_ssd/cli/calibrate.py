"""`knn-ssd calibrate`: makes an atlas from prompts, with progress on stderr and the atlas's path on stdout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import options, output
from knn_ssd.cli.options import option, whole_number
from knn_ssd.errors import UsageError
from knn_ssd.progress import ProgressBars

if TYPE_CHECKING:
    from knn_ssd.calibrate.settings import CalibrationSettings
    from knn_ssd.prompts import Prompt

STRATEGIES = ("paper", "greedy", "bayes", "evolve")
MODES = ("skip", "low")

_SAME_NAME = (  # options that have the name and the value of a setting
    "trials", "minutes", "search_prompts", "judging_prompts", "new_tokens", "vector_prompts", "anchors", "workers",
    "storage", "seed", "max_draft", "threshold",
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "calibrate",
        description="Searches for the best draft plan of each domain of prompts, and writes an atlas. "
        "Without --prompts, it takes the five built-in sets.",
        epilog="The published calibration (arXiv 2505.16162) is --search paper --trials 1000 --search-prompts 8 "
        "--new-tokens 32 --max-draft 12 --threshold 0.8 --anchors 10. --resume continues an interrupted one.",
    )
    options.add_model_options(parser)
    group = parser.add_argument_group("prompts")
    option(group, "--out", "ATLAS", "folder to write the atlas to", options.filled, required=True)
    text = "one or more files of JSON lines with 'prompt' and 'domain' (default: the built-in sets)"
    option(group, "--prompts", "FILE", text, nargs="+", action="extend")
    option(group, "--domains", "A,B,…", "calibrate for these domains only")
    text = "maximum number of prompts per domain to make anchors from"
    option(group, "--vector-prompts", "N", text, whole_number(2), 1000)
    option(group, "--anchors", "N", "number of anchors per domain", whole_number(1), 10)
    text = "how hidden states are pooled into a prompt vector"
    option(group, "--pooling", None, text, default="mean", choices=("mean", "last"))
    group.add_argument("--no-chat", action="store_true", help="do not apply the model's chat template")
    _add_search_options(parser)


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    text = "paper times every plan; the others predict its speed from one forward pass"
    option(group, "--search", None, text, default="bayes", choices=STRATEGIES)
    budget = group.add_mutually_exclusive_group()
    text = "number of plans to try per domain (default: depends on the model)"
    option(budget, "--trials", "N", text, whole_number(1))
    option(budget, "--minutes", "T", "time limit of all searches, in minutes", options.number)
    option(group, "--search-prompts", "N", "number of prompts per domain to score plans on", whole_number(1), 8)
    text = (
        "number of further prompts per domain on which the best plans are judged; 0 keeps the general plan in every "
        "domain"
    )
    option(group, "--judging-prompts", "N", text, whole_number(0), 24)
    text = "number of tokens that the model generates after each of them"
    option(group, "--new-tokens", "N", text, whole_number(2), 32)
    text = (
        "modes that sublayers may have besides keep while drafting; low (4-bit weights) is ignored where the "
        "backend has none"
    )
    option(group, "--modes", "M,…", text, default=",".join(MODES))
    group.add_argument("--no-lookup", action="store_true", help="no lookup drafts")
    option(group, "--max-draft", "N", "longest draft, for --search paper (default: 12, as published)", whole_number(1))
    option(group, "--threshold", "P", "confidence threshold, for --search paper (default: 0.8)", options.number)
    option(group, "--workers", "N", "number of processes that search in parallel", whole_number(1), 1)
    option(group, "--storage", "URL", "database of trials that machines can share, such as sqlite:///trials.db")
    group.add_argument("--resume", action="store_true", help="continue an interrupted calibration")
    option(group, "--seed", "S", "seed of clustering and search", whole_number(0, 2**32 - 1), 0)


def run(args: argparse.Namespace) -> int:
    """Calibrates, and prints the atlas's path."""
    prompts = _prompts(args)
    _check(args)
    from knn_ssd.calibrate.pipeline import calibrate
    from knn_ssd.loading.resolve import load_model

    settings = _settings(args)
    loaded = load_model(args.model, dtype=args.dtype, device=args.device, revision=args.revision)
    with ProgressBars() as progress:
        calibrate(loaded, prompts, args.out, settings, resume=args.resume, progress=progress)
    output.write_line(args.out)
    return 0


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    from knn_ssd.prompts import BUILTIN_DOMAINS, builtin_prompts, read_prompts

    wanted = [name.strip() for name in args.domains.split(",")] if args.domains is not None else None
    if not args.prompts:
        return builtin_prompts(wanted if wanted is not None else BUILTIN_DOMAINS)
    prompts = [prompt for path in args.prompts for prompt in read_prompts(path)]
    known = {prompt.domain for prompt in prompts if prompt.domain}
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise UsageError(
            f"the prompts have no domain '{unknown[0]}'", f"They have {', '.join(sorted(known)) or 'none'}."
        )
    return [prompt for prompt in prompts if wanted is None or prompt.domain in wanted]


def _check(args: argparse.Namespace) -> None:
    """Checks what can be checked before the model is loaded."""
    if Path(args.out).exists():
        raise UsageError(f"there is already something at '{args.out}'", "Choose another --out, or remove it first.")
    unknown = [mode for mode in args.modes.split(",") if mode not in MODES]
    if unknown:
        raise UsageError(f"--modes has '{unknown[0]}'", f"Choose from {', '.join(MODES)}.")
    if args.search != "paper" and (args.max_draft is not None or args.threshold is not None):
        raise UsageError(
            f"--max-draft and --threshold are for --search paper, and the search is {args.search}",
            "The other searches find both themselves.",
        )


def _settings(args: argparse.Namespace) -> CalibrationSettings:
    from knn_ssd.backends.base import Pooling
    from knn_ssd.calibrate.search import Strategy
    from knn_ssd.calibrate.settings import CalibrationSettings

    return CalibrationSettings(
        search=Strategy(args.search),
        pooling=Pooling(args.pooling),
        chat=not args.no_chat,
        low="low" in args.modes.split(","),
        skip="skip" in args.modes.split(","),
        lookup=not args.no_lookup,
        **options.given(args, *_SAME_NAME),
    )
