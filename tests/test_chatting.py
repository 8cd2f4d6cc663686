"""Chats: turns that are dropped when the context is full, commands, and what a person at a terminal does."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ggmq.chat import ChatTemplate
from ggmq.cli.editor import unfinished
from ggmq.dialogue import Dialogue, Turn
from ggmq.gguf import GGUF
from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError
from tests.ggmq.test_chat import with_template
from tests.support.fixtures import BUNDLED, ROOT, free_port
from tests.support.processes import GGMQ, WORKER, await_devices, children_of, started
from tests.support.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, LEFT, UP, Terminal, pasted

RUN = [*GGMQ, "run", "--temp", "0", "--workers", "1"]
SHOWN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
REFUSING = "{% if 'no' in messages[-1].content %}{{ raise_exception('not that') }}{% endif %}" + SHOWN
PROMPT, CUT = "> ", "the answer was cut after"


def dialogue(source: str, system: str = "") -> Dialogue:
    v = Vocabulary(GGUF(BUNDLED))
    v.chat_template = source
    return Dialogue(v, ChatTemplate(v) if source else None, system)


def text_of(d: Dialogue, tokens: list[int]) -> str:
    return d.vocabulary.decode(tokens).strip()


@pytest.mark.parametrize(("source", "expected"), [(SHOWN, "Be kind.\nTwo\nAnd.\nThree"), ("", "TwoAnd.\nThree")],
                         ids=["template", "text"])  # fmt: skip
def test_as_many_of_the_oldest_turns_go_as_must(source: str, expected: str) -> None:
    d = dialogue(source, "Be kind.")
    for question, answer in (("One dog", " ran."), ("One cat", " sat."), ("Two", "And.")):
        d.keep(Turn(question, answer), 0)
    whole, none = d.fit("Three", 1000, 10)
    assert none == 0 and text_of(d, whole).count("One") == 2
    n_left = len(dialogue_of(d, 2).fit("Three", 1000, 10)[0])
    tokens, n = d.fit("Three", n_left + 10, 10)
    assert (text_of(d, tokens), n, d.n_dropped, len(d.turns)) == (expected, 2, 0, 3)  # to fit changes nothing
    d.keep(Turn("Three", ""), n)
    assert d.fit("Four", 1000, 10)[1] == 2 and d.n_tokens() < len(whole) and len(d.turns) == 4
    d.clear()
    assert d.fit("Four", 1000, 10)[1] == 0 and text_of(d, d.fit("Four", 1000, 10)[0]).endswith("Four")


def dialogue_of(d: Dialogue, n_dropped: int) -> Dialogue:
    return Dialogue(d.vocabulary, d.template, d.system, turns=d.turns[n_dropped:])


def test_a_question_may_take_the_answers_room_and_is_refused_when_there_is_none() -> None:
    d = dialogue(SHOWN, "Be kind.")
    d.keep(Turn("One", "And."), 0)
    tokens, n = d.fit("Two three", 1000, 10)
    alone = len(dialogue_of(d, 1).fit("Two three", 1000, 10)[0])
    assert n == 0 and d.fit("Two three", alone + 1, 10)[1] == 1
    with pytest.raises(FormatError, match=f"{alone} tokens with the system message do not fit a context of {alone};"):
        d.fit("Two three", alone, 10)
    assert d.n_dropped == 0 and len(d.turns) == 1 and d.fit("Two three", 1000, 10)[0] == tokens


def test_tokens_are_counted_where_a_template_refuses_what_has_no_question() -> None:
    d = dialogue("{% if messages|length < 2 %}{{ raise_exception('ask') }}{% endif %}" + SHOWN, "Be kind.")
    assert 0 < d.n_tokens() < 20
    d.system = ""
    assert d.n_tokens() == dialogue("").n_tokens() == 0


@pytest.mark.parametrize(("text", "is_unfinished"), [
    ("", False), ('"""', True), ('"""a', True), ('"""a"""', False), ('"""\na\n"""\n', False), ('a"""', False),
    ('""""', True),
])  # fmt: skip
def test_three_quotes_keep_a_message_open(text: str, is_unfinished: bool) -> None:
    assert unfinished(text) is is_unfinished


def test_lines_are_answered_beyond_a_full_context_and_one_that_cannot_fit_is_an_error(tmp_path: Path) -> None:
    run = [*RUN, "-m", str(with_template(tmp_path / "m.gguf", SHOWN)), "-cnv", "-c", "128", "-n", "20"]
    lines = "Once upon a time\n/help\n" + "One day Tom went to the park\n" * 6
    r = subprocess.run(run, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count("\n") >= 8 and "clear" not in r.stdout + r.stderr  # /help is a line as any other here
    assert "the context of 128 tokens is full: 1 turn dropped" in r.stderr and r.stderr.count(f"{CUT} 20 tokens; -n") == 8
    r = subprocess.run(run, cwd=ROOT, input="Once\n" + "dog " * 200 + "\nTom\n", capture_output=True, text=True, timeout=120)
    assert r.returncode == 1 and re.search(r"prompt: \d{3} tokens alone do not fit a context of 128;", r.stderr), r.stderr


def test_an_answer_that_fills_the_context_says_so() -> None:
    r = subprocess.run([*RUN, "-c", "256", "--ignore-eos"], cwd=ROOT, input="Once upon a time\n", capture_output=True,
                       text=True, timeout=120)  # fmt: skip
    assert r.returncode == 0 and "the answer was cut: the context of 256 tokens is full" in r.stderr, r.stderr


def test_commands_at_a_terminal_and_a_chat_that_outlives_its_context(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    model = with_template(tmp_path / "m.gguf", REFUSING)
    with Terminal([*RUN, "-m", str(model), "-c", "128", "-n", "20", "-sys", "Be kind."]) as t:
        t.until(PROMPT)
        for command, words in (
            ("/help", r"/save FILE .*\n.*/bye"), ("/context", "of 128 tokens used, 0 turns kept"), ("/system", "\nBe kind."),
            ("/system Be brief.\x1b\rBe good.", "is set"), ("/system", "\nBe brief.\nBe good.\n"),
            ("/bogus 1", "no command /bogus, and it was not sent"), ("/save", "wants the name of a file"),
            (f"/save {tmp_path}/nowhere/x", "No such file"),
        ):  # fmt: skip
            t.type(command + ENTER)
            t.until(words)
            t.until(PROMPT)
        for _ in range(6):
            t.type("One day Tom went to the park" + ENTER)
            t.until(CUT)
            t.until(PROMPT)
        assert "tokens is full: 1 turn dropped" in t.text
        t.type("/context" + ENTER)
        used = re.search(r"(\d+) of 128 tokens used, (\d) turns kept, (\d) dropped", t.until("dropped"))
        assert used and 40 < int(used[1]) <= 128 and int(used[2]) + int(used[3]) == 6
        t.type("dog " * 200 + ENTER)
        t.until(r"ggmq: prompt: \d{3} tokens with the system message do not fit a context of 128; .*larger -c")
        t.type("no" + ENTER)
        t.until("refuses the conversation: not that")
        for words in (f"wrote {saved}: 6 turns", "nothing was written"):
            t.type(f"/save {saved}" + ENTER)
            t.until(re.escape(words))
        t.type("/clear\r/system \"\"\r/context\r")
        t.until(r"\n0 of 128 tokens used, 0 turns kept")
        t.type("/BYE" + ENTER)
        assert t.ended() == 0
        assert re.search(r"\nload +\d", t.text) and t.modes_now == t.modes
    messages = json.loads(saved.read_text())
    assert messages[0] == {"role": "system", "content": "Be brief.\nBe good."}
    assert [m["role"] for m in messages[1:]] == ["user", "assistant"] * 6
    assert messages[1]["content"] == "One day Tom went to the park" and all(m["content"] for m in messages)


def test_ctrl_c_stops_an_answer_and_what_was_typed_meanwhile_is_the_next_message(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with Terminal([*RUN, "-c", "2048", "--ignore-eos"]) as t:
        t.until(PROMPT)
        t.type("Once upon a time" + ENTER)
        t.until("Lily")  # the answer has begun
        t.type("/context\r/sa" + CTRL_C + f"ve {saved}\r")
        answer = t.until("1 turn kept")
        assert "/context" not in answer[: answer.index(PROMPT)] and re.search(r"\n> +(\n|.)*/context", answer)
        t.until(re.escape(f"wrote {saved}: 1 turn"))
        t.until(PROMPT)
        t.type("The dog" + ENTER)  # what was stopped is not in the way of the next
        t.until(r"The dog(\n|.)*\w+ \w+ \w+")
        t.type("/bye" + CTRL_C + "\r")
        assert t.ended() == 0
        assert re.search(r"\nload +\d(.|\n)*\ndecode +\d", t.text) and t.modes_now == t.modes
    messages = json.loads(saved.read_text())
    assert messages[0]["content"] == "Once upon a time" and "Lily" in messages[1]["content"]


def test_ctrl_c_while_a_long_message_is_read_keeps_what_was_before_it(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with Terminal([*RUN, "--workers", "2", "--device", "reference", "-c", "4096", "-n", "3"]) as t:
        t.until(PROMPT)
        t.type("The dog" + ENTER)
        t.until(CUT)
        t.until(PROMPT)
        t.type(pasted("\n".join(f"Tom saw {i} dogs" for i in range(300))) + ENTER)
        t.until("299 dogs")
        time.sleep(1)  # the reference device takes far longer than this
        t.type("The cat" + ENTER + CTRL_C)
        t.until("stopped before the answer began; the message was not kept")
        t.until(CUT)
        t.type(f"/save {saved}" + ENTER)
        t.until("wrote")
        t.type(CTRL_D)
        assert t.ended() == 0
    assert [m["content"] for m in json.loads(saved.read_text()) if m["role"] == "user"] == ["The dog", "The cat"]


def test_a_chat_outlives_its_worker_and_goes_on(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with Terminal([*RUN, "-c", "4096", "-n", "4"]) as t:
        t.until(PROMPT)
        t.type("The dog" + ENTER)
        t.until(CUT)
        t.until(PROMPT)
        for child in children_of(t.process.pid):
            if b"workers" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
        t.type("The cat" + ENTER)
        t.until(r"worker local0 \(CPU\) was lost")
        t.until(CUT)
        t.until(PROMPT)
        t.type(f"/save {saved}" + ENTER)
        t.until("wrote")
        t.type(CTRL_D)
        assert t.ended() == 0
    assert len(json.loads(saved.read_text())) == 4


def test_a_chat_that_waits_for_its_user_leaves_a_worker_that_is_drained(tmp_path: Path) -> None:
    endpoint, quiet = f"tcp://127.0.0.1:{free_port()}", {"stderr": subprocess.DEVNULL}
    worker = [*WORKER, "--broker", endpoint, "-d", "CPU", "-t", "1", "--insecure", "--name"]

    def talk(name: str, meanwhile: Callable[[], None]) -> list[str]:
        saved = tmp_path / name
        with Terminal([*GGMQ, "run", "--temp", "0", "-n", "20", "--broker", endpoint, "--insecure"]) as t:
            t.until(PROMPT)
            t.type("The dog" + ENTER)
            t.until(CUT)
            t.until(PROMPT)
            t.type("The c")
            meanwhile()
            t.type("at" + ENTER)
            t.until(CUT)
            t.type(f"/save {saved}" + ENTER)
            t.until("wrote")
            t.type(CTRL_D)
            assert t.ended() == 0 and "lost" not in t.text
        return [str(m["content"]) for m in json.loads(saved.read_text())]

    def drain() -> None:
        done = subprocess.run([*GGMQ, "drain", "a", "--broker", endpoint], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "may be ended" in done.stdout, done.stderr
        a.terminate()
        a.wait()

    broker = [*GGMQ, "broker", "--listen", endpoint, "--insecure"]
    with started(broker, **quiet), started([*worker, "a"], **quiet) as a, started([*worker, "b"], **quiet):
        await_devices(endpoint, 2)
        alone = talk("alone.json", lambda: None)
        assert talk("drained.json", drain) == alone and alone[2] == "The cat"


@pytest.mark.parametrize(("end", "code"), [(CTRL_C, 0), (CTRL_D, 0), (signal.SIGTERM, 130), (signal.SIGINT, 130)],
                         ids=["ctrl-c", "ctrl-d", "term", "int"])  # fmt: skip
def test_a_chat_ends_at_an_empty_prompt_and_leaves_the_terminal_as_it_was(end: str | signal.Signals, code: int) -> None:
    with Terminal([*RUN, "-n", "4"]) as t:
        t.until(PROMPT)
        if isinstance(end, str):
            t.type("abc" + CTRL_C)  # empties the line only
            t.type("The dog" + ENTER)
            t.until(CUT)
            t.until(PROMPT)
            t.type(end)
        else:
            time.sleep(0.2)
            t.process.send_signal(end)
        assert t.ended() == code
        assert t.modes_now == t.modes and t.raw.rfind("\x1b[?2004l") > t.raw.rfind("\x1b[?2004h")
        assert re.search(r"\nload +\d", t.text) and "Traceback" not in t.text


def test_a_signal_to_end_ends_an_answer_and_the_chat() -> None:
    with Terminal([*RUN, "-c", "4096", "--ignore-eos"]) as t:
        t.until(PROMPT)
        t.type("Once upon a time" + ENTER)
        t.until("Lily")
        t.process.send_signal(signal.SIGTERM)
        assert t.ended() == 130 and t.modes_now == t.modes


def test_lines_are_edited_pasted_in_one_piece_and_remembered(tmp_path: Path) -> None:
    saved, long = tmp_path / "talk.json", "\n".join(f"Tom saw {i} dogs" for i in range(400))
    history = Path(os.environ["XDG_STATE_HOME"]) / "ggmq" / "chat-history"
    with Terminal([*RUN, "-c", "8192", "-n", "3"]) as t:
        t.until(PROMPT)
        for typed in ("Te dog" + LEFT * 5 + "h" + ENTER, pasted("One\nTwo\n") + ENTER, "One" + ALT_ENTER + "day" + ENTER,
                      '"""One\r\rTwo"""' + ENTER, pasted(long) + ENTER):  # fmt: skip
            t.type(typed)
            t.until(CUT)
        t.type(f"/save {saved}" + ENTER)
        t.until("wrote")
        t.type("/bye" + ENTER)
        assert t.ended() == 0
    asked = [m["content"] for m in json.loads(saved.read_text()) if m["role"] == "user"]
    assert asked == ["The dog", "One\nTwo", "One\nday", "One\n\nTwo", long]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    history.chmod(0o644)
    with Terminal([*RUN, "-n", "3"]) as t:  # another chat
        t.until(PROMPT)
        for remembered in ("/bye", "save .*json", "Tom saw 399"):
            t.type(UP)
            t.until(remembered)
        t.type(CTRL_C + "/nothing" + ENTER)
        t.until("/nothing, and(.|\n)*" + PROMPT)
        t.type(UP)
        t.until("/nothing")
        t.type(ENTER)
        t.until("/nothing, and")
        t.type(CTRL_D)
        assert t.ended() == 0 and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_paste_during_an_answer_is_one_message_too(tmp_path: Path) -> None:
    saved, long = tmp_path / "talk.json", "\n".join(f"Tom saw {i} dogs" for i in range(400))
    assert len(long) > 6000  # more than a terminal's line takes
    with Terminal([*RUN, "-c", "8192", "-n", "300", "--ignore-eos"]) as t:
        t.until(PROMPT)
        t.type("Once upon a time" + ENTER)
        t.until("Lily")
        t.type(pasted(long) + ENTER)
        t.until(CUT)
        t.until(CUT)
        t.type(f"/save {saved}" + ENTER)
        t.until("wrote")
        t.type(CTRL_D)
        assert t.ended() == 0
    assert [m["content"] for m in json.loads(saved.read_text()) if m["role"] == "user"] == ["Once upon a time", long]


def test_what_is_typed_while_the_model_loads_is_answered() -> None:
    with Terminal([*RUN, "-n", "3"]) as t:
        t.type("The dog" + ENTER + "/context" + ENTER + "/con")
        t.until("1 turn kept")
        t.type("text" + ENTER)
        t.until("1 turn kept")
        t.type(CTRL_D)
        assert t.ended() == 0


def test_a_history_that_cannot_be_kept_costs_no_chat(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Terminal([*RUN, "-n", "3"], env={"XDG_STATE_HOME": str(tmp_path / "file")}) as t:
        t.until("chat-history: Not a directory; what you type is not remembered")
        t.until(PROMPT)
        t.type("The dog" + ENTER)
        t.until(CUT)
        t.type(CTRL_D)
        assert t.ended() == 0


def test_a_terminal_that_only_prints_will_do() -> None:
    with Terminal([*RUN, "-n", "3"], env={"TERM": "dumb"}) as t:
        t.until(PROMPT)
        for typed, words in (("The dog", CUT), ("/context", "1 turn kept")):
            t.type(typed + ENTER)
            t.until(words)
            t.until(PROMPT)
        t.type(CTRL_D)
        assert t.ended() == 0 and "\x1b[J" not in t.raw and "2004" not in t.raw and re.search(r"\nload +\d", t.text), t.raw


def test_the_editor_is_loaded_for_a_chat_only() -> None:
    code = "import sys; from ggmq.cli import _parser; _parser(); print('prompt_toolkit' in sys.modules)"
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert r.stdout == "False\n", r.stderr
