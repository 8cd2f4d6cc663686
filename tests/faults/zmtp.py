"""Messages in a ZMTP 3 stream of the NULL mechanism: where each begins and ends."""

from __future__ import annotations

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4
NULL = b"NULL".ljust(20, b"\0")


class Splitter:
    """One direction of a connection.

    Attributes:
        opaque: the stream is encrypted or no ZMTP: it goes through as it is.
    """

    def __init__(self) -> None:
        self.opaque = False
        self._greeting = b""
        self._rest = bytearray()
        self._parts = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bool]]:
        """What is complete now, in order: bytes, and whether they are a whole message (all its frames)."""
        out: list[tuple[bytes, bool]] = []
        n = GREETING_BYTES - len(self._greeting)
        if n and not self.opaque:
            # passed on as it comes: its first bytes are answered before the others are sent
            self._greeting += data[:n]
            out.append((data[:n], False))
            data = data[n:]
            self.opaque = not self._is_null()
        if self.opaque:
            return [*out, (data, False)] if data else out
        self._rest += data
        while (n_bytes := self._frame_bytes()) is not None and len(self._rest) >= n_bytes:
            flags = self._rest[0]
            frame = bytes(self._rest[:n_bytes])
            del self._rest[:n_bytes]
            if flags & COMMAND:
                out.append((frame, False))
                continue
            self._parts += frame
            if not flags & MORE:
                out.append((bytes(self._parts), True))
                self._parts.clear()
        return out

    def _is_null(self) -> bool:
        """Whether the greeting, as far as it has come, may be of that mechanism."""
        g = self._greeting
        return g[:1] == b"\xff" and g[10:11] in (b"", b"\x03") and NULL.startswith(g[12:32])

    def _frame_bytes(self) -> int | None:
        """How long the frame is that the rest begins with, with its header; None when that is not known yet."""
        if not self._rest:
            return None
        if not self._rest[0] & LONG:
            return 2 + self._rest[1] if len(self._rest) >= 2 else None
        return 9 + int.from_bytes(self._rest[1:9], "big") if len(self._rest) >= 9 else None
