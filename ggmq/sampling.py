"""From logits to a token: biases, penalties, top-k, top-p, min-p, temperature, seed; llama.cpp's order and defaults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_CANDIDATES = 1024
"""Workers find so many of the largest quickly; of more, all logits come."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Units: `repeat_last_n` tokens that all penalties look at, -1 for all. `temperature` 0 is greedy; `seed` None takes a
    new one. `logit_bias`: tokens, and what is added to their logits before all else.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    banned: frozenset[int] = frozenset()
    """Tokens that are never taken; llama.cpp's --ignore-eos bans the end tokens so."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def penalises(self) -> bool:
        """Whether what came before changes a logit."""
        some = self.repeat_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return some and self.repeat_last_n != 0

    @property
    def greedy(self) -> bool:
        """No logits are needed on the main host: the worker's ARGMAX is the token."""
        return self.temperature <= 0 and not self.penalises and not self.banned and not self.logit_bias

    def n_candidates(self, n_vocab: int) -> int:
        """Tokens of the largest logits that are enough to pick from as if from all; 0 when it takes all.

        What makes tokens less likely has at most as many others take their places. What makes one more likely may lift it
        from anywhere, so that all logits are needed.
        """
        lowered = len(self.banned) + len(self.logit_bias)
        every = (self.temperature > 0 and self.top_k <= 0) or any(bias > 0 for _, bias in self.logit_bias)
        if self.penalises:
            lowered += self.repeat_last_n
            every |= self.repeat_penalty < 1.0 or self.presence_penalty < 0 or self.frequency_penalty < 0
            every |= self.repeat_last_n < 0
        wanted = (1 if self.temperature <= 0 else self.top_k) + lowered
        return 0 if every or wanted > min(MAX_CANDIDATES, n_vocab) else wanted


class Sampler:
    """One sequence's sampler; the same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._rng = np.random.default_rng(params.seed)

    def pick(
        self, logits: npt.NDArray[Any], previous: Sequence[int], ids: npt.NDArray[Any] | None = None,
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> int:  # fmt: skip
        """A token.

        previous: the tokens that penalties look at. ids: which tokens the logits are of, if not all. allowed: which tokens
        may be taken, one at least; they come before bans and biases. Where there is one only, no random number is drawn.
        Shapes: `logits` [n_vocab], or as `ids`; `allowed` [n_vocab].
        """
        p = self.params
        x = logits.astype(np.float64)
        if p.penalises or p.banned or p.logit_bias:
            self._change(x, previous, ids)
        if allowed is not None:
            kept = allowed if ids is None else allowed[ids]
            x, ids = x[kept], np.flatnonzero(kept) if ids is None else ids[kept]
            if len(x) == 1:
                return int(ids[0])
        if p.temperature <= 0:
            best = int(x.argmax()) if ids is None else int(np.lexsort((ids, -x))[0])
        elif x.max() == -np.inf:  # all that is allowed is banned
            best = 0 if ids is None else int(ids.argmin())
        else:
            best = self._draw(x, ids)
        return best if ids is None else int(ids[best])

    def enough(self, logits: npt.NDArray[Any], ids: npt.NDArray[Any], allowed: npt.NDArray[np.bool_]) -> bool:
        """Whether picking from these candidates is picking from all, where not all tokens are allowed.

        Those that are no candidates have no larger logit than the least of these. So it is when as many that are allowed lie
        above that as would be wanted of all tokens; or when all that are allowed are among them.
        """
        wanted, kept = self.params.n_candidates(len(allowed)), allowed[ids]
        if wanted and int((logits[kept] > logits.min()).sum()) >= wanted:
            return True
        return int(kept.sum()) == int(allowed.sum())

    def _change(self, x: npt.NDArray[np.float64], previous: Sequence[int], ids: npt.NDArray[Any] | None) -> None:
        """Biases, penalties and bans, in place."""
        p = self.params
        at: Mapping[int, int] | range = range(len(x)) if ids is None else {t: i for i, t in enumerate(ids.tolist())}
        for token, bias in p.logit_bias:
            if token in at:
                x[at[token]] += bias
        if p.penalises and previous:
            window = previous if p.repeat_last_n < 0 else previous[-p.repeat_last_n :]
            counts = [(at[token], n) for token, n in Counter(window).items() if token in at]
            if counts:
                where, n = np.array(counts, np.int64).T
                seen = x[where]
                seen = np.where(seen > 0, seen / p.repeat_penalty, seen * p.repeat_penalty)
                x[where] = seen - n * p.frequency_penalty - p.presence_penalty
        if p.banned:
            x[[at[token] for token in p.banned if token in at]] = -np.inf

    def _draw(self, x: npt.NDArray[np.float64], ids: npt.NDArray[Any] | None) -> int:
        """Index of one by chance. `ids` tell in which order equals stand."""
        p = self.params
        n, total = p.top_k, 0.0
        if n <= 0:  # the largest that may be enough, and the sum over all
            n = len(x)
            e = np.exp(x - x.max())
            total = float(e.sum())
            if p.min_p > 0:
                n = max(1, int((e >= p.min_p).sum()))
        order = _largest(x, n, ids)
        x = x[order]
        e = np.exp(x - x[0])
        if x[-1] == -np.inf:  # none that cannot be taken, unless there is no other
            e = e[: max(1, int((x > -np.inf).sum()))]
        if p.top_p < 1.0:
            sums = np.cumsum(e)
            e = e[: int(np.searchsorted(sums, p.top_p * (total or sums[-1]))) + 1]
        if p.min_p > 0.0:
            e = e[: max(1, int((e >= p.min_p).sum()))]
        sums = np.cumsum(np.exp((x[: len(e)] - x[0]) / p.temperature))
        at = int(np.searchsorted(sums, self._rng.random() * sums[-1], side="right"))
        return int(order[min(at, len(e) - 1)])


def _largest(x: npt.NDArray[np.float64], n: int, ids: npt.NDArray[Any] | None) -> npt.NDArray[np.int64]:
    """Indices of the n largest, by their order; of equal ones the first ids."""
    some: npt.NDArray[np.int64] | None = None
    if 0 < n < len(x) // 4:  # it is quicker to find them first
        least = np.partition(x, len(x) - n)[len(x) - n]
        if least == least:
            some = np.flatnonzero(x >= least)
    among = x if some is None else x[some]
    if ids is None:
        order = np.argsort(-among, kind="stable")[:n]
    else:
        order = np.lexsort((ids if some is None else ids[some], -among))[:n]
    return order if some is None else some[order]


def log_probs(logits: npt.NDArray[Any], token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-probability of a token, and the n most likely ones with theirs: of the model, before biases, cuts and temperature.

    Shapes: `logits` [n_vocab].
    """
    x = logits.astype(np.float64)
    top = _largest(x, min(n, len(x)), None) if n > 0 else ()
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    return float(x[token]), tuple((int(i), float(x[i])) for i in top)
