"""A command line says what it says: no option is guessed from its beginning, and what llama.cpp has besides is named."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.commandline import Foreign, Parser
from ggmq.cli import _parser, foreign, main
from tests.support.fixtures import ROOT
from workers.__main__ import parser as worker_parser

RUN = [sys.executable, "-m", "ggmq", "run", "--workers", "1", "--device", "reference", "-n", "4", "--temp", "0"]


def parsed(*words: str) -> argparse.Namespace:
    return _parser().parse_args(["run", *words])


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command line that is refused prints: one line, with exit code 2."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and len(err.splitlines()) == 1, err
    return err


def test_what_llama_cpp_has_too_is_taken() -> None:
    a = parsed("-p", "x", "-no-cnv", "-st", "--temperature", "0.5", "--n-predict", "7", "--ctx-size", "64", "--threads", "2",
               "--seed", "3", "-ngl", "all", "-dev", "reference", "-hfr", "a/b")  # fmt: skip
    assert (a.conversation, a.single_turn, a.temp, a.n_predict, a.ctx_size) == (False, True, 0.5, 7, 64)
    assert (a.threads, a.seed, a.ngl, a.device, a.hf_repo) == (2, 3, None, "reference", "a/b")
    assert parsed("-cnv").conversation is True is parsed("--no-conversation", "--conversation").conversation
    assert parsed().conversation is None and parsed("--raw").conversation is False


@pytest.mark.parametrize(("words", "said"), [
    ("-fa on", 0), ("-fa", 1), ("-fa off", 1), ("--flash-attn auto", 0), ("--mlock", 1), ("--no-mmap", 1), ("--jinja", 0),
    ("-ub 512", 1), ("--presence-penalty 0.0 --mirostat 0 --typical 1", 0), ("-tb=2", 1),
    ("--no-warmup --no-perf --color", 2), ("-np 1", 0), ("--top-nsigma -1.0", 0), ("-sm layer", 0),
])  # fmt: skip
def test_what_changes_nothing_is_taken_with_a_note(capsys: pytest.CaptureFixture[str], words: str, said: int) -> None:
    a = parsed(*words.split(), "-f", "story.txt", "-n", "5")
    assert (a.file, a.n_predict, a.conversation) == ("story.txt", 5, None)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == said and all(re.match(r"note    -\S+: \S", line) for line in notes), notes


@pytest.mark.parametrize(("words", "story"), [
    ("-np 4", "-np: .*ggmq bench --streams"), ("-hfd user/repo", "-hfd: get it with"),
    ("--grammar root", "--grammar: .*grammar"), ("--lora x", "--lora: merge it"), ("-r User:", "-r: .*end token"),
    ("-hft token", "-hft: set HF_TOKEN"), ("--list-devices", "ggmq worker --device"), ("-sm row", "--tensor-split"),
    ("--mirostat 2", "--mirostat: .*--top-k"), ("-i", "-i: leave -p out"), ("--chat-template chatml", "--raw"),
])  # fmt: skip
def test_what_would_change_something_says_what_to_do(capsys: pytest.CaptureFixture[str], words: str, story: str) -> None:
    err = refusal(capsys, "run", "-p", "x", *words.split())
    assert re.search(story, err) and err.startswith(f"ggmq run: {words.split()[0]}: "), err


@pytest.mark.parametrize(("words", "like"), [
    ("run --n-predit 4", "--n-predict"), ("run --pred 4", "--predict"), ("run --ctx_size 4", "--ctx-size"),
    ("run -t4", "-t 4"), ("run -n128", "-n 128"), ("run --tempp=1", "--temp"), ("rnu", "run"), ("satus", "status"),
    ("status --brokr x", "--broker"), ("bench --stream 2", "--streams"), ("run --no-cnv", "--no-conversation"),
])  # fmt: skip
def test_a_slip_is_told_with_what_may_be_meant(capsys: pytest.CaptureFixture[str], words: str, like: str) -> None:
    assert f"; did you mean {like}?" in refusal(capsys, *words.split())


@pytest.mark.parametrize(("words", "story"), [
    ("run --xyzzy", "no option --xyzzy; `ggmq run --help`"), ("run hello", "'hello' belongs to no option; give the model"),
    ("run -p", "-p/--prompt: expected one argument"), ("run -p -n 4", "-p/--prompt: expected one argument"),
    ("run -p --temp=1", "-p/--prompt: expected one argument"), ("-m x", "as in `ggmq run -m`"), ("", "required: COMMAND"),
    ("run --ignore-eos=1", "ignore-eos"), ("plan", "required: CLUSTER.yaml"), ("run -m a -hf b/c", "not allowed with"),
])  # fmt: skip
def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str], words: str, story: str) -> None:
    assert story in refusal(capsys, *words.split())


def test_a_value_may_begin_like_an_option() -> None:
    assert parsed("-p", "- one", "--seed", "-1").prompt == "- one" and parsed("-p", "-fa").prompt == "-fa"
    assert parsed("-p=-n", "--temp=0.5").prompt == "-n" and parsed("-p", "").prompt == "" == parsed("-p=").prompt
    assert parsed("-p", "--hello there").prompt == "--hello there" and parsed("-p", "a=b", "-f", "-").file == "-"


def test_every_option_of_llama_cpp_here_is_ours_or_told_never_both() -> None:
    ours = set(next(iter(a for a in _parser()._actions if a.choices)).choices["run"]._option_string_actions)
    assert not ours & set(foreign.RUN)
    for name, f in foreign.RUN.items():
        assert f.value in ("none", "one", "maybe") and re.fullmatch(r"--?[a-zA-Z][a-z0-9-]*", name)
        assert f.story or f.taken, name
        named = re.findall(r"(?<![\w-])(?<!worker )(?<!bench )--[a-z-]+", f.story)
        assert not [n for n in named if n not in ours and n != "--device"], name  # what is proposed exists


def test_a_server_is_told_as_llama_server_is(capsys: pytest.CaptureFixture[str]) -> None:
    words = "-m a.gguf -hf b/c -np 8 -cb --metrics --jinja -fa on --host 0.0.0.0 --port 0 --threads-http 4 -c 512 -ctk q8_0"
    a = _parser().parse_args(["serve", *words.split()])
    assert (a.parallel, a.host, a.port, a.ctx_size, a.hf_repo) == (8, "0.0.0.0", 0, 512, ["b/c"])
    assert "--threads-http: one thread" in capsys.readouterr().err
    for words, story in (("--ssl-key-file x", "reverse proxy"), ("--pooling mean", "a request says it"), ("-nocb", "-np 1"),
                         ("--models-dir x", "-m FILE for each"), ("--grammar x", "a request says it")):  # fmt: skip
        assert story in refusal(capsys, "serve", *words.split())
    commands = next(iter(a for a in _parser()._actions if a.choices)).choices
    assert not set(commands["serve"]._option_string_actions) & set(commands["serve"].foreign)


WORDS = ["-m", "-cnv", "-t4", "x", "-f", "--temp", "--temp=1", "--", "-", "-fa", "on", "--mod", "--model=y", "-c", "-cx",
         "--quiet", "--quie"]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), max_size=6))
def test_a_value_is_what_stands_behind_its_option(words: list[str]) -> None:
    p = Parser(prog="p")
    p.foreign = {"-fa": Foreign("", "maybe", taken=True)}
    takes = {"model": ["-m", "--model"], "f": ["-f"], "c": ["-c"], "temp": ["--temp"]}
    for names in takes.values():
        p.add_argument(*names)
    p.add_argument("--quiet", action="store_true")
    p.add_argument("rest", nargs="*")
    try:
        got = vars(p.parse_args(words))
    except SystemExit as e:
        assert e.code == 2
        return
    written = [*pairwise(words), *(tuple(w.split("=")) for w in words if "=" in w)]
    for dest, names in takes.items():
        assert got[dest] is None or any((name, got[dest]) in written for name in names)
    assert not got["quiet"] or "--quiet" in words


def test_workers_take_whole_options_too(capsys: pytest.CaptureFixture[str]) -> None:
    a = worker_parser().parse_args(["-H", "127.0.0.1", "-p", "0", "-c", "-d", "CPU,reference", "-t", "2"])
    assert (a.host, a.port, a.cache, a.device, a.threads) == ("127.0.0.1", 0, True, "CPU,reference", 2)
    assert worker_parser().parse_args(["--device"]).device == "\0list"
    for words, said in ((["-p50052"], "-p50052; did you mean -p 50052?\n"),
                        (["--devic", "CPU"], "; did you mean --device?\n"),
                        (["--parent-pi", "1"], "no option --parent-pi; `worker --help`")):  # fmt: skip
        with pytest.raises(SystemExit):
            worker_parser().parse_args(words)
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and said in err, err


def test_flags_as_llama_cli_is_called_run(tmp_path: Path) -> None:
    words = ["-p", "Once upon", "-fa", "on", "-no-cnv", "-st", "--mlock", "-ngl", "99", "-ctk", "f16", "--no-warmup"]
    r = subprocess.run([*RUN, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    plain = subprocess.run([*RUN, "-p", "Once upon"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and r.stdout == plain.stdout != "", r.stderr
    assert "note    --mlock: " in r.stderr
