"""Signals that end a command, as KeyboardInterrupt, wherever they arrive."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

LATER_S = 0.01


def raise_interrupts() -> None:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt.

    Python drops what is raised while an object is released, and pyzmq looks for signals whenever a frame is: one that came
    there is raised once more a moment later, by SIGALRM. A shell starts background jobs with SIGINT ignored: they end too.
    Threads: call it from the main one, which is the one that is interrupted.
    """
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(s, _interrupt)
    sys.excepthook, sys.unraisablehook = _print_traceback, _drop


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _drop(dropped: sys.UnraisableHookArgs) -> None:
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, LATER_S)
    else:
        sys.__unraisablehook__(dropped)


def _print_traceback(kind: type[BaseException], e: BaseException, traceback: TracebackType | None) -> None:
    """Cython prints what is dropped in this way too."""
    if not isinstance(e, KeyboardInterrupt):
        sys.__excepthook__(kind, e, traceback)
