"""Choosing a file of a repository, and telling when the hub cannot be reached."""

from __future__ import annotations

import pytest

from ggmq.hub import choose_file, download
from protocol.errors import ConfigError, Unavailable

FILES = ["README.md", "m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-IQ4_NL.gguf", "mmproj-m-F16.gguf", "big-F16-00001-of-00002.gguf",
         "big-F16-00002-of-00002.gguf"]  # fmt: skip


@pytest.mark.parametrize(("quant", "file"), [
    (None, "m-Q4_K_M.gguf"), ("Q8_0", "m-Q8_0.gguf"), ("iq4_nl", "m-IQ4_NL.gguf"), ("F16", "big-F16-00001-of-00002.gguf"),
])  # fmt: skip
def test_a_file_is_chosen(quant: str | None, file: str) -> None:
    assert choose_file(FILES, quant) == file


def test_what_is_not_there_is_listed() -> None:
    with pytest.raises(ConfigError, match=r"no file of type Q2_K; it has big-F16"):
        choose_file(FILES, "Q2_K")
    with pytest.raises(ConfigError, match="no GGUF file"):
        choose_file(["README.md"], None)


def test_an_unreachable_hub_is_an_ordinary_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="hub"):
        download("somebody/something-GGUF")
    with pytest.raises(ConfigError, match="USER/REPO"):
        download("nonsense")
