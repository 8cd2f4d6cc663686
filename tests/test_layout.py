"""The architecture as a test: who may import whom, where sockets live, and that generated pages are current."""

from __future__ import annotations

import ast
import graphlib
import tomllib
from pathlib import Path

import pytest

from docs.make_ops import page
from tests.support.fixtures import ROOT

MAY_IMPORT = {
    "protocol": {"protocol"},
    "config": {"config", "protocol"},
    "broker": {"broker", "protocol", "config"},
    "workers": {"workers", "protocol", "config"},
    "ggmq": {"ggmq", "protocol", "config", "broker"},
}
ZMQ_MODULES = {"loop", "auth", "door", "listening", "transfer", "cluster", "front", "sockets", "uplink", "zap"}
FILES = [p for package in MAY_IMPORT for p in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imports(path)}
    assert tops & set(MAY_IMPORT) <= MAY_IMPORT[package]
    if package in ("protocol", "broker"):
        assert "numpy" not in tops
    if package == "protocol":
        assert not tops & {"zmq", "numba", "yaml"}
    if "zmq" in tops:
        assert path.stem in ZMQ_MODULES
    if "cupy" in tops:
        assert path.parent == ROOT / "workers" / "devices" / "cuda"
    assert path.stem not in ("utils", "helpers", "manager")


def modules(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{a.name}" for a in node.names}
            found |= {name for name in names if name in MODULES} or {node.module}
    return found & MODULES.keys()


MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
HELD = ("protocol", "config", "broker", "workers", "ggmq")


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows = {name: modules(path) - {name} for name, path in MODULES.items() if name.split(".")[0] in HELD}
    graphlib.TopologicalSorter(arrows).prepare()


PURE_MODULES = {
    "state",
    "placement",
    "pages",
    "scheduler",
    "membership",
    "stages",
    "traffic",
    "links",
    "arrivals",
    "turns",
    "fetches",
}
PURE = [p for p in FILES if p.stem in PURE_MODULES]


@pytest.mark.parametrize("path", PURE, ids=lambda p: str(p.relative_to(ROOT)))
def test_state_machines_are_pure(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"zmq", "time", "random", "secrets", "os", "socket", "threading", "uuid"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_of_a_size_that_can_be_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_the_op_page_is_current() -> None:
    assert (ROOT / "docs" / "ops.md").read_text() == page(), "run `python -m docs.make_ops`"


def test_the_readme_and_the_docs_link_to_files_that_exist() -> None:
    import re

    for doc in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", doc.read_text()):
            assert (doc.parent / target).exists(), f"{doc.name}: {target}"


def test_every_package_is_in_what_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in FILES if p.name == "__init__.py"}
    assert set(listed) == there
