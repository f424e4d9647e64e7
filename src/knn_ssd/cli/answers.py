"""`knn-ssd answers`: shows what an answer store on disk holds, and clears it."""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import options, output
from knn_ssd.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from knn_ssd.routing.answer_file import AnswerFile, StoredAnswer

_SHOWN_IDS = 12  # of a prompt, where its text is not known
_SHOWN_CHARACTERS = 60


def add_parser(subparsers: Any) -> None:
    """Adds the command, its subcommands, and their options."""
    parser = subparsers.add_parser("answers", description="Shows and clears what an answer store on disk holds.")
    commands = parser.add_subparsers(dest="answers_command", metavar="COMMAND", title="commands", required=True)

    show = commands.add_parser("show", help="show what an answer store holds", description=_show.__doc__)
    show.add_argument("folder", metavar="DIR", help="the folder of an answer store")
    options.option(show, "--limit", "N", "show so many requests", options.whole_number(1), 10)
    show.add_argument("--latest", action="store_true", help="show those used last instead of the most useful")
    text = "show prompts as text, by this model's tokenizer: a Hub id, a directory or a .gguf file (default: token ids)"
    options.option(show, "--model", "M", text, options.filled)
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(answers_run=_show)

    clear = commands.add_parser("clear", help="remove all requests", description=_clear.__doc__)
    clear.add_argument("folder", metavar="DIR", help="the folder of an answer store")
    clear.set_defaults(answers_run=_clear)


def run(args: argparse.Namespace) -> int:
    """Runs a subcommand of `answers`."""
    return int(args.answers_run(args))


def _show(args: argparse.Namespace) -> int:
    """Shows how many requests an answer store holds, and the most useful of them."""
    from knn_ssd.routing.answer_file import AnswerFile

    file = AnswerFile(args.folder)
    tokenizer = _tokenizer(args.model, file) if args.model is not None else None
    totals = {"requests": 0, "tokens": 0, "useful": 0}
    by_use = (lambda each: each.last_used) if args.latest else (lambda each: (each.accepted, each.last_used))
    shown = heapq.nlargest(args.limit, _counted(file, totals), key=by_use)
    totals["bytes"] = file.bytes
    if args.json:
        output.write_json({**totals, "answers": [_json(each, tokenizer) for each in shown]}, indent=1)
        return 0
    size = f"{totals['requests']} requests of {totals['tokens']} tokens, {totals['bytes'] / 1e6:.1f} MB on disk"
    output.write_line(f"{size}; drafts from {totals['useful']} of them were accepted")
    if shown:
        output.write_table(_table(shown, tokenizer))
    return 0


def _clear(args: argparse.Namespace) -> int:
    """Removes all requests from an answer store, and says how many there were."""
    from knn_ssd.routing.answer_file import AnswerFile

    output.write_line(f"removed {AnswerFile(args.folder).clear()} requests from '{args.folder}'")
    return 0


def _counted(file: AnswerFile, totals: dict[str, int]) -> Iterator[StoredAnswer]:
    for each in file.read():
        totals["requests"] += 1
        totals["tokens"] += len(each.prompt_ids) + len(each.token_ids)
        totals["useful"] += each.accepted > 0
        yield each


def _tokenizer(model: str, file: AnswerFile) -> PreTrainedTokenizerBase | None:
    from knn_ssd.loading.fingerprint import hash_of_vocabulary
    from knn_ssd.loading.resolve import load_tokenizer

    tokenizer = load_tokenizer(model)
    if hash_of_vocabulary(tokenizer) != file.fingerprint.tokenizer_hash:
        raise UsageError(f"the answer store is of a model with another tokenizer than '{model}'", "Name that model.")
    return tokenizer


def _json(each: StoredAnswer, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    return {
        "accepted": each.accepted,
        "last_used": each.last_used,
        "by_drafter": {name: {"drafted": count[0], "accepted": count[1]} for name, count in each.by_drafter.items()},
        "prompt_ids": each.prompt_ids.tolist(),
        "token_ids": each.token_ids.tolist(),
        **({} if tokenizer is None else {"prompt": tokenizer.decode(each.prompt_ids)}),
    }


def _table(shown: list[StoredAnswer], tokenizer: PreTrainedTokenizerBase | None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = "accepted: draft tokens from the answer that were accepted in later requests; last used: in requests\n"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for title in ("accepted", "last used", "prompt tokens", "answer tokens"):
        table.add_column(title, justify="right")
    table.add_column("prompt", overflow="fold")
    for each in shown:
        counts = (f"{each.accepted:.0f}", str(each.last_used), str(len(each.prompt_ids)), str(len(each.token_ids)))
        table.add_row(*map(Text, (*counts, _beginning(each, tokenizer))))
    return table


def _beginning(each: StoredAnswer, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The beginning of a prompt on one line, as text if there is a tokenizer, else as token ids."""
    if tokenizer is None:
        ids = " ".join(map(str, each.prompt_ids[:_SHOWN_IDS].tolist()))
        return f"ids {ids}{' …' if len(each.prompt_ids) > _SHOWN_IDS else ''}"
    text = str(tokenizer.decode(each.prompt_ids[:_SHOWN_CHARACTERS], skip_special_tokens=True))
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 2]} …"
