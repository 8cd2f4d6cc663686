"""A server, clients of all manners for a while, and what must hold then."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from random import Random

from tests.load.clients import STALL_S, Clients, Seen, parsed, post, text_of, wanted_requests
from tests.support.processes import children_of
from tests.support.serving import Running, serving
from tests.support.supervised import Figures, figures_of, until

MIB = 1 << 20
MAX_GROWTH_BYTES = 24 * MIB
MAX_MORE_FDS = 8
MAX_MORE_THREADS = 4
SAMPLE_S = 1.0
SETTLE_S = 20.0
SAID_S = 60.0
OPTIONS = ("--temp", "0", "-np", "4", "--queue", "24", "-to", str(STALL_S), "--max-body", "1", "--max-connections", "200",
           "--workers", "2")  # fmt: skip


def load(seconds: float, seed: int, n_clients: int = 12, pause_s: float = 0.0, say: bool = False) -> tuple[Seen, str]:
    """Returns: what came of it, and a table. pause_s: how long a client waits on average before the next comes."""
    rng, seen = Random(seed), Seen()
    with serving(*OPTIONS) as server:
        held = _Held(server)
        wanted = wanted_requests(rng)
        for i, w in enumerate(wanted):  # alone
            answer = parsed(server.exchange(post(w.path, w.body), within_s=60))
            if answer.status != 200:
                raise RuntimeError(f"{w.path} {w.body}: {answer.status} {answer.body!r}")
            wanted[i] = w._replace(text=text_of(answer))
        clients = Clients(server.port, rng, wanted, seen)
        asyncio.run(_come_and_go(clients, n_clients, seconds, pause_s, held.sample, say))
        _check_idle(server, seen)
        held.check(seen)
        asyncio.run(clients.good())
    if server.process.returncode not in (0, 130):
        seen.fail(f"the server ended with code {server.process.returncode}")
    return seen, f"{held.table()}\n{_table(seen)}"


async def _come_and_go(
    clients: Clients, n: int, seconds: float, pause_s: float, sample: Callable[[], None], say: bool
) -> None:
    start = time.monotonic()

    async def place(rng: Random) -> None:
        while time.monotonic() < start + seconds:
            await clients.any()
            await asyncio.sleep(rng.expovariate(1 / pause_s) if pause_s else 0)

    async def watch() -> None:
        said = start
        while True:
            sample()
            if say and time.monotonic() - said > SAID_S:
                said = time.monotonic()
                done, failures = sum(clients.seen.statuses.values()), len(clients.seen.failures)
                print(f"{(said - start) / 60:.0f} min: {done} answers, {failures} failures", file=sys.stderr, flush=True)
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(place(Random(clients.rng.random())) for _ in range(n)))
    watching.cancel()


def _check_idle(server: Running, seen: Seen) -> None:
    """Every slot is free, nothing waits, and all memory of sequences was given back or is only kept."""

    def idle() -> bool:
        state = server.get("/cluster").json()
        return all(s["state"] == "idle" for s in state["slots"]) and not state["queue"]["waiting"]

    if not until(idle, SETTLE_S, 0.1):
        seen.fail(f"slots are stuck: {server.get('/cluster').json()}")


class _Held:
    """What the server and its workers hold, over time."""

    def __init__(self, server: Running) -> None:
        self._pids = {"server": server.process.pid}
        self._pids |= {f"child {i}": pid for i, pid in enumerate(children_of(server.process.pid))}
        self._samples: dict[str, list[tuple[float, Figures]]] = {name: [] for name in self._pids}

    def sample(self) -> None:
        now = time.monotonic()
        for name, pid in self._pids.items():
            self._samples[name].append((now, figures_of(pid)))

    def _warm(self, name: str) -> Figures:
        """After the first part of the time: the median of a tenth of it."""
        samples = [f for _, f in self._samples[name]]
        n = len(samples)
        warm = samples[int(0.3 * n) : int(0.4 * n) + 1]
        return Figures(int(statistics.median(f.rss_bytes for f in warm)), max(f.n_fds for f in warm),
                       max(f.n_threads for f in warm))  # fmt: skip

    def check(self, seen: Seen) -> None:
        for name, pid in self._pids.items():
            before = self._warm(name)

            def settled(pid: int = pid, before: Figures = before) -> bool:
                now = figures_of(pid)
                return now.n_fds <= before.n_fds + MAX_MORE_FDS and now.n_threads <= before.n_threads + MAX_MORE_THREADS

            if not until(settled, SETTLE_S, 0.2):
                seen.fail(f"{name}: {before} after warming up, now {figures_of(pid)}")
            now = figures_of(pid)
            self._samples[name].append((time.monotonic(), now))
            if now.rss_bytes > before.rss_bytes + MAX_GROWTH_BYTES:
                seen.fail(f"{name}: {before.rss_bytes / MIB:.1f} MiB after warming up, now {now.rss_bytes / MIB:.1f}")

    def table(self) -> str:
        rows = ["process: MiB, descriptors, threads at 35 %, at 60 %, at 80 % of the time, at the end"]
        for name, samples in self._samples.items():
            at = [samples[int(part * (len(samples) - 1))][1] for part in (0.35, 0.6, 0.8, 1.0)]
            rows.append(f"  {name}: " + ", ".join(f"{f.rss_bytes / MIB:.1f} {f.n_fds} {f.n_threads}" for f in at))
        return "\n".join(rows)


def _table(seen: Seen) -> str:
    rows = [f"{seen.n_equal} texts equal to those alone; answers by status (0: closed without one):"]
    for manner in sorted({m for m, _ in seen.statuses}):
        counts = ", ".join(f"{status}: {n}" for (m, status), n in sorted(seen.statuses.items()) if m == manner)
        rows.append(f"  {manner}: {counts}")
    return "\n".join(rows)
