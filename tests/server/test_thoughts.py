"""Thoughts are told apart from what is said, in each API; and an answer of a given form has none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai
import pytest

from tests.support.serving import Running, serving
from tests.support.templates import with_template

TEMPLATE = (
    "{%- for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt and enable_thinking %}<think>{% elif add_generation_prompt %}"
    "<think></think>{% endif %}"
)
ASKED = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model that begins each answer with thoughts, unless it is told not to, and never ends them."""
    model = with_template(tmp_path_factory.mktemp("model") / "thinker.gguf", TEMPLATE)
    with serving("--temp", "0", "-np", "2", model=model) as running:
        yield running


@pytest.fixture(scope="module")
def client(thinker: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=thinker.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chats(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="x", messages=ASKED, max_tokens=12)
    message, usage = made.choices[0].message, made.usage
    assert message.content == "" and len(message.reasoning_content) > 10  # type: ignore[attr-defined]
    assert usage is not None and usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 12
    chunks = client.chat.completions.create(model="x", messages=ASKED, max_tokens=12, stream=True)
    deltas = [c.choices[0].delta for c in chunks]
    assert "".join(getattr(d, "reasoning_content", "") for d in deltas) == message.reasoning_content  # type: ignore[attr-defined]
    off = {"enable_thinking": False}
    for how in ({"reasoning_effort": "none"}, {"chat_template_kwargs": off}, off):
        plain = client.chat.completions.create(model="x", messages=ASKED, max_tokens=12, extra_body=how)
        assert plain.choices[0].message.content and not hasattr(plain.choices[0].message, "reasoning_content")


@pytest.fixture(scope="module")
def claude(thinker: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=thinker.url, api_key="none", max_retries=0) as client:
        yield client


def test_messages(claude: anthropic.Anthropic) -> None:
    made = claude.messages.create(model="x", max_tokens=12, messages=ASKED)
    assert [b.type for b in made.content] == ["thinking"]
    with claude.messages.stream(model="x", max_tokens=12, messages=ASKED) as stream:
        kinds = [e.type for e in stream]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and kinds.count("content_block_start") == 1
    plain = claude.messages.create(model="x", max_tokens=12, messages=ASKED, thinking={"type": "disabled"})
    assert [b.type for b in plain.content] == ["text"]
    again = [*ASKED, {"role": "assistant", "content": made.content}, *ASKED]
    assert claude.messages.create(model="x", max_tokens=3, messages=again).usage.input_tokens > 20


def test_responses(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="x", input="Once upon a time", max_output_tokens=12, stream=True))
    kinds = [e.type for e in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]  # fmt: skip
    assert kinds[-4:] == ["response.reasoning_text.done", "response.content_part.done", "response.output_item.done",
                          "response.incomplete"]  # fmt: skip
    last = events[-1].response
    assert [item.type for item in last.output] == ["reasoning"] and last.usage.output_tokens_details.reasoning_tokens == 12
    kept = client.responses.retrieve(last.id)
    assert kept.output == last.output
    after = client.responses.create(model="x", input="And?", previous_response_id=last.id, max_output_tokens=2)
    assert after.usage is not None and after.usage.input_tokens > last.usage.input_tokens + 12
    client.responses.delete(last.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last.id)


def test_an_answer_of_a_form_is_said_and_not_thought(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    made = client.chat.completions.create(model="x", messages=ASKED, max_tokens=200, response_format=form)
    assert json.loads(made.choices[0].message.content or "")["a"] in (1, 2)


def test_a_template_that_does_not_end_holds_up_nobody(tmp_path: Path) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with serving("--temp", "0", model=with_template(tmp_path / "endless.gguf", endless)) as running:
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(
            running.post("/v1/chat/completions", messages=ASKED, max_tokens=1).status_code))  # fmt: skip
        asking.start()
        assert running.get("/health").status_code == 200 and running.get("/v1/models").status_code == 200
        assert not answers  # it is still being rendered
        asking.join()
        assert answers == [400] and running.post("/v1/completions", prompt="Once", max_tokens=1).status_code == 200
