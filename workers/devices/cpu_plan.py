"""Binds the nodes of a graph to steps of the CPU device's team: addresses, strides, counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from protocol.dtypes import TYPES, GGMLType, row_bytes
from protocol.graph import Tensor
from protocol.limits import MAX_ROPE_POSITION
from workers.devices.cpu_steps import STEP_COST, StepPlan
from workers.kernels import layout, reference, steps
from workers.kernels.reference import Node, rope_turn
from workers.plan import Step

F32, F16 = GGMLType.F32, GGMLType.F16
SPLIT_QUERIES = 64
"""With fewer queries than this the context is divided over threads too."""
STEP_ROWS = 64
"""A product that is several steps is divided at multiples of this, where groups of rows begin that kernels take together."""


class Rows(NamedTuple):
    """Evenly spaced rows: address of the first, bytes from one to the next, how many, and elements of each."""

    at: int
    row: int
    n_rows: int
    n: int

    def alike(self, other: Rows) -> bool:
        return (self.n_rows, self.n) == (other.n_rows, other.n)


class CPUPlan(StepPlan):
    """Binds what the team has kernels for; other nodes run the reference kernel."""

    def _bind(self, node: Node, following: Node | None) -> tuple[bool, bool]:
        """Add a node's steps. Returns whether it has any, and whether the node behind it is in them too."""
        if node.op.name == "RMS_NORM":
            return self._rms_norm(node, following)
        name = node.op.name
        bind: Callable[[Node], bool] | None = getattr(self, f"_bind_{name.lower()}", None)
        if bind is None and name in steps.FUNCTIONS:
            bind = self._function
        return (bind is not None and 0 not in node.tensor.ne and bind(node)), False

    def _fallback(self, node: Node) -> Step:
        for t in node.src_tensor:
            if t is not None and t.op == "NONE" and t.buffer in self.buffers:
                self.device.unpack(self.buffers[t.buffer], t, self._tick)
        return partial(reference.run, node)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _float_rows(self, i: int, kind: GGMLType = F32) -> Rows | None:
        """A float32 (or float16) tensor whose rows are evenly spaced."""
        t = self.graph.tensors[i]
        if t.type != kind or t.nb[0] != (4 if kind == F32 else 2) or 0 in t.ne:
            return None
        if t.ne[2] == t.ne[3] == 1 or (t.nb[2] == t.nb[1] * t.ne[1] and t.nb[3] == t.nb[2] * t.ne[2]):
            return Rows(self._address(i), t.nb[1], t.n_rows, t.ne[0])
        if t.ne[1] == t.ne[3] == 1:
            return Rows(self._address(i), t.nb[2], t.n_rows, t.ne[0])
        return None

    def _function(self, n: Node) -> bool:
        """An op that is a function of elements; one of the GLU family has both sources in the halves of one, or two."""
        f = steps.FUNCTIONS[n.op.name]
        if "swapped" not in n.params or (len(n.src) > 1 and n.src[1] is not None):
            return self._elementwise(n, n.op.name, f.n_sources - 1)
        half = 4 * n.tensor.ne[0]
        return self._elementwise(n, n.op.name, 0, (half, 0) if n.params["swapped"] else (0, half))

    def _elementwise(self, n: Node, name: str, second: int = 0, offsets: tuple[int, int] = (0, 0)) -> bool:
        """y = f(x, z) over rows; z is source `second` with the rows of x, rows that repeat, or an element a row."""
        i, j, k = n.tensor.src[0], n.tensor.src[second], n.index
        x, z, y = self._float_rows(i), self._float_rows(j), self._float_rows(k)
        if x is None or z is None or y is None or x.n_rows != y.n_rows:
            return False
        tx, tz = self.graph.tensors[i], self.graph.tensors[j]
        ranges = [self._range(i), self._range(j)], [self._range(k)]
        kind = steps.FUNCTION_CODE[name]
        if tz.ne == (1, *tx.ne[1:]) and name in steps.BY_ROW and tx.ne[0] > 1:
            self._add(n, steps.ByRow(kind=kind, x=x.at, x_row=x.row, z=z.at, z_step=z.row, y=y.at, y_row=y.row,
                                     n_rows=y.n_rows, n=y.n), *ranges)  # fmt: skip
            return True
        same = second == 0 or tx.ne == tz.ne
        if not same and (tz.ne[0] != tx.ne[0] or (tz.n_rows != 1 and tz.ne[1:] != (tx.ne[1], 1, 1))):
            return False
        params = {f"p{at}": n.params[param] for at, param in enumerate(steps.FUNCTIONS[name].params)}
        self._add(n, steps.Elementwise(kind=kind, x=x.at + offsets[0], x_row=x.row, z=z.at + offsets[1], z_row=z.row,
                                       z_rows=z.n_rows, y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n, **params),
                  *ranges)  # fmt: skip
        return True

    def _bind_arange(self, n: Node) -> bool:
        if n.tensor.type != F32 or not n.tensor.contiguous:
            return False
        self._add(n, steps.Arange(start=n.params["start"], step=n.params["step"], n=n.tensor.n_elements,
                                  y=self._address(n.index)), [], [self._range(n.index)])  # fmt: skip
        return True

    def _bind_repeat(self, n: Node) -> bool:
        """One row, again and again."""
        i, k = n.tensor.src[0], n.index
        x, y = self._float_rows(i), self._float_rows(k)
        if x is None or y is None or x.n_rows != 1 or x.n != y.n:
            return False
        self._add(n, steps.Elementwise(kind=steps.FUNCTION_CODE["SAME"], x=x.at, x_row=0, z=x.at, z_row=0, z_rows=1,
                                       y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n),
                  [self._range(i)], [self._range(k)])  # fmt: skip
        return True

    def _bind_dup(self, n: Node) -> bool:
        """Float rows to float rows of the same length, in the same or the other type."""
        i, k = n.tensor.src[0], n.index
        kinds = GGMLType(self.graph.tensors[i].type), GGMLType(n.tensor.type)
        if kinds not in ((F32, F32), (F32, F16), (F16, F32)):
            return False
        x, y = self._float_rows(i, kinds[0]), self._float_rows(k, kinds[1])
        if x is None or y is None or not x.alike(y):
            return False
        if kinds == (F32, F32):
            return self._elementwise(n, "SAME")
        convert = steps.Narrow if kinds[0] == F32 else steps.Widen
        self._add(n, convert(x=x.at, x_row=x.row, y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n),
                  [self._range(i)], [self._range(k)])  # fmt: skip
        return True

    def _bind_cont(self, n: Node) -> bool:
        return self._bind_dup(n)

    def _rows_alike(self, n: Node) -> tuple[Rows, Rows] | None:
        """Source and result of an op that makes of each row another of its length."""
        x, y = self._float_rows(n.tensor.src[0]), self._float_rows(n.index)
        return None if x is None or y is None or not x.alike(y) else (x, y)

    def _bind_soft_max(self, n: Node) -> bool:
        rows = self._rows_alike(n)
        if rows is None or any(j >= 0 for j in n.tensor.src[1:]):
            return False
        x, y = rows
        self._add(n, steps.SoftMax(x=x.at, x_row=x.row, y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n,
                                   scale=n.params["scale"]),
                  [self._range(n.tensor.src[0])], [self._range(n.index)])  # fmt: skip
        return True

    def _bind_norm(self, n: Node) -> bool:
        rows = self._rows_alike(n)
        if rows is None:
            return False
        x, y = rows
        self._add(n, steps.Norm(x=x.at, x_row=x.row, y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n, eps=n.params["eps"]),
                  [self._range(n.tensor.src[0])], [self._range(n.index)])  # fmt: skip
        return True

    def _reduced(self, n: Node, make: type[steps.RowToFew], **more: int) -> bool:
        """An op that makes a few numbers of each row, which lie one row's behind the other's."""
        i, k, x = n.tensor.src[0], n.index, self._float_rows(n.tensor.src[0])
        if x is None or not n.tensor.contiguous:
            return False
        self._add(n, make(x=x.at, x_row=x.row, n_rows=x.n_rows, n=x.n, y=self._address(k), **more),
                  [self._range(i)], [self._range(k)])  # fmt: skip
        return True

    def _bind_top_k(self, n: Node) -> bool:
        return n.tensor.ne[0] <= layout.MAX_TOP and self._reduced(n, steps.TopK, n_top=n.tensor.ne[0])

    def _bind_sum_rows(self, n: Node) -> bool:
        return self._reduced(n, steps.SumRows)

    def _bind_argmax(self, n: Node) -> bool:
        return n.tensor.type == GGMLType.I32 and self._reduced(n, steps.Argmax)

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
        if ids.ne[2] * ids.ne[3] != 1 or x.ne[2] != ids.ne[1]:
            return False
        self._add(n, steps.GetRows(x=self._address(i), x_row=x.nb[1], x_plane=x.nb[2], n_x=x.ne[1], n=x.ne[0],
                                   ids=self._address(j), id_step=ids.nb[0], id_row=ids.nb[1], y=self._address(k),
                                   n_ids=ids.ne[0], n_planes=ids.ne[1], node=k),
                  [self._range(i), self._range(j)], [self._range(k)])  # fmt: skip
        return True

    def _bind_add_id(self, n: Node) -> bool:
        i, j, c, k = *n.tensor.src[:3], n.index
        x, z, y, ids = self._float_rows(i), self._float_rows(j), self._float_rows(k), n.src_tensor[2]
        if x is None or z is None or y is None or ids is None or ids.nb[0] != 4 or ids.ne[2] * ids.ne[3] != 1:
            return False
        if x.n != z.n or x.n_rows != ids.ne[0] * ids.ne[1] or not x.alike(y):
            return False
        self._add(n, steps.AddId(x=x.at, x_row=x.row, z=z.at, z_row=z.row, n_z=z.n_rows, ids=self._address(c),
                                 ids_row=ids.nb[1], n_used=ids.ne[0], y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n, node=k),
                  [self._range(i), self._range(j), self._range(c)], [self._range(k)])  # fmt: skip
        return True

    def _rms_norm(self, n: Node, following: Node | None) -> tuple[bool, bool]:
        """RMS_NORM, with the MUL by a row of weights behind it when nothing else wants what lies between."""
        i, k, rows = n.tensor.src[0], n.index, self._rows_alike(n)
        if rows is None:
            return False, False
        x, y = rows
        weight, reads, last = 0, [self._range(i)], k
        f = following
        if f is not None and f.op.name == "MUL" and f.tensor.src[0] == k and self._used[k] == 1:
            w, out = self._float_rows(f.tensor.src[1]), self._float_rows(f.index)
            (a, b), (c, d) = self._range(i), self._range(f.index)
            apart = a == c or b <= c or d <= a
            if w is not None and out is not None and w.n_rows == 1 and w.n == y.n and apart:
                weight, y, last = w.at, out, f.index
                reads.append(self._range(f.tensor.src[1]))
        self._add(n, steps.RmsNorm(x=x.at, x_row=x.row, w=weight, y=y.at, y_row=y.row, n_rows=y.n_rows, n=y.n,
                                   eps=n.params["eps"]), reads, [self._range(last)])  # fmt: skip
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
        n_bytes = 2 * t.ne[2] * n.params["n_dims"]
        self._add(n, steps.Rope(x=self._address(i), x_head=x.nb[1], x_row=x.nb[2], y=self._address(k), y_head=t.nb[1],
                                y_row=t.nb[2], n_tokens=t.ne[2], n_head=t.ne[1], d=t.ne[0], cos=table[0], sin=table[1],
                                neox=n.params["mode"] == 2, n_dims=n.params["n_dims"]),
                  [self._range(i), *((at, at + n_bytes) for at in table)], [self._range(k)])  # fmt: skip
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
            self._add(n, steps.RopeTable(positions=self._address(source), step=positions.nb[0], turn=turn.ctypes.data,
                                         n_tokens=n_tokens, half=half, bound=MAX_ROPE_POSITION, cos=cos, sin=sin,
                                         node=n.index),
                      [self._range(source)], [(cos, cos + n_bytes), (sin, sin + n_bytes)])  # fmt: skip
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
        self._add(n, steps.StoreHalves(x=self._address(i), x_row=x.nb[1], n_rows=x.ne[1], n=x.ne[0], ids=self._address(j),
                                       y=self._address(k), y_row=t.nb[1], n_y=t.ne[1], node=k),
                  [self._range(i), self._range(j)], [self._range(k)])  # fmt: skip
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
        sinks_at, y = self._address(sinks) if sinks >= 0 else 0, self._address(n.index)
        attend = steps.Attend(
            q=self._address(src[0]), q_row=q.nb[1], q_head=q.nb[2], q_seq=q.nb[3], d=d, n_tokens=n_tokens, n_head=n_head,
            n_seq=n_seq, k=self._address(src[1]), k_row=k.nb[1], k_head=k.nb[2], k_seq=k.nb[3], v=self._address(src[2]),
            v_row=v.nb[1], v_head=v.nb[2], v_seq=v.nb[3], d_v=d_v, n_head_kv=k.ne[2], n_kv=n_kv,
            mask=self._address(src[3]) if mask is not None else 0, mask_row=mask.nb[1] if mask is not None else 0,
            mask_seq=mask.nb[3] if mask is not None and mask.ne[3] > 1 else 0, scale=n.params["scale"],
            softcap=n.params["logit_softcap"], sinks=sinks_at, y=y, parts=parts,
        )  # fmt: skip
        reads, out = [self._range(j) for j in src if j >= 0], [self._range(n.index)]
        self._scratch_bytes = max(self._scratch_bytes, layout.attention_scratch_bytes(d, d_v))
        if not split:
            self._add(n, attend, reads, out)
            return True
        between = [(parts, parts + parts_bytes)]
        self._add(n, attend, reads, between)
        merge = steps.MergeParts(d_v=d_v, n_tokens=n_tokens, n_head=n_head, n_seq=n_seq, n_kv=n_kv, sinks=sinks_at, y=y,
                                 parts=parts)  # fmt: skip
        self._add(n, merge, between, out)
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
        return kind, self._address(i), row_bytes(t.type, t.ne[0]), t.ne[1] // layout.GROUP * layout.GROUP if packed else 0

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
            self._add(n, steps.Quantize(x=self._address(j), x_row=4 * k, n=t.n_rows, k=k, y=at), [self._range(j)],
                      [(at, at + n_bytes)])  # fmt: skip
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
                product = steps.MulMat(kind=kind, w=w + at * row, row_bytes=row, n_rows=rows,
                                       n_packed=max(0, min(rows, packed - at)), k=a.ne[0], x=x, x_bytes=x_bytes,
                                       y=self._address(k) + 4 * at, y_bytes=4 * a.ne[1], n=b.n_rows)  # fmt: skip
                self._add(n, product, [x_range, self._range(i)], [self._range(k)])
                if at + size < a.ne[1]:
                    self._flush()
            return True
        self._need(row, b.ne[1])
        r2, r3 = b.ne[2] // a.ne[2], b.ne[3] // a.ne[3]
        for i3 in range(b.ne[3]):
            for i2 in range(b.ne[2]):
                matrix, batch = (i3 // r3) * a.ne[2] + i2 // r2, i3 * b.ne[2] + i2
                at = self._address(k) + 4 * a.ne[1] * b.ne[1] * batch
                product = steps.MulMat(kind=kind, w=w + matrix * a.ne[1] * row, row_bytes=row, n_rows=a.ne[1],
                                       n_packed=packed, k=a.ne[0], x=x + batch * b.ne[1] * x_bytes, x_bytes=x_bytes,
                                       y=at, y_bytes=4 * a.ne[1], n=b.ne[1])  # fmt: skip
                self._add(n, product, [x_range, self._range(i)], [(at, at + 4 * a.ne[1] * b.ne[1])])
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
        product = steps.MulMatId(kind=kind, w=w, row_bytes=row, n_rows=a.ne[1], n_packed=packed, k=a.ne[0], x=x,
                                 x_bytes=x_bytes, y=self._address(k), y_bytes=4 * a.ne[1], n_experts=a.ne[2],
                                 n_slots=b.ne[1], ids=self._address(c), ids_row=ids.nb[1], n_used=ids.ne[0],
                                 n_tokens=ids.ne[1], node=k)  # fmt: skip
        self._add(n, product, [(x, x + x_bytes * b.n_rows), self._range(i), self._range(c)], [self._range(k)])
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
        self._add(n, steps.GetPackedRows(kind=kind, w=w, row_bytes=row, n_rows=x.ne[1], n_packed=packed, n=x.ne[0],
                                         ids=self._address(j), id_step=ids.nb[0], n_ids=ids.n_elements,
                                         y=self._address(k), node=k),
                  [self._range(i), self._range(j)], [self._range(k)])  # fmt: skip
        return True
