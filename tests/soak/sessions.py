"""Sessions in turn and at once: ended in good order, merely closed, as a process, as a process that is killed."""

from __future__ import annotations

import functools
import time

from ggmq.cluster import Client
from tests.soak.ground import (
    N_LONG,
    N_TOKENS,
    PROMPTS,
    Ground,
    at_once,
    check_run,
    check_text,
)
from tests.soak.report import Report, Step
from tests.support.supervised import until

KINDS = {"drained": 60, "closed": 16, "run": 12, "killed": 12}
"""Kinds of session and how often each comes, of a hundred."""
FORGOTTEN_S = 30.0
"""What a client held that went without a word is free within this long."""


def run_sessions(ground: Ground, report: Report, n: int) -> None:
    group: list[Step] = []
    size = 1
    for step in report.steps("sessions", n):
        group.append(step)
        if len(group) == size:
            _together(ground, group)
            group, size = [], step.rng.choice((1, 1, 2, 3))
    if group:
        _together(ground, group)
    _nothing_is_held(ground, Step(report, "sessions", "end"))


def _together(ground: Ground, group: list[Step]) -> None:
    at_once(group[0], [functools.partial(_session, ground, step) for step in group])


def _session(ground: Ground, step: Step) -> None:
    rng, names = step.rng, list(ground.workers)
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    chosen = rng.sample(names, rng.randint(1, len(names)))
    prompt = rng.choice(PROMPTS)
    if kind in ("drained", "closed"):
        check_text(ground, step, chosen, prompt, drain=kind == "drained")
    elif kind == "run":
        check_run(ground, step, ground.run(prompt, N_TOKENS, *ground.shares(chosen)), prompt, N_TOKENS)
    else:
        p = ground.run(prompt, N_LONG, *ground.shares(chosen))
        if rng.random() < 0.7:
            p.writes(len(prompt) + rng.randint(1, 200), 30)
        else:
            time.sleep(rng.uniform(0.2, 1.0))  # while it starts, connects, places, sends weights
        if p.ends(0) is None:
            p.kill()
        elif p.process.returncode:
            step.fail(f"a run failed before it could be killed: {p.story()}")
        else:
            kind = "run to its end before it was killed"
        ground.done(p)
    step.did(kind)


def _nothing_is_held(ground: Ground, step: Step) -> None:
    """Workers hold no buffer of any session that has ended, however it ended."""

    def held(c: Client) -> list[str]:
        stats = {d.worker: c.stats(i) for i, d in enumerate(c.devices()) if d.total_bytes}
        return [f"{w} {s.n_buffers} buffers of {s.n_sessions} sessions" for w, s in stats.items() if s.n_buffers]

    start = time.monotonic()
    with ground.client() as c:
        if until(lambda: not held(c), FORGOTTEN_S, 0.2):
            step.took("all is free", time.monotonic() - start)
        else:
            step.fail(f"{FORGOTTEN_S:.0f} s after the last session: {'; '.join(held(c))}")
