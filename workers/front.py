"""Several devices behind one host:port: a relay in front of one process a device.

HELLO, PING and DRAIN go to every device and are answered once, when the last has answered; every other message goes to
the device that its prefix names. A device process that ends takes the front with it, so that the peer learns of it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq

from config.allowed import Allowed
from config.auth import new_socket, socket_folder
from config.descriptors import raise_descriptor_limit
from config.installed import module_environment
from config.keys import KeyPair
from config.listening import Listener, Watch
from config.roles import Caller, Callers, Role
from config.zap import Authenticator
from protocol import messages as m
from protocol.errors import GgmqError, ProtocolError, Unavailable, WorkerLost
from protocol.frames import Frame, Message, decode, encode, prefix_of, refusal_of
from protocol.messages import Command
from workers.ordering import OVERTAKEN, Ordering

TO_ALL = frozenset({Command.HELLO, Command.PING, Command.DRAIN})
START_S = 600.0
"""Device processes may compile kernels before they say HELLO."""
GUARD_S = 0.1


@dataclass(slots=True)
class Gathering:
    waiting: set[bytes]
    replies: dict[bytes, Message] = field(default_factory=dict)


class Front:
    """Threads: `run` in one."""

    def __init__(self, endpoint: str, keys: KeyPair | None) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.allowed = Allowed(keys) if keys is not None else None
        self.auth = Authenticator(self.context, self.allowed) if self.allowed is not None else None
        self.callers: Callers[bytes] = Callers()
        self.ordering: Ordering[list[zmq.Frame]] = Ordering()
        try:
            self.listener = Listener(self.context, endpoint, self.allowed, "choose another port with -p")
        except GgmqError:
            if self.auth is not None:
                self.auth.stop()
            self.context.destroy(linger=0)
            raise
        self.public, self.endpoint = self.listener.socket, self.listener.endpoint
        self.folder = socket_folder()
        self.inner = new_socket(self.context, zmq.ROUTER, None, server=True)
        self.inner_endpoint = f"ipc://{Path(self.folder.name) / 'front'}"
        self.inner.bind(self.inner_endpoint)
        self.children: list[subprocess.Popen[bytes]] = []
        self.order: list[bytes] = []
        self.infos: dict[bytes, m.DeviceInfo] = {}
        self.gathering: dict[tuple[bytes, Command, int], Gathering] = {}
        self.watch = Watch(GUARD_S)
        self.stopping = False

    def start(self, commands: list[list[str]]) -> list[m.DeviceInfo]:
        """Start one process a command and wait for each HELLO. Returns: their devices, in order."""
        for command in commands:
            self.children.append(subprocess.Popen([*command, "--join", self.inner_endpoint,
                                                   "--parent-pid", str(os.getpid())], env=module_environment()))  # fmt: skip
            due = time.monotonic() + START_S
            while not self.inner.poll(100):
                code = self.children[-1].poll()
                if code is not None:
                    raise WorkerLost(f"a device process ended with code {code} before it was ready: {command}")
                if time.monotonic() > due:
                    raise WorkerLost(f"a device process was not ready within {START_S:.0f} s: {command}")
            rid, _, *frames = self.inner.recv_multipart()
            hello = decode(frames).header
            assert isinstance(hello, m.Hello)  # our own process said it
            self.order.append(rid)
            self.infos[rid] = hello.devices[0]
        return [self.infos[rid] for rid in self.order]

    def run(self) -> None:
        raise_descriptor_limit()
        poller = zmq.Poller()
        for s in (self.public, self.inner):
            poller.register(s, zmq.POLLIN)
        try:
            while not self.stopping:
                for s, _ in poller.poll(math.ceil(1000 * self.watch.wait_s)):
                    for _ in range(64):
                        try:
                            frames = s.recv_multipart(zmq.DONTWAIT, copy=False)
                        except zmq.Again:
                            break
                        if s is self.public:
                            caller = self.listener.heard(frames[-1])
                            if caller is not None:
                                self._from_outside(frames, caller)
                        else:
                            self._from_device(frames)
                for frames in self.ordering.due(time.monotonic()):
                    self._pass_on(frames)
                self.watch.look([self.listener])
                for child in self.children:
                    if child.poll() is not None and not self.stopping:
                        print(f"ggmq worker: a device process ended with code {child.returncode}", file=sys.stderr)
                        self.stopping = True
        finally:
            self.close()

    def close(self) -> None:
        for child in self.children:
            child.terminate()
        for child in self.children:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self.public.close()
        self.inner.close()
        if self.auth is not None:
            self.auth.stop()
        self.context.destroy(linger=0)
        self.folder.cleanup()

    def _from_outside(self, frames: list[zmq.Frame], caller: Caller) -> None:
        rid = frames[0].bytes
        if self.callers.is_another(rid, caller):
            self._gone(rid)
        try:
            command, reply, _, epoch, seq = prefix_of(frames[1].buffer if len(frames) > 1 else b"")
            if command in (Command.HELLO, Command.PEER_LISTEN):
                h = decode([f.bytes for f in frames[1:]]).header  # only here is it known who says it
                if isinstance(h, m.Hello):
                    self.callers.greet(rid, caller, h.role)
                elif isinstance(h, m.PeerListen) and caller.role is Role.CLUSTER and self.allowed is not None:
                    self.allowed.name(rid, h.keys)
        except GgmqError as e:
            self.listener.refused(frames[-1], e)
            self._error(rid, frames, e)
            return
        if command == Command.HELLO:
            self.ordering.hello(rid, epoch, seq)
        if command == Command.HELLO or reply:
            self._pass_on(frames)
        elif self.ordering.was_skipped(rid, epoch, seq):
            self._error(rid, frames, Unavailable(OVERTAKEN.format(command.name)))
        else:
            for turn in self.ordering.take(rid, epoch, seq, frames, time.monotonic()):
                self._pass_on(turn)

    def _pass_on(self, frames: list[zmq.Frame]) -> None:
        """A message has its turn: to one device, or to all."""
        rid = frames[0].bytes
        command, _, device, _, seq = prefix_of(frames[1].buffer)
        if command in TO_ALL:
            self.gathering[(rid, command, seq)] = Gathering(set(self.order))
            for child in self.order:
                self.inner.send_multipart([child, *frames], copy=False)
        elif device < len(self.order):
            self.inner.send_multipart([self.order[device], *frames], copy=False)
        else:
            self._error(rid, frames, ProtocolError(f"{command.name}: device {device} of {len(self.order)}"))

    def _error(self, rid: bytes, frames: list[zmq.Frame], error: GgmqError) -> None:
        refusal = refusal_of([f.bytes for f in frames[1:2]], error)
        if refusal is not None:
            self._send(rid, encode(refusal))

    def _from_device(self, frames: list[zmq.Frame]) -> None:
        child, rid = frames[0].bytes, frames[1].bytes
        command, reply, _, _, seq = prefix_of(frames[2].buffer)
        pending = [k for k in self.gathering if k[0] == rid and k[2] == seq and child in self.gathering[k].waiting]
        if not reply or not pending or command not in (*TO_ALL, Command.ERROR):
            self._send(rid, [f.buffer for f in frames[2:]])
            return
        gathering = self.gathering[pending[0]]
        gathering.waiting.discard(child)
        gathering.replies[child] = decode([f.bytes for f in frames[2:]])
        if not gathering.waiting:
            del self.gathering[pending[0]]
            self._send(rid, encode(self._joined(gathering)))

    def _joined(self, gathering: Gathering) -> Message:
        for reply in gathering.replies.values():
            if reply.command == Command.ERROR:
                return reply
        first = gathering.replies[self.order[0]]
        if not isinstance(first.header, m.Hello):
            return first
        devices = []
        for child in self.order:
            h = gathering.replies[child].header
            assert isinstance(h, m.Hello)  # every device answered HELLO with HELLO
            devices += h.devices
        header = msgspec.structs.replace(first.header, devices=devices)
        return Message(first.command, header, (), True, first.device, first.epoch, first.seq)

    def _send(self, rid: bytes, frames: list[Frame]) -> None:
        try:
            self.public.send_multipart([rid, *frames], zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as e:
            if e.errno == zmq.EHOSTUNREACH:
                self._gone(rid)

    def _gone(self, rid: bytes) -> None:
        """A peer has gone; a device process hears it as a message without frames."""
        self.callers.forget(rid)
        self.ordering.forget(rid)
        if self.allowed is not None:
            self.allowed.forget({rid})
        for child in self.order:
            self.inner.send_multipart([child, rid], copy=False)
