"""One run: a setup, texts under way, a fault at some moment, what became of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from tests.faults.ground import LIMIT_S, Ground
from tests.faults.report import Run
from tests.faults.setups import Calm, Live, Setup, calm, living, made
from tests.faults.streams import Stream
from tests.support.supervised import until

N_ENTRIES = 30
"""Weights that a cache holds at most when it is to be disturbed while it is written."""
MIN_TOKENS = 20
"""So many before a fault tell how long a token takes."""


MOMENT_S = 60.0


def await_moment(run: Run, live: Live, streams: Sequence[Stream], undisturbed: Calm | None, moment: str) -> None:
    """Until a moment of texts that have just been asked for.

    load: from the start of the client on. upload: bytes have passed (of a proxied setup). cache write: entries are there.
    prefill: the prompt is being read. decode: some of a text is there. end: all of it is.
    Errors: RuntimeError when it does not come.
    """
    u = run.rng.random()
    came = True
    if moment == "load":
        assert undisturbed is not None  # play measured it
        time.sleep(u * undisturbed.begin_s)
    elif moment == "upload":
        wanted = int(u * 0.95 * live.ground.path.stat().st_size) + sum(n.n_bytes() for n in live.networks.values())
        came = until(lambda: sum(n.n_bytes() for n in live.networks.values()) >= wanted, MOMENT_S)
    elif moment == "cache write":
        n = int(u * N_ENTRIES)
        came = until(lambda: len(list(live.cache_folder.glob("*"))) > n, MOMENT_S, 0.0005)
    elif moment == "prefill":
        came = live.setup.serves or streams[0].wait_begun(LIMIT_S)
        assert undisturbed is not None  # play measured it
        time.sleep(u * undisturbed.first_s)
    elif moment in ("decode", "end"):
        i = run.rng.randrange(len(streams))
        n = len(live.ground.text(live.ground.prompts(len(streams), live.setup.is_long)[i], live.n_tokens))
        came = streams[i].wait_made(n if moment == "end" else 1 + int(u * 0.9 * n), LIMIT_S)
    run.did(f"{moment} at {100 * u:.0f} %")
    if not came:
        run.did("which did not come")


def longest_pause(stream: Stream, since_s: float) -> float | None:
    """The longest time between two pieces of which the later came after a moment; None where none was made before it."""
    times = stream.made_times()
    if not times or times[0] > since_s:
        return None
    gaps = [b - a for a, b in itertools.pairwise(times) if b > since_s]
    return max(gaps) if gaps else None


def judge(
    run: Run, live: Live, streams: Sequence[Stream], prompts: Sequence[str], fault_s: float, undisturbed: Calm | None,
    began_s: float, limit_s: float = LIMIT_S,
) -> None:  # fmt: skip
    """Wait for the texts, compare them, measure."""
    ground = live.ground
    n = live.n_tokens
    problems = live.wait(streams, limit_s)
    expected = ground.texts(prompts, n)
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
        token_s = _token_s(stream, fault_s, n / max(1, len(expected[i]))) or (undisturbed.token_s if undisturbed else 0.0)
        run.pause_tokens = run.pause_s / token_s if token_s else None
    noticed = live.noticed(fault_s)
    if noticed is not None:
        run.noticed_s = noticed - fault_s
    if run.complete and undisturbed is not None:
        run.extra_s = max(0.0, max(s.pieces[-1][0] for s in streams) - began_s - undisturbed.total_s)


def _token_s(stream: Stream, fault_s: float, tokens_per_char: float) -> float:
    """How long a token took before the fault, in seconds; 0 when there were too few to tell."""
    times = [t for t in stream.made_times() if t <= fault_s]
    n = tokens_per_char * (sum(len(piece) for t, piece in stream.pieces if t <= fault_s) - len(stream.shown))
    return (times[-1] - times[0]) / n if n >= MIN_TOKENS and times[-1] > times[0] else 0.0


def one_text(live: Live, run: Run, when: str) -> None:
    """Ask for a text; one that does not come, or is another, is a failure."""
    prompts = live.ground.prompts(1, False)
    streams = live.begin(prompts)
    problems = live.wait(streams)
    if problems or made(streams[0]) != live.ground.text(prompts[0], live.n_tokens):
        run.complete, run.identical = run.complete and not problems, run.identical and bool(problems)
        run.fail(f"{when}: {'; '.join(problems) or 'another text'}")


Action = Callable[[Live], object]


def play(
    ground: Ground, run: Run, setup: Setup, moment: str, fault: Action, then: Action = lambda live: None,
    check: Action = lambda live: None, limit_s: float = LIMIT_S,
) -> None:  # fmt: skip
    """Do something at a moment, something more while the texts go on, and look at what is left when they are there.

    moment: as `await_moment`'s, or idle: shortly before anything is asked.
    """
    run.did(setup.words())
    undisturbed = calm(ground, setup) if moment in ("load", "prefill") or not ground.quick else None
    with living(ground, setup) as live:
        prompts = ground.prompts(setup.n_seqs, setup.is_long)
        ground.texts(prompts, live.n_tokens)  # made before anything is measured
        if moment == "idle":
            fault_s = time.monotonic()
            fault(live)
            time.sleep(run.rng.random() * 0.3)
            run.did("idle")
        began_s = time.monotonic()
        streams = live.begin(prompts)
        if moment != "idle":
            live.find()
            await_moment(run, live, streams, undisturbed, moment)
            fault_s = time.monotonic()
            fault(live)
        then(live)
        judge(run, live, streams, prompts, fault_s, undisturbed, began_s, limit_s)
        if setup.serves:
            one_text(live, run, "afterwards")
        check(live)
