"""Turns between sessions: a worker and its clients as a simulation, in which time is a number."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol import messages as m
from protocol.frames import Message
from workers.turns import AWAY_S, MANY, WAIT_S, Key, Place, Turns, Waiting

POLL_S = 0.001


class Client:
    """One who asks again `think_s` after each answer; its computes take `work_s`."""

    def __init__(self, name: str, work_s: float, think_s: float, since_s: float = 0.0) -> None:
        self.key: Key = (name.encode(), 1)
        self.work_s, self.think_s, self.since_s = work_s, think_s, since_s
        self.used_s, self.done = 0.0, list[float]()

    @property
    def worst_gap_s(self) -> float:
        return max(b - a for a, b in zip([self.since_s, *self.done], self.done, strict=False))


def simulate(clients: list[Client], until_s: float) -> float:
    """A worker serves them. Returns: for how long it did nothing while somebody waited."""
    turns, now, idle_s = Turns(), 0.0, 0.0
    coming = [(c.since_s, i) for i, c in enumerate(clients)]
    heapq.heapify(coming)
    waiting: dict[Key, Client] = {}
    while now < until_s:
        while coming and coming[0][0] <= now:
            c = clients[heapq.heappop(coming)[1]]
            waiting[c.key] = c
        if not waiting:
            now = coming[0][0]
            continue
        chosen = turns.choose(waiting, now)
        if chosen is None:
            step = max(1e-9, min(POLL_S, coming[0][0] - now if coming else POLL_S))
            now, idle_s = now + step, idle_s + step
            continue
        c = waiting.pop(chosen)
        now += c.work_s
        turns.ran(chosen, c.work_s, now)
        c.used_s += c.work_s
        c.done.append(now)
        heapq.heappush(coming, (now + c.think_s, clients.index(c)))
    return idle_s


def test_tokens_and_a_long_prompt_each_have_half_of_the_time() -> None:
    tokens, prompt = Client("tokens", 0.02, 0.001), Client("prompt", 0.1, 0.0005)
    simulate([tokens, prompt], 20.0)
    assert tokens.used_s == pytest.approx(prompt.used_s, rel=0.1)
    assert tokens.worst_gap_s < 0.13


def test_one_who_asks_late_costs_the_others_next_to_nothing() -> None:
    slow, prompt = Client("slow", 0.02, 10 * WAIT_S), Client("prompt", 0.1, 0.0005)
    idle_s = simulate([slow, prompt], 50.0)
    assert idle_s < 50.0 / AWAY_S * 2 * (WAIT_S + POLL_S)
    assert slow.worst_gap_s < 0.1 + 0.1 + 0.02 + 10 * WAIT_S


def test_who_was_away_does_not_make_up_for_it() -> None:
    first, later = Client("first", 0.1, 0.0005), Client("later", 0.1, 0.0005, since_s=30.0)
    simulate([first, later], 40.0)
    assert later.used_s == pytest.approx(5.0, abs=0.3)
    assert first.worst_gap_s < 0.31


@example([(2**-9, 0.0), (2**-9, 0.0024)])
@given(st.lists(st.tuples(st.floats(0.001, 0.3), st.floats(0, 0.0025)), min_size=2, max_size=6))
def test_all_who_ask_at_once_have_the_same_time_and_nobody_starves(kinds: list[tuple[float, float]]) -> None:
    clients = [Client(str(i), *kind) for i, kind in enumerate(kinds)]
    until_s = 30.0
    simulate(clients, until_s)
    longest = max(c.work_s for c in clients)
    for c in clients:
        assert abs(c.used_s - max(d.used_s for d in clients)) < 2 * longest + 0.02 * until_s
        assert c.worst_gap_s < (len(clients) + 1) * (longest + c.work_s + WAIT_S + POLL_S)


def test_alone_nobody_waits_and_what_is_no_more_is_forgotten() -> None:
    turns = Turns()
    a, b = (b"a", 1), (b"b", 1)
    turns.ran(a, 1.0, 1.0)
    assert turns.choose([a], 1.0) == a
    turns.ran(a, 1.0, 2.0)
    turns.keep([b])
    assert turns.choose([b], 2.0) == b


def test_who_has_had_less_of_the_time_overtakes_what_runs() -> None:
    turns, (a, b) = Turns(), ((b"a", 1), (b"b", 1))
    assert turns.choose([a], 0.0) == a
    assert turns.overtakes([a, b], a, 0.0) is None, "both have had nothing"
    assert turns.overtakes([a, b], a, 0.01) == b
    turns.ran(b, 0.02, 0.02)
    assert turns.overtakes([b], a, 0.015) is None
    assert turns.overtakes([b], a, 0.025) == b
    assert turns.overtakes([a], a, 1.0) is None, "nobody overtakes himself"
    assert turns.others(a, 0.5) and not turns.others(b, 0.5) and not turns.others(a, 0.5 + AWAY_S)


def request(session: int, seq: int) -> Message:
    header = m.FreeBuffer(session, 1) if session else m.StatsQuery()
    return Message(m.COMMAND_OF[type(header)], header, seq=seq)


def hello(seq: int) -> Message:
    return Message(m.Command.HELLO, m.Hello(1, "broker"), seq=seq)


def place(of: tuple[bytes, Message]) -> Place:
    return of[0], getattr(of[1].header, "session", 0)


def firsts(came: list[tuple[bytes, Message]]) -> list[tuple[Place, int]]:
    """As the class says, by going through all, with where each is."""
    found: dict[Place, int] = {}
    for i, of in enumerate(came):
        if of[1].command == m.Command.HELLO:
            break
        found.setdefault(place(of), i)
    return list(found.items())


@given(st.integers(0, 1 << 32))
def test_within_a_session_nothing_overtakes_anything(seed: int) -> None:
    rng, waiting, seq = random.Random(seed), Waiting(), 0
    came: list[tuple[bytes, Message]] = []
    for _ in range(60):
        kind = rng.random()
        rid, seq = rng.choice([b"a", b"b"]), seq + 1
        if kind < 0.6:
            came.append((rid, request(rng.randrange(3), seq) if kind < 0.55 else hello(seq)))
            waiting.append(*came[-1])
        elif kind < 0.65 and came:
            gone = rng.choice(came)
            if gone[1].command != m.Command.HELLO:
                assert waiting.remove(gone[0], gone[1].seq) == [gone]
                came.remove(gone)
        elif came:
            expected = firsts(came)
            assert waiting.firsts() == [where for where, _ in expected]
            where, i = rng.choice(expected) if expected else (None, 0)
            assert waiting.take(where) == came.pop(i)
        assert len(waiting) == len(came) and waiting.peers() == {rid for rid, _ in came}


def test_who_has_many_requests_waiting_holds_up_nobody() -> None:
    waiting = Waiting()
    for i in range(MANY + 1):
        waiting.append(b"a", request(1, i))
    assert waiting.flood((b"a", 1)) and not waiting.flood((b"a", 2))
    waiting.append(b"b", request(1, 5))
    assert waiting.firsts() == [(b"a", 1), (b"b", 1)]
    waiting.take((b"a", 1))
    assert not waiting.flood((b"a", 1))
    waiting.insert(b"b", request(1, 4))
    assert [waiting.take((b"b", 1))[1].seq for _ in range(2)] == [4, 5]
    assert waiting.firsts() == [(b"a", 1)]


def test_what_waited_for_its_inputs_goes_before_what_its_session_sent_after_it() -> None:
    waiting = Waiting()
    waiting.append(b"a", request(1, 3))
    waiting.append(b"a", hello(0))
    waiting.insert(b"a", request(1, 2))
    waiting.insert(b"a", request(1, 4))
    assert [waiting.take(waiting.firsts()[0])[1].seq for _ in range(2)] == [2, 3]
    assert waiting.firsts() == [], "the last one came behind HELLO"
    assert waiting.take(None)[1].command == m.Command.HELLO
    assert waiting.take(waiting.firsts()[0])[1].seq == 4
