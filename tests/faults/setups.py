"""Processes as people start them: `ggmq run` and `ggmq serve` with workers of their own, on a broker's bus, on a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config.running import read_state
from ggmq.cluster import connect
from protocol.errors import GgmqError
from tests.faults.ground import GGMQ, LIMIT_S, READY_S, WORKER, Ground
from tests.faults.network import BadNetwork, Namespace
from tests.faults.streams import Stream, Talker, ask
from tests.support.fixtures import ROOT, free_port
from tests.support.processes import children_of
from tests.support.supervised import until

LOOPBACK = "127.0.0.1"
WATCH_S = 0.02
LOST = re.compile(r"was lost|take its place|takes its place|worker lost|closed the connection|answers nothing")
"""How clients say that something has gone."""
GIVEN_UP = re.compile(r"was lost|take its place|takes its place|worker lost")


@dataclass(frozen=True, slots=True)
class Setup:
    """Attributes:
    how: workers of the client's own, of a broker, or of a cluster file.
    spare: another worker that has no layers at first.
    n_seqs: texts at once, of a server.
    is_long: prompts take a while to be read.
    listens: workers of a broker listen and it connects to them; else they dial in.
    cache: of weights, which the workers of a bus share: `cold`; `warm`, the same in all runs; a folder. Empty: none.
    proxied: a bad network lies between the broker and each worker.
    n_tokens: made of each prompt; 0: as many as the ground's sizes say.
    drafts: tokens may be guessed; else every run takes the same steps.
    apart: workers of a bus are in network namespaces of their own.
    routed: and reach each other from there; else activations pass through the broker.
    """

    how: Literal["local", "bus", "cluster"] = "local"
    serves: bool = False
    n_workers: int = 2
    spare: bool = False
    n_seqs: int = 1
    is_long: bool = False
    listens: bool = False
    cache: str = ""
    proxied: bool = False
    device: str = "CPU"
    n_tokens: int = 0
    drafts: bool = True
    apart: bool = False
    routed: bool = False

    @property
    def prefix(self) -> str:
        """What names of workers begin with."""
        return "local" if self.how == "local" else "w"

    def words(self) -> str:
        parts = ["serve" if self.serves else "run", self.how, f"{self.n_workers} workers"]
        said = (("spare", self.spare), ("listening", self.listens), ("routed", self.routed))
        parts += [name for name, there in said if there]
        parts += [f"{self.n_seqs} at once"] * (self.n_seqs > 1) + ["long prompts"] * self.is_long
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Calm:
    """How long an undisturbed run took, in seconds: until its prompt is shown, then until the first token, for a token."""

    begin_s: float
    first_s: float
    token_s: float
    total_s: float


class Live:
    """The processes of a setup.

    Attributes:
        client: `ggmq run` or `ggmq serve`, once it has been started.
        states: what the broker said of workers, where there is one of its own: when, worker, state. Newest last.
    """

    def __init__(self, ground: Ground, setup: Setup) -> None:
        self.ground, self.setup = ground, setup
        self.folder = ground.run_folder()
        self.env = ground.env(self.folder)
        self.client: Talker | None = None
        self.broker: Talker | None = None
        self.workers: dict[str, Talker] = {}
        self.networks: dict[str, BadNetwork] = {}
        self.spaces: dict[str, Namespace] = {}
        self._router: Namespace | None = None
        self.states: list[tuple[float, str, str]] = []
        self.streams: list[Stream] = []
        self.endpoint = self.url = ""
        self._found: dict[str, int] = {}
        self._names: list[str] = []
        self._ports: dict[str, int] = {}
        self._file = self.folder / "cluster.yaml"
        self._cluster = f"f{os.getpid()}x{self.folder.name}"
        self._is_up = False
        self._pids: dict[str, int] = {}
        self._id = b""
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None

    # -- starting ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything that is there before something is asked. Errors: RuntimeError when it does not come."""
        s = self.setup
        n = s.n_workers + s.spare
        self._names = [f"{s.prefix}{i}" for i in range(n)]
        if s.how == "bus":
            self._start_bus()
        elif s.how == "cluster":
            self._start_cluster()
        if s.how != "local":
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        if s.serves:
            self._start_server()

    def _start_bus(self) -> None:
        s = self.setup
        port = free_port()
        self.endpoint = f"tcp://{LOOPBACK}:{port}"
        if s.apart:
            self._router = Namespace() if s.routed else None
            self.spaces = {name: Namespace(self._router) for name in self._names}
        if s.listens:
            self._ports = {name: free_port() for name in self._names}
            for name in self._names:
                self.start_worker(name)
            if s.proxied:
                self.networks = {n: BadNetwork(f"127.0.0.1:{p}", i) for i, (n, p) in enumerate(self._ports.items())}
            self.start_broker()
        else:
            if s.proxied:
                self.networks = {n: BadNetwork(f"127.0.0.1:{port}", i) for i, n in enumerate(self._names)}
            self.start_broker()
            for name in self._names:
                self.start_worker(name)
        self.await_ready(self._names)

    def start_broker(self) -> None:
        """Or another one on its port."""
        ports = {n: self.networks[n].port if n in self.networks else p for n, p in self._ports.items()}
        addresses = [f"{self.spaces[n].inner if n in self.spaces else LOOPBACK}:{p}" for n, p in ports.items()]
        rpc = ["--rpc", ",".join(addresses)] if ports else []
        listen = self.endpoint.replace(LOOPBACK, "0.0.0.0") if self.setup.apart else self.endpoint
        self.broker = Talker([*GGMQ, "broker", "--listen", listen, "--insecure", *rpc], self.env)

    def start_worker(self, name: str, *options: str) -> None:
        """Or another one of that name."""
        s = self.setup
        space = self.spaces.get(name)
        if s.listens:
            where = ["-p", str(self._ports[name]), "-H", space.inner if space else LOOPBACK]
        elif space:
            where = ["--broker", self.endpoint.replace(LOOPBACK, space.host)]
        elif name in self.networks:
            where = ["--broker", f"tcp://127.0.0.1:{self.networks[name].port}"]
        else:
            where = ["--broker", self.endpoint]
        cache = ["--cache-dir", str(self.cache_folder)] if s.cache else []
        within = space.command if space else []
        self.workers[name] = Talker([*within, *WORKER, *where, "--insecure", "-d", s.device, "-t", "1", "--name", name,
                                     *cache, *options], self.env)  # fmt: skip

    @property
    def cache_folder(self) -> Path:
        cache = self.setup.cache
        return Path(cache) if "/" in cache else (self.ground.folder if cache == "warm" else self.folder) / "cache"

    def _start_cluster(self) -> None:
        s = self.setup
        shares = [1] * s.n_workers + [0] * s.spare
        self._file.write_text("\n".join([
            f"name: {self._cluster}", 'broker: {listen: "tcp://127.0.0.1:0"}', "security: {insecure: true}",
            f'model: {{path: "{self.ground.path}", context: {self.ground.sizes.n_ctx}}}',
            *([f"split: {{tensor_split: {shares}}}"] if s.spare else []), "workers:",
            *(f"  - {{name: {name}, devices: [{s.device}], threads: 1}}" for name in self._names), "",
        ]))  # fmt: skip
        up = self._ggmq("up", str(self._file))
        self._is_up = True
        if up.returncode:
            raise RuntimeError(f"ggmq up ended with code {up.returncode}: {up.stderr[-400:]}")
        state = read_state(self.folder / "state" / "ggmq" / f"{self._cluster}.json")
        assert state is not None  # up wrote it
        self.endpoint, self._id = state.endpoint, bytes.fromhex(state.id)
        self._pids = {p.name: p.pid for p in state.processes}

    def _ggmq(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*GGMQ, *args], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=READY_S,
                              stdin=subprocess.DEVNULL)  # fmt: skip

    def _bus_options(self) -> list[str]:
        s = self.setup
        n = s.n_workers + s.spare
        shares = [*["1"] * s.n_workers, *["0"] * s.spare]
        if s.how == "cluster":
            return ["--cluster", str(self._file)]
        if s.how == "bus":
            where = ["--broker", self.endpoint]
            shares = [str(int(name in self._names[: s.n_workers])) for name in self._order()]
        else:
            where = ["--workers", str(n), "-dev", s.device, "-t", str(n)]
        drafts = [] if s.drafts else ["--spec", "off"]
        return [*where, "--insecure", *drafts, *(["-ts", ",".join(shares)] if s.spare else [])]

    def _start_server(self) -> None:
        options = [] if self.setup.how == "cluster" else self.ground.model_options()
        n_ctx = str(self.ground.sizes.n_ctx)
        self.client = Talker([*GGMQ, "serve", *options, "--port", "0", "-np", str(max(4, self.setup.n_seqs)), "-c", n_ctx,
                              "--ignore-eos", *self._bus_options()], self.env)  # fmt: skip
        stream = self.client.stream
        until(lambda: " at http://" in stream.text or stream.ended.is_set(), READY_S, 0.02)
        found = re.search(r" at (http://\S+)", stream.text)
        if found is None:
            raise RuntimeError(f"the server was not ready: {self.client.err.text()[-400:]}")
        self.url = found[1]

    def begin(self, prompts: Sequence[str]) -> list[Stream]:
        """Ask for the texts behind the prompts."""
        n = self.n_tokens
        if self.setup.serves:
            self.streams = [ask(self.url, p, n) for p in prompts]
            return self.streams
        (prompt,) = prompts
        if self.client is not None:
            self.client.end()
        self.client = Talker([*GGMQ, *self.ground.run_options(prompt, n), *self._bus_options()], self.env, shown=prompt)
        self.streams = [self.client.stream]
        return self.streams

    @property
    def n_tokens(self) -> int:
        return self.setup.n_tokens or self.ground.sizes.n_tokens

    # -- who is there --------------------------------------------------------------------------------------------------

    def find(self) -> None:
        """Look for the processes of all workers, so that a signal reaches them at once; a client that has just begun may
        have none yet."""
        for name in self._names:
            if name not in self._found and (pid := self.pid(name)) is not None:
                self._found[name] = pid

    def pid(self, name: str) -> int | None:
        """The process of a worker; None: it is not there."""
        if self.setup.how == "cluster":
            return self._pids[f"{name}/{self.setup.device}"]
        if self.setup.how == "bus":
            return self.workers[name].pid
        assert self.client is not None  # its children are the workers
        for child in children_of(self.client.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                if name.encode() in words:
                    return child
        return None

    def signal(self, name: str, number: int) -> bool:
        """Send a worker a signal, once it is there. Returns: whether it was."""

        def there() -> bool:
            self.find()
            return name in self._found or (self.client is not None and self.client.process.poll() is not None)

        until(there, READY_S, 0.002)
        if name in self._found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._found[name], number)
        return name in self._found

    def port(self, name: str) -> int:
        """That a worker listens on."""
        return self._ports[name]

    @property
    def names(self) -> list[str]:
        """Of all workers, the spare one among them."""
        return list(self._names)

    def _order(self) -> list[str]:
        client = connect(self.endpoint)
        try:
            return [d.worker for d in client.devices() if d.total_bytes]
        finally:
            client.close()

    def await_ready(self, names: Sequence[str], limit_s: float = READY_S) -> float:
        """Until the broker knows all of these. Returns: how long it took. Errors: RuntimeError."""
        start = time.monotonic()

        def there() -> bool:
            with contextlib.suppress(GgmqError):
                client = connect(self.endpoint)
                try:
                    return set(names) <= {d.worker for d in client.devices() if d.state == "ready"}
                finally:
                    client.close()
            return False

        if not until(there, limit_s, 0.02):
            raise RuntimeError(f"not ready within {limit_s:.0f} s: {', '.join(names)}")
        return time.monotonic() - start

    def _watch(self) -> None:
        """Note every change of a worker's state. A broker that has gone is asked again."""
        cluster = self._id if self.setup.how == "cluster" else b""
        known: dict[str, str] = {}
        while not self._stopping.is_set():
            try:
                client = connect(self.endpoint, cluster=cluster)
            except GgmqError:
                self._stopping.wait(0.1)
                continue
            with contextlib.closing(client), contextlib.suppress(GgmqError):
                while not self._stopping.wait(WATCH_S):
                    states = {d.worker: d.state for d in client.devices() if d.worker}
                    now = time.monotonic()
                    for name in {*known, *states}:
                        state = states.get(name, "gone")
                        if known.get(name) != state:
                            known[name] = state
                            self.states.append((now, name, state))

    def noticed(self, since_s: float) -> float | None:
        """When a client said, or the broker told, that somebody has gone."""
        said = self.client.err.first(lambda line: bool(LOST.search(line)), since_s) if self.client else None
        told = next((t for t, _, state in list(self.states) if t >= since_s and state in ("silent", "lost", "gone")), None)
        moments = [t for t in (said, told) if t is not None]
        return min(moments) if moments else None

    def evicted(self, since_s: float) -> list[str]:
        """Who was given up from a moment on, as the broker and the client have it. A silent worker is not."""
        lost = [name for t, name, state in list(self.states) if t >= since_s and state in ("lost", "gone")]
        lines = [line for t, line in list(self.client.err.lines) if t >= since_s] if self.client is not None else []
        return lost + [line for line in lines if GIVEN_UP.search(line)]

    # -- the end -------------------------------------------------------------------------------------------------------

    def wait(self, streams: Sequence[Stream], limit_s: float = LIMIT_S) -> list[str]:
        """Until all texts have come. Returns: why one did not."""
        due = time.monotonic() + limit_s
        problems = []
        for i, stream in enumerate(streams):
            if not stream.ended.wait(max(0.0, due - time.monotonic())):
                problems.append(f"text {i} did not come within {limit_s:.0f} s: {self._last_words()}")
            elif stream.error:
                problems.append(f"text {i}: {stream.error}")
        if not self.setup.serves and not problems:
            assert self.client is not None  # begin came first
            code = self.client.ends(max(1.0, due - time.monotonic()))
            if code != 0:
                problems.append(f"exit code {code}: {self._last_words()}")
        return problems

    def _last_words(self) -> str:
        if self.client is None:
            return ""
        lines = [line for _, line in list(self.client.err.lines)]
        return next((line for line in reversed(lines) if line.startswith("ggmq")), "\n".join(lines)[-400:])

    def end(self) -> None:
        self._stopping.set()
        for name in self._pids if self._is_up else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[name], signal.SIGCONT)
        if self.setup.how == "local" and self.client is not None:
            for child in children_of(self.client.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGCONT)
        for p in (self.client, *self.workers.values(), self.broker):
            if p is not None:
                p.end()
        if self._is_up:
            self._ggmq("down", str(self._file))
        for network in self.networks.values():
            network.end()
        for space in (*self.spaces.values(), self._router):
            if space is not None:
                space.end()
        if self._watcher is not None:
            self._watcher.join(10)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def living(ground: Ground, setup: Setup) -> Iterator[Live]:
    """The processes of a setup; they end with the block. Errors: RuntimeError when they do not come."""
    live = Live(ground, setup)
    try:
        live.start()
        yield live
    finally:
        live.end()


_calms: dict[tuple[Path, Setup], Calm] = {}


def calm(ground: Ground, setup: Setup) -> Calm:
    """How long it takes undisturbed, measured once. Errors: RuntimeError when even that does not end well."""
    cache = "warm" if setup.cache else ""
    plain = dataclasses.replace(setup, spare=False, proxied=False, apart=False, routed=False, listens=False, cache=cache)
    key = (ground.folder, plain)
    if key not in _calms:
        with living(ground, plain) as live:
            start = time.monotonic()
            prompts = ground.prompts(plain.n_seqs, plain.is_long)
            streams = live.begin(prompts)
            problems = live.wait(streams)
            expected = ground.texts(prompts, live.n_tokens)
            if problems or [made(s) for s in streams] != expected:
                raise RuntimeError(f"{plain.words()}, undisturbed: {problems or 'another text'}")
            shown = start if plain.serves else streams[0].pieces[0][0]
            first = min(s.made_times()[0] for s in streams)
            last = max(s.pieces[-1][0] for s in streams)
            n = max(1, live.n_tokens - 1)
            _calms[key] = Calm(shown - start, first - shown, (last - first) / n, last - start)
    return _calms[key]


def made(stream: Stream) -> str:
    """What the model made of a stream's text; `ggmq run` ends it with a newline once it is whole."""
    text = stream.text
    return text[len(stream.shown) :].removesuffix("\n") if stream.shown else text
