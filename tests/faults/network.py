"""Networks of a run: a bad one as a process, a link of the kernel's to a network namespace."""

from __future__ import annotations

import itertools
import json
import os
import shutil
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


def no_namespaces() -> str:
    """Why there are no network namespaces here; empty: there are."""
    if sys.platform != "linux" or os.geteuid():
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip`, which is not here"
    tried = subprocess.run(["ip", "netns", "add", f"ggmq-try-{os.getpid()}"], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces: {tried.stderr.strip()}"
    _ip("netns", "del", f"ggmq-try-{os.getpid()}")
    return ""


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


_numbers = itertools.count(os.getpid() % 50 * 1000)
FORWARDS = "echo 1 > /proc/sys/net/ipv4/ip_forward"


class Namespace:
    """A network namespace at a link to this host, or to another namespace that passes on what is not its own.

    Attributes:
        outer, inner: addresses of whoever is at the other end of the link, and of who is inside.
        host: address of this host for those inside.
        command: what has a command run inside.
    """

    def __init__(self, router: Namespace | None = None) -> None:
        """Errors: CalledProcessError where there are none."""
        n = next(_numbers)
        self.name, self._link, self._router = f"ggmq-{os.getpid()}-{n}", f"gq{n}", router
        net = f"10.213.{n // 64 % 256}."
        self.outer, self.inner = net + str(n % 64 * 4 + 1), net + str(n % 64 * 4 + 2)
        self.host = router.host if router is not None else self.outer
        self.command = ["ip", "netns", "exec", self.name]
        _ip("netns", "add", self.name)
        self._outside("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        self._outside("addr", "add", f"{self.outer}/30", "dev", self._link)
        self._inside("addr", "add", f"{self.inner}/30", "dev", "eth0")
        self._inside("link", "set", "lo", "up")
        self._inside("link", "set", "eth0", "up")
        self._outside("link", "set", self._link, "up")
        self._inside("route", "add", "default", "via", self.outer)
        if router is not None:
            subprocess.run([*router.command, "sh", "-c", FORWARDS], check=True, capture_output=True)
            _ip("route", "add", f"{self.inner}/32", "via", router.inner)

    def _inside(self, *args: str) -> None:
        _ip("-n", self.name, *args)

    def _outside(self, *args: str) -> None:
        _ip(*(["-n", self._router.name] if self._router is not None else []), *args)

    def link(self, up: bool) -> None:
        self._outside("link", "set", self._link, "up" if up else "down")

    def one_way(self, inwards: bool, there: bool) -> None:
        """A hole for what goes inwards, or outwards."""
        change = "add" if there else "del"
        if inwards:
            self._outside("route", change, "blackhole", f"{self.inner}/32")
        elif self._router is not None:
            self._outside("rule", change, "iif", self._link, "blackhole")
        else:
            self._inside("route", change, "blackhole", f"{self.outer}/32")

    def rate(self, mbit: float) -> None:
        """What the link takes inwards."""
        bucket = ["tbf", "rate", f"{mbit:g}mbit", "burst", "32kbit", "latency", "400ms"]
        within = self._router.command if self._router is not None else []
        command = [*within, "tc", "qdisc", "replace", "dev", self._link, "root", *bucket]
        subprocess.run(command, check=True, capture_output=True)

    def end(self) -> None:
        subprocess.run(["ip", "link", "del", self._link], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)
