"""Processes that stop for a while, and brokers that are killed: what was under way goes on, or says so at once."""

from __future__ import annotations

import itertools
import math
import time

from protocol.errors import GgmqError
from tests.soak.ground import (
    N_LONG,
    PROMPTS,
    SESSION_S,
    Ground,
    Overdue,
    check_all_serve,
    check_run,
    check_text,
    overdue_after,
    tell,
)
from tests.soak.report import Report, Step
from tests.soak.resources import Resources

SHORTEST_S = 0.5
VICTIMS = ("idle worker", "second stage", "broker", "client", "first stage")
MOMENTS = ("mid-generation", "upload", "idle")
PATIENCE_S = 0.1
"""Whoever waits no longer for a broker says so as soon as it knows that it has gone."""
HEARD_S = 5.0
"""The most until a client knows that its broker is gone; what is promised is 1.5 s, a loaded machine may need longer."""


def run_pauses(ground: Ground, report: Report, n: int, longest_s: float, resources: Resources) -> None:
    """Pauses of SHORTEST_S to `longest_s`, the short ones more often."""
    for step, victim in zip(report.steps("pauses", n), itertools.cycle(VICTIMS), strict=False):
        pause_s = math.exp(step.rng.uniform(math.log(SHORTEST_S), math.log(longest_s)))
        idle = victim == "idle worker"
        good = _pause_idle(ground, step, pause_s) if idle else _pause_busy(ground, step, victim, pause_s)
        if check_all_serve(ground, step, f"{victim} resumed until all serve") and good:
            step.did(f"{victim} tolerated")
            step.took("pauses tolerated", pause_s)
        else:
            step.took("pauses not tolerated", pause_s)
            ground.start_again(step)
            resources.again()


def _pause_idle(ground: Ground, step: Step, pause_s: float) -> bool:
    """The others serve in the meantime."""
    name = step.rng.choice(list(ground.workers))
    ground.workers[name].pause()
    until_s = time.monotonic() + pause_s
    try:
        good = check_text(ground, step, [w for w in ground.workers if w != name])
        time.sleep(max(0.0, until_s - time.monotonic()))
    finally:
        ground.workers[name].resume()
    return good


def _pause_busy(ground: Ground, step: Step, victim: str, pause_s: float) -> bool:
    """In the middle of a generation over two workers, or before it has begun."""
    rng = step.rng
    chosen = rng.sample(list(ground.workers), 2)
    stages = ground.order(chosen)
    p = ground.run(PROMPTS[0], N_LONG, *ground.shares(chosen))
    stopped = {"first stage": ground.workers[stages[0]], "second stage": ground.workers[stages[1]],
               "broker": ground.lasting()["broker"], "client": p}[victim]  # fmt: skip
    if rng.random() < 0.8:
        p.writes(len(PROMPTS[0]) + rng.randint(1, 200), 30)
    else:
        time.sleep(rng.uniform(0.2, 1.0))
    stopped.pause()
    step.did("under way" if p.alive else "just after the run")
    try:
        time.sleep(pause_s)
    finally:
        stopped.resume()
    return check_run(ground, step, p, PROMPTS[0], N_LONG)


def run_broker_kills(ground: Ground, report: Report, n: int, resources: Resources) -> None:
    """The workers are not started again: they come back by themselves."""
    for step, moment in zip(report.steps("broker kills", n), itertools.cycle(MOMENTS), strict=False):
        good = {"idle": _kill_idle, "mid-generation": _kill_busy, "upload": _kill_in_upload}[moment](ground, step)
        step.did(moment)
        ground.lasting()["broker"].kill()  # if it could not be killed at the moment that was meant
        ground.done(ground.lasting()["broker"])
        ground.start_broker()
        if not (check_all_serve(ground, step, "until all workers are back") and good):
            ground.start_again(step)
        resources.again()


def _heard(step: Step, moment: str, start: float) -> bool:
    seconds = time.monotonic() - start
    step.took(f"until known, {moment}", seconds)
    if seconds > HEARD_S:
        step.fail(f"{moment}: the client knew after {seconds:.1f} s, expected {HEARD_S:.0f} s at most")
    return seconds <= HEARD_S


def _kill_idle(ground: Ground, step: Step) -> bool:
    """A client that asks a broker that has gone."""
    start = 0.0
    try:
        with ground.client(SESSION_S) as c:
            c.devices()
            ground.lasting()["broker"].kill()
            c.on_wait = overdue_after(2 * HEARD_S)
            start = time.monotonic()
            c.devices()
    except GgmqError:
        return _heard(step, "idle", start)
    except Overdue as e:
        step.fail(f"idle: the client that asked was not told that the broker is gone: {e}")
        return False
    step.fail("idle: a broker that was killed answered")
    return False


def _kill_in_upload(ground: Ground, step: Step) -> bool:
    at = step.rng.uniform(0.05, 0.95)
    start = 0.0
    try:
        with ground.client(SESSION_S) as c:

            def gone(phase: str, done: int, total: int) -> None:
                nonlocal start
                if phase == "loading" and done >= at * total and not start:
                    ground.lasting()["broker"].kill()
                    c.on_wait = overdue_after(2 * HEARD_S)
                    start = time.monotonic()

            tell(c, step.rng.sample(list(ground.workers), 2), progress=gone, patience_s=PATIENCE_S)
    except GgmqError:
        return _heard(step, "upload", start)
    except Overdue as e:
        step.fail(f"upload: the client was not told that the broker is gone: {e}")
        return False
    step.fail("upload: a session went on without its broker")
    return False


def _kill_busy(ground: Ground, step: Step) -> bool:
    """A process: a plain error and exit code 1."""
    workers = ground.shares([w for w in ground.workers if w.endswith("-ref")])
    p = ground.run(PROMPTS[0], N_LONG, *workers, "--wait", str(PATIENCE_S))
    try:
        if not p.writes(len(PROMPTS[0]) + step.rng.randint(1, 200), 30):
            step.fail(f"mid-generation: the run told no story: {p.story()}")
            return False
        start = time.monotonic()
        ground.lasting()["broker"].kill()
        code = p.ends(2 * HEARD_S)
        if code is None:
            step.fail(f"mid-generation: the run did not end within {2 * HEARD_S:.0f} s after its broker was killed")
            return False
        if code != 1 or "ggmq: " not in p.err() or "Traceback" in p.err():
            step.fail(f"mid-generation: expected exit code 1 and a plain error: {p.story()}")
            return False
        return _heard(step, "mid-generation", start)
    finally:
        p.kill()
        ground.done(p)

