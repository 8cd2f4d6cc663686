"""The CPU device: Numba kernels over repacked weights; ops without one of their own run the reference kernel.

Threads: products and attention use up to `n_threads`; all else runs on the caller's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from protocol.dtypes import TYPES, GGMLType, row_bytes
from protocol.graph import Graph, Tensor
from workers.devices.base import Buffer, HostDevice, cpu_model
from workers.kernels.reference import Node, rope_angles
from workers.plan import HostPlan
from workers.tensors import Array, Bytes, load

_KERNEL_VERSION = 1


def _kernel_cache() -> Path:
    """Folder for compiled kernels of this CPU and these versions; made known to Numba before it is imported."""
    import numba

    base = os.environ.get("LLAMA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    root = (Path(base) if base else Path.home() / ".cache") / "ggmq-kernels"
    folder = Path(__file__).resolve().parent.parent / "kernels"
    source = "".join(f"{p.name}{p.stat().st_mtime_ns}" for p in sorted(folder.glob("*.py")))
    versions = f"{_KERNEL_VERSION} {numba.__version__} {np.__version__} {sys.version}"
    text = f"{cpu_model()} {platform.machine()} {versions} {source}"
    return root / blake2b(text.encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def _first_compiler(folder: Path) -> Iterator[bool]:
    """True for the process that compiles; others wait for it, then load what it made."""
    ready = folder / "ready"
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not ready.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
        first = not ready.exists()
        yield first
        if first:
            ready.touch()
    finally:
        os.close(lock)


class CPUDevice(HostDevice):
    name = "CPU"
    kind = "cpu"

    def __init__(self, n_threads: int, memory_bytes: int = 0) -> None:
        super().__init__(memory_bytes)
        self._n_threads = n_threads
        import numba

        folder = _kernel_cache()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # nowhere to keep them: compile for this process alone
            self._own_folder = tempfile.TemporaryDirectory(prefix="ggmq-kernels-")
            folder = Path(self._own_folder.name)
        numba.config.CACHE_DIR = str(folder)
        numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))
        from workers.kernels import cpu_ops, cpu_products, simd, simd_rows

        self.ops, self.products, self.simd, self.rows = cpu_ops, cpu_products, simd, simd_rows
        self.expanded: dict[tuple[int, int], Array] = {}
        with _first_compiler(folder) as first:
            if first:
                print("worker: compiling kernels for this CPU; this happens once and takes up to a minute",
                      file=sys.stderr, flush=True)  # fmt: skip
            self._warm_up()

    def n_threads(self) -> int:
        return self._n_threads

    def _warm_up(self) -> None:
        """Call every kernel once with each array layout it may see, so that compiling never falls into a token."""
        n = self._n_threads
        o, p, s = self.ops, self.products, self.simd
        f = np.zeros((4, 32), np.float32)
        strided = np.zeros((4, 64), np.float32)[:, :32]
        one = np.float32(1)
        o.add_rows(f, f, f)
        o.mul_rows(f, f, f)
        ids, halves = np.zeros(4, np.int64), np.zeros((4, 32), np.uint16)
        cos = np.zeros((4, 16), np.float32)
        for x in (f, strided):
            o.scale_rows(x, f, one, one)
            o.rms_norm_rows(x, f, 1.0)
            o.swiglu_rows(x, f, f)
            o.swiglu_rows(x, strided, f)
            o.geglu_rows(x, f, f)
            o.geglu_rows(x, strided, f)
            o.store_halves(x, ids, halves)
        for heads in (f.reshape(4, 1, 32), np.zeros((4, 2, 32), np.float32)[:, :1]):
            o.rope_rows(heads, f.reshape(4, 1, 32), cos, cos, True, 32)
        q, k, y = f.ctypes.data, halves.ctypes.data, np.zeros((4, 8), np.float32)
        o.flash_attn(q, 128, 128, 32, 1, 1, k, 64, 64, k, 64, 64, 8, 1, 1, 0, 0, one, one, 0, y.ctypes.data, n)
        w = np.zeros(8 * 34, np.uint8)
        xq, xd, xs16 = np.zeros((4, 32), np.int8), np.zeros((4, 1), np.float32), np.zeros((4, 2), np.int32)
        p.floats_product(0, np.zeros(256, np.float32), _NO_HALVES, 32, f, y, n)
        if s.HAVE_AVX2:
            packed = np.zeros(s.BLOCK_BYTES, np.uint8)
            flat = np.zeros(128, np.int8), np.zeros(4, np.float32), np.zeros(4, np.float32)
            s.quantize_columns(f, *flat, 1, 1, 0, 4)
            s.quantize_columns_parallel(f, *flat, 1, 1, 4, n)
            at = [a.ctypes.data for a in (packed, *flat)]
            for product in (s.q4_0x8_parallel, s.q4_0x8_serial):
                product(*at, 1, y.ctypes.data, 32, 1, 1, 0, n)
            sums = np.zeros((4, 1), np.float32)
            self.rows.quantize_rows(f, xq, xd, sums, 0, 4)
            self.rows.quantize_rows_parallel(f, xq, xd, sums, n)
            at = [a.ctypes.data for a in (xq, xd, sums)]
            self.rows.rows_product(int(GGMLType.Q8_0), w.ctypes.data, 34, *at, 32, y.ctypes.data, 8, 4, n)
        else:
            p.quantize_plain(f, xq, xd, xs16)
            p.blocks_product(int(GGMLType.Q8_0), w, 34, 32, 34, xq, xd, xs16, y, n)
        self._n_compiled = self._count_compiled()

    def _count_compiled(self) -> int:
        modules = (self.ops, self.products, self.simd, self.rows)
        return sum(len(f.signatures) for mod in modules for f in vars(mod).values() if hasattr(f, "signatures"))

    @property
    def kernel_compiles(self) -> int:  # type: ignore[override]
        """Kernels compiled since the warm-up; a token that waits for a compiler is a bug."""
        return self._count_compiled() - self._n_compiled

    # -- weights in a layout of our own --------------------------------------------------------------------------------

    def finish(self, buffer: Buffer, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int]) -> None:
        self._raw(buffer, offset, n_bytes)
        self._forget(buffer)
        rows = ne[1] * ne[2] * ne[3]
        if type_id == GGMLType.Q4_0 and ne[1] % self.simd.GROUP == 0 and self.simd.HAVE_AVX2:
            self.simd.pack_q4_0x8(buffer.memory[offset : offset + n_bytes], rows, ne[0] // 32)
            buffer.packed[offset] = (GGMLType(type_id), ne, n_bytes)

    def _forget(self, buffer: Buffer) -> None:
        for key in [k for k in self.expanded if k[0] == id(buffer)]:
            del self.expanded[key]

    def _raw(self, buffer: Buffer, offset: int, n_bytes: int) -> None:
        """Bring every packed tensor that these bytes touch back to GGUF's layout."""
        touched = [(at, p) for at, p in buffer.packed.items() if at < offset + n_bytes and offset < at + p[2]]
        for at, (_, ne, size) in touched:
            part = buffer.memory[at : at + size]
            part[:] = self.simd.unpack_q4_0x8(part, ne[1] * ne[2] * ne[3], ne[0] // 32)
            del buffer.packed[at]

    def write(self, buffer: Buffer, offset: int, data: bytes | memoryview) -> None:
        buffer.check(offset, len(data), "write")
        self._raw(buffer, offset, len(data))
        self._forget(buffer)
        super().write(buffer, offset, data)

    def read(self, buffer: Buffer, offset: int, n_bytes: int) -> bytes:
        buffer.check(offset, n_bytes, "read")
        out = buffer.memory[offset : offset + n_bytes].copy()
        for at, (_, ne, size) in buffer.packed.items():
            low, high = max(at, offset), min(at + size, offset + n_bytes)
            if low < high:
                rows = self.simd.unpack_q4_0x8(buffer.memory[at : at + size], ne[1] * ne[2] * ne[3], ne[0] // 32)
                out[low - offset : high - offset] = rows[low - at : high - at]
        return out.tobytes()

    def copy(self, src: Buffer, src_offset: int, dst: Buffer, dst_offset: int, n_bytes: int) -> None:
        src.check(src_offset, n_bytes, "copy from")
        dst.check(dst_offset, n_bytes, "copy to")
        self.write(dst, dst_offset, self.read(src, src_offset, n_bytes))

    def free(self, buffer: Buffer) -> None:
        self._forget(buffer)
        super().free(buffer)

    # -- plans ---------------------------------------------------------------------------------------------------------

    def compile(self, graph: Graph, buffers: dict[int, Buffer]) -> HostPlan:
        for i, t in enumerate(graph.tensors):
            root, start = graph.root(i)
            r = graph.tensors[root]
            buffer = buffers.get(r.buffer)
            if buffer is not None and buffer.packed and not self._packed_use(graph, i, buffer):
                buffer.check(r.offset + start, t.extent_bytes(), f"tensor {i}")
                self._raw(buffer, r.offset + start, t.extent_bytes())
        return CPUPlan(self, graph, buffers)

    def _packed_use(self, graph: Graph, i: int, buffer: Buffer) -> bool:
        """Whether leaf `i` is just a packed tensor, used only by ops that read the packed layout."""
        t = graph.tensors[i]
        packed = buffer.packed.get(t.offset)
        if t.op != "NONE" or packed is None or (packed[0], packed[1]) != (t.type, t.ne):
            return False
        for u in graph.tensors:
            if u.view_src == i or (i in u.src and (u.op not in ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS") or u.src[0] != i)):
                return False
            if i in u.src and u.op in ("MUL_MAT", "MUL_MAT_ID") and not _fast_columns(graph, u):
                return False
            if i in u.src and u.op == "GET_ROWS" and t.ne[2] * t.ne[3] != 1:
                return False
        return True


def _fast_columns(graph: Graph, u: Tensor) -> bool:
    """Whether the columns of a product are float32 rows that lie one after the other."""
    b = graph.tensors[u.src[1]]
    return b.type == GGMLType.F32 and b.contiguous and u.contiguous


class CPUPlan(HostPlan):
    """A plan whose nodes run Numba kernels where there are any."""

    def __init__(self, device: CPUDevice, graph: Graph, buffers: dict[int, Buffer]) -> None:
        self.device = device
        self._quantized: dict[tuple[int, int, bool], tuple[Array, ...]] = {}
        self._fresh: tuple[int, bool] | None = None
        super().__init__(device, graph, buffers, self._bind)

    def _bind(self, node: Node) -> Callable[[], None] | None:
        bind = getattr(self, f"_bind_{node.op.name.lower()}", None)
        return bind(node) if bind is not None else None

    # -- elementwise and rows ------------------------------------------------------------------------------------------

    @staticmethod
    def _rows(n: Node, i: int) -> Array | None:
        """Source `i` as float32 rows, if it is that."""
        t, a = n.src_tensor[i], n.src[i]
        if t is None or a is None or t.type != GGMLType.F32 or t.nb[0] != 4:
            return None
        if t.contiguous:
            return a.reshape(-1, t.ne[0])
        return a[0, 0] if t.ne[2] == t.ne[3] == 1 else None

    def _out(self, n: Node) -> Array | None:
        t = n.tensor
        return n.dst.reshape(-1, t.ne[0]) if t.type == GGMLType.F32 and t.contiguous else None

    def _binary(self, n: Node, kernel: Callable[..., None]) -> Callable[[], None] | None:
        a, b, y = self._rows(n, 0), self._rows(n, 1), self._out(n)
        ta, tb = n.src_tensor[0], n.src_tensor[1]
        if a is None or b is None or y is None or ta is None or tb is None or not ta.contiguous or not tb.contiguous:
            return None
        one_row = tb.ne == (ta.ne[0], 1, 1, 1)
        if ta.ne != tb.ne and not one_row:
            return None
        return lambda: kernel(a, b, y)

    def _bind_add(self, n: Node) -> Callable[[], None] | None:
        return self._binary(n, self.device.ops.add_rows)

    def _bind_mul(self, n: Node) -> Callable[[], None] | None:
        return self._binary(n, self.device.ops.mul_rows)

    def _bind_scale(self, n: Node) -> Callable[[], None] | None:
        x, y = self._rows(n, 0), self._out(n)
        if x is None or y is None or x.shape != y.shape:
            return None
        scale, bias = np.float32(n.params["scale"]), np.float32(n.params["bias"])
        return lambda: self.device.ops.scale_rows(x, y, scale, bias)

    def _bind_rms_norm(self, n: Node) -> Callable[[], None] | None:
        x, y, eps = self._rows(n, 0), self._out(n), float(n.params["eps"])
        if x is None or y is None or x.shape != y.shape:
            return None
        return lambda: self.device.ops.rms_norm_rows(x, y, eps)

    def _glu(self, n: Node, kernel: Callable[..., None]) -> Callable[[], None] | None:
        x, y = self._rows(n, 0), self._out(n)
        if x is None or y is None:
            return None
        if len(n.src) > 1 and n.src[1] is not None:
            g = self._rows(n, 1)
        else:
            half = y.shape[1]
            x, g = x[:, :half], x[:, half : 2 * half]
            if n.params["swapped"]:
                x, g = g, x
        if g is None or x.shape != y.shape or g.shape != y.shape:
            return None
        return lambda: kernel(x, g, y)

    def _bind_swiglu(self, n: Node) -> Callable[[], None] | None:
        return self._glu(n, self.device.ops.swiglu_rows)

    def _bind_geglu(self, n: Node) -> Callable[[], None] | None:
        return self._glu(n, self.device.ops.geglu_rows)

    def _bind_rope(self, n: Node) -> Callable[[], None] | None:
        t, x, a = n.tensor, n.src_tensor[0], n.src[0]
        plain = n.params["mode"] in (0, 2) and n.params["n_offs"] == 0
        if not plain or t.type != GGMLType.F32 or t.ne[3] != 1 or x is None or a is None or x.nb[0] != 4:
            return None
        if t.nb[0] != 4:
            return None
        neox, n_dims = n.params["mode"] == 2, n.params["n_dims"]
        source, target = a[0], n.dst[0]

        def run() -> None:
            positions = n.indices(1, 1 << 30).reshape(-1)
            cos, sin = self._angles(n, positions)
            self.device.ops.rope_rows(source, target, cos, sin, neox, n_dims)

        return run

    def _angles(self, n: Node, positions: Array) -> tuple[Array, Array]:
        """Cosines and sines; the layers of a model ask for the same ones, so the last few are kept."""
        factors = n.opt(2)
        key = (n.tensor.params, positions.tobytes(), None if factors is None else factors.tobytes())
        known = _ANGLES.get(key)
        if known is None:
            cos, sin, _ = rope_angles(n, positions, factors)
            known = (cos.astype(np.float32), sin.astype(np.float32))
            while len(_ANGLES) >= 8:
                del _ANGLES[next(iter(_ANGLES))]
            _ANGLES[key] = known
        return known

    # -- moving data ---------------------------------------------------------------------------------------------------

    def _bind_set_rows(self, n: Node) -> Callable[[], None] | None:
        t, x, ids = n.tensor, n.src_tensor[0], n.src_tensor[1]
        flat = x is not None and ids is not None and t.ne[2] * t.ne[3] == 1 and ids.ne[1] * ids.ne[2] == 1
        if not flat or t.type != GGMLType.F16 or t.nb[0] != 2 or x is None or x.type != GGMLType.F32 or x.nb[0] != 4:
            return None
        a = n.src[0]
        assert a is not None  # SET_ROWS has its sources
        source, target = a[0, 0], n.dst[0, 0].view(np.uint16)

        def run() -> None:
            self.device.ops.store_halves(source, n.indices(1, target.shape[0]).reshape(-1), target)

        return run

    def _bind_get_rows(self, n: Node) -> Callable[[], None] | None:
        t = n.src_tensor[0]
        buffer = self.buffers.get(t.buffer) if t is not None else None
        if t is None or buffer is None or t.offset not in buffer.packed:
            return None
        memory = buffer.memory[t.offset : t.offset + buffer.packed[t.offset][2]]

        def run() -> None:
            ids = n.indices(1, t.ne[1])
            blocks = self.device.simd.rows_of_q4_0x8(memory, t.ne[0] // 32, ids.reshape(-1))
            n.put(load(blocks[None, None], t.type, np.float32))

        return run

    # -- products ------------------------------------------------------------------------------------------------------

    def _bind_mul_mat(self, n: Node) -> Callable[[], None] | None:
        a, b = n.src_tensor[0], n.src_tensor[1]
        if a is None or b is None or not _fast_columns(self.graph, n.tensor):
            return None
        weights = self._weights(n.tensor.src[0], a)
        if weights is None:
            return None
        x, y = n.src[1], n.dst
        assert x is not None  # MUL_MAT has its sources
        source = n.tensor.src[1]
        if a.ne[2] * a.ne[3] == 1:
            columns, out = x.reshape(-1, b.ne[0]), y.reshape(-1, a.ne[1])
            return lambda: self._product(weights, 0, a, columns, out, source)
        r2, r3 = b.ne[2] // a.ne[2], b.ne[3] // a.ne[3]

        def run() -> None:
            for i3 in range(b.ne[3]):
                for i2 in range(b.ne[2]):
                    matrix = (i3 // r3) * a.ne[2] + i2 // r2
                    self._product(weights, matrix, a, x[i3, i2], y[i3, i2], -1)

        return run

    def _bind_mul_mat_id(self, n: Node) -> Callable[[], None] | None:
        a, b = n.src_tensor[0], n.src_tensor[1]
        if a is None or b is None or not _fast_columns(self.graph, n.tensor):
            return None
        weights = self._weights(n.tensor.src[0], a)
        if weights is None:
            return None
        x, y = n.src[1], n.dst
        assert x is not None  # MUL_MAT_ID has its sources

        def run() -> None:
            ids = n.indices(2, a.ne[2])[0, 0]
            column = np.arange(ids.shape[1]) % b.ne[1]
            for e in np.unique(ids):
                token, slot = np.nonzero(ids == e)
                out = np.empty((len(token), a.ne[1]), np.float32)
                self._product(weights, int(e), a, np.ascontiguousarray(x[0][token, column[slot]]), out, -1)
                y[0][token, slot] = out

        return run

    def _weights(self, i: int, a: Tensor) -> Array | Bytes | None:
        """The memory of a matrix that the products can read: packed, blocks, floats, or widened to float16."""
        base, at = self.memory[i]
        if not a.contiguous:
            return None
        size = row_bytes(a.type, a.ne[0]) * a.n_rows
        memory = base[at : at + size]
        buffer = self.buffers.get(a.buffer)
        if a.type in self.device.products.BLOCK_TYPES:
            return memory
        if a.type in self.device.products.FLOAT_TYPES:
            dtype = np.float32 if a.type == GGMLType.F32 else np.uint16
            return memory.view(dtype) if memory.ctypes.data % 4 == 0 else None
        if buffer is None or not TYPES[a.type].quantized:
            return None
        key = (id(buffer), a.offset)
        if key not in self.device.expanded:
            blocks = memory.reshape(1, 1, a.n_rows, a.ne[0] // TYPES[a.type].block, TYPES[a.type].bytes)
            self.device.expanded[key] = load(blocks, a.type, np.float32).astype(np.float16).reshape(-1).view(np.uint16)
        return self.device.expanded[key]

    def _product(self, weights: Array, matrix: int, a: Tensor, x: Array, y: Array, source: int) -> None:
        """y = rows of matrix number `matrix` times columns x. `source`: the tensor that x is, or -1."""
        d, threads = self.device, self.device.n_threads()
        k, n_rows = a.ne[0], a.ne[1]
        if n_rows * k * len(x) < 1 << 15:
            threads = 1
        info = TYPES[a.type]
        packed = self.buffers.get(a.buffer)
        if packed is not None and a.offset in packed.packed:
            n_blocks, n_tiles = k // 32, len(x) // d.simd.COLUMNS
            xq, xd, xs = self._quantize(x, source, True)
            w = weights.ctypes.data + matrix * n_rows * n_blocks * info.bytes
            product = d.simd.q4_0x8_parallel if threads > 1 else d.simd.q4_0x8_serial
            product(w, xq.ctypes.data, xd.ctypes.data, xs.ctypes.data, n_blocks, y.ctypes.data, 4 * n_rows,
                    n_rows // d.simd.GROUP, n_tiles, len(x) - n_tiles * d.simd.COLUMNS, threads)  # fmt: skip
        elif a.type in d.products.BLOCK_TYPES and d.simd.HAVE_AVX2:
            xq, xd, xs = self._quantize(x, source, False)
            row = row_bytes(a.type, k)
            w = weights.ctypes.data + matrix * n_rows * row
            d.rows.rows_product(int(a.type), w, row, xq.ctypes.data, xd.ctypes.data, xs.ctypes.data, k, y.ctypes.data,
                                n_rows, len(x), threads)  # fmt: skip
        elif a.type in d.products.BLOCK_TYPES:
            xq, xd, xs16 = self._quantize(x, source, False)
            row = row_bytes(a.type, k)
            w8 = weights[matrix * n_rows * row : (matrix + 1) * n_rows * row]
            d.products.blocks_product(int(a.type), w8, row, info.block, info.bytes, xq, xd, xs16, y, threads)
        else:
            part = weights[matrix * n_rows * k : (matrix + 1) * n_rows * k]
            if part.dtype == np.float32:
                d.products.floats_product(0, part, _NO_HALVES, k, x, y, threads)
            else:
                kind = int(GGMLType.BF16) if a.type == GGMLType.BF16 else int(GGMLType.F16)
                d.products.floats_product(kind, _NO_FLOATS, part, k, x, y, threads)

    def _quantize(self, x: Array, source: int, tiled: bool) -> tuple[Array, ...]:
        """Columns as int8 blocks; neighbours that multiply the same tensor (q, k and v) quantise it once."""
        d, (n, k) = self.device, x.shape
        out = self._quantized.get((n, k, tiled))
        if out is None:
            wide = d.simd.HAVE_AVX2
            sums = np.empty((n, k // 32), np.float32) if wide else np.empty((n, k // 16), np.int32)
            out = (np.empty((n, k), np.int8), np.empty((n, k // 32), np.float32), sums)
            self._quantized[(n, k, tiled)] = out
        if source >= 0 and self._fresh == (source, tiled):
            return out
        many = n >= 16 and d.n_threads() > 1
        if not d.simd.HAVE_AVX2:
            d.products.quantize_plain(x, *out)
        elif not tiled and many:
            d.rows.quantize_rows_parallel(x, *out, d.n_threads())
        elif not tiled:
            d.rows.quantize_rows(x, *out, 0, n)
        else:
            flat = [a.reshape(-1) for a in out]
            tiles = n // d.simd.COLUMNS
            if many:
                d.simd.quantize_columns_parallel(x, *flat, k // 32, tiles, n, d.n_threads())
            else:
                d.simd.quantize_columns(x, *flat, k // 32, tiles, 0, n)
        self._fresh = (source, tiled)
        return out

    def run(self, inputs, tick):  # type: ignore[no-untyped-def]
        self._fresh = None
        return super().run(inputs, tick)

    def _bind_flash_attn_ext(self, n: Node) -> Callable[[], None] | None:
        q, k, v = n.src_tensor[0], n.src_tensor[1], n.src_tensor[2]
        mask = n.src_tensor[3] if len(n.src) > 3 else None
        assert q is not None and k is not None and v is not None  # FLASH_ATTN_EXT has its sources
        halves = k.type == v.type == GGMLType.F16 and k.nb[0] == v.nb[0] == 2 and q.nb[0] == 4
        if not halves or q.ne[3] != 1 or n.params["max_bias"] or (mask is not None and mask.ne[2] * mask.ne[3] != 1):
            return None
        if not n.tensor.contiguous or (mask is not None and mask.nb[0] != 2):
            return None
        (qm, qo), (km, ko), (vm, vo) = (self.memory[i] for i in n.tensor.src[:3])
        at = [base.ctypes.data + offset for base, offset in ((qm, qo), (km, ko), (vm, vo))]
        rest = [0, 0]
        for slot, j in enumerate(n.tensor.src[3:5]):
            if j >= 0:
                base, offset = self.memory[j]
                rest[slot] = base.ctypes.data + offset
        base, offset = self.memory[n.index]
        small = q.ne[1] * q.ne[2] * k.ne[1] < 4096
        arguments = (
            at[0], q.nb[2], q.nb[1], q.ne[0], q.ne[2], q.ne[1], at[1], k.nb[2], k.nb[1], at[2], v.nb[2], v.nb[1],
            v.ne[0], k.ne[2], k.ne[1], rest[0], mask.nb[1] if mask is not None else 0, np.float32(n.params["scale"]),
            np.float32(n.params["logit_softcap"]), rest[1], base.ctypes.data + offset,
            1 if small else self.device.n_threads(),
        )  # fmt: skip
        return lambda: self.device.ops.flash_attn(*arguments)


_ANGLES: dict[tuple[object, ...], tuple[Array, Array]] = {}
_NO_HALVES, _NO_FLOATS = np.zeros(1, np.uint16), np.zeros(1, np.float32)
