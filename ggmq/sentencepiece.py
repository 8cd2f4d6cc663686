"""SentencePiece's BPE: neighbours are merged, the best-scored pair first, until none is left."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

SPACE = "\u2581"


class SentencePieceEncoder:
    """Text to ids; what is no token becomes the tokens of its bytes, and where there is none `unknown`.

    Source: Kudo and Richardson, SentencePiece, in llama.cpp's order: ties go to the leftmost pair.
    """

    def __init__(self, ids: Mapping[str, int], scores: Sequence[float], unknown: int | None) -> None:
        self._ids, self._scores = ids, scores
        self._byte_ids = [self._byte_token(b, unknown) for b in range(256)]

    def _byte_token(self, byte: int, unknown: int | None) -> int | None:
        """The token that is written as a byte's number, whatever its type, or else that of the byte alone."""
        for text in (f"<0x{byte:02X}>", bytes([byte]).decode("utf-8", "surrogateescape")):
            if text in self._ids:
                return self._ids[text]
        return unknown

    def encode(self, text: str) -> list[int]:
        symbols = list(text.replace(" ", SPACE))
        n = len(symbols)
        before, after = list(range(-1, n - 1)), [*range(1, n), -1]
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            piece = symbols[left] + symbols[right]
            i = self._ids.get(piece)
            if i is not None:
                heapq.heappush(queue, (-self._scores[i], left, right, len(piece)))

        for i in range(n - 1):
            offer(i, i + 1)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        out: list[int] = []
        for piece in symbols:
            if not piece:
                continue
            whole = self._ids.get(piece)
            if whole is not None:
                out.append(whole)
            else:
                known = [self._byte_ids[b] for b in piece.encode("utf-8", "surrogateescape")]
                out += [k for k in known if k is not None]
        return out
