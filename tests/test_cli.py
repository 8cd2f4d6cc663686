"""The program as a person runs it: real processes, real sockets, real kills."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ggmq.bus import local_threads
from ggmq.cluster import Client
from protocol import messages as m
from protocol.errors import OutOfMemory
from tests.support.fixtures import BUNDLED, ROOT, free_port
from tests.support.gguf_factory import text, tiny_model
from tests.support.random_models import base, write

GGMQ = [sys.executable, "-m", "ggmq"]
WORKER = [sys.executable, "-m", "workers"]
STORY = "Once upon a time, there was a little girl named Lily."


def ggmq(*args: str | Path, stdin: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GGMQ, *map(str, args)], input=stdin, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


class Worker:
    """A listening worker process."""

    def __init__(self, *args: str | Path) -> None:
        self.port = free_port()
        command = [*WORKER, "-p", str(self.port), *map(str, args)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        self.banner = ""
        while "free)" not in self.banner:
            line = self.process.stdout.readline()
            assert line, f"the worker ended: {self.banner}"
            self.banner += line

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    started: list[Worker] = []
    yield started
    for w in started:
        w.stop()


def children_of(pid: int) -> list[int]:
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(p) for p in out.stdout.split()]


def gone(pids: list[int], within_s: float = 5) -> bool:
    due = time.monotonic() + within_s
    while time.monotonic() < due:
        if not any(_running(p) for p in pids):
            return True
        time.sleep(0.05)
    return False


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_first_command_of_the_readme_tells_a_story() -> None:
    r = ggmq("run", "-p", "Once upon a time", "-n", "40", "--temp", "0")
    assert r.returncode == 0, r.stderr
    assert r.stdout.startswith(STORY)
    for word in ("load", "prefill", "decode", "tokens/s", "0-3 + embedding + output on local0 CPU"):
        assert word in r.stderr
    two = ggmq("run", "-p", "Once upon a time", "-n", "40", "--temp", "0", "--workers", "2")
    assert two.stdout == r.stdout
    assert "0-1 + embedding on local0 CPU" in two.stderr and "2-3 + output on local1 CPU" in two.stderr


def test_threads_are_those_of_all_local_workers() -> None:
    base = ("run", "-p", "Tom", "-n", "1", "--temp", "0", "--device", "reference")
    few = ggmq(*base, "-t", "1", "--workers", "1").stderr
    many = ggmq(*base, "-t", "64", "--workers", "2").stderr
    assert "cores" not in few and re.search(r"note    64 threads on \d+ cores: .*use fewer with -t", many), many
    assert [local_threads(n, w) for n, w in ((5, 2), (1, 3), (4, 1))] == [[3, 2], [1, 1, 1], [4]]


def test_the_same_seed_gives_the_same_text() -> None:
    a, b, c = (ggmq("run", "-p", "One day", "-n", "30", "-s", s).stdout for s in ("1", "1", "2"))
    assert a == b != c


def test_the_text_does_not_depend_on_workers_device_or_batch() -> None:
    one = ggmq("run", "-p", STORY, "-n", "30", "--temp", "0", "--workers", "1").stdout
    assert one == ggmq("run", "-p", STORY, "-n", "30", "--temp", "0", "--workers", "3", "-b", "3").stdout
    assert one == ggmq("run", "-p", STORY, "-n", "30", "--temp", "0", "--device", "reference").stdout


def test_lines_of_a_pipe_are_turns_of_a_chat_that_is_asked_for() -> None:
    r = ggmq("run", "-cnv", "--temp", "0", "-n", "5", stdin="Once upon\nThe dog\n")
    assert r.returncode == 0 and len(r.stdout.splitlines()) >= 2


def test_info_says_which_keys_are_not_read_and_why_a_file_does_not_run(tmp_path: Path) -> None:
    m = base("qwen2", random.Random(1)).having(expert_weights_scale=2.0, attention__sliding_window=7)
    out = ggmq("info", write(tmp_path / "m.gguf", m)).stdout
    ignored = out.partition("keys that are not read for architecture qwen2\n")[2].partition("tensors by name")[0].split()
    assert "runs as  qwen2" in out and ignored == ["qwen2.expert_weights_scale", "qwen2.attention.sliding_window"]
    m.tensors["blk.0.attn_gate.weight"] = m.tensors["blk.0.attn_q.weight"]
    r = ggmq("info", write(tmp_path / "m.gguf", m))
    assert r.returncode == 0 and "runs as  nothing: m.gguf: tensor blk.0.attn_gate.weight" in r.stdout
    assert "blk.0.attn_gate.weight: F32" in r.stdout


def shown(*args: str | Path) -> bytes:
    """What a run of the bundled model prints before the first token that it makes."""
    run = [*GGMQ, "run", "-n", "1", "--temp", "0", "--workers", "1", *map(str, args)]
    done = subprocess.run(run, capture_output=True, timeout=120, cwd=ROOT, check=True)
    made = subprocess.run([*run, "--no-display-prompt"], capture_output=True, timeout=120, cwd=ROOT, check=True)
    return done.stdout.removesuffix(made.stdout)


def test_a_prompt_from_a_file_loses_one_newline_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"One\r\nday\n\n")
    assert shown("-f", tmp_path / "p.txt") == b"One\r\nday\n"
    (tmp_path / "p.txt").write_bytes(rb"One\tday\x21" + b"\xff")
    assert shown("-f", tmp_path / "p.txt") == "One\tday!\ufffd".encode()
    assert shown("--no-escape", "-f", tmp_path / "p.txt") == rb"One\tday\x21" + "\ufffd".encode()
    r = ggmq("run", "-f", tmp_path / "none.txt")
    assert r.returncode == 2 and f"{tmp_path / 'none.txt'}: no such file" in r.stderr and "Traceback" not in r.stderr


def test_escapes_of_a_prompt_are_expanded_unless_said() -> None:
    assert shown("-p", r"a\n\r\t\'\"\\b\x41\xc3\xa9") == b"a\n\r\t'\"\\bA\xc3\xa9"
    assert shown("-e", "-p", r"\q\x4\xg1\\n\\\n\xFF \x") == "\\q\\x4\\xg1\\n\\\n\ufffd \\x".encode()
    assert shown("-p", "a\\") == b"a\\" and shown("-p", r"\x 9\x-1") == "\t\ufffd".encode()
    assert shown("--no-escape", "-p", r"a\n\x41") == rb"a\n\x41"


def test_a_cached_load_sends_nothing_whatever_the_name(workers: list[Worker], tmp_path: Path) -> None:
    workers.append(Worker("-t", "1", "--cache-dir", tmp_path / "c"))
    assert "local cache : " + str(tmp_path / "c") in workers[0].banner
    run = ("run", "-p", "Tom", "-n", "5", "--temp", "0", "--rpc", workers[0].address)
    first = ggmq(*run)
    assert re.search(r"3\.\d MiB sent, 0\.0 MiB from caches", first.stderr), first.stderr
    renamed = tmp_path / "another-name.gguf"
    renamed.write_bytes(BUNDLED.read_bytes())
    second = ggmq(*run, "-m", renamed)
    assert re.search(r" 0\.0 MiB sent, 3\.\d MiB from caches", second.stderr), second.stderr
    entry = max((tmp_path / "c").iterdir(), key=lambda p: p.stat().st_size)
    good = entry.read_bytes()
    entry.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    third = ggmq(*run)
    assert third.stdout == first.stdout and re.search(r"0\.[1-9] MiB sent", third.stderr), third.stderr
    assert entry.read_bytes() == good
    listed = ggmq("cache", "list", "--cache-dir", tmp_path / "c")
    assert listed.returncode == 0 and "entries" in listed.stdout
    assert "0 were damaged" in ggmq("cache", "verify", "--cache-dir", tmp_path / "c").stdout


def test_a_worker_that_has_the_file_is_sent_nothing(workers: list[Worker], tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    mine, theirs = tmp_path / "m.gguf", models / "m.gguf"
    mine.write_bytes(BUNDLED.read_bytes())
    theirs.write_bytes(BUNDLED.read_bytes())
    workers.append(Worker("-t", "1", "--model-dir", models))
    run = ("run", "-p", "Tom", "-n", "5", "--temp", "0", "-m", mine, "--rpc", workers[0].address)
    same = ggmq(*run)
    assert re.search(r" 0\.0 MiB sent, 3\.\d MiB from caches or files", same.stderr), same.stderr
    raw = bytearray(BUNDLED.read_bytes())
    raw[-1] ^= 1  # the last tensor of their copy is another one now: that one travels
    theirs.write_bytes(raw)
    other = ggmq(*run)
    assert other.stdout == same.stdout and not re.search(r" 3\.6 MiB from", other.stderr), other.stderr
    theirs.unlink()
    assert re.search(r"3\.\d MiB sent", ggmq(*run).stderr)


def test_bench_and_profile(tmp_path: Path) -> None:
    command = [*GGMQ, "bench", "-p", "70", "-n", "4", "--streams", "3", "-r", "1", "-o", "json", "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "GGMQ_PROFILE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["prefill_tok_s"] > 0 and result["decode_tok_s"] > 0 and result["workers"] == 2
    assert result["round_trips_per_token"] <= 1 and result["sent_bytes"] == 0
    assert done.stderr.count("profile of CPU") == 2 and "FLASH_ATTN_EXT" in done.stderr
    table = ggmq("bench", "-p", "8", "-n", "2", "-r", "1", "--workers", "1")
    assert "| pp8 |" in table.stdout and "| tg2 |" in table.stdout


def test_layers_go_where_the_options_say(workers: list[Worker]) -> None:
    workers += [Worker("-t", "1", "-d", "reference"), Worker("-t", "1", "-d", "reference")]
    a, b = (w.address for w in workers)
    base = ("run", "-p", "Tom", "-n", "1", "--temp", "0", "--rpc", f"{a},{b}", "--device", "reference")
    split = ggmq(*base, "--tensor-split", "3,1").stderr
    assert f"0-2 + embedding on {a}" in split and f"3-3 + output on {b}" in split
    assert f"0-0 + embedding on {a}" in ggmq(*base, "-ts", "1,3").stderr
    some = ggmq(*base, "-ngl", "2").stderr
    assert "0-1 + embedding on local0" in some and f"2-2 on {a}" in some and f"3-3 + output on {b}" in some
    assert "0-3 + embedding + output on local0" in ggmq(*base, "-ngl", "0").stderr


def test_unequal_memories_and_too_little_memory() -> None:
    base = ("run", "-p", "Tom", "-n", "1", "--temp", "0", "--device", "reference")
    unequal = ggmq(*base, "--worker-mem", "332,132").stderr
    assert "0-2 + embedding on local0" in unequal and "3-3 + output on local1" in unequal
    r = ggmq(*base, "--worker-mem", "33,33")
    assert r.returncode == 1 and re.search(r"needs 3\.\d MiB, the devices have 2\.0 MiB free", r.stderr), r.stderr


def _long_run(*more: str | Path) -> subprocess.Popen[str]:
    command = [*GGMQ, "run", "-p", "Once", "--temp", "0", "--ignore-eos", "--device", "reference", *map(str, more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _await_text(p: subprocess.Popen[str], n: int = 30) -> None:
    assert p.stdout is not None
    got = p.stdout.read(n)
    assert len(got) == n, p.stderr.read() if p.stderr else ""


def test_a_killed_worker_is_named_and_the_run_goes_on() -> None:
    p = _long_run("--workers", "2", "-n", "40")
    _await_text(p)
    worker, *others = children_of(p.pid)
    os.kill(worker, signal.SIGKILL)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0 and out
    assert re.search(r"note    worker local\d \(reference\) was lost: .*; others are to take its place\n", err), err
    assert re.search(r"note    all layers are there again, after \d+\.\d s\n", err), err
    assert gone(others)


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_nothing_stays_behind_after_a_signal(sig: signal.Signals, code: int) -> None:
    p = _long_run("--workers", "2")
    _await_text(p)
    workers = children_of(p.pid)
    assert len(workers) == 2
    p.send_signal(sig)
    p.communicate(timeout=20)
    assert p.returncode == code
    assert gone(workers)


def test_a_killed_remote_worker_too(workers: list[Worker]) -> None:
    workers.append(Worker("-t", "1", "-d", "reference"))
    p = _long_run("--rpc", workers[0].address, "--wait", "2")
    _await_text(p)
    workers[0].process.kill()
    _, err = p.communicate(timeout=20)
    assert p.returncode == 1 and f"worker {workers[0].address} (reference) was lost" in err


def test_several_devices_behind_one_port(workers: list[Worker]) -> None:
    workers.append(Worker("-d", "reference,CPU", "-t", "1"))
    r = ggmq("run", "-p", "Once upon a time", "-n", "10", "--temp", "0", "--rpc", workers[0].address)
    assert r.returncode == 0 and r.stdout.startswith("Once upon a time, there was"), r.stderr
    assert "reference (device 0)" in r.stderr and "CPU (device 1)" in r.stderr


def test_a_worker_serves_two_clients_at_once(workers: list[Worker]) -> None:
    workers.append(Worker("-t", "1", "-d", "reference"))
    first = _long_run("--rpc", workers[0].address)
    try:
        _await_text(first)
        r = ggmq("run", "-p", "Once upon a time", "-n", "10", "--temp", "0", "--rpc", workers[0].address)
        assert r.returncode == 0 and r.stdout.startswith("Once upon a time, there was"), r.stderr
        assert first.poll() is None
    finally:
        first.terminate()
        first.communicate(timeout=20)


def test_a_worker_dials_in_to_a_shared_broker(tmp_path: Path) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    broker = subprocess.Popen([*GGMQ, "broker", "--listen", endpoint], cwd=ROOT, stdout=subprocess.DEVNULL)
    worker = subprocess.Popen([*WORKER, "--broker", endpoint, "-d", "reference", "--name", "attic"], cwd=ROOT,
                              stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        due = time.monotonic() + 30
        while "attic reference" not in (status := ggmq("status", "--broker", endpoint)).stdout:
            assert time.monotonic() < due, status.stderr
        runs = [subprocess.Popen([*GGMQ, "run", "-p", "Once upon a time", "-n", "8", "--temp", "0", "--broker", endpoint],
                                 cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                for _ in range(2)]  # fmt: skip
        for p in runs:
            out, _ = p.communicate(timeout=60)
            assert p.returncode == 0 and out.startswith("Once upon a time, there was")
        assert "0 buffers of 0 sessions" in ggmq("status", "--broker", endpoint).stdout
    finally:
        for p in (worker, broker):
            p.terminate()
            p.wait(10)


def test_a_network_address_needs_keys(tmp_path: Path, workers: list[Worker]) -> None:
    refused = subprocess.run([*WORKER, "-H", "0.0.0.0", "-p", str(free_port())], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2 and "ggmq keys new" in refused.stderr
    assert ggmq("keys", "new").returncode == 0
    workers.append(Worker("-H", "0.0.0.0", "-d", "reference"))
    assert "CURVE" in workers[0].banner
    run = ("run", "-p", "Tom", "-n", "3", "--temp", "0", "--rpc", workers[0].address)
    assert ggmq(*run).returncode == 0
    r = ggmq(*run, "--insecure")
    assert r.returncode == 1 and "there wants a cluster key and this side uses none" in r.stderr


def test_a_busy_port_and_a_port_with_no_worker(workers: list[Worker]) -> None:
    workers.append(Worker("-d", "reference"))
    r = subprocess.run([*WORKER, "-p", str(workers[0].port), "-d", "reference"], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 2 and "Choose another with -p" in r.stderr
    r = ggmq("run", "-p", "x", "--rpc", f"127.0.0.1:{free_port()}")
    assert r.returncode == 1 and "connection refused: nothing listens on port" in r.stderr


@pytest.mark.parametrize(("args", "code", "words"), [
    (["rnu"], 2, "invalid choice"), (["run", "-p", "x", "--temp", "nan"], 2, "expected a number"),
    (["run", "-p", "x", "-m", "nope.gguf"], 1, "no such file"), (["run", "-p", "x", "--rpc", "host"], 2, "HOST:PORT"),
    (["run", "-p", "x", "-ts", "0,0"], 2, "shares"), (["run", "-p", "x", "-m", "README.md"], 1, "expected the mark"),
    (["run", "-p", "", "-m", str(BUNDLED), "--workers", "0"], 2, "--workers 0"), (["plan", "nope.yaml"], 2, "nope.yaml"),
    (["run", "-p", "x", "-hf", "nonsense"], 2, "USER/REPO"), (["replay", "nope"], 2, "no such file"),
    (["run", "-f", "nope.txt"], 2, "no such file"), (["run", "-p", "x", "--device", "CUDA0"], 1, "CUDA0"),
    (["logits", "--tokens", "README.md", "--out", "/dev/null"], 1, "int32 array"),
])  # fmt: skip
def test_wrong_use_says_what_to_do(args: list[str], code: int, words: str) -> None:
    r = ggmq(*args)
    assert r.returncode == code, r.stderr
    assert words in r.stderr and "Traceback" not in r.stderr


def test_worker_lists_devices_and_names_what_is_missing() -> None:
    r = subprocess.run([*WORKER, "--device"], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0 and re.search(r"^  CPU: .*\(\d+ MiB, \d+ MiB free\)$", r.stdout, re.MULTILINE)
    r = subprocess.run([*WORKER, "--device", "CUDA7"], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 1 and r.stderr.startswith("worker: CUDA7: ")


def test_logits_command(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m.gguf", "qwen2")
    np.save(tmp_path / "ids.npy", np.arange(20, dtype=np.int32))
    outs = []
    for i, more in enumerate((["--workers", "1"], ["--workers", "2", "--chunk", "7"], ["--device", "reference"])):
        out = tmp_path / f"{i}.npy"
        r = ggmq("logits", "-m", model, "--tokens", tmp_path / "ids.npy", "--out", out, *more)
        assert r.returncode == 0, r.stderr
        outs.append(np.load(out))
    assert outs[0].shape == (20, 50) and outs[0].dtype == np.float32
    assert all(np.allclose(outs[0], o, rtol=1e-3, atol=1e-4) for o in outs)
    np.save(tmp_path / "bad.npy", np.array([99], np.int32))
    r = ggmq("logits", "-m", model, "--tokens", tmp_path / "bad.npy", "--out", tmp_path / "x.npy")
    assert r.returncode == 1 and "0 to 49" in r.stderr


def test_info_and_tokenize() -> None:
    r = ggmq("info", BUNDLED)
    assert "runs as  llama\n" in r.stdout and "keys that are not read" not in r.stdout
    assert "general.architecture: str = llama" in r.stdout and "blk.0.attn_q.weight: F16 [192, 192]" in r.stdout
    ids = ggmq("tokenize", "--ids", "--no-special", stdin="Once upon a time").stdout.split()
    assert len(ids) == 4 and len(ggmq("tokenize", "--ids", stdin="Once upon a time").stdout.split()) == 5


CLUSTER = """
name: {name}
broker: {{listen: "tcp://127.0.0.1:{port}"}}
split: {{tensor_split: [3, 1]}}
workers:
  - {{name: left, devices: [reference]}}
  - {{name: right, devices: [{device}], memory_mib: 200}}
"""


def test_plan_up_status_run_down(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CLUSTER.format(name="test", port=free_port(), device="reference"))
    plan = ggmq("plan", path)
    assert re.search(r"left reference\s+embedding, 0-2", plan.stdout), plan.stdout + plan.stderr
    assert re.search(r"right reference\s+3-3, output", plan.stdout)
    up = ggmq("up", path)
    try:
        assert up.returncode == 0 and "2 of 2 devices" in up.stdout, up.stdout + up.stderr
        pids = [int(p) for p in re.findall(r"process (\d+)", up.stdout)]
        assert len(pids) == 3 and all(_running(p) for p in pids)
        assert "every process of it runs" in ggmq("up", path).stdout
        status = ggmq("status")
        assert status.returncode == 0 and "left reference" in status.stdout and "planned: layers 0-2" in status.stdout
        assert "200 MiB" in status.stdout
        r = ggmq("run", "--cluster", path, "-p", "Once upon a time", "-n", "5", "--temp", "0")
        assert r.returncode == 0 and "0-2 + embedding on left" in r.stderr, r.stderr
        os.kill(pids[2], signal.SIGKILL)
        assert gone([pids[2]])
        assert ggmq("status").returncode == 1
    finally:
        down = ggmq("down", path)
    assert down.returncode == 0 and gone(pids)
    assert "not up" in ggmq("down", path).stdout


def test_up_cleans_up_after_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CLUSTER.format(name="broken", port=free_port(), device="CUDA3"))
    up = ggmq("up", path)
    assert up.returncode == 1 and "CUDA3" in up.stderr and "right/CUDA3 ended before it was ready" in up.stderr
    assert gone([int(p) for p in re.findall(r"process (\d+)", up.stdout)])
    assert "no cluster is up" in ggmq("status").stdout


@pytest.mark.parametrize("devices", ["reference", "reference,CPU"])
def test_a_cache_folder_that_cannot_be_one_is_named(tmp_path: Path, devices: str) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "in", Path("/proc/nowhere")):
        r = subprocess.run([*WORKER, "-p", "0", "-d", devices, "--cache-dir", str(folder)], cwd=ROOT, capture_output=True,
                           text=True, timeout=60)  # fmt: skip
        assert r.returncode == 2 and r.stderr.startswith(f"worker: --cache-dir {folder}: expected a folder"), r.stderr
        assert len(r.stderr.splitlines()) == 1
        r = ggmq("cache", "list", "--cache-dir", folder)
        assert r.returncode == 2 and f"{folder}: " in r.stderr and "Traceback" not in r.stderr


def test_files_that_the_system_refuses_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(4, dtype=np.int32))
    out = tmp_path / "ids.npy" / "x.npy"
    r = ggmq("logits", "--tokens", tmp_path / "ids.npy", "--out", out, "--device", "reference")
    assert r.returncode == 1 and r.stderr.splitlines()[-1] == f"ggmq: {out}: Not a directory", r.stderr
    from ggmq.cli import main

    assert main(["cache", "list", "--cache-dir", "a\0b"]) == 2


def test_a_refusal_says_its_place_once(bus: Client, device: str) -> None:
    with pytest.raises(OutOfMemory, match=rf"^local0 {device}: a buffer needs \d+ bytes, \d+ are free$"):
        bus.request(m.AllocBuffer(bus.session, 77, 1 << 45))


def test_a_vocabulary_that_is_no_utf8_is_bytes_as_they_are(tmp_path: Path) -> None:
    old, new = text("\u0120was"), text(b"\xff\xfe\x9b\xff\xff")
    path = tmp_path / "m.gguf"
    path.write_bytes(BUNDLED.read_bytes().replace(old, new))
    r = ggmq("run", "-m", path, "-p", "Once upon a time", "-n", "6", "--temp", "0", "--device", "reference")
    assert r.returncode == 0 and "\ufffd" in r.stdout, r.stdout + r.stderr
    tokens = ggmq("tokenize", "-m", path, stdin="He was here")
    assert tokens.returncode == 0 and "'Once'" not in tokens.stdout, tokens.stderr
    info = ggmq("info", path)
    assert info.returncode == 0 and "tokenizer.ggml.tokens: [str]" in info.stdout, info.stderr
