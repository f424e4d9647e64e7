"""Who may use a path, and how long a body may be: what is checked before anything of a request is read or parsed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive, Scope

from knn_ssd.owner import Owner
from knn_ssd.server.owners import Owners
from knn_ssd.server.problems import StatusError

CLIENT_GONE = 499  # status that servers log for a client that disconnected

# Times the limit: a client that is still sending does not read a refusal before the connection is closed.
_READ_BEYOND = 16


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """How long a request body may be, and how long it may take.

    Args:
        max_bytes: the longest body.
        timeout_sec: seconds within which it must arrive.
    """

    max_bytes: int = 4 * 2**20
    timeout_sec: float = 30.0

    async def read(self, scope: Scope, receive: Receive) -> bytes | None:
        """A request's whole body; None if the client went away.

        Raises:
            StatusError: the body is too long or too slow. Up to a multiple of the limit, the rest of a body that is too
                long is read and dropped first, unless the client waits for permission to send it (`Expect`).
        """
        try:
            async with asyncio.timeout(self.timeout_sec):
                return await self._read(scope, receive)
        except TimeoutError:
            message = f"the body did not arrive within {self.timeout_sec:g} seconds"
            raise StatusError(408, message, headers={"connection": "close"}) from None

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self.max_bytes * (1 if b"expect" in headers else _READ_BEYOND):
            raise self._too_long()
        body, size, more = bytearray(), 0, True
        while more and size <= self.max_bytes * _READ_BEYOND:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part: bytes = message.get("body", b"")
            size += len(part)
            if size <= self.max_bytes:
                body += part
            more = bool(message.get("more_body"))
        if size > self.max_bytes:
            raise self._too_long()
        return bytes(body)

    def _too_long(self) -> StatusError:
        return StatusError(413, f"the body is longer than {self.max_bytes} bytes", headers={"connection": "close"})


def keyed_route(owners: Owners, limit: BodyLimit) -> type[APIRoute]:
    """A kind of route whose requests need an API key, if there are keys, and have a body within the limit.

    The check is a part of the route, so it holds under whatever path the application is mounted. It sets
    `request.state.owner`.
    """

    class KeyedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def checked(request: Request) -> Response:
                request.state.owner = _owner_of(request, owners)
                body = await limit.read(request.scope, request.receive)
                if body is None:
                    return Response(status_code=CLIENT_GONE)  # not received, but counted in the metrics
                return await handle(Request(request.scope, _replaying(body, request.receive)))

            return checked

    return KeyedRoute


def _owner_of(request: Request, owners: Owners) -> Owner:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    owner = owners.find(key.strip() if scheme.lower() == "bearer" else "")
    if owner is None:
        message = "the API key is missing or wrong"
        raise StatusError(401, message, "authentication_error", code="invalid_api_key")
    return owner


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which was read already, and then what comes after it."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
