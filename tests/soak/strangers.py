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
from tests.soak.report import Report
from tests.support.fixtures import free_port

MAX_FDS = 1024
N_CLIENTS = 10
PACE_S = 0.001
"""Between two connections: a backlog of 128 is not the point."""


@contextlib.contextmanager
def crowd(port: int, n: int) -> Iterator[list[socket.socket]]:
    """Keep n silent connections open, in a thread: whoever is sent away comes again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < n + 256:
        raise RuntimeError(f"{n} strangers need as many descriptors, the most here is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, n + 256), hard))
    there: list[socket.socket] = []
    stopping = threading.Event()

    def keep() -> None:
        poller = select.poll()
        by_fd: dict[int, socket.socket] = {}
        while not stopping.is_set():
            if len(by_fd) < n:
                with contextlib.suppress(OSError):  # it would not have us; the next one may
                    s = socket.create_connection(("127.0.0.1", port), 0.2)
                    by_fd[s.fileno()] = s
                    poller.register(s, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
            for fd, _ in poller.poll(0):
                poller.unregister(fd)
                by_fd.pop(fd).close()
            there[:] = by_fd.values()
            stopping.wait(PACE_S)

    thread = threading.Thread(target=keep, name="soak-crowd", daemon=True)
    thread.start()
    try:
        yield there
    finally:
        stopping.set()
        thread.join()
        for s in there:
            s.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def run_strangers(ground: Ground, report: Report, n: int) -> None:
    keys = ground.folder / "keys"
    write_keys(keys, new_keys())
    port = free_port()
    command = [*WORKER, "-p", str(port), "-d", "CPU", "-t", "1", "--keys", str(keys)]
    p = ground.process("guarded", command, MAX_FDS)
    if not p.says(ENDED, READY_S):
        raise RuntimeError(f"the guarded worker was not ready: {p.story()}")
    with contextlib.ExitStack() as stack:
        for i, step in enumerate(report.steps("strangers", 2 * N_CLIENTS)):
            if i == 0:
                there = stack.enter_context(crowd(port, n))
                due = time.monotonic() + 60
                while len(there) < 0.9 * min(n, MAX_FDS) and time.monotonic() < due:
                    time.sleep(0.05)
                step.did(f"strangers at once (about {len(there) // 100 * 100})")
            elif i == N_CLIENTS:
                stack.close()
            when = "during" if i < N_CLIENTS else "after"
            start = time.monotonic()
            run = ground.run(PROMPTS[0], N_TOKENS, "--rpc", f"127.0.0.1:{port}", "--keys", str(keys))
            if check_run(ground, step, run, PROMPTS[0], N_TOKENS, 30):
                step.did(f"served {when}")
                step.took(f"a run {when}", time.monotonic() - start)
            if not p.alive:
                step.fail(f"the worker ended: {p.story()}")
                return
