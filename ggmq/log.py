"""What a server does, for its log: one line an event in logfmt, `time=... level=info event=done request=7 n_made=40`.

A line holds ids, names, counts and durations, and never what anyone wrote, or a key: what is written of a request is chosen
here, and of an error that a client's words may stand in only the code.
"""

from __future__ import annotations

import json
import queue
import re
import sys
import threading
from datetime import UTC, datetime
from typing import Literal, TextIO

from ggmq.service import Job
from protocol.errors import DeviceError, GgmqError, RemoteError, Unavailable

Figure = str | int | float | bool | None
Level = Literal["debug", "info", "warning", "error"]
LEVELS: dict[str, int] = {"debug": 0, "info": 1, "warning": 2, "error": 3, "off": 4}
"""What `--log-level` takes; from that on events are written."""
TOLD: dict[str, Level] = {
    "started": "debug", "first token": "debug", "done": "info", "cancelled": "info", "recovered": "info",
    "device": "info", "failed": "error", "bug": "error", "worker lost": "warning",
}  # fmt: skip
"""How much an event of `Service` and `serving` matters."""
MAX_WORD = 300
MAX_WAITING = 10_000
CLOSE_S = 2.0
_PLAIN = re.compile(r"[!#-<>-~]+")
_OURS = (Unavailable, DeviceError, RemoteError)
"""Errors whose messages are about workers and devices; others may quote what a client sent."""


class Log:
    """Events go to a stream through a thread of their own, so that who tells them never waits for whoever reads them: what
    comes while too many lines wait is dropped, and counted in a line.

    Threads: any.
    """

    def __init__(self, level: str = "info", stream: TextIO | None = None) -> None:
        """level: of LEVELS. stream: standard error where there is none."""
        self._least, self._stream = LEVELS[level], stream or sys.stderr
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._lock = threading.Lock()
        self._n_dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def event(self, level: Level, event: str, **figures: Figure) -> None:
        """Write that something happened. figures: ids, names, counts, durations in seconds; what is None is left out.

        Give it nothing that a client wrote, and no key.
        """
        if LEVELS[level] < self._least:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._put(_line({"time": now, "level": level, "event": event.replace(" ", "_"), **figures}))

    def told(self, event: str, *, job: Job | None = None, error: Exception | None = None, **figures: Figure) -> None:
        """What `Service` and `serving` tell: give this as their `told`."""
        level = TOLD.get(event, "info")
        if LEVELS[level] >= self._least:
            self.event(level, event, **(figures_of(job) if job else {}), **(error_of(error) if error else {}), **figures)

    def close(self) -> None:
        """Have all lines written, if whoever reads them reads them. Idempotent."""
        try:
            self._lines.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _put(self, line: str) -> None:
        with self._lock:
            try:
                if self._n_dropped:
                    self._lines.put_nowait(_line({"level": "warning", "event": "log_dropped", "n": self._n_dropped}))
                    self._n_dropped = 0
                self._lines.put_nowait(line)
            except queue.Full:
                self._n_dropped += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError):  # a full disk, a reader that has gone, a stream that was closed: the next may go
                continue


def figures_of(job: Job) -> dict[str, Figure]:
    """What a log may say of a request: its number, where it runs, counts and times."""
    u = job.usage()
    out: dict[str, Figure] = {"model": job.model, "request": job.number, "n_prompt": u.n_prompt, "waited_s": u.waited_s}
    s = job.sequence
    if s is not None:
        out |= {"slot": job.slot, "n_cached": u.n_cached}
    if job.first_s:
        out |= {"prompt_s": u.prompt_s, "n_made": u.n_made, "made_s": u.made_s}
        if u.n_drafted:
            out |= {"n_drafted": u.n_drafted, "n_accepted": u.n_accepted}
    if s is not None and s.finished:
        out["ended"] = s.finished
    return out


def error_of(error: Exception) -> dict[str, Figure]:
    """What a log may say of an error: its code and place, and its message where no client's words can be in it."""
    if not isinstance(error, GgmqError):
        return {"error": type(error).__name__, "at": _place(error)}
    out: dict[str, Figure] = {"error": error.code, "worker": error.worker or None, "device": error.device or None}
    if isinstance(error, _OURS):
        out["message"] = error.message
    return out


def _place(error: Exception) -> str:
    """The line of our source where it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}" if trace is not None else ""


def _line(figures: dict[str, Figure]) -> str:
    return " ".join(f"{name}={_word(value)}" for name, value in figures.items() if value is not None) + "\n"


def _word(value: Figure) -> str:
    """A value as logfmt has it: quoted, as JSON would, where it is not one plain word."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)[:MAX_WORD]
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
