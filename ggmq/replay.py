"""Recorded graphs through a real worker: each case's tensors are sent, computed there, and held against the record.

A file is a msgpack array of cases: `case`, `max_nmse`, `out` (index), `expected` (float32 bytes), and `tensors`, each
with `type`, `op`, `ne`, `nb`, `params`, `src`, `view_src`, `view_offs` and, for a leaf, `data`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from ggmq.cluster import Client
from protocol import messages as m
from protocol.dtypes import GGMLType, contiguous_nb
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import FormatError, GgmqError
from protocol.graph import Graph, Tensor
from protocol.ops import OP_ID

BUFFER = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One case. `nmse` is None when it was skipped (an op outside the table) or failed, and `note` says why."""

    case: str
    nmse: float | None
    bound: float
    skipped: bool
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.nmse is not None and self.nmse <= self.bound


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The cases of a file. Errors: FormatError when it is not such a file."""
    try:
        raw = path.read_bytes()
        cases = msgpack.unpackb(raw, raw=False, strict_map_key=False)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (OSError, ValueError, msgpack.UnpackException) as e:
        raise FormatError(f"{path}: expected a msgpack array of cases: {e}") from None
    keys = {"case", "max_nmse", "out", "expected", "tensors"}
    if not isinstance(cases, list) or any(not isinstance(c, dict) or not keys <= c.keys() for c in cases):
        raise FormatError(f"{path}: expected an array of cases with the keys {', '.join(sorted(keys))}")
    return cases


def _tensor(t: dict[str, Any], buffer: int, offset: int) -> Tensor:
    src = tuple(t["src"])
    while src and src[-1] == -1:
        src = src[:-1]
    return Tensor(t["type"], t["op"], tuple(t["ne"]), tuple(t["nb"]), tuple(t["params"]), src, t["view_src"],
                  t["view_offs"], buffer, offset)  # fmt: skip


def run_case(client: Client, case: dict[str, Any], device: int = 0) -> Result:
    """Send one case to a device and compare. Errors of the worker become a failed result."""
    name, bound = str(case["case"]), float(case["max_nmse"])
    unknown = sorted({t["op"] for t in case["tensors"] if t["op"] not in OP_ID})
    if unknown:
        return Result(name, None, bound, True, f"not in the op table: {', '.join(unknown)}")
    try:
        got = _compute(client, case, device)
    except GgmqError as e:
        return Result(name, None, bound, False, f"{e.code}: {e}")
    except (KeyError, TypeError, IndexError) as e:
        return Result(name, None, bound, False, f"malformed case: {type(e).__name__}: {e}")
    expected = np.frombuffer(case["expected"], np.float32).astype(np.float64)
    out = case["tensors"][case["out"]]
    if out["op"] == "TOP_K":  # the order, and the choice among equals, are not promised: compare what was picked
        rows = _source_values(case, out["src"][0])
        if rows is not None:
            got, expected = (np.sort(np.take_along_axis(rows, i.astype(np.int64).reshape(len(rows), -1), 1), 1).ravel()
                             for i in (got, expected))  # fmt: skip
    return Result(name, nmse(got, expected), bound, False)


def _source_values(case: dict[str, Any], index: int) -> npt.NDArray[np.float64] | None:
    t = case["tensors"][index]
    if t["op"] != "NONE" or t["type"] != GGMLType.F32:
        return None
    return np.frombuffer(t["data"], np.float32).astype(np.float64).reshape(-1, t["ne"][0])


def _compute(client: Client, case: dict[str, Any], device: int) -> npt.NDArray[np.float64]:
    tensors: list[Tensor] = []
    data = bytearray()
    for t in case["tensors"]:
        leaf = t["op"] == "NONE" and t["view_src"] < 0
        tensors.append(_tensor(t, BUFFER if leaf else 0, len(data) if leaf else 0))
        if leaf:
            data += t["data"]
            data += b"\0" * (-len(data) % 64)
    out = case["out"]
    session = client.session
    # the record holds float32 values whatever the result's type; the device converts, as ggml's own test does
    result = out
    if not tensors[out].contiguous or tensors[out].type != GGMLType.F32:
        ne = tensors[out].ne
        tensors.append(Tensor(GGMLType.F32, "DUP", ne, contiguous_nb(GGMLType.F32, ne), src=(out,)))
        result = len(tensors) - 1
    frame = encode_graph(Graph(tuple(tensors), (), (result,)))
    digest = graph_digest(frame)
    client.request(m.AllocBuffer(session, BUFFER, max(1, len(data))), device=device)
    try:
        # the same calls as for weights, so that a device may repack what a record multiplies by
        for t in tensors:
            if t.buffer:
                n = t.extent_bytes()
                if n:
                    _put(client, t, bytes(data[t.offset : t.offset + n]), device)
        client.request(m.GraphPut(session, digest), [frame], device=device)
        reply = client.request(m.GraphCompute(session, digest, 0), device=device)
    finally:
        client.request(m.FreeBuffer(session, BUFFER), device=device)
    return np.frombuffer(reply.payload[0], np.float32).astype(np.float64)


def _put(client: Client, t: Tensor, data: bytes, device: int) -> None:
    from blake3 import blake3

    header = m.SetTensor(client.session, BUFFER, t.offset, len(data), 0, t.type, t.ne, blake3(data).digest())
    client.request(header, [data], device=device)


def nmse(got: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    """Sum of squared differences over sum of squares. Equal infinities and NaNs agree; unequal ones give infinity."""
    if got.shape != expected.shape:
        return float("inf")
    finite = np.isfinite(expected)
    strange = got[~finite], expected[~finite]
    if not np.array_equal(*strange, equal_nan=True):
        return float("inf")
    diff = got[finite] - expected[finite]
    power = float((expected[finite] ** 2).sum())
    error = float((diff**2).sum())
    return error / power if power else error


def replay(client: Client, path: Path, device: int = 0) -> Iterator[Result]:
    """Every case of a file, in order."""
    for case in read_cases(path):
        yield run_case(client, case, device)
