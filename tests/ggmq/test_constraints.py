"""Grammars for calls: what they let through is read back as calls that fit, and a call that has begun is a whole one."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggmq.answers import Answer, AnswerFormat
from ggmq.gguf import GGUF
from ggmq.special import CONTROL
from ggmq.tokenizer import Vocabulary
from tests.ggmq.test_answers import ASSISTANT, SIGNS, tool
from tests.support.fixtures import BUNDLED

llguidance = pytest.importorskip("llguidance")
masks = pytest.importorskip("llguidance.numpy")

VOCABULARY = Vocabulary(GGUF(BUNDLED))
PLACES = ("Ulm", 'Bonn "é"')
TOOLS = [
    tool("weather", place={"enum": list(PLACES)}, days={"type": "integer", "minimum": 0, "maximum": 9},
         exact={"type": "boolean"}),
    tool("add", y={"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}), tool("now")]  # fmt: skip
TOOLS[0]["function"]["parameters"]["required"] = ["days", "place"]
TOOLS[1]["function"]["parameters"]["$defs"] = {"n": {"enum": [1, 2]}}
FORMATS = SIGNS | {
    "mistral names": "tools [TOOL_CALLS] [ARGS]", "dsml calls": SIGNS["dsml"] + " function_calls",
    "phi": "tools <|tool_call|> <|/tool_call|>", "fenced": "tools ```json " + SIGNS["deepseek"],
    "apriel": "tools <tool_calls>[", "minimax 1": "tools <tool_calls>",
    "nemotron": "tools <TOOLCALL>", "functools": "tools functools[", 
    "apertus": "tools <|tools_prefix|>"}  # fmt: skip
TAIL = {"functionary": ">>>", "harmony": ASSISTANT}


class _Tokens:
    """A vocabulary as llguidance takes it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        n = len(vocabulary.tokens)
        self.eos_token_id, self.bos_token_id = vocabulary.eos, vocabulary.bos
        self.special_token_ids = [i for i in range(n) if vocabulary.types[i] == CONTROL]
        self.tokens = [vocabulary.piece(i, special=True) for i in range(n)]
        self._vocabulary = vocabulary

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return self._vocabulary.encode(text, add_special=False, parse_special=False)


def tokenizer(vocabulary: Vocabulary) -> Any:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(vocabulary)))


PLAIN = tokenizer(VOCABULARY)


def matcher(grammar: str | None, tokens: Any = PLAIN) -> Any:
    assert grammar is not None
    m = llguidance.LLMatcher(tokens, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not m.is_error(), (m.get_error(), grammar)
    return m


def accepts(m: Any, text: str, vocabulary: Vocabulary = VOCABULARY) -> bool:
    """Whether a text is a whole answer."""
    tokens = vocabulary.encode(text, add_special=False)
    return m.try_consume_tokens(tokens) == len(tokens) and m.is_accepting()


def made_up(m: Any, seed: int, start: str = "") -> str:
    """Tokens of which each is allowed, until the answer may end."""
    rng, n = random.Random(seed), len(VOCABULARY.tokens)
    out = VOCABULARY.encode(start, add_special=False)
    assert m.try_consume_tokens(out) == len(out)
    mask = masks.allocate_token_bitmask(1, n)
    while not m.is_stopped() and len(out) < 4000:
        masks.fill_next_token_bitmask(m, mask, 0)
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")[:n])
        token = VOCABULARY.eos if VOCABULARY.eos in allowed else int(rng.choice(allowed.tolist()))
        if token == VOCABULARY.eos:
            break
        m.consume_token(token)
        out.append(token)
    return VOCABULARY.decode(out, special=True)


def forced(f: AnswerFormat, choice: str, seed: int) -> str:
    """A made-up answer with calls, after a prompt that has ended its thoughts."""
    tail = f._layout.thoughts[0][1] if f._layout.thoughts else ""
    start = "<|channel|>commentary" if f.name == "channels" else ""
    return made_up(matcher(f.constraint(TOOLS, choice, prompt_tail=tail)), seed, start)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_forced_call_is_one_that_fits(format: str) -> None:
    f = AnswerFormat.of(FORMATS[format], VOCABULARY)
    for seed, choice in enumerate(("required", "weather", "add", "required")):
        text = forced(f, choice, seed)
        reader = f.reader(TOOLS, prompt_tail=TAIL.get(format, ""), new_id=str)
        answer = Answer().add(reader.feed(text)).add(reader.finish())
        assert answer.calls and not answer.content, text
        for call in answer.calls:
            arguments = json.loads(call.arguments)
            assert choice in ("required", call.name)
            if call.name == "weather":
                assert arguments.pop("place") in PLACES and arguments.pop("days") in range(10)
                assert arguments in ({}, {"exact": True}, {"exact": False})
            elif call.name == "add":
                assert set(arguments.get("y", ())) <= {1, 2}


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_text_is_free_until_a_call_begins(format: str) -> None:
    f = AnswerFormat.of(FORMATS[format], VOCABULARY)
    grammar = f.constraint(TOOLS)
    if grammar is None:
        assert format == "functionary"
        return
    for text in ("", "Hello there.\n", "Is 1 < 2? [yes] {no} ```c```", '{"a": 1}', "<think>Hm</think>"):
        assert accepts(matcher(grammar), text), (text, grammar)
    whole = forced(f, "weather", 1)
    assert accepts(matcher(grammar), whole), whole
    assert not accepts(matcher(grammar), whole.replace("weather", "wether")), whole
    if format not in ("json", "llama"):  # where a call is known by being all there is
        assert accepts(matcher(grammar), f"Let me see.\n{whole}")
        assert not accepts(matcher(grammar), f"Let me see.\n{whole}".replace("weather", "wether"))
    one = f.constraint(TOOLS, parallel=False)
    assert accepts(matcher(one), whole) and not accepts(matcher(one), f"{whole}\n{whole}")


WORDS = st.sampled_from(["type", "properties", "required", "enum", "const", "$ref", "anyOf", "$defs", "x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.sampled_from(["string", "integer", "x", ""])
JSON = st.recursive(LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(WORDS, part, max_size=4), max_leaves=8)


@given(JSON, st.sampled_from(sorted(FORMATS)))
def test_schemas_may_be_anything(schema: Any, format: str) -> None:
    f = AnswerFormat.of(FORMATS[format], VOCABULARY)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    for choice in ("auto", "weather"):
        grammar = f.constraint(tools, choice)
        assert grammar is None or grammar.startswith("start: ")
    for text in ("<tool_call><function=weather><parameter=x>1</parameter></function>", "```tool_code\nweather(1)\n```"):
        reader = f.reader(tools, prompt_tail=TAIL.get(format, ""))
        assert len(Answer().add(reader.feed(text)).add(reader.finish()).calls) <= 1


def test_control_tokens_are_markers_and_thoughts_come_before_forced_calls() -> None:
    v = Vocabulary(GGUF(BUNDLED))
    for i, text in zip((300, 301, 302), ("<tool_call>", "<think>", "</think>"), strict=True):
        v.tokens[i], v.types[i] = text, CONTROL
        v.ids[text] = i
    f = AnswerFormat.of("tools <tool_call> <think>", v)
    assert f.preserved == {300, 301, 302}
    call = [*v.encode('\n{"name": "now", "arguments": {}}\n</tool_call>', add_special=False)]
    tokens = tokenizer(v)
    hm = v.encode("Hm", add_special=False)

    def takes(choice: str, tail: str, ids: list[int]) -> bool:
        m = matcher(f.constraint(TOOLS, choice, prompt_tail=tail), tokens)
        return bool(m.try_consume_tokens(ids) == len(ids) and m.is_accepting())

    for choice in ("now", "auto"):
        assert takes(choice, "", [301, *hm, 302, 300, *call]) and takes(choice, "", [300, *call])
        assert takes(choice, "<think>\n", [*hm, 302, 300, *call])
        assert takes(choice, "", hm) is (choice == "auto")
        assert not takes(choice, "", [300, *hm])
