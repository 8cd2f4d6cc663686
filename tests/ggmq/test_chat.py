"""Chat templates are programs of strangers: they render in a process that is bounded, and every failure says what it was."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from ggmq import chat
from ggmq.chat import ChatTemplate
from ggmq.gguf import GGUF
from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError
from tests.peer import templates
from tests.support.fixtures import BUNDLED, ROOT
from tests.support.gguf_factory import STRING, key, text

HI = [{"role": "user", "content": "Hi"}]
ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


def template(source: str) -> ChatTemplate:
    v = Vocabulary(GGUF(BUNDLED))
    v.chat_template = source
    return ChatTemplate(v)


def test_a_model_renders_as_its_makers_meant(shared: Path) -> None:
    v = Vocabulary(GGUF(shared / "vocab" / "ggml-vocab-qwen2.gguf"))
    assert ChatTemplate(v).render(HI) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_turns_share_a_process_and_what_a_template_may_use() -> None:
    t = template("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
                 "{{ bos_token }}{{ strftime_now('%%') }}{% if add_generation_prompt %}!{% endif %}")  # fmt: skip
    process = t._process
    assert t.render([*HI, {"role": "user", "content": "\u1f40\x00\udcff\n"}]) == "\u1f40\x00\udcff\n<|endoftext|>%!"
    assert t.render([*HI, *HI], add_generation_prompt=False) == "Hi<|endoftext|>%"
    assert t._process is process is not None
    assert template("").render(HI) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("source", "words"), [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation: .*unsafe"),
    ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate;"),
    ("{{ ''|attr('__class__') }}", "refuses the conversation: .*unsafe"),
    ("{{ 1 / 0 }}", "refuses the conversation: division"),
    ("{% include 'other' %}", "refuses the conversation"), ("{% for", "cannot be parsed: unexpected"),
    ("{{ range(10 ** 9) | list }}", "refuses the conversation: Range too big"),
    (ENDLESS, r"took longer than 0\.5 s"), ("{{ 7 ** (10 ** 8) }}", r"took longer than 0\.5 s"),
    ("{% for a in range(9999) %}{% for b in range(9999) %}xxxxxxxx{% endfor %}{% endfor %}", "made more than 4000000"),
    ("{{ 'x' * 10 ** 9 }}", "needs more than 512 MiB"), ("{{ [1] * 10 ** 9 }}", "needs more than 512 MiB"),
    ("{{ '%1000000000d' % 1 }}", "needs more than 512 MiB"), ("{{ 'a'.ljust(10 ** 9) }}", "needs more than 512 MiB"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nests too deep"),
    ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "nests too deep"),
    ("{{ " + "not " * 20_000 + "1 }}", "nests too deep"), ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nests too deep"),
    ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "nests too deep"),
    ("x" * (1 << 20) + "x", "expected at most 1048576 characters"),
], ids=lambda x: x[:30])  # fmt: skip
def test_a_template_that_fails_says_what_it_did(monkeypatch: pytest.MonkeyPatch, source: str, words: str) -> None:
    if "took" in words:
        monkeypatch.setattr(chat, "MAX_RENDER_S", 0.5)
    with pytest.raises(FormatError, match=r"^stories\.gguf: tokenizer\.chat_template.*" + words):
        template(source).render(HI)


TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " <b>é</b>\u3000"},
        {"role": "assistant", "content": "ok"}, {"role": "user", "content": "x\ny"}]  # fmt: skip
SHOWN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}[{{ p.text }}]{% endfor %}{% endfor %}"
EITHER = ("{% for m in messages %}{% if m.content is string %}{{ m.content }};{% else %}{% for p in m.content %}"
          "[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}")  # fmt: skip
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + SHOWN
DROPPING = "{% for m in messages if m.role != 'system' %}{{ m.role }}:{{ m.content }};{% endfor %}"
MERGED = "user:Be brief.\n <b>é</b>\u3000;assistant:ok;user:x\ny;"


@pytest.mark.parametrize(("source", "expected"), [
    ("{{ messages[0]|tojson }}", '{"role": "system", "content": "Be brief."}'),
    ("{{ {'b': 'é<&>', 'a': [1, none, true, {}], 'c': 0.1, 'd': 100000.0 * 1000}|tojson }}",
     '{"b": "é<&>", "a": [1, null, true, {}], "c": 0.1, "d": 1e+08}'),
    ("{{ {'b': [1, 'x'], 'a': []}|tojson(indent=2) }}", '{\n  "b": [\n    1,\n    "x"\n  ],\n  "a": []\n}'),
    ("{{ {'b': [1, 2]}|tojson(separators=(',', ':')) }}", '{"b":[1,2]}'),
    ("{{ {'b': 'é'}|tojson(ensure_ascii=true) }}", '{"b": "\\u00e9"}'),
    ("{% generation %}b{% set x = 1 %}{% endgeneration %}{{ x }}", "b1"),
    ("{%- generation -%} a {%- endgeneration -%} b", "ab"),
    ("{{ tools is defined }}{{ functions is defined }}{% for t in tools %}{% endfor %}{% if not functions %}!{% endif %}",
     "FalseFalse!"),
    ("{{ messages[1].tool_calls.name }}{{ messages[9].content.text }}.{{ 'x' in nothing }}", ".False"),
    ("{{ none }}{{ 'a' + none }}{{ none + 'b' }}{{ nothing + 'c' }}{{ 'd' + 1 }}", "abcd1"),
    ("{{ 'e' ~ none ~ messages[0].nothing ~ 1.5 ~ 1 }}{% for x in none|items %}{% endfor %}", "e1.51"),
    ("{{ none|default('a') }}{{ nothing|default('b') }}{{ ''|default('c', true) }}", "abc"),
    ("{{ 1.5 }}{{ 3.0 }}{{ [1, 'a', none] }}{{ {'a': 1} }}{{ messages[:1]|map(attribute='role') }}", "1.53.01auser"),
    ("{{ {'a': 'b'}.items() }}{{ 'xax'.strip('') }}", "abxax"),
    ("{{ '<b>'|safe + '<i>' }}", "<b><i>"),
    ("[{{ ' é\u3000'|trim }}][{{ '\u00a0é\t'.strip() }}][{{ 'xax'.strip('x') }}][{{ ' a '.rstrip() }}]",
     "[é\u3000][\u00a0é][a][ a]"),
    ("{% set found = [] %}{% set _ = found.append('a') %}{{ found[0] }}", "a"),
    ("{{ preserve_thinking }}{{ clear_thinking }}{{ truncate_history_thinking }}{{ drop_thinking }}", "TrueFalseFalseFalse"),
    (SHOWN, "system:Be brief.;" + MERGED.replace("Be brief.\n", "")), (REFUSING, MERGED), (DROPPING, MERGED),
    (PARTS, "[Be brief.][ <b>é</b>\u3000][ok][x\ny]"), (EITHER, "Be brief.; <b>é</b>\u3000;ok;x\ny;"),
    ("{{ bos_token }}{{ bos_token }}a", "<|endoftext|>a"),
    ("{{ 'You have access to the following functions in JSONSchema format'[:0] }}" + SHOWN,
     "system:Be brief.;user:<b>é</b>\u3000;assistant:ok;user:x\ny;"),
    ("{{ '[SYSTEM_PROMPT][TOOL_CALLS][ARGS]'[:0] }}" + EITHER, "[Be brief.] <b>é</b>\u3000;[ok]x\ny;"),
    ("{{ \"'<|tool_call>call:'\"[:0] }}{{ messages[0].content }}<turn|>\n\n", "Be brief.<turn|>\n<|turn>model\n"),
], ids=lambda x: x[:30])  # fmt: skip
def test_templates_render_as_in_llama_cpp(source: str, expected: str) -> None:
    assert template(source).render(TALK) == expected


def test_without_tools_there_are_none_and_json_of_nothing_is_null() -> None:
    assert template("{{ tools|tojson }}{{ functions|tojson }}{{ functions.first.name }}").render(HI) == "nullnull"


WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a place", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}  # fmt: skip
CALLED: list[chat.Message] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [
        {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Ulm"}'}}]},
    {"role": "tool", "tool_call_id": "a1", "content": "sunny"}]  # fmt: skip
AS_OBJECT = (
    "{% for t in tools %}{{ t.function.name }}:{{ t.function.parameters|tojson }};{% endfor %}"
    "{% for m in messages %}{{ m.role }}={{ m.content }}{% for c in m.tool_calls %}<{{ c.function.name }} {{ c.id }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}>{% endfor %};{% endfor %}"
)
AS_TEXT = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}"


def test_calls_are_shown_as_a_template_wants_their_arguments() -> None:
    assert template(AS_OBJECT).render(CALLED, tools=[WEATHER]) == (
        'weather:{"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]};'
        "user=Weather?;assistant=<weather a1 place=Ulm>;tool=sunny;")
    assert template("{{ tools|length }}" + AS_TEXT).render(CALLED, tools=[WEATHER]).endswith('1{"place": "Ulm"}')
    said = "{% for m in messages %}{{ m.reasoning_content }}{{ m.tool_call_id }}{% endfor %}"
    assert template(said).render(CALLED[:2]) == "Look."
    with pytest.raises(FormatError, match="arguments of a call of weather: expected JSON"):
        bad = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": "{x"}}]}
        template(AS_OBJECT).render([*HI, bad])


def test_a_template_that_knows_of_no_tools_gets_them_in_words() -> None:
    text = template(SHOWN).render(CALLED, tools=[WEATHER])
    assert text.startswith("system:You can call these tools") and '"name": "weather"' in text
    assert 'assistant:{"tool_calls": [{"name": "weather", "arguments": {"place": "Ulm"}, "id": "a1"}]};' in text
    assert text.endswith('user:{"tool_response": {"id": "a1", "content": "sunny"}};')
    assert template(SHOWN).render(TALK, tools=[WEATHER]).startswith("system:Be brief.\n\nYou can call these tools")


FIELDS = "{% for m in messages %}{{ m|tojson }};{% endfor %}{{ tools|length }}"


@pytest.mark.parametrize(("sign", "told"), [
    ("<|tool_list_start|><|tool_list_end|>", ['"thinking": "Look."', '"reasoning_content": "Look."']),
    ("<|channel|>", ['{"role": "assistant", "reasoning_content": "Look.", "tool_calls"', '"thinking": "Look."']),
    ("[SYSTEM_PROMPT][TOOL_CALLS][ARGS]", [
        '"content": [{"type": "thinking", "thinking": "Look."}, {"type": "text", "text": ""}]']),
    ("'<|tool_call>call:'", ['"tool_responses": [{"name": "weather", "response": "sunny"}]', '"content": "Warm."']),
    ("'<|tool_call>call:'{#- OpenAI Chat Completions:", ['{"role": "tool", "content": "sunny", "tool_call_id": "a1"}']),
])  # fmt: skip
def test_families_get_thoughts_and_results_where_they_look_for_them(sign: str, told: list[str]) -> None:
    hidden = "{% if false %}{{ raise_exception(" + repr(sign).replace("{#-", "{' ~ '#-") + ") }}{% endif %}"
    source = hidden if "{#-" not in sign else hidden + "{% raw %}" + sign + "{% endraw %}"
    text = template(source + FIELDS).render([*CALLED, {"role": "assistant", "content": "Warm."}, *HI], tools=[WEATHER])
    assert all(t in text for t in told), text


def test_results_come_in_the_order_of_their_calls_where_a_family_wants_that() -> None:
    calls = [{"id": i, "function": {"name": "weather", "arguments": {}}} for i in "ab"]
    talk: list[chat.Message] = [*HI, {"role": "assistant", "tool_calls": calls},
                                *({"role": "tool", "tool_call_id": i, "content": i} for i in "ba"), *HI]  # fmt: skip
    shown = "{% for m in messages if m.role == 'tool' %}{{ m.content }}{% endfor %}{{ tools|tojson }}"
    assert template(shown).render(talk, tools=[WEATHER])[:2] == "ba"
    assert template("{% set dsml_token = 'DSML' %}" + shown).render(talk, tools=[WEATHER])[:2] == "ab"


def test_a_model_may_have_a_template_for_tools() -> None:
    v = Vocabulary(GGUF(BUNDLED))
    v.chat_template, v.tool_template = "plain", "{{ tools[0].function.name }}"
    t = ChatTemplate(v)
    assert [t.render(HI), t.render(HI, tools=[WEATHER]), t.render(HI)] == ["plain", "weather", "plain"]


def test_a_template_gets_more_variables_and_they_win() -> None:
    t = template("{{ enable_thinking }}{{ preserve_thinking }}{{ reasoning_strength }}{{ mine }}")
    assert t.render(HI, extra={"enable_thinking": False, "reasoning_effort": "low", "mine": 7}) == "FalseTruelow7"
    assert t.render(HI, extra={"preserve_reasoning": False}) == "TrueFalse"


def test_an_answer_is_gone_on_with() -> None:
    said = {"role": "assistant", "content": "He", "reasoning_content": "Wave."}
    assert template("").render([*HI, said], continue_final=True).endswith("Hi<|im_end|>\n<|im_start|>assistant\nHe")
    thinks = ("{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>"
              "\n{% endif %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:<think>\n{% endif %}")
    assert template(thinks).render([*HI, said], continue_final=True) == "user:Hi;assistant:<think>\nWave.\n</think>\nHe"
    assert template(thinks).render([*HI, said | {"content": ""}], continue_final=True) == "user:Hi;assistant:<think>\nWave."


@pytest.mark.peer
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("source", [REFUSING, EITHER + "{{ enable_thinking }}{{ bos_token }}", "{{ bos_token }}" + PARTS,
                                    AS_OBJECT, "{% if tools %}{{ tools|tojson }}{% endif %}" + AS_TEXT + SHOWN],
                         ids=["refusing", "either", "parts", "objects", "texts"])  # fmt: skip
def test_all_conversations_render_as_by_a_peer(tmp_path: Path, source: str) -> None:
    models = {adds: templates.vocabulary(tmp_path / f"{adds}.gguf", adds) for adds in (False, True)}
    result = templates.compare(source, templates.conversations(24, 1), models, tmp_path)
    assert not result.different and result.counts["same"] > 100, result.different[:3]


def test_thinking_is_on_unless_said_and_a_prompt_for_an_answer_is_defined_or_not() -> None:
    t = template("{{ enable_thinking }}{{ add_generation_prompt is defined }}")
    assert t.render(HI) == "TrueTrue"
    assert t.render(HI, enable_thinking=False) == "FalseTrue"
    assert t.render(HI, add_generation_prompt=False) == "TrueFalse"


def test_dates_are_written_as_in_llama_cpp() -> None:
    t = template("{{ date_string }}|{{ datetime }}|{{ strftime_now('%d %b %Y|%b %d %Y|%Z') }}")
    day, us, *again, zone = t.render(HI).split("|")
    assert [day, us] == again and re.fullmatch(r"\d\d [A-Z]\w\w \d{4}", day) and re.fullmatch(r"[A-Z]\w\w \d\d \d{4}", us)
    assert zone == time.strftime("%Z")


def test_messages_come_as_parts_empty_and_from_developers() -> None:
    talk: list[chat.Message] = [
        {"role": "developer", "content": "Be kind."}, {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]  # fmt: skip
    assert template(SHOWN).render(talk) == "system:Be kind.;assistant:;user:a\nb;"
    assert template(EITHER).render(talk) == "Be kind.;;[a][b]"
    assert template(DROPPING).render(talk[:1]) == ""  # nothing to merge it into
    assert template(PARTS).render(talk[2:]) == "[a][b]"


def test_channels_in_an_answer_and_empty_answers_are_no_reason_to_refuse() -> None:
    said = [*HI, {"role": "assistant", "content": "<|channel|>final<|message|>Hi"}]
    check = '"<|channel|>a" in message.content or "<|channel|>f" in message.content'
    t = template("{% for message in messages %}{%- if " + check + " %}"
                 "{{ raise_exception('channels') }}{% endif %}{{ message.role }}<|return|>{% endfor %}")  # fmt: skip
    assert t.render(said) == "user<|return|>assistant<|return|>"
    assert t.render(said, add_generation_prompt=False) == "user<|return|>assistant<|end|>"  # another turn may follow
    t = template("{% for message in messages %}{%- if (message['content'] is none or message['content'] == '') and "
                 "(message['tool_calls'] is not defined or message['tool_calls']|length == 0) %}"
                 "{{ raise_exception('[TOOL_CALLS]') }}{% endif %}{{ message.role }}{% endfor %}")  # fmt: skip
    assert t.render([*HI, {"role": "assistant", "content": ""}]) == "userassistant"


def test_two_answers_in_one_piece_are_read_one_by_one() -> None:
    unread = bytearray()
    with subprocess.Popen(["printf", r'{"ready": true}\n{"text": ""}\n'], stdout=subprocess.PIPE) as process:
        process.wait()
        assert [chat._receive(process, unread, 5) for _ in range(2)] == [{"ready": True}, {"text": ""}]
        with pytest.raises(ValueError, match="no answer"):
            chat._receive(process, unread, 5)


def test_output_is_counted_to_the_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_OUTPUT_CHARS", 100)
    t = template("{% for i in range(10) %}{{ messages[0].content }}{% endfor %}")
    assert t.render([{"role": "user", "content": "\U0001f600" * 10}]) == "\U0001f600" * 100
    with pytest.raises(FormatError, match="made more than 100 characters"):
        t.render([{"role": "user", "content": "x" * 11}])


def test_strings_that_double_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_MEMORY_BYTES", 128 << 20)
    grow = "{% set n = namespace(a='x') %}{% for i in range(40) %}{% set n.a = n.a + n.a %}{% endfor %}"
    with pytest.raises(FormatError, match="needs more than 128 MiB of memory"):
        template(grow).render(HI)


def test_after_a_failure_the_next_conversation_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_RENDER_S", 1.0)
    t = template("{% if messages[0].content == 'loop' %}" + ENDLESS + "{% endif %}fine")
    for content in ("loop", "raise"):
        if content == "loop":
            with pytest.raises(FormatError, match="took longer"):
                t.render([{"role": "user", "content": content}])
        assert t.render(HI) == "fine"
    assert t._process is not None
    os.kill(t._process.pid, signal.SIGKILL)
    with pytest.raises(FormatError, match="ended the process that rendered it: code -9"):
        t.render(HI)
    assert t.render(HI) == "fine"


RENDER = """
import sys
from ggmq.chat import ChatTemplate
from ggmq.gguf import GGUF
from ggmq.tokenizer import Vocabulary
v = Vocabulary(GGUF(sys.argv[1]))
v.chat_template = sys.argv[2]
t = ChatTemplate(v)
print(t._process.pid, flush=True)
t.render([{"role": "user", "content": "Hi"}])
"""


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_a_kill_end_a_rendering_at_once(sig: signal.Signals) -> None:
    p = subprocess.Popen([sys.executable, "-c", RENDER, str(BUNDLED), ENDLESS], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert p.stdout is not None
    child = int(p.stdout.readline())
    due = time.monotonic() + 20
    while _cpu_ticks(child) < 30:  # it is in the template by then
        assert time.monotonic() < due
        time.sleep(0.02)
    p.send_signal(sig)
    _, err = p.communicate(timeout=20)
    assert p.returncode == -sig and ("KeyboardInterrupt" in err or sig == signal.SIGKILL)
    left = _cpu_ticks(child)
    while _cpu_ticks(child) >= 0 and time.monotonic() < due:
        time.sleep(0.02)
    assert _cpu_ticks(child) == -1 and left < 250  # by itself it would have gone on to its bound of 6 s


def with_template(path: Path, source: str) -> Path:
    """The bundled model with a chat template, as a key whose length keeps the alignment of all that follows."""
    raw = BUNDLED.read_bytes()
    n_kv = struct.unpack_from("<Q", raw, 16)[0]
    source += " " * (-len(key("tokenizer.chat_template", STRING, text(source))) % 32)
    added = key("tokenizer.chat_template", STRING, text(source))
    path.write_bytes(raw[:16] + struct.pack("<Q", n_kv + 1) + added + raw[24:])
    return path


RUN = [sys.executable, "-m", "ggmq", "run", "-n", "2", "--temp", "0", "--workers", "1", "--device", "reference"]


def test_a_chat_ends_with_what_its_template_did(tmp_path: Path) -> None:
    for source, code, words in (("{{ messages[-1].content }}", 0, "decode"), ("{{ 'x' * 10 ** 9 }}", 1, "needs more than")):
        model = with_template(tmp_path / "m.gguf", source)
        r = subprocess.run([*RUN, "-m", str(model)], cwd=ROOT, input="Once upon\n", capture_output=True, text=True,
                           timeout=60)  # fmt: skip
        assert r.returncode == code and words in r.stderr, r.stderr
        assert "bug" not in r.stderr and "Traceback" not in r.stderr


def test_a_chat_takes_a_system_message_as_it_is_and_thinks_unless_said(tmp_path: Path) -> None:
    system = tmp_path / "s.txt"
    system.write_bytes(b"Tom\n\n")
    source = "{% if enable_thinking %}Once upon a time{% else %}{{ messages[0].content }}{% endif -%}"
    run = [*RUN, "-n", "6", "-m", str(with_template(tmp_path / "m.gguf", source))]

    def out(*options: str) -> str:
        r = subprocess.run([*run, *options], cwd=ROOT, input="Hi\n", capture_output=True, text=True, timeout=60)
        assert r.returncode == 0, r.stderr
        return r.stdout.rstrip("\n")

    on, line, written = (out("--raw", "--no-display-prompt", "-p", p, "--no-escape")
                         for p in ("Once upon a time", "Tom\n", r"Tom\n"))  # fmt: skip
    assert len({on, line, written}) == 3
    assert out("-sys", r"Tom\n") == out("--reasoning", "on", "-sysf", str(system)) == on
    assert (out("-rea", "off", "-sysf", str(system)), out("--reasoning", "off", "-sys", r"Tom\n")) == (line, written)


def test_ctrl_c_ends_a_chat_whose_template_does_not(tmp_path: Path) -> None:
    model = with_template(tmp_path / "m.gguf", ENDLESS)
    p = subprocess.Popen([*RUN, "-cnv", "-m", str(model)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert p.stdin is not None
    p.stdin.write("Hi\n")
    p.stdin.flush()
    due = time.monotonic() + 60
    while not (renderers := [c for c in _children(p.pid) if "rendering.py" in _command(c) and _cpu_ticks(c) > 20]):
        assert time.monotonic() < due and p.poll() is None
        time.sleep(0.02)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 130 and "interrupted" in err, err
    assert _cpu_ticks(renderers[0]) == -1


def _children(pid: int) -> list[int]:
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in out.stdout.split()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _cpu_ticks(pid: int) -> int:
    """Hundredths of a second that a process has computed; -1 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return -1
    return -1 if fields[0] == "Z" else int(fields[11]) + int(fields[12])


def test_the_process_that_renders_needs_nothing_but_jinja() -> None:
    for module in ("rendering", "messages"):
        source = (ROOT / "ggmq" / f"{module}.py").read_text()
        assert not re.search(r"^\s*(from|import) (?!ggmq\.messages)(ggmq|protocol|config|broker)", source, re.MULTILINE)
