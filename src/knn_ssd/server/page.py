"""The chat page at `/` and the map of anchors that it shows. The page itself is the file page.html."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from threading import Lock
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from knn_ssd.atlas import Atlas


def add_page(app: FastAPI, atlas: Atlas | None) -> None:
    """Adds `/` and `/atlas`, which need no API key."""
    page = resources.files("knn_ssd.server").joinpath("page.html").read_text("utf-8")
    headers = {
        "content-security-policy": content_security_policy(page),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    lock = Lock()  # without it, simultaneous requests would each compute the points

    @cache
    def points() -> list[dict[str, Any]]:
        return [] if atlas is None else map_points(atlas)

    @app.get("/atlas")
    def read_atlas() -> dict[str, Any]:
        """The atlas's prompts and anchors as points in two dimensions; none without an atlas."""
        with lock:  # t-SNE takes seconds; a path that is not async runs on a thread of its own
            return {"points": points()}


def map_points(atlas: Atlas) -> list[dict[str, Any]]:
    """Points with coordinates in [0, 1] and a domain; `anchor` is the index of an anchor, None for a prompt."""
    from knn_ssd.routing.projection import Points

    found = Points.of(atlas)
    return [
        {
            "x": round(float(x), 4),
            "y": round(float(y), 4),
            "domain": domain,
            "anchor": index - found.num_prompts if index >= found.num_prompts else None,
        }
        for index, ((x, y), domain) in enumerate(zip(found.places, found.domains, strict=True))
    ]


def content_security_policy(page: str) -> str:
    """A Content-Security-Policy that allows the page's own script and style, and nothing else."""
    script, style = (_hashes(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> str:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies)
