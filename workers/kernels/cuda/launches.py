"""What a plan hands to a CUDA kernel: one record for each kernel, declared here once, by value its only argument.

From a declaration follow how it is packed, the C struct of the same name that the kernel takes (`declarations`), the file
that the kernel is in and what a profile says. Fields are 8 bytes each: a float is followed by padding, so both sides agree
whatever the compiler.

To add a kernel: a record in `product_launches`, `row_launches`, `attention_launches` or `scan_launches`, and a function
`extern "C" __global__ void NAME(RECORD a)` in the file that it names.
Units: an `Address` is one of device memory, `Bytes` are strides and sizes, a `Count` is one of elements, rows or cells;
`Four` are four of these in ggml's order, [0] the fastest.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeAlias, TypeVar

import msgspec

from workers.kernels.records import Address, Bytes, Code, Count, Flag, Float32, NodeIndex  # noqa: F401

Four: TypeAlias = tuple[int, int, int, int]
NOTHING: Four = (0, 0, 0, 0)
"""Strides of what is not there, or is one number."""
Parts: TypeAlias = tuple[int, int, int, int]
"""Of up to four parts of a launch, each its own."""
FORMS = {"Address": "q", "Bytes": "q", "Count": "q", "NodeIndex": "q", "Code": "q", "Flag": "q", "Float32": "f4x",
         "Four": "4q", "Parts": "4q"}
"""How a field of each kind lies in the record, as `struct` writes it."""
C_FIELDS = {"Float32": "float {0}; int {0}_pad;", "Four": "i64 {0}[4];", "Parts": "i64 {0}[4];"}
"""How C declares it where it is no `i64`."""


class Launch(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One kernel's argument: its fields in the order in which they lie in memory.

    A launch with the fields `status` and `node` checks indices: where one points outside what it names, the kernel puts the
    node's number at `status` (`report` in common.cuh) and follows it nowhere.

    Attributes:
        file: the source, without its ending; function: the kernel in it.
        op: what a profile calls it.
    """

    file: ClassVar[str]
    function: ClassVar[str]
    op: ClassVar[str]
    form: ClassVar[struct.Struct]

    def to_bytes(self) -> bytes:
        return self.form.pack(*_flat(msgspec.structs.astuple(self)))

    def title(self) -> str:
        """The row of a profile that it belongs to."""
        return self.op


class MakesColumns(Launch, frozen=True, kw_only=True):
    """One that may make, besides its result, the columns in 16 bits that products read of it (`put_column` in columns.cuh).

    Attributes:
        columns: where, 0 for none; the others are `Halve`'s y_row, scales and wide.
        only_columns: nobody reads the result itself, which need not be written.
    """

    columns: Address = 0
    columns_row: Bytes = 0
    columns_scales: Address = 0
    columns_wide: Flag = False
    only_columns: Flag = False

    def rows_made(self) -> tuple[int, int, int] | None:
        """Address, length and count of the rows of float32 that it makes, which lie together; None where it cannot make
        columns of them."""
        raise NotImplementedError


class TellsPeaks(MakesColumns, frozen=True, kw_only=True):
    """One that may tell the largest magnitude of each row instead, for a product that reads the rows themselves.

    Attributes:
        peaks: a word for each row, 0 before: it becomes the bits of a float32. 0: it tells nothing.
    """

    peaks: Address = 0

    def pieces(self) -> int:
        """Blocks of PIECE_THREADS threads for each row, when it tells peaks; 0: as many as otherwise."""
        return 0


PIECE_THREADS = 128
"""Of a block that makes a piece of a row, a four for each."""


def _flat(values: tuple[object, ...]) -> Iterator[object]:
    for value in values:
        if isinstance(value, tuple):
            yield from value
        else:
            yield value


LAUNCHES: list[type[Launch]] = []
"""Every declaration."""
L = TypeVar("L", bound=type[Launch])


def launch(kernel: str, op: str) -> Callable[[L], L]:
    """Declare the record of a kernel, `file.function`."""

    def declare(record: L) -> L:
        record.file, record.function = kernel.split(".")
        record.op = op
        record.form = struct.Struct("=" + "".join(FORMS[kind] for kind in kinds(record).values()))
        LAUNCHES.append(record)
        return record

    return declare


def kinds(record: type[Launch]) -> dict[str, str]:
    """The kind of each field, in order."""
    told = {name: kind for part in record.__mro__ for name, kind in vars(part).get("__annotations__", {}).items()}
    return {name: told[name] for name in record.__struct_fields__}


def declarations(file: str) -> str:
    """The C structs of the kernels of a file."""
    out = []
    for record in LAUNCHES:
        if record.file == file:
            fields = " ".join(C_FIELDS.get(kind, "i64 {0};").format(name) for name, kind in kinds(record).items())
            out.append(f"struct {record.__name__} {{ {fields} }};")
    return "\n".join(out) + "\n"
