"""`knn-ssd calibrate`: prompts to an atlas, with progress on stderr and the atlas's path on stdout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import options, output
from knn_ssd.errors import UsageError
from knn_ssd.progress import ProgressBars

if TYPE_CHECKING:
    from knn_ssd.calibrate.settings import CalibrationSettings
    from knn_ssd.prompts import Prompt

STRATEGIES = ("paper", "greedy", "bayes", "evolve")
MODES = ("skip", "low")


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "calibrate",
        description="Finds out how a model drafts best for each kind of prompt, and writes an atlas. "
        "Without --prompts, five built-in sets are used.",
        epilog="The published calibration (arXiv 2505.16162) is --search paper --trials 1000 --search-prompts 8 "
        "--new-tokens 32 --max-draft 12 --threshold 0.8 --anchors 10. An interrupted one goes on with --resume.",
    )
    options.add_model_options(parser)
    whole = options.whole_number
    group = parser.add_argument_group("prompts")
    group.add_argument("--out", metavar="ATLAS", type=options.filled, required=True, help="the folder to write")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="JSON lines with 'prompt' and 'domain'; several files can be given (default: the built-in sets)",
    )
    group.add_argument("--domains", metavar="A,B,…", help="only these domains of the prompts")
    group.add_argument(
        "--vector-prompts",
        metavar="N",
        type=whole(2),
        default=1000,
        help="prompts per domain that anchors are made of, at most (default: %(default)s)",
    )
    group.add_argument("--anchors", metavar="N", type=whole(1), default=10, help="per domain (default: %(default)s)")
    group.add_argument(
        "--pooling", choices=("mean", "last"), default="mean", help="how a prompt becomes a vector (default: mean)"
    )
    group.add_argument("--no-chat", action="store_true", help="take prompts as they are, without a chat template")
    _add_search_options(parser)


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    whole = options.whole_number
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        choices=STRATEGIES,
        default="bayes",
        help="paper times real decoding of every plan; the others foretell speed from one pass (default: bayes)",
    )
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--trials", metavar="N", type=whole(1), help="plans tried per domain (default: by model)")
    budget.add_argument("--minutes", metavar="T", type=options.number, help="time for all searches together")
    group.add_argument(
        "--search-prompts",
        metavar="N",
        type=whole(1),
        default=8,
        help="prompts per domain that plans are scored on (default: %(default)s)",
    )
    group.add_argument(
        "--new-tokens",
        metavar="N",
        type=whole(2),
        default=32,
        help="tokens of the model's own after each of them (default: %(default)s)",
    )
    group.add_argument(
        "--modes",
        metavar="M,…",
        default=",".join(MODES),
        help="what sublayers may do while drafting besides running as they are; low is passed over where the model has "
        "no low-bit weights (default: %(default)s)",
    )
    group.add_argument("--no-lookup", action="store_true", help="do not draft from earlier occurrences of the text")
    group.add_argument(
        "--max-draft", metavar="N", type=whole(1), help="longest draft of --search paper (default: 12, as published)"
    )
    group.add_argument(
        "--threshold", metavar="P", type=options.number, help="stop threshold of --search paper (default: 0.8)"
    )
    group.add_argument("--workers", metavar="N", type=whole(1), default=1, help="processes that search side by side")
    group.add_argument(
        "--storage", metavar="URL", help="database for the trials, shared by machines, such as sqlite:///trials.db"
    )
    group.add_argument("--resume", action="store_true", help="go on with an interrupted calibration")
    group.add_argument("--seed", metavar="S", type=whole(0, 2**32 - 1), default=0, help="of clustering and search")


def run(args: argparse.Namespace) -> int:
    """Calibrates, and says where the atlas is."""
    prompts = _prompts(args)
    _check(args)
    from knn_ssd.calibrate.pipeline import calibrate
    from knn_ssd.loading.resolve import load_model

    settings = _settings(args)
    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
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
    """What can be told before the model is loaded."""
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

    paper = {name: value for name in ("max_draft", "threshold") if (value := getattr(args, name)) is not None}
    return CalibrationSettings(
        search=Strategy(args.search),
        trials=args.trials,
        minutes=args.minutes,
        search_prompts=args.search_prompts,
        new_tokens=args.new_tokens,
        vector_prompts=args.vector_prompts,
        anchors=args.anchors,
        pooling=Pooling(args.pooling),
        chat=not args.no_chat,
        workers=args.workers,
        storage=args.storage,
        seed=args.seed,
        low="low" in args.modes.split(","),
        skip="skip" in args.modes.split(","),
        lookup=not args.no_lookup,
        **paper,
    )
