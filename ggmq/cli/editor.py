"""The line of a chat at a terminal: edited, remembered, pasted in one piece, and never mixed up with an answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import Output

PROMPT, CONTINUED = "> ", "  "
QUOTES = '"""'
LOOK_S = 0.2
_PASTE_ON, _PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"


def screen() -> TextIO | None:
    """The stream that people see, if a chat is held at a terminal."""
    if not sys.stdin.isatty():
        return None
    return next((s for s in (sys.stdout, sys.stderr) if s.isatty()), None)


class Editor:
    """Reads messages at a terminal, from the beginning of a `with` block to its end.

    Between two messages the terminal keeps what is typed, unseen, for the next one; Ctrl-C is a signal then.
    """

    def __init__(self, stream: TextIO, history: Path, note: Callable[[str], None]) -> None:
        self._stream, self._fd = stream, sys.stdin.fileno()
        self._session = _session(stream, _history(history, note))
        self._paste = not _is_dumb()

    def __enter__(self) -> Self:
        self._before = termios.tcgetattr(self._fd)
        quiet = termios.tcgetattr(self._fd)
        quiet[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)  # Enter is what it is at the prompt
        quiet[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
        quiet[3] |= termios.NOFLSH  # Ctrl-C takes nothing away that was typed before it
        quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSANOW, quiet)
        self._say(_PASTE_ON)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._say(_PASTE_OFF)
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def read(self, meanwhile: Callable[[], None]) -> str | None:
        """The next message, None at the end. Its lines are divided by newlines; none is at its end.

        meanwhile: is called several times a second until then; it prints nothing.
        """
        from prompt_toolkit.application import get_app

        async def look() -> None:
            while True:
                await asyncio.sleep(LOOK_S)
                meanwhile()

        def begin() -> None:
            get_app().create_background_task(look())

        try:
            text = str(self._session.prompt(pre_run=begin))
        except EOFError:
            return None
        finally:
            self._say(_PASTE_ON)  # what is pasted during an answer is one piece too
        stripped = text.strip()
        if stripped.startswith(QUOTES) and not unfinished(text):
            return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
        return text.rstrip("\n")

    def _say(self, sequence: str) -> None:
        if self._paste:
            with contextlib.suppress(OSError):  # a terminal that is gone needs no mode
                self._stream.write(sequence)
                self._stream.flush()


def unfinished(text: str) -> bool:
    '''Whether a text begins with """ and has not been closed by another """ at its end.'''
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def _session(stream: TextIO, history: History) -> PromptSession[str]:
    from prompt_toolkit import PromptSession

    return PromptSession(PROMPT, multiline=True, prompt_continuation=CONTINUED, key_bindings=_keys(), history=history,
                         output=_output(stream), reserve_space_for_menu=0, enable_suspend=True)  # fmt: skip


def _is_dumb() -> bool:
    return os.environ.get("TERM", "dumb").lower() in ("", "dumb", "unknown")


def _output(stream: TextIO) -> Output | None:
    """What draws the line; None for a terminal that knows no more than to print, for which the library has its own way."""
    from prompt_toolkit.data_structures import Size
    from prompt_toolkit.output.vt100 import Vt100_Output

    if _is_dumb():
        return None

    def size() -> Size:
        try:
            columns, rows = os.get_terminal_size(stream.fileno())
        except OSError:
            columns, rows = 0, 0
        return Size(rows or 24, columns or 80)

    # the cursor is not asked for: an answer that comes late would be taken for something typed
    return Vt100_Output(stream, size, term=os.environ.get("TERM"), enable_cpr=False)


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=EOFError())

    return keys


def _history(path: Path, note: Callable[[str], None]) -> History:
    """What was typed before, in a file that only its owner reads; in memory when there can be none."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def load_history_strings(self) -> Iterable[str]:
            try:
                return list(super().load_history_strings())
            except OSError:
                return []

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk costs the history, not the chat
                super().store_string(string)

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
        finally:
            os.close(fd)
    except OSError as e:
        note(f"{path}: {e.strerror}; what you type is not remembered for another time")
        return InMemoryHistory()
    return Kept(str(path))
