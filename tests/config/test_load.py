"""Cluster files: an error names file, line and the path of the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.load import load_cluster
from config.schema import ClusterFile
from protocol.errors import ConfigError
from tests.support.fixtures import ROOT

GOOD = "name: x\nworkers:\n  - name: a\n    threads: 2\n"


def load(folder: Path, text: str) -> ClusterFile:
    path = folder / "c.yaml"
    path.write_text(text)
    return load_cluster(path)


@pytest.mark.parametrize("example", sorted((ROOT / "config" / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_are_valid(example: Path) -> None:
    assert load_cluster(example).workers


@pytest.mark.parametrize(("text", "where"), [
    ("", r"c\.yaml:1:"),
    ("name: [", r"c\.yaml:1: not YAML"),
    ("name: x\n", r"c\.yaml:1: \$: .*workers"),
    ("workers: []\n", r"c\.yaml:1: \$\.workers"),
    (GOOD + "    thread: 3\n", r"c\.yaml:5: \$\.workers\[0\]\.thread: .*unknown field"),
    (GOOD.replace("2", "many"), r"c\.yaml:4: \$\.workers\[0\]\.threads: Expected `int`"),
    (GOOD.replace("2", "-2"), r"c\.yaml:4: \$\.workers\[0\]\.threads"),
    (GOOD + "    threads: 3\n", r"c\.yaml:5: \$\.workers\[0\]\.threads: the key comes twice"),
    (GOOD + "    launcher: rocket\n", r"c\.yaml:5: \$\.workers\[0\]\.launcher"),
    (GOOD + "    host: other\n", r"c\.yaml:5: \$\.workers\[0\]\.host: launcher local"),
    (GOOD + "  - name: a\n", r"c\.yaml:5: \$\.workers\[1\]\.name: 'a' is also"),
    (GOOD + "split:\n  tensor_split: [1, 1, 1]\n", r"c\.yaml:6: \$\.split\.tensor_split"),
    (GOOD + "broker:\n  listen: 5555\n", r"c\.yaml:6: \$\.broker\.listen"),
    (GOOD + "broker:\n  listen: tcp://127.0.0.1:99999\n", r"c\.yaml:6: \$\.broker\.listen"),
    (GOOD + "broker:\n  advertise: tcp://10.0.0.1:99999\n", r"c\.yaml:6: \$\.broker\.advertise: expected a port"),
    (GOOD + "model: !!python/object/apply:os.system [id]\n", r"c\.yaml:5"),
    ("- a\n- b\n", r"c\.yaml:1: \$"),
])  # fmt: skip
def test_errors_name_line_and_path(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        load(tmp_path, text)


def test_a_broker_listens_where_nobody_else_does_unless_said(tmp_path: Path) -> None:
    def listens(text: str) -> str:
        return load(tmp_path, GOOD + text).broker.listen

    assert listens("") == "tcp://127.0.0.1:0" and listens("broker: {listen: 'tcp://0.0.0.0:0'}\n") == "tcp://0.0.0.0:0"


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + chr(ord(name) - 1)] * 9)}]\n" for name in "bcdefghi") + "workers: *i\n"


@pytest.mark.parametrize(("text", "where"), [
    (LAUGHS, r"c\.yaml:1: anchors and aliases are not taken, got &a"),
    ("workers: *a\n", r"c\.yaml:1: anchors and aliases are not taken, got \*a"),
    (GOOD + "broker:\n  <<: {listen: 'tcp://127.0.0.1:1'}\n", r"c\.yaml:6: \$\.broker\.<<: merge keys are not taken"),
    ("[" * 100_000, r"c\.yaml:1: a cluster file nests at most 16 deep"),
    ("name:\n" + "".join(" " * i + "-\n" for i in range(1, 900)), r"c\.yaml:1\d: a cluster file nests at most 16 deep"),
    ("- " * 100_000, r"c\.yaml:1: a cluster file nests at most 16 deep"),
    ("workers:\n" + "- {name: a}\n" * 50_000, r"c\.yaml:\d+: a cluster file has at most 20000 keys and values"),
    ("name: 1" + ":1" * 400_000, r"c\.yaml:1: a value has at most 8192 characters"),
    ("#" * (1 << 20) + "#", r"c\.yaml: a cluster file has at most 1048576 bytes"),
    ("name: x\nkeys: \x1b\n", r"c\.yaml:2: not YAML: the character U\+001B"),
    ("? [a]\n: b\n", r"c\.yaml:1: \$: expected a key that is a word, got a sequence"),
    ("name: !!timestamp abc\n", r"c\.yaml:1: \$\.name: expected a value of YAML's type timestamp"),
    ("name: !!bool abc\n", r"c\.yaml:1: \$\.name: expected a value of YAML's type bool"),
    ("name: " + "9" * 8000 + "\n", r"c\.yaml:1: \$\.name: expected a value of YAML's type int"),
    (GOOD + 'security: {keys: "a\\0b"}\n', r"c\.yaml:5: \$\.security\.keys"),
    (GOOD + '    command: "worker\\e[2J"\n', r"c\.yaml:5: \$\.workers\[0\]\.command"),
], ids=lambda x: x[:30])  # fmt: skip
def test_files_that_would_grow_or_hide_are_refused_before_they_do(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(str(tmp_path)) + "/" + where):
        load(tmp_path, text)


def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 1048576 bytes"):
        load_cluster(Path("/dev/zero"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster(Path("a\0b.yaml"))


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_arbitrary_text_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_cluster(path)
    except ConfigError:
        pass


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml"):
        load_cluster(tmp_path / "nope.yaml")
