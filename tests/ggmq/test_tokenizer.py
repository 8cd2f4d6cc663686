"""Tokenizers against llama.cpp's own cases, and the streaming decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggmq.gguf import GGUF
from ggmq.tokenizer import StreamDecoder, Vocabulary
from tests.support.fixtures import BUNDLED, SHARED, VOCABULARIES

BUNDLED_VOCABULARY = Vocabulary(GGUF(BUNDLED))
_loaded: dict[str, Vocabulary] = {}


def vocabulary(name: str) -> Vocabulary:
    if name not in _loaded:
        _loaded[name] = Vocabulary(GGUF(SHARED / "vocab" / name))
    return _loaded[name]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_llama_cpp_cases(shared: Path, name: str) -> None:
    v = vocabulary(name)
    path = shared / "vocab" / name
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")
    assert len(texts) == len(lines)
    for text, line in zip(texts, lines, strict=True):
        ids = v.encode(text, add_special=False, parse_special=False)
        assert ids == [int(x) for x in line.split()], text
        assert v.decode(ids) == (" " + text if v.model == "llama" and text else text)


@pytest.mark.parametrize("name", ["bundled", *VOCABULARIES])
@given(text=st.text(max_size=40))
def test_text_comes_back(name: str, text: str) -> None:
    v = BUNDLED_VOCABULARY if name == "bundled" else vocabulary(name)
    text = text.encode("utf-8", "ignore").decode()
    ids = v.encode(text, add_special=False, parse_special=False)
    got = v.decode(ids)
    assert got == (" " + text if v.model == "llama" and text else text).replace("\u2581", " ") or got == text


@given(st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), max_size=20))
def test_streaming_never_prints_half_a_character(text: str) -> None:
    decoder = StreamDecoder(BUNDLED_VOCABULARY)
    pieces = [decoder.feed(t) for t in BUNDLED_VOCABULARY.encode(text, add_special=False)]
    assert "".join(pieces) + decoder.finish() == text
    assert all("\ufffd" not in p or "\ufffd" in text for p in pieces)


def test_special_tokens_are_added_parsed_and_left_alone() -> None:
    v = BUNDLED_VOCABULARY
    end = v.ids["<|endoftext|>"]
    assert v.encode("Hi")[0] == v.bos == end
    assert v.encode("a<|endoftext|>b", add_special=False).count(end) == 1
    assert end not in v.encode("a<|endoftext|>b", add_special=False, parse_special=False)
    assert v.decode([end]) == "" and v.decode([end], special=True) == "<|endoftext|>"
    assert end in v.end_ids
