"""Kernels of positions and attention, run on the host: what they give, and that bits do not depend on a token's company."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from protocol.dtypes import TYPES, GGMLType, row_bytes
from protocol.errors import KernelError
from protocol.graph import Graph, Tensor, f32_bits
from protocol.limits import MAX_ROPE_POSITION
from protocol.ops import OPS
from protocol.rules import PAGE_CELLS
from tests.support.emulated import EmulatedDriver, compiler
from tests.support.emulated.driver import EmulatedFunction
from tests.support.fixtures import nmse
from tests.support.strategies import leaf
from workers.devices.cuda.attention import CHUNK_PAGES, NARROW, WIDE, divide
from workers.devices.cuda.device import CUDADevice
from workers.devices.cuda.plan import CUDAPlan
from workers.devices.reference import ReferenceDevice
from workers.kernels.cuda.attention_launches import Merge, PagedAttend
from workers.kernels.cuda.launches import Launch
from workers.tensors import convert
from workers.ticks import nothing

pytestmark = pytest.mark.skipif(not compiler()[0], reason=compiler()[1])

Floats = npt.NDArray[np.float32]
F32, F16, BF16, Q8_0, Q4_0, I32 = (GGMLType[n] for n in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "I32"))


@pytest.fixture(scope="module")
def device() -> CUDADevice:
    return CUDADevice("cuda-emulated", EmulatedDriver())


def launched(plan: CUDAPlan) -> list[Launch]:
    """What a plan that was bound puts on the stream."""
    return [step.argument for step in plan.bind(nothing).launches]


def run(device: CUDADevice, graph: Graph, inputs: list[bytes]) -> Floats:
    plan = device.compile(graph, {})
    assert plan.fallbacks == ()
    return np.frombuffer(plan.run(inputs, nothing)[0], np.float32).copy()


def defined(graph: Graph, inputs: list[bytes]) -> Floats:
    return np.frombuffer(ReferenceDevice().compile(graph, {}).run(inputs, nothing)[0], np.float32)


# -- attention over pages ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """Attributes: sequence; n_seen; q: (n_head, d)."""

    sequence: int
    n_seen: int
    q: Floats


@dataclass(frozen=True)
class Layer:
    """One attention. Keys and values of all heads of a cell are one row of the cache, as in models.

    Attributes: latent: values are the beginning of the keys.
    """

    d: int = 64
    d_v: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    kinds: tuple[GGMLType, GGMLType] = (F16, F16)
    n_pool: int = 40
    window: int = 0
    softcap: float = 0.0
    scale: float = 0.3
    sinks: bool = False
    latent: bool = False

    def __str__(self) -> str:
        kinds = (k.name for k in self.kinds)
        return "-".join(map(str, (self.d, self.d_v, self.n_head, self.n_head_kv, *kinds, self.window)))

    def cache(self, seed: int = 1) -> list[bytes]:
        rng = np.random.default_rng(seed)
        out = []
        for kind, d in zip(self.kinds, (self.d, self.d_v), strict=True):
            values = rng.standard_normal(self.n_pool * PAGE_CELLS * self.n_head_kv * d, np.float32)
            if kind == F16:
                out.append(values.astype(np.float16).tobytes())
            else:
                out.append(convert(values, kind, (len(values) // 32, TYPES[kind].bytes)).tobytes())
        return out

    def tokens(self, *numbers: tuple[int, int], seed: int = 2) -> list[Token]:
        """Each (sequence, n_seen)."""
        rng = np.random.default_rng(seed)
        return [Token(s, n, rng.standard_normal((self.n_head, self.d), np.float32)) for s, n in numbers]

    def graph(self, n_tokens: int, n_pages: int, n_sequences: int) -> Graph:
        n_cells = self.n_pool * PAGE_CELLS
        leaves = [leaf(F32, (self.d, self.n_head, n_tokens, 1))]
        rows = [(kind, d * self.n_head_kv) for kind, d in zip(self.kinds, (self.d, self.d_v), strict=True)]
        leaves += [leaf(kind, (n, n_cells, 1, 1)) for kind, n in rows]
        leaves += [leaf(I32, (n_pages, n_sequences, 1, 1)), leaf(I32, (n_tokens, 1, 1, 1)), leaf(I32, (n_tokens, 1, 1, 1)),
                   leaf(F32, (self.n_head, 1, 1, 1))]  # fmt: skip
        q = replace(leaves[0], op="PERMUTE", ne=(self.d, n_tokens, self.n_head, 1), src=(0,), view_src=0,
                    nb=tuple(leaves[0].nb[i] for i in (0, 2, 1, 3)))  # fmt: skip
        views = [q]
        for kind, d, of in ((self.kinds[0], self.d, 1), (self.kinds[1], self.d_v, 1 if self.latent else 2)):
            row = leaves[of].nb[1]
            head = row // self.n_head_kv if self.latent else row_bytes(kind, d)
            views.append(Tensor(kind, "VIEW", (d, n_cells, self.n_head_kv, 1), (TYPES[kind].bytes, row, head, row * n_cells),
                                src=(of,), view_src=of))  # fmt: skip
        params = (f32_bits(self.scale), f32_bits(self.softcap), self.window, *(0,) * 13)
        src = (7, 8, 9, 3, 4, 5, 6) if self.sinks else (7, 8, 9, 3, 4, 5)
        node = replace(leaf(F32, (self.d_v, self.n_head, n_tokens, 1)), op="PAGED_ATTN", src=src, params=params)
        return Graph((*leaves, *views, node), tuple(range(7)), (10,))

    def inputs(self, tokens: list[Token], pages: npt.NDArray[np.int32], cache: list[bytes]) -> list[bytes]:
        numbers = [np.array(of, np.int32).tobytes() for of in ([t.n_seen for t in tokens], [t.sequence for t in tokens])]
        sinks = np.linspace(-1, 2, self.n_head, dtype=np.float32).tobytes()
        return [np.stack([t.q for t in tokens]).tobytes(), *cache, pages.tobytes(), *numbers, sinks]

    def attend(
        self, device: CUDADevice, tokens: list[Token], pages: npt.NDArray[np.int32], cache: list[bytes] | None = None
    ) -> Floats:
        """Shapes: `pages` (n_sequences, n_pages), the result (n_tokens, n_head, d_v)."""
        graph = self.graph(len(tokens), pages.shape[1], len(pages))
        got = run(device, graph, self.inputs(tokens, pages, cache or self.cache()))
        return got.reshape(len(tokens), self.n_head, self.d_v)

    def check(self, device: CUDADevice, tokens: list[Token], pages: npt.NDArray[np.int32]) -> None:
        graph = self.graph(len(tokens), pages.shape[1], len(pages))
        inputs = self.inputs(tokens, pages, self.cache())
        want = defined(graph, inputs)
        assert nmse(run(device, graph, inputs), want) <= 1e-5
        assert np.array_equal(self.attend(device, tokens, pages).ravel(), run(device, graph, inputs))


def table(n_sequences: int, n_pages: int, n_pool: int = 40, seed: int = 3) -> npt.NDArray[np.int32]:
    """Pages of sequences, anywhere; some are shared."""
    return np.random.default_rng(seed).integers(0, n_pool, (n_sequences, n_pages)).astype(np.int32)


LAYERS = [
    Layer(), Layer(n_head=6, n_head_kv=2, softcap=5.0, sinks=True), Layer(d=128, d_v=128, n_head=8, n_head_kv=1, sinks=True),
    Layer(d=80, d_v=72, window=100), Layer(d=32, d_v=32, kinds=(Q8_0, Q8_0)),
    Layer(d=64, d_v=96, kinds=(Q8_0, F16), window=7),
    Layer(d=256, d_v=256, n_head=2, n_head_kv=1, kinds=(F16, Q8_0)), Layer(d=24, d_v=8, n_head_kv=4),
    Layer(d=192, d_v=128, n_head_kv=4), Layer(d=576, d_v=512, n_head=20, n_head_kv=1, n_pool=8, latent=True),
    Layer(d=288, d_v=256, n_head=3, n_head_kv=1, n_pool=8, latent=True, kinds=(Q8_0, Q8_0)), Layer(d=12, d_v=20, sinks=True),
    Layer(d=32, d_v=32, n_head=40, n_head_kv=1),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_tokens_see_their_cells(device: CUDADevice, layer: Layer) -> None:
    """One token; some of several sequences; a prompt between others."""
    layer.check(device, layer.tokens((0, 77)), table(1, 2, layer.n_pool))
    layer.check(device, layer.tokens((1, 600), (0, 1), (2, 0), (2, 512)), table(3, 10, layer.n_pool))
    prompt = [(1, 60 + i) for i in range(9)]
    layer.check(device, layer.tokens((0, 130), *prompt, (2, 64), (2, 65)), table(3, 3, layer.n_pool))


def test_a_tile_of_64_queries(device: CUDADevice) -> None:
    """Prompts of several sequences, whose tokens share tiles."""
    grouped = Layer(d=32, d_v=32, n_head=8, n_head_kv=1, softcap=3.0, sinks=True)
    for layer in (grouped, Layer(n_head=4, n_head_kv=4, window=33)):
        group, n = layer.n_head // layer.n_head_kv, 80 if layer.n_head_kv == 1 else 300
        tokens = layer.tokens(*((i * 5 // n, 1 + 3 * i % 170) for i in range(n)))
        assert divide(n, 5, 4, group, layer.n_head_kv, layer.d, layer.d_v, 4).rows == WIDE
        layer.check(device, tokens, table(5, 4))


def alone(device: CUDADevice, layer: Layer, token: Token, pages: npt.NDArray[np.int32]) -> Floats:
    """The token by itself, with as many pages as it needs."""
    need = max(1, -(-token.n_seen // PAGE_CELLS))
    return layer.attend(device, [replace(token, sequence=0)], pages[token.sequence : token.sequence + 1, :need].copy())[0]


@pytest.mark.parametrize("layer", [Layer(n_head=8), Layer(d=32, d_v=32, n_head=8, kinds=(Q8_0, Q8_0), window=70, sinks=True),
                                   Layer(d=96, d_v=80, n_head=2, softcap=4.0)], ids=str)  # fmt: skip
def test_bits_do_not_depend_on_company(device: CUDADevice, layer: Layer) -> None:
    """Tiles of 64 and of 16 queries, one of several sequences, a context that is divided over blocks and one that is not."""
    pages = table(4, 20)
    numbers = [(0, 1230), *((1, 500 + i) for i in range(40)), (2, 64), (3, 1), *((3, 600 + i) for i in range(60)),
               *((2, i) for i in range(160))]  # fmt: skip
    tokens = layer.tokens(*numbers)
    for n in (len(tokens), 20):
        some = tokens[:n]
        together = layer.attend(device, some, pages)
        for i in (0, 1, 7, 19, 40, 41, 42, 43, 102, 103, 104, 262):
            if i < n:
                assert np.array_equal(together[i], alone(device, layer, tokens[i], pages)), i
    backwards = layer.attend(device, tokens[::-1], pages)
    assert np.array_equal(backwards[::-1], layer.attend(device, tokens, pages))


@pytest.mark.parametrize("n_pages", [16, 18])
@pytest.mark.parametrize("layer", [Layer(), Layer(d=576, d_v=512, n_head=20, n_head_kv=1, n_pool=20, latent=True),
                                   Layer(d=32, d_v=32, window=300, sinks=True), Layer(d=64, d_v=96, softcap=4.0)],
                         ids=str)  # fmt: skip
def test_bits_do_not_depend_on_how_the_context_is_divided(layer: Layer, n_pages: int) -> None:
    """More processors: pages or chunks are blocks of their own, and are merged afterwards."""
    pages, tokens = table(2, n_pages, layer.n_pool), layer.tokens((0, 1000), (1, 70), (1, 0), (0, 513))
    got, kinds, sizes = [], [], set()
    for n_processors in (1, 64):
        driver = EmulatedDriver()
        driver.facts = replace(driver.facts, n_processors=n_processors)
        device = CUDADevice("cuda-emulated", driver)
        steps = launched(device.compile(layer.graph(4, n_pages, 2), {}))
        kinds.append({type(a).__name__ for a in steps})
        sizes |= {a.split_pages for a in steps if isinstance(a, Merge)}
        got.append(layer.attend(device, tokens, pages))
    assert kinds == [{"PagedAttend"}, {"PagedAttend", "Merge"}] and sizes == {1 if n_pages == 16 else CHUNK_PAGES}
    assert np.array_equal(*got)


@pytest.mark.parametrize(("n_pages", "n_head"), [(3, 4), (3, 40), (70, 4), (70, 8)])
@pytest.mark.parametrize("n_products", [1, 2])
def test_who_merges_makes_columns(n_pages: int, n_head: int, n_products: int) -> None:
    """Of products behind it, which read a reshaped view; of many blocks of a token the last does. A product alone makes them
    itself. Twice: what blocks meet by is as it was."""
    layer, n_tokens, n_rows = Layer(n_head=n_head), 2, 48
    pages, tokens = table(2, n_pages), layer.tokens((0, 180), (1, 64 * n_pages - 1))
    graph = layer.graph(n_tokens, n_pages, 2)
    width = layer.d_v * n_head
    view = replace(leaf(F32, (width, n_tokens, 1, 1)), op="RESHAPE", src=(10,), view_src=10)
    weight = replace(leaf(F16, (width, n_rows, 1, 1)), buffer=1)
    product = replace(leaf(F32, (n_rows, n_tokens, 1, 1)), op="MUL_MAT", src=(12, 11))
    graph = Graph((*graph.tensors, view, weight, *[product] * n_products), graph.inputs, (10, 13))
    weights = np.random.default_rng(1).standard_normal(n_rows * width, np.float32).astype(np.float16).tobytes()
    driver = EmulatedDriver()
    driver.facts = replace(driver.facts, n_processors=64)
    results, names = [], []
    for device in (CUDADevice("cuda-emulated", driver), ReferenceDevice()):
        buffer = device.alloc(len(weights))
        device.write(buffer, 0, memoryview(weights))
        device.finish(buffer, 0, len(weights), F16, weight.ne)
        plan = device.compile(graph, {1: buffer})
        for _ in range(2):
            out = plan.run(layer.inputs(tokens, pages, layer.cache()), nothing)
        results.append([np.frombuffer(x, np.float32).copy() for x in out])
        if isinstance(plan, CUDAPlan):
            names += [type(a).__name__ for a in launched(plan)]
            (merge,) = (a for a in launched(plan) if isinstance(a, Merge))
            assert (bool(merge.peaks), bool(merge.columns)) == (n_products == 1, n_products == 2)
    assert names == ["PagedAttend", "Merge", "Product"]
    assert all(nmse(x, y) <= 1e-5 for x, y in zip(*results, strict=True))


def test_only_what_no_launch_writes_is_read_ahead() -> None:
    """Numbers of pages and cells, where they are inputs or views of them."""
    driver = EmulatedDriver()
    driver.facts = replace(driver.facts, n_processors=64)
    device, graph = CUDADevice("cuda-emulated", driver), Layer().graph(2, 3, 2)
    view = replace(graph.tensors[5], op="VIEW", src=(4,), view_src=4)
    for other, given in ((graph.tensors[5], True), (view, True), (replace(view, op="CONT", view_src=-1), False)):
        inputs = tuple(i for i in graph.inputs if i != 5 or other.op == "NONE")
        plan = device.compile(Graph((*graph.tensors[:5], other, *graph.tensors[6:]), inputs, graph.outputs), {})
        found = [(type(a), a.given) for a in launched(plan) if isinstance(a, PagedAttend | Merge)]
        assert found == [(PagedAttend, given), (Merge, given)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_launch_says_how_much_shared_memory_it_takes(device: CUDADevice, layer: Layer) -> None:
    bound = device.compile(layer.graph(1, 2, 1), {}).bind(nothing)
    for step in (s for s in bound.launches if isinstance(s.argument, PagedAttend)):
        assert isinstance(step.function, EmulatedFunction)
        declared = step.function.shared[1] - step.grid.shared
        assert 0 <= declared < 4096 and step.function.shared[1] < 99 << 10  # a block of 8.6 and 8.9 has no more


def test_bits_do_not_depend_on_where_pages_lie(device: CUDADevice) -> None:
    layer = Layer(n_pool=24)
    tokens = layer.tokens((0, 700), (0, 701), (1, 90))
    pages = np.arange(24, dtype=np.int32).reshape(2, 12)
    order = np.random.default_rng(5).permutation(24).astype(np.int32)
    cache = layer.cache()
    moved = []
    for part in cache:
        of = np.frombuffer(part, np.uint8).reshape(24, -1)
        to = np.empty_like(of)
        to[order] = of
        moved.append(to.tobytes())
    assert np.array_equal(layer.attend(device, tokens, pages, cache), layer.attend(device, tokens, order[pages], moved))


@pytest.mark.parametrize("group", [1, 4])
def test_what_no_token_sees_may_be_anything(device: CUDADevice, group: int) -> None:
    """Cells behind those seen and before the window, and those of other sequences in the same tile."""
    layer = Layer(d=32, d_v=32, n_head=2 * group, window=100)
    pages = np.arange(8, dtype=np.int32).reshape(2, 4)
    tokens = layer.tokens(*((0, 190 + i) for i in range(40)), *((1, 200 + i) for i in range(40)))
    cache = layer.cache()
    broken = [np.frombuffer(part, np.float16).reshape(-1, PAGE_CELLS, 64).copy() for part in cache]
    for part in broken:
        part[4:] = np.nan  # the second sequence
        part[0] = np.nan
        part[1, :26] = np.inf
        part[3, 38:] = np.nan
    want = layer.attend(device, tokens, pages, cache)
    got = layer.attend(device, tokens, pages, [part.tobytes() for part in broken])
    assert np.array_equal(got[:40], want[:40]) and np.isnan(got[40:]).all()


def test_queries_of_any_size(device: CUDADevice) -> None:
    """Numbers that are none of float16."""
    layer = Layer()
    tokens = layer.tokens((0, 100), (0, 101))
    want = layer.attend(device, tokens, table(1, 2))
    for size in (1e-30, 1e30):
        scaled = replace(layer, scale=layer.scale / size)
        other = [replace(t, q=t.q * np.float32(size)) for t in tokens]
        assert nmse(scaled.attend(device, other, table(1, 2)), want) < 1e-5
    layer.check(device, [replace(t, q=t.q * np.float32(0)) for t in tokens], table(1, 2))


@pytest.mark.parametrize("d", [32, 12])
def test_numbers_that_point_outside_are_reported(device: CUDADevice, d: int) -> None:
    layer = Layer(d=d, d_v=d)
    good = table(2, 3)
    for tokens, page, what in (
        (layer.tokens((0, 10), (1, 130)), (1, 2, 40), "a page"), (layer.tokens((0, 10), (1, 130)), (1, 0, -1), "a page"),
        (layer.tokens((0, 193), (1, 5)), (0, 0, 1), "n_seen"), (layer.tokens((0, -1), (1, 5)), (0, 0, 1), "n_seen"),
        (layer.tokens((0, 3), (2, 5)), (0, 0, 1), "a row"), (layer.tokens((-1, 3), (1, 5)), (0, 0, 1), "a row"),
    ):  # fmt: skip
        pages = good.copy()
        pages[page[:2]] = page[2]
        with pytest.raises(KernelError, match=r"node 10 \(PAGED_ATTN\)"):
            layer.attend(device, tokens, pages)
            pytest.fail(what)
    pages = good.copy()
    pages[0, 1:] = 1 << 30  # what no token sees is not followed
    layer.attend(device, layer.tokens((0, 64), (1, 130)), pages)


def test_work_is_divided_by_shapes() -> None:
    one = divide(1, 1, 64, 4, 8, 128, 128, 132)
    assert one == (NARROW, 1, 1, 1, 1, 16, 4)
    assert divide(1, 1, 16, 4, 8, 128, 128, 132)[-2:] == divide(4, 4, 16, 4, 8, 128, 128, 132)[-2:] == (16, 1)
    assert divide(8, 8, 16, 4, 8, 128, 128, 132)[-2:] == (4, 4)
    assert divide(64, 64, 64, 4, 8, 128, 128, 132)[:5] == (NARROW, 1, 64, 1, 1)
    prompt = divide(512, 1, 64, 4, 8, 128, 128, 132)
    assert (prompt.rows, prompt.unit, prompt.n_tiles, prompt.n_slots) == (WIDE, 512, 32, 1)
    assert divide(512, 32, 64, 4, 8, 128, 128, 132).n_slots == 17
    assert divide(512, 1, 64, 16, 1, 576, 512, 132).rows == NARROW
    assert divide(4096, 1, 4096, 4, 8, 128, 128, 132).n_splits == 1


# -- attention by rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [(F32, F16), (F16, Q8_0), (BF16, BF16), (Q4_0, F32)], ids=str)
@pytest.mark.parametrize("more", [{}, {"mask": True}, {"mask": True, "max_bias": 8.0, "sinks": True},
                                  {"softcap": 2.0, "n_seq": 4}], ids=str)  # fmt: skip
def test_flash_attention(device: CUDADevice, kinds: tuple[GGMLType, GGMLType], more: dict[str, Any]) -> None:
    d, d_v, n_tokens, n_head, n_kv, n_seq = 64, 32, 5, 6, 70, more.get("n_seq", 2)
    rng = np.random.default_rng(1)

    def values(kind: GGMLType, ne: tuple[int, int, int, int]) -> bytes:
        x = rng.standard_normal(int(np.prod(ne)), np.float32)
        info = TYPES[kind]
        return convert(x, kind, (len(x) // info.block, info.bytes) if info.quantized else x.shape).tobytes()

    shapes = [(F32, (d, n_tokens, n_head, n_seq)), (kinds[0], (d, n_kv, 3, 2)), (kinds[1], (d_v, n_kv, 3, 2))]
    inputs = [values(*s) for s in shapes]
    src = [0, 1, 2]
    if more.get("mask"):
        mask = np.where(rng.random((n_seq, 2, n_tokens + 1, n_kv)) < 0.5, -np.inf, rng.standard_normal(n_kv))
        mask[0, 0, 2] = -np.inf  # nothing is seen
        src.append(len(shapes))
        shapes.append((F16, (n_kv, n_tokens + 1, 2, n_seq)))
        inputs.append(mask.astype(np.float16).tobytes())
    if more.get("sinks"):
        src += [-1] * (4 - len(src)) + [len(shapes)]
        shapes.append((F32, (n_head, 1, 1, 1)))
        inputs.append(values(*shapes[-1]))
    params = (*(f32_bits(x) for x in (0.2, more.get("max_bias", 0.0), more.get("softcap", 0.0))), *(0,) * 13)
    node = replace(leaf(F32, (d_v, n_head, n_tokens, n_seq)), op="FLASH_ATTN_EXT", src=tuple(src), params=params)
    graph = Graph((*(leaf(*s) for s in shapes), node), tuple(range(len(shapes))), (len(shapes),))
    assert nmse(run(device, graph, inputs), defined(graph, inputs)) < 1e-9


# -- positions ---------------------------------------------------------------------------------------------------------


def rope(src: tuple[int, ...], ne: tuple[int, int, int, int], kind: GGMLType = F32, **params: float) -> Tensor:
    words = [0] * 16
    given = {"n_dims": ne[0], "mode": 0, "freq_base": 10000.0, "freq_scale": 1.0, "attn_factor": 1.0, **params}
    for name, value in given.items():
        p = OPS["ROPE"].params[name]
        words[p.index] = int(value) if p.kind == "i32" else f32_bits(value)
    return replace(leaf(kind, ne), op="ROPE", src=src, params=tuple(words))


SECTIONS = {"section_0": 8, "section_1": 4, "section_2": 2, "section_3": 2}
YARN = {"ext_factor": 1.0, "freq_scale": 0.25, "n_ctx_orig": 4096, "beta_fast": 32.0, "beta_slow": 1.0}


@pytest.mark.parametrize("params", [{"mode": 0}, {"mode": 2}, {"mode": 2, **YARN}, {"mode": 0, "n_dims": 20, "n_offs": 10},
                                    {"mode": 2, "n_dims": 20, "n_offs": 4, "attn_factor": 1.3}, {"mode": 8, **SECTIONS},
                                    {"mode": 24, "n_dims": 32, **SECTIONS}, {"mode": 40, "n_dims": 24, **SECTIONS, **YARN}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("factors", [False, True])
def test_rows_are_turned(device: CUDADevice, params: dict[str, float], factors: bool) -> None:
    """To the end of what may be a position."""
    ne, rng = (64, 3, 5, 2), np.random.default_rng(1)
    n_positions = ne[2] * (4 if int(params["mode"]) & 8 else 1)
    positions = rng.integers(0, MAX_ROPE_POSITION, n_positions).astype(np.int32)
    positions[0] = MAX_ROPE_POSITION - 1
    leaves = [leaf(F32, ne), leaf(I32, (n_positions, 1, 1, 1))]
    inputs = [rng.standard_normal(ne[::-1], np.float32).tobytes(), positions.tobytes()]
    if factors:
        leaves.append(leaf(F32, (32, 1, 1, 1)))
        inputs.append(rng.uniform(1, 8, 32).astype(np.float32).tobytes())
    src = tuple(range(len(leaves)))
    graph = Graph((*leaves, rope(src, ne, **params)), src, (len(leaves),))
    assert nmse(run(device, graph, inputs), defined(graph, inputs)) < 1e-12


def test_rows_are_turned_where_they_lie_and_layers_share_a_table(device: CUDADevice) -> None:
    ne = (32, 2, 3, 1)
    leaves = (leaf(F32, ne), leaf(I32, (3, 1, 1, 1)))
    first = rope((0, 1), ne, mode=2)
    second = replace(rope((2, 1), ne, mode=2), view_src=2)
    third = rope((3, 1), ne, mode=0)
    graph = Graph((*leaves, first, second, third), (0, 1), (4,))
    inputs = [np.linspace(-1, 1, 192, dtype=np.float32).tobytes(), np.array([0, 9, 1000], np.int32).tobytes()]
    assert nmse(run(device, graph, inputs), defined(graph, inputs)) < 1e-12
    plan = device.compile(graph, {})
    names = [type(a).__name__ for a in launched(plan)]
    assert names == ["RopeTable", "Rope", "Rope", "RopeTable", "Rope"]


def test_positions_outside_are_reported(device: CUDADevice) -> None:
    ne = (32, 2, 3, 1)
    for mode, at, bad in ((0, 2, -1), (2, 0, MAX_ROPE_POSITION), (8, 11, -5)):  # the last is a position that no pair goes by
        n = 3 * (4 if mode & 8 else 1)
        sections = {"section_0": 16} if mode & 8 else {}
        graph = Graph((leaf(F32, ne), leaf(I32, (n, 1, 1, 1)), rope((0, 1), ne, mode=mode, **sections)), (0, 1), (2,))
        positions = np.zeros(n, np.int32)
        positions[at] = bad
        with pytest.raises(KernelError, match=r"node 2 \(ROPE\)"):
            run(device, graph, [bytes(4 * 192), positions.tobytes()])
