"""`knn-ssd serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from knn_ssd.cli import options, output
from knn_ssd.cli.options import option, whole_number
from knn_ssd.errors import UsageError

_KEY = "KNN_SSD_API_KEY"


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
    option(group, "--name", "NAME", "name of the model for clients", options.filled)
    text = "maximum number of running requests, which are decoded with continuous batching"
    option(group, "--running", "N", text, whole_number(1), 8)
    text = "maximum number of waiting requests; further ones are refused with status 429"
    option(group, "--waiting", "N", text, whole_number(1), 64)
    option(group, "--deadline", "SEC", "time limit of a request", options.number, 600.0)
    text = "maximum size of a request body (default: 4 MiB)"
    option(group, "--max-body", "BYTES", text, whole_number(1), 4 * 2**20)
    text = "time that running requests get to finish after Ctrl-C"
    option(group, "--drain", "SEC", text, options.number, 30.0)
    options.add_prefix_option(group)
    parser.epilog = f"If the environment variable {_KEY} is set, clients must send its value as their API key."
    options.add_model_options(parser)
    options.add_atlas_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until it is stopped."""
    for name in ("deadline", "drain"):
        if getattr(args, name) <= 0:
            raise UsageError(f"--{name} must be above 0, got {getattr(args, name):g}")
    try:
        import uvicorn

        from knn_ssd.server.app import ServeSettings, make_app
        from knn_ssd.server.listen import listen
    except ModuleNotFoundError as error:
        raise UsageError(f"serving needs '{error.name}'", "Install it with `pip install knn-ssd[serve]`.") from error
    from knn_ssd.server.scheduler import Limits

    atlas = options.read_atlas(args)
    with listen(args.host, args.port) as socket:
        engine = options.load_engine(args, atlas)
        engine.prepare()
        name = args.name or Path(args.model or "SmolLM2-135M-Instruct").name
        settings = ServeSettings(
            model=name,
            api_key=os.environ.get(_KEY) or None,
            limits=Limits(args.running, args.waiting, args.deadline),
            max_body_bytes=args.max_body,
            drain_sec=args.drain,
        )
        app = make_app(engine, settings)
        host, port = socket.getsockname()[:2]
        output.note(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends it)")
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=int(args.drain) + 1, timeout_keep_alive=30
        )
        with suppress(KeyboardInterrupt):  # uvicorn raises it again once everything has ended
            uvicorn.Server(config).run(sockets=[socket])
    return 0
