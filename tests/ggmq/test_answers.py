"""Answers read back: each family's format, cut anywhere; what is no call stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggmq.answers import Answer, AnswerFormat, Call, Content, ToolCall
from ggmq.gguf import GGUF
from ggmq.tokenizer import Vocabulary
from tests.support.fixtures import BUNDLED

VOCABULARY = Vocabulary(GGUF(BUNDLED))


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = [tool("weather", place={"type": "string"}, days={"type": "integer"}, exact={"type": "boolean"}),
         tool("add", x={"type": "number"}, y={"type": "array"}), tool("now")]  # fmt: skip
ULM = {"place": "Ulm \"é\" <b>\n2", "days": 2}
JSON = json.dumps(ULM, ensure_ascii=False)
SUM = {"x": 1.5, "y": [1, {"z": None}]}
SIGNS = {
    "hermes": "tools <tool_call>", "thinking": "tools <tool_call> <think> </think>", "generic": "", "json": "tools",
    "llama": "tools <|python_tag|>", "coder": "tools <tool_call> <function= <parameter= <think>",
    "mistral": "tools [TOOL_CALLS] [THINK]", "command": "tools <|START_ACTION|>", "granite": "tools <|tool_call|> <think>",
    "deepseek": "<｜tool▁calls▁begin｜> <think>", "kimi": "tools <|tool_calls_section_begin|> <think>",
    "functionary": "tools >>>all", "function": "tools <function=", "harmony": "tools <|channel|>",
    "glm": "tools <tool_call> <arg_key> <think>", "minimax": "tools <minimax:tool_call> <think>",
    "seed": "tools <seed:tool_call>", "dsml": "tools dsml_token DSML <think>", "code": "tools tool_code",
    "lfm": "tools <|tool_list_start|>", "gemma4": "tools '<|tool_call>call:'",
    "minicpm": 'tools <function name=" <param name="',
}  # fmt: skip


def read(format: str, pieces: list[str], tail: str = "", tools: list[dict[str, Any]] | None = TOOLS,
         reasoning: bool = True) -> Answer:  # fmt: skip
    reader = AnswerFormat.of(SIGNS.get(format, format), VOCABULARY).reader(
        tools, reasoning, tail, new_id=lambda i: f"id{i}")
    answer = Answer()
    for piece in pieces:
        answer.add(reader.feed(piece))
    return answer.add(reader.finish())


def calls(*wanted: tuple[str, Any], ids: tuple[str, ...] = ()) -> list[tuple[str, str, Any]]:
    return [(ids[i] if ids else f"id{i}", name, arguments) for i, (name, arguments) in enumerate(wanted)]


def found(answer: Answer) -> list[tuple[str, str, Any]]:
    return [(c.id, c.name, json.loads(c.arguments)) for c in answer.calls]


ULM_XML = '<parameter=place>\nUlm "é" <b>\n2\n</parameter>\n<parameter=days>\n2\n</parameter>\n'
ADD = json.dumps(SUM)
CALL_ULM, CALL_ADD = f'{{"name": "weather", "arguments": {JSON}}}', f'{{"arguments": {ADD}, "name": "add"}}'


class Case(NamedTuple):
    """What a model of a format writes after the end of a prompt, and what it is read as."""

    format: str
    text: str
    content: str = ""
    thoughts: str = ""
    calls: list[tuple[str, str, Any]] = []
    tail: str = ""


WEATHER, BOTH, NOW = calls(("weather", ULM)), calls(("weather", ULM), ("add", SUM)), calls(("now", {}))
WEATHER_NOW = calls(("weather", ULM), ("now", {}))
OTHER = ' {"tool_calls": [{"name": "other", "arguments": {}}]}'
ASSISTANT = "<|start|>assistant"
CASES = [
    Case("hermes", f"Let me see.\n<tool_call>\n{CALL_ULM}\n</tool_call>", "Let me see.", calls=WEATHER),
    Case("hermes", f"<tool_call>\n{CALL_ULM}\n</tool_call>\n<tool_call>\n{CALL_ADD}\n</tool_call>\n", calls=BOTH),
    Case("hermes", '<tool_call>{"name": "now"}</tool_call> done', "done", calls=NOW),
    Case("hermes", '<tool_call>{"type": "function", "function": {"name": "now", "arguments": null}}', calls=NOW),
    Case("hermes", f'<tool_call>{{"name": "add", "arguments": {json.dumps(ADD)}}}</tool_call>', calls=calls(("add", SUM))),
    Case("thinking", f"<think>\nHm.\n</think>\n\n<tool_call>\n{CALL_ULM}\n</tool_call>", "", "Hm.", WEATHER),
    Case("thinking", "Two.\n\nSo 4.\n</think>\n\n4 <think> 5", "4 <think> 5", "Two.\n\nSo 4.", tail="<think>\n"),
    Case("thinking", "<think>again</think>4", "4", "again", tail="<think>"),
    Case("thinking", "Just this.\n", "Just this.\n", tail="<think>\n\n</think>\n\n"),
    Case("thinking", "No thoughts </think> here", "No thoughts </think> here"),
    Case("generic", f'{{"tool_calls": [{CALL_ULM}, {CALL_ADD}]}}', calls=BOTH),
    Case("generic", '```json\n{"tool_calls": [{"name": "now", "arguments": {}, "id": "x"}]}\n```', calls=NOW),
    Case("generic", '{"response": "Hi \\"you\\""}', 'Hi "you"'),
    Case("generic", OTHER, OTHER),
    Case("json", f'{{"name": "weather", "parameters": {JSON}}}; {{"name": "add", "parameters": {ADD}}}', calls=BOTH),
    Case("json", '{"name": "Ann", "age": 7}', '{"name": "Ann", "age": 7}'),
    Case("llama", f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {JSON}}}', calls=WEATHER),
    Case("coder", f"Ok\n<tool_call>\n<function=weather>\n{ULM_XML}</function>\n</tool_call>", "Ok", calls=WEATHER),
    Case("coder", f"<function=weather>\n{ULM_XML}</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=x>1.5"
         '</parameter>\n<parameter=y>\n[1, {"z": null}]\n</parameter>\n</function>\n</tool_call>', calls=BOTH),
    Case("coder", "Look.\n<tool_call>\n<function=now>\n</function>\n</tool_call>", "", "Look.", NOW, "<think>\n"),
    Case("mistral", f"[TOOL_CALLS][{CALL_ULM}, {CALL_ADD}]", calls=BOTH),
    Case("mistral", f"[THINK]Hm[/THINK]Ok[TOOL_CALLS]weather[CALL_ID]a1[ARGS]{JSON}[TOOL_CALLS]add[ARGS]{ADD}", "Ok", "Hm",
         calls(("weather", ULM), ("add", SUM), ids=("a1", "id1"))),
    Case("command", '<|START_THINKING|>Hm<|END_THINKING|><|START_ACTION|>[\n {"tool_call_id": "0", "tool_name": "weather", '
         f'"parameters": {JSON}}}\n]<|END_ACTION|>', "", "Hm", calls(("weather", ULM), ids=("0",))),
    Case("command", "<|START_THINKING|>Hm<|END_THINKING|><|START_RESPONSE|>Hi<|END_RESPONSE|>", "Hi", "Hm"),
    Case("granite", f"<|tool_call|>[{CALL_ULM}]", calls=WEATHER),
    Case("granite", f"<|tool_call|>[{CALL_ULM}, {CALL_ADD}]<|/tool_call|>", calls=BOTH),
    Case("deepseek", "Hm</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
         f"{JSON}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ADD}<｜tool▁call▁end｜>"
         "<｜tool▁calls▁end｜>", "", "Hm", BOTH, "<think>\n"),
    Case("kimi", "Ok<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
         f"{JSON}<|tool_call_end|><|tool_calls_section_end|>", "Ok",
         calls=calls(("weather", ULM), ids=("functions.weather:0",))),
    Case("functionary", f"all\nSure.>>>weather\n{JSON}>>>add\n{ADD}", "Sure.", calls=BOTH, tail=">>>"),
    Case("functionary", f"weather\n{JSON}", calls=WEATHER, tail=">>>"),
    Case("function", f"<function=weather>{JSON}</function>", calls=WEATHER),
    Case("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
         f"<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{JSON}", "Wait.", "Hm.",
         WEATHER, ASSISTANT),
    Case("harmony", f" to=functions.weather<|channel|>commentary json<|message|>{JSON}", calls=WEATHER, tail=ASSISTANT),
    Case("harmony", f"<|channel|>analysis<|message|>Hm<|end|>{ASSISTANT}<|channel|>final<|message|>Hi", "Hi", "Hm",
         tail=ASSISTANT),
    Case("harmony", "llo", "llo", tail=f"{ASSISTANT}<|channel|>final<|message|>He"),
    Case("harmony", "Hello <b>", "Hello <b>", tail=ASSISTANT),
    Case("glm", "Hm</think>\n<tool_call>weather\n<arg_key>place</arg_key>\n<arg_value>Ulm \"é\" <b>\n2</arg_value>\n"
         "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now</tool_call>", "", "Hm",
         WEATHER_NOW, "<think>"),
    Case("minimax", '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="place">Ulm "é" <b>\n2</parameter>\n'
         '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
         calls=WEATHER_NOW),
    Case("seed", "<seed:think>Hm</seed:think><seed:tool_call>\n<function=weather>\n"
         f"{ULM_XML}</function>\n</seed:tool_call>", "", "Hm", WEATHER),
    Case("dsml", '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="place" string="true">7'
         '</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
         "</｜DSML｜function_calls>", calls=calls(("weather", {"place": "7", "days": 2}))),
    Case("code", '```tool_code\nprint(weather("Ulm", days=2, exact=True))\n```',
         calls=calls(("weather", {"place": "Ulm", "days": 2, "exact": True}))),
    Case("lfm", 'Ok<|tool_call_start|>[weather(place="Ulm", exact=true), now()]<|tool_call_end|>', "Ok",
         calls=calls(("weather", {"place": "Ulm", "exact": True}), ("now", {}))),
    Case("gemma4", "<|channel>thought\nHm<channel|><|tool_call>call:weather"
         '{place:<|"|>Ulm, {a: 1}<|"|>,days:2}<tool_call|>', "", "Hm",
         calls(("weather", {"place": "Ulm, {a: 1}", "days": 2}))),
    Case("minicpm", '<function name="weather"><param name="place">Ulm</param><param name="days">2</param></function>',
         calls=calls(("weather", {"place": "Ulm", "days": 2}))),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.format}-{c.text[:20]}")
def test_an_answer_is_read_however_it_comes(case: Case) -> None:
    for n in (len(case.text), 1, 7):
        answer = read(case.format, [case.text[i : i + n] for i in range(0, len(case.text), n)], case.tail)
        assert (answer.content, answer.reasoning, found(answer)) == (case.content, case.thoughts, case.calls)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.format}-{c.text[:20]}")
def test_an_answer_that_is_cut_is_what_came_of_it(case: Case) -> None:
    for n in range(len(case.text)):
        answer = read(case.format, [case.text[:n]], case.tail)
        thoughts = answer.reasoning.partition("<")[0].partition("[")[0].strip()  # without what may yet become a part
        assert case.thoughts.startswith(thoughts) and len(answer.calls) <= len(case.calls)
        whole = [(c.name, json.loads(c.arguments)) for c in answer.calls[:-1]]
        assert whole == [(name, arguments) for _, name, arguments in case.calls[: len(whole)]]
        assert all(c.name == case.calls[i][1] for i, c in enumerate(answer.calls))


MARKERS = sorted({m for sign in SIGNS.values() for m in sign.split()} | {
    "</tool_call>", "</think>", '{"name": "weather", "arguments": {', '"days": 2', "}", "]", "[", "<function=weather>",
    "</function>", "<parameter=place>", "</parameter>", "[ARGS]", "[CALL_ID]", "<|message|>", "<|end|>", ASSISTANT, "<",
    "analysis", " to=functions.now", "<tool", ">>>", "now", "\n", " ", '"', "\\", "<｜tool▁call▁begin｜>", "weather(", ")",
    "<｜tool▁sep｜>", "```", "```json", "<|channel|>", "<arg_value>", "</arg_key>", '{"tool_calls": [', '{"response": "',
    "é", "a"})  # fmt: skip


@given(st.sampled_from(sorted(SIGNS)), st.lists(st.sampled_from(MARKERS) | st.text(max_size=3), max_size=16), st.data())
def test_any_text_cut_anywhere_is_read_the_same(format: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    tail = data.draw(st.sampled_from(["", "<think>\n", ">>>", "<|start|>assistant"]))
    whole = read(format, [text], tail)
    assert read(format, pieces, tail) == whole == read(format, list(text), tail)


@given(st.sampled_from(sorted(SIGNS)), st.text(st.characters(exclude_characters="<[{>`")))
def test_a_plain_answer_is_as_it_was(format: str, text: str) -> None:
    assert read(format, list(text)) == Answer(text)


def test_without_tools_there_are_no_calls_and_thoughts_may_stay() -> None:
    text = '<think>Hm</think>\n<tool_call>{"name": "now"}</tool_call>'
    assert read("thinking", [text], tools=None) == Answer('<tool_call>{"name": "now"}</tool_call>', "Hm")
    assert read("thinking", [text], tools=None, reasoning=False) == Answer(text)
    assert read("thinking", [text], reasoning=False) == Answer("<think>Hm</think>", calls=[Call("id0", "now", "{}")])


def test_an_answer_may_go_on_with_thoughts() -> None:
    reader = AnswerFormat.of(SIGNS["thinking"], VOCABULARY).reader(prompt_tail="<think>\nTwo a", thinking=True)
    assert Answer().add(reader.feed("nd two.</think>4")).add(reader.finish()) == Answer("4", "nd two.")


def test_text_and_arguments_come_as_soon_as_they_are_known() -> None:
    reader = AnswerFormat.of(SIGNS["hermes"], VOCABULARY).reader(TOOLS, new_id=str)
    texts = ("Hi <", "b>", "<tool_call>", '{"name": "weather", "argu', 'ments": {"pla', 'ce": "U', 'lm"}}')
    assert [reader.feed(text) for text in texts] == [
        [Content("Hi")], [Content(" <b>")], [], [], [ToolCall(0, "0", "weather", '{"pla')], [ToolCall(0, "", "", 'ce": "U')],
        [ToolCall(0, "", "", 'lm"}')]]  # fmt: skip
    assert reader.has_calls and reader.finish() == []


def test_control_tokens_of_a_format_are_preserved(shared: Path) -> None:
    v = Vocabulary(GGUF(shared / "vocab" / "ggml-vocab-qwen2.gguf"))
    start = v.ids["<|im_start|>"]
    assert AnswerFormat.of("tools <tool_call>", v).preserved == frozenset()  # plain text there
    for sign, text in (("tools <tool_call>", "<tool_call>"), (SIGNS["gemma4"], "<|tool_call>"), (SIGNS["dsml"], "｜DSML｜")):
        v.tokens[start] = text
        assert AnswerFormat.of(sign, v).preserved == {start}
    v.tokens[max(v.end_ids)] = "</tool_call>"
    assert AnswerFormat.of("tools <tool_call>", v).preserved == frozenset()  # it ends the answer, and is never text


def test_long_answers_are_read_in_time() -> None:
    deep = '<tool_call>{"name": "add", "arguments": {"y": ' + "[" * 100_000
    assert read("hermes", [deep]).calls[0].name == "add"
    for name in ("x" * 300, "x" * 505, "x" * 520, "x" * 3000):
        text = f"<tool_call><function=weather><parameter={name}>1</parameter></function></tool_call>"
        assert read("coder", [text]) == read("coder", list(text)) == read("coder", [text[:540], text[540:]])
        text = text.replace("weather", name)
        assert read("coder", [text]) == read("coder", list(text))
    many = "<tool_call>" * 3000 + "<" * 20_000
    assert read("hermes", [many]).content == many
    assert read("code", ["```tool_code\n" + "(" * 50_000 + "\n```"]).calls == []
