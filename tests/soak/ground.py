"""What the soak runs on: a broker process, workers of both kinds that live long, folders of their own."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ggmq.archs import open_arch
from ggmq.cluster import Client, connect
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.loader import Progress
from ggmq.model import ModelConfig, place_model
from ggmq.sampling import SamplingParams
from ggmq.tokenizer import StreamDecoder, Vocabulary
from protocol.errors import GgmqError
from tests.soak.report import Step
from tests.support.fixtures import BUNDLED, free_port
from tests.support.supervised import Supervised

GGMQ = [sys.executable, "-m", "ggmq"]
WORKER = [sys.executable, "-m", "workers"]
KEEP = ("--keep", "1")
PROMPTS = ("Once upon a time", "Tom and his mother went to the park")
N_TOKENS = 20
N_LONG = 160
"""Tokens of a generation in whose middle something happens."""
N_CTX = 256
COMPILED_S = 600.0
"""The first worker of a checkout compiles its kernels."""
READY_S = 90.0
SESSION_S = 60.0
BACK_S = 15.0
"""The most that anything may take to be used again."""
ENDED = "free)"
"""What a worker's banner ends with."""


class Overdue(Exception):
    """A session took longer than anything may."""


def overdue_after(limit_s: float) -> Callable[[], None]:
    """What a client may call while it waits; raises Overdue from a moment on."""
    due = time.monotonic() + limit_s

    def guard() -> None:
        if time.monotonic() > due:
            raise Overdue(f"no answer within {limit_s:.0f} s")

    return guard


class Ground:
    """A broker on a port and four workers: one with each device that it connects to, one with each that dials in.

    Attributes:
        workers: the long-lived ones by their name on the bus.
        spare: ports that the broker connects to, for workers that come and go.
        texts: what an undisturbed run says, by prompt and count of tokens.
    """

    def __init__(self, n_spare: int = 0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="soak-"))
        for name in ("tmp", "logs", "state", "config", "cache"):
            (self.folder / name).mkdir()
        self.env = {k: v for k, v in os.environ.items() if k != "GGMQ_KEYS"}
        self.env |= {"TMPDIR": str(self.folder / "tmp"), "XDG_STATE_HOME": str(self.folder / "state"),
                     "XDG_CONFIG_HOME": str(self.folder / "config")}  # fmt: skip
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.ports = {"listen-cpu": free_port(), "listen-ref": free_port()}
        self.spare = [free_port() for _ in range(n_spare)]
        self.broker: Supervised | None = None
        self.workers: dict[str, Supervised] = {}
        self.texts: dict[tuple[str, int], str] = {}
        self._all: list[Supervised] = []
        self._n_started = 0
        self._lock = threading.Lock()

    # -- processes -----------------------------------------------------------------------------------------------------

    def process(self, name: str, command: Sequence[str], n_files: int = 0) -> Supervised:
        """Start one that ends with the ground."""
        with self._lock:
            self._n_started += 1
            p = Supervised(f"{name}.{self._n_started}", command, self.folder / "logs", self.env, n_files)
            self._all.append(p)
        return p

    def done(self, p: Supervised) -> None:
        """End a process that is of no more use."""
        p.end()
        with self._lock:
            self._all.remove(p)

    def worker(self, name: str, device: str, port: int = 0, *options: str) -> Supervised:
        """One that listens on a port, or without one dials in."""
        where = ["-p", str(port)] if port else ["--broker", self.endpoint]
        return self.process(name, [*WORKER, *where, "--insecure", "-d", device, "-t", "1", "--name", name, *options])

    def run(self, prompt: str, n: int, *options: str, name: str = "run") -> Supervised:
        """`ggmq run`, greedy. A long one does not end before its count of tokens."""
        more = ["--ignore-eos"] if n == N_LONG else []
        return self.process(name, [*GGMQ, "run", "-p", prompt, "-n", str(n), "--temp", "0", "-c", str(N_CTX), *more,
                                   *(options or ("--broker", self.endpoint, "--insecure"))])  # fmt: skip

    def start(self) -> None:
        """Errors: RuntimeError when something is not ready."""
        first = self.run(PROMPTS[0], 1, "--workers", "1", "--insecure", name="first")
        if first.ends(COMPILED_S) != 0:
            raise RuntimeError(f"the first run did not end well: {first.story()}")
        self.done(first)
        undisturbed = {(p, n): self.run(p, n, "--workers", "1", "-t", "1", "--insecure", name="undisturbed")
                       for p, n in [*((p, N_TOKENS) for p in PROMPTS), (PROMPTS[0], N_LONG)]}  # fmt: skip
        for key, p in undisturbed.items():
            if p.ends(READY_S) != 0:
                raise RuntimeError(f"the undisturbed run did not end well: {p.story()}")
            self.texts[key] = p.out().removesuffix("\n")
            self.done(p)
        self.start_all()

    def start_all(self) -> None:
        """The broker and the long-lived workers, two of which keep weights for a second.

        Errors: RuntimeError when one is not ready.
        """
        cache = ("--cache-dir", str(self.folder / "cache"))
        self.workers = {"listen-cpu": self.worker("listen-cpu", "CPU", self.ports["listen-cpu"], *cache),
                        "listen-ref": self.worker("listen-ref", "reference", self.ports["listen-ref"], *KEEP)}  # fmt: skip
        self.start_broker()
        self.workers |= {"dial-cpu": self.worker("dial-cpu", "CPU", 0, *KEEP),
                         "dial-ref": self.worker("dial-ref", "reference")}  # fmt: skip
        for p in self.workers.values():
            if not p.says(ENDED, READY_S):
                raise RuntimeError(f"a worker was not ready: {p.story()}")
        if self.await_names(set(self.workers), READY_S) is None:
            raise RuntimeError(f"the broker does not know all workers: {self.broker and self.broker.story()}")

    def start_broker(self) -> None:
        """On the port that it always has. Errors: RuntimeError when it is not ready."""
        rpc = ",".join(f"127.0.0.1:{p}" for p in [*self.ports.values(), *self.spare])
        self.broker = self.process("broker", [*GGMQ, "broker", "--listen", self.endpoint, "--insecure", "--rpc", rpc])
        if not self.broker.says("broker at", 20):
            raise RuntimeError(f"the broker was not ready: {self.broker.story()}")

    def start_again(self, step: Step) -> None:
        """All processes anew, after a failure that would show again in every step that follows."""
        self.end_all()
        self.start_all()
        self.warm(step)

    def warm(self, step: Step) -> None:
        """Have each worker serve alone, then each with each other: from now on none has another one to connect to, or a
        kernel to load, so that what it holds should stay as it is."""
        for names in [*([w] for w in self.workers), *map(list, itertools.permutations(self.workers, 2))]:
            check_text(self, step, names)

    def lasting(self) -> dict[str, Supervised]:
        """The broker and the long-lived workers, by name."""
        assert self.broker is not None  # start came first
        return {"broker": self.broker, **self.workers}

    def end_all(self) -> None:
        with self._lock:
            running, self._all = self._all, []
        for p in reversed(running):
            p.signal(9 if p.name.startswith("run") else 15)
        for p in reversed(running):
            p.end()

    def close(self) -> list[str]:
        """End everything. Returns: what lies where nothing should, then removes it."""
        self.end_all()
        left = [f"in the temporary folder: {p.name}" for p in (self.folder / "tmp").iterdir()]
        left += [f"in the cache: {p.name}" for p in (self.folder / "cache").rglob(".part-locked-*")]
        shutil.rmtree(self.folder, ignore_errors=True)
        return left

    # -- clients -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def client(self, limit_s: float = SESSION_S) -> Iterator[Client]:
        """A session in this process that raises Overdue rather than wait for ever."""
        guard = overdue_after(limit_s)
        client = connect(self.endpoint)
        client.on_wait = guard
        try:
            yield client
        finally:
            client.close()

    def living(self) -> tuple[set[str], int]:
        """Names of the devices that may be used, and how long the whole list is. Empty when nobody answers."""
        try:
            with self.client(5) as c:
                infos = c.devices()
        except (GgmqError, Overdue):
            return set(), 0
        return {d.worker for d in infos if d.total_bytes}, len(infos)

    def await_names(self, names: set[str], limit_s: float = BACK_S) -> float | None:
        """How long until all of these may be used; None when that takes longer than the limit."""
        start = time.monotonic()
        while not names <= self.living()[0]:
            if time.monotonic() - start > limit_s:
                return None
            time.sleep(0.05)
        return time.monotonic() - start

    def shares(self, names: Sequence[str]) -> list[str]:
        """Options of `ggmq run` that put the layers on these workers alone, in their own order on the bus."""
        with self.client(5) as c:
            there = [d.worker for d in c.devices() if d.total_bytes]
        return ["--broker", self.endpoint, "--insecure", "-ts", ",".join(str(int(w in names)) for w in there)]

    def order(self, names: Sequence[str]) -> list[str]:
        """These workers in the order in which `ggmq run` makes stages of them."""
        with self.client(5) as c:
            return [d.worker for d in c.devices() if d.total_bytes and d.worker in names]


def tell(
    client: Client, names: Sequence[str], prompt: str = PROMPTS[0], n: int = N_TOKENS, progress: Progress | None = None,
    patience_s: float | None = None,
) -> str:  # fmt: skip
    """Place the model on these workers, load it, generate. Errors: what the client, the runner and the engine raise."""
    arch = open_arch(GGUF(BUNDLED))
    vocabulary = Vocabulary(arch.gguf)
    config = ModelConfig(BUNDLED, N_CTX, tensor_split=[1] * len(names), patience_s=patience_s)
    model = place_model(config, arch, client, names)
    model.load(progress)
    banned = vocabulary.end_ids if n == N_LONG else frozenset()
    engine = Engine(model, vocabulary.end_ids)
    engine.start(vocabulary.encode(prompt), SamplingParams(temperature=0, banned=banned))
    decoder = StreamDecoder(vocabulary)
    return prompt + "".join([decoder.feed(t) for t in engine.generate(n)]) + decoder.finish()


def check_text(ground: Ground, step: Step, names: Sequence[str], prompt: str = PROMPTS[0], drain: bool = True) -> bool:
    """One session in this process; whether it went well, the failure told."""
    try:
        with ground.client() as c:
            text = tell(c, names, prompt)
            if drain:
                c.drain()
    except (GgmqError, Overdue) as e:
        step.fail(f"a session on {', '.join(names)}: {type(e).__name__}: {e}")
        return False
    if text != ground.texts[prompt, N_TOKENS]:
        step.fail(f"a session on {', '.join(names)} told another story: {text!r}")
        return False
    return True


def check_run(ground: Ground, step: Step, p: Supervised, prompt: str, n: int, limit_s: float = SESSION_S) -> bool:
    """Wait for a `ggmq run`; whether it ended well with the right text, the failure told."""
    code = p.ends(limit_s)
    text = p.out().removesuffix("\n")
    good = code == 0 and text == ground.texts[prompt, n]
    if code is None:
        step.fail(f"a run did not end within {limit_s:.0f} s: {p.story()}")
    elif code:
        step.fail(f"a run failed: {p.story()}")
    elif not good:
        step.fail(f"a run told another story: {text!r}")
    ground.done(p)
    return good


def check_all_serve(ground: Ground, step: Step, what: str) -> bool:
    """Whether every long-lived process lives and serves, soon; all stages of one model at once."""
    dead = [p.story() for p in ground.lasting().values() if not p.alive]
    if dead:
        step.fail(f"afterwards: {'; '.join(dead)}")
        return False
    back_s = ground.await_names(set(ground.workers))
    if back_s is None:
        missing = sorted(set(ground.workers) - ground.living()[0])
        step.fail(f"{', '.join(missing)} did not come back within {BACK_S:.0f} s")
        return False
    step.took(what, back_s)
    return check_text(ground, step, list(ground.workers))


def at_once(step: Step, actions: Sequence[Callable[[], None]], limit_s: float = 2 * SESSION_S) -> None:
    """Each in a thread of its own; what is raised, or takes too long, is a failure of the step."""

    def guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as e:
            step.fail(f"{type(e).__name__}: {e}")

    # daemons: one that hangs is told of, and does not keep the program from its end
    threads = [threading.Thread(target=guarded, args=(a,), daemon=True) for a in actions]
    for t in threads:
        t.start()
    due = time.monotonic() + limit_s
    for t in threads:
        t.join(max(0.0, due - time.monotonic()))
    hanging = sum(t.is_alive() for t in threads)
    if hanging:
        step.fail(f"{hanging} of {len(threads)} did not end within {limit_s:.0f} s")
