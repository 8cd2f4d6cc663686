"""Every bound that a peer's input is held against, in one place.

Units: `_bytes` and `_s` in the names; `n_*` are counts. A message over a bound is refused before anything is allocated.
"""

from __future__ import annotations

PROTOCOL_VERSION = 8
"""Goes up when a header, a record or the op table changes; HELLO refuses another version."""

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADER_DEPTH = 8
MAX_HEADER_ITEMS = 4096
MAX_STRING_BYTES = 16 * 1024

MAX_FRAMES = 64
MAX_CHUNK_BYTES = 1 << 20
"""Weights travel in chunks of this size, so that a token never waits behind a large message."""
MAX_EXTENTS = 64
"""Parts of buffers that are read with another one."""
MAX_MESSAGE_BYTES = 1 << 30
"""ZMQ_MAXMSGSIZE of sockets that we connect: one frame may hold the logits of a long prompt piece, and no more."""
MAX_REQUEST_BYTES = 1 << 24
"""All frames of a message to a worker that listens, and what a connection may have sent of one that is not complete:
activations of a piece of a prompt are the largest. ZeroMQ keeps 64 bytes for each frame, however short."""

MAX_SRC = 10
MAX_OP_PARAMS = 16
MAX_GRAPH_TENSORS = 65_536
MAX_TENSOR_BYTES = 1 << 46
MAX_BUFFER_BYTES = 1 << 46
MAX_GRAPHS_PER_SESSION = 256
MAX_BUFFERS_PER_SESSION = 65_536
MAX_SESSIONS = 256
MAX_ROUTE_STEPS = 64
MAX_ROPE_POSITION = 1 << 30

MAX_WEIGHTS_ASKED = 128
"""In one question whether they are there: with the names of their files they fit a header."""
FETCH_S = 30.0
"""A worker fetches a weight from another for so long, then says how far it is."""
FETCH_STALL_S = 3.0
"""It gives up on one that sends nothing for so long."""

SCRATCH_BYTES = 32 << 20
"""Memory that is left on each device for the intermediate results of graphs."""

CREDIT_CHUNKS = 8
"""Chunks of one upload that may be in flight to one device."""
MAX_INFLIGHT_PER_CLIENT = 1024

MAX_CLIENTS = 4096
MAX_DEVICES = 4096
MAX_LIST_BYTES = 32 * 1024
"""A page of a list: what is longer is asked for page by page."""

PING_INTERVAL_S = 0.25
PING_DEADLINE_S = 1.0
"""A worker that answers no PING for this long is silent, whether it computes or not: what waits for it is answered. With the
interval and a broker's ticks that is within 1.5 s of its last word."""
NETWORK_S, NETWORK_MOST_S = 0.2, 4.0
"""So much of that is for the network. Where TCP measures more, the worker has more, up to so much."""
MOVED_BYTES = 4096
"""A connection that carries so much, more than PINGs are, is one over which something is on its way."""
RETURN_S = 60.0
"""For this long a model's owner waits for a silent worker, or for a broker that answers nothing."""
RECONNECT_S = 6.0
"""A worker that listens and has not said HELLO within this long is dialled afresh."""
REDIAL_S = 0.5
"""So often a worker that dials in tries, when its broker has gone."""
HANDSHAKE_IVL_S = 3.0
REQUEST_DEADLINE_S = 300.0

MAX_TRACED_COMPUTES = 1024
MAX_TRACED_STEPS = 1 << 18
MAX_TRACE_BYTES = 1 << 26
MAX_TRACES = 8
"""Clients whose computes a broker notes at once, and sessions on a worker."""

MAX_LINKS = 64
MAX_HANDED_BYTES = 1 << 28
"""Activations that wait in a worker for the STAGE_COMPUTE that takes them."""
HANDED_KEPT_S = 2 * RETURN_S
"""They wait for so long: the broker that has that STAGE_COMPUTE to send may be suspended meanwhile, and is waited for."""
DIAL_S = 3.0
"""Within this long a worker that is dialled proves who it is, or activations go through the broker."""
HAND_OVER_S = 5.0
"""Within this long a worker says that activations arrived: it answers between two nodes of a running graph."""
LINK_PING_S = 5.0

PEER_SILENCE_S = 20.0
"""A peer that has sent nothing, not even a PING, for this long makes room when a worker's memory is short."""
PEER_KEPT_S = 300.0
"""A worker frees what such a peer holds after this long in any case: it was suspended, or its host is gone."""
PEER_CLOSED_S = 5.0
"""The same for a peer whose connection is closed: in this time a broken network may heal."""
ORPHANED_S = 60.0
"""Weights, and memory that has a secret, which a broker that has gone held are kept for this long at least, while nothing
else needs the room: it may be started again, and its clients be back."""
MIN_SECRET_BYTES = 16
PROBE_S = 1.0
"""A connection over which nothing came for this long is tried."""

SOCKET_OPTIONS: dict[str, int] = {
    "LINGER": 0,
    "MAXMSGSIZE": MAX_MESSAGE_BYTES,
    "HANDSHAKE_IVL": int(HANDSHAKE_IVL_S * 1000),
    "SNDHWM": 4096,
    "RCVHWM": 4096,
    "TCP_KEEPALIVE": 1,
    "TCP_KEEPALIVE_IDLE": 10,
    "TCP_KEEPALIVE_INTVL": 5,
    "TCP_KEEPALIVE_CNT": 3,
}
"""ZeroMQ options of every socket, by ZeroMQ's names. The size limit holds before authentication too. A host that is gone
is known to be so after half a minute; a process that only sleeps keeps its connections."""

RESERVED_DESCRIPTORS = 64
"""File descriptors that listening sockets leave for the process itself."""

ZAP_DOMAIN = "ggmq"
