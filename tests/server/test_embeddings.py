"""Embeddings, asked by OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import openai
import pytest

from tests.support.serving import Running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def vectors(client: openai.OpenAI, texts: object, **more: object) -> np.ndarray:
    made = client.embeddings.create(model="x", input=texts, extra_body=more)  # type: ignore[arg-type]
    assert [d.index for d in made.data] == list(range(len(made.data))) and made.usage.prompt_tokens > 0
    return np.array([d.embedding for d in made.data], np.float32)


def test_texts_that_are_alike_have_vectors_that_are_alike(client: openai.OpenAI) -> None:
    v = vectors(client, ["Tom and Lily went to the park.", "Tom and Lily went to the zoo.", "Once"])
    assert v.shape == (3, 192) and np.allclose((v * v).sum(1), 1, atol=1e-5)
    assert v[0] @ v[1] > v[0] @ v[2] + 0.05


def test_company_changes_no_vector(client: openai.OpenAI, server: Running) -> None:
    texts = [f"One day {name} saw {n} birds." for n in range(10) for name in ("Tom", "Lily", "Sam")]
    many = vectors(client, texts)
    assert (many[7] == vectors(client, texts[7])[0]).all() and (vectors(client, texts) == many).all()
    tokens = server.post("/tokenize", content=texts[7], add_special=True).json()["tokens"]
    assert (vectors(client, tokens)[0] == many[7]).all()
    plain = client.embeddings.create(model="x", input=texts[:2], encoding_format="float")
    assert (np.array([d.embedding for d in plain.data], np.float32) == many[:2]).all()


def test_pooling_is_chosen(client: openai.OpenAI) -> None:
    mean, last = (vectors(client, "Tom and Lily", pooling=p) for p in ("mean", "last"))
    assert (mean != last).any() and (vectors(client, "Tom and Lily") == mean).all()


def test_what_cannot_be_is_refused(client: openai.OpenAI) -> None:
    for text, more, param in (
        ("", {}, "input"), ([], {}, "input"), (["a", 5], {}, "input"), ("a", {"dimensions": 7}, "dimensions"),
        ("a " * 2000, {}, None), ([[10**6]], {}, None), ("a", {"pooling": "rank"}, "pooling"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as e:
            vectors(client, text, **more)
        assert param is None or e.value.param == param, e.value
