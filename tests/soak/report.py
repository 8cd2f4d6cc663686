"""What was done, what failed, how long things took; the table at the end."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from random import Random

from tests.support.supervised import Figures

MAX_FAILURES = 6
"""A part that failed so often ends: what comes after tells nothing new and every failure waits for its limit."""
N_SAID = 20
"""So often a long part says how far it is."""
MIB = 1 << 20


class Report:
    """Attributes:
    seed: of all that is chosen by chance. due_s: when no further step is begun, on the monotonic clock.
    Threads: any.
    """

    def __init__(self, seed: int, limit_s: float) -> None:
        self.seed, self.due_s = seed, time.monotonic() + limit_s
        self.failures: list[str] = []
        self._failed: Counter[str] = Counter()
        self._asked: dict[str, int] = {}
        self._begun: Counter[str] = Counter()
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._times: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._figures: list[tuple[str, Figures, Figures, Figures]] = []
        self._lock = threading.Lock()

    def steps(self, part: str, n: int) -> Iterator[Step]:
        """The steps of a part, until all are done, the time is over or too many failed."""
        self._asked[part] = n
        for i in range(n):
            if time.monotonic() > self.due_s or self._failed[part] >= MAX_FAILURES:
                return
            self._begun[part] += 1
            yield Step(self, part, i)
            if n >= N_SAID and (i + 1) * N_SAID // n > i * N_SAID // n:
                print(f"{part}: {i + 1} of {n}", file=sys.stderr, flush=True)

    def whole(self, part: str) -> bool:
        """Whether every step of a part was begun."""
        return self._begun[part] == self._asked.get(part)

    def fail(self, part: str, number: int | str, message: str) -> None:
        line = f"{part} step {number} (--seed {self.seed}): {message}"
        with self._lock:
            self.failures.append(line)
            self._failed[part] += 1
        print(f"FAILED {line}", file=sys.stderr, flush=True)

    def did(self, part: str, what: str) -> None:
        with self._lock:
            self._counts[part][what] += 1

    def took(self, part: str, what: str, seconds: float) -> None:
        with self._lock:
            self._times[part, what].append(seconds)

    def held(self, name: str, before: Figures, most: Figures, after: Figures) -> None:
        """What a process held before, at most, and after."""
        with self._lock:
            self._figures.append((name, before, most, after))

    def table(self) -> str:
        """Markdown, as docs/faults.md shows it."""
        lines = ["| part | steps | failures | of them |", "|---|---|---|---|"]
        for part, asked in self._asked.items():
            begun = str(asked) if self._begun[part] == asked else f"{self._begun[part]} of {asked}"
            what = ", ".join(f"{n} {what}" for what, n in sorted(self._counts[part].items()))
            lines.append(f"| {part} | {begun} | {self._failed[part]} | {what} |")
        if self._times:
            lines += ["", "| time, in seconds | n | least | median | most |", "|---|---|---|---|---|"]
        for (part, what), t in self._times.items():
            lines.append(f"| {part}: {what} | {len(t)} | {min(t):.2f} | {statistics.median(t):.2f} | {max(t):.2f} |")
        if self._figures:
            lines += ["", "| process | RSS before, most, after (MiB) | descriptors | threads |", "|---|---|---|---|"]
        for name, *three in self._figures:
            rss = ", ".join(f"{f.rss_bytes / MIB:.1f}" for f in three)
            fds, threads = ", ".join(str(f.n_fds) for f in three), ", ".join(str(f.n_threads) for f in three)
            lines.append(f"| {name} | {rss} | {fds} | {threads} |")
        return "\n".join(lines)


class Step:
    """One of a part's steps, with a chance of its own: the same seed and number choose the same."""

    def __init__(self, report: Report, part: str, number: int | str) -> None:
        self.report, self.part, self.number = report, part, number
        self.rng = Random(f"{report.seed}/{part}/{number}")

    def fail(self, message: str) -> None:
        self.report.fail(self.part, self.number, message)

    def did(self, what: str) -> None:
        self.report.did(self.part, what)

    def took(self, what: str, seconds: float) -> None:
        self.report.took(self.part, what, seconds)
