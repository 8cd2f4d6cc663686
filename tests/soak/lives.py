"""Workers that come and go by the hundred: a broker knows those that live, and forgets the others."""

from __future__ import annotations

import functools
import queue
import signal
import time

from protocol.errors import GgmqError
from tests.soak.ground import (
    BACK_S,
    ENDED,
    GGMQ,
    N_TOKENS,
    PROMPTS,
    READY_S,
    Ground,
    Overdue,
    at_once,
    check_text,
    tell,
)
from tests.soak.report import Report, Step
from tests.support.supervised import Supervised, until

AT_ONCE = 3
FORGOTTEN_S = 30.0


def run_lives(ground: Ground, report: Report, n: int) -> None:
    """Needs a ground with spare ports."""
    ports: queue.Queue[int] = queue.Queue()
    for port in ground.spare:
        ports.put(port)
    group: list[Step] = []
    for step in report.steps("lives", n):
        group.append(step)
        if len(group) == AT_ONCE:
            at_once(step, [functools.partial(_life, ground, s, ports) for s in group])
            group = []
    at_once(Step(report, "lives", "last"), [functools.partial(_life, ground, s, ports) for s in group])
    _only_the_living_are_known(ground, Step(report, "lives", "end"))
    _ports_are_used_again(ground, Step(report, "lives", "again"))


def _life(ground: Ground, step: Step, ports: queue.Queue[int]) -> None:
    rng = step.rng
    device = rng.choice(("CPU", "reference"))
    try:
        port = ports.get_nowait() if rng.random() < 0.5 else 0
    except queue.Empty:
        port = 0
    name = f"life{step.number}"
    p = ground.worker(name, device, port)
    try:
        _lived(ground, step, p, name, port)
    finally:
        ground.done(p)
        if port:
            ports.put(port)


def _lived(ground: Ground, step: Step, p: Supervised, name: str, port: int) -> None:
    rng = step.rng
    sort = rng.choice((signal.SIGKILL, signal.SIGTERM))
    how = f"{'listening' if port else 'dialled in'}, {sort.name}"
    if rng.random() < 0.15:
        time.sleep(rng.uniform(0.05, 0.8))  # it goes before, or just when, it is ready
        p.signal(sort)
    else:
        if not p.says(ENDED, READY_S):
            step.fail(f"{how}: it was not ready: {p.story()}")
            return
        known_s = ground.await_names({name}, BACK_S)
        if known_s is None:
            step.fail(f"{how}: a worker {'on a port that was used before' if port else 'that dialled in'} "
                      f"was not known within {BACK_S:.0f} s: {p.story()}")  # fmt: skip
            return
        step.took("until a listening one is used" if port else "until one that dials in is known", known_s)
        if rng.random() < 0.4:  # alone, or with one that lives on: to which it connects, or which connects to it
            chosen = rng.sample([name, rng.choice(list(ground.workers))], rng.randint(1, 2))
            check_text(ground, step, chosen if name in chosen else [name])
        if rng.random() < 0.2:
            _goes_in_mid_session(ground, step, p, name, sort)
        p.signal(sort)
    if p.ends(BACK_S) is None:
        step.fail(f"{how}: it did not end within {BACK_S:.0f} s")
    elif sort == signal.SIGTERM and p.process.returncode not in (0, -sort):
        step.fail(f"{how}: {p.story()}")  # -sort: it was told before it could listen to signals
    step.did(how)


def _goes_in_mid_session(ground: Ground, step: Step, p: Supervised, name: str, sort: int) -> None:
    """A session whose worker goes ends soon: with an ordinary error, or with the right text by way of another worker."""
    start = 0.0

    def gone(phase: str, done: int, total: int) -> None:
        nonlocal start
        if phase == "loading" and done and not start:
            start = time.monotonic()
            p.signal(sort)

    try:
        with ground.client(20) as c:
            text = tell(c, [name], progress=gone)
        if text != ground.texts[PROMPTS[0], N_TOKENS]:
            step.fail(f"a session whose worker {name} went told another story: {text!r}")
    except GgmqError:
        step.took("until a session hears of its worker's end", time.monotonic() - start)
    except Overdue as e:
        step.fail(f"a session whose worker {name} went did not hear of it: {e}")


def _only_the_living_are_known(ground: Ground, step: Step) -> None:
    living = set(ground.workers)
    start = time.monotonic()
    if until(lambda: ground.living() == (living, len(living)), FORGOTTEN_S, 0.2):
        step.took("only the living are listed", time.monotonic() - start)
    else:
        names, n = ground.living()
        step.fail(f"{FORGOTTEN_S:.0f} s after the last life the broker lists {n} devices, of them {sorted(names)} alive, "
                  f"expected {sorted(living)} and no other")  # fmt: skip
    p = ground.process("status", [*GGMQ, "status", "--broker", ground.endpoint, "--insecure"])
    code = p.ends(30)
    lines = p.out().splitlines()
    if code != 0 or len(lines) != len(living) or any(line.endswith(": lost") for line in lines):
        step.fail(f"ggmq status: {len(lines)} lines, {sum(line.endswith(': lost') for line in lines)} of them lost, "
                  f"expected {len(living)}: {p.story()[:600]}")  # fmt: skip
    ground.done(p)
    check_text(ground, step, list(ground.workers))


def _ports_are_used_again(ground: Ground, step: Step) -> None:
    """A worker on each of the ports where many lived before."""
    started = {f"again{i}": ground.worker(f"again{i}", "CPU", port) for i, port in enumerate(ground.spare)}
    for p in started.values():
        p.says(ENDED, READY_S)
    used_s = ground.await_names(set(started))
    if used_s is None:
        step.fail(f"workers that listen again were not used within {BACK_S:.0f} s; known are {sorted(ground.living()[0])}")
    else:
        step.took("until those that listen again are used", used_s)
        check_text(ground, step, list(started))
    for p in started.values():
        ground.done(p)
