"""What goes away comes back, and what is known is said: real processes that are suspended, killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ggmq.cluster import NOTED_S, connect, local_bus
from protocol import limits
from protocol.errors import DeadlineExceeded, Unavailable
from tests.support.fixtures import free_port
from tests.support.processes import GGMQ, WORKER, await_devices, children_of, read_some, started, until

pytestmark = pytest.mark.usefixtures("kernels")
RUN = [*GGMQ, "run", "-p", "Once upon a time", "--temp", "0", "--ignore-eos"]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}


def text_of(n: int) -> bytes:
    """What `RUN -n N` prints when nothing happens."""
    return subprocess.run([*RUN, "-n", str(n), "--workers", "1"], capture_output=True, check=True).stdout


@contextmanager
def bus(*worker_options: str) -> Iterator[tuple[str, list[str], subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """A broker of its own with a worker that dials in: endpoint, how the broker is started, and both processes."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    broker = [*GGMQ, "broker", "--listen", endpoint, "--insecure"]
    worker = [*WORKER, "--broker", endpoint, "-d", "CPU", "-t", "1", "--insecure", *worker_options]
    with started(broker) as b, started(worker, stderr=subprocess.DEVNULL) as w:
        await_devices(endpoint, 1)
        yield endpoint, broker, b, w


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_sleeps_is_waited_for_and_the_text_is_the_same(stage: int) -> None:
    with started([*RUN, "-n", "300", "--workers", "2"], **PIPES) as p:
        got = read_some(p, 50)
        worker = sorted(children_of(p.pid))[stage]
        os.kill(worker, signal.SIGSTOP)
        time.sleep(6.5)  # longer than a worker waits for another to take what it hands over
        os.kill(worker, signal.SIGCONT)
        out, err = p.communicate(timeout=60)
    assert p.returncode == 0, err.decode()
    assert got + out == text_of(300)


def test_a_chat_goes_on_after_its_worker_slept() -> None:
    command = [*GGMQ, "run", "-cnv", "--temp", "0", "-n", "8", "--workers", "1"]
    texts = []
    for pause_s in (0.0, 3.0):
        with started(command, stdin=subprocess.PIPE, **PIPES) as p:
            assert p.stdin is not None
            p.stdin.write(b"Once upon\n")
            got = b""
            while not got.endswith(b"\n"):
                got += read_some(p, 1)
            # besides the worker there is the process that renders the template
            (worker,) = (c for c in children_of(p.pid) if b"workers" in Path(f"/proc/{c}/cmdline").read_bytes())
            os.kill(worker, signal.SIGSTOP)
            time.sleep(pause_s)
            if not pause_s:
                os.kill(worker, signal.SIGCONT)
            p.stdin.write(b"The dog\n")
            p.stdin.close()
            p.stdin = None
            time.sleep(pause_s / 4)
            os.kill(worker, signal.SIGCONT)
            out, err = p.communicate(timeout=60)
            assert p.returncode == 0, err.decode()
            texts.append(got + out)
    assert texts[0] == texts[1]
    assert b"answers nothing; waiting" in err


def test_a_run_that_slept_itself_goes_on() -> None:
    with started([*RUN, "-n", "300"], **PIPES) as p:
        got = read_some(p, 50)
        p.send_signal(signal.SIGSTOP)
        time.sleep(limits.PEER_SILENCE_S + 2)
        p.send_signal(signal.SIGCONT)
        out, err = p.communicate(timeout=60)
    assert p.returncode == 0, err.decode()
    assert got + out == text_of(300)


def test_a_child_that_is_killed_while_it_sleeps_is_missed_at_once() -> None:
    with started([*RUN, "-n", "300"], **PIPES) as p:
        got = read_some(p, 50)
        worker = children_of(p.pid)[0]
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.7)  # a PING is unanswered by now
        os.kill(worker, signal.SIGKILL)
        start = time.monotonic()
        out, err = p.communicate(timeout=30)
        assert time.monotonic() - start < 10
    assert p.returncode == 0 and got + out == text_of(300), err.decode()


def test_ending_does_not_wait_for_a_worker_that_sleeps() -> None:
    with started([*RUN, "-n", "5000", "-c", "8192"], **PIPES) as p:
        read_some(p, 50)
        for worker in children_of(p.pid):
            os.kill(worker, signal.SIGSTOP)
        time.sleep(0.5)
        p.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, err = p.communicate(timeout=30)
        assert time.monotonic() - start < 10
    assert p.returncode == 130 and b"interrupted" in err


def test_a_broker_that_is_killed_is_missed_at_once_and_goes_on_where_it_was_when_it_is_back() -> None:
    with bus() as (endpoint, command, broker, worker):
        run = [*RUN, "--broker", endpoint, "--insecure"]
        with started([*run, "-n", "300"], **PIPES) as p:
            got = read_some(p, 50)
            broker.kill()
            time.sleep(2)
            with started(command):
                out, err = p.communicate(timeout=60)
        assert p.returncode == 0 and got + out == text_of(300), err.decode()
        assert b"the broker closed the connection; it was stopped or killed; waiting for it" in err
        for _ in range(2):
            with started(command) as again:
                await_devices(endpoint, 1)
                done = subprocess.run([*run, "-n", "20"], capture_output=True, check=False)
                assert done.returncode == 0, done.stderr.decode()
                assert done.stdout == text_of(20)
                again.kill()
        assert worker.poll() is None


def test_a_broker_that_sleeps_is_waited_for_and_a_note_says_so() -> None:
    with bus() as (endpoint, _, broker, _):
        with started([*RUN, "--broker", endpoint, "--insecure", "-n", "300"], **PIPES) as p:
            got = read_some(p, 50)
            broker.send_signal(signal.SIGSTOP)
            time.sleep(NOTED_S + 2)
            broker.send_signal(signal.SIGCONT)
            out, err = p.communicate(timeout=60)
        assert p.returncode == 0, err.decode()
        assert got + out == text_of(300)
        assert err.count(b"the broker answers nothing; waiting for it") == 1


@pytest.mark.parametrize("connect_s", [1.5, 10.0], ids=["one try", "tried again"])
def test_a_run_that_begins_while_its_broker_sleeps_waits_for_it(monkeypatch: pytest.MonkeyPatch, connect_s: float) -> None:
    """A handshake is given up after some seconds, and begun again."""
    monkeypatch.setattr("ggmq.cluster.CONNECT_S", connect_s)
    notes: list[str] = []
    with bus() as (endpoint, _, broker, _):
        broker.send_signal(signal.SIGSTOP)
        again = threading.Timer(connect_s + 2.5, broker.send_signal, [signal.SIGCONT])
        again.start()
        client = connect(endpoint, None, notes.append)
        client.close()
        again.join()
    assert len(notes) == 1 and f"{endpoint} answers nothing; waiting for it" in notes[0]
    with pytest.raises(DeadlineExceeded, match=r"no reply within"):
        connect(endpoint, None, notes.append)
    assert len(notes) == 1


def test_one_interrupt_ends_a_run_whose_broker_sleeps() -> None:
    with bus() as (endpoint, _, broker, _):
        with started([*RUN, "--broker", endpoint, "--insecure", "-n", "5000", "-c", "8192"], **PIPES) as p:
            read_some(p, 50)
            broker.send_signal(signal.SIGSTOP)
            time.sleep(0.5)
            p.send_signal(signal.SIGINT)
            start = time.monotonic()
            p.communicate(timeout=30)
            assert time.monotonic() - start < 10
        assert p.returncode == 130
        broker.send_signal(signal.SIGCONT)
        await_devices(endpoint, 1)


def test_a_worker_that_dialled_in_and_slept_is_used_again() -> None:
    with bus() as (endpoint, _, _, worker):
        client = connect(endpoint)
        try:
            worker.send_signal(signal.SIGSTOP)
            until(lambda: client.devices()[0].state == "silent")
            worker.send_signal(signal.SIGCONT)
            until(lambda: client.devices()[0].state == "ready")
            assert client.stats(0).device == "CPU" and len(client.devices()) == 1
        finally:
            client.close()


def test_a_worker_that_listens_and_was_started_again_is_used_again() -> None:
    port, endpoint = free_port(), f"tcp://127.0.0.1:{free_port()}"
    worker = [*WORKER, "-p", str(port), "-d", "CPU", "-t", "1", "--insecure"]
    broker = [*GGMQ, "broker", "--listen", endpoint, "--rpc", f"127.0.0.1:{port}", "--insecure"]
    with started(broker):
        for _ in range(3):
            with started(worker) as w:
                await_devices(endpoint, 1)
                run = [*RUN, "--broker", endpoint, "--insecure", "-n", "20"]
                done = subprocess.run(run, capture_output=True, check=False)
                assert done.returncode == 0, done.stderr.decode()
                assert done.stdout == text_of(20)
                w.kill()
                w.wait()
            until(lambda: not subprocess.run([*GGMQ, "status", "--broker", endpoint], capture_output=True).stdout)


def test_a_worker_with_a_name_of_its_own_is_used_by_its_address() -> None:
    port = free_port()
    with started([*WORKER, "-p", str(port), "-d", "CPU", "-t", "1", "--insecure", "--name", "alpha"]):
        run = [*RUN, "--rpc", f"127.0.0.1:{port}", "--insecure", "-n", "5"]
        done = subprocess.run(run, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0 and b"on alpha CPU" in done.stderr, done.stderr.decode()


def test_a_killed_run_leaves_no_folder(tmp_path: Path) -> None:
    with started([*RUN, "-n", "5000", "-c", "8192"], **PIPES, env={**os.environ, "TMPDIR": str(tmp_path)}) as p:
        read_some(p, 50)
        assert list(tmp_path.glob("ggmq-*"))
        p.kill()
        until(lambda: not list(tmp_path.glob("ggmq-*")))
    (tmp_path / f"ggmq-{p.pid}-left").mkdir()
    done = subprocess.run([*RUN, "-n", "1"], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, check=False)
    assert done.returncode == 0 and not list(tmp_path.iterdir())


def test_what_a_killed_client_held_is_free_for_the_next_one() -> None:
    port = free_port()
    with started([*WORKER, "-p", str(port), "-d", "CPU", "-t", "1", "--insecure", "-m", "64"]):
        rpc = ["--rpc", f"127.0.0.1:{port}", "--insecure", "-c", "8192"]
        for _ in range(3):
            with started([*RUN, "-n", "5000", *rpc], **PIPES) as p:
                read_some(p, 50)
                p.kill()
        with local_bus() as b:
            b.add_remote(f"127.0.0.1:{port}")
            client = b.start()
            until(lambda: client.stats(0).n_sessions == 0)


def test_the_client_of_a_broker_that_is_gone_says_so_at_every_request() -> None:
    with bus() as (endpoint, _, broker, _):
        client = connect(endpoint)
        try:
            assert client.devices()
            broker.kill()
            for _ in range(3):
                with pytest.raises(Unavailable, match="broker closed"):
                    client.devices()
        finally:
            client.close()
