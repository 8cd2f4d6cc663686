"""`ggmq trace`: a file that holds every stage and kernel, nested right, within the time that passed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from broker.tracing import Traces as BrokerTraces
from ggmq.cli import main
from ggmq.hub import BUNDLED
from protocol import limits
from protocol import messages as m
from protocol.errors import HandleError, Overloaded, ProtocolError
from protocol.tracing import Noted, TracedCompute, TracedStep, decode_noted, encode_noted
from tests.support.loaded import cpu_workers, loaded
from workers.tracing import Traces

SLACK_US = 0.002
"""Times are nanoseconds, written as fractions of a microsecond."""


def slices_of(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    out = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            out[e["pid"], e["tid"]].append(e)
    return out


def check_nested(slices: list[dict[str, Any]]) -> None:
    """Each slice lies inside the one that is open when it begins, or behind it."""
    stack: list[float] = []
    for e in sorted(slices, key=lambda e: (e["ts"], -e["dur"])):
        assert e["dur"] >= 0, e
        while stack and stack[-1] <= e["ts"] + SLACK_US:
            stack.pop()
        assert not stack or e["ts"] + e["dur"] <= stack[-1] + SLACK_US, e
        stack.append(e["ts"] + e["dur"])


def inside(slices: list[dict[str, Any]], outer: dict[str, Any]) -> list[dict[str, Any]]:
    end = outer["ts"] + outer["dur"] + SLACK_US
    return [e for e in slices if e is not outer and outer["ts"] - SLACK_US <= e["ts"] and e["ts"] + e["dur"] <= end]


@pytest.mark.parametrize("device, streams", [("CPU", 1), ("CPU", 3), ("reference", 1)])
def test_a_file_with_every_hop_queue_step_and_kernel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str, streams: int
) -> None:
    file = tmp_path / "t.json"
    command = ["trace", "-o", str(file), "-n", "5", "--workers", "2", "-dev", device, "--streams", str(streams)]
    assert main([*command, "-p", "Once upon a time there was a dog"]) == 0
    events = json.loads(file.read_text())["traceEvents"]
    by_thread = slices_of(events)
    for slices in by_thread.values():
        check_nested(slices)
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes[1] == "main host" and processes[2].startswith("broker")
    stages = [pid for pid, name in processes.items() if ", layers " in name]
    assert len(stages) == 2
    engine = by_thread[1, 1]
    assert {"step", "schedule", "submit", "wait", "sample"} == {e["name"] for e in engine}
    hops = [e["name"] for e in by_thread[2, 1]]
    n_sent = sum(e["name"] == "submit" for e in engine)
    assert sum("request in" in h for h in hops) == sum("reply out" in h for h in hops) == n_sent >= 5
    layers = set()
    for pid in stages:
        slices = by_thread[pid, 1]
        graphs = [e for e in slices if e["name"] == "graph"]
        waits = [e for (p, tid), waits in by_thread.items() if p == pid and tid > 1 for e in waits]
        assert len(graphs) == n_sent and sum(e["name"] == "wait for its turn" for e in waits) == n_sent
        for graph in graphs:
            kernels = inside(slices, graph)
            assert {"MUL_MAT", "RMS_NORM", "PAGED_ATTN"} <= {e["args"].get("op") for e in kernels}
            assert sum(e["dur"] for e in kernels) <= graph["dur"] + SLACK_US * len(kernels)
            layers |= {w for e in kernels for w in e["name"].split() if w.startswith("blk.")}
    assert {f"blk.{il}.{w}" for il in range(4) for w in ("attn_q", "attn_norm", "ffn_down")} <= layers
    flights = [e for (pid, tid), slices in by_thread.items() if pid == 1 and tid > 1 for e in slices]
    assert len(flights) == n_sent
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines() if " ms " in line and line.startswith("  ")]
    table = lines[: next(i for i, line in enumerate(said.splitlines()) if line.startswith("of the graphs")) - 1]
    shares = sum(float(line[2]) for line in table)
    assert abs(shares - 100) < 1 and "ui.perfetto.dev" in said and any("queue" in line for line in said.splitlines())


def test_what_is_not_traced_notes_nothing_and_bounds_hold() -> None:
    with cpu_workers(1) as client:
        model = loaded(client, BUNDLED, 64)
        device = model.stages[0].assignment.device
        query = m.TraceQuery(client.session, 2)
        client.request(query, device=device)
        client.request(m.TraceQuery(client.session, 2, True))
        for n_past in range(4):
            model.forward([5], n_past, [0])
        for asked in (m.TraceQuery(client.session), m.TraceQuery(client.session, broker=True)):
            noted = decode_noted(client.request(asked, device=device).payload)
            assert (len(noted.computes) or sum(h.from_client for h in noted.hops)) == 2 and noted.n_dropped == 2
            again = decode_noted(client.request(asked, device=device).payload)
            assert not again.computes and not again.hops
        with pytest.raises(HandleError):  # nobody traces another's
            client.request(m.TraceQuery(client.session + 1, 1), device=device)


def test_only_so_many_are_traced_at_once() -> None:
    worker, broker = Traces(), BrokerTraces()
    for i in range(limits.MAX_TRACES):
        worker.ask((b"", i), 1)
        broker.ask(bytes([i]), 1)
    with pytest.raises(Overloaded):
        worker.ask((b"", -1), 1)
    with pytest.raises(Overloaded):
        broker.ask(b"x", 1)
    worker.drop((b"", 0))
    broker.ask(b"\x00", 0)
    worker.ask((b"", -1), 1)
    broker.ask(b"x", 1)


def test_what_a_peer_says_it_noted_is_checked() -> None:
    noted = Noted([TracedCompute(bytes(16), 1, 2, 3, 4, 5, 6, 7, 8, [TracedStep("MUL_MAT", 3, 4, 5)])], [], 1)
    raw = encode_noted(noted)
    assert decode_noted((raw,)).computes[0].steps == noted.computes[0].steps
    for bad in ((), (raw, raw), (raw[:-1],), (raw.replace(b"MUL_MAT", b"MUL\xffMAT"),), (b"\xc1",), (b"\x91" * 100_000,)):
        with pytest.raises(ProtocolError, match="TRACE"):
            decode_noted(bad)
