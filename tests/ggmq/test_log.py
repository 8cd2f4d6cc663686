"""The log of a server: one line an event, which a machine can read, with nothing in it that anyone wrote."""

from __future__ import annotations

import io
import json
import os
import queue
import re
import threading
from datetime import datetime

from ggmq.bus import BusConfig
from ggmq.hub import BUNDLED
from ggmq.log import LEVELS, MAX_WAITING, Log
from ggmq.model import ModelConfig
from ggmq.sampling import SamplingParams
from ggmq.service import Done, Event, Failed, Request
from ggmq.serving import serving
from protocol.errors import FormatError, WorkerLost
from tests.support.processes import until

SECRET = "Zanzibar"
FIELD = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|\S+)(?: |$)')


def parsed(text: str) -> list[dict[str, str]]:
    """Lines of logfmt; every character of a line belongs to a field."""
    out = []
    for line in text.splitlines():
        assert FIELD.sub("", line) == "", line
        out.append({k: json.loads(v) if v.startswith('"') else v for k, v in FIELD.findall(line)})
    return out


def test_a_session_is_told_without_what_was_written() -> None:
    stream = io.StringIO()
    log = Log("debug", stream)
    config = ModelConfig(BUNDLED, n_seq=2, bus=BusConfig(workers=1))
    with serving([config], told=log.told) as (services, _):
        service = services["stories"]
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        prompt = service.vocabulary.encode(f"Once {SECRET} upon a time")
        made = Request(prompt, SamplingParams(temperature=0), 8, stop=(SECRET,), key=SECRET)
        service.submit(made, events.put)
        while not isinstance(event := events.get(timeout=60), Done):
            assert not isinstance(event, Failed)
        left = service.submit(Request(prompt, SamplingParams(banned=service.vocabulary.end_ids), key=SECRET), events.put)
        events.get(timeout=60)
        left.cancel()
        until(lambda: all(s.state == "idle" for s in service.state().slots), 5)
    log.close()
    text = stream.getvalue()
    lines = parsed(text)
    assert SECRET not in text and "upon" not in text
    told = [(x["event"], x.get("request")) for x in lines if "request" in x]
    assert told == [("started", "1"), ("first_token", "1"), ("done", "1"),
                    ("started", "2"), ("first_token", "2"), ("cancelled", "2")]  # fmt: skip
    done = next(x for x in lines if x["event"] == "done")
    assert (done["model"], done["n_prompt"], done["n_made"], done["ended"]) == ("stories", str(len(prompt)), "8", "limit")
    assert float(done["prompt_s"]) > 0 and float(done["made_s"]) > 0 and datetime.fromisoformat(done["time"])
    assert any(x["event"] == "device" and x["state"] == "ready" for x in lines)


def test_errors_are_told_by_their_code_and_only_ours_by_their_words() -> None:
    stream = io.StringIO()
    log = Log("info", stream)
    log.told("started", error=FormatError("not written: too little"))
    log.told("failed", error=FormatError(f"messages[0]: expected a role, got {SECRET}"))
    log.told("worker lost", error=WorkerLost('its connection "closed"\n').at("den", "CPU"))
    try:
        raise KeyError(SECRET)
    except KeyError as e:
        log.told("bug", error=e)
    log.close()
    failed, lost, bug = parsed(stream.getvalue())
    assert (failed["error"], failed["level"]) == ("format", "error") and "message" not in failed
    assert (lost["worker"], lost["message"], lost["level"]) == ("den", 'its connection "closed"\n', "warning")
    assert bug["error"] == "KeyError" and re.fullmatch(r"tests\.ggmq\.test_log:\d+", bug["at"])
    assert SECRET not in stream.getvalue()


def test_whoever_does_not_read_the_log_holds_nobody_up() -> None:
    r, w = os.pipe()
    read = bytearray()

    def drain() -> None:
        while piece := os.read(r, 1 << 16):
            read.extend(piece)

    with os.fdopen(w, "w", encoding="utf-8") as stream:
        log = Log("info", stream)
        for i in range(3 * MAX_WAITING):  # far more than a pipe holds
            log.event("info", "done", request=i)
        reader = threading.Thread(target=drain)
        reader.start()
        until(log._lines.empty, 10)
        log.event("info", "last")
        log.close()
    reader.join()
    os.close(r)
    lines = parsed(read.decode())
    dropped = sum(int(x["n"]) for x in lines if x["event"] == "log_dropped")
    n_done = sum(x["event"] == "done" for x in lines)
    assert dropped > MAX_WAITING / 2 and dropped + n_done == 3 * MAX_WAITING and lines[-1]["event"] == "last"


def test_levels_are_in_order() -> None:
    for least in LEVELS:
        stream = io.StringIO()
        log = Log(least, stream)
        for level in ("debug", "info", "warning", "error"):
            log.event(level, "x", n=1)
        log.close()
        assert [x["level"] for x in parsed(stream.getvalue())] == list(LEVELS)[list(LEVELS).index(least) : -1]
