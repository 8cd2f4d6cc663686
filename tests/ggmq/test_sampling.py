"""Sampling: each filter against its definition, and the same seed giving the same tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ggmq.sampling import Sampler, SamplingParams

LOGITS = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=60).map(lambda v: np.array(v, np.float32))


@given(LOGITS, st.integers(0, 1 << 30))
def test_the_same_seed_gives_the_same_tokens(x: np.ndarray, seed: int) -> None:
    a, b = (Sampler(SamplingParams(seed=seed)) for _ in range(2))
    assert [a.pick(x, []) for _ in range(20)] == [b.pick(x, []) for _ in range(20)]


@given(LOGITS)
def test_temperature_0_and_top_k_1_are_greedy(x: np.ndarray) -> None:
    assert Sampler(SamplingParams(temperature=0)).pick(x, []) == int(x.argmax())
    assert Sampler(SamplingParams(top_k=1)).pick(x, []) == int(x.argmax())


@given(LOGITS, st.integers(1, 5), st.floats(0.05, 1), st.floats(0, 1), st.integers(0, 99))
def test_picked_tokens_pass_every_filter(x: np.ndarray, k: int, top_p: float, min_p: float, seed: int) -> None:
    s = Sampler(SamplingParams(1.0, k, top_p, min_p, seed=seed))
    picked = {s.pick(x, []) for _ in range(20)}
    order = list(np.argsort(-x.astype(np.float64), kind="stable"))
    assert all(order.index(t) < k for t in picked)
    p = np.exp(x.astype(np.float64) - x.max())
    assert all(p[t] >= min_p * p.max() * (1 - 1e-9) for t in picked)
    top = p[order[:k]] / p[order[:k]].sum()
    allowed = int(np.searchsorted(np.cumsum(top), top_p)) + 1
    assert all(order.index(t) < allowed for t in picked)


@given(LOGITS)
def test_repeat_penalty_and_banned_tokens(x: np.ndarray) -> None:
    best = int(x.argmax())
    penal = Sampler(SamplingParams(temperature=0, repeat_penalty=100.0))
    y = x.astype(np.float64)
    y[best] = y[best] / 100 if y[best] > 0 else y[best] * 100
    assert penal.pick(x, [best]) == int(y.argmax())
    assert Sampler(SamplingParams(temperature=0, banned=frozenset({best}))).pick(x, []) != best


def test_frequencies_follow_the_probabilities() -> None:
    s = Sampler(SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1))
    x = np.log(np.array([0.5, 0.3, 0.2]))
    counts = np.bincount([s.pick(x, []) for _ in range(20_000)], minlength=3) / 20_000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.02


@given(
    LOGITS, st.builds(
        SamplingParams, st.sampled_from([0.0, 0.8, 2.0]), st.integers(0, 12), st.floats(0.1, 1), st.floats(0, 0.2),
        st.sampled_from([1.0, 1.3, 0.7]), st.integers(-1, 4), st.integers(0, 99),
        st.frozensets(st.integers(0, 1), max_size=2),
    ), st.lists(st.integers(0, 1), max_size=6),
)  # fmt: skip
def test_the_candidates_are_enough(x: np.ndarray, params: SamplingParams, previous: list[int]) -> None:
    """What is picked from the largest logits, in any order, is what is picked from all."""
    k = params.n_candidates(len(x))
    if not k:
        return
    ids = np.argsort(-x.astype(np.float64), kind="stable")[:k]
    ids = np.random.default_rng(0).permutation(ids)
    some, every = Sampler(params), Sampler(params)
    assert [some.pick(x[ids], previous, ids) for _ in range(5)] == [every.pick(x, previous) for _ in range(5)]
