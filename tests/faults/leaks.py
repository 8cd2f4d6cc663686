"""What a process holds stays the same, however many steps it has taken and sessions it has had."""

from __future__ import annotations

import contextlib
import time

from ggmq.cluster import connect
from protocol.errors import GgmqError
from tests.faults.ground import Ground
from tests.faults.report import Run
from tests.faults.setups import Live, Setup, living, made
from tests.faults.streams import Talker
from tests.support.supervised import Figures, figures_of, until

N_STEPS, N_STEPS_QUICK = 100_000, 4_000
N_SESSIONS, N_SESSIONS_QUICK = 1_000, 50
MAX_GROWTH_BYTES = 10 << 20
MAX_MORE_FDS = 8
SETTLE_S = 15.0
MIB = 1 << 20


def _processes(live: Live) -> dict[str, Talker]:
    assert live.broker is not None  # a bus has one
    return {"broker": live.broker, **live.workers, **({"server": live.client} if live.client is not None else {})}


def _compare(run: Run, before: dict[str, Figures], live: Live) -> None:
    for name, p in _processes(live).items():
        if name not in before:
            continue
        until(lambda p=p, b=before[name]: figures_of(p.pid).n_fds <= b.n_fds + MAX_MORE_FDS, SETTLE_S, 0.2)  # type: ignore[misc]
        now = figures_of(p.pid)
        grown = now.rss_bytes - before[name].rss_bytes
        run.figures |= {f"{name}, MiB more": grown / MIB, f"{name}, descriptors more": now.n_fds - before[name].n_fds}
        if grown > MAX_GROWTH_BYTES:
            run.fail(f"{name} has grown by {grown / MIB:.1f} MiB from {before[name].rss_bytes / MIB:.1f} MiB")
        if now.n_fds > before[name].n_fds + MAX_MORE_FDS:
            run.fail(f"{name} had {before[name].n_fds} descriptors, now it has {now.n_fds}")


def steps(ground: Ground, run: Run) -> None:
    """A server makes tokens, one a step, on two workers. A tenth of them come before the first look."""
    n = N_STEPS_QUICK if ground.quick else N_STEPS
    with living(ground, Setup("bus", True, 2, drafts=False)) as live:
        prompts = ground.prompts(1, False)
        expected = ground.text(prompts[0], live.n_tokens)
        before: dict[str, Figures] = {}
        done = 0
        start = time.monotonic()
        while done < n:
            streams = live.begin(prompts)
            problems = live.wait(streams)
            if problems or made(streams[0]) != expected:
                run.complete, run.identical = not problems, bool(problems)
                run.fail(f"after {done} steps: {'; '.join(problems) or 'another text'}")
                return
            done += live.n_tokens
            if not before and done >= n / 10:
                before = {name: figures_of(p.pid) for name, p in _processes(live).items()}
        run.figures["steps a second"] = done / (time.monotonic() - start)
        run.did(f"{done} steps")
        _compare(run, before, live)


def sessions(ground: Ground, run: Run) -> None:
    """Clients that come and go, and workers whose connections are closed and that come again."""
    n = N_SESSIONS_QUICK if ground.quick else N_SESSIONS
    with living(ground, Setup("bus", n_workers=2, proxied=True, n_tokens=20)) as live:
        before: dict[str, Figures] = {}
        for i in range(n):
            if run.rng.random() < 0.2:
                name = run.rng.choice(live.names)
                live.networks[name].say(cut=True)
                live.await_ready(live.names)
            client = connect(live.endpoint)
            with contextlib.closing(client):
                for k, d in enumerate(client.devices()):
                    with contextlib.suppress(GgmqError):  # its connection has just been closed
                        client.stats(k)
            if i == n // 10:
                before = {name: figures_of(p.pid) for name, p in _processes(live).items()}
        run.did(f"{n} sessions")
        _compare(run, before, live)
