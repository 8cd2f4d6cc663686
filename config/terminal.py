"""Text for a terminal: what a file, a peer or a model says is shown there, and never obeyed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, TextIO

# C0 and C1 with DEL, what turns the direction of writing around, and halves of characters that no encoding takes
_UNSAFE = "\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_TEXT = re.compile(f"[{_UNSAFE}]")
_IN_LINE = re.compile(f"[{_UNSAFE}\t\n\u2028\u2029]")

OUTPUT = "standard output"
NO_READER = 141
"""The exit code when whoever read the output has gone: as a shell has it for programs that SIGPIPE ends."""


def safe_text(text: str) -> str:
    r"""Text whose control characters are written out (`\x1b`); newline and tab stay as they are."""
    return _IN_TEXT.sub(_written_out, text)


def safe_line(text: str) -> str:
    r"""Text that stays on its line: newline and tab are written out too (`\n`)."""
    return _IN_LINE.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8, as Python's surrogateescape has it
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape").decode("ascii")


def for_stream(text: str, stream: TextIO) -> str:
    """What a model or its user wrote, for a stream: safe on a terminal, elsewhere as it is."""
    return safe_text(text) if stream.isatty() else text


_stamp: Callable[[], str] = str
"""What each line for people begins with: nothing, or the time."""


def stamp_lines() -> None:
    """From now on, let each line for people begin with the time, as the lines of a log should: local, with its offset."""
    global _stamp
    _stamp = lambda: datetime.now().astimezone().isoformat(" ", "milliseconds") + " "  # noqa: E731


def print_line(*parts: object, file: TextIO | None = None) -> None:
    """Print a line for people, safe wherever it goes, at once."""
    print(_stamp() + safe_line(" ".join(map(str, parts))), file=file, flush=True)


def accept_any_text() -> None:
    """Let standard output and error show what their encoding lacks, and standard input take what is no text as U+FFFD."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):
                stream.reconfigure(errors=errors)


def open_streams() -> None:
    """Put /dev/null where standard input, output or error is closed, so that no socket comes to lie there."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


class _Output(io.FileIO):
    """Standard output, whose failures say that it was it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as e:
            e.filename = OUTPUT
            raise


def name_output() -> None:
    """Have an OSError of standard output name it. What stands in for it, as in a test, stays."""
    old = sys.stdout
    if type(old) is io.TextIOWrapper and old.fileno() == 1:
        old.flush()
        raw = _Output(1, "w", closefd=False)
        kept = raw if old.write_through else io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(kept, old.encoding, old.errors, line_buffering=old.line_buffering,
                                      write_through=old.write_through)  # fmt: skip


def flushed(stream: TextIO) -> bool:
    """Whether a stream has taken all that was printed; if it has not, the rest is dropped, so that nothing is said of it
    when the process ends."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        return False
    return True
