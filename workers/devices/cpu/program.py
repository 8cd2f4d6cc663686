"""A graph as a program of the team's steps, and before which of them the threads wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from workers.devices.host import Step as Aside
from workers.devices.lower import Hazards, Node, Span
from workers.kernels.records import HEADER, WORD, Step
from workers.kernels.steps import WORDS

Words = npt.NDArray[np.int64]


class Run(NamedTuple):
    """Steps that the team does in one go, and the node that they begin with; between two runs sockets are looked at."""

    first: int
    last: int
    node: int


class Program:
    """Steps in the order in which they are added.

    Attributes:
        steps: what the team does; nodes: that which each begins with.
        parts: its runs, and what the caller's thread does between them with the node that it is.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.nodes: list[int] = []
        self.parts: list[Run | tuple[Aside, int]] = []
        self._waits: list[bool] = []
        self._hazards = Hazards()
        self._first, self._first_node = 0, -1

    def add(self, node: Node, step: Step, reads: Sequence[Span], writes: Sequence[Span]) -> None:
        """A step of a node; the threads wait for each other before it when it touches what was written meanwhile."""
        if self._first == len(self.steps):
            self._first_node = node.index
        self._waits.append(self._hazards.waits(reads, writes))
        self.steps.append(step)
        self.nodes.append(node.index)

    def flush(self) -> None:
        """What was added so far is a run."""
        if self._first < len(self.steps):
            self.parts.append(Run(self._first, len(self.steps), self._first_node))
        self._first = len(self.steps)
        self._hazards.clear()

    def add_aside(self, node: Node, aside: Aside) -> None:
        """Something that the caller's thread does for a node."""
        self.flush()
        self.parts.append((aside, node.index))

    def words(self) -> Words:
        """The steps as the team reads them. Shapes: [n_steps, WORDS]."""
        words = np.zeros((len(self.steps), WORDS), np.int64)
        for row, step, waits in zip(words, self.steps, self._waits, strict=True):
            row[:HEADER] = step.opcode, waits
            step.pack(row, WORD * HEADER)
        return words
