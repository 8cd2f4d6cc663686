"""A graph as a program of the team's steps, and before which of them the threads wait for each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from workers.devices.host import Step as Aside
from workers.devices.lower import Hazards, Node, Span
from workers.kernels.costs import cost
from workers.kernels.records import HEADER, WORD, Step, part_word
from workers.kernels.steps import WORDS
from workers.ticks import Tick

Words = npt.NDArray[np.int64]
PART_COST = 200_000_000
"""What each thread does of a step, or of steps, before sockets may be looked at: a slow core takes 50 ms."""
PIECES = 3
"""Of so much: where others wait no more than one is done in one go."""
TOGETHER_S = 0.01
"""For about so long steps are done in one go, which begins and ends with all threads; they may be slower than the last."""
SHARED_S = 0.001
"""The same where others wait."""
SHORT_S = 0.001


class Run(NamedTuple):
    """Steps that the team does in one go, the node that they begin with, and what they cost; between two runs sockets are
    looked at."""

    first: int
    last: int
    node: int
    cost: int


class Pace:
    """How fast a team has been, by which runs that follow each other are put together where it is fast.

    Attributes:
        least: what is put together however slow the team is.
        short: others wait, and little is put together.
    """

    def __init__(self, least: int = 0) -> None:
        self.least, self.short = least, False
        self._per_s = 0.0

    @property
    def together(self) -> float:
        """What may be done in one go."""
        return SHARED_S * self._per_s if self.short else max(self.least, TOGETHER_S * self._per_s)

    def did(self, n: int, seconds: float) -> None:
        """Slower is believed at once, faster by and by. Of a short run the beginning and the end are most."""
        per_s = n / max(seconds, 1e-6)
        if seconds > SHORT_S or per_s > self._per_s:
            self._per_s = min(per_s, 2 * self._per_s or per_s)


class Parts:
    """The parts of a program as a plan does them, one after the other; `run` does steps.

    Attributes:
        alone: each run by itself, as one that is noted.
    """

    def __init__(self, parts: Sequence[Run | tuple[Aside, int]], run: Callable[[int, int], None], pace: Pace) -> None:
        self._parts, self._run, self._pace, self.alone = parts, run, pace, False

    def __iter__(self) -> Iterator[tuple[Aside, int]]:
        parts, at = self._parts, 0
        while at < len(parts):
            part = parts[at]
            at += 1
            if not isinstance(part, Run):
                yield part
                continue
            last, n = part.last, part.cost
            while at < len(parts) and not self.alone:
                following = parts[at]
                if not isinstance(following, Run) or n + following.cost > self._pace.together:
                    break
                last, n, at = following.last, n + following.cost, at + 1
            yield partial(self._timed, part.first, last, n), part.node

    def _timed(self, first: int, last: int, n: int, tick: Tick) -> None:
        begun = time.monotonic()
        self._run(first, last)
        self._pace.did(n, time.monotonic() - begun)


class Program:
    """Steps in the order in which they are added. One that costs much is done in parts, which wait for nobody.

    Attributes:
        steps: what the team does; nodes: that which each begins with.
        parts: its runs, and what the caller's thread does between them with the node that it is.
    """

    def __init__(self, n_threads: int) -> None:
        self.steps: list[Step] = []
        self.nodes: list[int] = []
        self.parts: list[Run | tuple[Aside, int]] = []
        self._most = PART_COST // PIECES * n_threads
        self._headers: list[tuple[bool, int]] = []
        self._hazards = Hazards()
        self._first, self._cost = 0, 0

    def add(self, node: Node, step: Step, reads: Sequence[Span], writes: Sequence[Span]) -> None:
        """A step of a node; the threads wait for each other before it when it touches what was written meanwhile."""
        waits, whole = self._hazards.waits(reads, writes), cost(step)
        n_parts = max(1, -(-whole // self._most))
        for part in range(n_parts):
            if self._cost and self._cost + whole // n_parts > self._most:
                self._end_run()
            self._cost += whole // n_parts
            self._headers.append((waits and part == 0, part_word(part, n_parts)))
            self.steps.append(step)
            self.nodes.append(node.index)

    def _end_run(self) -> None:
        if self._first < len(self.steps):
            self.parts.append(Run(self._first, len(self.steps), self.nodes[self._first], self._cost))
        self._first, self._cost = len(self.steps), 0

    def flush(self) -> None:
        """What was added so far is done before anything else begins."""
        self._end_run()
        self._hazards.clear()

    def add_aside(self, node: Node, aside: Aside) -> None:
        """Something that the caller's thread does for a node."""
        self.flush()
        self.parts.append((aside, node.index))

    def words(self) -> Words:
        """The steps as the team reads them. Shapes: [n_steps, WORDS]."""
        words = np.zeros((len(self.steps), WORDS), np.int64)
        for row, step, (waits, part) in zip(words, self.steps, self._headers, strict=True):
            row[:HEADER] = step.opcode, waits, part
            step.pack(row, WORD * HEADER)
        return words
