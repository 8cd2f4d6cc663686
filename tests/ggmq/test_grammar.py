"""Answers of a given form: valid whatever the model would rather say, and refused with a reason when it cannot be had."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.grammar import Constraint, Grammar, Grammars
from ggmq.hub import BUNDLED
from ggmq.model import Model
from ggmq.sampling import SamplingParams
from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError
from tests.support.fixtures import SHARED
from tests.support.loaded import cpu_workers, loaded
from tests.support.schemas import schema

VOCABULARY = Vocabulary(GGUF(BUNDLED))
GRAMMARS = Grammars(VOCABULARY)
CHECKED = jsonschema.FormatChecker(["date", "ipv4", "uuid"])  # of times the package knows too few
N_SCHEMAS = 200 if os.environ.get("GGMQ_LONG") else 40


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with cpu_workers(1) as client:
        yield loaded(client, BUNDLED, 512, n_seq=8)


def answers(model: Model, wanted: list[tuple[Grammar, SamplingParams]], n: int = 400) -> list[tuple[str, str]]:
    """Texts made together, and why each ended."""
    engine = Engine(model, VOCABULARY.end_ids)
    prompt = VOCABULARY.encode("Once upon a time")
    made = [engine.add(prompt, params, n, constraint=grammar.start()) for grammar, params in wanted]
    while engine.busy:
        engine.step()
    return [(VOCABULARY.decode(s.tokens[s.n_prompt :]), s.finished) for s in made]


def test_json_of_generated_schemas_is_valid(model: Model) -> None:
    schemas = [schema(seed) for seed in range(N_SCHEMAS)]
    wanted = [(GRAMMARS.json_schema(s), SamplingParams(1.0, 0, 1.0, 0.0, seed=i)) for i, s in enumerate(schemas)]
    n_whole = 0
    for s, (text, why) in zip(schemas, answers(model, wanted), strict=True):
        if why == "end":
            n_whole += 1
            jsonschema.validate(json.loads(text), s, format_checker=CHECKED)
    print(f"{n_whole} of {len(schemas)} finished")
    assert n_whole > 0.8 * len(schemas)


def test_any_object(model: Model) -> None:
    params = [SamplingParams(seed=i) for i in range(4)]
    for text, why in answers(model, [(GRAMMARS.json_object(), p) for p in params], 200):
        assert why != "end" or isinstance(json.loads(text), dict)
        assert text.lstrip().startswith("{")


def test_regular_expressions_and_grammars(model: Model) -> None:
    greedy = SamplingParams(temperature=0)
    cases = [
        (GRAMMARS.regex(r"[ab]{3}-\d+"), r"[ab]{3}-\d+"),
        (GRAMMARS.any('root ::= "yes " ("sir" | "ma\'am")'), r"yes (sir|ma'am)"),
        (GRAMMARS.lark('start: "<" /[a-z]{2,5}/ ">"'), r"<[a-z]{2,5}>"),
        (GRAMMARS.regex("\u00fc{2}\u4f60"), "\u00fc\u00fc\u4f60"),
    ]  # fmt: skip
    for (_, pattern), (text, why) in zip(cases, answers(model, [(g, greedy) for g, _ in cases], 60), strict=True):
        assert why != "end" or re.fullmatch(pattern, text), (pattern, text)


def test_company_changes_nothing(model: Model) -> None:
    wanted = [(GRAMMARS.json_schema(schema(i)), SamplingParams(seed=i)) for i in range(6)]
    assert answers(model, wanted, 60) == [answers(model, [one], 60)[0] for one in wanted]


@pytest.mark.parametrize("name", ["bundled", "llama-bpe", "llama-spm", "qwen2", "gpt-2"])
def test_a_mask_is_what_a_text_may_go_on_with(name: str) -> None:
    """Against a definition: the text with a token is the beginning of a text of the form. Of several ways to write what must
    come anyway one is enough."""
    if name != "bundled" and not (SHARED / "vocab" / f"ggml-vocab-{name}.gguf").exists():
        pytest.skip("the shared vocabularies are not here")
    v = VOCABULARY if name == "bundled" else Vocabulary(GGUF(SHARED / "vocab" / f"ggml-vocab-{name}.gguf"))
    texts = ["yes", "yesterday", "no way", "n\u00e4h"]
    constraint = Grammars(v).regex("|".join(texts)).start()
    rng, said = random.Random(1), b""
    while not constraint.ended:
        expected = {i for i in range(len(v.tokens)) if (raw := v.piece(i)) and any(
            t.encode().startswith(said + raw) for t in texts)} - v.end_ids  # fmt: skip
        allowed = set(np.flatnonzero(constraint.mask()).tolist())
        assert allowed - v.end_ids <= expected and bool(allowed & v.end_ids) == (said.decode("utf-8", "ignore") in texts)
        assert bool(allowed - v.end_ids) == bool(expected)
        if not expected:
            break
        if not said:  # nothing must come yet
            assert allowed == expected
        token = rng.choice(sorted(allowed - v.end_ids))
        constraint.take(token)
        said += v.piece(token)
    assert said.decode() in texts


@pytest.mark.parametrize("bad", [
    lambda: GRAMMARS.json_schema({"type": "nothing"}), lambda: GRAMMARS.json_schema([]), lambda: GRAMMARS.regex("(["),
    lambda: GRAMMARS.json_schema({"$ref": "#/$defs/none"}), lambda: GRAMMARS.any("root ::= missing"),
    lambda: GRAMMARS.lark("x"),
    lambda: GRAMMARS.json_schema({"$ref": "https://example.com/schema"}), lambda: GRAMMARS.any("%%%"),
    lambda: GRAMMARS.json_schema(_deep(500)), lambda: GRAMMARS.regex("a" * (2 << 20)),
])  # fmt: skip
def test_what_is_no_form_is_refused_with_a_reason(bad: Any) -> None:
    with pytest.raises(FormatError, match=r"^(schema|regex|grammar): .+"):
        bad()


@pytest.mark.parametrize("hostile", [
    lambda: GRAMMARS.regex("(a|a|aa){1,4000}b{1,4000}"),
    lambda: GRAMMARS.json_schema({"enum": [f"{i:09}" for i in range(50_000)]}),
    lambda: GRAMMARS.json_schema({"type": "array", "minItems": 10**9, "items": {"type": "string"}}),
    lambda: GRAMMARS.json_schema({"type": "string", "maxLength": 10**9}), lambda: GRAMMARS.regex("(.*a){60}"),
])  # fmt: skip
def test_hostile_forms_end_soon(hostile: Any) -> None:
    start = time.process_time()
    try:
        constraint: Constraint = hostile().start()
        constraint.mask()
    except FormatError:
        pass
    assert time.process_time() - start < 20  # a bound, not a measure


def _deep(n: int) -> Any:
    inner: Any = {"type": "string"}
    for _ in range(n):
        inner = {"type": "array", "items": inner}
    return inner
