"""The APIs asked by their makers' own clients, on the bundled model with ChatML: texts, tools, forms, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.support.serving import Running

ASKED = [{"role": "user", "content": "Once upon a time"}]
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1,
              "maximum": 9}}, "required": ["city", "days"], "additionalProperties": False}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_completions_go_on_with_texts_and_tokens(client: openai.OpenAI, server: Running) -> None:
    made = client.completions.create(model="x", prompt=["Once upon a time", "Tom"], max_tokens=8, logprobs=2)
    tokens = server.post("/tokenize", content="Once upon a time", add_special=True).json()["tokens"]
    again = client.completions.create(model="x", prompt=tokens, max_tokens=8)
    assert [c.index for c in made.choices] == [0, 1] and again.choices[0].text == made.choices[0].text
    probs = made.choices[0].logprobs
    assert probs is not None and probs.token_logprobs and probs.top_logprobs
    assert all(max(top.values()) == p for top, p in zip(probs.top_logprobs, probs.token_logprobs))  # it is greedy
    echoed = client.completions.create(model="x", prompt="Tom", max_tokens=4, echo=True)
    assert echoed.choices[0].text.startswith("Tom")


def test_logprobs_are_of_the_tokens_of_the_text(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="x", messages=ASKED, max_tokens=12, logprobs=True, top_logprobs=3)
    probs = made.choices[0].logprobs
    assert probs is not None and probs.content is not None
    assert "".join(t.token for t in probs.content) == made.choices[0].message.content
    for t in probs.content:
        assert len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob == t.logprob <= 0
        assert [p.logprob for p in t.top_logprobs] == sorted((p.logprob for p in t.top_logprobs), reverse=True)
    chunks = list(client.chat.completions.create(model="x", messages=ASKED, max_tokens=12, logprobs=True, stream=True))
    streamed = [t for c in chunks if c.choices and (p := c.choices[0].logprobs) for t in p.content or ()]
    assert [t.logprob for t in streamed] == [t.logprob for t in probs.content]


def test_biases_and_penalties_change_what_is_taken(client: openai.OpenAI, server: Running) -> None:
    def text(**more: object) -> str:
        return client.completions.create(model="x", prompt="Once", max_tokens=60, **more).choices[0].text

    plain = text()
    word = server.post("/tokenize", content=" zoo").json()["tokens"][0]
    assert text(logit_bias={str(word): 100}) != plain and text(presence_penalty=2.0, frequency_penalty=2.0) != plain
    first = server.post("/tokenize", content=plain).json()["tokens"][0]
    assert text(logit_bias={str(first): -100})[:4] != plain[:4]
    with pytest.raises(openai.BadRequestError) as e:
        text(logit_bias={"x": 1})
    assert e.value.param == "logit_bias"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_wanted_is_made(client: openai.OpenAI, choice: object) -> None:
    how = {"model": "x", "messages": ASKED, "tools": [TOOL], "tool_choice": choice, "max_tokens": 200, "seed": 3,
           "temperature": 1.0, "parallel_tool_calls": False}  # fmt: skip
    made = client.chat.completions.create(**how)
    assert made.choices[0].finish_reason == "tool_calls" and len(made.choices[0].message.tool_calls) == 1
    call = made.choices[0].message.tool_calls[0]
    given = json.loads(call.function.arguments)
    assert call.function.name == "weather" and given["city"] in ("Rome", "Oslo") and 1 <= given["days"] <= 9
    pieces, name, ids = "", "", []
    for chunk in client.chat.completions.create(**how, stream=True):
        for c in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
            pieces += c.function.arguments or ""
            name += c.function.name or ""
            ids += [c.id] if c.id else []
    assert json.loads(pieces) == given and name == "weather" and len(ids) == 1


def test_results_of_calls_go_back(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome","days":1}'}}
    talk = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]  # fmt: skip
    made = client.chat.completions.create(model="x", messages=talk, tools=[TOOL], tool_choice="none", max_tokens=5)
    assert made.choices[0].message.content is not None


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": PARAMETERS, "strict": True}}
    for seed in range(4):
        made = client.chat.completions.create(model="x", messages=ASKED, response_format=form, max_tokens=200, seed=seed,
                                              temperature=1.0)  # fmt: skip
        assert made.choices[0].finish_reason == "stop"
        given = json.loads(made.choices[0].message.content or "")
        assert given["city"] in ("Rome", "Oslo") and 1 <= given["days"] <= 9
    with pytest.raises(openai.BadRequestError) as e:
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        client.chat.completions.create(model="x", messages=ASKED, response_format=bad)
    assert e.value.param == "response_format.json_schema.schema"


def test_grammars_and_regular_expressions(server: Running) -> None:
    for more, wanted in (({"grammar": 'root ::= "yes" | "no"'}, {"yes", "no"}), ({"guided_choice": ["red", "blue"]},
                         {"red", "blue"}), ({"response_format": {"type": "regex", "regex": "[ab]{3}"}}, None)):  # fmt: skip
        r = server.post("/v1/chat/completions", messages=ASKED, temperature=1.0, seed=1, max_tokens=20, **more)
        text = r.json()["choices"][0]["message"]["content"]
        assert text in wanted if wanted else len(text) == 3 and set(text) <= set("ab")


def test_an_answer_that_is_begun_goes_on(client: openai.OpenAI, server: Running) -> None:
    talk = [*ASKED, {"role": "assistant", "content": "There was a"}]
    prompt = server.post("/apply-template", messages=talk).json()["prompt"]
    made = client.chat.completions.create(model="x", messages=talk, max_tokens=6)
    assert prompt.endswith("There was a")
    plain = client.completions.create(model="x", prompt=prompt, max_tokens=6)
    assert plain.choices[0].text == made.choices[0].message.content


def test_responses(client: openai.OpenAI) -> None:
    made = client.responses.create(model="x", input="Once upon a time", max_output_tokens=10)
    assert made.status == "incomplete" and made.output_text and made.usage is not None and made.usage.output_tokens == 10
    events = list(client.responses.create(model="x", input="Once upon a time", max_output_tokens=10, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == made.output_text
    after = client.responses.create(model="x", input="And?", previous_response_id=made.id, max_output_tokens=4)
    assert after.usage is not None and after.usage.input_tokens > made.usage.input_tokens + 10
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="x", input="And?", previous_response_id="resp_none")
    call = client.responses.create(model="x", input="Rome?", tools=[{"type": "function", "name": "weather", "strict": True,
                                   "parameters": PARAMETERS}], tool_choice="required", max_output_tokens=200)  # fmt: skip
    assert call.output[-1].type == "function_call" and json.loads(call.output[-1].arguments)["days"] in range(1, 10)


def test_messages(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    made = claude.messages.create(model="x", max_tokens=12, messages=ASKED, system="Tell.")
    talk = [{"role": "system", "content": "Tell."}, *ASKED]
    same = client.chat.completions.create(model="x", max_tokens=12, messages=talk)
    assert made.content[0].text == same.choices[0].message.content and made.stop_reason == "max_tokens"
    assert claude.messages.count_tokens(model="x", messages=ASKED, system="Tell.").input_tokens == (
        made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0))
    with claude.messages.stream(model="x", max_tokens=12, messages=ASKED, system="Tell.") as stream:
        assert "".join(stream.text_stream) == made.content[0].text
        assert stream.get_final_message().usage.output_tokens == 12
    cut = claude.messages.create(model="x", max_tokens=60, messages=ASKED, stop_sequences=["there"])
    assert cut.stop_reason == "stop_sequence" and cut.stop_sequence == "there"
    tool = {"name": "weather", "input_schema": PARAMETERS}
    with claude.messages.stream(model="x", max_tokens=200, messages=ASKED, tools=[tool], 
                                tool_choice={"type": "any", "disable_parallel_tool_use": True}) as s:
        call = s.get_final_message()
    assert call.stop_reason == "tool_use" and call.content[-1].type == "tool_use"
    assert call.content[-1].input["days"] in range(1, 10)
    with pytest.raises(anthropic.BadRequestError) as e:
        claude.messages.create(model="x", max_tokens=5, messages=[{"role": "user", "content": [{"type": "image"}]}])
    assert e.value.body["error"]["type"] == "invalid_request_error" and "messages[0].content[0]" in str(e.value)
