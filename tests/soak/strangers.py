"""A crowd without the key at a worker with few descriptors: those who have the key are served."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator

from config.auth import new_keys
from config.keys import write_keys
from tests.soak.ground import ENDED, N_TOKENS, PROMPTS, READY_S, WORKER, Ground, check_run
from tests.soak.report import Report, Step
from tests.support.fixtures import free_port
from tests.support.supervised import until

MAX_FDS = 1024
MAX_MORE_FDS = 16
SETTLE_S = 20.0
CLIENT_S = 30.0
CROWDED_S = 0.5
"""After so long the crowd is there."""


@contextlib.contextmanager
def crowd(port: int, n: int, says: bytes = b"") -> Iterator[None]:
    """Keep n connections open or on their way, in a thread, each of which says something and no more: whoever is sent away
    comes again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < n + 256:
        raise RuntimeError(f"{n} strangers need as many descriptors, the most here is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, n + 256), hard))
    stopping = threading.Event()

    def keep() -> None:
        poller = select.poll()
        there: dict[int, socket.socket] = {}
        while not stopping.is_set():
            while len(there) < n:
                s = socket.socket()
                s.setblocking(False)
                s.connect_ex(("127.0.0.1", port))  # under way: the kernel asks again where the queue is full
                there[s.fileno()] = s
                poller.register(s, select.POLLRDHUP | (select.POLLOUT if says else 0))
            for fd, what in poller.poll(20):
                if what == select.POLLOUT:  # it is connected
                    there[fd].send(says)
                    poller.modify(fd, select.POLLRDHUP)
                else:
                    poller.unregister(fd)
                    there.pop(fd).close()
        for s in there.values():
            s.close()

    thread = threading.Thread(target=keep, name="soak-crowd", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def run_strangers(ground: Ground, report: Report, n: int, n_clients: int) -> None:
    """`n_clients` in turn while the crowd is there, and as many when it has gone."""
    keys = ground.folder / "keys"
    write_keys(keys, new_keys())
    port = free_port()
    command = [*WORKER, "-p", str(port), "-d", "CPU", "-t", "1", "--keys", str(keys)]
    p = ground.process("guarded", command, MAX_FDS)
    if not p.says(ENDED, READY_S):
        raise RuntimeError(f"the guarded worker was not ready: {p.story()}")
    client = ["--rpc", f"127.0.0.1:{port}", "--keys", str(keys)]
    check_run(ground, Step(report, "strangers", "before"), ground.run(PROMPTS[0], N_TOKENS, *client), PROMPTS[0], N_TOKENS)
    before = most = p.figures()
    with contextlib.ExitStack() as stack:
        for i, step in enumerate(report.steps("strangers", 2 * n_clients)):
            if i == 0:
                stack.enter_context(crowd(port, n))
                time.sleep(CROWDED_S)
            elif i == n_clients:
                stack.close()
            when = "during" if i < n_clients else "after"
            most = max(most, p.figures(), key=lambda f: f.n_fds)
            start = time.monotonic()
            if check_run(ground, step, ground.run(PROMPTS[0], N_TOKENS, *client), PROMPTS[0], N_TOKENS, CLIENT_S):
                step.did(f"served {when}")
                step.took(f"a run {when}", time.monotonic() - start)
            if not p.alive:
                step.fail(f"the worker ended: {p.story()}")
                return
    end = Step(report, "strangers", "end")
    if not until(lambda: p.figures().n_fds <= before.n_fds + MAX_MORE_FDS, SETTLE_S, 0.2):
        end.fail(f"the crowd has gone, and the worker still has {p.figures().n_fds} descriptors of {before.n_fds} before")
    report.held("guarded worker, strangers", before, most, p.figures())
    ground.done(p)
