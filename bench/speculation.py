"""`python -m bench speculation`: tokens a second with guesses and without, in pairs, on texts of several kinds.

Random weights edit no JSON, so what is made of each prompt is given: a sampler takes, behind each token, the next of the
text, whatever the logits are. Passes, candidates and guesses are as they would be with a model that says so.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from bench.models import LARGE, write_model
from ggmq.archs import open_arch
from ggmq.cluster import Client, LocalBus
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.model import Model, ModelConfig, place_model
from ggmq.sampling import Sampler, SamplingParams
from ggmq.speculation import Mode

FIRST_ID = 300
N_CTX = 2048


class Text(NamedTuple):
    """A prompt and the answer that comes. aim: so many times the rate without guesses, at least."""

    name: str
    prompt: list[int]
    answer: list[int]
    aim: float


class Given(Sampler):
    """Takes the next token of a text that is known (a stand-in for a model's choice)."""

    def __init__(self, n_prompt: int, answer: Sequence[int]) -> None:
        super().__init__(SamplingParams())
        self._n_prompt, self._answer = n_prompt, answer

    def pick(self, logits: npt.NDArray[Any], previous: Sequence[int], ids: npt.NDArray[Any] | None = None,
             allowed: npt.NDArray[Any] | None = None) -> int:  # fmt: skip
        super().pick(logits, previous, ids, allowed)
        return self._answer[len(previous) - self._n_prompt]


class Words:
    """Numbers for words as a tokenizer would have them: letters, digits by three, blanks, signs."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def tokens(self, text: str) -> list[int]:
        words = re.findall(r" ?[A-Za-z]+|\d{1,3}|\s+|[^\w\s]+|.", text)
        return [self._ids.setdefault(w, FIRST_ID + len(self._ids)) for w in words]


def texts(seed: int) -> list[Text]:
    rng, words = random.Random(seed), Words()
    names = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ira", "Jo"]
    records = [{"id": rng.randrange(1000, 9999), "name": rng.choice(names), "city": rng.choice(names) + "ville",
                "active": True, "score": _score(rng), "tags": rng.sample(names, 2)} for _ in range(12)]  # fmt: skip
    before = json.dumps(records, indent=2)
    for r in rng.sample(records, 4):
        r["active"] = False
        r["score"] = _score(rng)
    edited = json.dumps(records, indent=2)
    code = "\n".join(f"def {n.lower()}_{i}(value):\n    return value * {i} + {rng.randrange(99)}\n"
                     for i, n in enumerate(rng.sample(names, 8)))  # fmt: skip
    prose = _prose(rng, words, 260)
    renamed = words.tokens(code.replace("value", "x"))
    return [
        Text("a JSON edit", words.tokens(f"Set four records to inactive:\n{before}\n"), words.tokens(edited), 1.7),
        Text("code with a name changed", words.tokens(f"Rename value:\n{code}\n"), renamed, 0.97),
        Text("prose", prose[:60], prose[60:], 0.97),
        Text("words by chance", _chance(rng, 60), _chance(rng, 200), 0.97),
        Text("bytes by chance of 40", _few(rng, 60), _few(rng, 200), 0.97),
    ]  # fmt: skip


def _score(rng: random.Random) -> float:
    return round(rng.random() * 100, 2)


def _prose(rng: random.Random, words: Words, n: int) -> list[int]:
    """Words as often as in a language, a few of them always together."""
    pairs = [f" of the word{chr(97 + i)}" for i in range(8)]
    out: list[int] = []
    while len(out) < n:
        rank = min(int(rng.paretovariate(0.9)), 3000)
        out += words.tokens(rng.choice(pairs)) if rng.random() < 0.08 else [5000 + rank]
    return out[:n]


def _chance(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(FIRST_ID, LARGE.n_vocab) for _ in range(n)]


def _few(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(FIRST_ID, FIRST_ID + 40) for _ in range(n)]


def rate(engine: Engine, text: Text) -> float:
    """Tokens a second behind the first."""
    engine.model.store.drop_kept()
    s = engine.add(text.prompt, SamplingParams(), len(text.answer))
    s.sampler = Given(len(text.prompt), text.answer)
    begun = 0.0
    while not s.finished:
        engine.step()
        begun = begun or (time.perf_counter() if s.n_made else 0.0)
    assert s.tokens[s.n_prompt :] == text.answer
    return (s.n_made - 1) / (time.perf_counter() - begun)


def measure(folder: Path, rounds: int) -> None:
    path = folder / "llama-0.85b-q4_0.gguf"
    write_model(path)
    file, bus = GGUF(path), LocalBus()
    try:
        bus.spawn("CPU", 2)
        client = bus.start()
        model = _loaded(client, file)
        engine_of: Callable[[Mode], Engine] = lambda mode: Engine(model, speculate=mode)  # noqa: E731
        engines = {"off": engine_of("off"), "auto": engine_of("auto")}
        for text in texts(0):  # graphs are put, passes timed
            for engine in engines.values():
                rate(engine, text)
        ratios: dict[str, list[float]] = {}
        aims: dict[str, float] = {}
        for i in range(rounds):
            for text in texts(1 + i):
                order = ("off", "auto") if i % 2 else ("auto", "off")
                found = {mode: rate(engines[mode], text) for mode in order}
                ratios.setdefault(text.name, []).append(found["auto"] / found["off"])
                aims[text.name] = text.aim
    finally:
        bus.close()
    print(f"| decode with guesses by lookup ÷ without | median of {rounds} pairs | least | most | aim |")
    print("|---" * 5 + "|")
    for name, found in ratios.items():
        print(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} | {aims[name]} |")


def _loaded(client: Client, file: GGUF) -> Model:
    model = place_model(ModelConfig(file.path, N_CTX), open_arch(file), client)
    model.load()
    return model
