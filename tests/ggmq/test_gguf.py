"""GGUF files: every named threat is a FormatError that says where; no input is anything else."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggmq.archs import open_arch
from ggmq.archs.hparams import read_hparams
from ggmq.gguf import GGUF
from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError
from tests.support.fixtures import BUNDLED, VOCABULARIES
from tests.support.gguf_factory import (
    ARRAY,
    BOOL,
    F32,
    KEYS,
    STRING,
    TENSORS,
    U32,
    VALID,
    file,
    key,
    tensor,
    text,
    tiny_model,
)


def opened(raw: bytes, folder: Path) -> GGUF:
    path = folder / "x.gguf"
    path.write_bytes(raw)
    return GGUF(path)


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    g = opened(VALID, tmp_path)
    assert g.text("general.architecture") == "llama" and g.integer("a.u32") == 7
    assert g.texts("a.list") == ["x", "yz"]
    assert g.tensors["w"].ne == (32, 2, 1, 1) and len(g.data("v")) == 16


def test_version_2_is_read_and_others_are_not(tmp_path: Path) -> None:
    assert opened(file(KEYS, TENSORS, bytes(272), version=2), tmp_path).version == 2
    for version in (0, 1, 4, 3 << 24):
        with pytest.raises(FormatError, match="version"):
            opened(file(KEYS, TENSORS, bytes(272), version=version), tmp_path)


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


THREATS = {
    "wrong magic": file(KEYS, TENSORS, bytes(272), magic=b"GGML"),
    "empty file": b"",
    "tensor count beyond the file": file(KEYS, TENSORS, bytes(272), n_tensors=1 << 62),
    "key count beyond the file": file(KEYS, TENSORS, bytes(272), n_keys=1 << 62),
    "string length beyond the file": file([text("k") + u32(STRING) + struct.pack("<Q", 1 << 62)], []),
    "key length beyond the file": file([struct.pack("<Q", 1 << 62)], []),
    "array length beyond the file": file([key("k", ARRAY, struct.pack("<IQ", U32, 1 << 62))], []),
    "array of strings beyond the file": file([key("k", ARRAY, struct.pack("<IQ", STRING, 1 << 60))], []),
    "nested array": file([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U32, 1) + u32(1))], []),
    "array element of no type": file([key("k", ARRAY, struct.pack("<IQ", 77, 1))], [], bytes(64)),
    "value of no type": file([key("k", 77, b"")], [], bytes(64)),
    "bool of 2": file([key("k", BOOL, b"\2")], [], bytes(64)),
    "duplicate key": file([KEYS[0], KEYS[0]], []),
    "empty key": file([key("", U32, u32(1))], [], bytes(64)),
    "key that is no UTF-8": file([key("", U32, u32(1)).replace(bytes(8), struct.pack("<Q", 2) + b"\xff\xfe", 1)], []),
    "duplicate tensor": file(KEYS, [TENSORS[0], TENSORS[0]], bytes(512)),
    "5 dimensions": file(KEYS, [tensor("w", [1] * 5)], bytes(512)),
    "0 dimensions": file(KEYS, [tensor("w", [])], bytes(512)),
    "ne of 0": file(KEYS, [tensor("w", [32, 0])], bytes(512)),
    "product of ne that wraps": file(KEYS, [tensor("w", [1 << 32, 1 << 32, 4])], bytes(512)),
    "ne of 2^63": file(KEYS, [tensor("w", [1 << 63])], bytes(512)),
    "type out of range": file(KEYS, [tensor("w", [32], 99)], bytes(512)),
    "type retired": file(KEYS, [tensor("w", [32], 4)], bytes(512)),
    "row that is no whole block": file(KEYS, [tensor("w", [33], 2)], bytes(512)),
    "data beyond the file": file(KEYS, [tensor("w", [32, 2], 0, 32)], bytes(256)),
    "offset that wraps": file(KEYS, [tensor("w", [32, 2], 0, (1 << 64) - 32)], bytes(256)),
    "misaligned offset": file(KEYS, [tensor("w", [4], 0, 8)], bytes(256)),
    "alignment 0": file([key("general.alignment", U32, u32(0))], [], bytes(64)),
    "alignment 48": file([key("general.alignment", U32, u32(48))], [], bytes(64)),
    "alignment 2 MiB": file([key("general.alignment", U32, u32(1 << 21))], [], bytes(64)),
    "alignment as a float": file([key("general.alignment", F32, struct.pack("<f", 32))], [], bytes(64)),
}


@pytest.mark.parametrize("threat", THREATS)
def test_threats_are_refused_with_the_place(tmp_path: Path, threat: str) -> None:
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(FormatError, match=r"x\.gguf: byte"):
            opened(THREATS[threat], tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    # far above the promised 50 ms, so that only work in proportion to a lying count can fail it
    assert time.perf_counter() - start < 5


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    for n in range(len(VALID)):
        with pytest.raises(FormatError):
            opened(VALID[:n], tmp_path)


@given(st.integers(0, len(VALID) - 273), st.integers(1, 255))
@settings(max_examples=300)
def test_one_byte_changed_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, at: int, bits: int) -> None:
    raw = bytearray(VALID)
    raw[at] ^= bits
    folder = tmp_path_factory.mktemp("mutated")
    try:
        g = opened(bytes(raw), folder)
        for t in g:
            assert len(g.data(t.name)) == t.n_bytes
    except FormatError:
        pass


@pytest.mark.parametrize(("name", "value", "match"), [
    ("block_count", 0, "block_count"), ("block_count", 1 << 31, "block_count"),
    ("attention.head_count", 0, "head_count"), ("attention.head_count_kv", 0, "head_count"),
    ("attention.head_count_kv", 3, "divisor"), ("embedding_length", 63, "token_embd"),
    ("context_length", 0, "context_length"), ("rope.dimension_count", 1000, "dimension_count"),
])  # fmt: skip
def test_absurd_hyperparameters_are_refused(tmp_path: Path, name: str, value: int, match: str) -> None:
    path = tiny_model(tmp_path / "m.gguf", "llama")
    raw = path.read_bytes()
    needle = text(f"llama.{name}")
    if needle in raw:
        at = raw.index(needle) + len(needle) + 4
        raw = raw[:at] + u32(value & 0xFFFFFFFF) + raw[at + 4 :]
        path.write_bytes(raw)
    else:
        path = tiny_model(tmp_path / "n.gguf", "llama", **{name.replace(".", "__"): value})
    with pytest.raises(FormatError, match=match):
        read_hparams(GGUF(path))


def test_a_key_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    g = opened(file([key("a", ARRAY, struct.pack("<IQ", 0, 4) + bytes(4))], [], bytes(64)), tmp_path)
    for read in (g.number, g.integer, g.text, g.boolean, g.texts):
        with pytest.raises(FormatError, match="key a: expected"):
            read("a")
    with pytest.raises(FormatError, match="array of floats"):
        g.numbers("a", floats=True)
    with pytest.raises(FormatError, match="missing"):
        g.integer("nothing")


def test_an_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"'mamba' is unknown; expected one of gemma2, .*qwen3"):
        open_arch(GGUF(tiny_model(tmp_path / "m.gguf", "mamba")))


def test_a_vocabulary_alone_is_no_model(shared: Path) -> None:
    with pytest.raises(FormatError, match="no model"):
        open_arch(GGUF(shared / "vocab" / "ggml-vocab-llama-bpe.gguf"))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_large_vocabularies_are_read(shared: Path, name: str) -> None:
    assert len(GGUF(shared / "vocab" / name).texts("tokenizer.ggml.tokens")) > 30_000


def _split(folder: Path) -> list[Path]:
    """Two parts with a tensor each."""
    out = []
    for i in range(2):
        keys = [key("split.no", 2, struct.pack("<H", i)), key("split.count", 2, struct.pack("<H", 2)),
                key("split.tensors.count", 5, struct.pack("<i", 2))]  # fmt: skip
        out.append(folder / f"m-0000{i + 1}-of-00002.gguf")
        out[-1].write_bytes(file([*KEYS, *keys] if i == 0 else keys, [tensor(f"t{i}", [4])], bytes([i] * 16)))
    return out


def test_split_files_open_by_any_part(tmp_path: Path) -> None:
    for path in _split(tmp_path):
        g = GGUF(path)
        assert bytes(g.data("t0")) == bytes(16) and bytes(g.data("t1")) == b"\1" * 16
        assert g.integer("a.u32") == 7


def test_a_name_of_a_part_makes_no_part(tmp_path: Path) -> None:
    """A file is split if it says so, whatever its name; llama.cpp goes by split.count too."""
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(VALID)
        assert GGUF(tmp_path / name).paths == [tmp_path / name]
        (tmp_path / name).unlink()


def test_parts_must_be_those_that_their_names_say(tmp_path: Path) -> None:
    first, second = _split(tmp_path)
    lone = tmp_path / "model.gguf"
    lone.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match=r"a name such as NAME-00001-of-00002\.gguf, got 2 parts"):
        GGUF(lone)
    second.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match=r"m-00002-of-00002\.gguf: expected part 1 of 2 by its name, got split\.no 0"):
        GGUF(first)


@pytest.mark.parametrize(("broken", "words"), [
    (key("a.bool", BOOL, b"\2"), "a bool of 0 or 1"), (key("a.bool", BOOL, b"\xff"), "a bool of 0 or 1"),
    (text(b"a.\xff") + struct.pack("<IB", BOOL, 1), "a key in UTF-8"),
    (text("a" * 65_536) + struct.pack("<IB", BOOL, 1), "a key of at most 65535 bytes"),
])  # fmt: skip
def test_stricter_than_llama_cpp_and_docs_say_so(tmp_path: Path, broken: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        opened(file([*KEYS, broken], TENSORS, bytes(256 + 16)), tmp_path)
    assert opened(file([*KEYS, key("a" * 65_535, BOOL, b"\1")], TENSORS, bytes(256 + 16)), tmp_path).boolean("a" * 65_535)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first, second = _split(tmp_path)
    second.unlink()
    with pytest.raises(FormatError, match=r"00002-of-00002\.gguf: part of a split file is missing"):
        GGUF(first)


@pytest.mark.parametrize(("tokens", "types", "extra", "match"), [
    (["a", "<0x-1>"], [1, 6], [], "byte token"), (["a", "<0x1FF>"], [1, 6], [], "byte token"),
    (["a", "b"], [1], [], "token_type"), ([], [], [], "empty"),
    (["a", "b"], [1, 1], [key("tokenizer.ggml.bos_token_id", U32, u32(2))], "bos_token_id"),
    (["a", "b"], [1, 1], [key("tokenizer.ggml.eos_token_id", U32, u32(1 << 31))], "eos_token_id"),
])  # fmt: skip
def test_broken_vocabularies_are_refused(
    tmp_path: Path, tokens: list[str], types: list[int], extra: list[bytes], match: str
) -> None:
    keys = [key("tokenizer.ggml.model", STRING, text("llama")),
            key("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, len(tokens)) + b"".join(map(text, tokens))),
            key("tokenizer.ggml.token_type", ARRAY, struct.pack(f"<IQ{len(types)}i", 5, len(types), *types)),
            *extra]  # fmt: skip
    with pytest.raises(FormatError, match=match):
        Vocabulary(opened(file(keys, [], bytes(64)), tmp_path))


def test_the_bundled_model_is_what_it_should_be() -> None:
    g = GGUF(BUNDLED)
    parameters = sum(t.ne[0] * t.ne[1] for t in g)
    assert 1_000_000 <= parameters <= 3_000_000 and BUNDLED.stat().st_size <= 4_000_000
    assert g.text("general.architecture") == "llama"
