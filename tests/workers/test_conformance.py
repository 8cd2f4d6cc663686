"""One suite for every device: each op against the NumPy definition, through a real worker process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from ggmq.cluster import Client
from ggmq.replay import nmse, replay
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.encoding import encode_graph, graph_digest
from protocol.graph import Graph
from protocol.ops import COPYABLE, OPS
from tests.support import cuda_emulated, gpu
from tests.support.fixtures import OPS as RECORDED
from tests.support.fixtures import ROOT
from tests.support.strategies import leaf, node_graphs
from workers.devices.reference import ReferenceDevice
from workers.kernels.reference import KERNELS

REFERENCE = ReferenceDevice()


def test_every_op_of_the_table_has_a_reference_kernel_and_no_other_does() -> None:
    assert set(KERNELS) == {o.name for o in OPS.values() if not o.view and o.name != "NONE"}


@given(node_graphs())
@settings(max_examples=150)
def test_a_node_agrees_with_its_definition(bus: Client, case: tuple[str, Graph, list[bytes]]) -> None:
    name, graph, inputs = case
    frame = encode_graph(graph)
    digest = graph_digest(frame)
    bus.request(m.GraphPut(bus.session, digest), [frame])
    reply = bus.request(m.GraphCompute(bus.session, digest, len(inputs)), inputs)
    expected = REFERENCE.compile(graph, {}).run(inputs, lambda: None)[0]
    kind = np.int32 if graph.tensors[-1].type == GGMLType.I32 else np.float32
    got, want = (np.frombuffer(b, kind).astype(np.float64) for b in (reply.payload[0], expected))
    bound = max(OPS[name].nmse, 1e-12 if kind == np.int32 else 1e-7)
    assert nmse(got, want) <= bound, name


def test_a_device_says_what_it_can_run(bus: Client, device: str) -> None:
    header = bus.request(m.DeviceQuery(abilities=True)).header
    assert isinstance(header, m.DeviceList)
    (said,) = header.devices
    assert {*said.fast_ops, *said.slow_ops} == set(KERNELS) and not {*said.fast_ops} & {*said.slow_ops}
    assert {*said.fast_types, *said.slow_types} == {int(t) for t in COPYABLE}
    assert bool(said.fast_ops and said.fast_types) == (device in ("CPU", cuda_emulated.NAME, gpu.NAME))


@pytest.mark.parametrize("file", RECORDED)
def test_recorded_graphs_agree(bus: Client, shared: Path, file: str) -> None:
    results = list(replay(bus, shared / "ops" / file))
    assert results and [r for r in results if not r.ok and not r.skipped] == []


def test_recorded_scans_agree(bus: Client) -> None:
    results = list(replay(bus, ROOT / "tests" / "data" / "ssm_scan.msgpack"))
    assert results and [r for r in results if not r.ok] == []


def test_concat_in_every_dimension(bus: Client) -> None:
    rng = np.random.default_rng(3)
    for dim in range(4):
        a, b = [2, 3, 4, 2], [2, 3, 4, 2]
        b[dim] = 5
        x, y = (rng.standard_normal(s[::-1], np.float32) for s in (a, b))
        out = [p + q if i == dim else p for i, (p, q) in enumerate(zip(a, b, strict=True))]
        node = replace(leaf(0, tuple(out)), op="CONCAT", src=(0, 1), params=(dim, *(0,) * 15))
        graph = Graph((leaf(0, tuple(a)), leaf(0, tuple(b)), node), (0, 1), (2,))
        frame = encode_graph(graph)
        bus.request(m.GraphPut(bus.session, graph_digest(frame)), [frame])
        reply = bus.request(m.GraphCompute(bus.session, graph_digest(frame), 2), [x.tobytes(), y.tobytes()])
        want = np.concatenate([x, y], 3 - dim)
        assert np.array_equal(np.frombuffer(reply.payload[0], np.float32).reshape(want.shape), want)


def test_no_kernel_is_compiled_while_a_graph_runs(bus: Client, device: str) -> None:
    """The CPU has them all before its first graph; a CUDA device has those of a graph when it has been put."""
    ne = (96, 3, 1, 1)
    scaled = replace(leaf(0, ne), op="SCALE", src=(0,), params=(0x3F000000, *(0,) * 15))
    graph = Graph((leaf(0, ne), scaled, replace(scaled, op="ADD", src=(1, 0))), (0,), (2,))
    frame, x = encode_graph(graph), np.ones(96 * 3, np.float32)
    bus.request(m.GraphPut(bus.session, graph_digest(frame)), [frame])
    before = bus.stats(0).kernel_compiles
    for _ in range(3):
        reply = bus.request(m.GraphCompute(bus.session, graph_digest(frame), 1), [x.tobytes()])
        assert np.array_equal(np.frombuffer(reply.payload[0], np.float32), 1.5 * x)
    assert bus.stats(0).kernel_compiles == before
    assert before == 0 or device != "CPU"
