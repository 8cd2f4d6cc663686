"""From what a request says to how its tokens are taken; what it leaves open the server's options say."""

from __future__ import annotations

import dataclasses

from ggmq.sampling import SamplingParams
from ggmq.server.errors import bad
from ggmq.server.options import ServerOptions
from ggmq.server.schema import Sampling
from ggmq.texts import Texts


def params_of(body: Sampling, options: ServerOptions, texts: Texts) -> SamplingParams:
    """Errors: InvalidValue for what cannot be had."""
    penalty = body.repeat_penalty if body.repeat_penalty is not None else body.repetition_penalty
    said = {
        "temperature": body.temperature, "top_k": None if body.top_k is None else max(0, body.top_k), "top_p": body.top_p,
        "min_p": body.min_p, "repeat_penalty": penalty, "repeat_last_n": body.repeat_last_n,
        "seed": None if body.seed == -1 else body.seed, "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
    }  # fmt: skip
    bias = body.logit_bias or {}
    pairs = bias if isinstance(bias, dict) else {str(token): added for token, added in bias}
    return texts.params(options.params, said, options.ignore_eos if body.ignore_eos is None else body.ignore_eos, pairs)


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
