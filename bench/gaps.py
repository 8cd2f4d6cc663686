"""`python -m bench.gaps`: for how long a device computes without looking at its worker's sockets, on large nodes.

A worker answers PINGs where its device ticks, so for the longest time between two ticks it seems to hang. One node a graph,
of the sizes that large models have; `--small` divides them for a shorter look.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from protocol.dtypes import GGMLType, contiguous_nb, tensor_bytes
from protocol.graph import Graph, Shape, Tensor, f32_bits
from protocol.ops import UNARY_KINDS
from workers.devices import open_device
from workers.devices.base import Device
from workers.ticks import pieces

T = GGMLType
MANY = 1 << 24
"""Elements of a result that is left where it is."""


class Clocked:
    """A tick that notes the longest time between two calls, beginning when it is made."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.n = 0
        self._last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        self.longest_s, self._last = max(self.longest_s, now - self._last), now
        self.n += 1


@dataclass(frozen=True)
class Case:
    """A node and its sources by type and shape. `n_weights`: how many of these the device may pack; `values`: of inputs."""

    name: str
    op: str
    ne: Shape
    sources: tuple[tuple[GGMLType, Shape], ...]
    n_weights: int = 0
    params: tuple[int, ...] = ()
    values: dict[int, np.ndarray[Any, Any]] | None = None
    type: GGMLType = T.F32


def _params(*words: int) -> tuple[int, ...]:
    return (*words, *(0,) * (16 - len(words)))


def product(name: str, type_id: GGMLType, k: int, rows: int, columns: int) -> Case:
    return Case(name, "MUL_MAT", (rows, columns, 1, 1), ((type_id, (k, rows, 1, 1)), (T.F32, (k, columns, 1, 1))), 1)


def paged(name: str, n_tokens: int, n_kv: int, n_head: int, n_head_kv: int, d: int, d_v: int) -> Case:
    n_pages = n_kv // 64
    return Case(
        name, "PAGED_ATTN", (d_v, n_head, n_tokens, 1),
        ((T.F32, (d, n_tokens, n_head, 1)), (T.F16, (d, n_kv, n_head_kv, 1)), (T.F16, (d_v, n_kv, n_head_kv, 1)),
         (T.I32, (n_pages, 1, 1, 1)), (T.I32, (n_tokens, 1, 1, 1))),
        0, _params(f32_bits(d**-0.5)),
        {3: np.arange(n_pages, dtype=np.int32), 4: np.full(n_tokens, n_kv, np.int32)},
    )  # fmt: skip


def cases(small: int) -> list[Case]:
    """Nodes that take long. `small`: by which columns and cells are divided."""
    t, kv = 512 // small, 32768 // small
    experts = 128
    ids = np.random.default_rng(1).integers(0, experts, (t, 8)).astype(np.int32)
    return [
        product("Q4_K 14336 x 4096, 512 columns", T.Q4_K, 4096, 14336, t),
        product("Q4_K 152064 x 4096, 512 columns", T.Q4_K, 4096, 152064 // small, t),
        product("Q4_K 152064 x 4096, 1 column", T.Q4_K, 4096, 152064 // small, 1),
        product("F16 152064 x 4096, 1 column", T.F16, 4096, 152064 // small, 1),
        product("F16 14336 x 4096, 512 columns", T.F16, 4096, 14336, t),
        product("F32 14336 x 4096, 512 columns", T.F32, 4096, 14336 // small, t),
        Case("F16 16 matrices 4096 x 128, 512 columns", "MUL_MAT", (4096, t, 16, 1),
             ((T.F16, (128, 4096, 16, 1)), (T.F32, (128, t, 16, 1))), 1),
        Case("Q4_K 8 of 128 experts 1536 x 2048, 512 tokens", "MUL_MAT_ID", (1536, 8, t, 1),
             ((T.Q4_K, (2048, 1536, experts, 1)), (T.F32, (2048, 1, t, 1)), (T.I32, (8, t, 1, 1))), 1, values={2: ids}),
        paged("attention, 512 tokens of 32768, 32/8 heads of 128", t, kv, 32, 8, 128, 128),
        paged("attention, 1 token of 131072, 32/8 heads of 128", 1, 4 * kv, 32, 8, 128, 128),
        paged("latent attention, 32 tokens of 32768, 64/1 heads of 576", 32, kv, 64, 1, 576, 512),
        Case("SSM_SCAN, 512 tokens, 80 heads of 64, 128 states", "SSM_SCAN", (80 * 64 * (t + 128), 1, 1, 1),
             ((T.F32, (128, 64, 80, 1)), (T.F32, (64, 80, t, 1)), (T.F32, (80, t, 1, 1)), (T.F32, (1, 80, 1, 1)),
              (T.F32, (128, 1, t, 1)), (T.F32, (128, 1, t, 1)), (T.I32, (1, 1, 1, 1)))),
        Case("SOFT_MAX, 512 rows of 152064", "SOFT_MAX", (152064, t, 1, 1), ((T.F32, (152064, t, 1, 1)),),
             params=_params(f32_bits(1.0))),
        Case("GELU, 512 rows of 152064", "GELU", (152064, t, 1, 1), ((T.F32, (152064, t, 1, 1)),)),
        Case("ARGSORT, 512 rows of 152064", "ARGSORT", (152064, t, 1, 1), ((T.F32, (152064, t, 1, 1)),), type=T.I32),
        Case("GET_ROWS of Q4_K, 512 of 4096", "GET_ROWS", (4096, t, 1, 1),
             ((T.Q4_K, (4096, 8192, 1, 1)), (T.I32, (t, 1, 1, 1))), 1),
    ]  # fmt: skip


class Zeros:
    """The bytes of a weight."""

    good = False

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def pieces(self, size: int, tick: Callable[[], None]) -> Iterator[memoryview]:
        for _, n in pieces(self.n_bytes, size):
            yield memoryview(bytes(n))
        self.good = True


def graph_of(case: Case) -> tuple[Graph, dict[int, int]]:
    """A case as a graph, and the bytes of each buffer that it names. Its inputs are `case.values`."""
    values = case.values or {}
    tensors = [Tensor(type_id, "NONE", ne, contiguous_nb(type_id, ne), buffer=0 if i in values else i + 1)
               for i, (type_id, ne) in enumerate(case.sources)]  # fmt: skip
    kinds = [str(kind) for kind in UNARY_KINDS]
    op, params = ("UNARY", _params(kinds.index(case.op))) if case.op in kinds else (case.op, case.params or _params())
    out = Tensor(case.type, op, case.ne, contiguous_nb(case.type, case.ne), params, tuple(range(len(tensors))))
    sizes = {t.buffer: tensor_bytes(t.type, t.ne) for t in tensors if t.buffer}
    return Graph((*tensors, out), tuple(values), (len(tensors),) if out.n_elements < MANY else ()), sizes


def measure(device: Device[Any], case: Case) -> tuple[float, float, int]:
    """Seconds of the whole node, of the longest time between two ticks, and how many ticks there were."""
    graph, sizes = graph_of(case)
    buffers = {n: device.alloc(size) for n, size in sizes.items()}
    for n, size in sizes.items():
        if n <= case.n_weights:
            t = graph.tensors[n - 1]
            device.fill(buffers[n], 0, size, t.type, t.ne, Zeros(size))
        else:
            for at, m in pieces(size):
                device.write(buffers[n], at, bytes(m))
    data = [values.tobytes() for values in (case.values or {}).values()]
    try:
        plan = device.compile(graph, buffers)
        tick = Clocked()
        start = time.monotonic()
        plan.run(data, tick)
        tick()
        return time.monotonic() - start, tick.longest_s, tick.n
    finally:
        for b in buffers.values():
            device.free(b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-d", "--device", default="CPU")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--small", type=int, default=1, help="divide columns and cells by this")
    parser.add_argument("--only", default="", help="nodes whose names hold this")
    args = parser.parse_args()
    device = open_device(args.device, args.threads)
    device.prepare()
    print("| node | whole, ms | longest, ms | ticks |\n|---|---|---|---|")
    for case in cases(args.small):
        if args.only in case.name:
            whole, longest, n = measure(device, case)
            print(f"| {case.name} | {1e3 * whole:.0f} | {1e3 * longest:.0f} | {n} |", flush=True)


if __name__ == "__main__":
    main()
