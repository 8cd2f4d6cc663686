"""Messages that come twice, too late or again: each step takes effect once."""

from __future__ import annotations

import contextlib

from ggmq.cluster import connect
from tests.faults.ground import Ground
from tests.faults.playing import play
from tests.faults.report import Run
from tests.faults.setups import Live, Setup, living

N_TOKENS = 100
PART = 0.05
KINDS = ("duplicate", "replay", "reorder")


def _n_computes(live: Live) -> dict[str, int]:
    """Graphs that each worker has run."""
    client = connect(live.endpoint)
    with contextlib.closing(client):
        return {d.worker: client.stats(i).n_computes for i, d in enumerate(client.devices()) if d.state == "ready"}


_undisturbed: dict[Setup, dict[str, int]] = {}


def doubled(ground: Ground, run: Run) -> None:
    """On all ways to the workers, in both directions, one message of twenty."""
    kind = run.rng.choice(KINDS)
    setup = Setup("bus", n_workers=2, listens=run.rng.random() < 0.5, proxied=True, n_tokens=N_TOKENS, drafts=False)
    if setup not in _undisturbed:
        with living(ground, setup) as live:
            live.wait(live.begin(ground.prompts(1, False)))
            _undisturbed[setup] = _n_computes(live)
    run.did(f"{kind} {PART:g}")

    def fault(live: Live) -> None:
        for network in live.networks.values():
            network.both(**{kind: PART})

    def check(live: Live) -> None:
        done = 0
        for network in live.networks.values():
            counters = network.say(up={kind: 0.0}, down={kind: 0.0})
            done += sum(counters[way].get(f"{kind.removesuffix('e')}ed", 0) for way in ("up", "down"))
        run.figures[f"messages, {kind}"] = done
        n = _n_computes(live)
        if not done:
            run.fail("no message was disturbed")
        if n != _undisturbed[setup]:
            run.fail(f"workers ran {n} graphs, undisturbed {_undisturbed[setup]}")

    play(ground, run, setup, "idle", fault, check=check)
