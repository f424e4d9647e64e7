"""The page at `/`, and the map of anchors that it shows. The page itself is page.html, whole in one file."""

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
    """Adds `/` and `/atlas`, for which no key is asked."""
    page = resources.files("knn_ssd.server").joinpath("page.html").read_text("utf-8")
    headers = {
        "content-security-policy": policy(page),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    lock = Lock()  # a cache alone would let several who ask at once each do the work

    @cache
    def points() -> list[dict[str, Any]]:
        return [] if atlas is None else places(atlas)

    @app.get("/atlas")
    def read_atlas() -> dict[str, Any]:
        """The atlas's prompts and anchors in two dimensions; no points without an atlas."""
        with lock:  # t-SNE takes seconds: this is not async, so it runs on a thread of its own
            return {"points": points()}


def places(atlas: Atlas) -> list[dict[str, Any]]:
    """Places in [0, 1] by domain; `anchor` is which of the atlas's anchors a point is, None for prompts."""
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


def policy(page: str) -> str:
    """A Content-Security-Policy under which the page's own script and style run, and nothing else."""
    script, style = (_hashes(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> str:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies)
