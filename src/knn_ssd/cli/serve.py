"""`knn-ssd serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import ipaddress
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import options, output
from knn_ssd.cli.options import option, whole_number
from knn_ssd.errors import PromptError, UsageError

if TYPE_CHECKING:
    from knn_ssd.engine import Engine
    from knn_ssd.server.owners import Owners

_KEY = "KNN_SSD_API_KEY"
_SHARED = "shared"


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "serve",
        description="Serves an OpenAI-compatible API over HTTP: /v1/chat/completions, /v1/completions, /v1/models; "
        "also a page to try it at /, and /health, /ready and /metrics. Clients may stream. "
        "Needs `pip install knn-ssd[serve]`.",
    )
    group = parser.add_argument_group("server")
    option(group, "--host", "H", "address to listen on", default="127.0.0.1")
    option(group, "--port", "P", "port to listen on; 0 takes any free one", whole_number(0, 65535), 8000)
    text = "name of the model for clients, beside that of --model (default: the last part of --model)"
    option(group, "--name", "NAME", text, options.filled)
    text = "chat template (Jinja) to use instead of the model's own"
    option(group, "--chat-template", "FILE", text, options.filled)
    text = (
        "origin of a web page that browsers let use the server, such as https://example.org; * is any; may be given "
        "several times (default: none but the server's own page)"
    )
    option(group, "--cors", "ORIGIN", text, options.filled, action="append")
    text = "maximum number of running requests, which are decoded with continuous batching"
    option(group, "--running", "N", text, whole_number(1), 8)
    text = "maximum number of waiting requests; further ones are refused with status 429"
    option(group, "--waiting", "N", text, whole_number(1), 64)
    option(group, "--deadline", "SEC", "time limit of a request", options.number, 600.0)
    text = "maximum size of a request body (default: 4 MiB)"
    option(group, "--max-body", "BYTES", text, whole_number(1), 4 * 2**20)
    text = "time that running requests get to finish after Ctrl-C"
    option(group, "--drain", "SEC", text, options.number, 30.0)
    _add_keeping_options(parser)
    parser.epilog = (
        f"If the environment variable {_KEY} is set, clients must send its value as their API key; several keys are "
        "separated by commas."
    )
    options.add_model_options(parser)
    options.add_atlas_options(parser)


def _add_keeping_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "kept between requests",
        f"Each API key ({_KEY}) has a prefix cache and an answer store of its own, with an equal share of the memory. "
        "Without keys, there is an answer store only where --answers asks for one, and a prefix cache only there or on "
        "a loopback address such as 127.0.0.1.",
    )
    text = "memory of all prefix caches together, which keep keys and values of earlier requests; 0 turns them off"
    option(group, "--prefix-cache", "MIB", text, whole_number(0), 512)
    answers = group.add_mutually_exclusive_group()
    text = (
        "keep earlier requests, whose answers draft for similar ones, in this folder, where they outlast the server; "
        f"or '{_SHARED}': all clients share one answer store and one prefix cache. May be given twice, for both "
        "(default: each API key has a store in memory)"
    )
    option(answers, "--answers", f"DIR|{_SHARED}", text, options.filled, action="append", dest="kept_answers")
    answers.add_argument("--no-answers", action="store_true", help="keep no answers of earlier requests")


def run(args: argparse.Namespace) -> int:
    """Serves until it is stopped."""
    for name in ("deadline", "drain"):
        if getattr(args, name) <= 0:
            raise UsageError(f"--{name} must be above 0, got {getattr(args, name):g}")
    try:
        import uvicorn

        from knn_ssd.server.app import ServeSettings, make_app
        from knn_ssd.server.listen import listen
        from knn_ssd.server.owners import read_keys
    except ModuleNotFoundError as error:
        raise UsageError(f"serving needs '{error.name}'", "Install it with `pip install knn-ssd[serve]`.") from error
    from knn_ssd.loading.resolve import EMBEDDED_MODEL
    from knn_ssd.server.scheduler import Limits

    keys = read_keys(os.environ.get(_KEY, ""))
    template = None if args.chat_template is None else _read_template(Path(args.chat_template))
    atlas = options.read_atlas(args)
    with listen(args.host, args.port) as socket:
        host, port = socket.getsockname()[:2]
        keeping = _Keeping.chosen(args, keys, ipaddress.ip_address(host).is_loopback)
        engine = options.load_engine(args, atlas)
        if template is not None:
            _use_template(engine, template)
        options.prepare_later(engine)
        model = args.model or EMBEDDED_MODEL
        name = args.name or Path(model).name
        owners = keeping.owners(engine, keys)
        settings = ServeSettings(
            model=name,
            owners=owners,
            limits=Limits(args.running, args.waiting, args.deadline),
            max_body_bytes=args.max_body,
            drain_sec=args.drain,
            aliases=(model, Path(model).name),
            origins=tuple(args.cors or ()),
        )
        app = make_app(engine, settings)
        output.note(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends it)")
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=int(args.drain) + 1, timeout_keep_alive=30
        )
        with suppress(KeyboardInterrupt):  # uvicorn raises it again once everything has ended
            uvicorn.Server(config).run(sockets=[socket])
        owners.close()
    return 0


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"the chat template '{path}' cannot be read: {reason}") from error


def _use_template(engine: Engine, template: str) -> None:
    """Replaces the tokenizer's chat template.

    Raises:
        UsageError: there is no tokenizer, or the template is not valid Jinja.
    """
    from jinja2 import TemplateSyntaxError

    engine.use_chat_template(template)
    try:
        engine.encode("a")
    except PromptError as error:
        if isinstance(syntax := error.__cause__, TemplateSyntaxError):
            message = f"the chat template is not valid, at line {syntax.lineno}: {syntax.message}"
            raise UsageError(message) from error
        output.note(f"note: {error}")  # perhaps it needs more than one message


@dataclass(frozen=True, slots=True)
class _Keeping:
    """What is kept between requests, and for whom.

    Args:
        shared: all clients are one owner.
        prefix_cache_bytes: memory of all prefix caches; 0 is none.
        answers: whether there are answer stores.
        folder: where they are kept; None is in memory.
    """

    shared: bool
    prefix_cache_bytes: int
    answers: bool
    folder: Path | None

    @classmethod
    def chosen(cls, args: argparse.Namespace, keys: tuple[str, ...], is_loopback: bool) -> _Keeping:
        """What the options ask for, as far as no client can learn from it what another one asked.

        Raises:
            UsageError: a folder for the answers of unknown clients, or more than one folder.
        """
        given = args.kept_answers or []
        shared, folders = _SHARED in given, [Path(each) for each in given if each != _SHARED]
        if len(folders) > 1:
            raise UsageError(f"--answers takes one folder, got {' and '.join(map(str, folders))}")
        separate = bool(keys) or shared
        remedy = f"Set {_KEY}, or give --answers {_SHARED} to have all clients share what is kept."
        if folders and not separate and not is_loopback:
            raise UsageError(f"--answers {folders[0]} would keep requests of clients without API keys", remedy)
        wanted = {
            "prefix cache": (args.prefix_cache > 0, separate or is_loopback),
            "answer store": (not args.no_answers, separate or bool(folders)),
        }
        missing = [name for name, (asked, allowed) in wanted.items() if asked and not allowed]
        if missing:
            text = f"no {' and no '.join(missing)}: clients without API keys could learn what others asked"
            output.note(f"note: {text}. {remedy}")
        prefix_cache, answers = (all(each) for each in wanted.values())
        return cls(shared, args.prefix_cache * 2**20 * prefix_cache, answers, folders[0] if folders else None)

    def owners(self, engine: Engine, keys: tuple[str, ...]) -> Owners:
        """The owners, with what is kept for them.

        Raises:
            AnswerStoreError: an answer store in the folder that cannot be used.
        """
        from knn_ssd.loading.fingerprint import fingerprint
        from knn_ssd.routing.answers import AnswerStore
        from knn_ssd.server.owners import Owners

        own = fingerprint(engine.model, engine.tokenizer) if self.folder is not None else None

        def new_store(name: str, max_tokens: int) -> AnswerStore:
            if self.folder is None or own is None:
                return AnswerStore(max_tokens)
            return AnswerStore.open(self.folder / name, own, engine.backend.vocab_size, max_tokens)

        store = new_store if self.answers else None
        return Owners.dividing(self.prefix_cache_bytes, store, keys=keys, shared=self.shared)
