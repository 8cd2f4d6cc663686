"""Chat completions, asked by OpenAI's own client."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import openai
import pytest

from tests.support.fixtures import ROOT
from tests.support.processes import GGMQ
from tests.support.serving import Running

ASKED = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone() -> str:
    """What `ggmq run` answers."""
    command = [*GGMQ, "run", "-cnv", "-st", "-p", "Once upon a time", "--temp", "0", "-n", "30", "--workers", "1", "-t", "1"]
    r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr
    return r.stdout.removesuffix("\n")


def test_an_answer_is_the_one_that_run_gives(client: openai.OpenAI, alone: str) -> None:
    made = client.chat.completions.create(model="stories", messages=ASKED, max_tokens=30)
    assert made.choices[0].message.content == alone and made.choices[0].finish_reason == "length"
    assert made.usage is not None and made.usage.completion_tokens == 30 and made.usage.prompt_tokens > 30


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI, alone: str) -> None:
    chunks = list(client.chat.completions.create(model="stories", messages=ASKED, max_tokens=30, stream=True,
                                                 stream_options={"include_usage": True}))  # fmt: skip
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == alone and sum(map(bool, pieces)) > 3
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30 and not chunks[-1].choices
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"


def test_choices_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    def texts(n: int, seed: int) -> list[str | None]:
        made = client.chat.completions.create(model="x", messages=ASKED, max_tokens=12, n=n, seed=seed, temperature=1)
        return [c.message.content for c in made.choices]

    three = texts(3, 7)
    assert len(set(three)) == 3 and texts(1, 8) == three[1:2] and texts(3, 7) == three


def test_what_is_wrong_is_named_by_its_path(client: openai.OpenAI) -> None:
    for body, param in (
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"), ({"messages": [{}]}, "messages[0].role"),
        ({"messages": ASKED, "temperature": -1}, "temperature"), ({}, "messages"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": ASKED, "stop": ["a", ""]}, "stop[1]"), ({"messages": ASKED, "n": 99}, "n"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as e:
            client.post("/chat/completions", body=body, cast_to=object)
        assert e.value.param == param, e.value


def test_a_prompt_that_is_too_long_is_told_with_both_figures(client: openai.OpenAI) -> None:
    for words, figure in ((700, "has 7"), (200_000, "at least ")):
        with pytest.raises(openai.BadRequestError, match="512") as e:
            client.chat.completions.create(model="stories", messages=[{"role": "user", "content": "dog " * words}])
        assert e.value.code == "context_length_exceeded" and figure in str(e.value)
