"""Innermost loops, written in LLVM IR alone: functions of addresses and counts that kernels call by name.

Each is compiled by itself, so the kernels around them are small for the compiler. `python -m workers.kernels.units` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core.registry import cpu_target

from workers.kernels.simd import Emit, i64

Body = Callable[[Emit, Sequence[Any]], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """What writes a function of so many int64."""

    n_arguments: int
    body: Body


PIECES: dict[str, Piece] = {}
"""By the name under which they are linked."""


def piece(name: str, n_arguments: int, body: Body) -> str:
    """Declare one. Returns: its name."""
    PIECES[name] = Piece(n_arguments, body)
    return name


def call(b: Any, name: str, arguments: Sequence[Any]) -> None:
    """Write a call of a piece, which is linked later."""
    b.call(_declared(b.module, name), arguments)


def _declared(module: Any, name: str) -> Any:
    known = module.globals.get(name)
    kind = ir.FunctionType(ir.VoidType(), [i64] * PIECES[name].n_arguments)
    return ir.Function(module, kind, name) if known is None else known


def compiled(names: Sequence[str]) -> bytes:
    """An object file with these pieces, for the CPU that Numba compiles for."""
    module = ir.Module("pieces")
    module.triple = llvm.get_process_triple()
    for name in names:
        fn = _declared(module, name)
        b = ir.IRBuilder(fn.append_basic_block())
        PIECES[name].body(Emit(b), fn.args)
        b.ret_void()
    codegen = cpu_target.target_context.codegen()
    machine = llvm.Target.from_triple(module.triple).create_target_machine(
        codegen._get_host_cpu_name(), codegen._tm_features, opt=3, codemodel="jitdefault", jit=True
    )
    parsed = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return bytes(machine.emit_object(parsed))
