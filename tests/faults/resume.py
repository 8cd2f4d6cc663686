"""Workers that are killed at any moment: the texts go on with the same tokens."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import time
from collections.abc import Sequence

from tests.faults.ground import LIMIT_S, Ground
from tests.faults.report import Run
from tests.faults.setups import Calm, Live, Setup, calm, living, made
from tests.faults.streams import Stream

MIN_TOKENS = 20
"""So many before a fault tell how long a token takes."""


def await_moment(run: Run, live: Live, streams: Sequence[Stream], undisturbed: Calm, moment: str) -> None:
    """Until a moment of a text that has just been asked for: while it loads, reads its prompt, or makes tokens."""
    u = run.rng.random()
    if moment == "load":
        time.sleep(u * undisturbed.begin_s)
    elif moment == "prefill":
        if not live.setup.serves:
            streams[0].wait_begun(LIMIT_S)
        time.sleep(u * undisturbed.first_s)
    elif moment == "decode":
        i = run.rng.randrange(len(streams))
        n = len(live.ground.text(live.ground.prompts(len(streams), live.setup.is_long)[i], live.ground.sizes.n_tokens))
        streams[i].wait_made(1 + int(u * 0.9 * n), LIMIT_S)
    run.did(f"{moment} at {100 * u:.0f} %")


def longest_pause(stream: Stream, since_s: float) -> float | None:
    """The longest time between two pieces of which the later came after a moment; None where none was made before it."""
    times = stream.made_times()
    if not times or times[0] > since_s:
        return None
    gaps = [b - a for a, b in itertools.pairwise(times) if b > since_s]
    return max(gaps) if gaps else None


def judge(
    run: Run, live: Live, streams: Sequence[Stream], prompts: Sequence[str], fault_s: float, undisturbed: Calm,
    began_s: float, limit_s: float = LIMIT_S,
) -> None:  # fmt: skip
    """Wait for the texts, compare them, measure."""
    ground = live.ground
    n = ground.sizes.n_tokens
    problems = live.wait(streams, limit_s)
    expected = [ground.text(p, n) for p in prompts]
    texts = [made(s) for s in streams]
    run.complete = not problems and all(len(t) >= len(e) for t, e in zip(texts, expected, strict=True))
    run.identical = all(e.startswith(t) for t, e in zip(texts, expected, strict=True))
    for problem in problems:
        run.fail(problem)
    if not run.identical:
        wrong = next(i for i, (t, e) in enumerate(zip(texts, expected, strict=True)) if not e.startswith(t))
        at = next(i for i, (a, b) in enumerate(zip(texts[wrong] + "\0", expected[wrong] + "\1", strict=False)) if a != b)
        run.fail(f"text {wrong} is another from character {at} on: {texts[wrong][max(0, at - 20) : at + 40]!r}")
    elif not run.complete and not problems:
        run.fail("a text ended too early, without a word")
    pauses = [(p, s) for s in streams if (p := longest_pause(s, fault_s)) is not None]
    if pauses and run.complete:
        run.pause_s, stream = max(pauses, key=lambda p: p[0])
        i = streams.index(stream)
        run.pause_tokens = run.pause_s / _token_s(stream, fault_s, n / max(1, len(expected[i])), undisturbed)
    noticed = live.noticed(fault_s)
    if noticed is not None:
        run.noticed_s = noticed - fault_s
    if run.complete:
        run.extra_s = max(0.0, max(s.pieces[-1][0] for s in streams) - began_s - undisturbed.total_s)


def _token_s(stream: Stream, fault_s: float, tokens_per_char: float, undisturbed: Calm) -> float:
    """How long a token took before the fault."""
    times = [t for t in stream.made_times() if t <= fault_s]
    n = tokens_per_char * (sum(len(piece) for t, piece in stream.pieces if t <= fault_s) - len(stream.shown))
    return (times[-1] - times[0]) / n if n >= MIN_TOKENS and times[-1] > times[0] else undisturbed.token_s


def serves_on(run: Run, live: Live) -> None:
    """A server answers as before when everything is over."""
    if not live.setup.serves:
        return
    prompts = live.ground.prompts(1, False)
    streams = live.begin(prompts)
    problems = live.wait(streams)
    if problems or made(streams[0]) != live.ground.text(prompts[0], live.ground.sizes.n_tokens):
        run.fail(f"afterwards: {problems or 'another text'}")


def killed(ground: Ground, run: Run, setup: Setup, moment: str, n_kills: int = 1) -> None:
    """Kill workers that have layers, one after the other, the first at a moment."""
    run.did(setup.words())
    undisturbed = calm(ground, setup)
    with living(ground, setup) as live:
        prompts = ground.prompts(setup.n_seqs, setup.is_long)
        victims = run.rng.sample(live.with_layers, n_kills)
        if moment == "idle":
            live.signal(victims[0], signal.SIGKILL)
            fault_s = time.monotonic()
            time.sleep(run.rng.random() * 0.3)
            run.did("idle")
        began_s = time.monotonic()
        streams = live.begin(prompts)
        if moment != "idle":
            await_moment(run, live, streams, undisturbed, moment)
            live.signal(victims[0], signal.SIGKILL)
            fault_s = time.monotonic()
        run.did(f"killed {', '.join(victims)}")
        for victim in victims[1:]:
            made_now, n = streams[0].n_made, len(ground.text(prompts[0], ground.sizes.n_tokens))
            streams[0].wait_made(made_now + 1 + int(run.rng.random() * 0.5 * max(0, n - made_now)), LIMIT_S)
            live.signal(victim, signal.SIGKILL)
        judge(run, live, streams, prompts, fault_s, undisturbed, began_s)
        serves_on(run, live)


def _any_setup(run: Run, setup: Setup) -> Setup:
    """Two or three workers, with a spare one or without."""
    return dataclasses.replace(setup, n_workers=run.rng.choice((2, 3)), spare=run.rng.random() < 0.5)


def _moment(run: Run, *moments: str) -> str:
    """Decode more often: it is where most time goes."""
    return run.rng.choice((*moments, "decode", "decode"))


def resume_run(ground: Ground, run: Run) -> None:
    moment = _moment(run, "load", "prefill")
    killed(ground, run, _any_setup(run, Setup("local", is_long=moment == "prefill")), moment)


def resume_bus(ground: Ground, run: Run) -> None:
    moment = _moment(run, "load", "prefill")
    setup = Setup("bus", listens=run.rng.random() < 0.5, is_long=moment == "prefill", cache=run.rng.choice(("", "warm")))
    killed(ground, run, _any_setup(run, setup), moment)


def resume_serve(ground: Ground, run: Run) -> None:
    moment = _moment(run, "idle", "prefill")
    how = run.rng.choice(("local", "bus"))
    setup = Setup(how, True, n_seqs=run.rng.choice((1, 8)), is_long=moment == "prefill")  # type: ignore[arg-type]
    killed(ground, run, _any_setup(run, setup), moment)


def resume_cluster(ground: Ground, run: Run) -> None:
    serves = run.rng.random() < 0.5
    moment = _moment(run, "idle" if serves else "load", "prefill")
    setup = Setup("cluster", serves, n_seqs=run.rng.choice((1, 8)) if serves else 1, is_long=moment == "prefill")
    killed(ground, run, _any_setup(run, setup), moment)


def resume_twice(ground: Ground, run: Run) -> None:
    """Two of three workers, one after the other."""
    serves = run.rng.random() < 0.5
    how = run.rng.choice(("local", "bus"))
    setup = Setup(how, serves, 3, run.rng.random() < 0.5, 8 if serves and run.rng.random() < 0.5 else 1)  # type: ignore[arg-type]
    killed(ground, run, setup, "decode", 2)
