"""`ggmq top`: what it shows of a server and of a broker, on terminals of any kind, and when nobody answers."""

from __future__ import annotations

import io
import os
import signal
import subprocess

import msgspec
import pytest
from rich.console import Console

from ggmq.cli import main
from ggmq.cli.topview import Seen, drawn
from ggmq.cluster import local_bus
from ggmq.overview import (
    ClusterState,
    DeviceState,
    HeldLayers,
    HostState,
    ModelState,
    Queue,
    Rates,
    SlotView,
    WorkerState,
)
from tests.support.processes import GGMQ, until
from tests.support.serving import serving
from tests.support.terminal import Terminal


def state(n_computes: int, lost: bool = False) -> ClusterState:
    wire = (1000 * n_computes, 500 * n_computes, 250 * n_computes)
    device = DeviceState(0, "CPU", "cpu", "", 8 << 30, 2 << 30, 1 << 30, n_computes, *wire,
                         [HeldLayers("stories", 0, 3, True, True, 1, 1)])  # fmt: skip
    gone = msgspec.structs.replace(device, index=1)
    workers = [WorkerState("den", "10.0.0.2:50052", "ready", 0.4, [device]),
               WorkerState("attic\x1b[2J", "10.0.0.3:50052", "lost" if lost else "ready", 3.0, [gone])]  # fmt: skip
    slots = [SlotView("stories", i, "decode" if i < 2 else "idle", 10, 10, 20, 512, 1.5, 0.0) for i in range(64)]
    return ClusterState([ModelState("stories", "stories.gguf", 4, 512, 1_800_000, 3_600_000)], [HostState("home", workers)],
                        Rates(40.0, 60.0), Queue(3, 256), slots, 3725.0, "")  # fmt: skip


def frame(seen: Seen, width: int, colours: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=colours, color_system="standard" if colours else None)
    console.print(drawn(seen, 20.0, width))
    return out.getvalue()


def test_figures_are_differences_over_time() -> None:
    seen = Seen("http://x", True)
    seen.heard(10.0, state(1000))
    seen.heard(12.0, state(1200))
    text = frame(seen, 120)
    assert "up 1:02:05" in text and "made 60.0 tokens/s, read 40.0" in text and "slots 2 of 64, waiting 3 of 256" in text
    # each of two devices moved 1000 + 500 - 250 bytes for each of 100 runs a second
    assert "2.5 kB a token" in text and "125 kB" in text and "62 idle" in text and "0-3+emb+out" in text
    seen.heard(13.0, state(0))  # a worker that was started again counts from the beginning
    assert "- a token" not in frame(seen, 120) and "0 B a token" in frame(seen, 120)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_frame_fits_and_names_the_lost(width: int) -> None:
    seen = Seen("http://x", True)
    seen.heard(10.0, state(1, lost=True))
    plain = frame(seen, width)
    assert all(len(line) <= width for line in plain.splitlines()) and "lost" in plain and "\x1b" not in plain
    if width >= 80:
        assert "6.4 GB/8.6 GB" in plain and "125" not in plain
    coloured = next(line for line in frame(seen, width, True).splitlines() if "lost" in line)
    assert "\x1b[1;31m" in coloured and "[2J" not in coloured.replace("\\x1b[2J", "")
    seen.error = "connection refused"
    assert "no answer for 10 s, trying on: connection refused" in frame(seen, 200)


def test_a_server_is_shown_and_its_loss_said() -> None:
    with serving("--temp", "0", "--workers", "2", "--api-key", "secret") as server:
        once = [*GGMQ, "top", "--url", server.url, "--once"]
        refused = subprocess.run(once, capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode == 2 and "--api-key" in refused.stderr
        shown = subprocess.run([*once, "--api-key", "secret"], capture_output=True, text=True, timeout=60, check=True,
                               env={**os.environ, "COLUMNS": "80"}).stdout  # fmt: skip
        assert "local0" in shown and "0-1+emb" in shown and "2-3+out" in shown and "\x1b" not in shown
        assert all(len(line) <= 80 for line in shown.splitlines())
        with Terminal([*GGMQ, "top", "--url", server.url, "--api-key", "secret", "-d", "0.2"]) as t:
            t.until("4 idle")
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            t.until("no answer for")
            t.until("trying on")
            t.type("q")
            assert t.ended() == 0
    gone = subprocess.run(once, capture_output=True, text=True, timeout=60, check=False)
    assert gone.returncode == 1 and "refused" in gone.stderr and "Traceback" not in gone.stderr


def test_what_is_no_server_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--url", "nowhere", "--once"]) == 2
    assert main(["top", "--url", "http://127.0.0.1:1", "--once"]) == 1
    assert "--url nowhere" in (said := capsys.readouterr().err) and "refused" in said


def test_a_broker_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with local_bus(listen="tcp://127.0.0.1:0") as bus:
        bus.spawn("CPU", 1)
        client = bus.start()
        until(lambda: any(d.state == "ready" for d in client.devices()), 30)
        endpoint = next(e for e in bus.broker.endpoints if e.startswith("tcp://"))
        assert main(["top", "--broker", endpoint, "--insecure", "--once"]) == 0
    shown = capsys.readouterr().out
    assert endpoint in shown and "local0" in shown and "computes/s" in shown and "tokens/s" not in shown
