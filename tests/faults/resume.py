"""Workers that are killed at any moment: the texts go on with the same tokens."""

from __future__ import annotations

import dataclasses
import signal

from tests.faults.ground import LIMIT_S, Ground
from tests.faults.playing import play
from tests.faults.report import Run
from tests.faults.setups import Live, Setup


def killed(ground: Ground, run: Run, setup: Setup, moment: str, n_kills: int = 1) -> None:
    """Kill workers that have layers, one after the other, the first at a moment, the others some time later."""
    if moment == "load" and setup.how != "local":
        # a spare worker is made by shares of the layers, which must be as many as the workers that are there
        setup = dataclasses.replace(setup, spare=False)
    victims = run.rng.sample([f"{setup.prefix}{i}" for i in range(setup.n_workers)], n_kills)
    waits = [run.rng.random() for _ in victims]

    def first(live: Live) -> None:
        live.signal(victims[0], signal.SIGKILL)

    def others(live: Live) -> None:
        stream = live.streams[0]
        n = len(live.ground.text(live.ground.prompts(1, setup.is_long)[0], live.n_tokens))
        for victim, u in zip(victims[1:], waits[1:], strict=True):
            stream.wait_made(stream.n_made + 1 + int(u * 0.5 * max(0, n - stream.n_made)), LIMIT_S)
            live.signal(victim, signal.SIGKILL)

    run.did(f"killed {', '.join(victims)}")
    play(ground, run, setup, moment, first, others)


def any_setup(run: Run, setup: Setup) -> Setup:
    """Two or three workers, with a spare one or without."""
    return dataclasses.replace(setup, n_workers=run.rng.choice((2, 3)), spare=run.rng.random() < 0.5)


def _moment(run: Run, *moments: str) -> str:
    """Decode more often: it is where most time goes."""
    return run.rng.choice((*moments, "decode", "decode"))


def resume_run(ground: Ground, run: Run) -> None:
    moment = _moment(run, "load", "prefill")
    killed(ground, run, any_setup(run, Setup("local", is_long=moment == "prefill")), moment)


def resume_bus(ground: Ground, run: Run) -> None:
    moment = _moment(run, "load", "prefill")
    listens, cached = run.rng.random() < 0.5, run.rng.random() < 0.5 or ground.model is not None
    setup = Setup("bus", listens=listens, is_long=moment == "prefill", cache="warm" if cached else "")
    killed(ground, run, any_setup(run, setup), moment)


def resume_serve(ground: Ground, run: Run) -> None:
    moment = _moment(run, "idle", "prefill")
    how = run.rng.choice(("local", "bus"))
    setup = Setup(how, True, n_seqs=run.rng.choice((1, 8)), is_long=moment == "prefill")  # type: ignore[arg-type]
    killed(ground, run, any_setup(run, setup), moment)


def resume_cluster(ground: Ground, run: Run) -> None:
    serves = run.rng.random() < 0.5
    moment = _moment(run, "idle" if serves else "load", "prefill")
    setup = Setup("cluster", serves, n_seqs=run.rng.choice((1, 8)) if serves else 1, is_long=moment == "prefill")
    killed(ground, run, any_setup(run, setup), moment)


def resume_twice(ground: Ground, run: Run) -> None:
    """Two of three workers, one after the other."""
    serves = run.rng.random() < 0.5
    how = run.rng.choice(("local", "bus"))
    setup = Setup(how, serves, 3, run.rng.random() < 0.5, 8 if serves and run.rng.random() < 0.5 else 1)  # type: ignore[arg-type]
    killed(ground, run, setup, "decode", 2)


def resume_upload(ground: Ground, run: Run) -> None:
    """While weights are sent: nobody has them in a cache."""
    killed(ground, run, any_setup(run, Setup("bus", listens=run.rng.random() < 0.5, proxied=True)), "upload")


def resume_cache(ground: Ground, run: Run) -> None:
    """While a worker writes what it was sent into its cache, from which the next load takes it: no wrong byte is there."""
    killed(ground, run, any_setup(run, Setup("bus", listens=run.rng.random() < 0.5, cache="cold")), "cache write")


def resume_end(ground: Ground, run: Run) -> None:
    """When the text is there and the client takes its leave."""
    setup = Setup(run.rng.choice(("local", "bus", "cluster")), run.rng.random() < 0.3)
    killed(ground, run, any_setup(run, setup), "end")
