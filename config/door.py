"""Who was refused at a listening socket, by address and cause."""

from __future__ import annotations

import contextlib
import secrets
import struct
import sys
import threading
import time
from typing import Any

import zmq

from config.allowed import Allowed
from config.descriptors import borrowed
from config.refusals import Refusals
from config.terminal import print_line

N_EVENTS = 20_000
"""What ZeroMQ may have to tell of connections before it waits for the thread that listens."""
NAMED_LATER_S = 2.0
"""For so long a peer whose address is not known may come again and be named."""
N_LOOKED_UP = 100
"""Addresses that are looked up in a second: a crowd of strangers shall not take a worker's time."""
_LISTENING = (zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
              | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH)  # fmt: skip


class Door:
    """Names the peers whose handshake with a listening socket fails.

    ZeroMQ tells of a failure without an address, and of a connection with a file descriptor that may be another's soon. So a
    thread waits for nothing else, and looks up the address as a connection begins. Of one that was gone sooner, and whose
    key was asked for, the Authenticator knows it; of others the thread waits a little for another try of the same peer (a
    ggmq one tries again slowly, see `config.probe`). It ends with the socket or the context.
    """

    def __init__(self, context: zmq.Context[Any], s: zmq.Socket[Any], allowed: Allowed | None, who: str) -> None:
        self.who, self._allowed = who, allowed
        if allowed is not None:
            allowed.refused.clear()
        self._refusals, self._lock = Refusals(), threading.Lock()
        name = f"inproc://door-{secrets.token_hex(8)}"
        s.monitor(name, _LISTENING)
        # of a shadow: whoever destroys the context does not close what the thread reads, but ends its waiting
        self._events: zmq.Socket[Any] = zmq.Context.shadow(context.underlying).socket(zmq.PAIR)
        self._events.setsockopt(zmq.RCVHWM, N_EVENTS)
        self._events.connect(name)
        threading.Thread(target=self._watch, name="ggmq-door", daemon=True).start()

    def say(self, address: str, reason: str) -> None:
        """Threads: any."""
        with self._lock:
            line = self._refusals.line(address, reason, time.monotonic())
        if line:
            print_line(f"{self.who}: {line}", file=sys.stderr)

    def _watch(self) -> None:
        addresses: dict[int, str] = {}
        reason, asked, n_looked_up, since_s = "", "", 0, 0.0
        unnamed, due_s = "", 0.0
        try:
            while True:
                left_s = due_s - time.monotonic()
                if unnamed and (left_s <= 0 or not self._events.poll(int(1000 * left_s) + 1)):
                    self.say("", unnamed)
                    unnamed = ""
                event, value = struct.unpack("=hi", self._events.recv())
                self._events.recv()  # the address on which we listen
                if event == zmq.EVENT_ACCEPTED:
                    now = time.monotonic()
                    if now - since_s > 1:
                        n_looked_up, since_s = 0, now
                    n_looked_up += 1
                    addresses[value] = peer_of(value) if n_looked_up <= N_LOOKED_UP else ""
                elif event == zmq.EVENT_DISCONNECTED:  # one thread of ZeroMQ tells all: this is the one that failed
                    address = addresses.pop(value, "") or asked
                    if reason and address:
                        self.say(address, reason)
                        unnamed = ""
                    elif reason and not unnamed:
                        unnamed, due_s = reason, time.monotonic() + NAMED_LATER_S
                    reason = asked = ""
                elif event == zmq.EVENT_MONITOR_STOPPED:
                    return
                else:
                    reason = self._reason(event, value)
                    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._allowed is not None:
                        with contextlib.suppress(IndexError):
                            asked = self._allowed.refused.popleft()
        except zmq.ContextTerminated:
            pass
        finally:
            self._events.close(linger=0)

    def _reason(self, event: int, value: int) -> str:
        """Why a handshake failed. That a peer only went away is not told: scanners, and those who look who is there, do."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "its key is none that this cluster lets in, or was removed; see `ggmq keys list` on the main host"
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            if self._allowed is not None:
                return "it uses no cluster key; copy the key file to it, and leave --insecure out there"
            return f"it uses a cluster key, and this {self.who.rpartition(' ')[2]} runs without one"
        if value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            return "it has another cluster key; copy the key file to it again"
        return "it speaks ZeroMQ's protocol in another way than ggmq"


def peer_of(fd: int) -> str:
    """The address at the other end of a connection of this process; empty when it is closed already."""
    with contextlib.suppress(OSError), borrowed(fd) as s:
        return str(s.getpeername()[0])
    return ""
