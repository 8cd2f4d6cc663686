"""What a step's record is: its fields and their kinds, and what follows from them. Imports no compiler.

From a declaration follow how a plan packs it, the opcode, which kernel the team calls, and what a profile says. A kernel's
parameters have the names of its record's fields; `scratch`, `t` and `n_threads` are the team's: the thread's own memory,
its number, and how many there are.

Units: an `Address` is one of host memory, `Bytes` are strides and sizes, a `Count` is one of elements, rows or cells.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import ClassVar, TypeAlias, TypeVar

import msgspec

WORD = 8
"""Bytes of a field."""
HEADER = 3
"""Words before the fields: the opcode, 1 if the threads wait for each other first, and which part it is (`part_word`)."""
TEAM_ARGUMENTS = ("scratch", "t", "n_threads")
"""What a kernel can take besides its fields."""

Address: TypeAlias = int
Bytes: TypeAlias = int
Count: TypeAlias = int
NodeIndex: TypeAlias = int
Code: TypeAlias = int
"""One of a table: a kind of weights, a function."""
Flag: TypeAlias = bool
Float32: TypeAlias = float
FORMS = {"Address": "q", "Bytes": "q", "Count": "q", "NodeIndex": "q", "Code": "q", "Flag": "q", "Float32": "f4x"}
"""How a field of each kind lies in its word, as `struct` writes it."""


def part_word(part: int, n_parts: int) -> int:
    """One of the equal parts that a step is done in. Kernels divide their work over threads, so part p of P is what threads
    p * T to p * T + T - 1 of P * T would do: no sum runs in another order."""
    return part << 32 | n_parts


class Step(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One step: its fields in the order in which they lie in memory, a word each.

    A step with a field `node` checks indices: its kernel returns whether they were good, and if not, that node is at fault.

    Attributes:
        opcode: a number of this declaration's own.
        kernel: module and name of the function that is called.
        op: what a profile calls it.
        form: how the fields are packed.
    """

    opcode: ClassVar[int]
    kernel: ClassVar[str]
    op: ClassVar[str]
    form: ClassVar[struct.Struct]

    def pack(self, program: object, at: int) -> None:
        """Write the fields to a writable buffer, from byte `at` on."""
        self.form.pack_into(program, at, *msgspec.structs.astuple(self))  # type: ignore[arg-type]

    def title(self) -> str:
        """The row of a profile that it belongs to."""
        return self.op


STEPS: list[type[Step]] = []
"""Every step; its place is its opcode."""
S = TypeVar("S", bound=type[Step])


def step(kernel: str, op: str) -> Callable[[S], S]:
    """Declare a step that `kernel` of workers/kernels carries out."""

    def declare(record: S) -> S:
        record.opcode, record.kernel, record.op = len(STEPS), kernel, op
        record.form = struct.Struct("=" + "".join(FORMS[kind] for kind in kinds(record).values()))
        STEPS.append(record)
        return record

    return declare


def kinds(record: type[Step]) -> dict[str, str]:
    """The kind of each field, in order."""
    told = {name: kind for part in record.__mro__ for name, kind in vars(part).get("__annotations__", {}).items()}
    return {name: told[name] for name in record.__struct_fields__}
