"""Clients that ask a server over HTTP, in a process of their own: `python -m bench.clients`, a Load as JSON on its input.

Prompts are token ids, so that every server reads the same; answers come as server-sent events, of which only the times are
looked at, so that clients take little of the machine's time.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, field

FIRST_ID = 300
"""Tokens below stand for single bytes in the random-weight models."""
MADE = re.compile(rb'"completion_tokens": ?(\d+)')
READ = re.compile(rb'"prompt_tokens": ?(\d+)')


@dataclass
class Load:
    """Clients that each ask one request after the other.

    Attributes:
        seconds: for so long they are measured, from `warm_s` on.
        texts: prompts as texts, one a client, asked once; the answers are wanted then, and nothing is measured.
    """

    port: int
    n_clients: int
    n_prompt: int = 64
    n_made: int = 64
    n_vocab: int = 32_000
    seconds: float = 20.0
    warm_s: float = 3.0
    seed: int = 1
    texts: list[str] = field(default_factory=list)


@dataclass
class Found:
    """What they saw. Units: seconds; `tokens_per_s` of all together.

    Attributes:
        first_s, gaps_s: times to the first token, and between tokens.
        prompt_tokens: what the server says that a prompt had.
    """

    tokens_per_s: float = 0.0
    n_requests: int = 0
    prompt_tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


@dataclass
class Answer:
    """One answer: when it was asked for, when each event came, and what the server counted."""

    asked_s: float
    events_s: list[float] = field(default_factory=list)
    n_made: int = 0
    n_prompt: int = 0
    text: str = ""


async def ask(load: Load, prompt: list[int] | str, answer: Answer, keep_text: bool) -> None:
    body = json.dumps({
        "prompt": prompt, "max_tokens": load.n_made, "temperature": 0, "stream": True, "ignore_eos": not keep_text,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    head = (f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n")  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port, limit=1 << 20)
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{status!r} {await reader.read()!r}"[:500])
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        if b'"usage":' in line and (made := MADE.search(line)) and (read := READ.search(line)):
            answer.n_made, answer.n_prompt = int(made[1]), int(read[1])
        if b'"choices":[]' in line or b'"choices": []' in line:
            continue
        if keep_text:
            answer.text += json.loads(line[6:])["choices"][0]["text"]
        if b'"text":""' not in line:
            answer.events_s.append(time.perf_counter())
    writer.close()


async def client(load: Load, number: int, until_s: float, answers: list[Answer]) -> None:
    rng = random.Random(load.seed * 1000 + number)
    while time.perf_counter() < until_s:
        prompt = [rng.randrange(FIRST_ID, load.n_vocab) for _ in range(load.n_prompt)]
        answers.append(Answer(time.perf_counter()))
        await ask(load, prompt, answers[-1], False)


async def measured(load: Load) -> Found:
    start = time.perf_counter() + load.warm_s
    end = start + load.seconds
    answers: list[Answer] = []
    tasks = [asyncio.create_task(client(load, i, end, answers)) for i in range(load.n_clients)]
    await asyncio.gather(*tasks)
    n_events = sum(start <= at < end for a in answers for at in a.events_s)
    each = sum(a.n_made for a in answers) / max(1, sum(len(a.events_s) for a in answers))  # tokens of an event
    found = Found(n_events * each / load.seconds, len(answers), answers[-1].n_prompt)
    for a in answers:
        if a.events_s and start <= a.events_s[0] < end:
            found.first_s.append(a.events_s[0] - a.asked_s)
        found.gaps_s += [b - a for a, b in zip(a.events_s, a.events_s[1:], strict=False) if start <= b < end]
    return found


async def texts_of(load: Load) -> Found:
    answers = [Answer(time.perf_counter()) for _ in load.texts]
    due = list(zip(load.texts, answers, strict=True))
    for i in range(0, len(due), load.n_clients):
        await asyncio.gather(*(ask(load, text, answer, True) for text, answer in due[i : i + load.n_clients]))
    return Found(n_requests=len(answers), first_s=[a.events_s[0] - a.asked_s for a in answers if a.events_s],
                 texts=[a.text for a in answers])  # fmt: skip


def main() -> None:
    load = Load(**json.load(sys.stdin))
    print(json.dumps(asdict(asyncio.run(texts_of(load) if load.texts else measured(load)))))


if __name__ == "__main__":
    main()
