"""`ggmq top`: workers, devices, memory, rates, queue and slots, live: of a server, or of a broker and its devices alone."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import select
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.live import Live

from ggmq.cli.clusterfile import apply_cluster
from ggmq.cli.options import add_security, endpoint, keys_of, real, require_file, text_of
from ggmq.cli.session import note
from ggmq.cli.topview import Seen, drawn
from ggmq.cluster import connect
from ggmq.overview import ClusterState, Queue, Rates, hosts_of
from ggmq.watching import EVERY_S, BusWatch
from protocol.errors import ConfigError, GgmqError, Unavailable

URL = "http://127.0.0.1:8080"
ANSWER_S = 5.0
MAX_ANSWER_BYTES = 4 << 20
KEY_S = 0.1
Look = Callable[[], ClusterState]


def add(commands: Any) -> None:
    p = commands.add_parser("top", help="watch a server or a cluster", description="""Show workers, devices, memory, rates,
        the queue and what each slot does, until q is pressed. Where the output is no terminal: once.""")  # fmt: skip
    g = p.add_mutually_exclusive_group()
    g.add_argument("--url", default=None, help=f"a server that `ggmq serve` runs (default {URL})")
    g.add_argument("--broker", type=endpoint, metavar="ENDPOINT", help="the devices of a broker (tcp://HOST:PORT)")
    g.add_argument("--cluster", type=Path, metavar="FILE", help="the devices of the cluster that `ggmq up FILE` started")
    p.add_argument("--api-key", default="", metavar="KEY", help="the server's, where it asks for one")
    p.add_argument("--api-key-file", metavar="FILE", help="a file whose first line is the key")
    p.add_argument("-d", "--delay", type=real(0.1, 3600), default=1.0, metavar="SECONDS", help="between frames (default 1)")
    p.add_argument("--once", action="store_true", help="print one frame and end; exit code 1 when nothing answers")
    add_security(p)
    p.set_defaults(run=_top, model=None, hf_repo=None, ctx_size=0, tensor_split=None)


def _top(args: argparse.Namespace) -> int:
    if args.cluster is not None:
        apply_cluster(args, require_file(args.cluster))
    console = Console()
    with _looking(args) as (seen, look):
        if args.once or not console.is_terminal:
            return _once(seen, look, console)
        with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                _look(seen, look)
                live.update(drawn(seen, time.monotonic(), console.width), refresh=True)
                due = time.monotonic() + args.delay
                while time.monotonic() < due:
                    if pressed() in ("q", "Q", "\x03", "\x1b"):
                        return 0


def _once(seen: Seen, look: Look, console: Console) -> int:
    """Two looks, so that there are rates; then a frame."""
    seen.heard(time.monotonic(), look())
    time.sleep(2 * EVERY_S)
    seen.heard(time.monotonic(), look())
    console.print(drawn(seen, time.monotonic(), console.width))
    return 0


def _look(seen: Seen, look: Look) -> None:
    """What cannot be seen now may be later; what was seen stays. Errors: ConfigError, which trying again does not mend."""
    try:
        seen.heard(time.monotonic(), look())
    except ConfigError:
        raise
    except GgmqError as e:
        seen.error = str(e)


@contextlib.contextmanager
def _looking(args: argparse.Namespace) -> Iterator[tuple[Seen, Look]]:
    """What is watched, and how to look at it. Errors: as `connect`'s."""
    if not args.broker:
        url = (args.url or URL).rstrip("/")
        lines = text_of("--api-key-file", args.api_key_file).splitlines() if args.api_key_file is not None else []
        key = args.api_key or next((k for line in lines if (k := line.strip()) and not k.startswith("#")), "")
        yield Seen(url, True), lambda: server_state(url, key)
        return
    client = connect(args.broker, keys_of(args), note, getattr(args, "cluster_id", b""))
    watch = BusWatch(client)
    try:
        yield Seen(args.broker, False), lambda: bus_state(watch)
    finally:
        watch.close()


def server_state(url: str, key: str) -> ClusterState:
    """What a server says of itself. Errors: Unavailable; ConfigError where another key, or address, is needed."""
    try:
        request = urllib.request.Request(f"{url}/cluster", headers={"Authorization": f"Bearer {key}"} if key else {})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=ANSWER_S) as answer:
            return msgspec.json.decode(answer.read(MAX_ANSWER_BYTES), type=ClusterState)
    except urllib.error.HTTPError as e:
        if e.code in (401, 403):
            raise ConfigError(f"{url}: it asks for a key; give it with --api-key or --api-key-file") from None
        raise Unavailable(f"{url}: it answers {e.code} {e.reason}; is that a ggmq server?") from None
    except urllib.error.URLError as e:
        raise Unavailable(f"{url}: {getattr(e.reason, 'strerror', None) or e.reason}") from None
    except ValueError as e:
        if isinstance(e, msgspec.MsgspecError):
            raise Unavailable(f"{url}: expected a ggmq server's /cluster, {e}") from None
        raise ConfigError(f"--url {url}: expected http://HOST:PORT, {e}") from None
    except (OSError, http.client.HTTPException) as e:
        raise Unavailable(f"{url}: {getattr(e, 'strerror', None) or e or type(e).__name__}") from None


def bus_state(watch: BusWatch) -> ClusterState:
    """The devices of a bus, of which no models are known. Errors: Unavailable."""
    due = time.monotonic() + ANSWER_S
    while not watch.picture.devices and not watch.picture.error and time.monotonic() < due:
        time.sleep(0.02)
    picture = watch.picture
    if picture.error:
        raise Unavailable(picture.error)
    return ClusterState([], hosts_of(picture.devices, {}), Rates(0.0, 0.0), Queue(0, 0), [], 0.0, "")


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """A function that waits a moment for a key; none where standard input is no terminal."""
    if not sys.stdin.isatty():
        yield lambda: time.sleep(KEY_S) or ""  # type: ignore[func-returns-value]
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def pressed() -> str:
        ready, _, _ = select.select([fd], [], [], KEY_S)
        return os.read(fd, 1).decode("ascii", "replace") if ready else ""

    try:
        tty.setcbreak(fd)
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
