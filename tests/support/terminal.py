"""A process at a pseudo-terminal: what a person would type, and what they would see."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from fcntl import ioctl
from types import TracebackType
from typing import Self

from tests.support.fixtures import ROOT

CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP, LEFT = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A", "\x1b[D"
_FORWARD = re.compile(r"\x08?\x1b\[(\d*)C")
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>78]|\x07")


def pasted(text: str) -> str:
    """A text as a terminal sends it when it is pasted and the program has asked for whole pastes."""
    return "\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~"


class Terminal:
    """Threads: use from one. The process has ended when the block ends."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._fd, own = pty.openpty()
        ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))  # rows, columns, and no pixels
        self.modes = termios.tcgetattr(own)
        # a session whose terminal this is, so that Ctrl-C is a signal to the process
        self.process = subprocess.Popen(command, stdin=own, stdout=own, stderr=own, cwd=ROOT, start_new_session=True,
                                        env={**os.environ, "TERM": "xterm-256color", **(env or {})},
                                        preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0))  # fmt: skip
        self._own = own  # kept open, so that modes can be looked at when the process has ended
        self.raw = ""
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        os.close(self._own)
        os.close(self._fd)

    @property
    def text(self) -> str:
        """All that was shown, in the order in which it came, without what moves the cursor and sets colours."""
        return _CONTROL.sub("", _FORWARD.sub(lambda m: " " * int(m[1] or 1), self.raw)).replace("\r\n", "\n")

    @property
    def modes_now(self) -> list[object]:
        return termios.tcgetattr(self._own)

    def type(self, text: str) -> None:
        data = text.encode()
        while data:
            self._read(0)  # a program that waits for its output to be taken reads nothing
            if select.select([], [self._fd], [], 0.05)[1]:
                data = data[os.write(self._fd, data[:512]) :]

    def until(self, pattern: str, within_s: float = 60) -> str:
        """Wait until something is shown that was not when this was last asked. Returns: what came up to its end."""
        due = time.monotonic() + within_s
        while not (found := re.compile(pattern).search(self.text, self._seen)):
            assert time.monotonic() < due, f"no {pattern!r} in {self.text[self._seen :]!r}"
            if not self._read(0.1) and self.process.poll() is not None and not self._read(0.1):
                raise AssertionError(f"ended with {self.process.returncode}, no {pattern!r} in {self.text[self._seen :]!r}")
        came = self.text[self._seen : found.end()]
        self._seen = found.end()
        return came

    def ended(self, within_s: float = 60) -> int:
        """Wait for the end. Returns: the exit code."""
        due = time.monotonic() + within_s
        while self.process.poll() is None:
            assert time.monotonic() < due, f"still there: {self.text[self._seen :]!r}"
            self._read(0.1)
        while self._read(0.1):
            pass
        return int(self.process.returncode)

    def _read(self, within_s: float) -> bool:
        if not select.select([self._fd], [], [], within_s)[0]:
            return False
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # nobody has the terminal any more
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)
