"""The page's files: what is served, under which policy, and that other people's files are what they published."""

from __future__ import annotations

import hashlib
import re
import tomllib
from fnmatch import fnmatch

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from ggmq.server import page
from tests.support.fixtures import ROOT

OURS = [p for p in sorted(page.WEB.rglob("*")) if p.is_file() and "vendor" not in p.parts]


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=page.routes()))


def test_the_page_and_all_that_it_names_are_served_under_a_policy_that_runs_nothing_else(client: TestClient) -> None:
    whole = client.get("/")
    assert whole.status_code == 200 and whole.headers["content-type"].startswith("text/html")
    policy = dict(part.strip().partition(" ")[::2] for part in whole.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'" and "unsafe" not in str(policy)
    wanted = set(re.findall(r'(?:src|href)="(web/[^"]+)"', whole.text))
    assert "web/app.js" in wanted
    seen: set[str] = set()
    while new := wanted - seen:
        for name in new:
            got = client.get(f"/{name}")
            assert got.status_code == 200, name
            if name.endswith("js"):
                assert got.headers["content-type"].startswith("text/javascript")
                if "/vendor/" not in name:
                    wanted |= {f"web/{there}" for there in re.findall(r'from "\./([^"]+)"', got.text)}
        seen |= new
    assert client.get("/", headers={"If-None-Match": whole.headers["etag"]}).status_code == 304


@pytest.mark.parametrize("name", ["../page.py", "..%2fpage.py", "vendor/README.md", "vendor", "", "nothing.js"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/web/{name}").status_code == 404


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_our_files_ask_no_other_host_and_set_no_html(path) -> None:  # type: ignore[no-untyped-def]
    text = path.read_text()
    assert not set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}
    assert not re.search(r"(inner|outer|Adjacent)HTML|document\.write|\beval\(|new Function", text)
    assert not re.search(r"<script>|\sstyle=|\son\w+=\"", text)
    assert len(text.splitlines()) <= 800


def test_vendored_files_are_what_their_packages_have_and_have_licences() -> None:
    vendor = page.WEB / "vendor"
    rows = re.findall(r"^\| (\S+) \| .+ \| ([^|]+) \| ([0-9a-f]{64}) \|$", (vendor / "README.md").read_text(), re.MULTILINE)
    for name, _, digest in rows:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest, name
    scripts = {p.relative_to(vendor).as_posix() for p in vendor.rglob("*.*js")}
    assert scripts == {name for name, _, _ in rows}
    for _, licences, _ in rows:
        assert all((vendor / licence.strip()).is_file() for licence in licences.split(","))


def test_all_files_are_installed() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ggmq.server"]
    for path in page.WEB.rglob("*"):
        name = path.relative_to(page.WEB.parent).as_posix()
        assert path.is_dir() or any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns), name
