"""What is read of a request before anybody looks at it: not too much, and not for too long."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def inside(error: Exception) -> str:
    """What clients are told of a fault of ours."""
    return f"an error inside the server: {type(error).__name__}"


class BodyLimit:
    """Reads a request's body whole before the application sees it.

    Args:
        app: the application.
        most_bytes: of a body.
        patience_sec: until it must have arrived.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, patience_sec: float) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._patience_sec = patience_sec

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._patience_sec):
                body = await self._read(scope, receive)
        except TimeoutError:
            await _refuse(send, 408, f"the body did not arrive within {self._patience_sec:g} seconds")
            return
        if body is None:
            return  # the client went away
        if len(body) > self._most_bytes:
            await _refuse(send, 413, f"the body is longer than {self._most_bytes} bytes")
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or enough of it to see that it is too long; None if the client went away."""
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._most_bytes:
            return b" " * (self._most_bytes + 1)
        parts, size, more = [], 0, True
        while more and size <= self._most_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part: bytes = message.get("body", b"")
            parts.append(part)
            size += len(part)
            more = bool(message.get("more_body"))
        return b"".join(parts)


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(message, "invalid_request_error")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
