"""Binds the nodes of a graph to steps of the CPU device's team: addresses, strides, counts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial

import numpy as np

from protocol.dtypes import TYPES, GGMLType, row_bytes
from protocol.graph import Tensor
from protocol.limits import MAX_ROPE_POSITION
from workers.devices.cpu_steps import STEP_COST, StepPlan
from workers.kernels import layout, reference
from workers.kernels.reference import Node, rope_turn
from workers.plan import Step

F32, F16 = GGMLType.F32, GGMLType.F16
SPLIT_QUERIES = 64
"""With fewer queries than this the context is divided over threads too."""
STEP_ROWS = 64
"""A product that is several steps is divided at multiples of this, where groups of rows begin that kernels take together."""


TWO = {name: getattr(layout, name) for name in ("ADD", "SUB", "MUL", "DIV", "SWIGLU", "GEGLU")}
ONE = {name: getattr(layout, name) for name in ("TANH", "SILU", "GELU", "SIGMOID", "STEP", "RELU")}
"""Kinds of elementwise ops with two sources and with one."""


def float_word(x: float) -> int:
    """The bits of a float32 as an argument of a step."""
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


class CPUPlan(StepPlan):
    """Binds what the team has kernels for; other nodes run the reference kernel."""

    def _bind(self, node: Node, following: Node | None) -> tuple[bool, bool]:
        """Add a node's steps. Returns whether it has any, and whether the node behind it is in them too."""
        if node.op.name == "RMS_NORM":
            return self._rms_norm(node, following)
        name = node.op.name
        bind: Callable[[Node], bool] | None = getattr(self, f"_bind_{name.lower()}", None)
        if bind is None and name.endswith("GLU") and name in TWO:
            bind = partial(self._glu, kind=TWO[name])
        elif bind is None and name in TWO:
            bind = partial(self._elementwise, kind=TWO[name], second=1)
        elif bind is None and name in ONE:
            bind = partial(self._elementwise, kind=ONE[name])
        return (bind is not None and 0 not in node.tensor.ne and bind(node)), False

    def _fallback(self, node: Node) -> Step:
        for t in node.src_tensor:
            if t is not None and t.op == "NONE" and t.buffer in self.buffers:
                self.device.unpack(self.buffers[t.buffer], t, self._tick)
        return partial(reference.run, node)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _float_rows(self, i: int, kind: GGMLType = F32) -> tuple[int, int, int, int] | None:
        """Address, bytes from row to row, rows and row length of a float32 (or float16) tensor with evenly spaced rows."""
        t = self.graph.tensors[i]
        if t.type != kind or t.nb[0] != (4 if kind == F32 else 2) or 0 in t.ne:
            return None
        if t.ne[2] == t.ne[3] == 1 or (t.nb[2] == t.nb[1] * t.ne[1] and t.nb[3] == t.nb[2] * t.ne[2]):
            return self._address(i), t.nb[1], t.n_rows, t.ne[0]
        if t.ne[1] == t.ne[3] == 1:
            return self._address(i), t.nb[2], t.n_rows, t.ne[0]
        return None

    def _elementwise(
        self, n: Node, kind: int, second: int = 0, offsets: tuple[int, int] = (0, 0),
        params: tuple[float, float] = (0.0, 0.0),
    ) -> bool:  # fmt: skip
        """y = f(x, z) over rows; z is source `second` with the rows of x, rows that repeat, or an element a row."""
        i, j, k = n.tensor.src[0], n.tensor.src[second], n.index
        x, z, y = self._float_rows(i), self._float_rows(j), self._float_rows(k)
        if x is None or z is None or y is None or x[2] != y[2]:
            return False
        tx, tz = self.graph.tensors[i], self.graph.tensors[j]
        ranges = [self._range(i), self._range(j)], [self._range(k)]
        if tz.ne == (1, *tx.ne[1:]) and kind <= layout.DIV and tx.ne[0] > 1:
            self._add(n, layout.BY_ROW, [kind, x[0], x[1], z[0], z[1], y[0], y[1], y[2], y[3]], *ranges)
            return True
        same = second == 0 or tx.ne == tz.ne
        if not same and (tz.ne[0] != tx.ne[0] or (tz.n_rows != 1 and tz.ne[1:] != (tx.ne[1], 1, 1))):
            return False
        self._add(n, layout.ELEMENTWISE,
                  [kind, x[0] + offsets[0], x[1], z[0] + offsets[1], z[1], z[2], y[0], y[1], y[2], y[3],
                   *map(float_word, params)], *ranges)  # fmt: skip
        return True

    def _glu(self, n: Node, kind: int, params: tuple[float, float] = (0.0, 0.0)) -> bool:
        if len(n.src) > 1 and n.src[1] is not None:
            return self._elementwise(n, kind, 1, params=params)
        half = 4 * n.tensor.ne[0]
        return self._elementwise(n, kind, 0, (half, 0) if n.params["swapped"] else (0, half), params)

    def _bind_swiglu_oai(self, n: Node) -> bool:
        return self._glu(n, layout.SWIGLU_OAI, (n.params["alpha"], n.params["limit"]))

    def _bind_scale(self, n: Node) -> bool:
        return self._elementwise(n, layout.SCALE, params=(n.params["scale"], n.params["bias"]))

    def _bind_clamp(self, n: Node) -> bool:
        return self._elementwise(n, layout.CLAMP, params=(n.params["low"], n.params["high"]))

    def _bind_arange(self, n: Node) -> bool:
        if n.tensor.type != F32 or not n.tensor.contiguous:
            return False
        args = [float_word(n.params["start"]), float_word(n.params["step"]), n.tensor.n_elements, self._address(n.index)]
        self._add(n, layout.ARANGE, args, [], [self._range(n.index)])
        return True

    def _bind_repeat(self, n: Node) -> bool:
        """One row, again and again."""
        i, k = n.tensor.src[0], n.index
        x, y = self._float_rows(i), self._float_rows(k)
        if x is None or y is None or x[2] != 1 or x[3] != y[3]:
            return False
        self._add(n, layout.ELEMENTWISE, [layout.SAME, x[0], 0, x[0], 0, 1, y[0], y[1], y[2], y[3], 0, 0],
                  [self._range(i)], [self._range(k)])  # fmt: skip
        return True

    def _bind_dup(self, n: Node) -> bool:
        """Float rows to float rows of the same length, in the same or the other type."""
        i, k = n.tensor.src[0], n.index
        kinds = GGMLType(self.graph.tensors[i].type), GGMLType(n.tensor.type)
        if kinds not in ((F32, F32), (F32, F16), (F16, F32)):
            return False
        x, y = self._float_rows(i, kinds[0]), self._float_rows(k, kinds[1])
        if x is None or y is None or x[2:] != y[2:]:
            return False
        if kinds == (F32, F32):
            return self._elementwise(n, layout.SAME)
        op = layout.NARROW if kinds[0] == F32 else layout.WIDEN
        self._add(n, op, [x[0], x[1], y[0], y[1], y[2], y[3]], [self._range(i)], [self._range(k)])
        return True

    def _bind_cont(self, n: Node) -> bool:
        return self._bind_dup(n)

    def _rows_alike(self, n: Node, op: int, param: float) -> bool:
        """An op with one parameter that makes of each row another of its length."""
        i, k = n.tensor.src[0], n.index
        x, y = self._float_rows(i), self._float_rows(k)
        if x is None or y is None or x[2:] != y[2:]:
            return False
        args = [x[0], x[1], y[0], y[1], y[2], y[3], float_word(param)]
        self._add(n, op, args, [self._range(i)], [self._range(k)])
        return True

    def _bind_soft_max(self, n: Node) -> bool:
        plain = all(j < 0 for j in n.tensor.src[1:])
        return plain and self._rows_alike(n, layout.SOFT_MAX, n.params["scale"])

    def _bind_norm(self, n: Node) -> bool:
        return self._rows_alike(n, layout.NORM, n.params["eps"])

    def _rows_reduced(self, n: Node, op: int, *more: int) -> bool:
        """An op that makes a few numbers of each row, which lie one row's behind the other's."""
        i, k, x = n.tensor.src[0], n.index, self._float_rows(n.tensor.src[0])
        if x is None or not n.tensor.contiguous:
            return False
        self._add(n, op, [*x, self._address(k), *more], [self._range(i)], [self._range(k)])
        return True

    def _bind_top_k(self, n: Node) -> bool:
        return n.tensor.ne[0] <= layout.MAX_TOP and self._rows_reduced(n, layout.TOP_K, n.tensor.ne[0])

    def _bind_sum_rows(self, n: Node) -> bool:
        return self._rows_reduced(n, layout.SUM_ROWS)

    def _bind_argmax(self, n: Node) -> bool:
        return n.tensor.type == GGMLType.I32 and self._rows_reduced(n, layout.ARGMAX)

    def _bind_get_rows(self, n: Node) -> bool:
        """Rows of packed weights, and of float32."""
        x, ids = n.src_tensor[0], n.src_tensor[1]
        if x is None or ids is None or not n.tensor.contiguous:
            return False
        if self._packed_rows(x):
            return self._get_packed_rows(n, x, ids)
        if x.type != F32 or n.tensor.type != F32 or x.nb[0] != 4 or x.ne[3] != 1 or ids.type != GGMLType.I32:
            return False
        i, j, k = n.tensor.src[0], n.tensor.src[1], n.index
        args = [self._address(i), x.nb[1], x.nb[2], x.ne[1], x.ne[0], self._address(j), ids.nb[0], ids.nb[1],
                self._address(k), ids.ne[0], ids.ne[1], k]  # fmt: skip
        if ids.ne[2] * ids.ne[3] != 1 or x.ne[2] != ids.ne[1]:
            return False
        self._add(n, layout.GET_ROWS, args, [self._range(i), self._range(j)], [self._range(k)])
        return True

    def _bind_add_id(self, n: Node) -> bool:
        i, j, c, k = *n.tensor.src[:3], n.index
        x, z, y, ids = self._float_rows(i), self._float_rows(j), self._float_rows(k), n.src_tensor[2]
        if x is None or z is None or y is None or ids is None or ids.nb[0] != 4 or ids.ne[2] * ids.ne[3] != 1:
            return False
        if x[3] != z[3] or x[2] != ids.ne[0] * ids.ne[1] or x[2:] != y[2:]:
            return False
        args = [x[0], x[1], z[0], z[1], z[2], self._address(c), ids.nb[1], ids.ne[0], y[0], y[1], y[2], y[3], k]
        self._add(n, layout.ADD_ID, args, [self._range(i), self._range(j), self._range(c)], [self._range(k)])
        return True

    def _rms_norm(self, n: Node, following: Node | None) -> tuple[bool, bool]:
        """RMS_NORM, with the MUL by a row of weights behind it when nothing else wants what lies between."""
        i, k = n.tensor.src[0], n.index
        x, y = self._float_rows(i), self._float_rows(k)
        if x is None or y is None or x[2:] != y[2:]:
            return False, False
        weight, reads, last = 0, [self._range(i)], k
        f = following
        if f is not None and f.op.name == "MUL" and f.tensor.src[0] == k and self._used[k] == 1:
            w, out = self._float_rows(f.tensor.src[1]), self._float_rows(f.index)
            (a, b), (c, d) = self._range(i), self._range(f.index)
            apart = a == c or b <= c or d <= a
            if w is not None and out is not None and w[2] == 1 and w[3] == y[3] and apart:
                weight, y, last = w[0], out, f.index
                reads.append(self._range(f.tensor.src[1]))
        self._add(n, layout.RMS_NORM, [x[0], x[1], weight, y[0], y[1], y[2], y[3], float_word(n.params["eps"])], reads,
                  [self._range(last)])  # fmt: skip
        return True, last != k

    # -- positions and the cache ---------------------------------------------------------------------------------------

    def _bind_rope(self, n: Node) -> bool:
        t, x = n.tensor, n.src_tensor[0]
        plain = n.params["mode"] in (0, 2) and n.params["n_offs"] == 0
        if not plain or x is None or t.type != F32 or t.ne[3] != 1 or x.nb[0] != 4 or t.nb[0] != 4:
            return False
        table = self._rope_table(n)
        if table is None:
            return False
        i, k = t.src[0], n.index
        args = [self._address(i), x.nb[1], x.nb[2], self._address(k), t.nb[1], t.nb[2], t.ne[2], t.ne[1], t.ne[0],
                *table, int(n.params["mode"] == 2), n.params["n_dims"]]  # fmt: skip
        n_bytes = 2 * t.ne[2] * n.params["n_dims"]
        self._add(n, layout.ROPE, args, [self._range(i), *((at, at + n_bytes) for at in table)], [self._range(k)])
        return True

    def _rope_table(self, n: Node) -> tuple[int, int] | None:
        """Addresses of cosines and sines [n_tokens][n_dims / 2]; a step makes them, and layers share them."""
        source, factors = n.tensor.src[1], n.tensor.src[2] if len(n.tensor.src) > 2 else -1
        positions = self.graph.tensors[source]
        leaves = all(j < 0 or self.graph.tensors[self.graph.root(j)[0]].op == "NONE" for j in (source, factors))
        if not leaves or positions.type != GGMLType.I32 or positions.ne[0] != positions.n_elements:
            return None
        key = (n.tensor.params, source, factors)
        known = self._tables.get(key)
        if known is None:
            n_tokens, half = n.tensor.ne[2], n.params["n_dims"] // 2
            exponent, turn = np.arange(half, dtype=np.float64), np.zeros(half + 1)
            made = None

            def fill() -> None:
                nonlocal made
                factors = n.opt(2)
                key = b"" if factors is None else factors.tobytes()
                if key != made:
                    with np.errstate(all="ignore"):  # factors that are not there yet are zeros
                        turn[:half], turn[half] = rope_turn(n, factors, exponent)
                    made = key

            fill()
            if factors >= 0:
                self._preludes.append(fill)
            self._turns.append(turn)
            n_bytes = 4 * n_tokens * half
            known = cos, sin = self._more(n_bytes), self._more(n_bytes)
            args = [self._address(source), positions.nb[0], turn.ctypes.data, n_tokens, half, MAX_ROPE_POSITION, cos, sin,
                    n.index]  # fmt: skip
            self._add(n, layout.ROPE_TABLE, args, [self._range(source)], [(cos, cos + n_bytes), (sin, sin + n_bytes)])
            self._tables[key] = known
        return known

    def _bind_set_rows(self, n: Node) -> bool:
        t, x, ids = n.tensor, n.src_tensor[0], n.src_tensor[1]
        if x is None or ids is None or ids.type != GGMLType.I64 or not ids.contiguous:
            return False
        flat = t.ne[2] * t.ne[3] == 1 and ids.ne[1] * ids.ne[2] == 1
        if not flat or t.type != F16 or t.nb[0] != 2 or x.type != F32 or x.nb[0] != 4 or x.ne[2] * x.ne[3] != 1:
            return False
        i, j, k = t.src[0], t.src[1], n.index
        args = [self._address(i), x.nb[1], x.ne[1], x.ne[0], self._address(j), self._address(k), t.nb[1], t.ne[1], k]
        self._add(n, layout.STORE_HALVES, args, [self._range(i), self._range(j)], [self._range(k)])
        return True

    def _bind_flash_attn_ext(self, n: Node) -> bool:
        q, k, v = n.src_tensor[0], n.src_tensor[1], n.src_tensor[2]
        mask = n.src_tensor[3] if len(n.src) > 3 else None
        assert q is not None and k is not None and v is not None  # FLASH_ATTN_EXT has its sources
        halves = k.type == v.type == F16 and k.nb[0] == v.nb[0] == 2 and q.nb[0] == 4 and q.type == F32
        if not halves or n.params["max_bias"] or not n.tensor.contiguous or n.params["scale"] <= 0:
            return False
        if k.ne[3] != q.ne[3] or v.ne[3] != q.ne[3] or k.ne[2] != v.ne[2]:
            return False
        if mask is not None and (mask.nb[0] != 2 or mask.ne[2] != 1 or mask.ne[3] not in (1, q.ne[3])):
            return False
        src = n.tensor.src
        d, d_v, n_tokens, n_head, n_seq, n_kv = q.ne[0], v.ne[0], q.ne[1], q.ne[2], q.ne[3], k.ne[1]
        n_queries = n_tokens * n_head * n_seq
        split = n_tokens * n_seq * k.ne[2] < SPLIT_QUERIES
        parts_bytes = layout.parts_bytes(n_queries, n_kv, d_v) if split else 0
        if split and parts_bytes not in self._parts:
            self._parts[parts_bytes] = self._more(parts_bytes)
        parts = self._parts[parts_bytes] if split else 0
        sinks = src[4] if len(src) > 4 else -1
        args = [
            self._address(src[0]), q.nb[1], q.nb[2], q.nb[3], d, n_tokens, n_head, n_seq,
            self._address(src[1]), k.nb[1], k.nb[2], k.nb[3], self._address(src[2]), v.nb[1], v.nb[2], v.nb[3], d_v,
            k.ne[2], n_kv, self._address(src[3]) if mask is not None else 0, mask.nb[1] if mask is not None else 0,
            mask.nb[3] if mask is not None and mask.ne[3] > 1 else 0, float_word(n.params["scale"]),
            float_word(n.params["logit_softcap"]), self._address(sinks) if sinks >= 0 else 0, self._address(n.index), parts,
        ]  # fmt: skip
        reads, out = [self._range(j) for j in src if j >= 0], [self._range(n.index)]
        self._scratch_bytes = max(self._scratch_bytes, layout.attention_scratch_bytes(d, d_v))
        if split:
            between = [(parts, parts + parts_bytes)]
            self._add(n, layout.ATTEND, args, reads, between)
            self._add(n, layout.MERGE, args, between, out)
        else:
            self._add(n, layout.ATTEND, args, reads, out)
        return True

    # -- products ------------------------------------------------------------------------------------------------------

    def _weights(self, i: int) -> tuple[int, int, int, int] | None:
        """Kind, address, bytes of a row and packed rows a matrix of weights that the products can read."""
        t = self.graph.tensors[i]
        if not t.contiguous:
            return None
        kind = layout.KIND_OF.get(GGMLType(t.type))
        if kind is None:
            wide = self.device.widened(self.buffers.get(t.buffer), t, self._tick)
            return None if wide is None else (layout.KIND_OF[F16], wide[0], 2 * t.ne[0], wide[1])
        buffer = self.buffers.get(t.buffer)
        packed = t.op == "NONE" and buffer is not None and t.offset in buffer.packed
        return kind, self._address(i), row_bytes(t.type, t.ne[0]), t.ne[1] // 16 * 16 if packed else 0

    def _columns(self, n: Node, kind: int, j: int) -> tuple[int, int] | None:
        """Address of the columns of source tensor `j` as the product of `kind` reads them, and bytes of one."""
        t = self.graph.tensors[j]
        if t.type != F32 or not t.contiguous:
            return None
        k = t.ne[0]
        if kind >= layout.N_QUANTIZED:
            return self._address(j), 4 * k
        known = self._quantized.get(j)
        if known is None:
            n_bytes = t.n_rows * (k // 32) * layout.X_BLOCK
            free = next((f for f in self._free if f[1] - f[0] >= n_bytes), None)
            if free is not None:
                self._free.remove(free)
            at = free[0] if free is not None else self._more(n_bytes)
            self._add(n, layout.QUANTIZE, [self._address(j), 4 * k, t.n_rows, k, at], [self._range(j)], [(at, at + n_bytes)])
            known = self._quantized[j] = free or (at, at + n_bytes)
        self._products_of[j] -= 1
        if not self._products_of[j]:  # nobody else multiplies it: its place can be used again
            self._free.append(self._quantized.pop(j))
        return known[0], k // 32 * layout.X_BLOCK

    def _need(self, weight_row_bytes: int, n_columns: int) -> None:
        self._scratch_bytes = max(self._scratch_bytes, layout.product_scratch_bytes(weight_row_bytes, n_columns))

    def _bind_mul_mat(self, n: Node) -> bool:
        a, b = n.src_tensor[0], n.src_tensor[1]
        i, j, k = n.tensor.src[0], n.tensor.src[1], n.index
        if a is None or b is None or not n.tensor.contiguous or n.tensor.type != F32 or a.ne[0] % TYPES[a.type].block:
            return False
        weights = self._weights(i)
        if weights is None or (weights[0] < layout.N_QUANTIZED and a.ne[0] % 32):
            return False
        columns = self._columns(n, weights[0], j)
        if columns is None:
            return False
        kind, w, row, packed = weights
        x, x_bytes = columns
        x_range = (x, x + x_bytes * b.n_rows)
        if a.ne[2] * a.ne[3] == 1:
            self._need(row, b.n_rows)
            size = max(STEP_ROWS, STEP_COST // (a.ne[0] * b.n_rows) // STEP_ROWS * STEP_ROWS)
            for at in range(0, a.ne[1], size):
                rows = min(size, a.ne[1] - at)
                args = [kind, w + at * row, row, rows, max(0, min(rows, packed - at)), a.ne[0], x, x_bytes,
                        self._address(k) + 4 * at, 4 * a.ne[1], b.n_rows]  # fmt: skip
                self._add(n, layout.PRODUCT, args, [x_range, self._range(i)], [self._range(k)])
                if at + size < a.ne[1]:
                    self._flush()
            return True
        self._need(row, b.ne[1])
        r2, r3 = b.ne[2] // a.ne[2], b.ne[3] // a.ne[3]
        for i3 in range(b.ne[3]):
            for i2 in range(b.ne[2]):
                matrix, batch = (i3 // r3) * a.ne[2] + i2 // r2, i3 * b.ne[2] + i2
                at = self._address(k) + 4 * a.ne[1] * b.ne[1] * batch
                args = [kind, w + matrix * a.ne[1] * row, row, a.ne[1], packed, a.ne[0], x + batch * b.ne[1] * x_bytes,
                        x_bytes, at, 4 * a.ne[1], b.ne[1]]  # fmt: skip
                self._add(n, layout.PRODUCT, args, [x_range, self._range(i)], [(at, at + 4 * a.ne[1] * b.ne[1])])
        return True

    def _bind_mul_mat_id(self, n: Node) -> bool:
        a, b, ids = n.src_tensor[0], n.src_tensor[1], n.src_tensor[2]
        i, j, c, k = *n.tensor.src[:3], n.index
        if a is None or b is None or ids is None or not n.tensor.contiguous or n.tensor.type != F32:
            return False
        if ids.nb[0] != 4 or ids.ne[2] * ids.ne[3] != 1 or b.ne[3] != 1 or a.ne[0] % TYPES[a.type].block:
            return False
        weights = self._weights(i)
        if weights is None or (weights[0] < layout.N_QUANTIZED and a.ne[0] % 32):
            return False
        columns = self._columns(n, weights[0], j)
        if columns is None:
            return False
        kind, w, row, packed = weights
        x, x_bytes = columns
        self._need(row, ids.ne[0] * ids.ne[1])
        args = [kind, w, row, a.ne[1], packed, a.ne[0], x, x_bytes, self._address(k), 4 * a.ne[1], a.ne[2], b.ne[1],
                self._address(c), ids.nb[1], ids.ne[0], ids.ne[1], k]  # fmt: skip
        self._add(n, layout.PRODUCT_ID, args, [(x, x + x_bytes * b.n_rows), self._range(i), self._range(c)],
                  [self._range(k)])  # fmt: skip
        return True

    # -- rows of packed weights ----------------------------------------------------------------------------------------

    def _packed_rows(self, t: Tensor) -> bool:
        buffer = self.buffers.get(t.buffer)
        return buffer is not None and t.op == "NONE" and t.offset in buffer.packed and t.ne[2] * t.ne[3] == 1

    def _get_packed_rows(self, n: Node, x: Tensor, ids: Tensor) -> bool:
        i, j, k = n.tensor.src[0], n.tensor.src[1], n.index
        weights = self._weights(i)
        if weights is None or ids.type != GGMLType.I32 or n.tensor.type != F32:
            return False
        if ids.ne[0] != ids.n_elements and not ids.contiguous:
            return False
        kind, w, row, packed = weights
        self._need(row, 0)
        args = [kind, w, row, x.ne[1], packed, x.ne[0], self._address(j), ids.nb[0], ids.n_elements, self._address(k), k]
        self._add(n, layout.UNPACK, args, [self._range(i), self._range(j)], [self._range(k)])
        return True
