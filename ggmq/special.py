"""Special tokens: which are found by their texts, which end an answer, and how they are split out of a text.

Source: llama.cpp's llama-vocab.cpp: the lists of texts, and the order in which it looks for tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)
"""Token types, as `tokenizer.ggml.token_type` has them."""

_WHITESPACE = " \t\n\v\f\r"

ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eot": (("eot_token_id",), (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
        "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>")),
    "eom": (("eom_token_id",), ("<|eom_id|>",)),
    "fim_pre": (("prefix_token_id", "fim_pre_token_id"), (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>")),
    "fim_suf": (("suffix_token_id", "fim_suf_token_id"), (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
        "<|suffix|>")),
    "fim_mid": (("middle_token_id", "fim_mid_token_id"), (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>")),
    "fim_pad": (("fim_pad_token_id",), ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    "fim_rep": (("fim_rep_token_id",), ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    "fim_sep": (("fim_sep_token_id",), ("<|file_sep|>",)),
}  # fmt: skip
"""What a token may be for: the keys that name it, the one that counts first, and the texts it is found by without them."""

END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def find_special(
    ids: Mapping[str, int], types: npt.NDArray[np.int64], named: Mapping[str, int], eos: int | None
) -> tuple[npt.NDArray[np.int64], frozenset[int]]:
    """The types that hold, and the tokens that end an answer. `named`: the roles that the file names itself.

    A token that is found by its text is a control token whatever type the file gives it, but for those of a conversation
    of several channels, which are shown: there `<|end|>` ends a channel and not the answer.
    """
    types = types.copy()
    roles = dict(named)
    for role, (_, texts) in ROLES.items():
        found = sorted(ids[t] for t in texts if t in ids)
        if role not in roles and found:
            roles[role] = found[0]
            types[found[0]] = CONTROL
    by_text = {t: ids[t] for t in END_TEXTS if t in ids}
    types[list(by_text.values())] = CONTROL
    types[[ids[t] for t in _SHOWN if t in ids]] = USER_DEFINED
    ends = set(by_text.values()) | {roles[r] for r in ("fim_pad", "fim_rep", "fim_sep", "eot", "eom") if r in roles}
    if eos is not None:
        ends.add(eos)

    def ending(*texts: str) -> bool:
        return any(ids.get(t) in ends for t in texts)

    channels = ending("<|call|>", "<|calls|>") and ending("<|return|>", "<|flush|>")
    if channels and ending("<|end|>"):
        ends.remove(ids["<|end|>"])
        types[ids["<|end|>"]] = USER_DEFINED
    if ending("<|tool_response>", "<|plamo:eos|>") and ending("</s>"):
        ends.remove(ids["</s>"])
        types[ids["</s>"]] = NORMAL
    return types, frozenset(ends)


class Splitter:
    """Splits special tokens out of a text: the longest first, over the whole text, then the next in what is left.

    `tokens`: texts and ids. `stripped`: ids of those that take the whitespace to their right with them.
    """

    def __init__(self, tokens: Sequence[tuple[str, int]], stripped: frozenset[int] = frozenset()) -> None:
        ordered = sorted(tokens, key=lambda t: len(t[0].encode("utf-8", "surrogateescape")), reverse=True)
        self._ids = [i for _, i in ordered]
        self._rank = {text: rank for rank, (text, _) in enumerate(ordered)}
        self._stripped = stripped
        sizes: dict[str, set[int]] = {}
        follow: dict[str, set[str]] = {}
        for text, _ in ordered:
            sizes.setdefault(text[0], set()).add(len(text))
            follow.setdefault(text[0], set()).add(text[1:3])
        self._sizes = {first: sorted(s) for first, s in sizes.items()}
        # where a token may begin: its first character, with what comes next looked at and not passed over
        begins = (re.escape(first) + f"(?={'|'.join(map(re.escape, sorted(f)))})" for first, f in follow.items())
        self._begins = re.compile("|".join(begins)) if sizes else None

    def split(self, text: str) -> Iterator[str | int]:
        """The text's pieces in order: a token's id, or text between tokens, never empty."""
        if self._begins is None:
            if text:
                yield text
            return
        found: list[tuple[int, int, int]] = []
        for match in self._begins.finditer(text):
            start = match.start()
            for size in self._sizes[match[0]]:
                end = start + size
                rank = self._rank.get(text[start:end])
                if rank is not None and end <= len(text):
                    found.append((rank, start, end))
        found.sort()
        taken = bytearray(len(text))
        kept: list[tuple[int, int, int]] = []
        for rank, start, end in found:
            if taken.find(1, start, end) >= 0:
                continue
            if self._ids[rank] in self._stripped:
                while end < len(text) and text[end] in _WHITESPACE and not taken[end]:
                    end += 1
            taken[start:end] = b"\1" * (end - start)
            kept.append((start, end, self._ids[rank]))
        at = 0
        for start, end, token in sorted(kept):
            if start > at:
                yield text[at:start]
            yield token
            at = end
        if at < len(text):
            yield text[at:]
