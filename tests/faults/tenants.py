"""One client's tokens while another asks for as much as it may: the same tokens, as good as as soon.

Alone and flooded alternate in short windows, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggmq.archs import open_arch
from ggmq.cluster import connect
from ggmq.gguf import GGUF
from ggmq.model import Model, ModelConfig, place_model
from tests.faults.ground import GGMQ, WORKER, Ground
from tests.faults.report import Run, percentile
from tests.support.fixtures import ROOT, free_port
from tests.support.flooding import BUSY, KINDS, RUDE
from tests.support.processes import await_devices, started
from tests.support.supervised import until

N_TOKENS = 128
N_WINDOWS, N_WINDOWS_QUICK = 12, 4
SETTLE_S = 0.2
"""So long after a flood began nothing is measured."""
IDLE = 0.2
"""Who has less of a core has nothing left of a flood."""
SLOWER = 2.0


@dataclass(frozen=True, slots=True)
class Bus:
    """A broker with one worker, each a process of its own."""

    endpoint: str
    pids: tuple[int, ...]

    def idle(self) -> bool:
        """Whether neither does much. Takes a tenth of a second."""
        before = [used_s(pid) for pid in self.pids]
        time.sleep(0.1)
        return all(used_s(pid) - b < 0.1 * IDLE for pid, b in zip(self.pids, before, strict=True))


def used_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Flooder:
    """Another client, in a process of its own, which is stopped but where it is wanted."""

    def __init__(self, bus: Bus, kind: str) -> None:
        self._bus = bus
        self._process = subprocess.Popen([sys.executable, "-m", "tests.support.flooding", bus.endpoint, kind], cwd=ROOT,
                                         stdout=subprocess.PIPE)  # fmt: skip
        assert self._process.stdout is not None  # a pipe was asked for
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the flood of {kind} did not begin")
        self._stop()

    def _stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        if not until(self._bus.idle, 60, 0.0):
            raise RuntimeError("a flood that was stopped is still worked at after a minute")

    @contextlib.contextmanager
    def floods(self) -> Iterator[None]:
        os.kill(self._process.pid, signal.SIGCONT)
        time.sleep(SETTLE_S)
        yield
        ended = self._process.poll()
        self._stop()
        if ended is not None:
            raise RuntimeError(f"the flood ended by itself, with code {ended}: was it given what is another's?")

    def end(self) -> None:
        """What it held is free again when this returns."""
        self._process.terminate()
        self._process.send_signal(signal.SIGCONT)
        self._process.wait()


def decode(model: Model) -> tuple[list[int], list[float]]:
    """Tokens of a model, one after the other, and how long each took, in seconds."""
    tokens, took = [1], []
    for i in range(N_TOKENS):
        start = time.perf_counter()
        tokens.append(model.greedy(tokens[-1:], i))
        took.append(time.perf_counter() - start)
    return tokens, took


@contextlib.contextmanager
def _bus(n_threads: int) -> Iterator[Bus]:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    worker = [*WORKER, "--broker", endpoint, "-d", "CPU", "-t", str(n_threads), "-m", "512", "--insecure"]
    with started([*GGMQ, "broker", "--listen", endpoint, "--insecure"], stderr=subprocess.DEVNULL) as b, \
         started(worker, stderr=subprocess.DEVNULL) as w:  # fmt: skip
        await_devices(endpoint, 1)
        yield Bus(endpoint, (b.pid, w.pid))


def measure(ground: Ground, run: Run, n_threads: int, kinds: Sequence[str]) -> None:
    """Tokens of one client alone and beside each kind of flood, on one bus."""
    file = GGUF(ground.path)
    with _bus(n_threads) as bus:
        client = connect(bus.endpoint)
        model = place_model(ModelConfig(file.path, N_TOKENS + 8), open_arch(file), client)
        model.load()
        expected = decode(model)[0]
        for kind in kinds:
            flooder = Flooder(bus, kind)
            alone: list[float] = []
            flooded: list[float] = []
            try:
                for _ in range(N_WINDOWS_QUICK if ground.quick else N_WINDOWS):
                    tokens, took = decode(model)
                    alone += took
                    with flooder.floods():
                        beside, took = decode(model)
                    flooded += took
                    if not tokens == beside == expected:
                        run.identical = False
                        run.fail(f"{kind}: other tokens")
            finally:
                flooder.end()
            p50, p99 = (percentile(flooded, p) / percentile(alone, p) for p in (50, 99))
            run.figures |= {f"{kind}: p50 alone, ms": 1e3 * percentile(alone, 50),
                            f"{kind}: p99 alone, ms": 1e3 * percentile(alone, 99),
                            f"{kind}: p50, times": p50, f"{kind}: p99, times": p99}  # fmt: skip
            if p99 >= SLOWER and kind != BUSY:
                run.fail(f"{kind}: p99 {p99:.1f} times that without")
        client.close()


def tenants(ground: Ground, run: Run) -> None:
    """All kinds of flood, one after the other, and a process that only takes a core."""
    measure(ground, run, 1, [BUSY, RUDE, *KINDS])
