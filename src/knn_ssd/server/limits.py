"""What is read of a request before anybody looks at it: not too much, and not for too long."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_GONE = 499  # what servers log for a client that did not wait

_MOST_SAID = 1000  # characters of what a client sent that an error repeats
_READ_BEYOND = 16  # times the limit: who sends without listening would not hear the refusal of a connection that ends


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API has it; what a client sent can be said back to it, whatever it is."""
    return {"error": {"message": _sayable(message), "type": kind, "param": param and _sayable(param), "code": code}}


def _sayable(text: str) -> str:
    """Lone surrogates are no Unicode text, and a name of a megabyte is nothing to repeat."""
    short = text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}…"
    return short.encode("utf-8", "backslashreplace").decode()


class _TooLongError(Exception):
    """A body beyond the limit."""


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
        except _TooLongError:
            await _refuse(send, 413, f"the body is longer than {self._most_bytes} bytes")
            return
        if body is None:
            await _refuse(send, CLIENT_GONE, "the client went away")  # which nobody hears, but it is counted
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
        """The body; None if the client went away.

        Raises:
            _TooLongError: what is too long was read on for a while and thrown away; unless the client asked before it
                sent anything, or says itself that there is no end of it.
        """
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._most_bytes * (1 if b"expect" in headers else _READ_BEYOND):
            raise _TooLongError
        body, size, more = bytearray(), 0, True
        while more and size <= self._most_bytes * _READ_BEYOND:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part: bytes = message.get("body", b"")
            size += len(part)
            if size <= self._most_bytes:
                body += part
            more = bool(message.get("more_body"))
        if size > self._most_bytes:
            raise _TooLongError
        return bytes(body)


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(message, "invalid_request_error")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
