"""Special tokens, pre-tokenizers and odd vocabularies, as libllama read the same files (recorded)."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ggmq.gguf import GGUF
from ggmq.pretokenizers import PRE_TOKENIZERS, byte_alphabet
from ggmq.special import BYTE, CONTROL, NORMAL, UNDEFINED, UNKNOWN, UNUSED, USER_DEFINED, Splitter
from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError
from tests.support.fixtures import BUNDLED, ROOT
from tests.support.gguf_factory import ARRAY, key
from tests.support.vocabularies import write

ALPHABET = list(byte_alphabet())
BYTES = [f"<0x{b:02X}>" for b in range(256)]
HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]


def bpe(path: Path, merges: list[str], special: list[str] | None = None, kind: int = CONTROL, **keys: object) -> Vocabulary:
    """A byte-level vocabulary: the stand-ins of all bytes, what the merges make, special tokens."""
    plain = list(dict.fromkeys([*ALPHABET, *(m.replace(" ", "") for m in merges)]))
    tokens = [*plain, *(special or ())]
    types = [NORMAL] * len(plain) + [kind] * (len(tokens) - len(plain))
    merges = merges or ["\u00fe \u00fe"]
    return Vocabulary(GGUF(write(path / "m.gguf", "gpt2", tokens, types=types, merges=merges, **keys)))  # type: ignore[arg-type]


def spm(path: Path, pieces: dict[str, int], **keys: object) -> Vocabulary:
    """`<unk>`, `<s>`, `</s>`, the bytes, and pieces of a type each; the sooner a piece comes, the better its score."""
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, **dict.fromkeys(BYTES, BYTE), **pieces}
    keys = {"types": list(kinds.values()), "scores": [-float(i) for i in range(len(kinds))], **keys}
    return Vocabulary(GGUF(write(path / "m.gguf", "llama", list(kinds), **keys)))  # type: ignore[arg-type]


def words(v: Vocabulary, text: str) -> list[str]:
    return [v.tokens[i] for i in v.encode(text, add_special=False)]


# -- special tokens ----------------------------------------------------------------------------------------------------


def test_a_channel_does_not_end_an_answer_and_is_shown(tmp_path: Path) -> None:
    v = bpe(tmp_path, [], HARMONY, pre="gpt-4o", eos_token_id=256 + 5)
    start, end, message, channel, constrain, over, call = range(256, 263)
    assert v.end_ids == {over, call}
    assert v.decode([start, channel, message, constrain, end]) == "<|start|><|channel|><|message|><|constrain|><|end|>"
    assert v.decode([over, call]) == "" and v.piece(over, special=True) == b"<|return|>"
    text = "<|start|>a<|end|><|return|>"  # those that are shown are always parsed, the others when asked
    assert v.encode(text, add_special=False) == [start, 64, end, over]
    plain = v.encode(text, add_special=False, parse_special=False)
    assert plain[:3] == [start, 64, end] and over not in plain and len(plain) == 3 + len("<|return|>")


def test_without_its_companions_the_end_of_a_channel_ends_an_answer(tmp_path: Path) -> None:
    v = bpe(tmp_path, [], ["<|end|>", "<|return|>"], pre="qwen2")
    assert {256, 257} <= v.end_ids and v.piece(256) == b""


@pytest.mark.parametrize(("name", "stripped"), [("Phi-3 mini 4k", True), ("my PHI3", True), ("Phi 4", False)])
def test_special_tokens_of_phi_3_take_the_blanks_to_their_right(tmp_path: Path, name: str, stripped: bool) -> None:
    pieces = {"\u2581": NORMAL, "H": NORMAL, "i": NORMAL, "Hi": NORMAL, "\u2581Hi": NORMAL}
    special = dict.fromkeys(("<|user|>", "<|end|>", "<|assistant|>", "<|endoftext|>"), CONTROL)
    v = spm(tmp_path, pieces | special, name=name)
    user, end, assistant, over = (v.ids[t] for t in special)
    newline = [v.ids["\u2581"], v.ids["<0x0A>"]]
    assert v.encode("<|user|>\nHi<|end|>\n<|assistant|>\n", add_special=False) == (
        [user, v.ids["\u2581Hi"], end, assistant] if stripped
        else [user, *newline, v.ids["Hi"], end, *newline, assistant, *newline])  # fmt: skip
    assert v.encode("</s> \t\r\v\f<|endoftext|>\n", add_special=False)[-3:] == [over, *newline]
    assert v.encode("</s>\u00a0", add_special=False)[1:] == [v.ids["\u2581"], v.ids["<0xC2>"], v.ids["<0xA0>"]]


FOUND = ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|eom_id|>", "[EOT]", "_<EOT>", "[EOS]", "<turn|>", "</s>",
         "<eos>", "[e~[", "<|flush|>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]  # fmt: skip


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED, UNUSED])
@pytest.mark.parametrize("text", FOUND)
def test_end_tokens_are_found_by_their_texts(tmp_path: Path, text: str, kind: int) -> None:
    v = bpe(tmp_path, [], ["<pad>", text], kind, pre="qwen2")
    assert v.end_ids == {257, 11} and v.types[257] == CONTROL  # 11: what BPE without an EOS has
    assert v.piece(257) == b"" and v.piece(257, special=True) == text.encode()
    assert v.encode(text, add_special=False) == [257]
    assert 257 not in v.encode(text, add_special=False, parse_special=False)


def test_tokens_that_the_file_names_are_not_looked_for(tmp_path: Path) -> None:
    special = ["<|fim_pad|>", "<|fim_prefix|>", "<PRE>", "pad", "pre"]
    v = bpe(tmp_path, [], special, NORMAL, pre="qwen2", fim_pad_token_id=259, prefix_token_id=260)
    assert v.end_ids == {259, 11}
    assert list(v.types[256:]) == [NORMAL] * 5
    v = bpe(tmp_path, [], special, NORMAL, pre="qwen2")
    assert v.end_ids == {256, 11} and list(v.types[256:]) == [CONTROL, CONTROL, NORMAL, NORMAL, NORMAL]


def test_a_plain_end_of_sequence_beside_tool_responses(tmp_path: Path) -> None:
    v = bpe(tmp_path, [], ["<|tool_response>", "</s>"], pre="qwen2")
    assert v.end_ids == {256, 11} and v.types[257] == NORMAL


def test_unknown_tokens_are_parsed(tmp_path: Path) -> None:
    v = spm(tmp_path, {"\u2581": NORMAL, "a": NORMAL})
    assert v.encode("<unk>a", add_special=False) == [0, v.ids["\u2581"], v.ids["a"]]
    assert 0 not in v.encode("<unk>a", add_special=False, parse_special=False)
    assert v.piece(0) == b"" and v.piece(0, special=True) == b"<unk>"


def test_the_longest_special_token_comes_first_over_the_whole_text(tmp_path: Path) -> None:
    special = ["<a>", "<a><b>", "b><c><d>", "<d>", "<c>"]
    v = bpe(tmp_path, [], special, pre="qwen2")
    short, long, longest, _, c = range(256, 261)
    assert v.encode("<a><b><c><d>", add_special=False) == [short, 27, longest]
    assert v.encode("<a><b><c><b>", add_special=False) == [long, c, 27, 65, 29]
    assert v.encode("<a><b", add_special=False) == [short, 27, 65]


def test_splitting_is_as_if_each_token_were_looked_for_in_turn() -> None:
    rng = random.Random(1)
    for _ in range(300):
        texts = {"".join(rng.choices("ab<", k=rng.randint(1, 5))) for _ in range(6)}
        tokens = [(t, i) for i, t in enumerate(sorted(texts, key=len, reverse=True))]
        text = "".join(rng.choices("ab< \n", k=rng.randint(0, 30)))
        stripped = frozenset(rng.sample(range(len(tokens)), 2)) if len(tokens) > 1 else frozenset()
        pieces: list[str | int] = [text] if text else []
        for t, i in tokens:
            at = 0
            while at < len(pieces):
                piece = pieces[at]
                if isinstance(piece, str) and t in piece:
                    left, _, right = piece.partition(t)
                    right = right.lstrip(" \t\n\v\f\r") if i in stripped else right
                    pieces[at : at + 1] = [p for p in (left, i, right) if p != ""]
                    at += left != ""
                at += 1
        assert list(Splitter(tokens, stripped).split(text)) == pieces


# -- pre-tokenizers ----------------------------------------------------------------------------------------------------

MERGES = ["i t", "' s", "it 's", "1 2", "3 4", "12 34", "12 3", "- -", "\u0120 o", "o k", "\u0120o k", "\u0120 1",
          "\u0120 12", "\u0120 -", "\u0120- -", "k .", ". .", "! !", "!! \u010a", "\u0120 \u0120"]  # fmt: skip


@pytest.mark.parametrize(("pre", "text", "expected"), [
    ("default", "it's 1234 -- ok", "it|'|s|\u0120|123|4|\u0120|--|\u0120ok"),
    (None, "it's 1234 -- ok", "it|'|s|\u0120|123|4|\u0120|--|\u0120ok"),
    ("", "it's 1234 -- ok", "it|'|s|\u0120|123|4|\u0120|--|\u0120ok"),
    ("default", "ok.. $12", "ok|..|\u0120|$|12"),
    ("exaone", "it's 1234", "it|'s|\u0120|1|2|3|4"),
    ("smollm", "it's 1234", "it|'s|\u0120|1|2|3|4"),
    ("gpt-2", "it's 1234", "it|'s|\u0120|1234"),
    ("pixtral", "it's 1234!!\n  ok", "it|'s|\u0120|123|4|!!\u010a|\u0120|\u0120ok"),
    ("llama-bpe", "it's 1234!!\n  ok", "it|'s|\u0120|123|4|!!\u010a|\u0120|\u0120ok"),
])  # fmt: skip
def test_words(tmp_path: Path, pre: str | None, text: str, expected: str) -> None:
    v = bpe(tmp_path, MERGES, pre=pre)
    assert words(v, text) == expected.split("|")


def test_pixtral_is_as_llama_3(tmp_path: Path) -> None:
    assert PRE_TOKENIZERS["pixtral"] == PRE_TOKENIZERS["llama-bpe"]
    assert bpe(tmp_path, ["a b"], ["abc"], NORMAL, pre="pixtral").encode("abc") == [11, 257]  # BOS; whole words first


CYRILLIC = {"\u043f": "\u00d0\u00bf", "\u0412": "\u00d0\u0134", "\u0440": "\u00d1\u0122", "\u041f": "\u00d0\u0141"}


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "llama4"])
def test_letters_of_all_scripts_have_case(tmp_path: Path, pre: str) -> None:
    """The models' own expressions; llama.cpp's, where only A to Z have case, leave `\u0440\u0412` whole."""
    small, capital = CYRILLIC["\u0440"], CYRILLIC["\u0412"]
    v = bpe(tmp_path, [" ".join(small), " ".join(capital), f"{small} {capital}", f"{capital} {small}"], pre=pre)
    assert words(v, "\u0440\u0412")[-2:] == [small, capital]
    assert words(v, "\u0412\u0440")[-1:] == [capital + small]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_is_lossless(tmp_path: Path, pre: str) -> None:
    v = bpe(tmp_path, MERGES, pre=pre)
    text = "It's  12345 \u0440\u0412\u00e9\u0301 \u4e00\u4e8c\u3002\n\n\t \u00a0x\U00010d40\u0897 <|a|>!\r\n "
    assert v.decode(v.encode(text, add_special=False)) == text


def test_categories_are_those_of_unicode_16(tmp_path: Path) -> None:
    """U+10D40 is a digit since 16.0 and unassigned in llama.cpp's table, which is of 15.1."""
    digit = "".join(chr_ for b in "\U00010d40".encode() for chr_, value in byte_alphabet().items() if value == b)
    merges = [f"{digit[0]} {digit[1]}", f"{digit[:2]} {digit[2]}", f"{digit[:3]} {digit[3]}", f"{digit} {digit}"]
    assert words(bpe(tmp_path, merges, pre="smollm"), "\U00010d40\U00010d40") == [digit, digit]


# -- vocabularies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [True, False])
def test_bytes_are_found_by_their_texts(tmp_path: Path, typed: bool) -> None:
    kinds = {} if typed else {"types": None, "scores": None}
    v = spm(tmp_path, {"\u2581": NORMAL}, **kinds)
    assert v.encode("\u00e9", add_special=False) == [v.ids["\u2581"], 3 + 0xC3, 3 + 0xA9]
    assert v.piece(3 + 0xC3) == (b"\xc3" if typed else b"<0xC3>")


def test_a_byte_without_a_number_is_found_as_itself(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(t for t in BYTES if t != "<0x7E>"), "~~~", "~"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 255, NORMAL, NORMAL]
    v = Vocabulary(GGUF(write(tmp_path / "m.gguf", "llama", tokens, types=types, add_space_prefix=False)))
    assert v.encode("~", add_special=False) == [v.ids["~"]]


@pytest.mark.parametrize("kind", [UNUSED, UNDEFINED, 9])
def test_unused_and_undefined_tokens_print_nothing(tmp_path: Path, kind: int) -> None:
    for v in (spm(tmp_path, {"x": kind}, add_space_prefix=False), bpe(tmp_path, [], ["x<"], kind, pre="qwen2")):
        i = len(v.tokens) - 1
        assert v.piece(i) == v.piece(i, special=True) == b""
    assert spm(tmp_path, {"x": kind}, add_space_prefix=False).encode("x", add_special=False) == [259]


@pytest.mark.parametrize(("n", "expected"), [(12, 11), (11, None)])
def test_bpe_without_bos_and_eos(tmp_path: Path, n: int, expected: int | None) -> None:
    v = Vocabulary(GGUF(write(tmp_path / "m.gguf", "gpt2", ALPHABET[:n], merges=["! !"], add_bos_token=True, pre="qwen2")))
    assert (v.bos, v.eos) == (expected, expected)
    assert v.end_ids == ({11} if expected else frozenset())
    assert v.encode("") == ([11] if expected else [])


def test_of_equal_merges_the_first_counts(tmp_path: Path) -> None:
    v = bpe(tmp_path, ["a b", "b c", "a b"], pre="qwen2")
    assert words(v, "abc") == ["ab", "c"]


def test_merges_of_and_into_what_is_no_token(tmp_path: Path) -> None:
    tokens = [t for t in ALPHABET if t not in "xz"] + ["abc"]
    merges = ["a b", "ab c", "d e", "de x", "y z"]
    v = Vocabulary(GGUF(write(tmp_path / "m.gguf", "gpt2", tokens, merges=merges, pre="gpt-2")))
    ids = v.ids
    assert v.encode("abc") == [ids["abc"]] and v.encode("ab") == [ids["a"], ids["b"]]
    assert v.encode("dexyz") == [ids["d"], ids["e"], ids["y"]]
    assert v.encode("axbc") == [ids["a"], ids["b"], ids["c"]]


def test_a_word_that_is_no_token_is_merged_even_where_words_come_first(tmp_path: Path) -> None:
    tokens = [*ALPHABET, "ab", "dab", "bc"]
    v = Vocabulary(GGUF(write(tmp_path / "m.gguf", "gpt2", tokens, merges=["b c", "a b", "ab c"], pre="llama-bpe")))
    assert v.encode("abc", add_special=False) == [v.ids["a"], v.ids["bc"]]  # `abc` is what a merge makes, and no token
    assert v.encode("dab", add_special=False) == [v.ids["dab"]]


@pytest.mark.parametrize("whole", [True, False])
def test_longer_arrays_and_whole_scores(tmp_path: Path, whole: bool) -> None:
    number: Callable[[int], float] = int if whole else float
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", "a", "b", "ab", "bb"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5]
    scores = [number(0)] * 262 + [number(-2), number(-1)]
    path = write(tmp_path / "m.gguf", "llama", pieces, types=types + [CONTROL] * 3, scores=scores + [number(7)] * 2)
    v = Vocabulary(GGUF(path))
    assert words(v, "abb") == ["\u2581", "a", "bb"] and len(v.types) == len(pieces)


@pytest.mark.parametrize("key", ["types", "scores"])
def test_shorter_arrays_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(FormatError, match="expected 260 entries, got 7"):
        spm(tmp_path, {"a": NORMAL}, **{key: [1] * 7 if key == "types" else [0.0] * 7})


def test_suppressed_tokens(tmp_path: Path) -> None:
    assert bpe(tmp_path, [], pre="qwen2", suppress_tokens=[3, -1, 256, 5]).suppressed == {3, 5}
    assert bpe(tmp_path, [], pre="qwen2").suppressed == frozenset()


def test_an_empty_token_has_a_name(tmp_path: Path) -> None:
    v = spm(tmp_path, {"": CONTROL, "\u2581": NORMAL})
    assert v.encode("[EMPTY_259]", add_special=False) == [259] and v.piece(259, special=True) == b"[EMPTY_259]"


# -- the command line --------------------------------------------------------------------------------------------------


def ggmq(*args: str | Path, stdin: bytes = b"") -> str:
    done = subprocess.run([sys.executable, "-m", "ggmq", *map(str, args)], input=stdin, capture_output=True, cwd=ROOT,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.parametrize(("raw", "text"), [
    (b"a\xffb", "a\ufffdb"), (b"a\xe2\x82b", "a\ufffd\ufffdb"), (b"\xf0\x9f", "\ufffd" * 2)])  # fmt: skip
def test_each_byte_that_is_no_utf8_is_a_replacement_character(raw: bytes, text: str) -> None:
    assert ggmq("tokenize", "--ids", stdin=raw) == ggmq("tokenize", "--ids", stdin=text.encode())
    v = Vocabulary(GGUF(BUNDLED))
    assert v.encode(raw.decode("utf-8", "surrogateescape")) == v.encode(text)


def test_a_suppressed_token_is_never_taken(tmp_path: Path) -> None:
    run = ("run", "-p", "Once upon a time", "-n", "1", "--temp", "0", "--no-display-prompt")
    first = ggmq(*run).rstrip("\n")
    (token,) = Vocabulary(GGUF(BUNDLED)).encode(first, add_special=False)
    added = key("tokenizer.ggml.suppress_tokens", ARRAY, struct.pack("<IQi", 5, 1, token))
    added += key("pad", ARRAY, struct.pack("<IQ", 0, -(len(added) + 27) % 32) + bytes(-(len(added) + 27) % 32))
    whole = BUNDLED.read_bytes()
    n_keys = struct.unpack_from("<Q", whole, 16)[0]
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[:16] + struct.pack("<Q", n_keys + 2) + added + whole[24:])
    assert ggmq(*run, "-m", path).rstrip("\n") != first
