"""Messages in a ZMTP 3 stream of the NULL mechanism: where each begins and ends."""

from __future__ import annotations

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4


class Splitter:
    """One direction of a connection.

    Attributes:
        opaque: the stream is encrypted or no ZMTP: it goes through as it is.
    """

    def __init__(self) -> None:
        self.opaque = False
        self._greeted = False
        self._rest = bytearray()
        self._parts = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bool]]:
        """What is complete now, in order: bytes, and whether they are a whole message (all its frames)."""
        if self.opaque:
            return [(data, False)]
        self._rest += data
        out: list[tuple[bytes, bool]] = []
        if not self._greeted:
            if self._rest[:1] not in (b"", b"\xff") or (len(self._rest) >= GREETING_BYTES and not self._is_null()):
                self.opaque = True
                return [(bytes(self._rest), False)]
            if len(self._rest) < GREETING_BYTES:
                # the first ten bytes are answered before the others are sent
                return []
            self._greeted = True
            out.append((self._take(GREETING_BYTES), False))
        while (n := self._frame_bytes()) is not None and len(self._rest) >= n:
            flags = self._rest[0]
            frame = self._take(n)
            if flags & COMMAND:
                out.append((frame, False))
                continue
            self._parts += frame
            if not flags & MORE:
                out.append((bytes(self._parts), True))
                self._parts.clear()
        return out

    def _is_null(self) -> bool:
        return self._rest[10] == 3 and bytes(self._rest[12:32]).rstrip(b"\0") == b"NULL"

    def _frame_bytes(self) -> int | None:
        """How long the frame is that the rest begins with, with its header; None when that is not known yet."""
        if not self._rest:
            return None
        if not self._rest[0] & LONG:
            return 2 + self._rest[1] if len(self._rest) >= 2 else None
        return 9 + int.from_bytes(self._rest[1:9], "big") if len(self._rest) >= 9 else None

    def _take(self, n: int) -> bytes:
        taken = bytes(self._rest[:n])
        del self._rest[:n]
        return taken
