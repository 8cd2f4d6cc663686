"""Tokenizers against llama.cpp's own cases, and the streaming decoder."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggmq.gguf import GGUF
from ggmq.tokenizer import StreamDecoder, Vocabulary
from tests.support.fixtures import BUNDLED, SHARED, VOCABULARIES
from tests.support.gguf_factory import ARRAY, STRING, file, key
from tests.support.gguf_factory import text as written

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


def _with_tokens(path: Path, model: str, tokens: list[bytes], types: list[int], merges: list[str]) -> Vocabulary:
    keys = [key("tokenizer.ggml.model", STRING, written(model)),
            key("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, len(tokens)) + b"".join(map(written, tokens))),
            key("tokenizer.ggml.merges", ARRAY, struct.pack("<IQ", STRING, len(merges)) + b"".join(map(written, merges))),
            key("tokenizer.ggml.token_type", ARRAY, struct.pack(f"<IQ{len(types)}i", 5, len(types), *types))]  # fmt: skip
    path.write_bytes(file(keys, [], bytes(64)))
    return Vocabulary(GGUF(path))


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_tokens_that_are_no_utf8_are_bytes_as_they_are(tmp_path: Path, model: str) -> None:
    tokens = [b"<unk>", b"a", b"b", b"ab", b"\xff\xfe", b"\xe2\x82", b"<\xff>", b"\xe2\x96\x81"]
    types = [2, 1, 1, 1, 1, 1, 3, 1]
    v = _with_tokens(tmp_path / "m.gguf", model, tokens, types, ["a b"])
    v.add_bos, v.add_space_prefix = False, False
    assert v.encode("ab") == [3] and v.encode("a\udcffb")[0] == 1
    assert v.piece(4) == b"\xff\xfe" and v.piece(6, special=True) == b"<\xff>"
    assert v.decode([1, 5, 2]) == "a\ufffdb"
    assert v.encode("<\udcff>") == [6]  # as a chat template would have it


@pytest.mark.parametrize("name", ["bundled", *VOCABULARIES])
def test_what_is_no_utf8_is_read_as_the_replacement_character(name: str) -> None:
    v = BUNDLED_VOCABULARY if name == "bundled" else vocabulary(name)
    assert v.encode("caf\udce9 \ud800x") == v.encode("caf\ufffd \ufffdx")


def test_qwen2_ends_at_a_token_that_the_file_calls_normal(shared: Path) -> None:
    v = vocabulary("ggml-vocab-qwen2.gguf")
    assert v.end_ids == {151643, 151645, 128247} and v.encode("</s>") == [128247]
    assert v.encode("</s>", parse_special=False) != [128247] and v.piece(128247) == b""
