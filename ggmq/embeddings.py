"""One vector of a text: from the hidden states of its tokens, by the ways that GGUF names and llama.cpp has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ggmq.archs.base import Arch
from ggmq.engine import Want
from protocol.errors import FormatError

Pooling = Literal["mean", "last", "cls", "none"]
"""The mean over all tokens, the last token's state, the first's, or those of all."""

_BY_NUMBER: tuple[Pooling, ...] = ("none", "mean", "cls", "last")
_RANK = 4


def default_pooling(arch: Arch) -> Pooling:
    """What the file says; the mean where it says nothing. Errors: FormatError for one that scores texts (rank)."""
    number = arch.keys.integer("pooling_type", 0, _RANK)
    if number == _RANK:
        raise FormatError(f"{arch.gguf.path.name}: pooling rank: what comes is a score of two texts, which is not done "
                          "here; name another pooling")  # fmt: skip
    return _BY_NUMBER[number] if "pooling_type" in arch.keys else "mean"


def pooling_of(name: str) -> Pooling:
    """Errors: FormatError for one that there is not."""
    for known in _BY_NUMBER:
        if name == known:
            return known
    raise FormatError(f"pooling: expected one of {', '.join(_BY_NUMBER)}, got {name!r}")


def to_read(tokens: Sequence[int], pooling: Pooling) -> tuple[Sequence[int], Want]:
    """What of a text must be read, and which of its rows are needed. Nothing that follows changes the first token's."""
    if pooling == "cls":
        return tokens[:1], "last"
    return tokens, "last" if pooling == "last" else "hidden"


def pooled(rows: npt.NDArray[np.float32], pooling: Pooling, normalize: bool = True) -> npt.NDArray[np.float32]:
    """The vector of a text; all of its rows where pooling is none.

    rows: what `to_read` asks for. normalize: to a length of 1; zeros stay as they are.
    Shapes: [n, n_embd] to [n_embd], or [n, n_embd].
    """
    x = rows.astype(np.float64)
    if pooling != "none":
        x = x.mean(0) if pooling == "mean" else x[0]
    if normalize:
        length = np.sqrt((x * x).sum(-1, keepdims=True))
        x = x / np.where(length > 0, length, 1.0)
    return x.astype(np.float32)
