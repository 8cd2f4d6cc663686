"""Processes under supervision: started, awaited, stopped for a while, killed, looked at through /proc.

What they write goes to files, so that nobody who is slow to read, or stopped, holds them up.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.fixtures import ROOT

POLL_S = 0.003
END_S = 10.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What a process holds. Units: bytes, descriptors, threads."""

    rss_bytes: int
    n_fds: int
    n_threads: int


def figures_of(pid: int) -> Figures:
    """Errors: OSError when the process has gone."""
    proc = Path(f"/proc/{pid}")
    rss = int((proc / "statm").read_text().split()[1]) * resource.getpagesize()
    return Figures(rss, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task")))


def zombies_of(parents: Iterable[int]) -> list[int]:
    """Children of these processes that ended and were not waited for."""
    wanted, found = set(parents), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if state == "Z" and int(parent) in wanted:
                    found.append(int(entry.name))
    return found


def until(true: Callable[[], bool], limit_s: float, poll_s: float = POLL_S) -> bool:
    """Whether it came true within the limit."""
    due = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > due:
            return False
        time.sleep(poll_s)
    return True


class Supervised:
    """A process whose output can be read at any time.

    Attributes:
        name: what messages call it.
        began_s: when it was started, on the monotonic clock.
    """

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, n_files: int = 0
    ) -> None:
        """`folder`: where its output goes. `n_files`: the most descriptors that it may open, soft and hard; 0: as here."""
        self.name, self.began_s = name, time.monotonic()
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        if n_files:  # set before the program starts: it may look at its limit only then
            command = ["sh", "-c", f'ulimit -n {n_files} && exec "$@"', "sh", *command]
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def n_written(self) -> int:
        """Bytes on its standard output so far."""
        return self._out.stat().st_size

    def out(self) -> str:
        return self._out.read_text(errors="replace")

    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def says(self, words: str, limit_s: float) -> bool:
        """Whether its standard output holds these words within the limit, and before it ends."""
        until(lambda: words in self.out() or not self.alive, limit_s, 0.02)
        return words in self.out()

    def writes(self, n: int, limit_s: float) -> bool:
        """Whether its standard output has so many bytes within the limit, and before it ends."""
        until(lambda: self.n_written >= n or not self.alive, limit_s)
        return self.n_written >= n

    def ends(self, limit_s: float) -> int | None:
        """Its exit code; None when it does not end within the limit."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """As `kill -9`, and wait for it. A stopped process ends too."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def end(self, forget: bool = True) -> None:
        """End it in good order, or else by force. `forget`: remove what it wrote."""
        self.resume()
        self.signal(signal.SIGTERM)
        if self.ends(END_S) is None:
            self.kill()
        if forget:
            self._out.unlink(missing_ok=True)
            self._err.unlink(missing_ok=True)

    def figures(self) -> Figures:
        return figures_of(self.pid)

    def story(self) -> str:
        """How it stands and the end of what it wrote, for a message."""
        state = "runs" if self.alive else f"ended with code {self.process.returncode}"
        return f"{self.name} {state}, wrote {self.out()[-200:]!r}, on standard error {self.err()[-400:]!r}"
