"""Clients that stall, lie, send garbage and go away: bounded, answered in the API's shape, never an error of the server."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.support.processes import n_descriptors, until
from tests.support.serving import Running, serving

ENDLESS = {"messages": [{"role": "user", "content": "Once"}], "ignore_eos": True, "max_tokens": 400}


@pytest.fixture(scope="module")
def tight() -> Iterator[Running]:
    """One slot, a short queue, little patience."""
    options = ("--temp", "0", "-np", "1", "--queue", "32", "-to", "1", "--max-body", "1", "--max-connections", "24")
    with serving(*options) as running:
        yield running
        assert idle(running)


def idle(server: Running) -> bool:
    return all(s["state"] == "idle" for s in server.get("/slots").json())


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def post(body: object, path: str = "/v1/chat/completions", *headers: str) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request("POST", path, raw, "Content-Type: application/json", *headers)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.mark.parametrize("garbage", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\r\n" * 100_000,
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", b"\0" * 70_000, b"A" * 70_000,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
])  # fmt: skip
def test_garbage_is_refused_and_the_connection_ends(tight: Running, garbage: bytes) -> None:
    answer = tight.exchange(garbage)
    assert status(answer) in (0, 400, 403, 404) and tight.get("/health").status_code == 200


def test_heads_and_bodies_that_do_not_come_are_cut_off(tight: Running) -> None:
    for begun in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"):
        with socket.create_connection(("127.0.0.1", tight.port), 20) as s:
            s.sendall(begun)
            assert s.recv(100) == b""
    answer = tight.exchange(post(b"x" * 100)[:-50], within_s=20)
    assert status(answer) == 408 and b"request_timeout" in answer


def test_a_drop_at_a_time_is_too_slow(tight: Running) -> None:
    with socket.create_connection(("127.0.0.1", tight.port), 20) as s:
        until(lambda: not _dripped(s), 20)


def _dripped(s: socket.socket) -> bool:
    s.settimeout(0.1)
    try:
        s.sendall(b"G")
        return s.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def test_bodies_that_are_too_large_are_refused_before_they_come(tight: Running) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert status(tight.exchange(head + b"Content-Length: 99999999\r\n\r\n")) == 413
    chunk = b"20000\r\n" + b" " * 0x20000 + b"\r\n"
    assert status(tight.exchange(head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 9)) == 413


@pytest.mark.parametrize(("body", "code"), [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b"\xff\xfe", 400), (b'{"messages":' + b"[" * 100_000, 400),
    (b'{"messages":[{"role":"user","content":"\\ud800"}],"max_tokens":1}', 400), (b'{"messages":[{"role":"user"}]}', 400),
    (b'{"a":' * 50_000, 400), (b'{"messages":[{"role":"user","content":"x"}],"max_tokens":1e400}', 400),
    (b'{"messages":[{"role":"user","content":"x"}],"max_tokens":99999999999999999999999999}', 400),
    (b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', 400),
    (b'{"messages":[{"role":"root","content":""}]}', 400),
    (b'{"messages":[{"role":"user","content":""}],"max_tokens":1,"unknown":{"a":[1]},"user":"me"}', 200),
    (b'{"messages":[{"role":"user","content":"\\u0000\\r\\n<|im_end|>"}],"max_tokens":1}', 200),
])  # fmt: skip
def test_bodies_are_checked(tight: Running, body: bytes, code: int) -> None:
    headers = {"Content-Type": "application/json"}
    r = httpx.post(tight.url + "/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert r.status_code == code, r.text
    assert code == 200 or r.json()["error"]["type"] == "invalid_request_error"


def test_routes_and_methods_that_are_not_there(tight: Running) -> None:
    for method, path, code in (("GET", "/v1/chat/completions", 405), ("DELETE", "/health", 405), ("POST", "/nothing", 404),
                               ("GET", "/v1/models/none", 404), ("GET", "/..%2f..%2fetc/passwd", 404)):  # fmt: skip
        r = httpx.request(method, tight.url + path)
        assert r.status_code == code and r.json()["error"]["message"], (method, path, r.text)
    assert httpx.post(tight.url + "/tokenize", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert "POST" in httpx.get(tight.url + "/tokenize").headers["allow"]
    assert status(tight.exchange(request("HEAD", "/health", b"", "Connection: close"))) == 200


def test_requests_in_one_go_are_answered_in_their_order(tight: Running) -> None:
    def ask(text: str, *more: str) -> bytes:
        return post({"content": text}, "/tokenize", *more)

    answer = tight.exchange(ask("a") + ask("b c") + ask("d e f", "Connection: close"))
    assert [len(json.loads(part.split(b"\r\n\r\n")[1])["tokens"]) for part in answer.split(b"HTTP/1.1 200")[1:]] == [1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_slot(tight: Running, stream: bool) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", tight.port), 20) as s:
            s.sendall(post(ENDLESS | {"stream": stream, "n": 16}))
            until(lambda: not idle(tight), 5)
        until(lambda: idle(tight), 5)


def test_who_does_not_read_loses_the_connection(tight: Running) -> None:
    before = n_descriptors(tight.process.pid)
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", tight.port))
        for _ in range(40):  # answers pile up, and nobody takes them
            s.sendall(request("GET", "/web/vendor/purify.es.mjs"))
        until(lambda: n_descriptors(tight.process.pid) > before, 5)
        until(lambda: n_descriptors(tight.process.pid) <= before, 10)


def test_a_queue_that_is_full_says_when_to_come_back(tight: Running) -> None:
    answers: list[httpx.Response] = []
    lock = threading.Lock()

    def ask() -> None:
        r = tight.post("/v1/chat/completions", **ENDLESS | {"n": 8, "max_tokens": 80})
        with lock:
            answers.append(r)

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    refused = [r for r in answers if r.status_code == 429]
    assert {r.status_code for r in answers} == {200, 429} and len(refused) >= 3
    assert all(int(r.headers["retry-after"]) > 0 and r.json()["error"]["code"] == "queue_full" for r in refused)
    assert len({r.json()["choices"][0]["message"]["content"] for r in answers if r.status_code == 200}) == 1


def test_connections_are_bounded_and_those_that_only_wait_make_room(tight: Running) -> None:
    """Connections that say nothing, or half of something, keep nobody out."""
    with contextlib.ExitStack() as held:
        for i in range(60):
            s = held.enter_context(socket.create_connection(("127.0.0.1", tight.port), 20))
            s.sendall((b"", b"GET / HTTP", post(b"x" * 50)[:-40])[i % 3])
        assert tight.get("/health").status_code == 200
        assert n_descriptors(tight.process.pid) < 100


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_soon(signum: int) -> None:
    with serving("--temp", "0") as running, socket.create_connection(("127.0.0.1", running.port), 20) as idle_one:
        body = ENDLESS | {"stream": True}
        with httpx.stream("GET", running.url + "/cluster/events", timeout=30) as events:
            next(events.iter_lines())
            with httpx.stream("POST", running.url + "/v1/chat/completions", json=body, timeout=30) as r:
                lines = r.iter_lines()
                next(lines)
                running.process.send_signal(signum)
                rest = list(lines)
            assert any("shutting down" in line or "[DONE]" in line for line in rest)
        assert running.process.wait(15) == 130 and idle_one.recv(1) == b""
