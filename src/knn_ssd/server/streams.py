"""Responses that a client can leave: work that ends with its connection, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = "data: [DONE]\n\n"
PING = ": ping\n\n"  # a comment, which clients ignore
PING_SEC = 5.0  # without an event after which a comment is sent, so that no proxy takes the connection for dead

T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """The client disconnected before its response was complete."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`, which is cancelled when the client disconnects.

    Raises:
        ClientDisconnectedError: the client disconnected.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Mapping[str, Any]) -> str:
    """A server-sent event. It is ASCII: many clients take characters such as U+2028 for the end of a line."""
    return f"data: {json.dumps(data)}\n\n"


class EventStream(StreamingResponse):
    """A stream of server-sent events, which ends when the client disconnects.

    Args:
        events: the events.
        close: is called when the stream ends, for whatever reason, even before its first event.
        headers: headers of the response.
    """

    def __init__(
        self, events: AsyncGenerator[str, None], close: Callable[[], None], headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._events):
                await unless_gone(receive, self.stream_response(send))
        except (ClientDisconnectedError, OSError):
            pass  # there is no client left to answer
        finally:
            self._close()
