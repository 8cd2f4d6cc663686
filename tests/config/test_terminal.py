"""What is printed for people is shown, never obeyed, whoever wrote it; what a model writes into a file stays as it is."""

from __future__ import annotations

import os
import pty
import struct
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from config.terminal import safe_line, safe_text
from tests.support.fixtures import ROOT, free_port
from tests.support.gguf_factory import STRING, TENSORS, U32, file, key, tensor, text

BIDI = {chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
EVIL = "a\x1b[2J\x07\x08\r\x7f\x9b31m\u202eb"
SHOWN = r"a\x1b[2J\x07\x08\r\x7f\x9b31m\u202eb"


def obeyed(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs") or c in BIDI


@given(st.text(st.characters(), max_size=40) | st.binary(max_size=40).map(lambda b: b.decode("utf-8", "surrogateescape")))
def test_no_control_character_passes(raw: str) -> None:
    assert not [c for c in safe_line(raw) if obeyed(c)]
    assert not [c for c in safe_text(raw) if obeyed(c) and c not in "\n\t"]
    assert safe_line(raw).isprintable() or not raw.isprintable()
    safe_line(raw).encode()


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"]), max_size=40))
def test_ordinary_text_stays_as_it_is(raw: str) -> None:
    assert safe_line(raw) == safe_text(raw) == raw
    assert safe_text(raw + "\n\t") == raw + "\n\t"


def test_control_characters_are_written_out() -> None:
    assert safe_line(EVIL) == SHOWN and safe_line("x\n\ty") == r"x\n\ty"
    assert safe_line(b"\xff\x9b".decode("utf-8", "surrogateescape") + "\ud800") == r"\xff\x9b\ud800"


def run(*args: str | Path, module: str = "ggmq", stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", module, *map(str, args)], cwd=ROOT, input=stdin, capture_output=True,
                          timeout=120)  # fmt: skip


def on_a_terminal(*args: str | Path) -> tuple[int, bytes]:
    """The exit code of a command, and what its terminal got."""
    ours, theirs = pty.openpty()
    p = subprocess.Popen([sys.executable, "-m", "ggmq", *map(str, args)], cwd=ROOT, stdin=subprocess.DEVNULL,
                         stdout=theirs, stderr=subprocess.DEVNULL)  # fmt: skip
    os.close(theirs)
    out = bytearray()
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # as Linux says that nobody writes any more
            piece = b""
        if not piece:
            break
        out += piece
    os.close(ours)
    return p.wait(60), bytes(out)


def assert_shown(out: bytes) -> None:
    assert not [c for c in out.decode() if obeyed(c) and c != "\n"], out


def test_metadata_and_tensor_names_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "m\x1b[31m\n.gguf"
    keys = [key("general.architecture", STRING, text("llama")), key("k" + EVIL, STRING, text("v" + EVIL)),
            key("raw", STRING, text(b"\xff\xfe\x9b")),
            key("list" + EVIL, 9, struct.pack("<IQ", STRING, 2) + text(EVIL) + text(b"\x80"))]  # fmt: skip
    path.write_bytes(file(keys, [tensor("w" + EVIL, [4])], bytes(16)))
    r = run("info", path)
    assert r.returncode == 0, r.stderr
    assert_shown(r.stdout)
    out = r.stdout.decode()
    assert f"k{SHOWN}: str = v{SHOWN}" in out and f"w{SHOWN}: F32 [4]" in out and r"m\x1b[31m\n.gguf" in out


def test_errors_are_shown(tmp_path: Path) -> None:
    damaged = tmp_path / "m.gguf"
    damaged.write_bytes(file([key("k" + EVIL, U32, b"\1\0\0\0")] * 2, TENSORS))
    cluster = tmp_path / "c.yaml"
    cluster.write_text(r'"\e[31mkey": 1' + "\n")
    for args in (["run", "-m", damaged, "-p", "x"], ["plan", cluster], ["run", "-m", "no\x1b[31m\x9b.gguf", "-p", "x"],
                 ["run", "--rpc", "\x1b[31m"], ["cache", "list", "--cache-dir", f"{damaged}/\x1b[31m"]):  # fmt: skip
        r = run(*args)
        assert r.returncode in (1, 2) and r.stderr, r
        assert_shown(r.stderr)
        assert b"\\x1b" in r.stderr, r.stderr
    for more in (["--device", "CPU\x1b[31m"], ["-p", "\x1b[31m"], ["--cache-dir", f"{damaged}/\x1b[31m"]):
        r = run(*more, module="workers")
        assert r.returncode in (1, 2), r
        assert_shown(r.stderr)
        assert b"\\x1b" in r.stderr, r.stderr


def test_what_a_model_makes_is_shown_on_a_terminal_and_kept_in_a_file(tmp_path: Path) -> None:
    raw = (ROOT / "ggmq" / "data" / "stories.gguf").read_bytes()
    evil = tmp_path / "evil.gguf"
    # where the model says " was" it now says an escape sequence; GPT-2 writes byte 0x1b as U+011B
    old, new = text("\u0120was"), text("\u0120\u011b[")
    assert len(old) == len(new) and raw.count(old) == 1
    evil.write_bytes(raw.replace(old, new))
    prompt = "Once upon a time\x1b[1m"
    command = ("run", "-m", evil, "-p", prompt, "-n", "12", "--temp", "0", "--workers", "1", "--device", "reference")
    piped = run(*command)
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.startswith(prompt.encode()) and b" \x1b[" in piped.stdout[len(prompt) :]
    code, shown = on_a_terminal(*command)
    assert code == 0
    assert_shown(shown.replace(b"\r\n", b"\n"))
    assert shown.replace(b"\r\n", b"\n").decode() == safe_text(piped.stdout.decode())


def test_text_that_is_no_utf8_becomes_the_replacement_character() -> None:
    r = run("tokenize", "--ids", stdin=b"caf\xe9 x")
    good = run("tokenize", "--ids", stdin="caf\ufffd x".encode())
    assert r.returncode == 0 and r.stdout == good.stdout
    command = ["-n", "2", "--temp", "0", "--workers", "1", "--device", "reference"]
    r = subprocess.run([sys.executable, "-m", "ggmq", "run", "-p", b"caf\xe9", *command], cwd=ROOT, capture_output=True,
                       timeout=120)  # fmt: skip
    assert r.returncode == 0 and r.stdout.startswith("caf\ufffd".encode()), r.stderr
    r = run("run", *command, stdin=b"caf\xe9\n")
    assert r.returncode == 0 and b"bug" not in r.stderr, r.stderr


def test_the_name_of_a_worker_is_shown() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m"]
    broker = subprocess.Popen([*command, "ggmq", "broker", "--listen", endpoint], cwd=ROOT, stdout=subprocess.DEVNULL)
    worker = subprocess.Popen([*command, "workers", "--broker", endpoint, "-d", "reference", "--name", "attic\x1b[31m\n"],
                              cwd=ROOT, stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        due = time.monotonic() + 60
        while b"attic" not in (status := run("status", "--broker", endpoint)).stdout:
            assert time.monotonic() < due, status.stderr
        assert_shown(status.stdout)
        assert rb"attic\x1b[31m\n reference" in status.stdout
    finally:
        for p in (worker, broker):
            p.terminate()
            p.wait(10)
