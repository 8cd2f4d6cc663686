"""Clusters as people run them: `up`, `status` and `down` with real processes, two users on one host, and what dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from config.running import ClusterState, read_state, write_state
from ggmq import model
from ggmq.cli import main
from ggmq.model import Model
from protocol.errors import ForeignCluster, OutOfMemory
from tests.support.fixtures import BUNDLED, ROOT, free_port
from tests.support.processes import GGMQ, WORKER, await_devices, started, until

TWO = """
name: {name}
broker: {{listen: "tcp://127.0.0.1:{port}"}}
workers:
  - {{name: left, devices: [reference]}}
  - {{name: right, devices: [reference], command: {command}}}
"""
STORY = ("-p", "Once upon a time", "-n", "5", "--temp", "0")


class User:
    """Somebody with a state folder and a cluster of his own."""

    def __init__(self, folder: Path, name: str, port: int = 0, command: str = "worker") -> None:
        folder.mkdir()
        self.name, self.port = name, port
        self.state_home, self.file = folder / "state", folder / f"{name}.yaml"
        self.write(command)

    def write(self, command: str) -> None:
        self.file.write_text(TWO.format(name=self.name, port=self.port, command=json.dumps(command)))

    def ggmq(self, *args: str | Path, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "XDG_STATE_HOME": str(self.state_home)}
        return subprocess.run([*GGMQ, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                              stdin=subprocess.DEVNULL, env=env)  # fmt: skip

    def up(self) -> subprocess.CompletedProcess[str]:
        return self.ggmq("up", self.file)

    @property
    def state(self) -> ClusterState:
        found = read_state(self.state_home / "ggmq" / f"{self.name}.json")
        assert found is not None
        return found

    @property
    def pids(self) -> dict[str, int]:
        return {p.name: p.pid for p in self.state.processes}

    def status(self) -> dict[str, Any]:
        return json.loads(self.ggmq("status", self.file, "--json").stdout)["clusters"][0]

    def ready(self) -> list[str]:
        return sorted(d["worker"] for d in self.status()["devices"] if d["state"] == "ready")


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Callable[..., User]]:
    users: list[User] = []

    def new(name: str, **more: Any) -> User:
        users.append(User(tmp_path / f"home-{len(users)}", name, **more))
        return users[-1]

    yield new
    for u in users:
        u.write("worker")
        u.ggmq("down", u.file)


def left_behind(name: str) -> list[list[str]]:
    """Processes that carry a tag of this cluster."""
    found = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    return [c for c in found if any(re.fullmatch(rf"{name}-[0-9a-f]{{16}}", word) for word in c)]


def test_two_users_with_the_same_file_have_two_clusters(user: Callable[..., User]) -> None:
    ours, theirs = user("same"), user("same")
    for u in (ours, theirs):
        up = u.up()
        assert up.returncode == 0, up.stdout + up.stderr
        assert re.search(r"is up at tcp://127\.0\.0\.1:\d+;", up.stdout)
    assert ours.state.endpoint != theirs.state.endpoint and not ours.state.endpoint.endswith(":0")
    for u in (ours, theirs):
        assert u.ready() == ["left", "right"]
        run = u.ggmq("run", "--cluster", u.file, *STORY)
        assert run.returncode == 0 and "on right" in run.stderr, run.stderr
    assert theirs.ggmq("down", theirs.file).returncode == 0
    assert ours.ready() == ["left", "right"]


def test_a_port_that_is_taken_ends_up_at_once_and_nothing_of_it_stays(user: Callable[..., User]) -> None:
    port = free_port()
    ours, theirs = user("ours", port=port), user("theirs", port=port)
    assert ours.up().returncode == 0
    up = theirs.up()
    assert up.returncode == 1
    log = theirs.state_home / "ggmq" / "logs" / "theirs" / "broker.log"
    assert re.search(rf"broker ended .* cannot listen: Address already in use.*\(log {re.escape(str(log))}\)", up.stderr)
    assert "started left" not in up.stdout and not left_behind("theirs")
    assert "no cluster is up" in theirs.ggmq("status").stdout
    assert ours.ready() == ["left", "right"]


def test_a_broker_of_another_cluster_is_refused_by_clients_and_workers(
    user: Callable[..., User], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = user("ours"), user("theirs")
    for u in (ours, theirs):
        assert u.up().returncode == 0
    lost, lost_id = theirs.state, theirs.state.id
    endpoint = ours.state.endpoint
    # as it is when somebody else's broker has taken a port that was ours
    monkeypatch.setenv("XDG_STATE_HOME", str(theirs.state_home))
    write_state(ClusterState(lost.name, lost.file, endpoint, lost.keys, lost.insecure, lost.processes, lost_id))
    try:
        for args in (("run", "--cluster", theirs.file, *STORY), ("status", theirs.file)):
            r = theirs.ggmq(*args)
            assert r.returncode == 1 and f"{endpoint}: expected this cluster's broker" in r.stdout + r.stderr, r
            assert "one of another cluster" in r.stdout + r.stderr
        env = {**os.environ, "GGMQ_CLUSTER_ID": lost_id}
        with started([*WORKER, "--broker", endpoint, "-d", "reference", "--name", "stray"], env=env,
                     stderr=subprocess.PIPE) as stray:  # fmt: skip
            assert stray.stderr is not None
            line = stray.stderr.readline().decode()
            assert "one of another cluster; dialling again" in line, line
            assert ours.ready() == ["left", "right"]
    finally:
        write_state(lost)


def test_a_worker_of_a_cluster_leaves_a_broker_of_none_alone() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    worker = [*WORKER, "--broker", endpoint, "-d", "reference"]
    with started([*GGMQ, "broker", "--listen", endpoint]):
        env = {**os.environ, "GGMQ_CLUSTER_ID": "ab" * 16}
        with started([*worker, "--name", "stray"], env=env, stderr=subprocess.PIPE) as stray, started(worker):
            assert stray.stderr is not None and b"this broker is of none" in stray.stderr.readline()
            await_devices(endpoint, 1)
    r = subprocess.run(worker, env={**os.environ, "GGMQ_CLUSTER_ID": "xyz"}, cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 2 and "GGMQ_CLUSTER_ID: expected 32 hexadecimal digits" in r.stderr


def test_a_client_finds_out_by_itself_that_a_broker_cannot_prove_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from ggmq.cluster import LocalBus, connect

    bus = LocalBus(listen="tcp://127.0.0.1:0")
    bus.broker.serve_in_thread()
    try:  # one that takes anybody in, and says back what it was told
        monkeypatch.setattr("broker.state.same_cluster", lambda h, role, cluster: None)
        with pytest.raises(ForeignCluster, match="the broker that answers belongs to another cluster, or to none"):
            connect(bus.broker.endpoints[-1], cluster=b"\1" * 16)
        connect(bus.broker.endpoints[-1]).close()
    finally:
        bus.close()


def test_a_process_that_ends_is_named_with_its_last_words(user: Callable[..., User]) -> None:
    u = user("ends", command="sh -c 'sleep 1; echo out of luck >&2; exit 3'")
    up = u.up()
    assert up.returncode == 1
    assert re.search(r"ggmq: right/reference ended .* code 3: out of luck \(log .*/right-reference\.log\)", up.stderr)
    assert not left_behind("ends") and "no cluster is up" in u.ggmq("status").stdout


def test_up_again_starts_what_died_and_only_that(user: Callable[..., User]) -> None:
    u = user("again")
    assert u.up().returncode == 0
    before, endpoint = u.pids, u.state.endpoint
    os.kill(before["right/reference"], signal.SIGKILL)
    until(lambda: u.ggmq("status", u.file).returncode == 1)
    up = u.up()
    assert up.returncode == 0 and "2 processes ran already" in up.stdout, up.stdout + up.stderr
    assert re.findall(r"started (\S+)", up.stdout) == ["right/reference"]
    after = u.pids
    assert {k: after[k] == before[k] for k in after} == {"broker": True, "left/reference": True, "right/reference": False}
    assert u.ggmq("run", "--cluster", u.file, *STORY).returncode == 0

    os.kill(after["broker"], signal.SIGKILL)
    until(lambda: u.ggmq("status", u.file).returncode == 1)
    up = u.up()
    assert up.returncode == 0 and re.findall(r"started (\S+)", up.stdout) == ["broker"], up.stdout + up.stderr
    assert u.state.endpoint == endpoint and u.ready() == ["left", "right"]

    os.kill(after["right/reference"], signal.SIGKILL)
    u.write("sh -c 'exit 4'")
    up = u.up()
    assert up.returncode == 1 and "right/reference ended" in up.stderr and "ended left" not in up.stdout
    assert u.ready() == ["left"] and set(u.pids) == {"broker", "left/reference"}
    u.write("worker")
    assert u.up().returncode == 0 and u.ready() == ["left", "right"]
    assert "every process of it runs" in u.up().stdout
    down = u.ggmq("down", u.file)
    assert down.returncode == 0 and not left_behind("again")


def test_status_as_json(user: Callable[..., User]) -> None:
    u = user("told")
    assert json.loads(u.ggmq("status", "--json").stdout) == {"clusters": []}
    assert u.up().returncode == 0
    c = u.status()
    assert (c["name"], c["broker"], c["error"]) == ("told", u.state.endpoint, "")
    assert {p["name"]: p["pid"] for p in c["processes"]} == u.pids and all(p["running"] is True for p in c["processes"])
    left, right = sorted(c["devices"], key=lambda d: d["worker"])
    assert (left["worker"], left["state"], left["buffer_bytes"], left["n_sessions"]) == ("left", "ready", 0, 0)
    assert left["planned"]["first_layer"] == 0 and right["planned"]["last_layer"] == 3
    assert u.state.id not in json.dumps(c)
    os.kill(u.pids["broker"], signal.SIGKILL)
    until(lambda: u.status()["processes"][0]["running"] is False)
    r = u.ggmq("status", "--json")
    dead = json.loads(r.stdout)["clusters"][0]
    assert r.returncode == 1 and dead["error"] and dead["devices"] == []


LOADED = (
    r"load +[\d.]+ s  ([\d.]+) MiB sent, ([\d.]+) MiB from caches or files(?:, ([\d.]+) MiB from other workers)?"
    r"(?:, ([\d.]+) MiB there from a run before)?"
)


def loaded(run: subprocess.CompletedProcess[str]) -> tuple[float, float, float]:
    """MiB that were sent, from here or by another worker, were in caches or files, and were in the workers' memory."""
    assert run.returncode == 0, run.stderr
    found = re.search(LOADED, run.stderr)
    assert found is not None, run.stderr
    return float(found[1]) + float(found[3] or 0), float(found[2]), float(found[4] or 0)


def test_a_cluster_keeps_its_model_between_runs(user: Callable[..., User]) -> None:
    u = user("keeps")
    assert u.up().returncode == 0
    story = ("run", "--cluster", u.file, *STORY)
    first = u.ggmq(*story)
    sent, cached, kept = loaded(first)
    assert sent + cached > 3 and kept == 0
    kept_bytes = [d["kept_bytes"] for d in u.status()["devices"]]
    assert all(kept_bytes) and "MiB kept for the next run" in u.ggmq("status", u.file).stdout
    second = u.ggmq(*story)
    assert loaded(second) == (0, 0, pytest.approx(sent + cached, abs=0.1)) and second.stdout == first.stdout
    longer = u.ggmq(*story, "-c", "96")
    assert loaded(longer)[:2] == (0, 0) and longer.stdout == first.stdout, "it is the same for another context"
    with started([*GGMQ, *map(str, story), "-n", "500"], env={**os.environ, "XDG_STATE_HOME": str(u.state_home)}) as run:
        until(lambda: any(d["n_sessions"] and not d["kept_bytes"] for d in u.status()["devices"]))
        run.kill()
    until(lambda: [d["kept_bytes"] for d in u.status()["devices"]] == kept_bytes)
    os.kill(u.pids["broker"], signal.SIGKILL)
    os.kill(u.pids["left/reference"], signal.SIGKILL)
    until(lambda: not any(p["running"] for p in u.status()["processes"][:2]))
    assert u.up().returncode == 0
    again = u.ggmq(*story)
    assert loaded(again)[2] == pytest.approx(max(kept_bytes) / (1 << 20), abs=0.3), "the right worker still has its part"
    assert again.stdout == first.stdout
    assert loaded(u.ggmq(*story))[:2] == (0, 0)


def test_a_worker_that_listens_keeps_a_model_too_and_gives_way_to_another(tmp_path: Path) -> None:
    port = free_port()
    story = ("run", "--rpc", f"127.0.0.1:{port}", *STORY)
    with started([*WORKER, "-d", "reference", "-p", str(port), "--insecure", "-m", "48", "--keep", "300"]):
        runs = [subprocess.run([*GGMQ, *story, *more], cwd=ROOT, capture_output=True, text=True, timeout=100,
                               stdin=subprocess.DEVNULL, check=False)
                for more in ((), (), ("-c", "2048"), ("-m", str(other_model(tmp_path))), ())]  # fmt: skip
    first, second, larger, other, back = map(loaded, runs)
    assert first[0] > 3 and second == (0, 0, first[0]) and larger == second
    assert 0 < other[2] < first[0] and back[:2] == (0, 0), "what is the same in another model is there, a layer at a time"
    assert len({r.stdout for r in runs}) == 1


def other_model(folder: Path) -> Path:
    """The bundled model, one byte of a weight changed that no text shows."""
    data = bytearray(BUNDLED.read_bytes())
    data[-1] ^= 1
    path = folder / "other.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("owner", "name"), [(model, "plan"), (Model, "_load")])
def test_where_memory_is_short_all_workers_give_up_what_they_keep(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stands in for a host that is full: the first try is refused, as when another worker of that host keeps too much."""
    port = free_port()
    story = ["run", "--rpc", f"127.0.0.1:{port}", *STORY]
    works, n_calls = getattr(owner, name), 0

    def first_refused(*args: Any, **more: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            raise OutOfMemory("stage 0: 3 bytes, 2 are free", 3, 2)
        return works(*args, **more)

    with started([*WORKER, "-d", "reference", "-p", str(port), "--insecure", "--keep", "300"]):
        assert main(story) == 0
        text = capsys.readouterr().out
        monkeypatch.setattr(owner, name, first_refused)
        assert main(story) == 0
        out = capsys.readouterr()
        assert n_calls == 2 and out.out == text and "from a run before" not in out.err
        n_calls = 0
        monkeypatch.setattr("ggmq.cluster.Client.release", lambda client: False)
        assert main(story) == 1 and n_calls == 1, "nobody had anything to give"


def test_how_long_a_cluster_keeps_weights_is_in_its_file(user: Callable[..., User]) -> None:
    u = user("brief")
    u.file.write_text(u.file.read_text().replace("devices: [reference]", "devices: [reference], keep_s: 0"))
    assert u.up().returncode == 0
    runs = [loaded(u.ggmq("run", "--cluster", u.file, *STORY)) for _ in range(2)]
    assert all(sent + cached > 3 and kept == 0 for sent, cached, kept in runs)
    assert not any(d["kept_bytes"] for d in u.status()["devices"])


def test_logs_have_times_and_the_id_is_shown_nowhere(user: Callable[..., User]) -> None:
    u = user("timed")
    assert u.up().returncode == 0
    logs = sorted((u.state_home / "ggmq" / "logs" / "timed").iterdir())
    assert [p.name for p in logs] == ["broker.log", "left-reference.log", "right-reference.log"]
    for log in logs:
        lines = log.read_text().splitlines()
        assert lines and all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d ", x) for x in lines), lines
        assert u.state.id not in log.read_text()
    assert not any(u.state.id in word for c in left_behind("timed") for word in c)
    assert (u.state_home / "ggmq" / "timed.json").stat().st_mode & 0o777 == 0o600


def test_the_brokers_log_says_who_came_who_went_and_why(user: Callable[..., User]) -> None:
    u = user("noted")
    assert u.up().returncode == 0
    log = u.state_home / "ggmq" / "logs" / "noted" / "broker.log"
    os.kill(u.pids["right/reference"], signal.SIGKILL)
    until(lambda: "was lost" in log.read_text() and "has gone" in log.read_text())  # a client's end shows by its next PING
    said = [line.split(" ", 2)[2] for line in log.read_text().splitlines()]
    for words in (r"worker left reference is ready \(epoch \d+\)", r"worker right reference is ready \(epoch \d+\)",
                  r"client \d+ is here \(ggmq .*\)", r"client \d+ has gone",
                  r"worker right reference was lost: the connection was closed; .* \(epoch \d+; after \d+\.\d s\)"):
        assert [x for x in said if re.fullmatch("ggmq broker: " + words, x)], said


def test_one_up_at_a_time(user: Callable[..., User]) -> None:
    u = user("once")
    first = subprocess.Popen([*GGMQ, "up", str(u.file)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             env={**os.environ, "XDG_STATE_HOME": str(u.state_home)})  # fmt: skip
    assert first.stdout is not None
    with first.stdout:
        assert first.stdout.readline().startswith(b"started broker")
        second = u.up()
        assert first.wait(60) == 0 and (second.returncode == 0 or "is under way" in second.stderr), second
    assert len(left_behind("once")) == 3


TRAP = "raise SystemExit('the file of somebody else')\n"


@pytest.mark.parametrize("args", [
    ("run", "--device", "reference", "--workers", "2", *STORY), ("worker", "--version"), ("cache", "list"),
], ids=["run", "worker", "cache"])  # fmt: skip
def test_files_of_the_current_folder_are_none_of_ours(tmp_path: Path, args: tuple[str, ...]) -> None:
    for name in ("protocol", "config", "broker", "workers", "types", "psutil"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for way in ([sys.executable, "-P", "-m", "ggmq"], GGMQ):
        r = subprocess.run([*way, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100,
                           stdin=subprocess.DEVNULL)  # fmt: skip
        assert "somebody else" not in r.stderr and r.returncode == 0, r.stderr


def test_up_and_several_devices_work_in_such_a_folder_too(user: Callable[..., User], tmp_path: Path) -> None:
    u = user("trapped")
    for name in ("protocol", "config", "broker", "workers"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(u.state_home)}
    run = [sys.executable, "-P", "-m", "ggmq"]
    up = subprocess.run([*run, "up", str(u.file)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert up.returncode == 0, up.stdout + up.stderr
    worker = subprocess.Popen([*run, "worker", "-d", "reference,reference", "-p", "0"], cwd=tmp_path, env=env,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert worker.stdout is not None
    with worker.stdout:
        assert "endpoint" in worker.stdout.readline() + worker.stdout.readline()
        worker.terminate()
        worker.wait(20)


def test_above_a_checkout_there_is_a_clear_word(tmp_path: Path) -> None:
    (tmp_path / "ggmq").symlink_to(ROOT)
    r = subprocess.run([sys.executable, "-S", "-m", "ggmq", "run"], cwd=tmp_path, capture_output=True, text=True,
                       env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})  # fmt: skip
    assert r.returncode == 1 and "is a checkout" in r.stderr and "Traceback" not in r.stderr, r.stderr
