"""Ways to go on answering while something takes long: a worker has one thread, and what proves it alive is what works."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from protocol.errors import Cancelled

T = TypeVar("T")

Tick = Callable[[], None]
"""Called between pieces of work: the process answers PINGs there. Raises Cancelled when the work is no longer wanted."""
TICK_S = 0.02
"""How often what takes long lets the process look at its sockets."""
PIECE_BYTES = 1 << 20
"""What is read, packed or copied at once: it is still in the processor's cache when it is packed, and takes no time."""
STALL_S = 60.0
"""A disk that takes longer than this over one piece has failed."""


def nothing() -> None:
    """The tick of a process that nobody waits for."""


def pieces(n_bytes: int, size: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Where each piece of so many bytes begins, and its size."""
    return ((at, min(size, n_bytes - at)) for at in range(0, n_bytes, size))


def paced(tick: Tick) -> Tick:
    """A tick that may be called after every piece, however small: it looks at the sockets when TICK_S have passed."""
    due = time.monotonic() + TICK_S

    def call() -> None:
        nonlocal due
        if time.monotonic() >= due:
            tick()
            due = time.monotonic() + TICK_S

    return call


@contextlib.contextmanager
def completing(tick: Tick) -> Iterator[Tick]:
    """A tick for what must not end half-way: Cancelled is raised when the block has been completed."""
    stopped: list[Cancelled] = []

    def call() -> None:
        try:
            tick()
        except Cancelled as e:
            stopped.append(e)

    yield call
    if stopped:
        raise stopped[0]


class Job(Generic[T]):
    """Something that an `Aside` does. Threads: one starts it and waits for it, the other does it."""

    def __init__(self, do: Callable[[], T]) -> None:
        self._do: Callable[[], T] | None = do
        self._finished = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        assert self._do is not None  # a job is run once
        try:
            self._result.append(self._do())
        except BaseException as e:
            self._error = e.with_traceback(None)  # a traceback would keep this frame, and with it the job
        self._do = None
        self._finished.set()

    @property
    def finished(self) -> bool:
        return self._finished.is_set()

    def wait(self, tick: Tick, within_s: float) -> bool:
        """Whether it has been done, within so long."""
        due = time.monotonic() + within_s
        while not self._finished.wait(max(0.0, min(TICK_S, due - time.monotonic()))):
            tick()
            if time.monotonic() >= due:
                return self.finished
        return True

    def outcome(self) -> T:
        """What it returned, or raised; it has been done."""
        if self._error is not None:
            raise self._error
        return self._result[0]


class Alongside:
    """A thread for what one call computes for long, while its caller looks at the sockets.

    That the caller can answer says nothing of whether the call gets on, so it is that thread's processor time that counts: a
    tick is given only if it has run since the last one. One that waits for what never comes is as silent as it would be
    without the other; where the system does not tell (macOS), that it has not ended counts.

    Threads: call from one.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job[Any]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, what: Callable[[], T], tick: Tick) -> T:
        """Its result, or what it raised. It is done whole: Cancelled is raised when it has been."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="ggmq-compute")
            self._thread.start()
        job = Job(what)
        self._jobs.put(job)
        ran = self._ran_s()
        with completing(tick) as steady:
            while not job.wait(nothing, TICK_S):
                before, ran = ran, self._ran_s()
                if ran != before or ran < 0:
                    steady()
        return job.outcome()

    def _ran_s(self) -> float:
        """The thread's processor time; below 0: it is not known."""
        if self._thread is None or self._thread.ident is None or not hasattr(time, "pthread_getcpuclockid"):
            return -1.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            job.run()
            del job  # nothing of it is kept while the next one is awaited


alongside = Alongside()
"""The one of a worker's process, whose device and sockets have one thread."""


class Aside:
    """A thread for what a disk may take long over. It does jobs in the order in which they were started.

    Threads: start and wait from one. It ends with the process, whatever it is doing.
    """

    def __init__(self, name: str, stall_s: float = STALL_S) -> None:
        self.name, self.stall_s = name, stall_s
        self._jobs: SimpleQueue[Job[Any]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._late: Job[Any] | None = None

    def start(self, do: Callable[[], T]) -> Job[T]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name=self.name)
            self._thread.start()
        job = Job(do)
        self._jobs.put(job)
        return job

    @property
    def stalled(self) -> bool:
        """Whether a job was waited for in vain, and has still not been done."""
        return self._late is not None and not self._late.finished

    def wait(self, job: Job[Any], tick: Tick) -> None:
        """Until a job has been done.

        Errors: TimeoutError when it takes too long; as long as it does, other jobs are not waited for.
        """
        if not job.wait(tick, 0.0 if self.stalled else self.stall_s):
            self._late = job
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def result(self, job: Job[T], tick: Tick) -> T:
        """What a job returned, or raised. Errors: TimeoutError as `wait`."""
        self.wait(job, tick)
        return job.outcome()

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            job.run()
            del job  # nothing of it is kept while the next one is awaited
