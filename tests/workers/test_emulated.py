"""What runs the CUDA kernels on the host: it computes as a device does, and says what a device would not."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.errors import OutOfMemory
from tests.support.emulated import EmulatedDriver, EmulationError, compiler
from tests.support.emulated.compiling import GARBAGE, kernel_options
from tests.support.emulated.driver import PRIMITIVES
from workers.devices.cuda.driver import Grid
from workers.kernels.cuda.launches import LAUNCHES, Launch, declarations, launch
from workers.kernels.cuda.sources import FOLDER
from workers.kernels.records import Address, Count

pytestmark = pytest.mark.skipif(not compiler()[0], reason=compiler()[1])


@launch("trial.trial", "trial")
class Trial(Launch, frozen=True, kw_only=True):
    x: Address
    y: Address
    n: Count


HEAD = "\n".join([PRIMITIVES, declarations("trial"), (FOLDER / "common.cuh").read_text(), '#line 1 "trial.cu"\n'])
LAUNCHES.remove(Trial)  # it is a kernel of these tests only


@pytest.fixture
def driver() -> EmulatedDriver:
    return EmulatedDriver(64 << 20)


def put(driver: EmulatedDriver, data: np.ndarray) -> int:
    """Address of these bytes on the device."""
    room = driver.staging(data.nbytes)
    room[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    address = driver.alloc(data.nbytes)
    driver.upload(address, room)
    return address


WARP = Grid(1, 1, 32)


def run(
    driver: EmulatedDriver, body: str, x: np.ndarray, out: np.ndarray, grid: Grid = WARP, before: str = ""
) -> np.ndarray:
    """What a kernel of this body makes of `x` and `out`, at the addresses a.x and a.y; a.n is the number of threads."""
    source = f"{before}\nKERNEL(256) trial(Trial a) {{\n{body}\n}}\n"
    function = driver.compiled("trial", "trial", Trial, HEAD + source)
    to = put(driver, out)
    driver.launch(function, grid, Trial(x=put(driver, x), y=to, n=grid.x * grid.y * grid.threads))
    room = driver.staging(out.nbytes)
    driver.download(room, to)
    driver.synchronize()
    return np.frombuffer(room, out.dtype).reshape(out.shape).copy()


HERE = "i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;\n"
LANE = "int lane = threadIdx.x;\n"
NONE = np.zeros(16, np.uint8)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_every_half_is_the_float_that_it_is(driver: EmulatedDriver) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    body = HERE + "((float*)a.y)[i] = float_of_half(((const u16*)a.x)[i]);"
    got = run(driver, body, halves, np.zeros(1 << 16, np.float32), Grid(256, 1, 256))
    want = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(got, want, equal_nan=True) and np.array_equal(np.signbit(got), np.signbit(want))


def floats() -> np.ndarray:
    """Every half, what lies half-way to the next and just beside it, and what is too large or too small."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    between = ((halves[1:] + halves[:-1]) / 2).astype(np.float32)
    around = [between, np.nextafter(between, np.float32(np.inf)), np.nextafter(between, np.float32(0))]
    odd = np.array([65519, 65520, 1e9, 1e-9, 1e-40, np.inf, np.nan, 2.0**-25, 2.0**-25 * 1.001], np.float32)
    positive = np.concatenate([halves.astype(np.float32), *around, odd])
    both = np.concatenate([positive, -positive])
    return np.concatenate([both, np.zeros(-len(both) % 256, np.float32)])


def test_floats_become_the_nearest_half(driver: EmulatedDriver) -> None:
    x = floats()
    grid = Grid(len(x) // 256, 1, 256)
    got = run(driver, HERE + "((u16*)a.y)[i] = half_of(((const float*)a.x)[i]);", x, np.zeros(len(x), np.uint16), grid)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    good = np.isnan(x)
    assert np.array_equal(got[~good], want.view(np.uint16)[~good]) and np.isnan(got[good].view(np.float16)).all()


def test_floats_become_the_nearest_bfloat16(driver: EmulatedDriver) -> None:
    x = np.random.default_rng(1).integers(0, 1 << 32, 4096, np.uint32).view(np.float32)
    x[:3] = np.nan, np.inf, -0.0
    grid = Grid(16, 1, 256)
    got = run(driver, HERE + "((u16*)a.y)[i] = bf16_of(((const float*)a.x)[i]);", x, np.zeros(4096, np.uint16), grid)
    back = (got.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(np.isnan(back), np.isnan(x))
    finite = np.abs(x) < 1e38
    assert np.all(np.abs(back[finite] - x[finite]) <= np.maximum(np.abs(x[finite]), 2.0**-126) * 2.0**-8)


def test_arithmetic_of_halves_rounds_once(driver: EmulatedDriver) -> None:
    rng = np.random.default_rng(2)
    x = rng.integers(0, 1 << 16, (4096, 3), np.uint16)
    x[x & 0x7C00 == 0x7C00] &= 0x3FF  # finite
    x[:1000, 2] = 1  # the smallest there is decides what is half-way
    x[:1000, :2] = x[:1000, :2] & 0x83FF | rng.integers(10, 22, (1000, 2), np.uint16) << 10
    body = HERE + """
        const u16* x = (const u16*)a.x + 3 * i;
        u32* y = (u32*)a.y + 3 * i;
        y[0] = sub_halves(pair(x[0], x[1]), pair(x[1], x[2]));
        y[1] = mul_halves(pair(x[0], x[1]), pair(x[1], x[2]));
        y[2] = fma_halves(pair(x[0], x[1]), pair(x[1], x[2]), pair(x[2], x[0]));
    """
    got = run(driver, body, x, np.zeros((4096, 3, 2), np.uint16), Grid(16, 1, 256)).view(np.float16)
    a, b, c = x.view(np.float16).astype(np.longdouble).T  # 64 bits of mantissa
    with np.errstate(over="ignore", invalid="ignore"):
        want = [(a - b, b - c), (a * b, b * c)]
        for i, pair in enumerate(want):
            for j, values in enumerate(pair):
                assert np.array_equal(got[:, i, j], values.astype(np.float64).astype(np.float16), equal_nan=True)
        for j, values in enumerate([[exact_fma(*v) for v in x[:1500]], [exact_fma(v[1], v[2], v[0]) for v in x[:1500]]]):
            assert np.array_equal(got[:1500, 2, j], np.array(values, np.float16))


def exact_fma(a: int, b: int, c: int) -> np.float16:
    """a b + c of halves by their bits, rounded once."""
    p, q, r = (int(float(np.uint16(v).view(np.float16)) * 2**24) for v in (a, b, c))
    exact = p * q + (r << 24)  # in units of 2^-48
    size, sign = abs(exact), -1.0 if exact < 0 else 1.0
    drop = max(size.bit_length() - 11, 24)
    kept, rest = size >> drop, size & (1 << drop) - 1
    kept += rest > 1 << drop - 1 or (rest == 1 << drop - 1 and kept & 1)
    value = float(kept) * 2.0 ** (drop - 48)
    return np.float16(sign * value) if value < 65520 else np.float16(sign * np.inf)


def test_bytes_are_chosen(driver: EmulatedDriver) -> None:
    x = np.random.default_rng(3).integers(0, 1 << 32, (256, 3), np.uint32)
    body = HERE + "const u32* x = (const u32*)a.x + 3 * i;\n((u32*)a.y)[i] = choose_bytes(x[0], x[1], x[2]);"
    got = run(driver, body, x, np.zeros(256, np.uint32), Grid(1, 1, 256))
    of = x[:, :2].copy().view(np.uint8)
    which = np.stack([x[:, 2] >> 4 * i & 7 for i in range(4)], 1).astype(np.int64)
    assert np.array_equal(got.view(np.uint8).reshape(-1, 4), np.take_along_axis(of, which, 1))


# -- lanes -------------------------------------------------------------------------------------------------------------


def test_lanes_exchange_what_they_have(driver: EmulatedDriver) -> None:
    x = np.random.default_rng(4).integers(0, 1 << 31, 64, np.int32)
    body = HERE + """
        int v = ((const int*)a.x)[i], *y = (int*)a.y + 8 * i;
        y[0] = __shfl_sync(ALL_LANES, v, 5);
        y[1] = __shfl_sync(ALL_LANES, v, threadIdx.x + 1, 8);
        y[2] = __shfl_xor_sync(ALL_LANES, v, 9);
        y[3] = __shfl_up_sync(ALL_LANES, v, 3);
        y[4] = __shfl_down_sync(ALL_LANES, v, 3, 16);
        y[5] = __ballot_sync(ALL_LANES, v & 1);
        y[6] = (int)__shfl_xor_sync(ALL_LANES, (i64)v << 20, 1);
        y[7] = __any_sync(ALL_LANES, threadIdx.x == 40) + 2 * __all_sync(ALL_LANES, threadIdx.x < 32);
    """
    got = run(driver, body, x, np.zeros((64, 8), np.int32), Grid(1, 1, 64))
    lane, warp = np.arange(64) % 32, np.arange(64) // 32 * 32
    assert np.array_equal(got[:, 0], x[warp + 5])
    assert np.array_equal(got[:, 1], x[warp + lane // 8 * 8 + (lane + 1) % 8])
    assert np.array_equal(got[:, 2], x[warp + (lane ^ 9)])
    assert np.array_equal(got[:, 3], x[warp + np.where(lane < 3, lane, lane - 3)])
    assert np.array_equal(got[:, 4], x[warp + np.where(lane % 16 + 3 > 15, lane, lane + 3)])
    bits = [np.int32(np.uint32(sum(1 << i for i in range(32) if x[w + i] & 1)).view(np.int32)) for w in (0, 32)]
    assert np.array_equal(got[:, 5], np.repeat(bits, 32))
    assert np.array_equal(got[:, 6], (x[warp + (lane ^ 1)].astype(np.int64) << 20).astype(np.int32))
    assert np.array_equal(got[:, 7], np.repeat([2, 1], 32))


def test_a_block_sums(driver: EmulatedDriver) -> None:
    x = np.random.default_rng(5).integers(-1000, 1000, (3, 256)).astype(np.float32)
    body = HERE + """
        __shared__ float room[32];
        float v = ((const float*)a.x)[i], sum = block_sum(v, room), most = block_max(v, room);
        ((float2*)a.y)[i] = make_float2(sum, most);
    """
    got = run(driver, body, x, np.zeros((3, 256, 2), np.float32), Grid(3, 1, 256))
    assert np.array_equal(got, np.stack([np.repeat(v[:, None], 256, 1) for v in (x.sum(1), x.max(1))], 2))


MULTIPLY = LANE + """
    const u16 *m = (const u16*)a.x, *w = m + 256;  // 16 rows of 16, and 8 columns of 16
    int g = lane / 4, t = lane % 4;
    float d[4];
    for (int i = 0; i < 4; i++) d[i] = (float)i;
    u32 v[6];
    for (int i = 0; i < 4; i++) v[i] = *(const u32*)(m + 16 * (g + 8 * (i % 2)) + 8 * (i / 2) + 2 * t);
    for (int i = 0; i < 2; i++) v[4 + i] = *(const u32*)(w + 16 * g + 8 * i + 2 * t);
    MMA(d, v[0], v[1], v[2], v[3], v[4], v[5]);
    for (int i = 0; i < 4; i++) ((float*)a.y)[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = d[i];
"""


@pytest.mark.parametrize("name", ["mma_halves", "mma_bf16s"])
def test_matrices_multiply(driver: EmulatedDriver, name: str) -> None:
    x = np.random.default_rng(6).integers(-64, 64, (24, 16)).astype(np.float32)
    bits = x.astype(np.float16).view(np.uint16) if name == "mma_halves" else (x.view(np.uint32) >> 16).astype(np.uint16)
    got = run(driver, MULTIPLY.replace("MMA", name), bits, np.zeros((16, 8), np.float32))
    begun = np.array([[0, 1], [2, 3]], np.float32)
    want = x[:16] @ x[16:].T + np.tile(np.repeat(begun, 8, 0), (1, 4))
    assert np.array_equal(got, want)


TRANSPOSE = LANE + """
    __shared__ __align__(16) u16 rows[32][8];
    for (int i = 0; i < 8; i++) rows[lane][i] = ((const u16*)a.x)[8 * lane + i];
    __syncwarp();
    u32 v[4];
    load_transposed(v, rows[lane]);
    for (int i = 0; i < 4; i++) ((u32*)a.y)[4 * lane + i] = v[i];
"""


def test_matrices_are_transposed(driver: EmulatedDriver) -> None:
    x = np.random.default_rng(7).integers(0, 1 << 16, (4, 8, 8), np.uint16)
    got = run(driver, TRANSPOSE, x, np.zeros((32, 4, 2), np.uint16))
    for lane in range(32):
        for m in range(4):
            row = 2 * (lane % 4)
            assert list(got[lane, m]) == [x[m, row, lane // 4], x[m, row + 1, lane // 4]]


def test_atomics_return_what_was_there(driver: EmulatedDriver) -> None:
    out = np.array([7, 7, 0, 0], np.uint32)
    body = HERE + """
        u32* y = (u32*)a.y;
        atomicMin(y, (u32)i), atomicMax(y + 1, (u32)i), atomicAdd(y + 2, 2u), report(a.y + 12, i);
    """
    assert list(run(driver, body, NONE, out, Grid(2, 1, 64))) == [0, 127, 256, 0]
    assert list(run(driver, "((u32*)a.y)[0] = atomicCAS((u32*)a.y + 1, 7u, 9u);", NONE, out, Grid(1, 1, 1))) == [7, 9, 0, 0]


# -- what is wrong -----------------------------------------------------------------------------------------------------

ROOM = "__shared__ int room[64];\n"
WRONG = {
    "behind": (HERE + "((float*)a.y)[i] = ((const float*)a.x)[i + 16];", r"trial.cu:4: reads or writes 0x"),
    "before": ("*(int*)(a.y - 4) = (int)threadIdx.x;", "wrote just outside of 256 bytes"),
    "nowhere": ("*(int*)a.n = 1;", "reads or writes 0x40, where no memory is"),
    "barrier": ("if (threadIdx.x < 40) __syncthreads();", r"trial.cu:3 \(__syncthreads\), but thread 40 has ended"),
    "barriers": ("if (threadIdx.x < 32) {\n__syncthreads();\n} else\n__syncthreads();", r"thread 32 waits at trial.cu:6"),
    "shuffle": ("if (threadIdx.x % 2) __shfl_xor_sync(ALL_LANES, 1, 2);", r"_xor_sync\), but thread 0 has ended"),
    "shuffles": ("if (threadIdx.x % 2) __syncwarp();\nelse __syncthreads();", r"but thread 0 waits at trial.cu:4"),
    "lane": ("__shfl_sync(0xffff, 1, 20);", "a lane that its own mask does not name"),
    "source": ("__shfl_sync(threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u, 1, 20);", "from a lane that does not"),
    "index": (ROOM + "room[threadIdx.x + 1] = 1;", r"thread 63 of block \(0, 0\): trial.cu:4: an index outside an array"),
    "alignment": ("*(uint4*)(a.y + 4) = make_uint4(1, 2, 3, 4);", "not aligned as its type asks"),
    "shift": (HERE + "((u32*)a.y)[i] = 1u << a.n;", "a shift by as many bits"),
    "division": (HERE + "((i64*)a.y)[i / 2] = i / (a.n - 64);", "a division by zero"),
    "matrix": ("u32 v[4];\nload_transposed(v, (const void*)a.x);", "what is not shared memory"),
    "stack": ("*(int*)a.y = deep((int*)a.x);", "of stack"),
    "first": ("*(int*)a.y = (int)threadIdx.x;", "bytes depend on the order of threads.*, 0 bytes behind"),
    "blocks": ("*(int*)a.y = (int)blockIdx.x;", "depend on the order"),
    "added": ("float* y = (float*)a.y;\n*y = *y * 1.5f + threadIdx.x;", "depend on the order"),
    "no barrier": (ROOM + "room[threadIdx.x] = 1;\n((int*)a.y)[threadIdx.x] = room[63 - threadIdx.x];", "depend on"),
    "unwritten": (ROOM + "((int*)a.y)[threadIdx.x] = room[threadIdx.x];", "depend on the order"),
}  # fmt: skip
DEEP = "__noinline__ int deep(int* p) { int more[4096]; for (int& m : more) m = *p; return deep(more) + more[*p]; }"


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(driver: EmulatedDriver, what: str) -> None:
    body, said = WRONG[what]
    with pytest.raises(EmulationError, match=f"trial: .*{said}"):
        zeros, grid = np.zeros(64, np.int32), Grid(2 if what == "blocks" else 1, 1, 64)
        run(driver, body, zeros, zeros, grid, DEEP)
    y = run(driver, HERE + "((int*)a.y)[i] = 1;", NONE, np.zeros(64, np.int32), Grid(1, 1, 64))
    assert y.all(), "it goes on"


@pytest.mark.skipif(GARBAGE not in kernel_options(compiler()[0]), reason="the compiler leaves variables as they are")
def test_a_variable_without_content_is_not_zero(driver: EmulatedDriver) -> None:
    body = "volatile float sums[4];\nfor (int i = 0; i < 4; i++) ((float*)a.y)[i] = sums[i];"
    got = run(driver, body, NONE, np.zeros(4, np.float32), Grid(1, 1, 1))
    assert (np.abs(got) > 1e30).all() or np.isnan(got).all()


def test_what_is_synchronised_is_right(driver: EmulatedDriver) -> None:
    body = ROOM + """
        room[threadIdx.x] = (int)threadIdx.x;
        __syncthreads();
        ((int*)a.y)[threadIdx.x] = room[63 - threadIdx.x];
    """
    assert list(run(driver, body, NONE, np.zeros(64, np.int32), Grid(1, 1, 64))) == list(range(64))[::-1]


def test_a_kernel_has_no_more_threads_than_it_is_for(driver: EmulatedDriver) -> None:
    for grid in (Grid(1, 1, 512), Grid(0, 1, 32), Grid(1, 1 << 16, 32)):
        with pytest.raises(EmulationError, match="at most 256 threads"):
            run(driver, "", NONE, NONE, grid)


# -- the stream --------------------------------------------------------------------------------------------------------


def test_the_stream_does_things_when_somebody_looks(driver: EmulatedDriver) -> None:
    room, back = driver.staging(8), driver.staging(8)
    room[:] = b"too soon"
    address = driver.alloc(8)
    driver.upload(address, room)
    driver.download(back, address)
    room[:] = b"on time."
    done, before = driver.record(), bytes(back)
    assert not done() and bytes(back) == before  # the upload; the next look does the download
    assert done() and bytes(back) == b"on time."


def test_what_is_captured_is_done_again(driver: EmulatedDriver) -> None:
    room, back, address = driver.staging(4), driver.staging(4), driver.alloc(4)

    def work() -> None:
        driver.upload(address, room)
        driver.download(back, address)

    captured = driver.capture(work)
    for text in (b"once", b"more"):
        room[:] = text
        captured.launch()
        driver.synchronize()
        assert bytes(back) == text
    for wrong in (lambda: driver.alloc(4), driver.synchronize, driver.record):
        with pytest.raises(EmulationError, match="captured"):
            driver.capture(wrong)


def test_memory_is_counted_and_guarded(driver: EmulatedDriver) -> None:
    free, total = driver.memory()
    assert free == total == 64 << 20
    with pytest.raises(OutOfMemory) as caught:
        driver.alloc(total + 1)
    assert (caught.value.need_bytes, caught.value.free_bytes) == (total + 1, total)
    address = driver.alloc(100)
    assert address % 16 == 0 and driver.memory()[0] == total - 100
    driver.fill(address, 1, 101)
    with pytest.raises(EmulationError, match="101 bytes"):
        driver.synchronize()
    driver.fill(address, 1, 100)
    driver.free(address)  # what is on the stream may still use it
    with pytest.raises(EmulationError, match="nothing to free"):
        driver.free(address)
    driver.synchronize()
    driver.fill(address, 1, 100)
    with pytest.raises(EmulationError):
        driver.synchronize()
    assert driver.memory()[0] == total
    driver.alloc(total)


def test_a_copy_does_not_overlap(driver: EmulatedDriver) -> None:
    address = driver.alloc(100)
    driver.copy(address, address + 50, 50)
    driver.synchronize()
    driver.copy(address, address + 50, 51)
    with pytest.raises(EmulationError):
        driver.synchronize()
