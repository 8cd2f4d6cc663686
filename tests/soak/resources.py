"""What the long-lived processes hold: the same after any number of sessions, lives and faults."""

from __future__ import annotations

import contextlib
import gc
import os
import threading

from tests.soak.ground import Ground
from tests.soak.report import MIB, Report, Step
from tests.support.supervised import Figures, Supervised, figures_of, until, zombies_of

MAX_GROWTH_BYTES = 20 * MIB
MAX_MORE_FDS = 8
MAX_MORE_THREADS = 4
"""A worker has some from when another first reads weights from it: for those who connect, its cache and its model folder."""
MAX_MORE_OWN_FDS = 24
"""libzmq keeps some slots of a context's closed sockets."""
SETTLE_S = 20.0
SAMPLE_S = 0.5


def _own_figures() -> Figures:
    """Of this process, in which the clients are, without what only waits to be collected."""
    gc.collect()
    return figures_of(os.getpid())


class Resources:
    """Watches the long-lived processes of a ground, from the moment when all have served once.

    Threads: `start`, `again` and `check` from one; it samples in a thread of its own until `stop`.
    """

    def __init__(self, report: Report, ground: Ground) -> None:
        self.report, self.ground = report, ground
        self._before: dict[int, tuple[Supervised, Figures]] = {}
        self._most: dict[int, Figures] = {}
        self._lock = threading.Lock()
        self._own: Figures | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="soak-resources", daemon=True)

    def start(self) -> None:
        self.again()
        self._own = _own_figures()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def again(self) -> None:
        """Take what processes hold now as the measure for those that are new."""
        with self._lock:
            known = self._before
            self._before = {p.pid: known.get(p.pid, (p, p.figures())) for p in self.ground.lasting().values() if p.alive}
            self._most = {pid: self._most.get(pid, before) for pid, (_, before) in self._before.items()}

    def _sample(self) -> None:
        while not self._stopping.wait(SAMPLE_S):
            with self._lock:
                for pid, most in self._most.items():
                    with contextlib.suppress(OSError):  # it has just ended: whoever ended it tells
                        now = figures_of(pid)
                        self._most[pid] = Figures(max(now.rss_bytes, most.rss_bytes), max(now.n_fds, most.n_fds),
                                                  max(now.n_threads, most.n_threads))  # fmt: skip

    def check(self, part: str) -> None:
        """Compare; descriptors and threads may take a while to be given back."""
        step = Step(self.report, part, "resources")
        for name, p in self.ground.lasting().items():
            if not p.alive:
                step.fail(f"it ended: {p.story()}")
                continue
            if p.pid not in self._before:
                continue  # a broker that was started a moment ago
            before = self._before[p.pid][1]

            def settled(p: Supervised = p, before: Figures = before) -> bool:
                now = p.figures()
                return now.n_fds <= before.n_fds + MAX_MORE_FDS and now.n_threads <= before.n_threads + MAX_MORE_THREADS

            if not until(settled, SETTLE_S, 0.2):
                step.fail(f"{name} had {before.n_fds} descriptors and {before.n_threads} threads, "
                          f"now it has {p.figures().n_fds} and {p.figures().n_threads}")  # fmt: skip
            after = p.figures()
            grown = after.rss_bytes - before.rss_bytes
            if grown > MAX_GROWTH_BYTES:
                step.fail(f"{name} has grown by {grown / MIB:.1f} MiB, from {before.rss_bytes / MIB:.1f} MiB")
            with self._lock:
                self.report.held(f"{name}, {part}", before, self._most[p.pid], after)
        self._check_own(step)
        zombies = zombies_of([os.getpid(), *(p.pid for p in self.ground.lasting().values())])
        if zombies:
            step.fail(f"processes that nobody waited for: {zombies}")

    def _check_own(self, step: Step) -> None:
        """Clients that were closed in this process hold no descriptor; its memory is that of the tests."""
        before = self._own
        assert before is not None  # start came first
        if not until(lambda: _own_figures().n_fds <= before.n_fds + MAX_MORE_OWN_FDS, SETTLE_S, 0.2):
            step.fail(f"the clients' process had {before.n_fds} descriptors, now it has {_own_figures().n_fds}")
        after = _own_figures()
        self.report.held(f"clients, {step.part}", before, after, after)
