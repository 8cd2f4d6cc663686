"""A real Chromium at a real server, and what the tests of the page say often."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

KEY = "a-key-of-the-tests"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 375, "height": 812}
# QUIC and the browser's own errands off: it asks nobody but the server
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def chromium() -> str:
    """Its path. Skips, saying so, without it."""
    found = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), "")
    found = os.environ.get("CHROMIUM", found)
    if not found:
        pytest.skip("no Chromium here: apt-get install chromium, or CHROMIUM=/path/to/it")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no Playwright here: pip install playwright")
    return found


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def serious_faults(page: Page) -> list[object]:
    """What axe-core finds serious or critical in what is shown now. Skips, saying so, without it."""
    files = pytest.importorskip("axe_playwright_python", reason="no axe-core here: pip install axe-playwright-python")
    page.evaluate((Path(files.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [(f["id"], [n["html"][:200] for n in f["nodes"]]) for f in found if f["impact"] in ("serious", "critical")]


class Visit:
    """A person at the page: a browser profile of its own. Whatever the page asks of others, or the policy forbids, is kept.

    Attributes: asked_elsewhere; faults: errors of scripts and refusals of the policy.
    """

    def __init__(self, browser: Browser, url: str, *, key: str = KEY, phone: bool = False, dark: bool = False) -> None:
        self.url, self.faults, self.asked_elsewhere = url, list[str](), list[str]()
        self.context: BrowserContext = browser.new_context(
            viewport=PHONE if phone else DESKTOP, color_scheme="dark" if dark else "light", has_touch=phone, is_mobile=phone,
            reduced_motion="reduce", accept_downloads=True, permissions=["clipboard-read", "clipboard-write"],
        )  # fmt: skip
        self.context.set_default_timeout(20_000)
        if key:
            self.context.add_init_script(f"sessionStorage.setItem('ggmq.key', {key!r})")
        self.context.on("request", self._asked)
        self.page = self.open()

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.url + "/", "blob:")):
            self.asked_elsewhere.append(request.url)

    def open(self, where: str = "/") -> Page:
        """A tab."""
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda said: self._said(said.type, said.text))
        page.goto(self.url + where)
        page.wait_for_selector("html[data-connected]")
        return page

    def _said(self, kind: str, text: str) -> None:
        if "Content Security Policy" in text or "TrustedHTML" in text or (kind == "error" and "Failed to load" not in text):
            self.faults.append(text)

    def settle(self, **settings: object) -> None:
        """Settings as the page keeps them, then the page anew."""
        self.page.evaluate("s => localStorage.setItem('ggmq.settings', JSON.stringify(s))", settings)
        self.page.reload()
        self.page.wait_for_selector("html[data-connected=true]")

    def say(self, text: str, page: Page | None = None) -> None:
        page = page or self.page
        page.fill("#field", text)
        page.press("#field", "Enter" if not page.evaluate("matchMedia('(pointer: coarse)').matches") else "Control+Enter")

    def answered(self, n: int, page: Page | None = None) -> str:
        """The text of the last of n answers, once it is whole."""
        page = page or self.page
        page.wait_for_function(
            "n => { const all = document.querySelectorAll('.from-assistant');"
            " return all.length === n && all[n - 1].querySelector('.facts span') }", arg=n)  # fmt: skip
        return page.locator(".from-assistant > .body").last.inner_text()

    def close(self) -> None:
        self.context.close()
        assert self.faults == [] and self.asked_elsewhere == []


@contextlib.contextmanager
def visiting(browser: Browser, url: str, **how: Any) -> Iterator[Visit]:
    visit = Visit(browser, url, **how)
    try:
        yield visit
    except BaseException:
        if folder := os.environ.get("GGMQ_SHOTS"):  # what it looked like when it went wrong
            visit.page.screenshot(path=Path(folder) / "failed.png")
        visit.context.close()
        raise
    visit.close()
