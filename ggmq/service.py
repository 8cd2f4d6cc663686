"""Many people at one model: requests come from any thread, one thread runs the engine, what is made goes out as it comes.

Requests wait in a `FairQueue` until one of the slots is free. A worker that is lost costs a pause: the model is placed on
the devices that are there, and what was going on is read again, from where the tokens are known: here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct, structs

from ggmq.engine import Engine, Made
from ggmq.model import Model
from ggmq.queues import FairQueue
from ggmq.sampling import SamplingParams
from ggmq.scheduler import Sequence
from ggmq.service_state import ServiceState, SlotState
from ggmq.stops import StopTexts
from ggmq.tokenizer import StreamDecoder, Vocabulary
from protocol.errors import Cancelled, FormatError, GgmqError, HandleError, InternalError, Unavailable

if TYPE_CHECKING:
    from ggmq.grammar import Grammar

IDLE_S = 0.25
MEND_S = 60.0
"""So long requests wait for workers that can hold the model, or for the broker; then they fail, and may be asked again."""
MEND_EVERY_S = 0.5
CLOSING = "the server is shutting down"
LATELY_S = 5
"""Seconds over which rates are told."""


class Request(Struct, frozen=True):
    """An answer that is wanted.

    Attributes:
        tokens: the prompt.
        n_predict: tokens to make at most; negative: no bound.
        stop: texts that end it; they are not shown.
        n_probs: with each token its log-probability and so many of the most likely others; negative: nothing of it.
        key: whose turn it takes in the queue.
        preserved: control tokens that are part of the text.
        grammar: what the text must be.
    """

    tokens: list[int]
    params: SamplingParams = SamplingParams()
    n_predict: int = -1
    stop: tuple[str, ...] = ()
    n_probs: int = -1
    key: str = ""
    preserved: frozenset[int] = frozenset()
    grammar: Grammar | None = None


class Token(NamedTuple):
    """A token that was made: its bytes, and where asked for its log-probability and those of the most likely."""

    id: int
    raw: bytes
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Usage(Struct):
    """Units: tokens and seconds. `n_cached`: tokens of the prompt that were not read again."""

    n_prompt: int = 0
    n_cached: int = 0
    n_made: int = 0
    waited_s: float = 0.0
    prompt_s: float = 0.0
    made_s: float = 0.0
    n_drafted: int = 0
    n_accepted: int = 0


class Delta(NamedTuple):
    """Text that can be shown, and the tokens whose text that was."""

    text: str
    tokens: tuple[Token, ...]


class Done(NamedTuple):
    """The end of an answer. `stop`: the text that ended it; `end_id`: the token."""

    reason: Literal["stop", "length", "context", "left"]
    usage: Usage
    stop: str = ""
    end_id: int | None = None


class Failed(NamedTuple):
    error: GgmqError


class Rows(NamedTuple):
    """What is wanted of a text that was only read, and its end. Shapes: as `Engine.read`'s."""

    rows: npt.NDArray[np.float32]
    usage: Usage


Event = Delta | Done | Failed | Rows
Emit = Callable[[Event], None]


class Job:
    """A request on its way. `cancel` may be called from any thread; nothing is emitted after it."""

    def __init__(self, service: Service, request: Request, emit: Emit) -> None:
        self.request, self.number, self.model = request, 0, service.name
        self._service, self._emit = service, emit
        self.cancelled = False
        self.slot = -1
        self.sequence: Sequence | None = None
        self._decoder = StreamDecoder(service.vocabulary, shown=request.preserved)
        self._stops = StopTexts(request.stop)
        self._unshown: deque[tuple[Token, int]] = deque()
        self._n_text = self._n_shown = self.n_made = 0
        self.asked_s = time.monotonic()
        self.started_s = self.first_s = 0.0

    def begin(self, engine: Engine) -> Sequence:
        """Its sequence, as it waits in an engine. Errors: FormatError."""
        r = self.request
        return engine.add(r.tokens, r.params, r.n_predict, n_probs=r.n_probs,
                          constraint=r.grammar.start() if r.grammar is not None else None)  # fmt: skip

    def cancel(self) -> None:
        """It is not wanted any more: its slot is free within a step."""
        self.cancelled = True
        self._service.left(self)

    def emit(self, event: Event) -> None:
        if self.cancelled:
            return
        try:
            self._emit(event)
        except Exception:  # whoever asked cannot be told, which is no fault of the others
            self.cancel()

    def take(self, made: Made, vocabulary: Vocabulary, is_end: bool) -> bool:
        """A token was made. Returns: whether a stop text has come."""
        if not self.first_s:
            self.first_s = time.monotonic()
        self.n_made += 1
        if is_end:
            return False
        text = self._decoder.feed(made.token)
        self._n_text += len(text)
        self._unshown.append((Token(made.token, vocabulary.piece(made.token, True), made.logprob, made.top), self._n_text))
        self._show(self._stops.feed(text))
        return bool(self._stops.found)

    def _show(self, text: str) -> None:
        self._n_shown += len(text)
        tokens = []
        while self._unshown and self._unshown[0][1] <= self._n_shown:
            tokens.append(self._unshown.popleft()[0])
        if text or tokens:
            self.emit(Delta(text, tuple(tokens)))

    def finish(self) -> None:
        """Say how it ended, with what was still held back."""
        s = self.sequence
        assert s is not None  # it ran
        if not self._stops.found:
            rest = self._stops.feed(self._decoder.finish()) + self._stops.finish()
            if rest or (self._unshown and not self._stops.found):
                self.emit(Delta(rest, tuple(t for t, _ in self._unshown)))
        stop = self._stops.found
        reason: Literal["stop", "length", "context", "left"] = "stop"
        if not stop and s.finished in ("limit", "context"):
            reason = "length" if s.finished == "limit" else "context"
        last = s.tokens[-1]
        end = last if not stop and s.finished == "end" and last in self._service.vocabulary.end_ids else None
        self.emit(Done(reason, self.usage(), stop, end))

    def usage(self) -> Usage:
        s, now = self.sequence, time.monotonic()
        if s is None:
            return Usage(len(self.request.tokens), waited_s=now - self.asked_s)
        first = self.first_s or now
        return Usage(s.n_prompt, min(s.n_cached, s.n_prompt), self.n_made, self.started_s - self.asked_s,
                     first - self.started_s, now - first, s.n_drafted, s.n_accepted)  # fmt: skip


class Service:
    """One loaded model that answers many requests.

    engine: makes an engine for a model, with whatever options it has.
    place: places the model on the devices that are there now, and loads it; for when a worker is lost.
    n_queue: requests that may wait.
    patience_s: for so long they wait for workers; None: MEND_S.
    told: is called with what happens, in the engine's thread: a word, and its figures.
    Threads: any; events are emitted in the engine's thread, so an emit hands over and returns.
    """

    def __init__(
        self, model: Model, vocabulary: Vocabulary, name: str, place: Callable[[], Model], *,
        engine: Callable[[Model], Engine] | None = None, n_slots: int = 1, n_queue: int = 256,
        patience_s: float | None = None,
        told: Callable[..., None] = lambda event, **figures: None,
    ) -> None:  # fmt: skip
        self.vocabulary, self.name, self.n_slots = vocabulary, name, n_slots
        self._place, self._told, self._patience_s = place, told, patience_s
        self._engine_of = engine or (lambda model: Engine(model, vocabulary.end_ids))
        self._engine = self._engine_on(model)
        self._queue: FairQueue[Job] = FairQueue(n_queue)
        self._lock = threading.Condition()
        self._running: dict[int, Job] = {}
        self._left: list[Job] = []
        self._n_jobs = 0
        self._closing = False
        self.error = ""
        self._counts = ServiceState(name)
        self._rates: deque[tuple[int, int, int]] = deque(maxlen=LATELY_S + 1)
        self._thread = threading.Thread(target=self._run, name=f"engine of {name}", daemon=True)
        self._thread.start()

    def _engine_on(self, model: Model) -> Engine:
        engine = self._engine_of(model)
        engine.told, model.client.on_wait = self._told, self._look
        model.keeper.patience_s = self._patience_s or MEND_S
        return engine

    @property
    def model(self) -> Model:
        """The model as it lies now; another object after a worker was lost."""
        return self._engine.model

    # -- from any thread -----------------------------------------------------------------------------------------------

    def check(self, tokens: list[int], n_more: int = 1) -> None:
        """Errors: FormatError for a prompt that is empty, does not fit with `n_more` tokens, or has tokens that there are
        not."""
        n_most, n_vocab = self.model.n_ctx - n_more, self.model.arch.hp.n_vocab
        if not tokens:
            raise FormatError("prompt: expected at least one token, got none")
        if len(tokens) > n_most:
            raise FormatError(f"prompt: {len(tokens)} tokens do not fit a context of {self.model.n_ctx}; make it shorter, "
                              "or load the model with a larger context (-c, ctx_size)")  # fmt: skip
        if not all(0 <= t < n_vocab for t in tokens):
            raise FormatError(f"prompt: expected tokens of 0 to {n_vocab - 1}")

    def submit(self, request: Request, emit: Emit) -> Job:
        """Have a request answered. Errors: FormatError; Overloaded when too many wait; Unavailable when it is closing, or
        when workers are missing."""
        self.check(request.tokens)
        return self.put(Job(self, request, emit))

    def put(self, job: Job) -> Job:
        """Have a job wait for its turn. Errors: Overloaded, Unavailable, as `submit`'s."""
        with self._lock:
            if self._closing:
                raise Unavailable(CLOSING)
            if self.error:
                raise Unavailable(self.error)
            self._queue.put(job.request.key, job)
            self._n_jobs += 1
            job.number = self._n_jobs
            self._lock.notify()
        return job

    def left(self, job: Job) -> None:
        """Whoever asked has gone."""
        with self._lock:
            if not self._queue.remove(job.request.key, job):
                self._left.append(job)
            self._counts.n_left += 1
            self._lock.notify()

    def state(self) -> ServiceState:
        """What it does now."""
        now = time.monotonic()
        with self._lock:
            slots = [SlotState(i, n_ctx=self.model.n_ctx) for i in range(self.n_slots)]
            jobs, n_waiting = list(self._running.values()), len(self._queue)
            rates = list(self._rates)
        for job in jobs:
            seq = job.sequence
            if seq is None or not 0 <= job.slot < self.n_slots:
                continue
            slot = slots[job.slot]
            slot.state = "decode" if seq.n_made else "prompt"
            slot.n_prompt, slot.n_read, slot.n_made = seq.n_prompt, min(seq.n_read, seq.n_prompt), seq.n_made
            slot.seconds, slot.n_drafted, slot.n_accepted = now - job.started_s, seq.n_drafted, seq.n_accepted
        recent = [r for r in rates if now - r[0] <= LATELY_S]
        span = max(1.0, now - recent[0][0]) if recent else 1.0
        store = self.model.store
        return structs.replace(
            self._counts, slots=slots, n_waiting=n_waiting, n_queue=self._queue.n_max,
            prompt_tokens_per_s=sum(r[1] for r in recent) / span, decode_tokens_per_s=sum(r[2] for r in recent) / span,
            n_pages=sum(store.room.n_pages.values()), n_free_pages=sum(store.n_free.values()), error=self.error,
        )  # fmt: skip

    def close(self) -> None:
        """End all answers, and the thread. The model stays as it is. Idempotent."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- in the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                self._drop()
                self._admit()
                if self._engine.busy:
                    self._step()
                else:
                    self._idle()
            except (Unavailable, HandleError) as e:
                self._mend(e)
            except GgmqError as e:
                self._fail(Unavailable(CLOSING) if self._closing else e)
            except Exception as e:
                self._fail(InternalError(f"{type(e).__name__}: {e}; this is a bug of ggmq, please report it"))
                self._told("bug", error=e)
        self._engine.model.client.on_wait = None
        self._fail(Unavailable(CLOSING))
        self._engine.close()

    def _look(self) -> None:
        """Nothing is waited for when it is closing, whatever a worker does."""
        if self._closing:
            raise Cancelled(CLOSING)

    def _idle(self) -> None:
        """Nothing is to be done: what has become of the workers meanwhile is seen to, as far as it can be now."""
        with contextlib.suppress(Unavailable, HandleError):
            self._engine.tend(idle=True)
        with self._lock:
            if not self._queue and not self._left and not self._closing:
                self._lock.wait(IDLE_S)

    def _drop(self) -> None:
        """Those leave whose askers have gone."""
        with self._lock:
            left, self._left = self._left, []
        for job in left:
            if job.sequence is not None and self._running.pop(id(job.sequence), None) is not None:
                self._engine.leave(job.sequence)
                self._account(job)
                self._told("cancelled", job=job)

    def _admit(self) -> None:
        """Give free slots to those whose turn it is."""
        while len(self._running) < self.n_slots:
            with self._lock:
                if not self._queue:
                    return
                job = self._queue.take()
            self._start(job)

    def _start(self, job: Job) -> None:
        job.started_s = time.monotonic()
        try:
            job.sequence = job.begin(self._engine)
        except GgmqError as e:
            self._counts.n_failed += 1
            job.emit(Failed(e))
            return
        taken = {j.slot for j in self._running.values()}
        job.slot = next(i for i in range(self.n_slots) if i not in taken)
        self._running[id(job.sequence)] = job
        self._told("started", job=job)
        if job.request.n_predict == 0:
            self._engine.leave(job.sequence)
            job.sequence.finished = "limit"
            self._end(job)

    def _step(self) -> None:
        for made in self._engine.step():
            job = self._running.get(id(made.sequence))
            if job is None:
                continue
            self._rate(0, 1)
            first = not job.first_s
            stopped = job.take(made, self.vocabulary, made.token in self._engine.end_ids)
            if first:
                self._has_read(made.sequence)
                self._told("first token", job=job)
            if stopped:
                self._engine.leave(made.sequence)
            if stopped or (made.sequence.finished and job.n_made == made.sequence.n_made):  # a step may make several
                self._end(job)
        for job in [j for j in self._running.values() if j.sequence is not None and j.sequence.finished]:
            self._end(job)

    def _end(self, job: Job) -> None:
        del self._running[id(job.sequence)]
        self._counts.n_done += 1
        self._account(job)
        if job.sequence is not None and job.sequence.is_read:
            self._has_read(job.sequence)
        job.finish()
        self._told("done", job=job)

    def _has_read(self, s: Sequence) -> None:
        """The whole of a prompt."""
        self._counts.n_cached_tokens += min(s.n_cached, s.n_prompt)
        self._rate(s.n_prompt - s.n_cached, 0)

    def _account(self, job: Job) -> None:
        usage = job.usage()
        self._counts.n_prompt_tokens += usage.n_prompt
        self._counts.n_made_tokens += usage.n_made
        self._counts.n_drafted_tokens += usage.n_drafted
        self._counts.n_accepted_tokens += usage.n_accepted
        self._queue.charge(job.request.key, usage.n_prompt - usage.n_cached + usage.n_made)

    def _rate(self, n_prompt: int, n_made: int) -> None:
        second = int(time.monotonic())
        if self._rates and self._rates[-1][0] == second:
            _, p, m = self._rates.pop()
            n_prompt, n_made = n_prompt + p, n_made + m
        self._rates.append((second, n_prompt, n_made))

    # -- when something goes wrong -------------------------------------------------------------------------------------

    def _fail(self, error: GgmqError) -> None:
        """All that runs ends with an error, and when it is closing all that waits does."""
        jobs = list(self._running.values())
        self._running.clear()
        for job in jobs:
            if job.sequence is not None:
                self._engine.leave(job.sequence)
        if not self._closing:
            with contextlib.suppress(GgmqError):
                self._engine.abandon()
        with self._lock:
            while self._queue and (self._closing or self.error):
                jobs.append(self._queue.take())
        for job in jobs:
            self._counts.n_failed += 1
            job.emit(Failed(error))
            self._told("failed", job=job, error=error)

    def _mend(self, error: GgmqError) -> None:
        """The engine has waited for workers in vain: nothing can be answered until the model has a place again."""
        self._told("worker lost", error=error)
        while not self._closing:
            try:
                self._move()
                self._told("recovered")
                return
            except (GgmqError, OSError) as e:
                if not self.error:
                    self.error = f"the model has no place: {e}; before that, {error}"
                    self._fail(Unavailable(self.error))
            with self._lock:
                self._lock.wait(MEND_EVERY_S)
            self._drop()

    def _move(self) -> None:
        """The model as it can be placed now, and all sequences with it. Errors: what placing and loading raise."""
        old = self._engine
        with contextlib.suppress(GgmqError):
            old.model.client.cancel()
            old.model.client.settle()
        old.close(0.0)
        for model in (old.model, old.draft):
            with contextlib.suppress(GgmqError):
                if model is not None:
                    model.free()
        engine = self._engine_on(self._place())
        engine.timings = old.timings
        for sequence in (*old.scheduler.running, *old.scheduler.waiting):
            engine.adopt(sequence)
        self._engine, self.error = engine, ""
