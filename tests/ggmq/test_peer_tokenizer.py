"""The comparison with libllama itself, where it is installed: it agrees, and it finds what is wrong."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

import pytest

from ggmq.pretokenizers import PRE_TOKENIZERS
from tests.peer import tokenizer
from tests.peer.libllama import Peer, PeerCrashed, PeerRefused
from tests.support.fixtures import BUNDLED

pytestmark = [pytest.mark.peer, pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")]


def compare(only: str, n: int = 400) -> int:
    parser = argparse.ArgumentParser()
    tokenizer.add_arguments(parser)
    return tokenizer.run(argparse.Namespace(**vars(parser.parse_args(["--only", only])), n=n, seed=5))


@pytest.mark.parametrize("name", ["stories", "spm-phi-3", "spm-odd", "bpe-default", "bpe-harmony", "bpe-incomplete"])
def test_random_texts_agree(name: str) -> None:
    assert compare(f"^{name}$") == 0


def test_what_differs_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(PRE_TOKENIZERS, "exaone", PRE_TOKENIZERS["gpt-2"])
    assert compare("^bpe-exaone$") == 1
    out = capsys.readouterr().out
    assert " differ" in out and "\n    here  [" in out and "\n    there [" in out


def test_libllama_may_end_and_is_started_again() -> None:
    with Peer() as peer:
        with pytest.raises(PeerCrashed, match="exit status"):
            peer.tokenize([b"nothing is open"])
        with pytest.raises(PeerRefused, match="failed to load model"):
            peer.open(__file__)
        peer.open(BUNDLED, vocab_only=False)
        (ids,) = peer.tokenize([b"Once upon a time"])
        assert peer.logits(ids)[-1].argmax() == peer.greedy(ids, 1)[0]
