"""Slow is not dead: thin links, long ways, long computes. Nobody is given up for them."""

from __future__ import annotations

import signal
import threading
import time

from tests.faults.ground import Ground
from tests.faults.network import no_namespaces
from tests.faults.playing import play
from tests.faults.report import Run, Skipped
from tests.faults.setups import Live, Setup, calm

MBIT = 10.0
DELAY_S = 0.2
N_FEW = 12
"""Tokens where each takes half a second or more."""
PREFILL_S = 30.0
BEAT_S = 0.2
"""A worker that is slowed down works in the first part of so long."""




def _play(ground: Ground, run: Run, setup: Setup, condition: dict[str, float]) -> None:
    """With these conditions on all ways to the workers from the start to the end."""
    began_s = time.monotonic()

    def fault(live: Live) -> None:
        for network in live.networks.values():
            network.both(**condition)

    def check(live: Live) -> None:
        if evicted := live.evicted(began_s):
            run.fail(f"slow is not dead: {evicted[0]}")

    run.did(", ".join(f"{k} {v:g}" for k, v in condition.items()))
    play(ground, run, setup, "idle", fault, check=check)


def thin_link(ground: Ground, run: Run) -> None:
    """10 Mbit/s while weights are sent."""
    setup = Setup("bus", listens=run.rng.random() < 0.5, proxied=True, n_workers=run.rng.choice((2, 3)), n_tokens=N_FEW)
    _play(ground, run, setup, {"mbit": MBIT})


def long_way(ground: Ground, run: Run) -> None:
    """200 ms each way, which vary."""
    setup = Setup("bus", listens=run.rng.random() < 0.5, proxied=True, n_workers=2, n_tokens=N_FEW)
    _play(ground, run, setup, {"delay_s": DELAY_S, "jitter_s": run.rng.choice((0.0, 0.1))})


def long_compute(ground: Ground, run: Run) -> None:
    """A prompt that takes half a minute to be read, since a worker has but a little of its processor."""
    setup = Setup("bus", n_workers=2, is_long=True, n_tokens=N_FEW)
    wanted_s = min(PREFILL_S, ground.sizes.longest_stop_s)
    share = max(0.01, min(0.5, calm(ground, setup).first_s / wanted_s))
    victim = f"w{run.rng.randrange(2)}"
    run.did(f"{victim} has {100 * share:.1f} % of its time")
    began_s = time.monotonic()
    over = threading.Event()

    def slow_down(live: Live) -> None:
        while not over.is_set():
            live.signal(victim, signal.SIGCONT)
            time.sleep(share * BEAT_S)
            live.signal(victim, signal.SIGSTOP)
            over.wait((1 - share) * BEAT_S)
        live.signal(victim, signal.SIGCONT)

    def fault(live: Live) -> None:
        thread = threading.Thread(target=slow_down, args=(live,), daemon=True)
        thread.start()
        threads.append(thread)

    def check(live: Live) -> None:
        over.set()
        threads[0].join()
        if evicted := live.evicted(began_s):
            run.fail(f"slow is not dead: {evicted[0]}")

    threads: list[threading.Thread] = []
    try:
        play(ground, run, setup, "prefill", fault, check=check)
    finally:
        over.set()


def thin_real_link(ground: Ground, run: Run) -> None:
    """As `thin_link`, by the kernel's own token bucket."""
    if why := no_namespaces():
        raise Skipped(why)
    setup = Setup("bus", listens=run.rng.random() < 0.5, apart=True, n_workers=run.rng.choice((2, 3)), n_tokens=N_FEW)
    began_s = time.monotonic()

    def fault(live: Live) -> None:
        for space in live.spaces.values():
            space.rate(MBIT)

    def check(live: Live) -> None:
        if evicted := live.evicted(began_s):
            run.fail(f"slow is not dead: {evicted[0]}")

    run.did(f"tbf {MBIT:g} Mbit/s")
    play(ground, run, setup, "idle", fault, check=check)
