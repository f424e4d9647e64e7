"""`knn-ssd atlas`: shows atlases, compares them with a model or with each other, and shares them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from knn_ssd.cli import options, output

_EXIT_DIFFERENCE = 1


def add_parser(subparsers: Any) -> None:
    """Adds the command, its subcommands, and their options."""
    parser = subparsers.add_parser("atlas", description="Shows, verifies, compares and shares atlases.")
    commands = parser.add_subparsers(dest="atlas_command", metavar="COMMAND", title="commands", required=True)

    show = _command(commands, "show", "show what an atlas holds", _show)
    show.add_argument("--json", action="store_true", help="print the manifest as JSON")

    verify = _command(commands, "verify", "check that an atlas belongs to a model", _verify)
    options.add_model_options(verify)

    diff = _command(commands, "diff", "compare two atlases; exit code 1 if they differ", _diff)
    diff.add_argument("other", metavar="OTHER", help="the folder of another atlas")

    push = _command(commands, "push", "upload an atlas to the Hugging Face Hub", _push)
    push.add_argument("repo", metavar="REPO", type=options.filled, help="owner/name of the repository on the Hub")
    push.add_argument("--private", action="store_true", help="make the repository private if it is new")
    push.add_argument("--revision", metavar="R", help="the branch to upload to (default: main)")

    line = "download an atlas from the Hugging Face Hub"
    pull = commands.add_parser("pull", help=line, description="Downloads an atlas from the Hugging Face Hub.")
    pull.add_argument("repo", metavar="REPO", type=options.filled, help="owner/name of the repository on the Hub")
    pull.add_argument("--out", metavar="DIR", required=True, type=options.filled, help="where the atlas goes")
    pull.add_argument("--revision", metavar="R", help="a branch, tag or commit (default: main)")
    pull.set_defaults(atlas_run=_pull)


def run(args: argparse.Namespace) -> int:
    """Runs a subcommand of `atlas`."""
    return int(args.atlas_run(args))


def _command(commands: Any, name: str, line: str, run_command: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
    parser.add_argument("atlas", metavar="ATLAS", help="the folder of an atlas")
    parser.set_defaults(atlas_run=run_command)
    return parser


def _show(args: argparse.Namespace) -> int:
    from knn_ssd.atlas import MANIFEST, Atlas
    from knn_ssd.cli import atlas_view

    atlas = Atlas.load(args.atlas)
    if args.json:
        output.write_json(json.loads((Path(args.atlas) / MANIFEST).read_text("utf-8")), indent=1)
        return 0
    output.write_line(atlas_view.headline(atlas))
    output.write_table(atlas_view.domains_table(atlas))
    output.write_line(atlas_view.skip_map(atlas))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from knn_ssd.atlas import Atlas

    atlas = Atlas.load(args.atlas)
    from knn_ssd.loading.fingerprint import fingerprint
    from knn_ssd.loading.resolve import load_model

    options.note_loading(args)
    loaded = load_model(args.model, dtype=args.dtype, device=args.device, revision=args.revision)
    found = fingerprint(loaded.model, loaded.tokenizer)
    atlas.check(found)
    if found.dtype != atlas.fingerprint.dtype:
        output.note(
            f"note: the atlas was calibrated in {atlas.fingerprint.dtype}, and the model runs in {found.dtype}; "
            "its plans remain valid, its costs differ"
        )
    output.write_line(f"OK: '{args.atlas}' belongs to {loaded.name}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from knn_ssd.atlas import Atlas
    from knn_ssd.cli import atlas_view

    differences = atlas_view.differences(Atlas.load(args.atlas), Atlas.load(args.other))
    for line in differences or ["no difference"]:
        output.write_line(line)
    return _EXIT_DIFFERENCE if differences else 0


def _push(args: argparse.Namespace) -> int:
    from knn_ssd.tools import hub

    output.write_line(hub.push(Path(args.atlas), args.repo, private=args.private, revision=args.revision))
    return 0


def _pull(args: argparse.Namespace) -> int:
    from knn_ssd.tools import hub

    output.write_line(str(hub.pull(args.repo, Path(args.out), revision=args.revision)))
    return 0
