"""A chat: turns that are answered one after the other, kept within the context, with commands at a terminal."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from config.running import state_folder
from config.terminal import for_stream, print_line
from ggmq.chat import ChatTemplate
from ggmq.cli.editor import Editor, screen
from ggmq.cli.session import note
from ggmq.cluster import Client
from ggmq.dialogue import Dialogue, Turn
from ggmq.engine import Engine
from ggmq.sampling import SamplingParams
from ggmq.tokenizer import StreamDecoder, Vocabulary, well_formed
from protocol.errors import GgmqError

HISTORY = "chat-history"
ROOM_SHARE = 4
"""An answer has at least a fourth of the context before a turn is dropped for it, or -n tokens if that is less."""
COMMANDS = {
    "/help": "this list",
    "/clear": "forget the turns so far; the system message stays",
    "/system": '/system TEXT sets the system message, /system "" removes it, /system shows it',
    "/context": "how much of the context is used",
    "/save": "/save FILE writes the whole conversation as JSON; it never overwrites a file",
    "/bye": "end the chat, as /exit, /quit and Ctrl-D do",
}
KEYS = (
    ("Enter", "sends; Alt-Enter begins another line, and so does Enter between two lines of \"\"\""),
    ("Up, Ctrl-R", "what was typed before, in other chats too"),
    ("Ctrl-C", "stops an answer, empties the line, ends the chat on an empty one"),
)
_ENDS = ("/bye", "/exit", "/quit")
_COMMAND = re.compile(r"(/[A-Za-z?]*)(?:\s+(.*))?", re.DOTALL)


class Stopped(Exception):
    """Ctrl-C, while an answer was made."""


def chat(
    args: argparse.Namespace, engine: Engine, vocabulary: Vocabulary, params: SamplingParams,
    template: ChatTemplate | None, first: str | None = None,
) -> None:  # fmt: skip
    """Answer `first`, if given, then what comes on standard input: messages at a terminal, elsewhere a turn a line, without
    commands. With --single-turn one answer is all.

    At a terminal an error ends a turn, and the chat goes on; elsewhere it ends the chat.
    """
    dialogue = Dialogue(vocabulary, template, args.system_prompt, args.reasoning != "off")
    talk = Chat(dialogue, engine, params, args.n_predict)
    stream = screen()
    if stream is None:
        for line in sys.stdin if first is None else [first, *sys.stdin]:
            if line.strip():
                talk.answer(line.removesuffix("\n"))
                if args.single_turn:
                    return
        return
    kind = "Chat" if template else "Without a chat template the model continues what you write"
    print(f"{kind}. /help lists the commands, Ctrl-D ends it, Ctrl-C stops an answer.", file=sys.stderr, flush=True)
    with Editor(stream, state_folder() / HISTORY, note) as editor:
        if first is not None:
            talk.attempt(first)
        while not (args.single_turn and dialogue.turns) and (text := editor.read(talk.watch)) is not None:
            talk.tell()
            if text.strip() and not talk.take(text):
                return


def note_full(engine: Engine) -> None:
    """Say so where the context cut an answer."""
    if engine.cut == "context":
        note(f"the answer was cut: the context of {engine.model.n_ctx} tokens is full; use a larger -c")


class Chat:
    """One chat: a dialogue, and the engine that answers."""

    def __init__(self, dialogue: Dialogue, engine: Engine, params: SamplingParams, n_predict: int) -> None:
        self.dialogue, self.engine = dialogue, engine
        self._params, self._n_predict = params, n_predict
        room = engine.model.n_ctx // ROOM_SHARE
        self._n_room = max(1, room if n_predict < 0 else min(room, n_predict))
        self._untold: list[str] = []

    def watch(self) -> None:
        """While somebody writes: leave devices that are to be left. What is to be said of it waits for `tell`."""
        model = self.engine.model
        said, model.note = model.note, self._untold.append
        try:
            self.engine.watch()
        finally:
            model.note = said

    def tell(self) -> None:
        """Say what came up while somebody wrote."""
        for text in self._untold:
            note(text)
        self._untold.clear()

    def take(self, text: str) -> bool:
        """Carry out a command or answer a message. Returns: whether the chat goes on."""
        command = _COMMAND.fullmatch(text)
        if command is None:
            self.attempt(text)
            return True
        try:
            return self._obey(command[1].lower(), (command[2] or "").strip())
        except GgmqError as e:
            print_line(f"ggmq: {e}", file=sys.stderr)
        return True

    def attempt(self, question: str) -> None:
        """Answer a message; what goes wrong is said, and ends the turn."""
        try:
            self.answer(question)
        except Stopped:
            note("stopped before the answer began; the message was not kept")
        except GgmqError as e:
            print_line(f"ggmq: {e}", file=sys.stderr)

    def answer(self, question: str) -> None:
        """Answer a message and keep the turn, as far as it came if Ctrl-C ended it.

        Errors: Stopped before there was anything of an answer; whatever ends it, the turns before it are as they were.
        """
        question, parts = well_formed(question), list[str]()
        with _CtrlC(self.engine.model.client) as ctrl_c:
            tokens, n_dropped = self.dialogue.fit(question, self.engine.model.n_ctx, self._n_room)
            if n := n_dropped - self.dialogue.n_dropped:
                note(f"the context of {self.engine.model.n_ctx} tokens is full: {_turns(n)} dropped, the oldest first")
            self.engine.start(tokens, self._params)
            ctrl_c.at_once = False
            try:
                self._stream(parts, ctrl_c)
            except Stopped:
                self.engine.abandon()
                if not parts:
                    raise
            finally:
                print(flush=True)  # whatever comes next has a line of its own
        self.dialogue.keep(Turn(question, "".join(parts)), n_dropped)
        if self.engine.cut == "limit":
            note(f"the answer was cut after {_count(self._n_predict, 'token')}; -n sets the limit")
        note_full(self.engine)

    def _stream(self, parts: list[str], ctrl_c: _CtrlC) -> None:
        decoder = StreamDecoder(self.dialogue.vocabulary)
        for token in self.engine.generate(self._n_predict):
            parts.append(decoder.feed(token))
            print(for_stream(parts[-1], sys.stdout), end="", flush=True)
            ctrl_c.look()
        parts.append(decoder.finish())
        print(parts[-1], end="")

    def _obey(self, name: str, text: str) -> bool:
        d = self.dialogue
        if name in _ENDS:
            return False
        elif name in ("/help", "/?"):
            for key, meaning in (*COMMANDS.items(), *KEYS):
                _say(f"{key:11} {meaning}")
        elif name == "/clear":
            d.clear()
            _say("the turns so far are forgotten")
        elif name == "/system":
            self._system(text)
        elif name == "/context":
            kept = f"{_turns(len(d.turns) - d.n_dropped)} kept" + (f", {d.n_dropped} dropped" if d.n_dropped else "")
            _say(f"{d.n_tokens()} of {self.engine.model.n_ctx} tokens used, {kept}")
        elif name == "/save":
            self._save(text)
        else:
            _say(f"there is no command {name}, and it was not sent; /help lists them, a blank before it sends it as text")
        return True

    def _system(self, text: str) -> None:
        d = self.dialogue
        if d.template is None:
            _say("this model has no chat template, so it gets no system message")
        elif text:
            d.system = "" if text in ('""', "''") else well_formed(text)
            _say("the system message is set" if d.system else "there is no system message any more")
        else:
            _say(d.system or "there is no system message; /system TEXT sets one")

    def _save(self, name: str) -> None:
        if not name:
            _say("/save wants the name of a file: /save FILE")
            return
        text = well_formed(json.dumps(self.dialogue.messages(), ensure_ascii=False, indent=1)) + "\n"
        path, ours = Path(name), False
        try:
            path = path.expanduser()
            with path.open("x", encoding="utf-8") as f:
                ours = True
                f.write(text)
        except FileExistsError:
            _say(f"{name}: there is something of that name already; nothing was written, choose another name")
        except (OSError, ValueError, RuntimeError) as e:  # no such folder, a full disk, a NUL byte, nobody's home
            if ours:
                path.unlink(missing_ok=True)
            _say(f"{name}: {getattr(e, 'strerror', None) or e}; the conversation was not written")
        else:
            _say(f"wrote {path}: {_turns(len(self.dialogue.turns))}")


class _CtrlC:
    """Ctrl-C within the block raises Stopped: at once, or, when `at_once` is off, only where the bus is waited for and where
    it is looked for, so that no message is cut in half. Elsewhere than at a terminal it stays what it is."""

    def __init__(self, client: Client) -> None:
        self.at_once, self._asked = True, False
        self._client = client
        self._before: Any = None

    def __enter__(self) -> Self:
        if screen() is not None:
            self._before = signal.signal(signal.SIGINT, self._pressed)
            self._client.on_wait = self.look
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._before is not None:
            self._client.on_wait = None
            signal.signal(signal.SIGINT, self._before)

    def look(self) -> None:
        if self._asked:
            self._asked = False
            raise Stopped

    def _pressed(self, signum: int, frame: FrameType | None) -> None:
        if self.at_once:
            raise Stopped
        self._asked = True


def _say(text: str) -> None:
    """An answer of the chat itself, which is no part of what the model says."""
    for line in text.split("\n"):
        print_line(line, file=sys.stderr)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _turns(n: int) -> str:
    return _count(n, "turn")
