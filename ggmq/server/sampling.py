"""From what a request says to how its tokens are taken; what it leaves open the server's options say."""

from __future__ import annotations

import dataclasses
from typing import Any

from ggmq.sampling import SamplingParams
from ggmq.server.errors import bad
from ggmq.server.options import ServerOptions
from ggmq.server.schema import Sampling
from ggmq.tokenizer import Vocabulary


def params_of(body: Sampling, options: ServerOptions, vocabulary: Vocabulary) -> SamplingParams:
    """Errors: ApiError 400 for what cannot be had."""
    banned = vocabulary.suppressed
    if options.ignore_eos if body.ignore_eos is None else body.ignore_eos:
        banned |= vocabulary.end_ids
    penalty = body.repeat_penalty if body.repeat_penalty is not None else body.repetition_penalty
    said: dict[str, Any] = {
        "temperature": body.temperature, "top_k": None if body.top_k is None else max(0, body.top_k), "top_p": body.top_p,
        "min_p": body.min_p, "repeat_penalty": penalty, "repeat_last_n": body.repeat_last_n,
        "seed": None if body.seed is None or body.seed == -1 else body.seed & 0xFFFFFFFF,
    }  # fmt: skip
    biases, more = biases_of(body, len(vocabulary.tokens))
    said |= {"presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty, "logit_bias": biases}
    banned |= more
    return dataclasses.replace(options.params, banned=banned, **{k: v for k, v in said.items() if v is not None})


def biases_of(body: Sampling, n_vocab: int) -> tuple[tuple[tuple[int, float], ...], frozenset[int]]:
    """What is added to logits, by token, and tokens that are never taken: llama-server's `false`. Errors: ApiError 400."""
    given = body.logit_bias or []
    pairs = given.items() if isinstance(given, dict) else [(str(token), bias) for token, bias in given]
    biases, banned = [], []
    for token, bias in pairs:
        if not token.isdecimal() or not int(token) < n_vocab:
            raise bad("logit_bias", f"expected tokens of 0 to {n_vocab - 1}, got {token[:32]}")
        if bias is False:
            banned.append(int(token))
        elif bias:
            biases.append((int(token), float(bias)))
    return tuple(biases), frozenset(banned)


def for_choice(params: SamplingParams, number: int) -> SamplingParams:
    """Choices of one request differ: each has a seed of its own."""
    return params if params.seed is None else dataclasses.replace(params, seed=(params.seed + number) & 0xFFFFFFFF)


def stops_of(stop: str | list[str] | None, path: str = "stop") -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for i, text in enumerate(stops):
        if not text:
            raise bad(path if isinstance(stop, str) else f"{path}[{i}]", "expected a text that is not empty")
    return stops


def limit_of(*said: int | None) -> int:
    """How many tokens to make: what is said first; negative for no bound."""
    return next((n for n in said if n is not None), -1)
