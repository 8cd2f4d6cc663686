"""Brokers that are killed and started again on their port: the same tokens, none twice."""

from __future__ import annotations

import time

from tests.faults.ground import Ground
from tests.faults.playing import play
from tests.faults.report import Run
from tests.faults.resume import any_setup
from tests.faults.setups import Live, Setup

DOWN_S = (0.0, 0.5, 3.0)


def killed_broker(ground: Ground, run: Run) -> None:
    """In the middle of a text, or while weights are sent, once or twice."""
    moment = run.rng.choice(("upload", "prefill", "decode", "decode", "decode"))
    down_s = min(run.rng.choice(DOWN_S), ground.sizes.longest_stop_s)
    setup = any_setup(run, Setup("bus", moment == "decode" and run.rng.random() < 0.4, is_long=moment == "prefill",
                                 listens=run.rng.random() < 0.5, proxied=moment == "upload"))  # fmt: skip
    twice = moment == "decode" and run.rng.random() < 0.3
    run.did(f"the broker killed{' twice' * twice}, down for {down_s:g} s")

    def kill(live: Live) -> None:
        assert live.broker is not None  # a bus has one
        live.broker.process.kill()
        live.broker.end()

    def then(live: Live) -> None:
        time.sleep(down_s)
        live.start_broker()
        if twice:
            live.streams[0].wait_made(live.streams[0].n_made + 20, 60)
            kill(live)
            time.sleep(down_s)
            live.start_broker()

    def check(live: Live) -> None:
        live.await_ready(live.names, 15)

    play(ground, run, setup, moment, kill, then, check)
