"""Clients of all manners, over plain sockets: what each does is chosen by chance, with a seed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

PATIENCE_S = 120.0
"""What takes longer is a failure: nothing that is asked here takes so long, however many ask."""
STALL_S = 3.0
"""The server's patience with half requests and unread answers, as it is started."""
MAX_REFUSALS = 200
ENDLESS = {"max_tokens": 400, "ignore_eos": True, "stream": True}
PROMPTS = ("Once upon a time", "Tom and Lily", "One day a dog", "The sun", "There was a little girl named", "A cat saw a",
           "Mom said to", "In the park the children")  # fmt: skip


class Wanted(NamedTuple):
    """A request whose answer is known, since it was asked for alone."""

    path: str
    body: str
    text: str = ""


class Answer(NamedTuple):
    status: int
    head: bytes
    body: bytes


@dataclass
class Seen:
    """What came of it all.

    Attributes:
        statuses: by manner and status; 0: the connection was closed without an answer.
        failures: what must not be.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    n_equal: int = 0

    def note(self, manner: str, status: int, body: bytes = b"") -> None:
        self.statuses[manner, status] += 1
        if status >= 500 and status != 501:
            self.fail(f"{manner}: {status} {body[:300]!r}")

    def fail(self, text: str) -> None:
        self.failures.append(text)


def wanted_requests(rng: Random) -> list[Wanted]:
    """Requests of each API that are well formed, and whose answers depend on nothing but them."""
    out = []
    for i, prompt in enumerate(PROMPTS):
        how: dict[str, Any] = {"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": i}
        message = [{"role": "user", "content": prompt}]
        how["max_tokens"] = rng.randrange(8, 60)
        out.append(Wanted("/v1/completions", json.dumps({"prompt": prompt, **how})))
        out.append(Wanted("/v1/completions", json.dumps({"prompt": prompt, "stream": True, **how})))
        out.append(Wanted("/v1/chat/completions", json.dumps({"messages": message, "stream": True, **how})))
        out.append(Wanted("/v1/messages", json.dumps({"messages": message, "model": "m", **how, "temperature": 0})))
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    out.append(Wanted("/v1/completions", json.dumps({"prompt": "n:", "max_tokens": 40, "temperature": 0,
                                                     "guided_json": schema})))  # fmt: skip
    return out


def post(path: str, body: str | bytes, *headers: str) -> bytes:
    raw = body.encode() if isinstance(body, str) else body
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(raw)}",
             "Connection: close", *headers]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def parsed(raw: bytes) -> Answer:
    """A whole answer, its body without chunks."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/") else 0
    if b"chunked" in head.lower():
        body = b""
        while (sized := rest.partition(b"\r\n"))[1] and (n := int(sized[0] or b"0", 16)):
            body, rest = body + sized[2][:n], sized[2][n + 2 :]
        return Answer(status, head, body)
    return Answer(status, head, rest)


def text_of(answer: Answer) -> str:
    """The text of an answer of any API, streamed or whole."""
    if b"text/event-stream" in answer.head:
        events = [json.loads(line[6:]) for line in answer.body.splitlines() if line.startswith(b"data: {")]
        if not answer.body.rstrip().endswith(b"[DONE]"):
            raise ValueError(f"a stream without an end: {answer.body[-200:]!r}")
        return "".join(_piece(c) for e in events for c in e.get("choices", ()))
    body = json.loads(answer.body)
    if "content" in body:
        return "".join(part.get("text", "") for part in body["content"])
    return "".join(_piece(c) for c in body["choices"])


def _piece(choice: dict[str, Any]) -> str:
    said = choice.get("delta") or choice.get("message") or {}
    return choice.get("text") or said.get("content") or ""


async def closed(writer: asyncio.StreamWriter) -> None:
    """Close a connection, and be sure that it is."""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class Clients:
    """Clients of one server. Threads: one event loop's."""

    def __init__(self, port: int, rng: Random, wanted: list[Wanted], seen: Seen) -> None:
        self.port, self.rng, self.wanted, self.seen = port, rng, wanted, seen
        self.manners: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (8, self.good), (4, self.leaves), (2, self.stalls), (2, self.half), (3, self.garbage), (3, self.wrong),
            (2, self.looks), (1, self.closes_its_side), (1, self.watches), (1, self.crowd),
        ]  # fmt: skip

    async def any(self) -> None:
        """One client of some manner."""
        weights, manners = zip(*self.manners, strict=True)
        manner = self.rng.choices(manners, weights)[0]
        try:
            await asyncio.wait_for(manner(), PATIENCE_S)
        except TimeoutError:
            self.seen.fail(f"{manner.__name__}: not over after {PATIENCE_S:.0f} s")
        except ConnectionRefusedError as e:
            self.seen.fail(f"{manner.__name__}: {e}")
        except (ConnectionError, asyncio.IncompleteReadError) as e:
            if manner in (self.good, self.looks):
                self.seen.fail(f"{manner.__name__}: {type(e).__name__} {e}")

    # -- what they do --------------------------------------------------------------------------------------------------

    async def exchange(self, sent: bytes) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(sent)
            return parsed(await reader.read())
        finally:
            await closed(writer)

    async def good(self) -> None:
        """Asks, waits when told to, and gets the text that it would get alone."""
        w = self.rng.choice(self.wanted)
        for _ in range(MAX_REFUSALS):
            answer = await self.exchange(post(w.path, w.body))
            self.seen.note("good", answer.status, answer.body)
            if answer.status == 429:
                found = re.search(rb"(?i)\r\nretry-after: (\d+)", answer.head)
                if found is None:
                    self.seen.fail("good: 429 without Retry-After")
                await asyncio.sleep(min(5.0, float(found[1]) if found else 1.0) * self.rng.uniform(0.5, 1.0))
                continue
            if answer.status != 200:
                self.seen.fail(f"good: {answer.status} for {w.body}: {answer.body[:300]!r}")
            elif (text := text_of(answer)) != w.text:
                self.seen.fail(f"good: {w.path} {w.body} gave {text!r}, alone {w.text!r}")
            else:
                self.seen.n_equal += 1
            return
        self.seen.fail(f"good: refused {MAX_REFUSALS} times")

    async def leaves(self) -> None:
        """Goes away after some of the answer, or before any, sometimes with a reset."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = {"prompt": self.rng.choice(PROMPTS), "n": self.rng.choice((1, 1, 2)), **ENDLESS}
        writer.write(post("/v1/completions", json.dumps(body)))
        n = self.rng.choice((0, 1, 300, 3000))
        got = await reader.readexactly(n) if n else b""
        if got:
            self.seen.note("leaves", int(got.split(b" ", 2)[1]) if len(got) > 12 else 200)
        if self.rng.random() < 0.5:  # a reset instead of an end
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await closed(writer)

    async def stalls(self) -> None:
        """Asks for much, and reads none of it for a while."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1024)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        writer.write(post("/v1/completions", json.dumps({"prompt": "Once", "logprobs": 5, **ENDLESS})))
        await asyncio.sleep(self.rng.uniform(0, 2 * STALL_S))
        with contextlib.suppress(ConnectionError):
            self.seen.note("stalls", parsed(await reader.read()).status)
        await closed(writer)

    async def half(self) -> None:
        """Sends a part of a request, and waits, or goes on later, or goes."""
        whole = post("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": "Tom"}], "max_tokens": 5}))
        at = self.rng.randrange(1, len(whole))
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(whole[:at])
        what = self.rng.choice(("waits", "goes on", "goes"))
        if what == "goes on":
            await asyncio.sleep(self.rng.uniform(0, STALL_S / 2))
            writer.write(whole[at:])
        if what != "goes":
            answer = parsed(await reader.read())
            self.seen.note(f"half, {what}", answer.status, answer.body)
        await closed(writer)

    async def garbage(self) -> None:
        """Sends what is no request: noise, or a request of which bytes are others."""
        if self.rng.random() < 0.5:
            sent = self.rng.randbytes(self.rng.choice((1, 50, 5000, 100_000)))
        else:
            whole = bytearray(post("/v1/completions", '{"prompt": "Tom", "max_tokens": 3}'))
            for _ in range(self.rng.randrange(1, 6)):
                whole[self.rng.randrange(len(whole))] = self.rng.randrange(256)
            sent = bytes(whole)
        answer = await self.exchange(sent)
        self.seen.note("garbage", answer.status, answer.body)

    async def wrong(self) -> None:
        """Sends requests of HTTP that no API has."""
        rng = self.rng
        deep = "[" * 5000 + "]" * 5000
        body = rng.choice((
            "", "{", "null", "[]", deep, '{"prompt": 5}', '{"prompt": ""}', '{"prompt": [99999999]}', '{"messages": "x"}',
            '{"prompt": "a", "max_tokens": -5}', '{"prompt": "a", "temperature": "hot"}', '{"prompt": "\\ud800"}',
            '{"prompt": "a", "guided_regex": "((((("}', '{"prompt": "a", "guided_json": {"type": "nonsense"}}',
            '{"prompt": "a", "guided_json": {"$ref": "#/nowhere"}}', '{"prompt": "a", "logit_bias": {"x": 1}}',
            '{"messages": [{"role": "nobody", "content": "x"}]}', '{"prompt": "a", "n": 1000}',
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            json.dumps({"prompt": "word " * 5000}), json.dumps({"prompt": "x" * (2 << 20)}),
        ))  # fmt: skip
        path = rng.choice(("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings",
                           "/tokenize", "/detokenize", "/apply-template", "/nothing", "/v1/responses/x", "/%00", "//",
                           "/web/../../etc/passwd", "/cluster", "/health"))  # fmt: skip
        sent = post(path, body)
        if rng.random() < 0.2:
            sent = sent.replace(b"POST", rng.choice((b"PUT", b"DELETE", b"BREW", b"OPTIONS", b"HEAD")), 1)
        answer = await self.exchange(sent)
        self.seen.note("wrong", answer.status, answer.body)

    async def looks(self) -> None:
        """Asks what there is, as pages, Prometheus and people do."""
        path = self.rng.choice(("/health", "/metrics", "/slots", "/props", "/cluster", "/v1/models", "/"))
        answer = await self.exchange(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        self.seen.note("looks", answer.status, answer.body)
        if answer.status != 200:
            self.seen.fail(f"looks: {path}: {answer.status}")

    async def closes_its_side(self) -> None:
        """Says that nothing more comes from it, and still wants the answer, or goes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(post("/v1/completions", '{"prompt": "Tom", "max_tokens": 5}'))
        writer.write_eof()
        answer = parsed(await reader.read())
        self.seen.note("closes its side", answer.status, answer.body)
        await closed(writer)

    async def watches(self) -> None:
        """Follows the cluster for a while, as the page does."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /cluster/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(self.rng.randrange(1, 20)):
            await reader.readline()
        await closed(writer)

    async def crowd(self) -> None:
        """Many at once, more than may wait."""
        body = post("/v1/completions", '{"prompt": "Tom", "max_tokens": 20}')
        for answer in await asyncio.gather(*(self.exchange(body) for _ in range(40))):
            self.seen.note("crowd", answer.status, answer.body)
            if answer.status == 429 and b"retry-after" not in answer.head.lower():
                self.seen.fail("crowd: 429 without Retry-After")
