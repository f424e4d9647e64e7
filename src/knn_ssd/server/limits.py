"""Limits on the size and duration of request bodies, and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_GONE = 499  # status that servers log for a client that disconnected

_MAX_ECHO = 1000  # characters of a client's own text that an error message repeats
# Times the limit: a client that is still sending does not read a refusal before the connection is closed.
_READ_BEYOND = 16


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in the format of OpenAI's API. Texts that a client sent may stand in it as they are."""
    return {"error": {"message": _printable(message), "type": kind, "param": param and _printable(param), "code": code}}


def _printable(text: str) -> str:
    """The text, shortened and without lone surrogates, which cannot be encoded."""
    short = text if len(text) <= _MAX_ECHO else f"{text[:_MAX_ECHO]}…"
    return short.encode("utf-8", "backslashreplace").decode()


class _TooLongError(Exception):
    """The body is longer than the limit."""


def internal_error_message(error: Exception) -> str:
    """The message that clients get for a bug in the server."""
    return f"an error inside the server: {type(error).__name__}"


class BodyLimit:
    """Middleware that reads a request's whole body before the application runs.

    Args:
        app: the application.
        max_bytes: the longest body.
        timeout_sec: seconds within which it must arrive.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_sec: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_sec = timeout_sec

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_sec):
                body = await self._read(scope, receive)
        except TimeoutError:
            await _refuse(send, 408, f"the body did not arrive within {self._timeout_sec:g} seconds")
            return
        except _TooLongError:
            await _refuse(send, 413, f"the body is longer than {self._max_bytes} bytes")
            return
        if body is None:
            await _refuse(send, CLIENT_GONE, "the client went away")  # not received, but counted in the metrics
            return
        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client went away.

        Raises:
            _TooLongError: the body is too long. Up to a multiple of the limit, the rest of it is read and dropped
                first, unless the client waits for permission to send it (`Expect`).
        """
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._max_bytes * (1 if b"expect" in headers else _READ_BEYOND):
            raise _TooLongError
        body, size, more = bytearray(), 0, True
        while more and size <= self._max_bytes * _READ_BEYOND:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part: bytes = message.get("body", b"")
            size += len(part)
            if size <= self._max_bytes:
                body += part
            more = bool(message.get("more_body"))
        if size > self._max_bytes:
            raise _TooLongError
        return bytes(body)


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(message, "invalid_request_error")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
