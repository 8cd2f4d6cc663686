"""All scenarios by name, and how they are run."""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import brokers, caches, drains, flood, fuzz, leaks, partitions, resume, slow, stops, tenants, wire
from tests.faults.ground import Ground
from tests.faults.report import Report, Run, Skipped

N_SAID = 10
"""So often a long scenario says how far it is."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Attributes: play: one run. n: runs of the long form."""

    play: Callable[[Ground, Run], None]
    n: int


SCENARIOS: dict[str, Scenario] = {
    "resume-run": Scenario(resume.resume_run, 60),
    "resume-bus": Scenario(resume.resume_bus, 60),
    "resume-serve": Scenario(resume.resume_serve, 60),
    "resume-cluster": Scenario(resume.resume_cluster, 20),
    "resume-twice": Scenario(resume.resume_twice, 20),
    "resume-upload": Scenario(resume.resume_upload, 20),
    "resume-cache": Scenario(resume.resume_cache, 20),
    "resume-end": Scenario(resume.resume_end, 20),
    "drain": Scenario(drains.drained, 30),
    "stop": Scenario(stops.stop, 30),
    "hang": Scenario(stops.hang, 20),
    "slow-link": Scenario(slow.thin_link, 6),
    "slow-tbf": Scenario(slow.thin_real_link, 6),
    "slow-way": Scenario(slow.long_way, 6),
    "slow-compute": Scenario(slow.long_compute, 3),
    "partition-hole": Scenario(partitions.black_hole, 30),
    "partition-cut": Scenario(partitions.cut, 30),
    "partition-link": Scenario(partitions.link, 30),
    "wire": Scenario(wire.doubled, 20),
    "fuzz-worker": Scenario(fuzz.worker, 1),
    "fuzz-broker": Scenario(fuzz.broker, 1),
    "broker": Scenario(brokers.killed_broker, 40),
    "flood": Scenario(flood.strangers, 6),
    "tenants": Scenario(tenants.tenants, 3),
    "cache-full": Scenario(caches.full, 3),
    "cache-damaged": Scenario(caches.damaged, 9),
    "cache-writers": Scenario(caches.two_writers, 5),
    "cache-killed": Scenario(caches.killed_writer, 10),
    "leaks-steps": Scenario(leaks.steps, 1),
    "leaks-sessions": Scenario(leaks.sessions, 1),
}


def chosen(only: str | None) -> list[str]:
    """Names that a list of patterns gives. Errors: SystemExit for one that gives none."""
    if only is None:
        return list(SCENARIOS)
    found: list[str] = []
    for pattern in only.split(","):
        names = fnmatch.filter(SCENARIOS, pattern)
        if not names:
            sys.exit(f"--only {pattern}: expected one of {', '.join(SCENARIOS)}")
        found += [n for n in names if n not in found]
    return found


def play(ground: Ground, name: str, seed: int) -> Run:
    """One run. What it raises is a failure of it."""
    run = Run(name, seed)
    try:
        SCENARIOS[name].play(ground, run)
    except Skipped as e:
        run.skipped = str(e)
    except Exception as e:
        run.complete = False
        run.fail(f"{type(e).__name__}: {e}")
    return run


def run_all(ground: Ground, report: Report, only: str | None = None, n_runs: int | None = None) -> None:
    """Every scenario that is wanted, one run after the other."""
    for name in chosen(only):
        n = report.asked[name] = n_runs or SCENARIOS[name].n
        for i in range(n):
            if time.monotonic() > report.due_s:
                return
            run = play(ground, name, report.seed + i)
            report.add(run)
            if run.skipped:
                print(f"{name}: skipped, {run.skipped}", file=sys.stderr, flush=True)
                break
            if n < N_SAID or (i + 1) * N_SAID // n > i * N_SAID // n:
                print(f"{name}: {i + 1} of {n}", file=sys.stderr, flush=True)
