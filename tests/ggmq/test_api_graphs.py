"""Graphs on a device from Python, against NumPy: shapes as NumPy has them, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggmq

Array = npt.NDArray[np.float32]
EPS = 1e-5


@pytest.fixture(scope="module")
def device() -> Iterator[ggmq.Device]:
    with ggmq.local_cluster(workers=1, threads=1) as cluster:
        yield cluster.device("CPU")


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


OPS: list[tuple[str, Any, Any]] = [
    ("add", lambda g, x, y: g.add(x, y), lambda x, y: x + y),
    ("sub", lambda g, x, y: g.op("SUB", x, y), lambda x, y: x - y),
    ("mul and div", lambda g, x, y: g.div(g.mul(x, y), y), lambda x, y: x),
    ("silu", lambda g, x, y: g.unary("SILU", x), lambda x, y: x / (1 + np.exp(-x))),
    ("tanh", lambda g, x, y: g.op("TANH", x), lambda x, y: np.tanh(x)),
    ("rms_norm", lambda g, x, y: g.rms_norm(x, EPS), lambda x, y: x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)),
    ("norm", lambda g, x, y: g.op("NORM", x, eps=EPS),
     lambda x, y: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)),
    ("soft_max", lambda g, x, y: g.soft_max(x), lambda x, y: softmax(x)),
    ("scaled soft_max", lambda g, x, y: g.op("SOFT_MAX", x, scale=0.5), lambda x, y: softmax(x * np.float32(0.5))),
    ("sum_rows", lambda g, x, y: g.sum_rows(x), lambda x, y: x.sum(-1, keepdims=True)),
    ("cumsum", lambda g, x, y: g.op("CUMSUM", x), lambda x, y: x.cumsum(-1)),
    ("swiglu", lambda g, x, y: g.glu("SWIGLU", x, x), lambda x, y: x / (1 + np.exp(-x)) * x),
    ("concat", lambda g, x, y: g.concat(x, x, 0), lambda x, y: np.concatenate([x, x], -1)),
    ("cont", lambda g, x, y: x, lambda x, y: x),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "expected"), [o[1:] for o in OPS], ids=[o[0] for o in OPS])
@given(shape=st.lists(st.sampled_from([1, 2, 3, 32]), min_size=1, max_size=4), seed=st.integers(0, 99), row=st.booleans())
def test_ops_are_numpys(device: ggmq.Device, recipe: Any, expected: Any, shape: list[int], seed: int, row: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, np.float32)
    y = rng.uniform(0.5, 2, shape[-1:] if row else shape).astype(np.float32)
    got = device.run(recipe, x=x, y=y)
    want = expected(x, y)
    assert got.shape == want.shape and got.dtype == np.float32 and np.allclose(got, want, 1e-4, 1e-5)


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([1, 7, 32, 64]), st.booleans(), st.integers(0, 99))
def test_products(device: ggmq.Device, m: int, n: int, k: int, half: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((m, k)).astype(np.float16 if half else np.float32)
    x = rng.standard_normal((n, k), np.float32)
    got = device.run(lambda g, w, x: g.mul_mat(w, x), w=w, x=x)
    assert got.shape == (n, m) and np.allclose(got, x @ w.astype(np.float32).T, 2e-2, 2e-2 * k**0.5)
    assert device.run(lambda g, w, x: g.mul_mat(w, x), w=w, x=x[0]).shape == (m,)


def test_several_results_whole_numbers_and_views(device: ggmq.Device) -> None:
    x = np.random.default_rng(1).standard_normal((3, 4, 32), np.float32)
    got = device.run(lambda g, x, ids: {
        "turned": g.permute(x, 1, 0, 2, 3), "flat": g.reshape(x, 32 * 4 * 3), "same": x, "again": x,
        "rows": g.get_rows(g.reshape(x, 32, 12), ids), "best": g.argmax(g.reshape(x, 32, 12)),
    }, x=x, ids=np.array([5, 0, 5]))  # fmt: skip
    flat = x.reshape(12, 32)
    assert list(got) == ["turned", "flat", "same", "again", "rows", "best"]
    assert (got["turned"] == x.transpose(0, 2, 1)).all() and (got["flat"] == x.ravel()).all()
    assert (got["same"] == x).all() and (got["again"] == x).all() and (got["rows"] == flat[[5, 0, 5]]).all()
    assert got["best"].dtype == np.int32 and (got["best"] == flat.argmax(-1)).all()


def test_arrays_need_not_be_contiguous_and_may_be_float64(device: ggmq.Device) -> None:
    x = np.arange(24.0).reshape(4, 6)
    got = device.run(lambda g, x: g.scale(x, 2.0, 1.0), x=x.T[::-1])
    assert got.dtype == np.float32 and (got == x.T[::-1] * 2 + 1).all() and got.flags.writeable


def test_large_arrays_leave_nothing_behind(device: ggmq.Device) -> None:
    client = device._opened.bus.client
    rng = np.random.default_rng(2)
    w, x = rng.standard_normal((1100, 1024), np.float32), rng.standard_normal((300, 1024), np.float32)
    got = device.run(lambda g, w, x: g.mul_mat(w, x), w=w, x=x)
    assert np.allclose(got, x @ w.T, 2e-2, 0.1)
    with pytest.raises(ggmq.DeviceError):
        device.run(lambda g, w, ids: g.get_rows(w, ids), w=w, ids=np.array([10**6]))
    stats = client.stats(device.index)
    assert stats.n_buffers == 0 == stats.buffer_bytes


def test_what_does_not_go_together_is_refused(device: ggmq.Device) -> None:
    x = np.zeros((3, 32), np.float32)
    for recipe, arrays, says in (
        (lambda g, x: g.add(x, x), {"y": x}, "its inputs are not the arrays that came"),
        (lambda g, x: g.op("FOO", x), {"x": x}, "there is no op 'FOO'"),
        (lambda g, x: g.op("SILU", x, slope=1), {"x": x}, "slope: SILU has no such parameter"),
        (lambda g: g.op("ARANGE", start=0, stop=3, step=1), {}, "ne: expected the shape"),
        (lambda g, x: None, {"x": x}, "expected a tensor, got None"), (lambda g, x: {}, {"x": x}, "got none"),
        (lambda g, x: x, {"x": x.astype(np.complex64)}, "x: expected an array of float32"),
        (lambda g, x: x, {"x": np.array(["a"])}, "x: expected an array"), (lambda g, x: x, {"x": 1.0}, "dimensions"),
        (lambda g, x: x, {"x": x[:0]}, "none of them 0"), (lambda g, x: x, {"x": np.array([1 << 40])}, "32 bits"),
        ("ADD", {"x": x}, "expected a function"),
    ):  # fmt: skip
        with pytest.raises(ggmq.InvalidValue, match=says):
            device.run(recipe, **arrays)  # type: ignore[arg-type]
    with pytest.raises(ggmq.ProtocolError, match="does not repeat to"):
        device.run(lambda g, x, y: g.add(x, y), x=x, y=x[:2, :5])
    assert (device.run(lambda g: g.op("ARANGE", ne=(3,), start=0, stop=3, step=1)) == [0, 1, 2]).all()
