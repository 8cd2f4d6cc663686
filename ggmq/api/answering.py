"""What a loaded model is asked for: texts that go on, conversations, embeddings, logits, tokens."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Unpack, overload

import numpy as np
import numpy.typing as npt

from ggmq.api.answers import Asked, AsyncStream, ChatResult, Gathered, Result, Stream
from ggmq.api.asking import Asker, Messages, Prompt
from ggmq.api.options import ChatOptions, GenerateOptions
from ggmq.conversation import wrong
from ggmq.embeddings import Pooling, default_pooling, pooled, pooling_of, to_read
from ggmq.engine import Want
from ggmq.feed import Feed
from ggmq.reading import read
from ggmq.service import Emit, Failed, Job, Rows, Service

Floats = npt.NDArray[np.float32]


class Text(NamedTuple):
    """A text that is to be read, and what is wanted of it."""

    tokens: Sequence[int]
    want: Want


class Answering:
    """What a loaded model is asked for. Threads: any."""

    def __init__(self, service: Service) -> None:
        self._service, self._asker = service, Asker(service)

    def _open(self) -> Service:
        """Errors: Unavailable when it is closed."""
        return self._service

    @property
    def n_ctx(self) -> int:
        """The longest context of an answer with its prompt, in tokens."""
        return self._service.model.n_ctx

    @property
    def n_vocab(self) -> int:
        """Tokens that there are."""
        return self._service.model.arch.hp.n_vocab

    @property
    def n_embd(self) -> int:
        """Numbers of an embedding."""
        return self._service.model.arch.hp.n_embd

    # -- texts that go on ----------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]) -> Result: ...

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[GenerateOptions]) -> Stream[Result]: ...

    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Result | Stream[Result]:
        """Go on with a text, as it is: no chat template is used.

        prompt: a text, in which control tokens may be written out, or tokens. stream: get the text while it is made.
        options: see `GenerateOptions`.
        Errors: InvalidValue for an option; FormatError for a prompt that is empty or too long; Unavailable when workers are
        missing, or the model is closed. Ctrl-C cancels this answer and nothing else.
        """
        made = Stream(self._asked_generate(prompt, options), Gathered.result, stream)
        return made if stream else made.result

    @overload
    def agenerate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> Coroutine[Any, Any, Result]: ...

    @overload
    def agenerate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> AsyncStream[Result]: ...

    def agenerate(
        self, prompt: Prompt, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Coroutine[Any, Any, Result] | AsyncStream[Result]:
        """As `generate`, for an event loop: `await` it, or with `stream` go through it by `async for`. Cancelling the task
        cancels the answer."""
        made = AsyncStream(lambda: self._asked_generate(prompt, options), Gathered.result, stream)
        return made if stream else made.result()

    def _asked_generate(self, prompt: Prompt, options: GenerateOptions) -> Asked:
        self._open()
        return self._asker.generate(prompt, options)._replace(owner=self)

    # -- conversations -------------------------------------------------------------------------------------------------

    @overload
    def chat(self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[ChatOptions]) -> ChatResult: ...

    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **options: Unpack[ChatOptions]) -> Stream[ChatResult]: ...

    def chat(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[ChatOptions]
    ) -> ChatResult | Stream[ChatResult]:
        """Answer a conversation by the model's chat template, ChatML where it has none.

        messages: what the user says, or all messages as OpenAI's chat completions have them; `ChatResult.message` is the
        answer as one. stream: get the text while it is made. options: see `ChatOptions`.
        Errors: as `generate`'s; FormatError for what the template refuses.
        """
        made = Stream(self._asked_chat(messages, options), Gathered.chat_result, stream)
        return made if stream else made.result

    @overload
    def achat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[ChatOptions]
    ) -> Coroutine[Any, Any, ChatResult]: ...

    @overload
    def achat(
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> AsyncStream[ChatResult]: ...

    def achat(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[ChatOptions]
    ) -> Coroutine[Any, Any, ChatResult] | AsyncStream[ChatResult]:
        """As `chat`, for an event loop; see `agenerate`."""
        made = AsyncStream(lambda: self._asked_chat(messages, options), Gathered.chat_result, stream)
        return made if stream else made.result()

    def _asked_chat(self, messages: Messages, options: ChatOptions) -> Asked:
        self._open()
        return self._asker.chat(messages, options)._replace(owner=self)

    # -- texts that are only read --------------------------------------------------------------------------------------

    def embed(self, texts: str | Sequence[Prompt], *, pooling: Pooling | None = None, normalize: bool = True) -> Floats:
        """One vector of each text, from the hidden states behind the last norm.

        texts: one, or several, each a text or tokens. pooling: mean, last or cls; as the file says, else mean.
        normalize: to a length of 1.
        Shapes: float32 [n_texts, n_embd]; [n_embd] for one text.
        Errors: InvalidValue for a pooling that there is not; FormatError for a text that is empty or too long; Unavailable.
        """
        wanted, by = self._to_embed(texts, pooling)
        vectors = [pooled(rows, by, normalize) for rows in self._read_all(wanted)]
        return vectors[0] if isinstance(texts, str) else self._stacked(vectors)

    async def aembed(
        self, texts: str | Sequence[Prompt], *, pooling: Pooling | None = None, normalize: bool = True
    ) -> Floats:
        """As `embed`, for an event loop."""
        wanted, by = await asyncio.to_thread(self._to_embed, texts, pooling)
        feed, jobs = Feed(eager=False), list[Job]()
        rows: dict[int, Floats] = {}
        try:
            jobs += [self._read(text, feed.emit_as(i)) for i, text in enumerate(wanted)]
            while len(rows) < len(wanted):
                for i, event in await feed.take():
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Rows):
                        rows[i] = pooled(event.rows, by, normalize)
        finally:
            if len(rows) < len(wanted):
                for job in jobs:
                    job.cancel()
        vectors = [rows[i] for i in range(len(wanted))]
        return vectors[0] if isinstance(texts, str) else self._stacked(vectors)

    def logits(self, text: Prompt) -> Floats:
        """Logits of the token behind each token of a text.

        text: BOS is put in front of a text where the model wants it; tokens are taken as they are.
        Shapes: float32 [n_tokens, n_vocab]. Errors: FormatError for a text that is empty or too long; Unavailable.
        """
        (rows,) = self._read_all([Text(self._asker.tokens_of(text, "text"), "logits")])
        return rows

    def hidden(self, text: Prompt) -> Floats:
        """Hidden states of each token of a text behind the last norm.

        Shapes: float32 [n_tokens, n_embd]. Errors: as `logits`'s.
        """
        (rows,) = self._read_all([Text(self._asker.tokens_of(text, "text"), "hidden")])
        return rows

    def _to_embed(self, texts: str | Sequence[Prompt], pooling: str | None) -> tuple[list[Text], Pooling]:
        arch = self._open().model.arch
        by = default_pooling(arch) if pooling is None else self._pooling(pooling)
        if by == "none":
            raise wrong("pooling", "expected mean, last or cls; `hidden` gives a vector of each token")
        each = [texts] if isinstance(texts, str) else texts
        if "" in [t for t in each if isinstance(t, str)]:
            raise wrong("texts", "expected texts that are not empty")
        return [Text(*to_read(self._asker.tokens_of(t, f"texts[{i}]"), by)) for i, t in enumerate(each)], by

    @staticmethod
    def _pooling(name: str) -> Pooling:
        if name not in ("mean", "last", "cls", "none"):
            raise wrong("pooling", f"expected mean, last or cls, got {str(name)[:64]!r}")
        return pooling_of(name)

    def _stacked(self, vectors: Sequence[Floats]) -> Floats:
        return np.stack(vectors) if vectors else np.empty((0, self.n_embd), np.float32)

    def _read(self, text: Text, emit: Emit) -> Job:
        return read(self._open(), text.tokens, text.want, emit)

    def _read_all(self, texts: Sequence[Text]) -> Iterator[Floats]:
        """Rows of all texts, in their order. Leaving early cancels what has not been read."""
        ends: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in texts]
        jobs: list[Job] = []
        n_read = 0
        try:
            for text, end in zip(texts, ends, strict=True):
                jobs.append(self._read(text, end.put))
            for end in ends:
                event = end.get()
                if isinstance(event, Failed):
                    raise event.error
                n_read += 1
                yield event.rows
        finally:
            for job in jobs[n_read:]:
                job.cancel()

    # -- tokens --------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Tokens of a text.

        add_special: BOS and EOS are put around it where the model wants them. parse_special: control tokens that are written
        out in the text are such tokens, and not their characters.
        """
        return self._service.vocabulary.encode(text, add_special, parse_special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens. special: control tokens are written out; otherwise they are no text.

        Errors: InvalidValue for a token that there is not.
        """
        for t in tokens:
            if not 0 <= t < self.n_vocab:
                raise wrong("tokens", f"expected tokens of 0 to {self.n_vocab - 1}, got {t}")
        return self._service.vocabulary.decode([int(t) for t in tokens], special)
