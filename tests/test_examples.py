"""What lies in examples/ for people to copy: its commands are ones that the programs take, its files are there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
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
