"""Networks that are cut: nothing passes, one way or both, and then it does again."""

from __future__ import annotations

import dataclasses
import time

from tests.faults.ground import LIMIT_S, Ground
from tests.faults.network import no_namespaces
from tests.faults.playing import play
from tests.faults.report import Run, Skipped
from tests.faults.resume import any_setup
from tests.faults.setups import Live, Setup

HEAL_S = 2.0
"""After the network has healed texts go on, and everybody is used again, within this long."""
CUTS_S = (0.3, 2.0, 8.0)
BACK_S = 30.0


def _back(run: Run, live: Live, healed_s: float) -> None:
    """Measure how long it takes from the healing on until texts go on and everybody is known again."""
    stream = live.streams[0]
    n = stream.n_made
    if n and not stream.ended.is_set() and stream.wait_made(n + 1, LIMIT_S):
        run.figures["goes on after healing, s"] = time.monotonic() - healed_s
    try:
        live.await_ready(live.names, BACK_S)
    except RuntimeError as e:
        run.fail(f"after healing: {e}")
        return
    back_s = max([t for t, name, state in list(live.states) if state == "ready"] + [healed_s]) - healed_s
    run.figures["all are known after healing, s"] = back_s
    for name, seconds in run.figures.items():
        if seconds > HEAL_S:
            run.fail(f"{name}: {seconds:.1f}, expected {HEAL_S:.0f} at most")


def black_hole(ground: Ground, run: Run) -> None:
    """Nothing passes between the broker and a worker, or only one way; connections stay."""
    cut_s = min(run.rng.choice(CUTS_S), ground.sizes.longest_stop_s)
    ways = run.rng.choice((("up", "down"), ("up",), ("down",)))
    setup = any_setup(run, Setup("bus", run.rng.random() < 0.3, listens=run.rng.random() < 0.5, proxied=True))
    victim = f"w{run.rng.randrange(setup.n_workers)}"
    run.did(f"{victim} cut off ({' and '.join(ways)}) for {cut_s:g} s")

    def fault(live: Live) -> None:
        live.networks[victim].say(**{way: {"hole": True} for way in ways})

    def then(live: Live) -> None:
        time.sleep(cut_s)
        live.networks[victim].say(**{way: {"hole": False} for way in ways})
        _back(run, live, time.monotonic())

    play(ground, run, setup, "decode", fault, then)


def cut(ground: Ground, run: Run) -> None:
    """Connections to a worker are closed, and no new one comes through for a while."""
    cut_s = min(run.rng.choice((0.0, *CUTS_S)), ground.sizes.longest_stop_s)
    setup = any_setup(run, Setup("bus", run.rng.random() < 0.3, listens=run.rng.random() < 0.5, proxied=True))
    victim = f"w{run.rng.randrange(setup.n_workers)}"
    run.did(f"connections of {victim} closed for {cut_s:g} s")

    def fault(live: Live) -> None:
        live.networks[victim].say(cut=True, open=False)

    def then(live: Live) -> None:
        time.sleep(cut_s)
        live.networks[victim].say(open=True)
        _back(run, live, time.monotonic())

    play(ground, run, setup, run.rng.choice(("upload", "decode", "decode")), fault, then)


def link(ground: Ground, run: Run) -> None:
    """A worker behind a link of its own: down and up again, or a hole one way. The kernel sends again, by its own clock."""
    if why := no_namespaces():
        raise Skipped(why)
    cut_s = min(run.rng.choice(CUTS_S), ground.sizes.longest_stop_s)
    kind = run.rng.choice(("down", "inwards", "outwards"))
    setup = any_setup(run, Setup("bus", run.rng.random() < 0.3, listens=run.rng.random() < 0.5, apart=True))
    victim = f"w{run.rng.randrange(setup.n_workers)}"
    setup = dataclasses.replace(setup, routed=run.rng.random() < 0.5)
    run.did(f"link of {victim} {kind} for {cut_s:g} s")

    def turn(live: Live, off: bool) -> None:
        space = live.spaces[victim]
        if kind == "down":
            space.link(not off)
        else:
            space.one_way(kind == "inwards", off)

    def then(live: Live) -> None:
        time.sleep(cut_s)
        turn(live, False)
        _back(run, live, time.monotonic())

    play(ground, run, setup, "decode", lambda live: turn(live, True), then)
