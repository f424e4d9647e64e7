"""`knn-ssd serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from knn_ssd.cli import options, output
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
    group.add_argument("--host", metavar="H", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument(
        "--port",
        metavar="P",
        type=options.whole_number(0, 65535),
        default=8000,
        help="port to listen on; 0 takes any free one (default: 8000)",
    )
    group.add_argument("--name", metavar="NAME", type=options.filled, help="name of the model for clients")
    group.add_argument(
        "--running",
        metavar="N",
        type=options.whole_number(1),
        default=8,
        help="maximum number of running requests, which are decoded with continuous batching (default: 8)",
    )
    group.add_argument(
        "--waiting",
        metavar="N",
        type=options.whole_number(1),
        default=64,
        help="maximum number of waiting requests; further ones are refused with status 429 (default: 64)",
    )
    group.add_argument(
        "--deadline", metavar="SEC", type=options.number, default=600.0, help="time limit of a request (default: 600)"
    )
    group.add_argument(
        "--max-body",
        metavar="BYTES",
        type=options.whole_number(1),
        default=4 * 2**20,
        help="maximum size of a request body (default: 4 MiB)",
    )
    group.add_argument(
        "--drain",
        metavar="SEC",
        type=options.number,
        default=30.0,
        help="time that running requests get to finish after Ctrl-C (default: 30)",
    )
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
    socket = listen(args.host, args.port)
    try:
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
    finally:
        socket.close()
    return 0
