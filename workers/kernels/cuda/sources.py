"""Puts a kernel's source together: primitives, the structs that kernels take, what files share, the file.

A `Kernel` names a function and what its source is compiled with; its `text` and the architecture are all that a compiler
needs, so a compiled kernel is kept under a hash of these.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from workers.kernels.cuda import attention_launches, product_launches, row_launches, scan_launches  # noqa: F401  declare records
from workers.kernels.cuda.launches import declarations

FOLDER = Path(__file__).parent
OPTIONS = ("--std=c++17", "--fmad=false", "--dopt=on", "--device-as-default-execution-space")
"""What NVRTC compiles with. A product and a sum are one rounding only where the source says so: a result does not depend on
how a compiler puts things together."""


class Kernel(NamedTuple):
    """A function of a file, compiled with these macros."""

    file: str
    function: str
    macros: tuple[tuple[str, str], ...] = ()

    def text(self, primitives: str | None = None) -> str:
        """The whole source. `primitives`: instead of those that are PTX."""
        defined = "".join(f"#define {name} {value}\n" for name, value in self.macros)
        head = _file("primitives.cuh") if primitives is None else primitives
        shared = [_file("common.cuh"), *_shared(self.file)]
        return "\n".join([defined, head, declarations(self.file), *shared, _file(f"{self.file}.cu")])


@lru_cache
def _file(name: str) -> str:
    return f'#line 1 "{name}"\n' + (FOLDER / name).read_text(encoding="utf-8")


SHARED = {
    "products": ("formats.cuh", "units.cuh", "columns.cuh"), "tiles": ("formats.cuh", "units.cuh"),
    "packing": ("formats.cuh",), "columns": ("columns.cuh",),
    "attention": ("softmax.cuh",), "paged": ("softmax.cuh", "columns.cuh"), "sorts": ("strided.cuh",),
    "moves": ("strided.cuh",), "elements": ("strided.cuh", "functions.cuh"), "rows": ("strided.cuh", "columns.cuh"),
    "rope": ("strided.cuh",), "gates": ("strided.cuh", "columns.cuh", "functions.cuh"),
    "blocks": ("strided.cuh", "blocks.cuh"),
}
"""Headers of a file besides those that all have."""


def _shared(file: str) -> list[str]:
    return [_file(name) for name in SHARED.get(file, ())]
