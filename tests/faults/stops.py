"""Workers that stand still: for a moment, for a minute, for good."""

from __future__ import annotations

import dataclasses
import signal
import time

from tests.faults.ground import Ground
from tests.faults.playing import play
from tests.faults.report import Run
from tests.faults.resume import any_setup
from tests.faults.setups import Live, Setup

STOPS_S = (0.5, 5.0, 60.0)
ALONE = 0.3
"""So often there is no other worker that could take the layers."""
TOLERATED_S = 1.0
"""Who stands still for less than this is waited for."""
BACK_S = 15.0
"""Who goes on is used again within this long."""


def _setup(run: Run, moment: str) -> Setup:
    serves = run.rng.random() < 0.5
    how = run.rng.choice(("local", "bus"))
    n_seqs = run.rng.choice((1, 8)) if serves else 1
    return any_setup(run, Setup(how, serves, n_seqs=n_seqs, is_long=moment == "prefill"))  # type: ignore[arg-type]


def stop(ground: Ground, run: Run) -> None:
    """SIGSTOP, and SIGCONT after 0.5, 5 or 60 s, idle or in the middle of a compute."""
    chosen_s = min(run.rng.choice(STOPS_S), ground.sizes.longest_stop_s)
    stop_s = ground.sizes.stop_s or chosen_s
    moment = run.rng.choice(("idle", "prefill", "decode", "decode"))
    setup = _setup(run, moment)
    if moment == "idle":
        setup = dataclasses.replace(setup, serves=True)
    if run.rng.random() < ALONE:
        setup = dataclasses.replace(setup, n_workers=1, spare=False)
    victim = f"{setup.prefix}{run.rng.randrange(setup.n_workers)}"
    run.did(f"stopped {victim} for {stop_s:g} s")
    stopped_s = 0.0

    def fault(live: Live) -> None:
        nonlocal stopped_s
        stopped_s = time.monotonic()
        live.signal(victim, signal.SIGSTOP)

    def then(live: Live) -> None:
        time.sleep(stop_s)
        live.signal(victim, signal.SIGCONT)

    def check(live: Live) -> None:
        evicted = live.evicted(stopped_s)
        run.figures[f"evicted, stopped for {stop_s:g} s"] = float(bool(evicted))
        if evicted and stop_s < TOLERATED_S:
            run.fail(f"slow is not dead: {evicted[0]}")
        if setup.how == "bus":
            run.figures["back, s"] = live.await_ready(live.names, BACK_S)

    play(ground, run, setup, moment, fault, then, check)


def hang(ground: Ground, run: Run) -> None:
    """SIGSTOP for good: others take the layers."""
    moment = run.rng.choice(("idle", "prefill", "decode", "decode"))
    setup = _setup(run, moment)
    if moment == "idle":
        setup = dataclasses.replace(setup, serves=True)
    victim = f"{setup.prefix}{run.rng.randrange(setup.n_workers)}"
    run.did(f"{victim} hangs")

    def fault(live: Live) -> None:
        live.signal(victim, signal.SIGSTOP)

    play(ground, run, setup, moment, fault)
