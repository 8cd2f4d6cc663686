"""Compiles the kernels, a unit at a time: `python -m workers.kernels.units FOLDER`. Several processes may share the work.

A unit is an object file with some functions and a note of their names. Which units there are `layout.UNITS` says; this
module, which imports the compiler, knows what is in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from numba import cfunc, config, types
from numba.core.registry import cpu_target

from workers.kernels import team
from workers.kernels.exports import EXPORTS, Export
from workers.kernels.layout import KINDS, N_QUANTIZED, N_WORDS, TEAM, UNITS
from workers.kernels.linking import link, never_called
from workers.kernels.pieces import PIECES, compiled

NESTED = ("products", "packing")
_OF_FORMATS = {t.name for t in KINDS[:N_QUANTIZED]}


def pieces_of(unit: str) -> list[str]:
    """Names of the pieces in a unit: those of a block format, of tiles, of floats."""
    if unit in _OF_FORMATS:
        return [n for n in PIECES if n.startswith(("ggmq_gemv", "ggmq_panel")) and n.endswith("_" + unit)]
    return [n for n in PIECES if n.startswith("ggmq_" + {"tiles": "tile", "floats": "float"}.get(unit, "/"))]


def exports_of(unit: str) -> dict[str, Export]:
    """The functions of a unit, by the names under which they are linked: those of a module, or of a part of `rows`."""
    if unit == TEAM:
        return {"ggmq_team_call": Export(team.call, types.void, (types.int64,) * N_WORDS)}
    if unit.startswith("rows"):
        names = [n for n in EXPORTS if n.startswith("ggmq_rows_")]
        return {n: EXPORTS[n] for n in names[int(unit[4:]) :: 2]}
    return {n: e for n, e in EXPORTS.items() if n.startswith(f"ggmq_{unit}_")}


def compile_unit(unit: str, folder: Path) -> None:
    """Write a unit's objects and its note.

    Numba optimises each function together with all that it calls. Where many call each other, they are made without first,
    and only those that are called from outside are optimised, which hold all others.
    """
    objects, note = [], []
    if names := pieces_of(unit):
        objects.append(compiled(names))
        note.append({"exports": {name: name for name in names}, "unused": []})
    for name, e in exports_of(unit).items():
        if unit in NESTED:
            _optimise(0)
            e.dispatcher.compile(e.arguments)
        _optimise(3)
        made = cfunc(e.returns(*e.arguments), nopython=True)(e.dispatcher.py_func)
        code = made._library._compiled_object or made._library._get_compiled_object()
        unused = [s for s in _words(code) if s.startswith(("NRT_", "numba_"))]
        objects.append(code)
        note.append({"exports": {name: made.native_name}, "unused": unused})
    for i, code in enumerate(objects):
        (folder / f"{unit}.{i}.o").write_bytes(code)
    part = folder / f"{unit}.part"
    part.write_text(json.dumps(note))
    part.rename(folder / f"{unit}.json")


def _optimise(level: int) -> None:
    os.environ["NUMBA_OPT"] = str(level)
    config.reload_config()


def _words(code: bytes) -> list[str]:
    """Names in an object file: what stands between zeros and could be one."""
    words = {w.decode("ascii", "replace") for w in code.split(b"\0")}
    return sorted(w for w in words if w.replace("_", "").isalnum())


def provide_pieces() -> None:
    """Have the pieces in this process, so that kernels can be called through Numba itself."""
    link([compiled(list(PIECES))], {name: name for name in PIECES})


def main(folder: Path) -> None:
    """Compile the units that no other process has taken."""
    parent = os.getppid()
    cpu_target.target_context.codegen()  # takes its own level as it is now
    never_called((*PIECES, *EXPORTS))  # of other units: named here
    for unit in UNITS:
        if os.getppid() != parent:
            return
        try:
            os.close(os.open(folder / f"{unit}.taken", os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            continue
        compile_unit(unit, folder)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(Path(sys.argv[1]))
