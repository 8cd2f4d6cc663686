"""From logits to a token: penalties, top-k, top-p, min-p, temperature, seed; llama.cpp's order and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_CANDIDATES = 1024
"""Workers find so many of the largest quickly; of more, all logits come."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Units: `repeat_last_n` tokens, -1 for all. `temperature` 0 is greedy; `seed` None takes a new one."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    banned: frozenset[int] = frozenset()
    """Tokens that are never taken; llama.cpp's --ignore-eos bans the end tokens so."""

    @property
    def greedy(self) -> bool:
        """No logits are needed on the main host: the worker's ARGMAX is the token."""
        return self.temperature <= 0 and self.repeat_penalty == 1.0 and not self.banned

    def n_candidates(self, n_vocab: int) -> int:
        """Tokens of the largest logits that are enough to pick from as if from all; 0 when it takes all.

        Penalties make tokens less likely, so that as many others as are penalised may take their places.
        """
        lowered = len(self.banned)
        if self.repeat_penalty != 1.0:
            lowered += self.repeat_last_n
        wanted = (1 if self.temperature <= 0 else self.top_k) + lowered
        every = (self.temperature > 0 and self.top_k == 0) or self.repeat_penalty < 1.0
        every |= self.repeat_penalty != 1.0 and self.repeat_last_n < 0
        return 0 if every or wanted > min(MAX_CANDIDATES, n_vocab) else wanted


class Sampler:
    """One sequence's sampler; the same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._rng = np.random.default_rng(params.seed)

    def pick(self, logits: npt.NDArray[Any], previous: Sequence[int], ids: npt.NDArray[Any] | None = None) -> int:
        """A token. `previous`: the tokens that penalties look at. `ids`: which tokens the logits are of, if not all.

        Shapes: `logits` [n_vocab], or as `ids`.
        """
        p = self.params
        if ids is None:
            ids = np.arange(len(logits))
        else:  # in the order in which all of them would stand
            order = np.argsort(ids)
            ids, logits = ids[order], logits[order]
        x = logits.astype(np.float64)
        if p.repeat_penalty != 1.0 and previous and p.repeat_last_n:
            window = previous if p.repeat_last_n < 0 else previous[-p.repeat_last_n :]
            seen = np.isin(ids, np.asarray(window, np.int64))
            x[seen] = np.where(x[seen] > 0, x[seen] / p.repeat_penalty, x[seen] * p.repeat_penalty)
        if p.banned:
            x[np.isin(ids, list(p.banned))] = -np.inf
        if p.temperature <= 0:
            return int(ids[x.argmax()])
        order = np.argsort(-x, kind="stable")
        if p.top_k > 0:
            order = order[: p.top_k]
        probs = _softmax(x[order])
        if p.top_p < 1.0:
            keep = int(np.searchsorted(np.cumsum(probs), p.top_p)) + 1
            order = order[:keep]
        if p.min_p > 0.0:
            probs = _softmax(x[order])
            order = order[probs >= p.min_p * probs[0]]
        probs = _softmax(x[order] / p.temperature)
        at = np.searchsorted(np.cumsum(probs), self._rng.random() * probs.sum(), side="right")
        return int(ids[order[min(at, len(order) - 1)]])


def _softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())
