"""Texts as they come, with the time of every piece: from a process's pipes, or from a server's events."""

from __future__ import annotations

import codecs
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import httpx

from tests.support.fixtures import ROOT
from tests.support.supervised import until

ANSWER_S = 300.0


class Stream:
    """A text that grows.

    Attributes:
        pieces: when each came, on the monotonic clock, and what it was.
        error: why it ended too early; empty while it goes on, and when it is whole.
    Threads: one writes, any read.
    """

    def __init__(self, shown: str = "") -> None:
        """shown: what the text begins with before anything is made."""
        self.shown = shown
        self.pieces: list[tuple[float, str]] = []
        self.error = ""
        self.ended = threading.Event()
        self._n = 0

    def add(self, piece: str) -> None:
        if piece:
            self.pieces.append((time.monotonic(), piece))
            self._n += len(piece)

    @property
    def n_made(self) -> int:
        """Characters that were made so far."""
        return max(0, self._n - len(self.shown))

    @property
    def has_begun(self) -> bool:
        """Whether all that is shown before the first token is there."""
        return self._n >= len(self.shown)

    @property
    def text(self) -> str:
        return "".join(p for _, p in self.pieces)

    def made_times(self) -> list[float]:
        """When pieces came that the model made."""
        seen, times = 0, []
        for t, piece in list(self.pieces):
            seen += len(piece)
            if seen > len(self.shown):
                times.append(t)
        return times

    def wait_made(self, n: int, limit_s: float) -> bool:
        """Whether so many characters are made within the limit, and before it ends."""
        until(lambda: self.n_made >= n or self.ended.is_set(), limit_s, 0.0005)
        return self.n_made >= n

    def wait_begun(self, limit_s: float) -> bool:
        until(lambda: self.has_begun or self.ended.is_set(), limit_s, 0.0005)
        return self.has_begun and not self.ended.is_set()


class Lines:
    """Lines that a process wrote, with the time of each. Threads: one writes, any read."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str]] = []

    def first(self, said: Callable[[str], bool], since_s: float) -> float | None:
        """When such a line first came after a moment."""
        return next((t for t, line in list(self.lines) if t >= since_s and said(line)), None)

    def text(self) -> str:
        return "\n".join(line for _, line in list(self.lines))


class Talker:
    """A process whose standard output is a Stream and whose standard error is Lines. Both are read all the time."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], shown: str = "", cwd: str | None = None) -> None:
        self.stream, self.err = Stream(shown), Lines()
        self.process = subprocess.Popen(command, cwd=cwd or ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, bufsize=0)  # fmt: skip
        assert self.process.stdout is not None and self.process.stderr is not None  # pipes were asked for
        self._threads = [threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True),
                         threading.Thread(target=self._read_lines, args=(self.process.stderr,), daemon=True)]  # fmt: skip
        for t in self._threads:
            t.start()

    def _read(self, pipe: IO[bytes]) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while data := os.read(pipe.fileno(), 1 << 16):
            self.stream.add(decoder.decode(data))
        self.stream.ended.set()

    def _read_lines(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self.err.lines.append((time.monotonic(), line.decode(errors="replace").rstrip()))

    @property
    def pid(self) -> int:
        return self.process.pid

    def ends(self, limit_s: float) -> int | None:
        """Its exit code, once all that it wrote is read; None when it does not end within the limit."""
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        for t in self._threads:
            t.join(5)
        return self.process.returncode

    def end(self) -> None:
        """End it in good order, or else by force."""
        for s in (signal.SIGCONT, signal.SIGTERM):
            self.process.send_signal(s)
        if self.ends(10) is None:
            self.process.kill()
            self.process.wait()
        for t in self._threads:
            t.join(5)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def ask(url: str, prompt: str, n: int) -> Stream:
    """Ask a server for a text, in a thread of its own."""
    stream = Stream()
    body = {"prompt": prompt, "max_tokens": n, "temperature": 0, "stream": True, "ignore_eos": True}

    def read() -> None:
        try:
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=ANSWER_S) as answer:
                if answer.status_code != 200:
                    stream.error = f"HTTP {answer.status_code}: {answer.read().decode(errors='replace')[:300]}"
                    return
                done = False
                for line in answer.iter_lines():
                    done = done or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            stream.error = str(event["error"])[:300]
                        for choice in event.get("choices", ()):
                            stream.add(choice["text"])
                if not done and not stream.error:
                    stream.error = "the stream ended before [DONE]"
        except (httpx.HTTPError, ValueError) as e:
            stream.error = f"{type(e).__name__}: {e}"
        finally:
            stream.ended.set()

    threading.Thread(target=read, daemon=True).start()
    return stream
