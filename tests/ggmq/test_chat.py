"""Chat templates are programs of strangers: they render in a process that is bounded, and every failure says what it was."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ggmq import chat
from ggmq.chat import ChatTemplate
from ggmq.gguf import GGUF
from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError
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
    ("{{ messages.append(1) }}", "refuses the conversation"), ("{{ 1 / 0 }}", "refuses the conversation: division"),
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


def test_ctrl_c_ends_a_chat_whose_template_does_not(tmp_path: Path) -> None:
    model = with_template(tmp_path / "m.gguf", ENDLESS)
    p = subprocess.Popen([*RUN, "-m", str(model)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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
    source = (ROOT / "ggmq" / "rendering.py").read_text()
    assert not re.search(r"^\s*(from|import) (ggmq|protocol|config|broker)", source, re.MULTILINE)
