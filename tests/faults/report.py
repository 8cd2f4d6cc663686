"""What became of each run; a table of scenarios; the same as JSON."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

SAID = 300
MAX_SAID = 2


class Skipped(Exception):
    """What a scenario needs is not here."""


@dataclass
class Run:
    """One run of a scenario, with a chance of its own: the same seed chooses the same.

    Attributes:
        what: what was done to whom and when, in words.
        complete: everything that was asked for came. identical: what came is what an undisturbed run says, as far as it
            came.
        pause_s: the longest time between two pieces of a text from the fault on; pause_tokens: as tokens of an undisturbed
            run. None: nothing had been made yet when it came.
        noticed_s: from the fault until somebody said so; None: nobody did, or had to.
        extra_s: longer than undisturbed.
        figures: others, by name.
    Threads: any.
    """

    scenario: str
    seed: int
    what: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    complete: bool = True
    identical: bool = True
    pause_s: float | None = None
    pause_tokens: float | None = None
    noticed_s: float | None = None
    extra_s: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    skipped: str = ""

    def __post_init__(self) -> None:
        self.rng = Random(f"{self.seed}/{self.scenario}")

    def did(self, what: str) -> None:
        self.what.append(what)

    def fail(self, why: str) -> None:
        self.failures.append(why)

    def line(self) -> str:
        why = "; ".join(" ".join(f.split())[:SAID] for f in self.failures[:MAX_SAID])
        more = f"; and {len(self.failures) - MAX_SAID} more" if len(self.failures) > MAX_SAID else ""
        return f"{self.scenario} (--seed {self.seed} --only {self.scenario} --runs 1), {', '.join(self.what)}: {why}{more}"


def percentile(values: Sequence[float], p: float) -> float:
    """The least value that so many of a hundred do not pass."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)]


def _of(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    return ", ".join(format(v, form) for v in (percentile(values, 50), percentile(values, 99), max(values)))


class Report:
    """Attributes: due_s: when no further run is begun, on the monotonic clock. Threads: any."""

    def __init__(self, seed: int, limit_s: float) -> None:
        self.seed, self.due_s = seed, time.monotonic() + limit_s
        self.runs: list[Run] = []
        self.asked: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, run: Run) -> None:
        with self._lock:
            self.runs.append(run)
        if run.failures:
            print(f"FAILED {run.line()}", file=sys.stderr, flush=True)

    @property
    def failed(self) -> list[Run]:
        return [r for r in self.runs if r.failures]

    @property
    def missing(self) -> list[str]:
        """Scenarios of which not all runs were begun."""
        return [s for s, n in self.asked.items() if len(self._of(s)) < n and not any(r.skipped for r in self._of(s))]

    def _of(self, scenario: str) -> list[Run]:
        return [r for r in self.runs if r.scenario == scenario]

    def table(self) -> str:
        """Markdown. Of three figures, they are median, 99th percentile and most."""
        lines = ["| scenario | runs | complete | identical | failed | pause, tokens | pause, s | noticed, s | longer, s |",
                 "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for scenario, asked in self.asked.items():
            runs = self._of(scenario)
            skipped = next((r.skipped for r in runs if r.skipped), "")
            if skipped:
                lines.append(f"| {scenario} | skipped: {skipped} | | | | | | | |")
                continue
            cells = [str(asked) if len(runs) == asked else f"{len(runs)} of {asked}", str(sum(r.complete for r in runs)),
                     str(sum(r.identical for r in runs)), str(sum(bool(r.failures) for r in runs)),
                     _of([r.pause_tokens for r in runs if r.pause_tokens is not None], ".0f"),
                     _of([r.pause_s for r in runs if r.pause_s is not None], ".2f"),
                     _of([r.noticed_s for r in runs if r.noticed_s is not None], ".2f"),
                     _of([r.extra_s for r in runs if r.extra_s is not None], ".2f")]  # fmt: skip
            lines.append(f"| {scenario} | {' | '.join(cells)} |")
        names = sorted({(r.scenario, name) for r in self.runs for name in r.figures})
        if names:
            lines += ["", "| figure | n | median, 99th percentile, most |", "|---|---|---|"]
        for scenario, name in names:
            values = [r.figures[name] for r in self._of(scenario) if name in r.figures]
            lines.append(f"| {scenario}: {name} | {len(values)} | {_of(values, '.3g')} |")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        scenarios = {}
        for scenario, asked in self.asked.items():
            runs = self._of(scenario)
            scenarios[scenario] = {
                "asked": asked, "runs": len(runs), "complete": sum(r.complete for r in runs),
                "identical": sum(r.identical for r in runs), "failed": sum(bool(r.failures) for r in runs),
                "skipped": next((r.skipped for r in runs if r.skipped), ""),
            }  # fmt: skip
        return {"seed": self.seed, "scenarios": scenarios, "runs": [asdict(r) for r in self.runs]}
