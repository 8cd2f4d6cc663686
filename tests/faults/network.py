"""The bad network as a process of a run's."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.support.fixtures import ROOT


class BadNetwork:
    """The program `tests.faults.proxy`. Attributes: port: that leads to the target.

    Threads: use from one.
    """

    def __init__(self, target: str, seed: int = 1, listen: str = "127.0.0.1:0") -> None:
        command = [sys.executable, "-m", "tests.faults.proxy", "--to", target, "--listen", listen, "--seed", str(seed)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None  # a pipe was asked for
        self.port = int(self._process.stdout.readline())

    def say(self, **said: Any) -> dict[str, Any]:
        """`up`, `down`, `cut`, `open`; returns the counters."""
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes were asked for
        self._process.stdin.write(json.dumps(said) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def both(self, **conditions: Any) -> None:
        """The same conditions in both directions."""
        self.say(up=conditions, down=conditions)

    def n_bytes(self) -> int:
        """Bytes that have passed, both ways."""
        counters = self.say()
        return int(counters["up"].get("bytes", 0)) + int(counters["down"].get("bytes", 0))

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
