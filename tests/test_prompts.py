"""Where a prompt comes from and what it is asked with: options, files, pipes and terminals; and outputs that end."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.ggmq.test_chat import with_template
from tests.support.fixtures import BUNDLED, ROOT
from tests.support.processes import GGMQ, WORKER, started
from tests.support.terminal import CTRL_D, ENTER, Terminal

RUN = [*GGMQ, "run", "--workers", "1", "--device", "reference", "-n", "4", "--temp", "0"]
ROLES = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor -%}"
QUESTION = "Lily and Tom"
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
UNBUFFERED = {**os.environ, "PYTHONUNBUFFERED": "1"}


def run(*args: str | Path | bytes, stdin: bytes = b"", code: int = 0) -> subprocess.CompletedProcess[bytes]:
    r = subprocess.run([*RUN, *args], cwd=ROOT, input=stdin, capture_output=True, timeout=120)
    assert r.returncode == code, r.stderr.decode()
    return r


@cache
def continued(text: str) -> bytes:
    """What the bundled model makes of a text as it is."""
    return run("--raw", "--no-display-prompt", "--no-escape", "-p", text).stdout


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled model with a template that writes who says what."""
    return with_template(tmp_path / "chatty.gguf", ROLES)


# -- the template ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_asked_as_the_template_has_it(model: Path, tmp_path: Path) -> None:
    asked, told, raw = (continued(t) for t in (f"user: {QUESTION}|", f"system: Tom had a boat.|user: {QUESTION}|", QUESTION))
    assert len({asked, told, raw}) == 3
    ask = ("-m", model, "-p", QUESTION)
    assert run(*ask).stdout == run(*ask, "-cnv", "-st").stdout == asked
    (tmp_path / "s.txt").write_text("Tom had a boat.\n")
    assert run(*ask, "-sys", "Tom had a boat.").stdout == run(*ask, "-sysf", tmp_path / "s.txt").stdout == told
    assert run(*ask, "-no-cnv").stdout == run(*ask, "--raw").stdout == QUESTION.encode() + raw


def test_chatml_is_used_where_a_template_is_asked_for_and_there_is_none() -> None:
    r = run("-cnv", "-p", QUESTION, "-sys", "Be kind.")
    assert r.stdout == continued("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n" + QUESTION
                                 + "<|im_end|>\n<|im_start|>assistant\n")  # fmt: skip
    assert b"note    stories.gguf has no chat template: ChatML" in r.stderr


@pytest.mark.parametrize(("more", "story"), [
    (["-sys", "x"], b"chatty.gguf has no chat template, so there is no place for it"),
    (["-sysf", "README.md"], b"put it into the prompt, or use ChatML with -cnv"),
    (["-sys", "x", "-sysf", "README.md"], b"-sys and -sysf both give the system message; leave one of them out"),
    (["-f", "README.md"], b"-p and -f both give the prompt; leave one of them out"),
    (["-sysf", "nope.txt"], b"-sysf nope.txt: no such file"),
])  # fmt: skip
def test_what_would_be_dropped_is_an_error(tmp_path: Path, more: list[str], story: bytes) -> None:
    (tmp_path / "chatty.gguf").write_bytes(BUNDLED.read_bytes())
    r = run("-m", tmp_path / "chatty.gguf", "-p", "x", *more, code=2)
    assert r.stdout == b"" and story in r.stderr and len(r.stderr.splitlines()) == 1


def test_a_system_message_without_the_template_is_an_error(model: Path) -> None:
    assert b"-no-cnv (--raw) uses no chat template" in run("-m", model, "--raw", "-p", "x", "-sys", "y", code=2).stderr


# -- standard input ----------------------------------------------------------------------------------------------------


def test_a_prompt_is_the_same_whichever_way_it_comes(model: Path, tmp_path: Path) -> None:
    text = f"One day,\n{QUESTION}"
    (tmp_path / "p.txt").write_text(text + "\n")
    for more in ([], ["-m", model]):
        by_option = run("-p", text, *more)
        assert by_option.stdout.startswith(text.encode()) == (not more)
        assert run("-f", tmp_path / "p.txt", *more).stdout == by_option.stdout
        for source in ([], ["-f", "-"]):
            assert run(*source, *more, stdin=text.encode() + b"\n").stdout == by_option.stdout


def test_an_empty_pipe_is_no_prompt() -> None:
    assert b"no prompt: standard input is empty; give one with -p TEXT" in run(stdin=b"\n", code=2).stderr


def test_a_prompt_does_not_wait_for_a_pipe(model: Path) -> None:
    with started([*RUN, "-m", str(model), "-p", "Tom"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as p:
        assert p.wait(60) == 0


def test_lines_of_a_pipe_are_turns_where_a_chat_is_asked_for(model: Path) -> None:
    first = continued("user: Tom|").decode()
    both = run("-m", model, "-cnv", stdin=b"Tom\nLily\n").stdout.decode()
    assert both == first + continued(f"user: Tom|assistant: {first[:-1]}|user: Lily|").decode()
    assert run("-m", model, "-cnv", "-st", stdin=b"Tom\nLily\n").stdout.decode() == first


# -- a terminal --------------------------------------------------------------------------------------------------------


def test_at_a_terminal_the_chat_goes_on_after_the_prompt(model: Path) -> None:
    answer = continued(f"user: {QUESTION}|").decode().strip()
    with Terminal([*RUN, "-m", str(model), "-p", QUESTION]) as t:
        t.until(re.escape(answer))
        t.until("> ")
        t.type("Lily" + ENTER)
        second = continued(f"user: {QUESTION}|assistant:  {answer}|user: Lily|").decode().strip()
        t.until(re.escape(second))
        t.until("> ")
        t.type(CTRL_D)
        assert t.ended() == 0


@pytest.mark.parametrize("more", [["-st"], ["--raw"], ["-m", str(BUNDLED)]])
def test_at_a_terminal_one_answer_ends_where_no_chat_is_meant(model: Path, more: list[str]) -> None:
    with Terminal([*RUN, "-m", str(model), "-p", QUESTION, *more]) as t:
        assert t.ended() == 0 and "> " not in t.text and t.text.strip()


def test_a_chat_at_a_terminal_ends_after_one_answer_if_said(model: Path) -> None:
    with Terminal([*RUN, "-m", str(model), "-st"]) as t:
        t.until("> ")
        t.type("Lily" + ENTER)
        t.until(re.escape(continued("user: Lily|").decode().strip()))
        assert t.ended() == 0


def test_with_its_output_in_a_file_a_prompt_is_answered_and_that_is_all(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    command = shlex.join([*RUN, "-m", str(model), "-p", QUESTION])
    with Terminal(["sh", "-c", f"{command} > {shlex.quote(str(out))}"]) as t:
        assert t.ended() == 0
    assert out.read_bytes() == continued(f"user: {QUESTION}|")


# -- bytes, outputs, contexts ------------------------------------------------------------------------------------------


def test_bytes_that_are_no_text_are_replaced(model: Path) -> None:
    for raw in (b"caf\xe9", b"\xed\xa0\x80", rb"caf\xe9"):
        shown = raw.decode("utf-8", "replace") if b"\\" not in raw else "caf\ufffd"
        assert run("-p", raw).stdout.startswith(shown.encode())
        assert run("-m", model, "-p", raw, "-sys", b"\xff").stdout == continued(f"system: \ufffd|user: {shown}|")


@pytest.mark.parametrize("option", ["-p", "--no-escape"])
def test_half_a_character_is_replaced_too(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    from ggmq.cli import main

    assert main([*RUN[3:], "-p", "a\ud800b", *([option] if option != "-p" else [])]) == 0
    assert capsys.readouterr().out.startswith("a\ufffdb")


@pytest.mark.parametrize(("args", "story"), [
    (["run", "-p", "x", "--broker", b"\xff:1"], b"expected tcp://HOST:PORT"),
    (["run", "-p", "x", "-m", b"\xff"], b"no such file"),
    (["status", "--broker", b"tcp://\xff:1"], b"expected tcp://HOST:PORT"), (["plan", b"\xff.yaml"], b"\\xff.yaml"),
    (["run", "-p", "x", "--cluster", b"\xff"], b"\\xff"), (["run", "-p", "x", "--device", b"\xff"], b"\\xff"),
    (["run", "-p", "x", "-hf", b"\xff/a"], b"USER/REPO"),
    (["broker", "--listen", b"tcp://\xff:1"], b"expected tcp://HOST:PORT"),
])  # fmt: skip
def test_bytes_that_are_no_text_are_no_bug(args: list[str | bytes], story: bytes) -> None:
    r = subprocess.run([*GGMQ, *args], cwd=ROOT, capture_output=True, timeout=60)
    assert r.returncode in (1, 2) and story in r.stderr, r.stderr
    assert b"bug" not in r.stderr and b"Traceback" not in r.stderr, r.stderr


COMMANDS = [[*RUN[3:], "-p", "One day"], ["info"], ["tokenize"], ["--version"], ["run", "--help"],
            ["plan", "--offline", "config/examples/one-host.yaml"]]  # fmt: skip


@pytest.mark.parametrize("args", COMMANDS, ids=lambda a: a[0])
@pytest.mark.parametrize("env", [BUFFERED, UNBUFFERED], ids=["buffered", "unbuffered"])
def test_a_full_disk_is_said(args: list[str], env: dict[str, str]) -> None:
    with open("/dev/full", "wb") as full:
        r = subprocess.run([*GGMQ, *args], cwd=ROOT, input=b"One day", stdout=full, stderr=subprocess.PIPE, timeout=60,
                           env=env)  # fmt: skip
    assert r.returncode == 1 and r.stderr == b"ggmq: standard output: No space left on device\n", r.stderr


@pytest.mark.parametrize("args", COMMANDS, ids=lambda a: a[0])
@pytest.mark.parametrize("env", [BUFFERED, UNBUFFERED], ids=["buffered", "unbuffered"])
def test_whoever_reads_may_go(args: list[str], env: dict[str, str]) -> None:
    there, here = os.pipe()
    os.close(there)
    r = subprocess.run([*GGMQ, *args], cwd=ROOT, input=b"One day", stdout=here, stderr=subprocess.PIPE, timeout=60, env=env)
    os.close(here)
    assert (r.returncode, r.stderr) == (141, b"")


def test_closed_streams_are_nothing(tmp_path: Path) -> None:
    command = " ".join([*RUN, "-p", "Tom"])
    assert subprocess.run(["bash", "-c", f"{command} <&- >&-"], cwd=ROOT, stderr=subprocess.PIPE, timeout=60).returncode == 0
    r = subprocess.run(["bash", "-c", f"{command} <&- 2>&-"], cwd=ROOT, stdout=subprocess.PIPE, timeout=60)
    assert r.returncode == 0 and r.stdout == run("-p", "Tom").stdout


def test_a_context_beyond_the_trained_one_is_noted() -> None:
    note = b"note    -c 600: stories.gguf was trained with a context of 512 tokens"
    assert note in run("-p", "Tom", "-c", "600").stderr
    assert b"note" not in run("-p", "Tom", "-c", "512").stderr


@pytest.mark.parametrize("args", [["--device"], ["-p", "0", "-d", "reference"]])
def test_a_worker_says_what_its_output_did(args: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        r = subprocess.run([*WORKER, *args], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert (r.returncode, r.stderr) == (1, b"worker: standard output: No space left on device\n")
    there, here = os.pipe()
    os.close(there)
    r = subprocess.run([*WORKER, *args], cwd=ROOT, stdout=here, stderr=subprocess.PIPE, timeout=60)
    os.close(here)
    assert (r.returncode, r.stderr) == (141, b"")
