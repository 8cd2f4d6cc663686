"""Writes docs/ops.md from the op table: `python -m docs.make_ops`."""

from __future__ import annotations

from pathlib import Path

from protocol.dtypes import ANY, FLOATS, GGMLType
from protocol.ops import COPYABLE, OPS, STORABLE, WEIGHTS

NAMED = [(frozenset(s), name) for s, name in (
    (FLOATS, "float"), (WEIGHTS, "any weight"), (COPYABLE, "any"), (STORABLE, "any that can be written"), (ANY, "any"))]


def types(allowed: frozenset[GGMLType]) -> str:
    for known, name in NAMED:
        if allowed == known:
            return name
    return "/".join(sorted(t.name for t in allowed))


def page() -> str:
    """The whole page."""
    lines = [
        "# Ops",
        "",
        "Made from `protocol/ops.py` by `python -m docs.make_ops`. Names and semantics are ggml's; *float* is F32, F16 or",
        "BF16; NMSE is the bound against ggml's own result.",
        "",
        "| op | mathematics | sources | parameters | NMSE |",
        "|---|---|---|---|---|",
    ]
    for op in OPS.values():
        sources = ", ".join(f"{s.name}{'?' if s.optional else ''}: {types(s.types)}" for s in op.sources)
        params = ", ".join(op.params)
        maths = op.math.replace("|", "\\|")
        lines.append(f"| {op.name} | {maths} | {sources} | {params} | {op.nmse:g} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("ops.md").write_text(page())
