"""Convolutions and scans over tokens: against sums written out, and cut anywhere."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from protocol.dtypes import GGMLType
from protocol.errors import GraphError, KernelError
from protocol.graph import Graph, Shape
from protocol.validation import validate
from tests.support.strategies import leaf
from workers.devices.reference import ReferenceDevice
from workers.kernels.recurrent import causal_conv, selective_scan

RNG = np.random.default_rng(4)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def test_a_convolution_sees_a_token_and_those_before_it() -> None:
    x, w = normal(2, 3, 3 + 5), normal(3, 4)
    y = causal_conv(x, w)
    for s in range(2):
        for t in range(5):
            for c in range(3):
                assert math.isclose(y[s, t, c], sum(x[s, c, t + k] * w[c, k] for k in range(4)), rel_tol=1e-12)


@pytest.mark.parametrize(("n_group", "per_state"), [(1, False), (2, False), (4, True)])
def test_a_scan_is_the_recurrence_written_out(n_group: int, per_state: bool) -> None:
    n_seqs, n_tokens, n_head, d_head, d_state = 2, 4, 4, 3, 5
    state, x, dt = normal(n_seqs, n_head, d_head, d_state), normal(n_seqs, n_tokens, n_head, d_head), normal(2, 4, 4) * 9
    a = -np.exp(normal(n_head, d_state if per_state else 1))
    b, c = normal(n_seqs, n_tokens, n_group, d_state), normal(n_seqs, n_tokens, n_group, d_state)
    y, states = selective_scan(state, x, dt, a, b, c, 2)
    for s in range(n_seqs):
        for head in range(n_head):
            group = head * n_group // n_head
            for i in range(d_head):
                h, seen = list(state[s, head, i]), []
                for t in range(n_tokens):
                    d = math.log1p(math.exp(dt[s, t, head]))
                    for j in range(d_state):
                        decay = math.exp(d * a[head, j if per_state else 0])
                        h[j] = decay * h[j] + d * x[s, t, head, i] * b[s, t, group, j]
                    seen.append(list(h))
                    total = sum(h[j] * c[s, t, group, j] for j in range(d_state))
                    assert math.isclose(y[s, t, head, i], total, rel_tol=1e-5, abs_tol=1e-5)
                assert np.allclose(states[:, s, head, i], [seen[-1], seen[-2]], 1e-5, 1e-5)


@pytest.mark.parametrize("cut", range(1, 9))
def test_where_a_text_is_cut_changes_no_bit(cut: int) -> None:
    state = normal(3, 2, 4, 16).astype(np.float32)
    x, dt, a = normal(3, 9, 2, 4), normal(3, 9, 2), -np.exp(normal(2, 1))
    b, c = normal(3, 9, 1, 16), normal(3, 9, 1, 16)
    whole, end = selective_scan(state, x, dt, a, b, c, 1)
    first, between = selective_scan(state, x[:, :cut], dt[:, :cut], a, b[:, :cut], c[:, :cut], 1)
    second, last = selective_scan(between[0].astype(np.float32), x[:, cut:], dt[:, cut:], a, b[:, cut:], c[:, cut:], 1)
    assert np.array_equal(np.concatenate([first, second], 1), whole) and np.array_equal(last, end)


def test_who_else_is_in_the_batch_changes_no_bit() -> None:
    state, x, dt, a = normal(3, 2, 4, 16), normal(3, 9, 2, 4), normal(3, 9, 2), -np.exp(normal(2, 1))
    b, c = normal(3, 9, 1, 16), normal(3, 9, 1, 16)
    y, states = selective_scan(state, x, dt, a, b, c, 1)
    for s in range(3):
        one = slice(s, s + 1)
        alone, end = selective_scan(state[one], x[one], dt[one], a, b[one], c[one], 1)
        assert np.array_equal(alone[0], y[s]) and np.array_equal(end[0, 0], states[0, s])


SHAPES: list[Shape] = [(16, 4, 2, 5), (4, 2, 3, 2), (2, 3, 2, 1), (1, 2, 1, 1), (16, 1, 3, 2), (16, 1, 3, 2), (2, 1, 1, 1)]
"""Of the sources of a scan."""


def scan(shapes: list[Shape], n_out: int = 48 + 256, n_states: int = 0) -> Graph:
    kinds = [GGMLType.F32] * 6 + [GGMLType.I32]
    leaves = [leaf(kind, ne) for kind, ne in zip(kinds, shapes, strict=True)]
    out = replace(leaf(GGMLType.F32, (n_out, 1, 1, 1)), op="SSM_SCAN", src=tuple(range(7)), params=(n_states, *(0,) * 15))
    return Graph((*leaves, out), tuple(range(7)), (7,))


def test_an_unset_number_of_states_is_one() -> None:
    validate(scan(SHAPES))
    validate(scan(SHAPES, n_states=1))
    validate(scan(SHAPES, 48 + 2 * 256, n_states=2))
    for n_out, n_states in ((48, 0), (48 + 256, 2), (48 + 256, -1)):
        with pytest.raises(GraphError):
            validate(scan(SHAPES, n_out, n_states))


@pytest.mark.parametrize(("i", "ne"), [(0, (16, 5, 2, 5)), (1, (4, 2, 4, 2)), (2, (2, 3, 1, 1)), (3, (2, 2, 1, 1)),
                                       (4, (16, 2, 3, 2)), (5, (8, 1, 3, 2)), (6, (1, 1, 1, 1)),
                                       (6, (2, 2, 1, 1))])  # fmt: skip
def test_a_scan_of_shapes_that_do_not_fit_is_refused(i: int, ne: Shape) -> None:
    with pytest.raises(GraphError):
        validate(scan([*SHAPES[:i], ne, *SHAPES[i + 1 :]]))


def test_groups_divide_the_heads() -> None:
    three = [(16, 3, 3, 2) if i in (4, 5) else ne for i, ne in enumerate(SHAPES)]
    with pytest.raises(GraphError, match="2 heads do not divide into 3 groups"):
        validate(scan(three))


@pytest.mark.parametrize("slot", [-1, 5])
def test_a_state_that_is_not_there_is_refused(slot: int) -> None:
    g = scan(SHAPES)
    data = [np.zeros(t.n_elements, np.float32).tobytes() for t in g.tensors[:6]]
    with pytest.raises(KernelError, match=f"expected indices of 0 to 4, got {slot}"):
        ReferenceDevice().compile(g, {}).run([*data, np.array([1, slot], np.int32).tobytes()], lambda: None)
