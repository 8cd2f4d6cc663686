"""Many requests at one model: each text is the one it has alone; slots are freed; a lost worker costs a pause."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Iterator

import pytest

from ggmq.bus import BusConfig
from ggmq.hub import BUNDLED
from ggmq.model import ModelConfig
from ggmq.sampling import SamplingParams
from ggmq.service import Delta, Done, Event, Failed, Job, Request, Service
from ggmq.serving import serving
from protocol.errors import FormatError, GgmqError, Overloaded
from tests.support.processes import children_of, until

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    config = ModelConfig(BUNDLED, n_seq=4, bus=BusConfig(workers=1))
    with serving([config], n_queue=8) as (services, _):
        yield services["stories"]


class Asked:
    """A request, and what has come of it."""

    def __init__(self, service: Service, text: str, n: int = 40, **more: object) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = Request(service.vocabulary.encode(text), n_predict=n, **{"params": GREEDY, **more})  # type: ignore[arg-type]
        self.job: Job = service.submit(request, self.events.put)
        self.deltas: list[Delta] = []

    def until_text(self) -> None:
        event = self.events.get(timeout=60)
        assert isinstance(event, Delta), event
        self.deltas.append(event)

    def done(self) -> Done:
        while True:
            match self.events.get(timeout=60):
                case Delta() as delta:
                    self.deltas.append(delta)
                case Done() as done:
                    return done
                case Failed(error):
                    raise error

    @property
    def text(self) -> str:
        return "".join(d.text for d in self.deltas)


def endless(service: Service) -> SamplingParams:
    """Nothing but a limit ends it."""
    return SamplingParams(banned=service.vocabulary.end_ids)


def idle(service: Service) -> bool:
    return all(s.state == "idle" for s in service.state().slots)


def test_each_has_the_text_that_it_has_alone(service: Service) -> None:
    seeds = [GREEDY, SamplingParams(seed=1), SamplingParams(seed=2, top_k=0), SamplingParams(seed=3, repeat_penalty=1.3)]
    prompts = ["Once upon a time", "Tom and Lily", "One day a dog", "The sun"]
    alone = []
    for prompt, params in zip(prompts, seeds, strict=True):
        asked = Asked(service, prompt, params=params)
        asked.done()
        alone.append(asked.text)
    together = [Asked(service, prompts[i % 4], params=seeds[i % 4], key=str(i % 3)) for i in range(8)]
    for asked in together:
        asked.done()
    assert [asked.text for asked in together] == alone * 2 and len(set(alone)) == 4


def test_stop_texts_end_an_answer_and_are_not_shown(service: Service) -> None:
    whole = Asked(service, "Once upon a time")
    whole.done()
    cut = Asked(service, "Once upon a time", stop=("red ball", "never"))
    done = cut.done()
    assert (done.reason, done.stop, cut.text) == ("stop", "red ball", whole.text[: whole.text.index("red ball")])
    tokens = "".join(t.raw.decode() for d in cut.deltas for t in d.tokens)
    assert cut.text.startswith(tokens) and len(tokens) > len(cut.text) - 5  # the token " red" is not told: half was shown
    until(lambda: idle(service), 5)


def test_the_end_is_told(service: Service) -> None:
    assert Asked(service, "Once upon a time", n=3).done().reason == "length"
    done = Asked(service, "Once upon a time", n=-1).done()
    assert done.reason == "stop" and done.end_id in service.vocabulary.end_ids
    assert Asked(service, "Once upon a time", n=0).done().usage.n_made == 0


def test_who_goes_away_frees_the_slot(service: Service) -> None:
    asked = [Asked(service, "Once upon a time", n=-1, params=endless(service))
             for _ in range(6)]  # fmt: skip
    asked[0].until_text()
    for a in asked:
        a.job.cancel()
    until(lambda: idle(service), 5)
    assert service.state().n_waiting == 0
    after = Asked(service, "Once upon a time", n=5)
    after.done()
    assert all(not isinstance(a.events.get_nowait(), Done) for a in asked if not a.events.empty())


def test_too_many_are_refused_and_the_others_served(service: Service) -> None:
    asked = []
    with pytest.raises(Overloaded):
        for i in range(64):
            asked.append(Asked(service, "Once upon a time", n=200, key=str(i)))
    for a in asked:
        a.done()
    assert len({a.text for a in asked}) == 1 and len(asked) >= 8


def test_a_prompt_that_cannot_be_is_refused_at_once(service: Service) -> None:
    with pytest.raises(FormatError, match="512"):
        Asked(service, "word " * 600)
    for tokens in ([], [-1], [1 << 20]):
        with pytest.raises(FormatError):
            service.submit(Request(tokens), lambda event: None)


def test_a_worker_is_killed_and_the_text_goes_on() -> None:
    config = ModelConfig(BUNDLED, n_seq=2, bus=BusConfig(workers=2))
    seen, before = [], children_of(os.getpid())
    with serving([config], told=lambda event, **figures: seen.append((event, figures))) as (services, watch):
        service = services["stories"]
        params = SamplingParams(seed=5, banned=service.vocabulary.end_ids)
        alone = [Asked(service, p, n=450, params=params) for p in ("Once upon a time", "Tom")]
        for a in alone:
            a.done()
        again = [Asked(service, p, n=450, params=params) for p in ("Once upon a time", "Tom")]
        again[0].until_text()
        os.kill(next(pid for pid in _workers() if pid not in before), signal.SIGKILL)
        for a in again:
            a.done()
        assert [a.text for a in again] == [a.text for a in alone]
        until(lambda: any(d.info.state == "lost" for d in watch.picture.devices.values()), 2)
        assert "recovered" in [event for event, _ in seen]
        until(lambda: len(service.model.stages) == 2, 20)  # another worker was started, and has what the other had taken
        again = [Asked(service, "Once upon a time", n=450, params=params)]
        again[0].done()
        assert again[0].text == alone[0].text


def test_a_worker_sleeps_too_long_and_the_text_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.limits.RETURN_S", 2.0)
    before = children_of(os.getpid())
    with serving([ModelConfig(BUNDLED, bus=BusConfig(workers=2))]) as (services, _):
        service = services["stories"]
        endless = SamplingParams(temperature=0, banned=service.vocabulary.end_ids)
        alone = Asked(service, "Once upon a time", n=450, params=endless)
        alone.done()
        again = Asked(service, "Once upon a time", n=450, params=endless)
        again.until_text()
        os.kill(next(pid for pid in _workers() if pid not in before), signal.SIGSTOP)
        again.done()
        assert again.text == alone.text and len(service.model.stages) == 1


def test_an_asker_that_fails_harms_nobody(service: Service) -> None:
    def broken(event: Event) -> None:
        raise ValueError("no")

    tokens = service.vocabulary.encode("Once upon a time")
    service.submit(Request(tokens, GREEDY, 200), broken)
    asked = Asked(service, "Once upon a time")
    assert asked.done().reason == "length"
    until(lambda: idle(service), 5)


def test_it_closes_though_a_worker_sleeps() -> None:
    before = children_of(os.getpid())
    with serving([ModelConfig(BUNDLED, bus=BusConfig(workers=1))]) as (services, _):
        service = services["stories"]
        asked = Asked(service, "Once upon a time", n=-1, params=endless(service))
        asked.until_text()
        for pid in set(_workers()) - set(before):
            os.kill(pid, signal.SIGSTOP)
        service.close()
        with pytest.raises(GgmqError, match="shutting down"):
            asked.done()


def test_nobody_is_left_and_requests_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggmq.service.MEND_S", 1.0)
    before = children_of(os.getpid())
    monkeypatch.setattr("ggmq.bus.Bus.revive", lambda bus: False)
    with serving([ModelConfig(BUNDLED, bus=BusConfig(workers=1))]) as (services, _):
        service = services["stories"]
        asked = Asked(service, "Once upon a time", n=-1, params=endless(service))
        asked.until_text()
        for pid in set(_workers()) - set(before):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(GgmqError) as e:
            asked.done()
        assert e.value.retryable and service.state().error
        with pytest.raises(GgmqError, match="no place"):
            Asked(service, "Once upon a time")


def _workers() -> list[int]:
    return [pid for pid in children_of(os.getpid()) if _is_worker(pid)]


def _is_worker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            command = f.read()
    except OSError:
        return False
    return b"workers" in command and b"--parent-pid" in command
