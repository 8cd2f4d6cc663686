"""What lies in examples/ for people to copy: its commands are ones that the programs take, its programs run; and so do the
manual's."""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fixtures import ROOT
from workers.__main__ import parser

UNIT = ROOT / "examples" / "ggmq-worker.service"
CONTAINER = ROOT / "examples" / "Containerfile"


def test_the_unit_starts_a_worker() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    command, *options = shlex.split(line)
    assert command == "%h/ggmq/.venv/bin/worker"
    args = parser().parse_args(options)
    assert (args.host, args.port, args.cache) == ("0.0.0.0", 50052, True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("%h/ggmq/.venv/bin/worker", shutil.which("true") or "/bin/true"))
    r = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    about = [line for line in (r.stdout + r.stderr).splitlines() if UNIT.name in line]
    assert not about, about


def test_the_container_file_copies_what_is_there_and_starts_a_worker() -> None:
    text = CONTAINER.read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    packages = re.search(r"\npackages = \[\n(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert packages is not None and {p.split(".")[0] for p in re.findall(r'"([^"]+)"', packages[1])} <= set(copied)
    entry, options = (json.loads(x) for x in re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE))
    assert entry == ["worker"] and parser().parse_args(options).port == 50052
    assert "EXPOSE 50052" in text


SAYS = {
    "generate": r", there was a little girl named Lily\..*\(40 tokens, length\)\n.+\n\[\('local0/CPU', 0, 2\)",
    "tools": r"weather\((Rome|Oslo)\) is (sunny|snow)\n\{'coat': (True|False), 'city': '(Rome|Oslo)'\}\n",
    "many": r"The dog was a dog named .*\nThe cow was.*\ntoo late: cancelled",
    "similarity": r"0\.\d{3}  Tom and Lily went to the zoo\.\n(0\.\d{3}  .*\n){2}",
    "op": r"y \(5, 64\) and hidden \(5, 96\) on local0/CPU, as NumPy has them\n",
    "own_cluster": r"local0/CPU ready\nlocal1/CPU ready\n( .*\[\('local0/CPU', 0, 2\), \('local1/CPU', 2, 4\)\]\n){2}",
}  # fmt: skip
"""The programs that anyone can run, and what they print."""


@pytest.mark.parametrize("name", SAYS)
def test_a_program_runs(name: str) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / f"{name}.py")]
    r = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                       timeout=120)  # fmt: skip
    assert r.returncode == 0 and re.fullmatch(f"(?s){SAYS[name]}.*", r.stdout) and not r.stderr, r.stdout + r.stderr


def test_the_manual_of_python_says_what_comes() -> None:
    """Its blocks, one after the other."""
    page = ROOT / "docs" / "python.md"
    blocks = re.findall(r"^```pycon\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append)
    assert test.examples and not runner.failures, "".join(said)
