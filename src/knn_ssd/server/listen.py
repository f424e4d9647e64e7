"""Opens the socket that a server listens on, before the model is loaded: a port in use is reported at once."""

from __future__ import annotations

import socket

from knn_ssd.errors import UsageError

_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket.

    Raises:
        UsageError: the address cannot be listened at.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"'{host}' is no address to listen at: {error.strerror or error}") from error
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
        own.listen(_BACKLOG)
    except OSError as error:
        own.close()
        remedy = "Choose another --port, or 0 for any."
        raise UsageError(f"port {port} of '{host}' cannot be listened at: {error.strerror or error}", remedy) from error
    return own
