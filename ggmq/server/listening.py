"""The socket, and the loop that serves it until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from ggmq.server.connections import KEEP_ALIVE_S, MAX_HEAD_BYTES, connection_type
from ggmq.server.context import Context
from ggmq.server.options import ServerOptions
from protocol.errors import ConfigError

BACKLOG = 512
GRACE_S = 1
"""So long answers that were told to end may take for their last words."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address; nobody can connect yet. Port 0: one that is free. Errors: ConfigError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        s = socket.socket(family, kind, proto)
        try:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
        except OSError:
            s.close()
            raise
    except OSError as e:
        raise ConfigError(f"--host {host} --port {port}: {e.strerror}; choose another, or --port 0 for a free one") from None
    return s


def url_of(s: socket.socket) -> str:
    host, port = s.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield


def serve(app: Starlette, listening: socket.socket, options: ServerOptions, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; then all answers end at once. ready: is called when one can connect.

    Errors: KeyboardInterrupt for the signal.
    """
    logging.getLogger("uvicorn").addHandler(logging.NullHandler())  # what it has to say of clients' faults nobody needs
    logging.getLogger("uvicorn").propagate = False
    asyncio.run(_serve(app, listening, options, ready))
    raise KeyboardInterrupt


async def _serve(app: Starlette, listening: socket.socket, options: ServerOptions, ready: Callable[[], None]) -> None:
    context: Context = app.state.context
    server = _Server(uvicorn.Config(
        app, http=connection_type(options), ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=GRACE_S,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES, backlog=BACKLOG,
    ))  # fmt: skip

    def stop() -> None:
        server.should_exit = True
        context.answers.close()

    loop = asyncio.get_running_loop()
    for s in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(s, stop)
    told = asyncio.ensure_future(_tell(server, ready))
    try:
        await server.serve([listening])
    finally:
        told.cancel()
        context.models.close()


async def _tell(server: uvicorn.Server, ready: Callable[[], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    ready()
