"""Texts that are only read: their logits or hidden states, beside the answers that others get."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from ggmq.engine import Engine, Want
from ggmq.scheduler import Sequence
from ggmq.service import Emit, Job, Request, Rows, Service


def read(service: Service, tokens: Tokens[int], want: Want, emit: Emit, key: str = "") -> Job:
    """Have a text read. What comes is `Rows`, or `Failed`.

    key: whose turn it takes in the queue. Errors: FormatError; Overloaded, Unavailable, as `Service.submit`'s.
    Threads: any; `emit` is called in the engine's.
    """
    request = Request(list(tokens), key=key)
    service.check(request.tokens, 0)
    return service.put(ReadJob(service, request, want, emit))


class ReadJob(Job):
    """A text that is read without going on."""

    def __init__(self, service: Service, request: Request, want: Want, emit: Emit) -> None:
        super().__init__(service, request, emit)
        self._want = want

    def begin(self, engine: Engine) -> Sequence:
        return engine.read(self.request.tokens, self._want)

    def finish(self) -> None:
        s = self.sequence
        assert s is not None and s.rows is not None  # it was read to its end
        self.emit(Rows(s.rows, self.usage()))
