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
        description="Answers over HTTP as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models; "
        "besides, a page to try it at /, and /health, /ready and /metrics. Clients may stream. "
        "Needs `pip install knn-ssd[serve]`.",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", metavar="H", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    group.add_argument(
        "--port", metavar="P", type=options.whole_number(0, 65535), default=8000, help="(default: 8000; 0 takes any)"
    )
    group.add_argument("--name", metavar="NAME", type=options.filled, help="what clients call the model")
    group.add_argument(
        "--running",
        metavar="N",
        type=options.whole_number(1),
        default=8,
        help="requests that are answered at once, in shared passes of the model (default: 8)",
    )
    group.add_argument(
        "--waiting",
        metavar="N",
        type=options.whole_number(1),
        default=64,
        help="requests that may wait beyond these; more are told to try again (default: 64)",
    )
    group.add_argument(
        "--deadline", metavar="SEC", type=options.number, default=600.0, help="of a request (default: 600)"
    )
    group.add_argument(
        "--max-body",
        metavar="BYTES",
        type=options.whole_number(1),
        default=4 * 2**20,
        help="longest body of a request (default: 4 MiB)",
    )
    group.add_argument(
        "--drain",
        metavar="SEC",
        type=options.number,
        default=30.0,
        help="how long answers may go on after Ctrl-C (default: 30)",
    )
    options.add_prefix_option(group)
    parser.epilog = f"Clients must give the API key that the environment variable {_KEY} has, if it is set."
    options.add_model_options(parser)
    options.add_atlas_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
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
        with suppress(KeyboardInterrupt):  # which is given on once everything has ended
            uvicorn.Server(config).run(sockets=[socket])
    finally:
        socket.close()
    return 0
